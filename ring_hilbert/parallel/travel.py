# SPDX-License-Identifier: Apache-2.0
"""Which candidates a batch sends: exactly those that some query of the reader sees. One flag each, computed on the device.

Both ends of a shipment know the visibility of the whole sequence, so each computes the same flags by itself. A prefix sum of the
flags gives a row's index in the packed buffer; the counts are all that the host must read, see `read_counts`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ring_hilbert.ops.core import Incoming
from ring_hilbert.ops.visible import HIDDEN, Intervals, Visible, reached
from ring_hilbert.ops.visits import rows_in
from ring_hilbert.parallel.crossings import KEPT, Block, Crossings
from ring_hilbert.parallel.remote import Hop, hops_of, payload


class _Groups(NamedTuple):
    """Queries and the keys that they may see, by group, and the keys that each payload row stands for, int64.

    A group is a reader's reach of one offset; a *unit* is a row that a reader may need for the heads of equal offsets. Any visible
    link of a unit has it sent.
    """

    query_group: Tensor
    query_row: Tensor
    key_group: Tensor
    key_row: Tensor
    key_unit: Tensor
    payload_entry: Tensor
    payload_unit: Tensor


class Candidates:
    """The payload rows that some ranks may send to some readers: by reader, and for each in the order of its buffer.

    Args:
        crossings: the segments that cross rank boundaries.
        blocks: the rows, by reader and owner.
    """

    def __init__(self, crossings: Crossings, blocks: Mapping[int, Mapping[int, list[Block]]]) -> None:
        self.crossings, self.owners = crossings, {reader: sorted(of) for reader, of in blocks.items()}
        parts = {reader: [blocks[reader][owner] for owner in owners] for reader, owners in self.owners.items()}
        self._blocks = {reader: list(chain.from_iterable(of)) for reader, of in parts.items()}
        self.blocks = list(chain.from_iterable(self._blocks.values()))
        self.sizes = [
            crossings.batch_size * sum(len(block.rows) for block in part) for of in parts.values() for part in of
        ]
        self._on: dict[torch.device, _Groups] = {}
        self.groups = self.units = 0

    def on(self, device: torch.device) -> _Groups:
        """The groups, on a device."""
        if device not in self._on:
            self._on[device] = _Groups(*(torch.from_numpy(x).to(device) for x in self._find()))
        return self._on[device]

    def _find(self) -> list[np.ndarray]:
        crossings, batch = self.crossings, self.crossings.batch_size
        columns: list[list[np.ndarray]] = [[] for _ in range(5)]
        units = list[np.ndarray]()
        self.groups = self.units = 0
        for reader, blocks in self._blocks.items():
            unit_of: dict[int, tuple[np.ndarray, int]] = {}  # by head: rows of its units, number of the first
            reaches, windows = crossings.toward(reader, *self.owners[reader])
            for offsets, heads in crossings.head_classes(frozenset(reach.branch for reach in reaches)):
                found = list[tuple[np.ndarray, np.ndarray]]()
                for reach in reaches:
                    queries = rows_in(reach.mine, reach.branch.dilation_rate, offsets[reach.branch])
                    keys = crossings.keys(reach, offsets[reach.branch], windows)
                    if queries is not None and len(keys):
                        found.append((queries.indices()[0], keys))
                rows = np.unique(np.concatenate([np.empty(0, np.int64), *(keys for _, keys in found)]))
                unit_of |= dict.fromkeys(heads, (rows, self.units))
                for queries, keys in found:
                    group = self.groups
                    parts = (np.full_like(queries, group), queries, np.full_like(keys, group), keys)
                    for column, part in zip(columns, (*parts, self.units + np.searchsorted(rows, keys)), strict=True):
                        column.append(part)
                    self.groups += 1
                self.units += len(rows)
            for block in blocks:
                rows, first = unit_of[block.head]
                units.append(np.tile(first + np.searchsorted(rows, block.rows), batch))
        entry, _, _ = payload(self.blocks, batch)
        empty = [np.empty(0, np.int64)]
        return [*(np.concatenate(empty + column) for column in columns), entry, np.concatenate(empty + units)]

    def travel(self, seen: Intervals) -> Tensor:
        """Which payload rows a batch sends: bool `[n]`."""
        groups, entries = self.on(seen.key.device), len(seen.key)

        def in_entries(numbers: Tensor, of: int) -> Tensor:
            if entries == 1:
                return numbers
            return (numbers + of * torch.arange(entries, device=numbers.device)[:, None]).flatten()

        low, high = (x[:, groups.query_row].flatten() for x in (seen.low, seen.high))
        query_group, key_group = (in_entries(x, self.groups) for x in (groups.query_group, groups.key_group))
        hit = reached(query_group, key_group, low, high, seen.key[:, groups.key_row].flatten())
        units = torch.zeros(entries * self.units, dtype=torch.int32, device=hit.device)
        units.scatter_reduce_(0, in_entries(groups.key_unit, self.units), hit.int(), "amax")
        own = groups.payload_unit if entries == 1 else groups.payload_entry * self.units + groups.payload_unit
        return units[own] > 0


@dataclass(frozen=True, eq=False)
class Shipment:
    """One direction of a hop: the candidates from or to every rank, and which of them are sent (None: all).

    Attributes:
        ranks: the source or destination ranks, and `sizes`: the number of candidates of each.
        flags: bool `[n]`, or None.
        counts: how many are sent, by rank; known once `read_counts` has run.
    """

    ranks: list[int]
    sizes: list[int]
    flags: Tensor | None
    counts: dict[int, int] = field(default_factory=dict)

    @cached_property
    def place(self) -> Tensor | None:
        """The index of each candidate in the packed buffer, int64 `[n]`, -1 if it is not sent; None: all are."""
        return None if self.flags is None else torch.where(self.flags, self.flags.cumsum(0) - 1, -1)

    def chosen(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Those of the candidates' `values [n]` whose rows are sent."""
        if self.place is None:
            return list(values)
        total, index = sum(self.counts.values()), torch.arange(len(self.place), device=self.place.device)
        places = self.place % (total + 1)  # -1 maps behind the last
        index = index.new_zeros(total + 1).scatter_(0, places, index)[:total]
        return [x[index] for x in values]


def read_counts(shipments: Sequence[Shipment], also: Sequence[Tensor] = ()) -> list[list[int]]:
    """Read how many rows are sent, and the integers `also`, in a single transfer from the device."""
    values = [x.flatten().long() for x in also]
    for shipment in shipments:
        if shipment.flags is None:
            shipment.counts.update(zip(shipment.ranks, shipment.sizes, strict=True))
        elif shipment.ranks:
            values.append(torch.stack([part.sum() for part in shipment.flags.split(shipment.sizes)]))
    devices = {x.device for x in values}
    read = [torch.cat([x for x in values if x.device == device]).tolist() for device in devices]
    rest = {device: iter(numbers) for device, numbers in zip(devices, read, strict=True)}
    found = [[next(rest[x.device]) for _ in range(x.numel())] for x in values]
    counted = iter(found[len(also) :])
    for shipment in shipments:
        if shipment.flags is not None and shipment.ranks:
            shipment.counts.update(zip(shipment.ranks, next(counted), strict=True))
    return found[: len(also)]


class HopCandidates:
    """The candidates of one rank's hop: those received, followed by those for each reader."""

    def __init__(self, crossings: Crossings, rank: int, hop: Hop) -> None:
        sent = {reader: {rank: blocks} for reader, blocks in sorted(hop.sent.items())}
        self.hop, self.all = hop, Candidates(crossings, {rank: hop.received} | sent)
        self.owners, self.readers = self.all.owners[rank], list(sent)
        self.received = [block for owner in self.owners for block in hop.received[owner]]
        self._sent = self.all.blocks[len(self.received) :]
        self._batch, self._chunks = crossings.batch_size, crossings.layout.chunks(rank)
        self._arriving: dict[torch.device, list[Tensor]] = {}
        self._indices: dict[torch.device, list[Tensor]] = {}

    def keys(self, seen: Intervals) -> Tensor:
        """The key of every candidate that may be received, int32 `[n]`."""
        device = seen.key.device
        if device not in self._arriving:
            entry, row, _ = payload(self.received, self._batch)
            self._arriving[device] = [torch.from_numpy(x).to(device) for x in (entry, row)]
        entry, row = self._arriving[device]
        return seen.key[entry if len(seen.key) > 1 else 0, row]

    def indices(self, device: torch.device) -> list[Tensor]:
        """(batch entry, local row, kv head) of every candidate that may be sent, by reader."""
        if device not in self._indices:
            entry, row, head = payload(self._sent, self._batch)
            local = np.empty_like(row)
            for chunk in self._chunks:
                inside = (row >= chunk.start) & (row < chunk.stop)
                local[inside] = row[inside] - chunk.start + chunk.local
            self._indices[device] = [torch.from_numpy(x).to(device) for x in (entry, local, head)]
        return self._indices[device]

    @property
    def sizes(self) -> tuple[list[int], list[int]]:
        """The number of candidates from every owner, and for every reader."""
        return self.all.sizes[: len(self.owners)], self.all.sizes[len(self.owners) :]

    def in_batch(self, visible: Visible, device: torch.device, all_travel: bool) -> HopTravel:
        """What a batch sends, except the counts."""
        seen, sizes = visible.on(device), self.sizes
        flags = [None, None] if all_travel else self.all.travel(seen).split([sum(part) for part in sizes])
        received, sent = map(Shipment, (self.owners, self.readers), sizes, flags)
        return HopTravel(self, received, sent, seen)


@dataclass(frozen=True, eq=False)
class HopTravel:
    """What a rank receives and sends in one hop of one batch."""

    candidates: HopCandidates
    received: Shipment
    sent: Shipment
    seen: Intervals

    def incoming(self) -> Incoming:
        """What a core must know of the received rows."""
        key = self.candidates.keys(self.seen)
        place = self.received.place
        if place is None:
            return Incoming(key, None, key)
        return Incoming(key.masked_fill(place < 0, HIDDEN), place.to(torch.int32), self.received.chosen([key])[0])

    def send_index(self) -> list[tuple[Tensor, ...]]:
        """(batch entry, local row, kv head) of the rows for each rank of `sent`."""
        indices = self.sent.chosen(self.candidates.indices(self.seen.key.device))
        parts = [x.split([self.sent.counts[rank] for rank in self.sent.ranks]) for x in indices]
        return list(zip(*parts, strict=True))


@lru_cache(maxsize=KEPT)
def hop_candidates(crossings: Crossings, rank: int, *, ring: bool) -> tuple[HopCandidates, ...]:
    """The hops of a rank with their candidates, the same objects for the same arguments."""
    return tuple(HopCandidates(crossings, rank, hop) for hop in hops_of(crossings, rank, ring=ring))
