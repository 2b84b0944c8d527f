# SPDX-License-Identifier: Apache-2.0
"""Sight: which keys the queries of a visit see, decided on the host as far as whole tiles go, before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

EVERYTHING = slice(None)
TILE_QUERIES, TILE_KEYS = 256, 512
LONGEST_KEYS = 4096  # of neighbouring tiles taken as one: the mask of a tile stays below 4 MiB per segment and residue
TRIANGLE_GRAIN = 512  # up to so many rows fused kernels compute a whole square for a triangle


class RowFacts(NamedTuple):
    """Positions and documents of the rows of one side of a visit, int64 `[B or 1, segments, residues, rows]`, or None."""

    positions: np.ndarray | None = None
    documents: np.ndarray | None = None


class Tile(NamedTuple):
    """Query rows x key rows of a visit. `masked`: facts hide some pairs. `diagonal`: query `i` sees no key `j > i + diagonal`."""

    queries: slice
    keys: slice
    masked: bool = False
    diagonal: int | None = None
    whole: bool = False  # all rows and keys of the visit


class Part(NamedTuple):
    """The tiles of some batch entries and segments of a visit; none if nothing is seen."""

    entries: slice
    segments: slice
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class Sight:
    """What a core needs to know of a visit besides its rows.

    Attributes:
        parts: the tiles to compute.
        order, inverse: int64 `[B or 1, segments or 1, residues or 1, rows]`: the rows are to be taken in this order (queries
            and keys alike), and how to undo it; None if they are in it.
        query_positions, ...: the facts that the masked tiles compare, in this order, on the device; None where not needed.
    """

    parts: tuple[Part, ...]
    order: Tensor | None = None
    inverse: Tensor | None = None
    query_positions: Tensor | None = None
    query_documents: Tensor | None = None
    key_positions: Tensor | None = None
    key_documents: Tensor | None = None

    def arrange(self, values: np.ndarray, device: torch.device) -> Tensor:
        """What the rows of every segment have, `[..., rows]`, in this order: `[B or 1, n or 1, c or 1, ..., rows]`."""
        tensor = torch.from_numpy(values).to(device)
        return (
            tensor[None, None, None] if self.order is None else tensor[..., self.order].movedim((-4, -3, -2), (0, 1, 2))
        )

    @property
    def covers(self) -> bool:
        """Whether every query row is in some tile."""
        return len(self.parts) == 1 and self.parts[0][:2] == (EVERYTHING, EVERYTHING)


def clear_sight(count: int, triangle: bool) -> Sight:
    """Every key is seen, or (`triangle`) by the `count` queries their own row and those before it."""
    tiles = _triangle(count) if triangle else (Tile(EVERYTHING, EVERYTHING, whole=True),)
    return Sight((Part(EVERYTHING, EVERYTHING, tiles),))


def sight(queries: RowFacts, keys: RowFacts, is_self: bool, device: torch.device) -> Sight:
    """What follows from the facts of both sides: keys of another document are hidden, and those with a larger position.

    Args:
        queries, keys: positions and documents, both sides or none of each.
        is_self: queries and keys are the same rows: they are taken by document and position, which makes triangles.
        device: where the tensors go.
    """
    positions, documents = (queries.positions, keys.positions), (queries.documents, keys.documents)
    if documents[0] is not None and documents[1] is not None:
        one = documents[0].flat[0]
        if one != -1 and (documents[0] == one).all() and (documents[1] == one).all():
            documents = (None, None)
    if positions[0] is not None and positions[1] is not None and (positions[1].max(-1) <= positions[0].min(-1)).all():
        positions = (None, None)
    count = next((x.shape[-1] for x in (*positions, *documents) if x is not None), 0)
    if count == 0:
        return clear_sight(0, triangle=False)

    order = inverse = None
    if is_self and positions[0] is not None:
        order = _order(positions[0], documents[0])
        ordered = np.take_along_axis(positions[0], order, -1)
        positions = (ordered, ordered)
        if documents[0] is not None:
            ordered_documents = np.take_along_axis(documents[0], order, -1)
            documents = (ordered_documents, ordered_documents)
        if (order == np.arange(count)).all():
            order = None
        elif (order == order[:1, :1, :1]).all():  # blocks of a curve
            order = order[:1, :1, :1]
        inverse = None if order is None else np.argsort(order, axis=-1, kind="stable")
        if documents[0] is None and (ordered[..., 1:] > ordered[..., :-1]).all():
            return Sight(clear_sight(count, triangle=True).parts, _tensor(order, device), _tensor(inverse, device))
    facts = (positions[0], documents[0], positions[1], documents[1])
    parts = tuple(_parts(*facts))
    tensors = [_tensor(x, device) for x in (order, inverse, *facts)]
    return Sight(parts, *tensors)


def _order(positions: np.ndarray, documents: np.ndarray | None) -> np.ndarray:
    """The rows by document, then position."""
    if documents is None:
        return np.argsort(positions, axis=-1, kind="stable")
    first = np.argsort(positions, axis=-1, kind="stable")
    second = np.argsort(np.take_along_axis(documents, first, -1), axis=-1, kind="stable")
    return np.take_along_axis(first, second, -1)


def _triangle(count: int) -> tuple[Tile, ...]:
    if count <= TILE_QUERIES or count > TRIANGLE_GRAIN:
        return (Tile(EVERYTHING, EVERYTHING, diagonal=0, whole=True),)
    strips = [(start, min(start + TILE_QUERIES, count)) for start in range(0, count, TILE_QUERIES)]
    return tuple(Tile(slice(a, b), slice(0, b), diagonal=a) for a, b in strips)


def _parts(
    query_positions: np.ndarray | None,
    query_documents: np.ndarray | None,
    key_positions: np.ndarray | None,
    key_documents: np.ndarray | None,
) -> list[Part]:
    some_q = query_positions if query_positions is not None else query_documents
    some_k = key_positions if key_positions is not None else key_documents
    assert some_q is not None and some_k is not None
    entries, segments = max(some_q.shape[0], some_k.shape[0]), some_q.shape[1]
    tiles_q, tiles_k = -(-some_q.shape[-1] // TILE_QUERIES), -(-some_k.shape[-1] // TILE_KEYS)
    full: np.ndarray = np.ones((entries, segments, some_q.shape[2], tiles_q, tiles_k), bool)
    empty = np.zeros_like(full)
    if query_positions is not None and key_positions is not None:
        (q_min, q_max), (k_min, k_max) = _bounds(query_positions, TILE_QUERIES), _bounds(key_positions, TILE_KEYS)
        full &= k_max[..., None, :] <= q_min[..., :, None]
        empty |= k_min[..., None, :] > q_max[..., :, None]
    if query_documents is not None and key_documents is not None:
        (q_min, q_max), (k_min, k_max) = _bounds(query_documents, TILE_QUERIES), _bounds(key_documents, TILE_KEYS)
        q_min, q_max, k_min, k_max = q_min[..., :, None], q_max[..., :, None], k_min[..., None, :], k_max[..., None, :]
        full &= (q_min == q_max) & (k_min == k_max) & (q_min == k_min) & (q_min >= 0)
        empty |= (q_min > k_max) | (q_max < k_min) | (q_max < 0) | (k_max < 0)
    full, empty = np.all(full, axis=2), np.all(empty, axis=2)

    step = max(1, 2048 // some_q.shape[-1])  # short segments are taken together
    parts = []
    for entry in range(entries):
        for start in range(0, segments, step):
            chosen = slice(start, min(start + step, segments))
            tiles = _tiles(
                np.all(full[entry, chosen], axis=0),
                np.all(empty[entry, chosen], axis=0),
                some_q.shape[-1],
                some_k.shape[-1],
            )
            if tiles:
                parts.append(Part(EVERYTHING if entries == 1 else slice(entry, entry + 1), chosen, tuple(tiles)))
    return parts


def _tiles(full: np.ndarray, empty: np.ndarray, q_rows: int, k_rows: int) -> list[Tile]:
    """The tiles that are not empty, neighbours of one kind together."""
    tiles: list[Tile] = []
    for i in range(full.shape[0]):
        queries = slice(i * TILE_QUERIES, min((i + 1) * TILE_QUERIES, q_rows))
        row = len(tiles)
        for j in np.flatnonzero(~empty[i]):
            keys, masked = slice(j * TILE_KEYS, min((j + 1) * TILE_KEYS, k_rows)), not full[i, j]
            last = tiles[-1] if len(tiles) > row else None
            if (
                last is not None
                and last.masked == masked
                and last.keys.stop == keys.start
                and keys.stop - last.keys.start <= LONGEST_KEYS
            ):
                tiles[-1] = last._replace(keys=slice(last.keys.start, keys.stop))
            else:
                tiles.append(Tile(queries, keys, masked))
    return tiles


def _bounds(x: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest of every `size` rows: `[..., tiles]`."""
    starts = np.arange(0, x.shape[-1], size)
    return np.minimum.reduceat(x, starts, axis=-1), np.maximum.reduceat(x, starts, axis=-1)


def _tensor(array: np.ndarray | None, device: torch.device) -> Tensor | None:
    return None if array is None else torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)
