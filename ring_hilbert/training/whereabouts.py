# SPDX-License-Identifier: Apache-2.0
"""Where a rank is in a run, and in which collective: what the watchdog tells the other ranks."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterable
from functools import partial
from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch._C import _distributed_c10d

from ring_hilbert.parallel.wire import Pending

FLIGHT_RECORDER: Any = _distributed_c10d  # whose stub has none of its functions
Phase = Literal["start", "data", "step", "save"]
WAITS = {"foreach_all_gather_copy_out": "all_gather of parameters"}  # FSDP2's


class Whereabouts:
    """What this rank is doing. Set by the training code and read by the watchdog's threads, without locks or messages.

    Attributes:
        phase: which of `timeouts` applies.
        step: the number of the current step.
        part: of the step, or of other work.
        layer: the decoder layer entered last, in forward or backward; empty outside the model.
        moves: counts all changes.
    """

    def __init__(self) -> None:
        self.phase: Phase = "start"
        self.step = 0
        self.part, self.layer = "start-up", ""
        self.moves = 0

    def __str__(self) -> str:
        step = f", step {self.step}" if self.step else ""
        return f"{self.part}{f' of {self.layer}' if self.layer else ''}{step}"

    def enter(self, part: str, layer: str = "") -> None:
        """Record what begins."""
        self.part, self.layer = part, layer
        self.moves += 1

    def follow(self, layers: Iterable[nn.Module]) -> None:
        """Record from now on which layer is entered, ahead of the layers' own hooks, which gather parameters."""
        for number, layer in enumerate(layers):
            name = f"layer {number}"
            layer.register_forward_pre_hook(partial(self._forward, name), prepend=True)
            layer.register_forward_hook(partial(self._output, name), prepend=True)

    def _forward(self, name: str, _layer: nn.Module, _args: Any) -> None:
        self.enter(self.part, name)

    def _output(self, name: str, _layer: nn.Module, _args: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        if tensor.requires_grad:
            tensor.register_hook(partial(self._backward, name))

    def _backward(self, name: str, _gradient: torch.Tensor) -> None:
        self.enter(self.part, name)


class Call(NamedTuple):
    """A Python call: the file and the name of its function."""

    file: str
    name: str


def innermost(thread: int) -> tuple[Call, int] | None:
    """The innermost Python call of a thread of this process, and the instruction where it is; None if it has ended.

    No more than that: a running thread may leave the calls around it meanwhile, and the interpreter crashes on whoever follows
    them. `faulthandler` does so as well if a thread is just being made elsewhere.
    """
    frame = sys._current_frames().get(thread)
    return None if frame is None else (Call(frame.f_code.co_filename, frame.f_code.co_name), frame.f_lasti)


def collective_of(calls: Iterable[Call]) -> str | None:
    """The collective in which a thread is, by some of its calls, innermost first; None if they show none."""
    found = None
    for file, name in calls:
        if name in WAITS:
            found = WAITS[name]
        elif file == dist.distributed_c10d.__file__ and not name.startswith(("_", "get_", "is_")):
            found = name
    return found


def collective_that_failed(trace: TracebackType | None) -> str | None:
    """The collective of a traceback; None if it shows none."""
    frames = [frame for frame, _ in traceback.walk_tb(trace)][::-1]
    for frame in frames:
        if frame.f_code is Pending.wait.__code__:
            return frame.f_locals["self"].transfer
    return collective_of(Call(frame.f_code.co_filename, frame.f_code.co_name) for frame in frames)


def on_device() -> str | None:
    """The first collective that NCCL has not completed, by PyTorch's flight recorder; None if there is none or no NCCL."""
    dump = getattr(FLIGHT_RECORDER, "_dump_nccl_trace_json", None)
    entries = [] if dump is None else _entries(dump(includeCollectives=True, onlyActive=True))
    return _named(entries[0]) if entries else None


def on_host() -> str | None:
    """Gloo's last incomplete collective; point-to-point messages are not recorded."""
    entries = _entries(FLIGHT_RECORDER._dump_fr_trace_json())
    return _named(entries[-1]) if entries and not entries[-1]["retired"] else None


def _entries(trace: bytes) -> list[dict[str, Any]]:
    found = json.loads(trace).get("entries", [])
    return sorted((entry for entry in found if entry["state"] != "completed"), key=lambda entry: entry["record_id"])


def _named(entry: dict[str, Any]) -> str:
    return f"{entry['profiling_name'].partition(':')[2]} (number {entry['collective_seq_id']} of its group)"
