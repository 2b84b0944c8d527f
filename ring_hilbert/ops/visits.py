# SPDX-License-Identifier: Apache-2.0
"""Visits: a pattern as a list of partial attentions of some query rows over some key rows.

All are plain integers: the plan counts the same lists that a core executes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ring_hilbert.ops.pattern import Branch, DilatedPattern, Heads


class Chunk(NamedTuple):
    """Rows `[start, stop)` of the whole sequence, which a rank holds as its local rows `local, local + 1, ...`."""

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


class Repeat(NamedTuple):
    """Rows that a further branch also holds, for which pairs count `weight` times: every `period`-th from `query` and `key` on."""

    query: int
    key: int
    period: int
    weight: int = 1


@dataclass(frozen=True)
class Visit:
    """Partial attention of `queries` over `keys` (local rows) for the kv heads `heads` of one residue and of its neighbours.

    Segment `i` of the queries sees segment `i` of the keys. The visit stands for `residues` equal ones, number `t` of which
    is shifted by `t` rows and `t * head_step` heads.

    Attributes:
        causal: keys with a larger row index than the query are masked; otherwise the row index masks nothing.
        weight: how often a pair counts.
        repeats: a pair counts in addition for each of these that holds both rows; each lies within the one before.
    """

    heads: Heads
    queries: Rows
    keys: Rows
    residues: int = 1
    head_step: int = 1
    causal: bool = False
    weight: int = 1
    repeats: tuple[Repeat, ...] = ()

    @property
    def times(self) -> np.ndarray:
        """How often a pair counts, by the smaller of its two `depths`: int64 `[repeats + 1]`."""
        return np.cumsum([self.weight, *(repeat.weight for repeat in self.repeats)])

    @property
    def is_self(self) -> bool:
        """Whether queries and keys are the same rows."""
        return self.queries == self.keys

    @property
    def families(self) -> int:
        """The number of equal pieces of `queries.count x keys.count` pairs: segments x residues x kv heads."""
        return self.queries.segments * self.residues * len(self.heads.indices)

    @property
    def pairs(self) -> int:
        """Computed (query, key) pairs over all kv heads: the triangle of a causal self visit, else the rectangle."""
        q, k = self.queries.count, self.keys.count
        return self.families * (q * (q + 1) // 2 if self.causal and self.is_self else q * k)

    @property
    def cost(self) -> float:
        """The relative duration of the visit, in pairs (measured on CPUs).

        Short rows and every kernel call cost extra, triangles are computed in strips of 512 keys, weights are a mask built
        once, and backward is parallel over two axes of equal pieces.
        """
        q, k = self.queries.count + 40, self.keys.count + 40
        pairs = q * min(q, (q + 512) / 2) if self.causal and self.is_self else q * k
        longest = sorted((self.queries.segments, self.residues, len(self.heads.indices)))[1:]
        threads = min(2, math.prod(longest)) / 2
        return self.families * pairs / threads + (q * k if self.repeats else 0) + 6000

    def rows(self, which: Rows) -> np.ndarray:
        """The row of every query or key, int64 `[segments, residues, count]`."""
        return which.indices()[:, None, :] + np.arange(self.residues)[None, :, None]

    def view(self, x: Tensor, which: Rows) -> Tensor:
        """The rows `which` (`queries` or `keys`) of `x [B, S, Hkv, ...]` as `[B, segments, residues, heads, count, ...]`."""
        batch, _, _, *rest = x.shape
        stride_b, stride_s, stride_h, *strides = x.stride()
        return x.as_strided(
            (batch, which.segments, self.residues, len(self.heads.indices), which.count, *rest),
            (
                stride_b,
                which.pitch * stride_s,
                stride_s + self.head_step * stride_h,
                self.heads.step * stride_h,
                which.stride * stride_s,
                *strides,
            ),
            x.storage_offset() + which.start * stride_s + self.heads.start * stride_h,
        )

    def depths(self) -> tuple[np.ndarray, np.ndarray]:
        """The number of `repeats` that hold each query and each key, int64 `[queries.count]` and `[keys.count]`."""
        queries, keys = np.zeros(self.queries.count, np.int64), np.zeros(self.keys.count, np.int64)
        for query, key, period, _ in self.repeats:
            queries[query::period] += 1
            keys[key::period] += 1
        return queries, keys


def segments_of(branch: Branch, segment_shift: int, start: int, stop: int) -> Iterator[Segments]:
    """The segments of `branch` clipped to rows `[start, stop)`: a partial first, all full ones as one family, a partial last."""
    if start >= stop:
        return
    w = branch.segment_length
    if w is None:
        yield Segments(-segment_shift, start, stop, 1, 0)
        return
    first, last = (start + segment_shift) // w, (stop - 1 + segment_shift) // w
    full_first = first if first * w - segment_shift == start else first + 1
    full_stop = last + 1 if (last + 1) * w - segment_shift == stop else last
    if full_first > full_stop:  # one segment, clipped on both sides
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


def counted_pairs(
    pattern: DilatedPattern, branch: Branch, queries: Segments, keys: Iterable[tuple[int, int]]
) -> Iterator[tuple[Segments, list[tuple[int, int]]]]:
    """The pairs that count for `branch`, of rows in one segment of it: runs of queries, each with the keys that they visit.

    Args:
        pattern, branch: where the branch yields pairs to another, these are left out.
        queries: rows of the segment.
        keys: other rows of the segment, before or behind the queries, as runs `[start, stop)`.
    """
    inner = pattern.yields_to(branch)
    if inner is None:
        yield queries, list(keys)
        return
    if inner.segment_length is None:  # which holds all pairs
        return
    # Only the segments of `inner` at both ends of the queries reach beyond them.
    (_, first, cut), (_, last, stop) = (
        segment_at(inner, pattern.segment_shift, row) for row in (queries.start, queries.stop - 1)
    )
    assert first is not None and cut is not None and last is not None and stop is not None
    runs = [(queries.start, min(cut, queries.stop), first, cut)]
    if cut < queries.stop:
        runs += [(cut, last, cut, last), (last, queries.stop, last, stop)]
    for begin, end, hole, hole_stop in runs:
        if begin < end:
            parts = (part for a, b in keys for part in ((a, min(b, hole)), (max(a, hole_stop), b)))
            yield replace(queries, start=begin, stop=end), [(a, b) for a, b in parts if a < b]


def branch_visits(pattern: DilatedPattern, num_kv_heads: int, chunk: Chunk, causal_rows: bool) -> list[Visit]:
    """The visits among the rows of one chunk, branch by branch: of a pattern that counts pairs per branch.

    `causal_rows` says that causality follows the row index (no positions were given).
    """
    visits: list[Visit] = []
    for branch in sorted(pattern.branches, key=lambda branch: branch.dilation_rate):
        for segments in segments_of(branch, pattern.segment_shift, chunk.start, chunk.stop):
            for offset, heads in pattern.residues(branch, num_kv_heads):
                rows = rows_in(segments, branch.dilation_rate, offset, chunk.start - chunk.local)
                if rows is not None:
                    visits.append(Visit(heads, rows, rows, causal=causal_rows, weight=pattern.weight(branch)))
    return merge_residues(visits)


def crossing_visits(
    pattern: DilatedPattern, num_kv_heads: int, chunks: tuple[Chunk, ...], causal_rows: bool
) -> list[Visit]:
    """The visits from the rows of one of a rank's chunks to those of another; with `causal_rows` never to a later chunk."""
    visits: list[Visit] = []
    for branch, (a, b) in itertools.product(pattern.branches, itertools.permutations(chunks, 2)):
        parts = None if causal_rows and b.start > a.start else shared_segment(branch, pattern.segment_shift, a, b)
        if parts is None:
            continue
        for mine, runs in counted_pairs(pattern, branch, parts[0], [(parts[1].start, parts[1].stop)]):
            for (start, stop), (offset, heads) in itertools.product(runs, pattern.residues(branch, num_kv_heads)):
                queries = rows_in(mine, branch.dilation_rate, offset, a.start - a.local)
                theirs = replace(parts[1], start=start, stop=stop)
                keys = rows_in(theirs, branch.dilation_rate, offset, b.start - b.local)
                if queries is not None and keys is not None:
                    visits.append(Visit(heads, queries, keys, weight=pattern.weight(branch)))
    return merge_residues(visits)


def merge_residues(visits: list[Visit]) -> list[Visit]:
    """The same visits, those that differ by one row and a fixed number of heads merged into one."""
    alike: dict[tuple, list[Visit]] = {}
    for visit in visits:
        size = len(visit.heads.indices)
        distance = visit.keys.start - visit.queries.start
        shape = (replace(visit.queries, start=0), replace(visit.keys, start=0), distance, size, visit.heads.step)
        alike.setdefault((shape, visit.causal, visit.weight, visit.repeats), []).append(visit)
    merged: list[Visit] = []
    for group in alike.values():
        chain: list[Visit] = []
        for visit in sorted(group, key=lambda visit: (visit.queries.start, visit.heads.start)):
            if chain and not _continues(chain, visit):
                merged.append(_chained(chain))
                chain = []
            chain.append(visit)
        merged.append(_chained(chain))
    return merged


def _continues(chain: list[Visit], visit: Visit) -> bool:
    first, last = chain[0], chain[-1]
    step = visit.heads.start - last.heads.start
    known = chain[1].heads.start - first.heads.start if len(chain) > 1 else step
    return visit.queries.start == last.queries.start + 1 and step == known and step > 0


def _chained(chain: list[Visit]) -> Visit:
    step = chain[1].heads.start - chain[0].heads.start if len(chain) > 1 else 1
    return replace(chain[0], residues=len(chain), head_step=step)
