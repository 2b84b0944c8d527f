# SPDX-License-Identifier: Apache-2.0
"""Layouts against the owner of every row, written out."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ring_hilbert as rh
from ring_hilbert.parallel.layout import Layout


def dealt(lengths: tuple[int, ...], kind: str) -> list[list[int]]:
    """The rows of every rank: dealt out one chunk after another, in zigzag there and back."""
    ranks = [*range(len(lengths))]
    turns = (
        [(p, lengths[p]) for p in ranks]
        if kind == "contiguous"
        else [(p, lengths[p] // 2) for p in ranks + ranks[::-1]]
    )
    found: list[list[int]] = [[] for _ in ranks]
    row = 0
    for rank, count in turns:
        for _ in range(count):
            found[rank].append(row)
            row += 1
    return found


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    if draw(st.booleans()):
        return Layout((2 * draw(st.integers(0, 5)),) * draw(st.integers(1, 5)), "zigzag")
    return Layout(tuple(draw(st.lists(st.integers(0, 7), min_size=1, max_size=5))))


@given(layouts())
def test_every_row_has_the_owner_that_the_kind_says(layout: Layout):
    expected, whole = dealt(layout.lengths, layout.kind), torch.arange(layout.seq_len)[None]
    order = rh.TokenOrder("hilbert", block=4)
    tokens = order.permutation(layout.seq_len)
    for rank, rows in enumerate(expected):
        assert layout.rows(rank).tolist() == rows
        assert layout.cut(rank, whole)[0].tolist() == rows
        assert layout.tokens(rank, order).tolist() == tokens[rows].tolist()
        chunks = layout.chunks(rank)
        assert [row for chunk in chunks for row in range(chunk.start, chunk.stop)] == rows
        assert all(rows.index(chunk.start) == chunk.local for chunk in chunks)
        assert all(a.stop < b.start for a, b in itertools.pairwise(chunks)), "neighbouring chunks are one"
    owner = {row: rank for rank, rows in enumerate(expected) for row in rows}
    assert layout.seq_len == len(owner) and layout.cuts[-1] == len(owner)
    for number, rank in enumerate(layout.owners):
        assert all(owner[row] == rank for row in range(layout.cuts[number], layout.cuts[number + 1]))
    pieces = [torch.tensor(rows, dtype=torch.int64).expand(2, -1) for rows in expected]
    assert torch.equal(layout.assemble(pieces), whole.expand(2, -1))


@given(st.integers(0, 40), st.integers(1, 7))
def test_default_lengths_differ_by_one_row_at_most(seq_len: int, world: int):
    lengths = Layout.even(seq_len, world).lengths
    assert sum(lengths) == seq_len and sorted(lengths, reverse=True) == list(lengths) and lengths[0] - lengths[-1] <= 1


@pytest.mark.parametrize("lengths", [(3, 3), (4, 6), (4, 4, 2)])
def test_a_zigzag_that_does_not_divide(lengths: tuple[int, ...]):
    with pytest.raises(
        ValueError, match=f"do not divide evenly; pad the sequence to a multiple of {2 * len(lengths)} rows"
    ):
        Layout(lengths, "zigzag")
    with pytest.raises(ValueError, match="layout='spiral' is not supported; use one of 'contiguous', 'zigzag'"):
        Layout(lengths, "spiral")
