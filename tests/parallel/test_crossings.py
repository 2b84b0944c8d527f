# SPDX-License-Identifier: Apache-2.0
"""Crossings against every pair of rows of two ranks, looked at one by one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

import ring_hilbert as rh
from ring_hilbert.parallel.crossings import Block, Crossings
from ring_hilbert.parallel.layout import Layout
from tests.harness.cases import patterns

Rows = dict[int, list[int]]  # by kv head


@st.composite
def crossings(draw: st.DrawFn) -> Crossings:
    """Layouts of up to 4 ranks, some without rows, of up to 24."""
    layout = Layout(tuple(draw(st.lists(st.integers(0, 8), min_size=1, max_size=4))))
    if draw(st.booleans()):
        layout = Layout((2 * draw(st.integers(1, 3)),) * draw(st.integers(1, 4)), "zigzag")
    taking_turns = st.builds(rh.DilatedPattern, st.tuples(st.integers(4, 24)), st.just((2,)))  # heads 0, 2, 4 and 1, 3
    return Crossings(
        draw(patterns(24) | taking_turns), layout, draw(st.booleans()), draw(st.integers(1, 5)), draw(st.integers(1, 2))
    )


def member(pattern: rh.DilatedPattern, branch: rh.Branch, kv_head: int, kv_heads: int, row: int) -> int | None:
    """The segment of `branch` that has the row among the kv head's, by the definition of a pattern; None if none has."""
    (w, r), shifted = branch, row + pattern.segment_shift
    segment, within = (0, shifted) if w is None else divmod(shifted, w)
    offset = (kv_head + pattern.head_shift) % r if pattern.offset_rule == "modulo" else kv_head // -(-kv_heads // r)
    return segment if within % r == offset else None


def seen(c: Crossings, queries: Iterable[int], keys: Iterable[int]) -> Rows:
    """Which of `keys` some of `queries` see, over all branches."""
    found: Rows = {}
    for head in range(c.num_kv_heads):
        for branch in c.pattern.branches:
            own = [(q, member(c.pattern, branch, head, c.num_kv_heads, q)) for q in queries]
            for key in keys:
                segment = member(c.pattern, branch, head, c.num_kv_heads, key)
                visible = any(s == segment and not (c.in_row_order and key > q) for q, s in own)
                if segment is not None and visible:
                    found.setdefault(head, []).append(key)
    return {head: sorted(set(rows)) for head, rows in found.items()}


def listed(blocks: list[Block]) -> Rows:
    assert [block.head for block in blocks] == sorted({block.head for block in blocks}), (
        "a block per head, in their order"
    )
    return {head: rows.tolist() for head, rows in blocks}


@given(crossings())
@settings(max_examples=100, deadline=None)
def test_the_rows_that_may_travel_are_those_that_somebody_sees(c: Crossings):
    ranks = range(c.layout.world_size)
    rows = [c.layout.rows(rank).tolist() for rank in ranks]
    crosses = False
    for reader in ranks:
        needed = {owner: seen(c, rows[reader], rows[owner]) for owner in ranks if owner != reader}
        counts = {owner: c.batch_size * sum(map(len, found.values())) for owner, found in needed.items()}
        assert {owner: listed(blocks) for owner, blocks in c.shipments(reader).items()} == {
            o: x for o, x in needed.items() if x
        }
        assert c.counts(reader).tolist() == [counts.get(owner, 0) for owner in ranks]
        for owner, found in needed.items():
            assert listed(c.shipment(reader, owner)) == found and c.count(reader, owner) == counts[owner]
            assert reader in c.readers(owner) or not found
        crosses |= any(needed.values())
    assert c.communicates or not crosses


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=4),
    st.lists(st.integers(1, 6)),
    st.integers(1, 4),
    st.integers(-6, 6),
)
def test_whether_a_segment_reaches_over_a_boundary(lengths: list[int], segments: list[int], unit: int, shift: int):
    layout, segments = Layout(tuple(unit * length for length in lengths)), segments or [unit]
    pattern = rh.DilatedPattern(tuple(segments), (1,) * len(segments), segment_shift=shift)
    owner = [rank for rank, length in enumerate(layout.lengths) for _ in range(length)]
    neighbours = [row for row in range(1, layout.seq_len) if owner[row - 1] != owner[row]]
    crosses = any((row - 1 + shift) // w == (row + shift) // w for row in neighbours for w in segments)
    assert Crossings(pattern, layout, False, 1, 1).communicates == crosses


@given(crossings())
@settings(max_examples=100, deadline=None)
def test_the_keys_of_a_reach_are_those_of_its_branch_and_segment(c: Crossings):
    for reader in range(c.layout.world_size):
        others = sorted(set(range(c.layout.seq_len)) - set(c.layout.rows(reader).tolist()))
        for reach in c.reaches(reader):
            w, r = reach.branch
            alone = replace(c, pattern=replace(c.pattern, segment_lengths=(w,), dilation_rates=(r,)))
            found = seen(alone, range(reach.mine.start, reach.mine.stop), others)
            for head in range(c.num_kv_heads):
                offset = c.pattern.offset(reach.branch, head, c.num_kv_heads)
                assert c.keys(reach, offset, c.elsewhere(reader)).tolist() == found.get(head, [])
