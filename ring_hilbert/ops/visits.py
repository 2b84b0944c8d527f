# SPDX-License-Identifier: Apache-2.0
"""Visits: a pattern as a list of partial attentions of some query rows over some key rows.

Everything here is plain integers: the same lists are counted by the plan and executed by a core.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ring_hilbert.ops.pattern import Branch, DilatedPattern, Heads


class Chunk(NamedTuple):
    """A run of whole-sequence rows `[start, stop)` that a rank holds at its local rows `local, local + 1, ...`."""

    start: int
    stop: int
    local: int


@dataclass(frozen=True)
class Segments:
    """`count` equal pieces of segments of one branch: piece `i` is `[start, stop) + i * pitch`, of segment origin `origin`."""

    origin: int
    start: int
    stop: int
    count: int
    pitch: int


@dataclass(frozen=True)
class Rows:
    """Row `start + i * pitch + j * stride` for segment `i < segments` and place `j < count` in it."""

    start: int
    stride: int
    count: int
    segments: int = 1
    pitch: int = 0

    def indices(self) -> np.ndarray:
        """The rows as int64 `[segments, count]`."""
        return (
            self.start + self.pitch * np.arange(self.segments)[:, None] + self.stride * np.arange(self.count)[None, :]
        )

    def view(self, x: Tensor) -> Tensor:
        """These rows of `x [B, S, ...]` as `[B, segments, count, ...]`, without a copy."""
        batch, _, *rest = x.shape
        stride_b, stride_s, *strides = x.stride()
        return x.as_strided(
            (batch, self.segments, self.count, *rest),
            (stride_b, self.pitch * stride_s, self.stride * stride_s, *strides),
            x.storage_offset() + self.start * stride_s,
        )


@dataclass(frozen=True)
class Visit:
    """Partial attention of `queries` over `keys` (local rows) for the kv heads of one residue of one branch.

    Segment `i` of the queries sees segment `i` of the keys. `queries is keys` marks a self visit.
    """

    heads: Heads
    queries: Rows
    keys: Rows

    @property
    def is_self(self) -> bool:
        """Whether queries and keys are the same rows."""
        return self.queries is self.keys


def segments_of(branch: Branch, segment_shift: int, start: int, stop: int) -> Iterator[Segments]:
    """The segments of `branch` cut to rows `[start, stop)`: a partial first, all full ones as one family, a partial last."""
    if start >= stop:
        return
    w = branch.segment_length
    if w is None:
        yield Segments(-segment_shift, start, stop, 1, 0)
        return
    first, last = (start + segment_shift) // w, (stop - 1 + segment_shift) // w
    full_first = first if first * w - segment_shift == start else first + 1
    full_stop = last + 1 if (last + 1) * w - segment_shift == stop else last
    if full_first > full_stop:  # one segment, cut on both sides
        yield Segments(first * w - segment_shift, start, stop, 1, 0)
        return
    if full_first > first:
        yield Segments(first * w - segment_shift, start, full_first * w - segment_shift, 1, 0)
    if full_stop > full_first:
        origin = full_first * w - segment_shift
        yield Segments(origin, origin, origin + w, full_stop - full_first, w)
    if full_stop <= last:
        origin = last * w - segment_shift
        yield Segments(origin, origin, stop, 1, 0)


def rows_in(segments: Segments, rate: int, offset: int, base: int = 0) -> Rows | None:
    """The rows of `segments` with offset `offset` at dilation `rate`, counted from row `base`; None if there are none."""
    start = segments.start + (offset - (segments.start - segments.origin)) % rate
    if start >= segments.stop:
        return None
    count = -(-(segments.stop - start) // rate)
    return Rows(start - base, rate, count, segments.count, segments.pitch)


def segment_at(branch: Branch, segment_shift: int, row: int) -> tuple[int, int | None, int | None]:
    """Origin, first row and stop row of the segment that holds `row`; unbounded ends are None."""
    w = branch.segment_length
    if w is None:
        return -segment_shift, None, None
    origin = (row + segment_shift) // w * w - segment_shift
    return origin, origin, origin + w


def shared_segment(branch: Branch, segment_shift: int, a: Chunk, b: Chunk) -> tuple[Segments, Segments] | None:
    """The parts in `a` and in `b` of the one segment that reaches from one chunk into the other, if there is one."""
    if a.start >= a.stop or b.start >= b.stop:
        return None
    earlier, later = (a, b) if a.start < b.start else (b, a)
    origin, start, stop = segment_at(branch, segment_shift, earlier.stop - 1)
    if stop is not None and later.start >= stop:
        return None
    parts = [
        Segments(
            origin,
            c.start if start is None else max(c.start, start),
            c.stop if stop is None else min(c.stop, stop),
            1,
            0,
        )
        for c in (a, b)
    ]
    return parts[0], parts[1]


def local_visits(
    pattern: DilatedPattern, num_kv_heads: int, chunks: tuple[Chunk, ...], causal_rows: bool
) -> list[Visit]:
    """All visits among the rows of one rank.

    `causal_rows` says that causality follows the row index (no positions were given), so that a chunk never needs the keys
    of a later one.
    """
    visits: list[Visit] = []
    shift = pattern.segment_shift
    for branch in pattern.branches:
        rate = branch.dilation_rate
        residues = pattern.residues(branch, num_kv_heads)
        for a in chunks:
            for segments in segments_of(branch, shift, a.start, a.stop):
                for offset, heads in residues:
                    rows = rows_in(segments, rate, offset, a.start - a.local)
                    if rows is not None:
                        visits.append(Visit(heads, rows, rows))
            for b in chunks:
                if a is b or (causal_rows and b.start > a.start):
                    continue
                parts = shared_segment(branch, shift, a, b)
                if parts is None:
                    continue
                for offset, heads in residues:
                    queries = rows_in(parts[0], rate, offset, a.start - a.local)
                    keys = rows_in(parts[1], rate, offset, b.start - b.local)
                    if queries is not None and keys is not None:
                        visits.append(Visit(heads, queries, keys))
    return visits
