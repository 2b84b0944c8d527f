# SPDX-License-Identifier: Apache-2.0
"""Combs: sets of rows in closed form, so that rows can be counted without being listed."""

from __future__ import annotations

import math
from collections import Counter
from functools import lru_cache
from typing import NamedTuple

import numpy as np


class Comb(NamedTuple):
    """The rows `phase + i * stride` for every integer `i`; `0 <= phase < stride`."""

    phase: int
    stride: int

    @classmethod
    def through(cls, row: int, stride: int) -> Comb:
        """The comb of this stride that holds `row`."""
        return cls(row % stride, stride)

    def holds(self, other: Comb) -> bool:
        """Whether all rows of `other` are rows of this."""
        return other.stride % self.stride == 0 and (other.phase - self.phase) % self.stride == 0

    def meet(self, other: Comb) -> Comb | None:
        """The rows in both (Chinese remainder theorem), None if there are none."""
        divisor = math.gcd(self.stride, other.stride)
        if (other.phase - self.phase) % divisor:
            return None
        step = other.stride // divisor
        times = (other.phase - self.phase) // divisor * pow(self.stride // divisor, -1, step) % step if step > 1 else 0
        return Comb.through(self.phase + times * self.stride, self.stride * step)


class Stretch(NamedTuple):
    """The rows of `[start, stop)` that are in some of `combs`, none of which contains another."""

    start: int
    stop: int
    combs: tuple[Comb, ...]

    def rows(self) -> np.ndarray:
        """The rows, int64, ascending."""
        parts = [np.arange(self.start + (c.phase - self.start) % c.stride, self.stop, c.stride) for c in self.combs]
        return parts[0] if len(parts) == 1 else np.unique(np.concatenate(parts))

    def counts(self, edges: np.ndarray) -> np.ndarray:
        """Number of rows between consecutive ascending `edges [n]`: int64 `[n - 1]`."""
        edges = np.clip(edges, self.start, self.stop)
        upto = np.zeros(len(edges), np.int64)
        for (phase, stride), sign in _inclusions(self.combs):
            upto += sign * -((phase - edges) // stride)
        return np.diff(upto)

    @property
    def size(self) -> int:
        """Number of rows."""
        return sum(s * ((p - self.start) // r - (p - self.stop) // r) for (p, r), s in _inclusions(self.combs))


@lru_cache(maxsize=1 << 16)
def widest(combs: frozenset[Comb]) -> tuple[Comb, ...]:
    """The combs that no other contains; they cover the same rows."""
    kept: list[Comb] = []
    for comb in sorted(combs, key=lambda comb: (comb.stride, comb.phase)):
        if not any(wider.holds(comb) for wider in kept):
            kept.append(comb)
    return tuple(kept)


@lru_cache(maxsize=1 << 16)
def _inclusions(combs: tuple[Comb, ...]) -> tuple[tuple[Comb, int], ...]:
    """Combs with signs that count every row of the union once (inclusion and exclusion)."""
    if not combs:
        return ()
    first, *others = combs
    signs = Counter({first: 1})
    signs.update(dict(_inclusions(tuple(others))))
    shared = widest(frozenset(both for comb in others if (both := first.meet(comb)) is not None))
    signs.subtract(dict(_inclusions(shared)))
    return tuple((comb, sign) for comb, sign in signs.items() if sign)
