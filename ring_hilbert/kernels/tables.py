# SPDX-License-Identifier: Apache-2.0
"""The tables that kernels read: int32 tensors, with a name for every column.

A *walk* is static: it says which rows make up a tile and which lists of rows a tile visits. A *schedule* is a walk for one batch:
which blocks of those lists are visited at all, and which of them need a mask. `ops/walk.py` makes walks, `prune.py` schedules.

A *tile* is a block of rows of the *outer* side (queries in forward and dQ, keys in dK and dV). It visits *lists* of rows of the
*inner* side. Lists are cut by segments; what a tile visits of a list is a *span* of it, block after block.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

ENDLESS: Final = 2**31 - 1  # the length of a segment that holds every row
CHUNK: Final = 16
EXTREMES: Final = 4  # numbers per chunk from which a schedule is made
SPARE: Final = 256  # rows past the end of a list that a step may read
GAPS: Final = 16  # extra runs of a tile, for blocks within a span that see nothing
# Up to so many tiles go tile by tile over all heads, exactly by falling length, so that short ones are left for the end. Of more
# the heads come one after another, so that fewer keys and values are in use at a time, and lengths count to a quarter, so that
# neighbours, which read the same rows, are processed together. On an H100, backward of the x2 ladder, D 128, H 16/4, the one way
# and the other: 1.70 and 1.93 ms at 16,384 rows, equal at 32,768 (512 tiles), 7.64 and 7.16 ms at 65,536; dK and dV of the x4
# ladder in curve order, D 64, 131,072 rows, by exact and by rounded lengths: 15.0 and 14.3 ms.
FEW_TILES: Final = 512

# A tile: its first place in `Walk.outer` and its number of rows (0: no tile); its kind's visits; its first run in a schedule, and
# how many of its runs may have no mask; then, for every level, the first and the last segment of its rows.
TILE_PLACE, TILE_COUNT, TILE_VISIT, TILE_VISITS, TILE_RUN, TILE_ROOM, TILE_SEGMENTS = range(7)
# A visit: the list, the level whose segment is visited, the level whose segment within it is left out (-1: none), and the
# multiplicity of its pairs.
VISIT_LIST, VISIT_LEVEL, VISIT_HOLE, VISIT_TIMES, VISIT_WIDTH = range(5)
# A list: row `base + i * step`, or, in an indexed walk, `Walk.inner[base + i]` (then the step is 1); its number of rows; its first
# chunk of extremes.
LIST_BASE, LIST_STEP, LIST_COUNT, LIST_CHUNK, LIST_WIDTH = range(5)
# A level: its first column in `Walk.edges`; the length of its segments, and what to add to a row of the tensors before dividing
# by it.
LEVEL_EDGE, LEVEL_LENGTH, LEVEL_AHEAD, LEVEL_WIDTH = range(4)
# A run: the first row (in an indexed walk: the place in `Walk.inner`), the stride, the number of rows, their multiplicity; and,
# for tiles in several segments, the segment length and what to add, and the same for the segments to leave out (0: none).
RUN_FIRST, RUN_STEP, RUN_COUNT, RUN_TIMES, RUN_SEGMENT, RUN_AHEAD, RUN_HOLE, RUN_HOLE_AHEAD, RUN_WIDTH = range(9)


@dataclass(frozen=True, eq=False)
class Walk:
    """What tiles of a fixed size visit, whatever the batch.

    Attributes:
        tables: `[B or 1, Hkv]`: the table, of K, of each batch entry and kv head.
        entries: `[K]`: the batch entry whose intervals a table uses, 0 where entries share the tables.
        tiles: `[K, T, TILE_SEGMENTS + 2 * levels]`.
        visits: `[V, VISIT_WIDTH]`.
        lists: `[K, lists, LIST_WIDTH]`.
        edges: `[K, lists, E]`: for every list and level, the place where each segment begins and where the last ends.
        levels: `[levels, LEVEL_WIDTH]`.
        outer, inner: rows of the outer and of the inner tensor, `[n]`; `inner` only if `indexed`. Both end in `SPARE` zeros.
        runs: room for runs in a schedule, per table.
        chunk: rows of a list whose extremes are taken together.
        chunks: number of chunks in all lists of a table.
        longest: rows of the longest list.
        segments: whether some tiles lie in several segments, so that masks compare segments.
        indexed: whether lists are rows in `inner` rather than at equal steps.
        block_outer: rows of a tile, a power of two.
    """

    tables: Tensor
    entries: Tensor
    tiles: Tensor
    visits: Tensor
    lists: Tensor
    edges: Tensor
    levels: Tensor
    outer: Tensor
    inner: Tensor
    runs: int
    chunk: int
    chunks: int
    longest: int
    segments: bool
    indexed: bool
    block_outer: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tables on the device."""
        return sum(x.nbytes for x in {id(x): x for x in vars(self).values() if isinstance(x, Tensor)}.values())

    @property
    def schedule_nbytes(self) -> int:
        """Bytes of a schedule and of its temporaries, if batch entries share their intervals."""
        tables, tiles = self.tiles.shape[:2]
        return 4 * tables * (EXTREMES * self.chunks + 3 * tiles + RUN_WIDTH * self.runs)


@dataclass(frozen=True, eq=False)
class Schedule:
    """The tables that one launch reads.

    Attributes:
        walk: the tiles.
        outer, inner: as in the walk, or this batch's rows in their place, -1 where there is none.
        order: `[N, T]`: the order in which tiles are processed, long ones first (`FEW_TILES`); N is the walk's K times the entries
            of intervals.
        steps: `[N, T, 2]`: numbers of blocks that a tile visits without and with a mask.
        runs: `[N, walk.runs, RUN_WIDTH]`: for each tile those without a mask, those with one, and an endless one.
        low, high: of the query rows, `[1 or B, rows]`; the outer side's, or, `transposed`, the inner side's.
        key: of the key rows, likewise.
        transposed: the outer rows are keys.
        block_inner: rows of a step, a power of two, not less than the walk's chunk.
    """

    walk: Walk
    outer: Tensor
    inner: Tensor
    order: Tensor
    steps: Tensor
    runs: Tensor
    low: Tensor
    high: Tensor
    key: Tensor
    transposed: bool
    block_inner: int

    @cached_property
    def arguments(self) -> tuple[Any, ...]:
        """The tensors and their sizes, in the order in which kernels take them."""
        walk = self.walk
        by_entry = walk.tables.stride(0) if len(walk.tables) > 1 else 0
        tables = walk.tiles.shape[0]
        return (
            walk.tables, self.order, walk.tiles, self.steps, self.runs, self.outer, self.inner, self.low, self.high, self.key,
            (by_entry, tables if len(self.order) > tables else 0), walk.tiles.shape[1], walk.tiles.shape[2], walk.runs,
            tuple(x.stride(0) if len(x) > 1 else 0 for x in (self.low, self.key)),
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Bytes of the tables that are not the walk's."""
        own = (self.order, self.steps, self.runs, self.outer, self.inner)
        return sum(x.nbytes for x in own if x is not self.walk.outer and x is not self.walk.inner)

    def blocks(self) -> int:
        """Blocks visited by all tiles, over kv heads, and over batch entries where these differ; reads from the device."""
        tables = self.walk.tables.long()
        entries = len(self.steps) // len(self.walk.tiles)
        of_table = self.steps.sum((1, 2)).view(entries, -1)
        return int(of_table[:, tables.flatten()].sum())


def sent(array: np.ndarray, device: torch.device) -> Tensor:
    """A table on `device`, int32."""
    assert not array.size or (array.max() <= ENDLESS and array.min() >= -ENDLESS - 1), "tables hold 32-bit numbers"
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32)).to(device)
