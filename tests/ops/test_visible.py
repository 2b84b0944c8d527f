# SPDX-License-Identifier: Apache-2.0
"""Key, low and high against the literal comparison of positions and documents, with which they share no line."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ring_hilbert as rh
from ring_hilbert.ops.visible import HIDDEN, Visible, intervals, packed_intervals, reached
from ring_hilbert.parallel.layout import Layout
from tests.harness.cases import interpreted

NUMBERS = st.one_of(st.integers(0, 4), st.integers(-(2**63), 2**63 - 1))


@st.composite
def facts(draw: st.DrawFn) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Positions, documents and places of up to 3 x 12 rows: ties, repeated ids, padding anywhere, 64-bit extremes."""
    size, batch = draw(st.integers(1, 12)), draw(st.integers(1, 3))

    def lines(values: st.SearchStrategy[int]) -> Tensor:
        rows = draw(st.sampled_from([1, batch]))
        line = st.lists(values, min_size=size, max_size=size)
        return torch.tensor(draw(st.lists(line, min_size=rows, max_size=rows)), dtype=torch.int64)

    ids = st.one_of(st.integers(-1, 3), st.sampled_from([-1, 2**63 - 1, 2**40]))
    positions = lines(NUMBERS) if draw(st.booleans()) else None
    documents = lines(ids) if positions is None or draw(st.booleans()) else None
    places = torch.tensor([draw(st.permutations(range(size)))]) if draw(st.booleans()) else None
    return positions, documents, places


@given(facts(), st.booleans())
@settings(max_examples=300, deadline=None)
def test_intervals_are_the_definition(given_facts: tuple[Tensor | None, ...], causal: bool):
    positions, documents, places = given_facts
    some = positions if positions is not None else documents
    key, low, high = intervals(positions, documents, causal, places)
    seen = (low[:, :, None] <= key[:, None, :]) & (key[:, None, :] <= high[:, :, None])
    index = torch.arange(some.shape[1])[None] if positions is None else positions
    expected = rh.reference.allowed(causal, index, documents)
    assert torch.equal(*torch.broadcast_tensors(seen, expected))
    if documents is not None:
        assert torch.equal(*torch.broadcast_tensors(key == HIDDEN, documents == -1))


@given(st.data(), st.integers(1, 12), st.integers(1, 3), st.booleans())
@settings(max_examples=200, deadline=None)
def test_intervals_of_packed_documents_are_the_definition(data: st.DataObject, size: int, batch: int, causal: bool):
    def line() -> list[int]:
        lengths = data.draw(st.lists(st.integers(1, 5), min_size=size, max_size=size))
        ids = data.draw(st.permutations([*range(size - 1), 2**63 - 1]))
        hidden = data.draw(st.sets(st.integers(0, size - 1)))  # several runs of padding, too
        return [-1 if n in hidden else ids[n] for n, length in enumerate(lengths) for _ in range(length)][:size]

    documents = torch.tensor([line() for _ in range(data.draw(st.sampled_from([1, batch])))])
    orders = st.permutations(range(size))
    tokens = torch.tensor([data.draw(orders) for _ in range(data.draw(st.sampled_from([1, batch])))])
    key, low, high = packed_intervals(documents, tokens, causal)
    seen = (low[:, :, None] <= key[:, None, :]) & (key[:, None, :] <= high[:, :, None])
    wide = max(len(documents), len(tokens))
    by_row = documents.expand(wide, -1).gather(1, tokens.expand(wide, -1))
    assert torch.equal(*torch.broadcast_tensors(seen, rh.reference.allowed(causal, tokens, by_row)))
    assert torch.equal(key == HIDDEN, by_row == -1)


def test_padding_comes_with_a_refresh():
    """Rows that were known to be real need not be after it: K and V of padding may hold NaN."""
    documents, tokens = torch.tensor([[0, 0, 1, 1]]), torch.arange(4)[None]
    visible = Visible(4, True, positions=tokens, documents=documents, natural=True, padded=False, packed=True)
    assert not visible.padded
    visible.refresh(tokens, torch.tensor([[0, 0, -1, -1]]))
    assert visible.padded and visible.on(torch.device("cpu")).key[0].tolist()[2:] == [HIDDEN] * 2


@given(facts(), st.booleans(), st.integers(0, 2**16))
@settings(max_examples=100, deadline=None)
def test_what_is_reached_is_what_somebody_sees(given_facts: tuple[Tensor | None, ...], causal: bool, seed: int):
    key, low, high = (x[0].long() for x in intervals(*given_facts[:2], causal, given_facts[2]))
    generator = torch.Generator().manual_seed(seed)
    queries, keys = (torch.randint(0, 3, (len(key),), generator=generator) for _ in range(2))
    seen = (low[:, None] <= key) & (key <= high[:, None]) & (queries[:, None] == keys)
    assert torch.equal(reached(queries, keys, low, high, key), seen.any(0))


@pytest.mark.parametrize("world", range(1, 9))
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_ranks_put_the_same_intervals_together(world: int, layout: str):
    """What `prepare` assembles of all ranks' pieces sees what the whole sequence sees."""
    size = 16 * world
    documents, positions = torch.arange(size)[None] // 7, torch.arange(size)[None] // 2
    whole, rows = intervals(positions, documents, True), Layout.even(size, world, layout)
    pieces = [[x[:, torch.from_numpy(rows.rows(rank))] for rank in range(world)] for x in (positions, documents)]
    for one, other in zip(whole, intervals(*(rows.assemble(of) for of in pieces), True), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("order", [None, rh.TokenOrder("hilbert", block=8)])
def test_a_sequence_that_is_never_written_down_sees_what_one_does_that_is(causal: bool, order: rh.TokenOrder | None):
    size, cpu = 21, torch.device("cpu")
    default = Visible(size, causal, order=order)
    places = torch.arange(size) if order is None else order.permutation(size)
    given = Visible(size, causal, positions=places[None], documents=torch.zeros(1, size, dtype=torch.int64))
    a, b = (
        (x.low[0][:, None] <= x.key[0]) & (x.key[0] <= x.high[0][:, None]) for x in (default.on(cpu), given.on(cpu))
    )
    assert torch.equal(a, b) and torch.equal(
        torch.from_numpy(default.of(torch.arange(size).numpy())[0]), default.on(cpu).key[0].long()
    )


PATTERN = rh.DilatedPattern((8, 32, None), (1, 2, 4))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_other_documents_in_place(backend: str):
    """`refresh` gives what a fresh `prepare` gives, forward and backward."""
    interpreted(backend)
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(1, 64, 2, 16, generator=generator, requires_grad=True) for _ in range(3)]
    documents = [torch.arange(64) // length for length in (64, 10, 23)]
    documents[2] = torch.where(torch.arange(64) < 50, documents[2], -1)

    def results(prepared: rh.Prepared) -> list[Tensor]:
        out = rh.dilated_attention(*x, PATTERN, backend=backend, prepared=prepared)
        return [out, *torch.autograd.grad(out, x, torch.ones_like(out))]

    changing = rh.prepare(64, document_ids=documents[0])
    for ids in documents:
        changing.refresh(document_ids=ids)
        for one, other in zip(results(changing), results(rh.prepare(64, document_ids=ids)), strict=True):
            assert torch.equal(one, other)
    for wrong in (
        {"document_ids": torch.zeros(63, dtype=torch.int64)},
        {},
        {"document_ids": documents[0], "positions": documents[0]},
    ):
        with pytest.raises(ValueError, match=r"refresh\(\)"):
            changing.refresh(**wrong)


def test_refresh_between_forward_and_backward_is_an_error():
    x = torch.randn(1, 64, 2, 16, requires_grad=True)
    prepared = rh.prepare(64, document_ids=torch.zeros(64, dtype=torch.int64))
    out = rh.dilated_attention(x, x, x, PATTERN, prepared=prepared)
    prepared.refresh(document_ids=torch.arange(64) // 9)
    with pytest.raises(RuntimeError, match="between forward and backward"):
        out.sum().backward()
