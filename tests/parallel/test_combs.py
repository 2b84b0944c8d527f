# SPDX-License-Identifier: Apache-2.0
"""Combs against sets of rows, written out."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ring_hilbert.parallel.combs import Comb, Stretch, widest

COMBS = st.builds(Comb.through, st.integers(-40, 40), st.integers(1, 12))


def rows_of(comb: Comb, start: int, stop: int) -> set[int]:
    return {row for row in range(start, stop) if (row - comb.phase) % comb.stride == 0}


@given(COMBS, COMBS, st.integers(-40, 40))
def test_two_combs(one: Comb, other: Comb, row: int):
    period = one.stride * other.stride
    a, b = rows_of(one, 0, period), rows_of(other, 0, period)
    assert one.holds(other) == (b <= a)
    meet = one.meet(other)
    assert (set() if meet is None else rows_of(meet, 0, period)) == a & b
    through = Comb.through(row, one.stride)
    assert 0 <= through.phase < through.stride and row in rows_of(through, row, row + 1)


@given(
    st.frozensets(COMBS, min_size=1, max_size=5), st.integers(0, 30), st.integers(0, 60), st.lists(st.integers(-5, 95))
)
def test_the_rows_of_several_combs(combs: frozenset[Comb], start: int, length: int, edges: list[int]):
    kept = widest(combs)
    assert set(kept) <= combs and not any(
        rows_of(b, 0, 200) <= rows_of(a, 0, 200) for a in kept for b in kept if a != b
    )
    stretch, edges = Stretch(start, start + length, kept), sorted(edges)
    expected = sorted(set().union(*(rows_of(comb, start, start + length) for comb in combs)))
    assert stretch.rows().tolist() == expected and stretch.size == len(expected)
    counts = [sum(a <= row < b for row in expected) for a, b in itertools.pairwise(edges)]
    assert stretch.counts(np.array(edges, np.int64)).tolist() == counts
