# SPDX-License-Identifier: Apache-2.0
"""Rings: the visits of a nested pattern with every pair computed once.

In a nested pattern a row that is in branch `i` is in all branches before it, and so are the near keys of a branch: the keys
of its segment that lie in the inner branch's segment are keys of the inner branch too. So a query of depth `c` (in the
branches `0 .. c`, sorted by segment length) looks at the keys of branch 0 in its segment `w_0`, then at those of branch 1 in
`w_1` without `w_0`, and so on; in ring `j` a key of depth `d` counts `min(c, d) - j + 1` times.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

from ring_hilbert.ops.pattern import Branch, DilatedPattern, Heads
from ring_hilbert.ops.visits import (
    Chunk,
    Repeat,
    Rows,
    Segments,
    Visit,
    branch_visits,
    merge_residues,
    segments_of,
)


def nested(pattern: DilatedPattern) -> tuple[Branch, ...] | None:
    """The branches from the innermost to the outermost if they are nested, else None.

    Nested is, sorted by segment length: every dilation rate divides the next, every segment length the next, and every rate
    its own segment length (but for the last), with the offset rule "modulo".
    """
    branches = tuple(
        sorted(pattern.branches, key=lambda b: (math.inf if b.segment_length is None else b.segment_length, b))
    )
    if pattern.offset_rule != "modulo":
        return None
    for (w, r), (next_w, next_r) in itertools.pairwise(branches):
        if next_r % r or (w is not None and (w % r or (next_w is not None and next_w % w))):
            return None
    return branches


def ring_visits(pattern: DilatedPattern, num_kv_heads: int, chunk: Chunk, causal_rows: bool) -> list[Visit]:
    """The visits among the rows of `chunk`, every pair in one of them.

    Raises:
        ValueError: if the pattern is not nested.
    """
    branches = nested(pattern)
    if branches is None:
        raise ValueError(f"the branches of {pattern} are not nested, so their pairs cannot be visited once")
    visits: list[Visit] = []
    w, r = branches[-1]
    whole = w is None or w % r == 0  # else the outermost residues start anew in every segment
    pieces = [(chunk.start, chunk.stop, 0)] if whole else []
    for segments in () if whole else segments_of(branches[-1], pattern.segment_shift, chunk.start, chunk.stop):
        for i in range(segments.count):
            move = i * segments.pitch
            origin = segments.origin + move + pattern.segment_shift
            pieces.append((segments.start + move, segments.stop + move, origin))
    for start, stop, origin in pieces:
        piece = _Piece(pattern, branches, num_kv_heads, start, stop, origin)
        visits += piece.visits(causal_rows)
    visits.sort(key=lambda visit: not visit.opening)
    move = chunk.local - chunk.start
    return merge_residues([replace(v, queries=_moved(v.queries, move), keys=_moved(v.keys, move)) for v in visits])


def rings_pay(pattern: DilatedPattern, num_kv_heads: int, chunk: Chunk) -> bool:
    """Whether ring visits are faster than branch visits, where the row index hides nothing.

    (Where it does, branch visits are triangles, for which there are fused kernels, and ring visits are staircases.)
    """
    branches = nested(pattern)
    if branches is None or len(branches) == 1:
        return False
    lengths = [chunk.stop - chunk.start if w is None else w for w, _ in branches]
    if any(outer > 8 * inner for inner, outer in itertools.pairwise(lengths)):
        return False  # little to save, and many visits
    rings, plain = (make(pattern, num_kv_heads, chunk, False) for make in (ring_visits, branch_visits))
    return sum(visit.cost for visit in rings) < sum(visit.cost for visit in plain)


class _Piece:
    """Rows `[start, stop)`, in which the residues of every branch go on unbroken; those of the last one count from `origin`."""

    def __init__(
        self,
        pattern: DilatedPattern,
        branches: tuple[Branch, ...],
        num_kv_heads: int,
        start: int,
        stop: int,
        origin: int,
    ) -> None:
        self.pattern, self.branches, self.num_kv_heads = pattern, branches, num_kv_heads
        self.start, self.stop, self.origin = start, stop, origin

    def visits(self, causal_rows: bool) -> Iterator[Visit]:
        last = len(self.branches) - 1
        for depth in range(last + 1):
            finest = self.branches[min(depth + 1, last)]
            for _, heads in self.pattern.residues(finest, self.num_kv_heads):
                for ring in range(depth + 1):
                    for queries, keys, inside in self._ring(ring):
                        if not (causal_rows and keys.start >= queries.stop):
                            yield from self._visits(depth, ring, heads, queries, keys, causal_rows and inside)

    def _ring(self, ring: int) -> Iterator[tuple[Segments, Segments, bool]]:
        """(queries, keys, whether they are the same rows) of every part of a ring."""
        shift = self.pattern.segment_shift
        for outer in segments_of(self.branches[ring], shift, self.start, self.stop):
            if ring == 0:
                yield outer, outer, True
                continue
            for inner in segments_of(self.branches[ring - 1], shift, outer.start, outer.stop):
                for i in range(inner.count):
                    a, b = inner.start + i * inner.pitch, inner.stop + i * inner.pitch
                    queries = replace(outer, start=a, stop=b)
                    if outer.start < a:
                        yield queries, replace(outer, stop=a), False
                    if b < outer.stop:
                        yield queries, replace(outer, start=b), False

    def _visits(
        self, depth: int, ring: int, heads: Heads, queries: Segments, keys: Segments, causal: bool
    ) -> Iterator[Visit]:
        """The visits of the queries of one depth; the segments regrouped so that all of a visit begin at the same residue."""
        head, last = heads.start, len(self.branches) - 1
        period = self.branches[min(depth + 1, last)].dilation_rate
        stride = self.branches[depth].dilation_rate
        first = self._phase(min(depth + 1, last), head)
        # the rows of depth or more at this stride, without those of depth + 1
        phases = [first] if depth == last else [first + m * stride for m in range(1, period // stride)]
        regroup = period // math.gcd(period, queries.pitch) if queries.count > 1 else 1
        for i in range(min(regroup, queries.count)):
            move, count = i * queries.pitch, -(-(queries.count - i) // regroup)
            pitch = regroup * queries.pitch if count > 1 else 0
            key_rows = _progression(
                keys, move, self._phase(ring, head), self.branches[ring].dilation_rate, count, pitch
            )
            if key_rows is None:
                continue
            repeats = tuple(self._repeats(key_rows, ring, depth, head))
            for phase in phases:
                rows = _progression(queries, move, phase, period, count, pitch)
                if rows is not None:
                    opening = ring == 0 and self.branches[0].dilation_rate == 1
                    yield Visit(heads, rows, key_rows, causal=causal, repeats=repeats, opening=opening)

    def _phase(self, level: int, head: int) -> int:
        """A row, modulo the dilation rate, of branch `level` for kv head `head`."""
        base = self.origin if level == len(self.branches) - 1 else 0
        return base - self.pattern.segment_shift + self.pattern.offset(self.branches[level], head, self.num_kv_heads)

    def _repeats(self, keys: Rows, ring: int, depth: int, head: int) -> Iterator[Repeat]:
        for level in range(ring + 1, depth + 1):
            period = self.branches[level].dilation_rate // keys.stride
            first = (self._phase(level, head) - keys.start) // keys.stride % period
            if first < keys.count:
                yield Repeat(first, period)


def _progression(segments: Segments, move: int, phase: int, stride: int, count: int, pitch: int) -> Rows | None:
    """The rows `phase` modulo `stride` of `segments`, whose first is `move` further; None if there are none."""
    start = segments.start + move
    start += (phase - start) % stride
    if start >= segments.stop + move:
        return None
    return Rows(start, stride, -(-(segments.stop + move - start) // stride), count, pitch)


def _moved(rows: Rows, move: int) -> Rows:
    return replace(rows, start=rows.start + move)
