# SPDX-License-Identifier: Apache-2.0
"""Shells: the visits of a nested pattern, every pair computed once.

In a nested pattern a row in branch `i` is in all branches before it, and the near keys of a branch, those that lie in the inner
branch's segment, are keys of the inner branch too. So the rows of branch 0 attend to each other within their segment `w_0`,
those of branch 1 within `w_1` but not `w_0`, and so on; how often a pair of shell `j` counts is said in `nesting.py`.

Shells are as regular as branches: shell 0 is a square or a triangle, and every other shell consists of rectangles, causal or
not, since its parts lie wholly before or wholly after the query.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

from ring_hilbert.ops.nesting import nested
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

MOST_WEIGHTS = 1 << 22  # pairs per piece, whose weights are held in memory


def shell_visits(pattern: DilatedPattern, num_kv_heads: int, chunk: Chunk, causal_rows: bool) -> list[Visit]:
    """The visits among the rows of `chunk`, every pair in one of them.

    Raises:
        ValueError: if the pattern is not nested.
    """
    branches = nested(pattern)
    if branches is None:
        raise ValueError(f"the branches of {pattern} are not nested, so their pairs cannot each be visited once")
    visits: list[Visit] = []
    w, r = branches[-1]
    whole = w is None or w % r == 0  # otherwise the outermost residues restart in every segment
    pieces = [(chunk.start, chunk.stop, 0)] if whole else []
    for segments in () if whole else segments_of(branches[-1], pattern.segment_shift, chunk.start, chunk.stop):
        for i in range(segments.count):
            move = i * segments.pitch
            origin = segments.origin + move + pattern.segment_shift
            pieces.append((segments.start + move, segments.stop + move, origin))
    for start, stop, origin in pieces:
        piece = _Piece(pattern, branches, num_kv_heads, start, stop, origin)
        visits += piece.visits(causal_rows)
    move = chunk.local - chunk.start
    return merge_residues([replace(v, queries=_moved(v.queries, move), keys=_moved(v.keys, move)) for v in visits])


def shells_pay(pattern: DilatedPattern, num_kv_heads: int, chunk: Chunk, causal: bool) -> bool:
    """Whether shell visits are faster than branch visits.

    `causal`: in every branch the keys of earlier segments are seen and those of later ones are not, and within the segments of
    the innermost branch rows have an order that is the same in all of them.
    """
    branches = nested(pattern)
    if branches is None or len(branches) == 1:
        return False
    lengths = [chunk.stop - chunk.start if w is None else w for w, _ in branches]
    if any(outer > 8 * inner for inner, outer in itertools.pairwise(lengths)):
        return False  # little to save, and many visits
    shells, plain = (make(pattern, num_kv_heads, chunk, causal) for make in (shell_visits, branch_visits))
    if any(visit.repeats and visit.queries.count * visit.keys.count > MOST_WEIGHTS for visit in shells):
        return False
    return sum(visit.cost for visit in shells) < sum(visit.cost for visit in plain)


class _Piece:
    """Rows `[start, stop)` in which every branch keeps its stride unbroken; residues of the last one count from `origin`."""

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
        for _, heads in self.pattern.residues(self.branches[-1], self.num_kv_heads):
            for shell in range(len(self.branches)):
                for queries, keys, inside in self._shell(shell):
                    if not (causal_rows and keys.start >= queries.stop):
                        yield from self._visits(shell, heads, queries, keys, causal_rows and inside)

    def _shell(self, shell: int) -> Iterator[tuple[Segments, Segments, bool]]:
        """(queries, keys, whether they are the same rows) of every part of a shell."""
        shift = self.pattern.segment_shift
        for outer in segments_of(self.branches[shell], shift, self.start, self.stop):
            if shell == 0:
                yield outer, outer, True
                continue
            for inner in segments_of(self.branches[shell - 1], shift, outer.start, outer.stop):
                for i in range(inner.count):
                    a, b = inner.start + i * inner.pitch, inner.stop + i * inner.pitch
                    queries = replace(outer, start=a, stop=b)
                    if outer.start < a:
                        yield queries, replace(outer, stop=a), False
                    if b < outer.stop:
                        yield queries, replace(outer, start=b), False

    def _visits(self, shell: int, heads: Heads, queries: Segments, keys: Segments, causal: bool) -> Iterator[Visit]:
        """The visits of a part of a shell; segments are regrouped so that all of a visit begin at the same residue."""
        stride, phase = self.branches[shell].dilation_rate, self._phase(shell, heads.start)
        period = self.branches[-1].dilation_rate
        regroup = period // math.gcd(period, queries.pitch) if queries.count > 1 else 1
        for i in range(min(regroup, queries.count)):
            move, count = i * queries.pitch, -(-(queries.count - i) // regroup)
            pitch = regroup * queries.pitch if count > 1 else 0
            query_rows, key_rows = (_progression(x, move, phase, stride, count, pitch) for x in (queries, keys))
            if query_rows is None or key_rows is None:
                continue
            once, weight = self.pattern.count == "once", self.pattern.weight(self.branches[shell])
            repeats = () if once else tuple(self._repeats(query_rows, key_rows, shell, heads.start))
            yield Visit(heads, query_rows, key_rows, causal=causal, weight=weight, repeats=repeats)

    def _phase(self, level: int, head: int) -> int:
        """A row of branch `level` for kv head `head`, modulo the dilation rate."""
        base = self.origin if level == len(self.branches) - 1 else 0
        return base - self.pattern.segment_shift + self.pattern.offset(self.branches[level], head, self.num_kv_heads)

    def _repeats(self, queries: Rows, keys: Rows, shell: int, head: int) -> Iterator[Repeat]:
        for level in range(shell + 1, len(self.branches)):
            period, phase = self.branches[level].dilation_rate // keys.stride, self._phase(level, head)
            query, key = ((phase - rows.start) // keys.stride % period for rows in (queries, keys))
            if query < queries.count and key < keys.count:
                yield Repeat(query, key, period, self.pattern.weight(self.branches[level]))


def _progression(segments: Segments, move: int, phase: int, stride: int, count: int, pitch: int) -> Rows | None:
    """The rows `phase` modulo `stride` of `segments` shifted by `move`; None if there are none."""
    start = segments.start + move
    start += (phase - start) % stride
    if start >= segments.stop + move:
        return None
    return Rows(start, stride, -(-(segments.stop + move - start) // stride), count, pitch)


def _moved(rows: Rows, move: int) -> Rows:
    return replace(rows, start=rows.start + move)
