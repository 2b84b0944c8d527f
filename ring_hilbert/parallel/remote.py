# SPDX-License-Identifier: Apache-2.0
"""Hops: what a rank may receive and send at once, and its queries' partial attention over it, whatever the batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ring_hilbert.ops.core import RemoteVisit
from ring_hilbert.ops.visits import counted_pairs, rows_in
from ring_hilbert.parallel.crossings import Block, Crossings


@dataclass(frozen=True, eq=False)
class Hop:
    """The candidates that one rank receives and sends at once, by source and destination rank, and the visits over them.

    `distance`: in a ring, rows come from the rank that many places before and go to the one that many after.
    """

    distance: int
    received: dict[int, list[Block]]
    sent: dict[int, list[Block]]
    visits: list[RemoteVisit]


def hops_of(crossings: Crossings, rank: int, *, ring: bool) -> list[Hop]:
    """The hops of a rank: one that brings all rows, or, in a ring, one from each rank in turn."""
    if not crossings.communicates:
        return []
    received = crossings.shipments(rank)
    sent = {reader: crossings.shipment(reader, rank) for reader in crossings.readers(rank)}
    if not ring:
        return [Hop(0, received, sent, list(_visits(crossings, rank, received)))]
    hops, world = list[Hop](), crossings.layout.world_size
    for distance in range(1, world):
        owner, reader = (rank - distance) % world, (rank + distance) % world
        theirs, mine = ({r: x[r]} if x.get(r) else {} for x, r in ((received, owner), (sent, reader)))
        if theirs or mine:
            hops.append(Hop(distance, theirs, mine, list(_visits(crossings, rank, theirs))))
    return hops


def payload(blocks: Sequence[Block], batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(batch entry, row of the sequence, kv head) of every payload row: block by block, in these by entry, then row."""
    empty = np.empty(0, np.int64)
    entry = np.concatenate([empty, *(np.repeat(np.arange(batch), len(block.rows)) for block in blocks)])
    row = np.concatenate([empty, *(np.tile(block.rows, batch) for block in blocks)])
    return (
        entry,
        row,
        np.repeat([block.head for block in blocks], [batch * len(b.rows) for b in blocks]).astype(np.int64),
    )


def _visits(crossings: Crossings, rank: int, received: dict[int, list[Block]]) -> Iterator[RemoteVisit]:
    """The visits of `rank` over the candidates of `received[owner]`, by branch, offset and segment."""
    if not any(received.values()):
        return
    batch = crossings.batch_size
    at: dict[
        int, tuple[list[np.ndarray], list[np.ndarray]]
    ] = {}  # by head: its rows, and their candidates by batch entry
    size = 0
    for owner in sorted(received):
        for head, rows in received[owner]:
            held, numbers = at.setdefault(head, ([], []))
            held.append(rows)
            numbers.append(size + np.arange(batch * len(rows)).reshape(batch, -1))
            size += batch * len(rows)
    candidates = {}
    for head, (held, numbers) in at.items():
        rows = np.concatenate(held)
        order = np.argsort(rows, kind="stable")
        candidates[head] = rows[order], np.concatenate(numbers, axis=1)[:, order]
    pattern = crossings.pattern
    windows = sorted(window for owner in received for window in crossings.windows(owner))
    for reach in crossings.reaches(rank):
        branch, base = reach.branch, reach.chunk.start - reach.chunk.local
        for mine, runs in counted_pairs(pattern, branch, reach.mine, windows):
            for offset, heads in pattern.residues(branch, crossings.num_kv_heads):
                queries = rows_in(mine, branch.dilation_rate, offset, base)
                keys = crossings.keys(reach, offset, runs)
                if queries is not None and len(keys):
                    known = [candidates[head] for head in heads.indices]
                    found = [numbers[:, np.searchsorted(rows, keys)] for rows, numbers in known]
                    yield RemoteVisit(heads, queries, np.stack(found, axis=1), keys, pattern.weight(branch))
