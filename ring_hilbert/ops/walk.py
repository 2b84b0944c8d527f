# SPDX-License-Identifier: Apache-2.0
"""Static walks: a pattern on the local rows as the tables that kernels read, independent of the batch.

A walk lists every block of a segment; which of them a batch needs is decided on the device, see `kernels/prune.py`. Rows of a
list are in the order of their natural token index, in which packed documents are contiguous, so that pruning leaves short runs
and few masks; that order is a hint and never affects results. A list of a shell is cut by depth where multiplicities differ by it,
so that all of its pairs have one (see `nesting.py`). All is symmetric in queries and keys: forward and backward share a walk.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ring_hilbert.kernels import tables
from ring_hilbert.kernels.tables import CHUNK, ENDLESS, GAPS, LIST_WIDTH, SPARE, TILE_SEGMENTS, VISIT_WIDTH, Walk, sent
from ring_hilbert.ops.nesting import Chain
from ring_hilbert.ops.visible import changes, first_before, first_behind

FAMILIES = 4  # rows of one depth are visited as at most this many arithmetic progressions, otherwise through a list
# Cost, in pairs, that tiles of one segment may have relative to tiles of several, to spare masks the segments.
MOST_MORE = 1.25


@dataclass(frozen=True)
class _Level:
    """A branch of a chain: its segments among the local rows, numbered from 0."""

    chain: int
    length: int | None
    number: int  # of segments
    segment: Tensor  # of every row, int64 [L]

    def bounds(self, first: int) -> tuple[int, int]:
        """The segment length, and what to add to a row of the tensor before dividing by it.

        With two segments only the start of the second matters, not the length, which may exceed 32 bits.
        """
        if self.length is None or self.number == 1:
            return ENDLESS, 0
        size, within = len(self.segment), first % self.length
        return (size, size - (self.length - within)) if self.number == 2 else (self.length, within)


@dataclass(frozen=True)
class _List:
    """Rows of one chain of depth exactly (`deeper`: at least) `depth`; `family`: one arithmetic progression of them."""

    chain: int
    depth: int
    deeper: bool
    family: int = 0


def plan_rows(
    chains: Sequence[Chain],
    segment_shift: int,
    rows: Tensor,
    places: Tensor | None = None,
    *,
    block_outer: int,
    chunk: int = CHUNK,
) -> Walk:
    """The walk of `rows` of a sequence over themselves: row i of every tensor is `rows[i]`.

    Args:
        chains: the branches.
        segment_shift: added to the row index in the sequence before cutting into segments.
        rows: int64 `[L]`, ascending; the walk is built on their device.
        places: int64 `[L]`, their natural token indices, if these do not rise with the row.
        block_outer: rows of a tile.
        chunk: rows of a list whose extremes are taken together; divides the rows of a step.
    """
    return _RowWalk(chains, segment_shift, rows, places, block_outer, chunk).walk()


class _RowWalk:
    """Builds the walk of rows over themselves. Heads of equal offsets share a table: K offset classes."""

    def __init__(
        self, chains: Sequence[Chain], shift: int, rows: Tensor, places: Tensor | None, block_outer: int, chunk: int
    ) -> None:
        self.chains, self.rows, self.block_outer, self.chunk = chains, rows, block_outer, chunk
        self.device, self.size = rows.device, len(rows)
        self.s = rows + shift
        self.first, last = self.s[[0, -1]].tolist() if self.size else (0, -1)
        self.unbroken = self.size == last - self.first + 1
        rises = places is None or bool((places.diff() > 0).all())
        self.hint = torch.arange(self.size, device=self.device) if rises or places is None else places.argsort()
        self.indexed = not (self.unbroken and rises and all(x.progressions(FAMILIES) for x in chains))

        self.levels = [self._level(number, w, last) for number, chain in enumerate(chains) for w, _ in chain.branches]
        self.columns = [0, *itertools.accumulate(x.number + 1 for x in self.levels)]  # of a list's edges, by level
        self.base = [0, *itertools.accumulate(len(chain.branches) for chain in chains)]  # the first level of a chain
        offsets = np.array([o for chain in chains for o in chain.offsets], np.int64)
        self.offsets, table_of_head = np.unique(offsets, axis=1, return_inverse=True)  # [levels, K]
        self.tables = torch.from_numpy(table_of_head.reshape(1, -1).astype(np.int32)).to(self.device)
        self.number = self.offsets.shape[1]
        self.depth = [self._depth(number) for number in range(len(chains))]  # of every chain, [K, L]

        # A row's kind says which branches it is in: a number with a digit for every chain, 0 for none of its branches.
        sizes = [len(chain.branches) + 1 for chain in chains]
        self.kinds = list(itertools.product(*(range(-1, size - 1) for size in sizes)))
        self.kind = torch.zeros((self.number, self.size), dtype=torch.int64, device=self.device)
        for depth, size in zip(self.depth, sizes, strict=True):
            self.kind = self.kind * size + depth + 1
        table = torch.arange(self.number, device=self.device)[:, None] * len(self.kinds)
        counts = torch.bincount((self.kind + table).flatten(), minlength=self.number * len(self.kinds))
        self.counts = counts.view(self.number, -1).cpu().numpy()  # rows of every kind, [K, kinds]

    def _level(self, chain: int, w: int | None, last: int) -> _Level:
        if w is None or not self.size:
            return _Level(chain, None, 1, torch.zeros_like(self.s))
        before = self.first // w
        return _Level(chain, w, last // w - before + 1, self.s.div(w, rounding_mode="floor") - before)

    def _depth(self, number: int) -> Tensor:
        depth = torch.full((self.number, self.size), -1, dtype=torch.int64, device=self.device)
        for level, (w, r) in enumerate(self.chains[number].branches):
            within = self.s if w is None else self.s % w
            offset = torch.from_numpy(self.offsets[self.base[number] + level]).to(self.device)
            depth += (within % r)[None] == offset[:, None]
        return depth

    def walk(self) -> Walk:
        lists = self._lists()
        order, groups = self._order()
        visits, first_visit, room = self._visits(lists)
        tiles, runs, segments = self._tiles(order, groups, first_visit, room)
        outer = order.flatten()
        records, edges, inner, longest = self._records(lists, outer)
        inner = torch.cat((inner, inner.new_zeros(SPARE))).to(torch.int32)
        shared = self.indexed and len(self.chains) == 1
        outer = inner if shared else torch.cat((outer, outer.new_zeros(SPARE))).to(torch.int32)
        chunks = -(-records[:, :, tables.LIST_COUNT] // self.chunk)
        records[:, :, tables.LIST_CHUNK] = np.cumsum(chunks, axis=1) - chunks
        return Walk(
            self.tables, torch.zeros(self.number, dtype=torch.int32, device=self.device), tiles, self._sent(visits),
            self._sent(records), edges,
            self._sent(np.array([[c, *x.bounds(self.first)] for c, x in zip(self.columns, self.levels, strict=False)])),
            outer, inner if self.indexed else inner[:0], runs, self.chunk, int(chunks.sum(1).max(initial=0)), longest, segments,
            self.indexed, self.block_outer,
        )  # fmt: skip

    def _sent(self, array: np.ndarray) -> Tensor:
        return sent(array, self.device)

    # ---- which lists the tiles of a kind visit

    def _lists(self) -> list[_List]:
        found = []
        for number, chain in enumerate(self.chains):
            for depth, (_, r) in enumerate(chain.branches):
                found.append(_List(number, depth, deeper=True))
                if depth + 1 < len(chain.branches) and not chain.once:
                    families = 1 if self.indexed else chain.branches[depth + 1].dilation_rate // r - 1
                    found += [_List(number, depth, deeper=False, family=i) for i in range(families)]
        return found

    def _visits(self, lists: Sequence[_List]) -> tuple[np.ndarray, list[tuple[int, int]], list[tuple[int, int]]]:
        """The visits of all kinds; where each kind's begin, and their number; the most runs each may have, full and masked."""
        visits, spans, room = list[tuple[int, int, int, int]](), list[tuple[int, int]](), list[tuple[int, int]]()
        for kind in self.kinds:
            start = len(visits)
            for name, x in enumerate(lists):
                for shell in self._shells(x, kind[x.chain]):
                    level, times = self.base[x.chain] + shell, self.chains[x.chain].multiplicity(shell, x.depth)
                    visits.append((name, level, level - 1 if shell else -1, times))
            holes = sum(hole >= 0 for _, _, hole, _ in visits[start:])
            plain = len(visits) - start - holes
            spans.append((start, len(visits) - start))
            room.append((plain + 2 * holes, 2 * plain + 5 * holes))
        return np.array(visits, np.int64).reshape(-1, VISIT_WIDTH), spans, room

    def _shells(self, x: _List, depth: int) -> Sequence[int]:
        """The shells in which rows of this depth in its chain visit a list."""
        if self.chains[x.chain].once:  # all pairs of a shell count alike, whatever their depths
            return [x.depth] if x.depth <= depth else []
        return range(min(x.depth, depth) + 1) if (x.depth == depth if x.deeper else x.depth < depth) else []

    # ---- which rows make up a tile

    def _order(self) -> tuple[Tensor, Tensor]:
        """The rows of every table, int64 `[K, L]`, by kind, then so that tiles may end between groups; and their groups."""
        size = max(self.size, *(level.number for level in self.levels)) + 1  # rows with gaps may lie in more segments
        cuts, finest = self._cuts()
        column = torch.arange(self.size, device=self.device)[None]
        group = self.kind * size + cuts[self.kind, column]
        order = self.hint.expand(self.number, -1)
        order = order.gather(1, (group * size + finest[self.kind, column]).gather(1, order).argsort(dim=1, stable=True))
        return order, group.gather(1, order)

    def _cuts(self) -> tuple[Tensor, Tensor]:
        """The number of each row by which tiles are cut, and the finest of its segments: int64 `[kinds, L]` each.

        Tiles end where any segment that they visit does, if that costs little: then masks need not compare segments. Otherwise
        they end at the segments of the shortest length that holds half a tile.
        """
        if not self.size:
            none = torch.zeros((len(self.kinds), 0), dtype=torch.int64, device=self.device)
            return none, none
        visited = [
            [f for f, x in enumerate(self.levels) if f - self.base[x.chain] <= kind[x.chain]] for kind in self.kinds
        ]
        rows = self.counts.max(0, initial=0)
        by_length = [sorted(of, key=lambda f: -self.levels[f].number) for of in visited]
        half = [
            next((f for f in of if rows[i] >= self.block_outer // 2 * self.levels[f].number), of[-1]) if of else None
            for i, of in enumerate(by_length)
        ]

        def segments(levels: Sequence[int | None]) -> Tensor:
            return torch.stack([torch.zeros_like(self.s) if f is None else self.levels[f].segment for f in levels])

        at_all = torch.stack([changes(segments(of or [None]))[:, :-1].any(0).cumsum(0) - 1 for of in visited])
        few = [1 if f is None else self.levels[f].number for f in half]
        all_ends = (at_all[:, -1] + 1).tolist()
        dear = self._cost(all_ends, visited) > MOST_MORE * self._cost(few, visited)
        finest = segments([of[0] if of else None for of in by_length])
        return segments(half) if self.unbroken and dear else at_all, finest

    def _cost(self, groups: list[int], visited: list[list[int]]) -> float:
        """Roughly the number of pairs executed if the tiles of each kind are cut into `groups[kind]` groups."""
        rows = self.counts.max(0, initial=0).astype(float)
        total = 0.0
        for i, (number, of) in enumerate(zip(groups, visited, strict=True)):
            tiles = number * -(-rows[i] // (number * self.block_outer))
            for f in of:
                level = self.levels[f]
                depth = f - self.base[level.chain]
                inner = sum(rows[j] for j, kind in enumerate(self.kinds) if kind[level.chain] >= depth)
                hole = (
                    inner / self.levels[f - 1].number * max(1, self.levels[f - 1].number / max(tiles, 1))
                    if depth
                    else 0
                )
                total += tiles * max(0, inner / level.number * max(1, level.number / max(tiles, 1)) - hole)
        return total

    def _tiles(
        self, order: Tensor, groups: Tensor, visits: list[tuple[int, int]], room: list[tuple[int, int]]
    ) -> tuple[Tensor, int, bool]:
        """The tiles, the runs of a table, and whether some tiles lie in several segments."""
        block, width = self.block_outer, TILE_SEGMENTS + 2 * len(self.levels)
        if not self.size:
            return torch.zeros((self.number, 0, width), dtype=torch.int32, device=self.device), 0, False
        index = torch.arange(self.size, device=self.device).expand_as(order)
        edges = changes(groups)
        start, stop = first_before(edges), first_behind(edges)
        kind = self.kind.gather(1, order)
        table, place = (((index - start) % block == 0) & (kind > 0)).nonzero().unbind(1)
        count = (stop[table, place] - place).clamp(max=block)
        kind = kind[table, place]
        per_table = torch.bincount(table, minlength=self.number)
        before = per_table.cumsum(0) - per_table
        slot = torch.arange(len(table), device=self.device) - before[table]
        full, masked = torch.tensor(room, device=self.device)[kind].unbind(1)
        taken = full + masked + GAPS + 1  # and one after them, see `prune`
        upto = taken.cumsum(0)
        first_run = upto - taken - torch.where(before[table] > 0, upto[before[table] - 1], 0)
        visit = torch.tensor(visits, device=self.device)[kind]

        tiles = torch.zeros((self.number, int(per_table.max()), width), dtype=torch.int32, device=self.device)
        columns = [place + table * self.size, count, *visit.unbind(1), first_run, full]
        within = torch.arange(block, device=self.device)
        rows = order[table[:, None], (place[:, None] + within).clamp(max=self.size - 1)]
        rows = torch.where(within < count[:, None], rows, rows[:, :1])
        straddles = torch.zeros((), dtype=torch.bool, device=self.device)
        digits = torch.tensor(self.kinds, device=self.device)[kind]
        for f, level in enumerate(self.levels):
            low, high = level.segment[rows].aminmax(dim=1)
            straddles |= ((low != high) & (digits[:, level.chain] >= f - self.base[level.chain])).any()
            columns += [low, high]
        tiles[table, slot] = torch.stack(columns, dim=1).to(torch.int32)
        ends = torch.where(per_table > 0, upto[(before + per_table - 1).clamp(min=0)] - torch.where(
            before > 0, upto[before - 1], 0), 0) if len(upto) else per_table  # fmt: skip
        return tiles, int(ends.max()), bool(straddles)

    # ---- where the lists lie

    def _records(self, lists: Sequence[_List], outer: Tensor) -> tuple[np.ndarray, Tensor, Tensor, int]:
        """The lists `[K, lists, LIST_WIDTH]`, their edges, the rows of those that are indexed, and the greatest length."""
        records = np.zeros((self.number, len(lists), LIST_WIDTH), np.int64)
        edges = torch.zeros((self.number, len(lists), self.columns[-1]), dtype=torch.int32, device=self.device)
        rows = [outer] if len(self.chains) == 1 and self.indexed else [outer[:0]]
        taken = len(rows[0])
        for name, x in enumerate(lists):
            if not self.indexed:
                self._progression(x, records[:, name], edges[:, name])
                continue
            chain = self.chains[x.chain]
            segment = self.levels[self.base[x.chain]].segment
            ranked = self.hint[segment[self.hint].argsort(stable=True)]
            depth = self.depth[x.chain][:, ranked]
            table, at = (depth >= x.depth if x.deeper else depth == x.depth).nonzero().unbind(1)
            found = ranked[at]
            count = torch.bincount(table, minlength=self.number)
            self._edges(x.chain, table, found, edges[:, name])
            counts = count.cpu().numpy()
            if len(rows[0]) and (
                not x.deeper or x.depth + 1 == len(chain.branches)
            ):  # the rows of a kind, as in the tiles
                base = self.counts[:, : x.depth + 1].sum(1) + np.arange(self.number) * self.size
            elif x.deeper and x.depth == 0 and chain.branches[0].dilation_rate == 1:  # all rows
                base = np.full(self.number, taken)
                rows.append(ranked)
                taken += len(ranked)
            else:
                base = taken + np.cumsum(counts) - counts
                rows.append(found)
                taken += len(found)
            records[:, name, tables.LIST_BASE], records[:, name, tables.LIST_STEP] = base, 1
            records[:, name, tables.LIST_COUNT] = counts
        assert taken < ENDLESS, "more rows than an int32 counts"
        return records, edges, torch.cat(rows), int(records[:, :, tables.LIST_COUNT].max(initial=0))

    def _edges(self, chain: int, table: Tensor, rows: Tensor, edges: Tensor) -> None:
        """Where the segments of a list begin, for every level of its chain."""
        for column, level in zip(self.columns, self.levels, strict=False):
            if level.chain == chain:
                held = torch.bincount(table * level.number + level.segment[rows], minlength=self.number * level.number)
                edges[:, column + 1 : column + 1 + level.number] = held.view(self.number, -1).cumsum(1)

    def _progression(self, x: _List, records: np.ndarray, edges: Tensor) -> None:
        """A list of rows at equal steps, which no segment restarts."""
        chain, base = self.chains[x.chain], self.base[x.chain]
        if x.deeper:
            rate, offset = chain.branches[x.depth].dilation_rate, self.offsets[base + x.depth]
        else:
            rate = chain.branches[x.depth + 1].dilation_rate
            offset = self.offsets[base + x.depth + 1] + (x.family + 1) * chain.branches[x.depth].dilation_rate
        first = (offset - self.first) % rate
        records[:, tables.LIST_BASE], records[:, tables.LIST_STEP] = first, rate
        records[:, tables.LIST_COUNT] = np.maximum(0, -(-(self.size - first) // rate))
        for column, level in zip(self.columns, self.levels, strict=False):
            if level.chain == x.chain:
                starts = np.zeros(level.number + 1, np.int64)
                starts[-1] = self.size
                if level.length is not None:
                    starts[1:-1] = (self.first // level.length + np.arange(1, level.number)) * level.length - self.first
                places = np.clip(-(-(starts - first[:, None]) // rate), 0, records[:, tables.LIST_COUNT, None])
                edges[:, column : column + level.number + 1] = self._sent(places)
