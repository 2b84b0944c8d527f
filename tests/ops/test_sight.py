# SPDX-License-Identifier: Apache-2.0
"""What the tiles of a visit see against every pair of its rows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ring_hilbert as rh
from ring_hilbert.ops import sight as module
from ring_hilbert.ops.sight import RowIntervals, Sight, clear_sight, sight
from ring_hilbert.ops.visible import Visible

CPU = torch.device("cpu")
SIZES = {"TILE_QUERIES": 2, "TILE_KEYS": 2, "LONGEST_KEYS": 6, "TRIANGLE_GRAIN": 8}  # small tiles, of few rows


@pytest.fixture(autouse=True, scope="module")
def small_tiles() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, size in SIZES.items():
            patch.setattr(module, name, size)
        yield


def seen(found: Sight, shape: tuple[int, int, int], queries: int, keys: int) -> np.ndarray:
    """How often every pair is seen, `[B, segments, residues, queries, keys]`, the rows in the order they came in."""
    count = np.zeros((*shape, queries, keys), np.int64)
    for entries, segments, tiles in found.parts:
        for tile in tiles:
            rows = count[entries, segments, :, tile.queries, tile.keys]
            here = np.ones(rows.shape, np.int64)
            if tile.diagonal is not None:
                here = np.tril(here, tile.diagonal)
            if tile.masked:
                key, low, high = (
                    np.broadcast_to(x.numpy(), (*shape, x.shape[-1])) for x in (found.key, found.low, found.high)
                )
                key = key[entries, segments, :, None, tile.keys]
                low, high = (x[entries, segments, :, tile.queries, None] for x in (low, high))
                here = here & (low <= key) & (key <= high)
            rows += here
    if found.inverse is not None:
        back = np.broadcast_to(found.inverse.numpy(), (*shape, queries))
        count = np.take_along_axis(np.take_along_axis(count, back[..., None], -2), back[..., None, :], -1)
    return count


@st.composite
def facts(draw: st.DrawFn) -> tuple[Visible, int]:
    """What up to 2 x 24 rows see: causal or not, documents, padding, ties and curves."""
    size, batch, causal = draw(st.integers(1, 24)), draw(st.integers(1, 2)), draw(st.booleans())

    def lines(values: st.SearchStrategy[int]) -> torch.Tensor:
        return torch.tensor(
            draw(st.lists(st.lists(values, min_size=size, max_size=size), min_size=batch, max_size=batch))
        )

    documents = draw(st.sampled_from(["none", "packed", "any"]))
    ids = None if documents == "none" else lines(st.integers(-1, 2))
    if ids is not None and documents == "packed":
        ids = ids.sort(dim=1).values
    positions = lines(st.integers(0, 9)) if causal and draw(st.booleans()) else None
    order = rh.TokenOrder("hilbert", block=draw(st.sampled_from([4, 16]))) if causal and draw(st.booleans()) else None
    visible = Visible(size, causal, positions=positions, documents=ids, order=order)
    return visible, visible.batch_size


@given(facts(), st.data())
@settings(max_examples=200, deadline=None)
def test_tiles_see_what_the_rows_see_once(given_facts: tuple[Visible, int], data: st.DataObject):
    visible, batch = given_facts
    segments, residues = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))

    def drawn(name: str) -> RowIntervals:
        count = data.draw(st.integers(1, visible.seq_len), name)
        row = st.lists(st.integers(0, visible.seq_len - 1), min_size=count, max_size=count, unique=True)
        rows = np.array([[sorted(data.draw(row)) for _ in range(residues)] for _ in range(segments)])
        return RowIntervals(
            *(np.stack(x) for x in zip(*(visible.of(rows, entry) for entry in range(batch)), strict=True))
        )

    queries, is_self = drawn("queries"), data.draw(st.booleans())
    key = queries.key if is_self else drawn("keys").key
    found = sight(queries, key, is_self, CPU)
    expected = (queries.low[..., :, None] <= key[..., None, :]) & (key[..., None, :] <= queries.high[..., :, None])
    count = seen(found, (batch, segments, residues), queries.low.shape[-1], key.shape[-1])
    np.testing.assert_array_equal(count, expected)
    if found.order is not None:
        index = np.arange(queries.low.shape[-1])
        assert torch.equal(found.arrange(index, CPU), found.order)
        assert torch.equal(found.order.gather(-1, found.inverse), torch.from_numpy(index).expand(found.order.shape))


@pytest.mark.parametrize("count", [1, 4, 5, 8, 9, 23])
@pytest.mark.parametrize("triangle", [False, True])
def test_clear_sight(count: int, triangle: bool):
    found = clear_sight(count, triangle)
    whole = np.ones((1, 1, 1, count, count), np.int64)
    np.testing.assert_array_equal(seen(found, (1, 1, 1), count, count), np.tril(whole) if triangle else whole)
