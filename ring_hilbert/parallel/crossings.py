# SPDX-License-Identifier: Apache-2.0
"""Crossings: the segments that cross a rank boundary, and the rows that may therefore be sent, whatever the batch.

These rows are *candidates*; which of them a batch sends is in `travel.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from ring_hilbert.ops.pattern import Branch, DilatedPattern
from ring_hilbert.ops.visits import Chunk, Segments, rows_in, segment_at
from ring_hilbert.parallel.combs import Comb, Stretch, widest
from ring_hilbert.parallel.layout import Layout

Windows = Sequence[tuple[int, int]]  # runs of rows `[start, stop)`, ascending

KEPT_READERS = 16
KEPT = 512  # crossings in the cache: those of a model's layers, with all computed for their ranks


class Block(NamedTuple):
    """Part of a shipment: the ascending `rows` of one kv head, for every batch entry in turn."""

    head: int
    rows: np.ndarray


class Reach(NamedTuple):
    """A segment of `branch` that extends beyond a reader's chunk: its rows `mine` may see others of `[start, stop)`."""

    branch: Branch
    chunk: Chunk
    mine: Segments
    start: int
    stop: int

    def comb(self, offset: int) -> Comb | None:
        """The rows of the segment that those in `mine` see, None if `mine` has no row at this offset."""
        if rows_in(self.mine, self.branch.dilation_rate, offset) is None:
            return None
        return Comb.through(self.mine.origin + offset, self.branch.dilation_rate)


@dataclass(frozen=True, eq=False)
class Crossings:
    """Which ranks may read which rows of each other, for one pattern on one sequence.

    Args:
        pattern, layout: of the whole sequence.
        in_row_order: causal, and all rows of a later chunk have larger positions than those of an earlier one.
        num_kv_heads, batch_size: of k and v.
    """

    pattern: DilatedPattern
    layout: Layout
    in_row_order: bool
    num_kv_heads: int
    batch_size: int
    _reaches: dict[int, list[Reach]] = field(default_factory=dict, init=False)

    @cached_property
    def communicates(self) -> bool:
        """Whether any segment crosses a rank boundary; decided by the layout alone, hence the same on every rank."""
        interior = {int(cut) for cut in self.layout.cuts if 0 < cut < self.layout.seq_len}
        shift = self.pattern.segment_shift
        return self.layout.world_size > 1 and any(
            w is None or (start + shift) % w for w in set(self.pattern.segment_lengths) for start in interior
        )

    # ---- how many rows may be sent

    def counts(self, reader: int) -> np.ndarray:
        """Payload rows that `reader` may need from every rank, int64 `[P]`."""
        counts = np.zeros(self.layout.world_size, np.int64)
        cuts = self.layout.cuts
        for heads, stretches in self._stretches(self.reaches(reader), self.elsewhere(reader)):
            for stretch in stretches:
                first = int(np.searchsorted(cuts, stretch.start, "right")) - 1
                last = int(np.searchsorted(cuts, stretch.stop, "left"))
                held = stretch.counts(cuts[first : last + 1]) * (len(heads) * self.batch_size)
                np.add.at(counts, self.layout.owners[first:last], held)
        return counts

    def count(self, reader: int, owner: int) -> int:
        """Payload rows that `reader` may need from `owner`."""
        reaches, windows = self.toward(reader, owner)
        return self.batch_size * sum(
            len(heads) * stretch.size for heads, stretches in self._stretches(reaches, windows) for stretch in stretches
        )

    # ---- which rows may be sent

    def shipment(self, reader: int, owner: int) -> list[Block]:
        """The K and V rows that `reader` may need from `owner`: for every kv head the union over the branches."""
        return self._blocks(*self.toward(reader, owner)).get(owner, [])

    def shipments(self, reader: int) -> dict[int, list[Block]]:
        """The shipments to `reader` by owner, without empty ones."""
        return self._blocks(self.reaches(reader), self.elsewhere(reader))

    def _blocks(self, reaches: list[Reach], windows: Windows) -> dict[int, list[Block]]:
        """The blocks by owner and head; both ends of a shipment find the same blocks in the same order."""
        cuts, owners = self.layout.cuts, self.layout.owners
        blocks: dict[int, list[Block]] = {}
        for heads, rows in self.needed(reaches, windows):
            ends = np.searchsorted(rows, cuts)
            parts: dict[int, list[np.ndarray]] = {}
            for chunk in np.flatnonzero(np.diff(ends)):
                parts.setdefault(int(owners[chunk]), []).append(rows[ends[chunk] : ends[chunk + 1]])
            for owner, runs in parts.items():
                held = runs[0] if len(runs) == 1 else np.concatenate(runs)
                blocks.setdefault(owner, []).extend(Block(head, held) for head in heads)
        for found in blocks.values():
            found.sort(key=lambda block: block.head)
        return blocks

    def needed(self, reaches: list[Reach], windows: Windows) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        """(kv heads, the ascending rows in `windows` that they may need), without empty ones."""
        for heads, stretches in self._stretches(reaches, windows):
            parts = [stretch.rows() for stretch in stretches]
            rows = parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.int64), *parts])
            if len(rows):
                yield heads, rows

    def keys(self, reach: Reach, offset: int, windows: Windows) -> np.ndarray:
        """The ascending rows of `windows` that rows of this offset may see within the reach."""
        comb = reach.comb(offset)
        clipped = [(max(a, reach.start), min(b, reach.stop)) for a, b in windows]
        parts = [Stretch(a, b, (comb,)).rows() for a, b in clipped if a < b] if comb is not None else []
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    # ---- where rows may be needed

    def reaches(self, reader: int) -> list[Reach]:
        """The segments that extend beyond the chunks of `reader`."""
        if reader not in self._reaches:
            if len(self._reaches) >= KEPT_READERS:
                self._reaches.clear()
            self._reaches[reader] = list(self._find_reaches(reader))
        return self._reaches[reader]

    def _find_reaches(self, reader: int) -> Iterator[Reach]:
        seq_len, shift = self.layout.seq_len, self.pattern.segment_shift
        for branch, chunk in itertools.product(self.pattern.branches, self.layout.chunks(reader)):
            for row in sorted({chunk.start, chunk.stop - 1}):
                origin, start, stop = segment_at(branch, shift, row)
                start = 0 if start is None else max(0, start)
                stop = seq_len if stop is None else min(stop, seq_len)
                if row == chunk.stop - 1 and row != chunk.start and start <= chunk.start:
                    continue  # the chunk lies in one segment, already found by its first row
                mine = Segments(origin, max(chunk.start, start), min(chunk.stop, stop), 1, 0)
                if self.in_row_order:
                    stop = min(stop, mine.stop)
                if start < mine.start or mine.stop < stop:
                    yield Reach(branch, chunk, mine, start, stop)

    def readers(self, owner: int) -> Iterable[int]:
        """The ranks that may see rows of `owner`."""
        return [reader for reader in range(self.layout.world_size) if reader != owner and self.toward(reader, owner)[0]]

    def windows(self, owner: int) -> Windows:
        """The rows of `owner`."""
        return [(chunk.start, chunk.stop) for chunk in self.layout.chunks(owner)]

    def elsewhere(self, reader: int) -> Windows:
        """All rows but those of `reader`."""
        edges = [0, *itertools.chain(*self.windows(reader)), self.layout.seq_len]
        return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]

    def toward(self, reader: int, *owners: int) -> tuple[list[Reach], Windows]:
        """The reaches of `reader` that hold rows of the other ranks `owners`, and the rows of these."""
        windows = sorted(window for owner in owners if owner != reader for window in self.windows(owner))
        reaches = [r for r in self.reaches(reader) if any(r.start < b and a < r.stop for a, b in windows)]
        return reaches, windows

    def _stretches(self, reaches: list[Reach], windows: Windows) -> Iterator[tuple[tuple[int, ...], list[Stretch]]]:
        """(kv heads, the rows in `windows` that these may need), ascending."""
        for offsets, heads in self.head_classes(frozenset(reach.branch for reach in reaches)):
            teeth = [
                (reach.start, reach.stop, comb)
                for reach in reaches
                if (comb := reach.comb(offsets[reach.branch])) is not None
            ]
            cuts = sorted({x for a, b, _ in teeth for x in (a, b)} | {x for window in windows for x in window})
            found = []
            for a, b in itertools.pairwise(cuts):
                if any(start <= a and b <= stop for start, stop in windows):
                    combs = frozenset(comb for start, stop, comb in teeth if start <= a and b <= stop)
                    if combs:
                        found.append(Stretch(a, b, widest(combs)))
            yield heads, found

    # ---- heads

    def head_classes(self, branches: frozenset[Branch]) -> list[tuple[dict[Branch, int], tuple[int, ...]]]:
        """The kv heads grouped by their offsets in `branches`: heads of one group need the same rows."""
        classes = self._classes
        if branches not in classes:
            ordered = sorted(branches, key=lambda branch: (branch.segment_length or 0, branch.dilation_rate))
            groups: dict[tuple[int, ...], list[int]] = {}
            for head in range(self.num_kv_heads):
                groups.setdefault(tuple(self.pattern.offset(b, head, self.num_kv_heads) for b in ordered), []).append(
                    head
                )
            classes[branches] = [(dict(zip(ordered, key, strict=True)), tuple(heads)) for key, heads in groups.items()]
        return classes[branches]

    @cached_property
    def _classes(self) -> dict[frozenset[Branch], list[tuple[dict[Branch, int], tuple[int, ...]]]]:
        return {}


@lru_cache(maxsize=KEPT)
def crossings_of(
    pattern: DilatedPattern, layout: Layout, in_row_order: bool, num_kv_heads: int, batch_size: int
) -> Crossings:
    """The same object for the same arguments, so that batches share what was computed for it."""
    return Crossings(pattern, layout, in_row_order, num_kv_heads, batch_size)
