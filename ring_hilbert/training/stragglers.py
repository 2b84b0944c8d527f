# SPDX-License-Identifier: Apache-2.0
"""Stragglers: ranks that compute slower than the others, step after step, though every rank's step takes equally long.

Ranks wait for each other in every layer, so the time of a step does not show which is slow. The time of purely local work does:
here one linear layer in each decoder layer, with the same number of rows on every rank, without the collectives around it.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ring_hilbert.training.config import LogConfig


@contextmanager
def collected_once() -> Iterator[Callable[[], None]]:
    """A function to be called in the context: until its end, Python's garbage collector leaves alone what exists at the call.

    To look through all of it takes 0.2 s and more in which no kernel starts, on every rank at another time, and the others wait.
    Where the program has frozen something itself, nothing is thawed at the end.
    """
    frozen = gc.get_freeze_count()

    def settle() -> None:
        gc.collect()
        gc.freeze()

    try:
        yield settle
    finally:
        if not frozen:
            gc.unfreeze()


class Stopwatch:
    """Seconds that some modules take in forward, on the host, or on a CUDA device without synchronising."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self._spans: list[tuple[Any, Any]] = []
        self._began: Any = None
        for layer in layers:
            linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
            if linears:
                largest = max(linears, key=lambda linear: linear.in_features * linear.out_features)
                # Innermost: after the hooks that gather its parameters, before those that free them.
                largest.register_forward_pre_hook(self._begin)
                largest.register_forward_hook(self._end, prepend=True)

    def read(self) -> float:
        """The sum since the last reading; the device must have passed the last of them."""
        spans, self._spans = self._spans, []
        return sum(
            begin.elapsed_time(end) / 1e3 if isinstance(begin, torch.cuda.Event) else end - begin
            for begin, end in spans
        )

    def _begin(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        self._began = _now(args[0])

    def _end(self, _module: nn.Module, args: tuple[Any, ...], _output: Any) -> None:
        self._spans.append((self._began, _now(args[0])))


def _now(tensor: torch.Tensor) -> Any:
    if not tensor.is_cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class Stragglers:
    """Counts for how many steps in a row each rank was slower than `log.straggler_factor` times the median rank."""

    def __init__(self, log: LogConfig) -> None:
        self.factor, self.steps = log.straggler_factor, log.straggler_steps
        self._in_a_row: torch.Tensor = torch.zeros(())

    def step(self, seconds: torch.Tensor) -> tuple[dict[str, float], list[int]]:
        """Metrics of a step, and the ranks to name now: every `log.straggler_steps` steps that one is slow.

        Args:
            seconds: of every rank, `[ranks]`.
        """
        median = seconds.median()  # of two values, the lower
        ratio = seconds / median if median > 0 else torch.ones_like(seconds)
        slow = ratio > self.factor
        self._in_a_row = torch.where(slow, self._in_a_row + 1, 0)
        named = (self._in_a_row > 0) & (self._in_a_row % self.steps == 0)
        metrics = {"slowest_rank": float(ratio.argmax()), "slowest_ratio": ratio.max().item()}
        if (self._in_a_row >= self.steps).any():
            metrics["stragglers"] = float((self._in_a_row >= self.steps).sum())
        return metrics, named.nonzero().flatten().tolist()
