# SPDX-License-Identifier: Apache-2.0
"""Static walks over received rows: explicit lists of which rows may see which candidates, made once, on the host."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch import Tensor

from ring_hilbert.kernels import tables
from ring_hilbert.kernels.tables import CHUNK, ENDLESS, GAPS, LIST_WIDTH, SPARE, TILE_SEGMENTS, VISIT_WIDTH, Walk, sent
from ring_hilbert.kernels.tiles import Tile
from ring_hilbert.ops.core import RemoteVisit, Shard

# Outer rows, the inner rows that all of them visit, and how often a pair counts.
Pairs = tuple[np.ndarray, np.ndarray, int]


def plan_lists(
    visits: Sequence[Sequence[Sequence[Pairs]]], outer_places: np.ndarray, inner_places: np.ndarray, *, block_outer: int,
    device: torch.device, chunk: int = CHUNK,
) -> Walk:  # fmt: skip
    """A walk from explicit lists: `visits[b][g]` are (outer rows, inner rows, times) of batch entry b and kv head g.

    A row may be in several; a pair of rows counts `times` for each that holds both. Rows in none are in no tile.

    Args:
        visits: for every batch entry and kv head; a single entry stands for all.
        outer_places, inner_places: the natural token index of every row named there.
        block_outer, chunk: as in `plan_rows`.
        device: where the tables go.
    """
    heads = len(visits[0])
    flat = [pairs for entry in visits for pairs in entry]
    widest = max(1, *(len(pairs) for pairs in flat))
    lists = np.zeros((len(flat), widest, LIST_WIDTH), np.int64)
    outer, inner, shown = list[np.ndarray](), list[np.ndarray](), list[tuple[int, int, int, int]]()
    made, runs, num_outer, num_inner = list[np.ndarray](), 0, 0, 0
    for table, pairs in enumerate(flat):
        for i, (_, keys, _) in enumerate(pairs):
            lists[table, i] = num_inner, 1, len(keys), 0
            inner.append(keys[np.argsort(inner_places[keys], kind="stable")])
            num_inner += len(keys)
        rows = np.unique(np.concatenate([np.empty(0, np.int64), *(x for x, _, _ in pairs)]))
        member = np.zeros((len(rows), len(pairs)), bool)
        for i, (x, _, _) in enumerate(pairs):
            member[np.searchsorted(rows, x), i] = True
        patterns, kind = (
            np.unique(member, axis=0, return_inverse=True) if len(rows) else (member, np.empty(0, np.int64))
        )
        kind = kind.reshape(-1)
        order = np.lexsort((outer_places[rows], kind))
        rows, kind = rows[order], kind[order]
        outer.append(rows)
        tiles = list[list[int]]()
        used = 0
        for number, pattern in enumerate(patterns):
            chosen, first = np.flatnonzero(pattern).tolist(), len(shown)
            shown += [(i, 0, -1, pairs[i][2]) for i in chosen]
            begin, end = np.searchsorted(kind, [number, number + 1])
            for at in range(begin, end, block_outer):
                tiles.append([num_outer + at, min(block_outer, end - at), first, len(chosen), used, len(chosen), 0, 0])
                used += 3 * len(chosen) + GAPS + 1
        num_outer += len(rows)
        runs = max(runs, used)
        made.append(np.array(tiles, np.int64).reshape(-1, TILE_SEGMENTS + 2))
    longest = max(len(x) for x in made)
    chunks = -(-lists[:, :, tables.LIST_COUNT] // chunk)
    lists[:, :, tables.LIST_CHUNK] = np.cumsum(chunks, axis=1) - chunks
    edges = np.zeros((len(flat), widest, 2), np.int64)
    edges[:, :, 1] = lists[:, :, tables.LIST_COUNT]

    def joined(parts: list[np.ndarray]) -> Tensor:
        return sent(np.concatenate([*parts, np.zeros(SPARE, np.int64)]), device)

    padded = np.stack([np.pad(x, ((0, longest - len(x)), (0, 0))) for x in made])
    table_of = np.arange(len(flat)).reshape(len(visits), heads)
    entries = np.repeat(np.arange(len(visits)), heads)
    return Walk(
        sent(table_of, device), sent(entries, device), sent(padded, device),
        sent(np.array(shown, np.int64).reshape(-1, VISIT_WIDTH), device), sent(lists, device), sent(edges, device),
        sent(np.array([[0, ENDLESS, 0]]), device), joined(outer), joined(inner), runs, chunk, int(chunks.sum(1).max()),
        int(lists[:, :, tables.LIST_COUNT].max()), False, True, block_outer,
    )  # fmt: skip


class RemoteWalks:
    """What the hops bring, and which local rows may see it, whatever the batch; made once.

    Args:
        hops: the visits over what each hop brings.
        places: the natural token index of each hop's candidates.
        shard: the local rows.
        num_kv_heads: Hkv.
        device: where the tables go.

    Attributes:
        slots: by kv head, the index of every row that sees a hop among all that do; -1 for others; int32 `[1, Hkv, S]`.
        number: the largest number of such rows of any kv head.
        staged: if several hops pass rows on, kv head, row and index of each, int64 `[3, n]`.
    """

    def __init__(
        self, hops: Sequence[Sequence[RemoteVisit]], places: Sequence[np.ndarray], shard: Shard, num_kv_heads: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.hops, self.places, self.shard, self.num_kv_heads, self.device = hops, places, shard, num_kv_heads, device
        self._walks: dict[Hashable, Walk] = {}
        seeing = np.zeros((num_kv_heads, shard.size), bool)
        for visit in (visit for visits in hops for visit in visits):
            seeing[np.array(visit.heads.indices)[:, None], visit.queries.indices()[0]] = True
        self.number = int(np.count_nonzero(seeing, axis=1).max(initial=0))
        sees = torch.from_numpy(seeing).to(device)
        self.slots = torch.where(sees, sees.cumsum(1) - 1, -1).to(torch.int32)[None]
        self.staged: Tensor | None = None
        if len(hops) > 1:
            head, row = sees.nonzero().unbind(1)
            self.staged = torch.stack((head, row, self.slots[0, head, row]))

    def walk(self, hop: int, tile: Tile, transposed: bool) -> Walk:
        """The walk of a hop over its candidates."""
        key = (hop, tile.block_outer, tile.chunk, transposed)
        if key not in self._walks:
            visits = self.hops[hop]
            batch = len(visits[0].keys)
            pairs: list[list[list[Pairs]]] = [[[] for _ in range(self.num_kv_heads)] for _ in range(batch)]
            for visit in visits:
                queries = visit.queries.indices()[0]
                for entry in range(batch):
                    for head, keys in zip(visit.heads.indices, visit.keys[entry], strict=True):
                        sides = (keys, queries) if transposed else (queries, keys)
                        pairs[entry][head].append((*sides, visit.weight))
            own = self.shard.places()
            places = (self.places[hop], own) if transposed else (own, self.places[hop])
            self._walks[key] = plan_lists(
                pairs, *places, block_outer=tile.block_outer, device=self.device, chunk=tile.chunk
            )
        return self._walks[key]
