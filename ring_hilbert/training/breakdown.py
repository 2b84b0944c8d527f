# SPDX-License-Identifier: Apache-2.0
"""Time breakdown of a profiled step: seconds of matrix products, attention, elementwise work, loss, communication, idleness."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]  # the package has no __all__
from torch.profiler import record_function

PARTS: tuple[str, ...] = (
    "products", "attention_forward", "attention_backward", "elementwise", "loss", "copies", "communication_exposed",
    "communication_hidden", "idle",
)  # fmt: skip
LOSS = "ring_hilbert: loss"
_PRODUCT = re.compile(r"gemm|nvjet|cutlass|cublas|xmma|splitk|aten::(add|bad)?d?b?mm$", re.IGNORECASE)
_COMMUNICATION = re.compile(r"nccl|ring_hilbert: wait|c10d::", re.IGNORECASE)
_COPY = re.compile(r"memcpy|memset", re.IGNORECASE)


class Span(NamedTuple):
    """Work on a device, or a range named by the program, from `start` to `end`, in microseconds."""

    name: str
    start: float
    end: float
    named: bool = False


def marked_loss() -> record_function:
    """A context that marks the computation of the loss."""
    return record_function(LOSS)


def breakdown(events: Iterable[Any], seconds: float, *, cuda: bool) -> dict[str, float]:
    """Seconds of each of PARTS in a step that took `seconds`, from the events of `torch.profiler`.

    On a GPU these are kernel times: a kernel in a range named by the program belongs to that range, otherwise its own name decides.
    Communication is exposed while nothing else runs and hidden otherwise; idle is when nothing runs at all. On the CPU they are
    operator times on this rank's threads; communication is then the time waited for it, and idle what no operator accounts for.
    """
    return (
        of_device([_span(e) for e in events if e.device_type == DeviceType.CUDA], seconds)
        if cuda
        else _of_host(events, seconds)
    )


def of_device(spans: Sequence[Span], seconds: float) -> dict[str, float]:
    """`breakdown` of a device's spans."""
    ranges = [span for span in spans if span.named and _part_of_range(span.name)]
    work = [span for span in spans if not span.named]
    moving = [span for span in work if _COMMUNICATION.search(span.name)]
    rest = sorted((span for span in work if not _COMMUNICATION.search(span.name)), key=lambda span: span.start)
    found = dict.fromkeys(PARTS, 0.0)
    ranges.sort(key=lambda span: span.start)
    at, open_ranges = 0, list[Span]()
    for span in rest:
        while at < len(ranges) and ranges[at].start <= span.start:
            open_ranges.append(ranges[at])
            at += 1
        open_ranges = [r for r in open_ranges if r.end > span.start]
        part = _part_of_range(open_ranges[-1].name) if open_ranges else _part_by_name(span.name)
        found[part] += (span.end - span.start) / 1e6
    busy, total, both = _covered(rest), _covered(moving), _covered(work)
    found["communication_exposed"] = (both - busy) / 1e6
    found["communication_hidden"] = (total - both + busy) / 1e6
    found["idle"] = max(0.0, seconds - both / 1e6)
    return found


def _of_host(events: Iterable[Any], seconds: float) -> dict[str, float]:
    found = dict.fromkeys(PARTS, 0.0)
    for event in events:
        if event.is_async:  # collectives running alongside the operators
            continue
        part, above = "", event
        while above is not None and not part:
            part = "communication_exposed" if _COMMUNICATION.search(above.name) else _part_of_range(above.name)
            above = above.cpu_parent
        if part or event.name.startswith("aten::"):
            found[part or _part_by_name(event.name)] += event.self_cpu_time_total / 1e6
    found["idle"] = max(0.0, seconds - sum(found.values()))
    return found


def _span(event: Any) -> Span:
    return Span(event.name, event.time_range.start, event.time_range.end, bool(event.is_user_annotation))


def _part_of_range(name: str) -> str:
    """The part that a named range is; empty for others."""
    if name == LOSS or "LinearLossBackward" in name:  # the latter only on the CPU
        return "loss"
    if name.startswith(("ring_hilbert: local", "ring_hilbert: remote")):
        return "attention_backward" if name.endswith("backward") else "attention_forward"
    return ""


def _part_by_name(name: str) -> str:
    return "products" if _PRODUCT.search(name) else "copies" if _COPY.search(name) else "elementwise"


def _covered(spans: Sequence[Span]) -> float:
    """Microseconds in which at least one of the spans ran."""
    total, until = 0.0, -torch.inf
    for span in sorted(spans, key=lambda span: span.start):
        total += max(0.0, span.end - max(until, span.start))
        until = max(until, span.end)
    return total
