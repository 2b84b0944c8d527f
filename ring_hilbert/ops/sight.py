# SPDX-License-Identifier: Apache-2.0
"""Sight: which keys the queries of a visit see, decided on the host for whole tiles, before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ring_hilbert.ops.visible import HIDDEN

EVERYTHING = slice(None)
TILE_QUERIES, TILE_KEYS = 256, 512
LONGEST_KEYS = 4096  # of neighbouring tiles taken together: a tile's mask stays below 4 MiB per segment and residue
TRIANGLE_GRAIN = 512  # up to this many rows, fused kernels compute a whole square for a triangle


class RowIntervals(NamedTuple):
    """Key, low and high of rows, int64 `[B or 1, segments, residues, rows]` each; see `ops/visible.py`."""

    key: np.ndarray
    low: np.ndarray
    high: np.ndarray


class Tile(NamedTuple):
    """Query rows x key rows of a visit. `masked`: some pairs are masked. `diagonal`: query `i` sees no key `j > i + diagonal`."""

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
        order, inverse: int64 `[B or 1, segments or 1, residues or 1, rows]`: the order in which to take the rows (queries
            and keys alike), and its inverse; None if they are already in it.
        key, low, high: of the key rows and of the query rows, in this order, on the device; masked tiles compare them.
    """

    parts: tuple[Part, ...]
    order: Tensor | None = None
    inverse: Tensor | None = None
    key: Tensor | None = None
    low: Tensor | None = None
    high: Tensor | None = None

    def arrange(self, values: np.ndarray, device: torch.device) -> Tensor:
        """Per-row `values [..., rows]` of every segment in this order: `[B or 1, n or 1, c or 1, ..., rows]`."""
        tensor = torch.from_numpy(values).to(device)
        return (
            tensor[None, None, None] if self.order is None else tensor[..., self.order].movedim((-4, -3, -2), (0, 1, 2))
        )


def clear_sight(count: int, triangle: bool) -> Sight:
    """Every query sees every key, or (`triangle`) each of `count` queries its own row and those before it."""
    tiles = _triangle(count) if triangle else (Tile(EVERYTHING, EVERYTHING, whole=True),)
    return Sight((Part(EVERYTHING, EVERYTHING, tiles),))


def sight(queries: RowIntervals, key: np.ndarray, is_self: bool, device: torch.device) -> Sight:
    """The sight of a visit, from the keys and intervals of both sides.

    Args:
        queries: intervals of the query rows.
        key: keys of the key rows, int64 `[B or 1, segments, residues, rows]`.
        is_self: queries and keys are the same rows, to be taken in the order of their keys, which makes triangles.
        device: where the tensors go.
    """
    own, low, high = queries
    if not key.size or not low.size:
        return clear_sight(0, triangle=False)
    if ((key.min(-1) >= low.max(-1)) & (key.max(-1) <= high.min(-1))).all():
        return clear_sight(0, triangle=False)
    order = inverse = None
    if is_self:
        order = np.argsort(own, axis=-1, kind="stable")
        key, low, high = (np.take_along_axis(x, order, -1) for x in (own, low, high))
        if (order == np.arange(key.shape[-1])).all():
            order = None
        elif (order == order[:1, :1, :1]).all():  # blocks of a curve
            order = order[:1, :1, :1]
        inverse = None if order is None else np.argsort(order, axis=-1, kind="stable")
        following = np.concatenate((key[..., 1:], np.full_like(key[..., :1], np.iinfo(np.int64).max)), axis=-1)
        if ((low <= key[..., :1]) & (high >= key) & (high < following)).all():
            parts = clear_sight(key.shape[-1], triangle=True).parts
            return Sight(parts, _tensor(order, device), _tensor(inverse, device))
    parts = tuple(_parts(key, low, high))
    return Sight(parts, *(_tensor(x, device) for x in (order, inverse, key, low, high)))


def _triangle(count: int) -> tuple[Tile, ...]:
    if count <= TILE_QUERIES or count > TRIANGLE_GRAIN:
        return (Tile(EVERYTHING, EVERYTHING, diagonal=0, whole=True),)
    strips = [(start, min(start + TILE_QUERIES, count)) for start in range(0, count, TILE_QUERIES)]
    return tuple(Tile(slice(a, b), slice(0, b), diagonal=a) for a, b in strips)


def _parts(key: np.ndarray, low: np.ndarray, high: np.ndarray) -> list[Part]:
    entries, segments = max(len(key), len(low)), low.shape[1]
    (low_min, low_max), (high_min, high_max) = (_bounds(x, TILE_QUERIES) for x in (low, high))
    key_min, key_max = _bounds(key, TILE_KEYS)
    # Padding must widen no block.
    real_min, _ = _bounds(np.where(key == HIDDEN, np.iinfo(np.int64).max, key), TILE_KEYS)
    low_min, low_max, high_min, high_max = (x[..., :, None] for x in (low_min, low_max, high_min, high_max))
    key_min, key_max, real_min = (x[..., None, :] for x in (key_min, key_max, real_min))
    full, empty = (key_min >= low_max) & (key_max <= high_min), (real_min > high_max) | (key_max < low_min)
    full, empty = np.all(full, axis=2), np.all(empty, axis=2)

    step = max(1, 2048 // low.shape[-1])  # short segments are taken together
    parts = []
    for entry in range(entries):
        for start in range(0, segments, step):
            chosen = slice(start, min(start + step, segments))
            tiles = _tiles(
                np.all(full[entry, chosen], axis=0),
                np.all(empty[entry, chosen], axis=0),
                low.shape[-1],
                key.shape[-1],
            )
            if tiles:
                parts.append(Part(EVERYTHING if entries == 1 else slice(entry, entry + 1), chosen, tuple(tiles)))
    return parts


def _tiles(full: np.ndarray, empty: np.ndarray, q_rows: int, k_rows: int) -> list[Tile]:
    """The tiles that are not empty, neighbours of the same kind merged."""
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
    """Smallest and largest value of every `size` rows: `[..., tiles]`."""
    starts = np.arange(0, x.shape[-1], size)
    return np.minimum.reduceat(x, starts, axis=-1), np.maximum.reduceat(x, starts, axis=-1)


def _tensor(array: np.ndarray | None, device: torch.device) -> Tensor | None:
    return None if array is None else torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)
