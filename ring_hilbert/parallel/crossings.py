# SPDX-License-Identifier: Apache-2.0
"""Crossings: the segments that reach over a rank boundary, and the rows that therefore travel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ring_hilbert.ops.pattern import Branch, DilatedPattern
from ring_hilbert.ops.visits import Segments, rows_in, segment_at
from ring_hilbert.parallel.facts import Facts
from ring_hilbert.parallel.layout import Layout


class Block(NamedTuple):
    """Part of a shipment: the same ascending `rows` for all of `entries` (of the batch) and all of `heads` (kv)."""

    entries: range
    heads: tuple[int, ...]
    rows: np.ndarray

    @property
    def size(self) -> int:
        """How many (entry, head, row) payload rows this is."""
        return len(self.entries) * len(self.heads) * len(self.rows)


@dataclass(frozen=True, eq=False)
class Crossings:
    """Who reads whose rows, for one pattern on one sequence.

    Args:
        pattern, layout, facts: of the whole sequence.
        num_kv_heads, batch_size: of k and v.
    """

    pattern: DilatedPattern
    layout: Layout
    facts: Facts
    num_kv_heads: int
    batch_size: int
    _shipments: dict[tuple[int, int], list[Block]] = field(default_factory=dict, init=False)

    @cached_property
    def communicates(self) -> bool:
        """Whether any segment reaches over a rank boundary; decided by the layout alone, hence the same on every rank."""
        interior = {start for start in self.layout.starts if 0 < start < self.layout.seq_len}
        shift = self.pattern.segment_shift
        return any(w is None or (start + shift) % w for w in self.pattern.segment_lengths for start in interior)

    def shipment(self, reader: int, owner: int) -> list[Block]:
        """The K and V rows that `reader` needs from `owner`: for every kv head the union over the branches."""
        key = (reader, owner)
        if key not in self._shipments:
            self._shipments[key] = list(self._blocks(reader, owner)) if reader != owner and self.communicates else []
        return self._shipments[key]

    def _blocks(self, reader: int, owner: int) -> Iterator[Block]:
        crossing = [list(self.of(reader, branch, owner)) for branch in self.pattern.branches]
        if not any(crossing):
            return
        needed: dict[tuple[int, int, int], list[np.ndarray]] = {}
        for offsets, heads in self._head_classes:
            for entry in self.entries:
                parts: list[np.ndarray] = []
                for i, (branch, offset) in enumerate(zip(self.pattern.branches, offsets, strict=True)):
                    if (i, offset, entry) not in needed:
                        needed[i, offset, entry] = [
                            self.needed(branch, offset, mine, theirs, entry) for mine, _, theirs in crossing[i]
                        ]
                    parts += needed[i, offset, entry]
                rows = np.unique(np.concatenate(parts)) if parts else np.empty(0, np.int64)
                if len(rows):
                    yield Block(self.batch(entry), heads, rows)

    def needed(self, branch: Branch, offset: int, mine: Segments, theirs: Segments, entry: int) -> np.ndarray:
        """The rows of `theirs` in the branch that some row of `mine` in the branch sees."""
        queries = rows_in(mine, branch.dilation_rate, offset)
        keys = rows_in(theirs, branch.dilation_rate, offset)
        if queries is None or keys is None:
            return np.empty(0, np.int64)
        return self.facts.needed(queries.indices()[0], keys.indices()[0], entry)

    def of(self, reader: int, branch: Branch, owner: int | None = None) -> Iterator[tuple[Segments, int, Segments]]:
        """(rows of `reader`, owner, rows of that owner) for every segment of `branch` that both have a part of."""
        shift = self.pattern.segment_shift
        for chunk in self.layout.chunks(reader):
            for row in sorted({chunk.start, chunk.stop - 1}):
                origin, start, stop = segment_at(branch, shift, row)
                start = 0 if start is None else max(0, start)
                stop = self.layout.seq_len if stop is None else min(stop, self.layout.seq_len)
                if row == chunk.stop - 1 and row != chunk.start and start <= chunk.start:
                    continue  # the chunk lies in one segment, which came with its first row
                mine = Segments(origin, max(chunk.start, start), min(chunk.stop, stop), 1, 0)
                if self.facts.row_causal:
                    stop = min(stop, mine.stop)
                for rank, other in self.layout.owners(start, stop):
                    if rank != reader and (owner is None or rank == owner):
                        yield mine, rank, Segments(origin, max(other.start, start), min(other.stop, stop), 1, 0)

    @cached_property
    def entries(self) -> range:
        """The batch entries whose rows have to be looked at separately: one if facts are shared."""
        return range(self.facts.batch_size)

    def batch(self, entry: int) -> range:
        """The batch entries that `entry` of `entries` speaks for: all if facts are shared, else itself."""
        return range(self.batch_size) if len(self.entries) == 1 else range(entry, entry + 1)

    @cached_property
    def _head_classes(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """The kv heads grouped by their offsets in all branches: heads of one group need the same rows."""
        classes: dict[tuple[int, ...], list[int]] = {}
        for head in range(self.num_kv_heads):
            offsets = tuple(self.pattern.offset(b, head, self.num_kv_heads) for b in self.pattern.branches)
            classes.setdefault(offsets, []).append(head)
        return [(offsets, tuple(heads)) for offsets, heads in classes.items()]
