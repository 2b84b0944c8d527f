# SPDX-License-Identifier: Apache-2.0
"""Remote visits: partial attention of local queries over the rows that other ranks sent."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ring_hilbert.ops.pattern import Heads
from ring_hilbert.ops.visits import Rows, Segments, rows_in
from ring_hilbert.parallel.crossings import Block, Crossings


@dataclass(frozen=True, eq=False)
class RemoteVisit:
    """Partial attention of local `queries` over rows received from other ranks, for the kv heads of one residue.

    Attributes:
        arena: int64 `[B, heads, K]`, the place of each key in the received buffer; -1 pads ragged batch entries.
        keys: int64 `[B or 1, K]`, the whole-sequence row of each key; -1 pads.
        masked: whether positions or documents hide some of the pairs.
    """

    heads: Heads
    queries: Rows
    keys: np.ndarray
    arena: np.ndarray
    masked: bool


def remote_visits(crossings: Crossings, rank: int, received: list[list[Block]]) -> Iterator[RemoteVisit]:
    """The visits of `rank` over the rows of `received[owner]`, one per branch, residue and segment."""
    places = _Arena(received, crossings)
    for branch in crossings.pattern.branches if places.size else ():
        by_queries: dict[Segments, list[tuple[int, Segments]]] = {}
        for mine, owner, theirs in crossings.of(rank, branch):
            by_queries.setdefault(mine, []).append((owner, theirs))
        for mine, others in by_queries.items():
            chunk = next(c for c in crossings.layout.chunks(rank) if c.start <= mine.start < c.stop)
            for offset, heads in crossings.pattern.residues(branch, crossings.num_kv_heads):
                queries = rows_in(mine, branch.dilation_rate, offset, chunk.start - chunk.local)
                if queries is None:
                    continue
                keys = [
                    [(owner, crossings.needed(branch, offset, mine, theirs, entry)) for owner, theirs in others]
                    for entry in crossings.entries
                ]
                visit = places.visit(heads, queries, keys, masked=not crossings.facts.by_row_alone)
                if visit is not None:
                    yield visit


class _Arena:
    """Where each (owner, batch entry, kv head, row) lies in the buffer a rank receives."""

    def __init__(self, received: list[list[Block]], crossings: Crossings) -> None:
        self.crossings, self.size = crossings, 0
        self._at: dict[tuple[int, int, int], tuple[int, np.ndarray]] = {}
        for owner, blocks in enumerate(received):
            for block in blocks:
                for entry in block.entries:
                    for head in block.heads:
                        self._at[owner, entry, head] = (self.size, block.rows)
                        self.size += len(block.rows)

    def visit(
        self, heads: Heads, queries: Rows, keys: list[list[tuple[int, np.ndarray]]], masked: bool
    ) -> RemoteVisit | None:
        """The visit over `keys[entry] = [(owner, rows), ...]`; a single entry stands for the whole batch."""
        width = max(sum(len(rows) for _, rows in entry) for entry in keys)
        if width == 0:
            return None
        key_rows = np.full((len(keys), width), -1, np.int64)
        arena = np.full((self.crossings.batch_size, len(heads.indices), width), -1, np.int64)
        for e, entry_keys in enumerate(keys):
            column = 0
            for owner, rows in entry_keys:
                if not len(rows):
                    continue
                columns = slice(column, column + len(rows))
                key_rows[e, columns] = rows
                for b in self.crossings.batch(e):
                    for h, head in enumerate(heads.indices):
                        base, held = self._at[owner, b, head]
                        arena[b, h, columns] = base + np.searchsorted(held, rows)
                column += len(rows)
        return RemoteVisit(heads, queries, key_rows, arena, masked)
