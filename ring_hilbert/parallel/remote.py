# SPDX-License-Identifier: Apache-2.0
"""Hops: what travels to and from a rank at once, and the partial attention of its queries over what has arrived."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ring_hilbert.ops.pattern import Heads
from ring_hilbert.ops.visits import Rows, rows_in
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


@dataclass(frozen=True, eq=False)
class Hop:
    """What one rank receives and sends at once: blocks by the rank they come from and go to, and the visits over them.

    `distance`, in a ring: rows come from the rank that many places before, and go to the one that many after.
    """

    distance: int
    received: dict[int, list[Block]]
    sent: dict[int, list[Block]]
    visits: list[RemoteVisit]

    @property
    def rows(self) -> int:
        """Payload rows that arrive."""
        return sum(block.size for blocks in self.received.values() for block in blocks)


def remote_visits(crossings: Crossings, rank: int, received: dict[int, list[Block]]) -> Iterator[RemoteVisit]:
    """The visits of `rank` over the rows of `received[owner]`, one per branch, residue and segment."""
    if not any(received.values()):
        return
    places = _Arena(received, crossings)
    windows = sorted(window for owner in received for window in crossings.windows(owner))
    for reach in crossings.reaches(rank):
        for offset, heads in crossings.pattern.residues(reach.branch, crossings.num_kv_heads):
            queries = rows_in(reach.mine, reach.branch.dilation_rate, offset, reach.chunk.start - reach.chunk.local)
            if queries is not None:
                keys = [crossings.keys(reach, offset, entry, windows) for entry in crossings.entries]
                visit = places.visit(heads, queries, keys, masked=not crossings.regular)
                if visit is not None:
                    yield visit


class _Arena:
    """Where each (batch entry, kv head, row) lies in the buffer a rank receives."""

    def __init__(self, received: dict[int, list[Block]], crossings: Crossings) -> None:
        self.crossings = crossings
        parts: dict[tuple[int, int], list[tuple[np.ndarray, int]]] = {}
        size = 0
        for owner in sorted(received):
            for block in received[owner]:
                for entry in block.entries:
                    parts.setdefault((entry, block.head), []).append((block.rows, size))
                    size += len(block.rows)
        self._at: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
        for key, found in parts.items():
            rows = np.concatenate([rows for rows, _ in found])
            places = np.concatenate([base + np.arange(len(rows)) for rows, base in found])
            order = np.argsort(rows, kind="stable")
            self._at[key] = rows[order], places[order]

    def visit(self, heads: Heads, queries: Rows, keys: list[np.ndarray], masked: bool) -> RemoteVisit | None:
        """The visit over the rows `keys[entry]`; a single entry stands for the whole batch."""
        width = max(map(len, keys))
        if width == 0:
            return None
        key_rows = np.full((len(keys), width), -1, np.int64)
        arena = np.full((self.crossings.batch_size, len(heads.indices), width), -1, np.int64)
        for entry, rows in enumerate(keys):
            key_rows[entry, : len(rows)] = rows
            for b in self.crossings.batch(entry) if len(rows) else ():
                for h, head in enumerate(heads.indices):
                    held, places = self._at[b, head]
                    arena[b, h, : len(rows)] = places[np.searchsorted(held, rows)]
        return RemoteVisit(heads, queries, key_rows, arena, masked)
