# SPDX-License-Identifier: Apache-2.0
"""How documents share sequences: joined and cut anywhere, or kept whole if they fit.

A packing says which pieces of which documents each sequence of an epoch holds. It stores one number per document and epoch, of 32
bits if these suffice.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from ring_hilbert.training.documents import Documents

Piece = tuple[int, int, int]  # tokens [start, stop) of a document: document, start, stop
Epoch = Callable[[int], list[Piece]]  # the pieces of a sequence, by its number
Key = tuple[int, ...]  # seeds an order

PART = 2**20  # numbers processed at once
DRAWN = 2**16  # random numbers processed at once
BLOCK = 1024  # every BLOCK-th document's token offset in an order is stored


class Packing(Protocol):
    """Documents in sequences.

    Attributes:
        documents: the documents to pack.
        seq_len: tokens of a sequence.
        sequences: number of sequences in an epoch.
        tokens: number of document tokens in an epoch's sequences; the rest is padding.
    """

    documents: Documents
    seq_len: int
    sequences: int
    tokens: int

    def epoch(self, key: Key | None) -> Epoch:
        """The sequences of an epoch, with the order of documents fixed by `key`; None for their given order."""
        ...

    def cut(self) -> int:
        """Number of documents not in one piece (in the first epoch of seed 0, if epochs differ)."""
        ...


def describe(packing: Packing) -> str:
    """A readable summary of a packing."""
    padding = 1 - packing.tokens / max(1, packing.sequences * packing.seq_len)
    cut = packing.cut() / len(packing.documents.lengths)
    return f"{packing.sequences:,} sequences of {packing.seq_len:,}: {padding:.2%} padding, {cut:.2%} of documents cut"


class Concat:
    """Documents joined, and the whole cut into sequences.

    Args:
        documents: at least one.
        seq_len: tokens of a sequence.
        last: whether to keep the last sequence if it is not full.
    """

    def __init__(self, documents: Documents, seq_len: int, last: bool) -> None:
        self.documents, self.seq_len = documents, seq_len
        total = int(documents.lengths.sum(dtype=np.int64))
        self.sequences = -(-total // seq_len) if last else total // seq_len
        self.tokens = min(total, self.sequences * seq_len)

    def epoch(self, key: Key | None) -> Epoch:
        """See `Packing`."""
        order = self._order(key)
        sums = [np.add.reduceat(lengths, np.arange(0, len(lengths), BLOCK)) for lengths in self._lengths(order)]
        ends = np.cumsum(np.concatenate(sums))  # of the blocks

        def pieces(number: int) -> list[Piece]:
            begin, found, wanted = number * self.seq_len, [], self.seq_len
            block = int(np.searchsorted(ends, begin, side="right"))
            if block < len(ends):
                inside = self.documents.lengths[order[block * BLOCK : (block + 1) * BLOCK]].astype(np.int64)
                within = np.cumsum(inside) + (int(ends[block]) - int(inside.sum()))
                place = int(np.searchsorted(within, begin, side="right"))
                start = begin - int(within[place] - inside[place])
                place += block * BLOCK
                while wanted and place < len(order):
                    document = int(order[place])
                    stop = min(int(self.documents.lengths[document]), start + wanted)
                    found.append((document, start, stop))
                    wanted, start, place = wanted - (stop - start), 0, place + 1
            return found

        return pieces

    def cut(self) -> int:
        """See `Packing`; a document cut by the end of an epoch counts as well."""
        count = before = 0
        for lengths in self._lengths(self._order((0, 0, 0))):
            ends = before + np.cumsum(lengths)
            first, last = (ends - lengths) // self.seq_len, (ends - 1) // self.seq_len
            count += int(((first != last) & (ends - lengths < self.tokens)).sum())
            before = int(ends[-1])
        return count

    def _order(self, key: Key | None) -> np.ndarray:
        count = len(self.documents.lengths)
        return np.arange(count, dtype=np.min_scalar_type(count)) if key is None else shuffled(count, *key, 0)

    def _lengths(self, order: np.ndarray) -> Iterator[np.ndarray]:
        """The documents' lengths in this order, int64, several whole blocks at a time."""
        for start in range(0, len(order), PART):
            yield self.documents.lengths[order[start : start + PART]].astype(np.int64)


class BestFit:
    """Best fit decreasing: whole documents, longest first, each where it leaves the least room; longer ones fill sequences alone.

    The remainder of a document longer than a sequence is packed like a short one. Lengths alone decide which lengths share a
    sequence ("Fewer Truncations Improve Language Modeling", arXiv 2404.10830), so that all epochs have the same number of
    sequences; which documents of a length these are, and in which order, depends on the epoch.

    Args:
        documents: at least one.
        seq_len: tokens of a sequence.
    """

    def __init__(self, documents: Documents, seq_len: int) -> None:
        self.documents, self.seq_len = documents, seq_len
        self._counts = np.zeros(seq_len, dtype=np.int64)  # number of documents by remaining length
        full = []  # documents that fill whole sequences, and how many
        for start, lengths in self._chunks():
            self._counts += np.bincount(lengths % seq_len, minlength=seq_len)
            long = np.flatnonzero(lengths >= seq_len)
            full.append((start + long, lengths[long] // seq_len))
        self._counts[0] = 0  # no remainder, nothing to pack
        self._long = np.concatenate([long for long, _ in full])
        self._ends = np.cumsum(np.concatenate([times for _, times in full]))
        self._full = int(self._ends[-1]) if len(self._ends) else 0
        self._first, self._fills, bins = best_fit(self._counts, seq_len)
        self.sequences = self._full + bins
        self.tokens = int(documents.lengths.sum(dtype=np.int64))

    def epoch(self, key: Key | None) -> Epoch:
        """See `Packing`."""
        order = self._by_length(key)

        def pieces(number: int) -> list[Piece]:
            if number < self._full:
                long = int(np.searchsorted(self._ends, number, side="right"))
                document = int(self._long[long])
                times = int(self.documents.lengths[document]) // self.seq_len
                start = (number - int(self._ends[long]) + times) * self.seq_len
                return [(document, start, start + self.seq_len)]
            number -= self._full
            inside = np.sort(order[self._places(number)])
            if key is not None:
                inside = inside[shuffled(len(inside), *key, 2, number)]
            lengths = self.documents.lengths[inside].astype(np.int64)
            return [
                (document, length - length % self.seq_len, length)
                for document, length in zip(inside.tolist(), lengths.tolist(), strict=True)
            ]

        return pieces

    def cut(self) -> int:
        """See `Packing`."""
        return sum(int((lengths > self.seq_len).sum()) for _, lengths in self._chunks())

    def _places(self, bin_: int) -> list[int]:
        """The documents of a sequence, numbered from the longest remainder on."""
        fill = self._fills[int(np.searchsorted(self._first, bin_, side="right")) - 1]
        places: list[int] = []
        while fill is not None:
            place, times, first, fill = fill
            start = place + (bin_ - first) * times
            places += range(start, start + times)
        return places

    def _by_length(self, key: Key | None) -> np.ndarray:
        """The documents by remaining length, longest first; ties in an order fixed by `key`."""
        order = np.empty(int(self._counts.sum()), dtype=np.min_scalar_type(len(self.documents.lengths)))
        generator = None if key is None else np.random.PCG64(np.random.SeedSequence((*key, 0)))
        ranks = np.cumsum(self._counts[::-1])
        parts = _parts(len(order))
        limits = np.searchsorted(ranks, [len(order) * (part + 1) // parts for part in range(parts)])
        filled, high = 0, self.seq_len
        for low in np.unique(self.seq_len - 1 - limits)[::-1].tolist():
            found = []
            for start in range(0, len(self.documents.lengths), PART):
                left = self.documents.lengths[start : start + PART] % self.seq_len
                found.append(start + np.flatnonzero((left >= max(1, low)) & (left < high)))
            some = np.concatenate(found)
            if generator is not None:
                some = some[_stable_order(generator.random_raw(len(some)))]
            room = self.seq_len - 1 - self.documents.lengths[some].astype(np.int64) % self.seq_len
            room = room.astype(np.min_scalar_type(self.seq_len))  # 16 bits, where they do, are sorted in no time
            order[filled : filled + len(some)] = some[np.argsort(room, kind="stable")]
            filled, high = filled + len(some), low
        assert filled == len(order)
        return order

    def _chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        """The lengths, int64, a chunk at a time, each with the number of its first document."""
        for start in range(0, len(self.documents.lengths), PART):
            yield start, self.documents.lengths[start : start + PART].astype(np.int64)


def best_fit(counts: np.ndarray, room: int) -> tuple[np.ndarray, list[Any], int]:
    """Best fit decreasing, all items of a length at a time.

    Args:
        counts: int64, `counts[n]` items have length `n`, which is below `room`.
        room: size of a bin.

    Returns:
        first: bins `first[n] .. first[n + 1] - 1` are filled in the same way, int64.
        fills: for each `n` how: (place, times, bin, fill) says that bin `bin + i` holds the `times` items from `place + i * times`
            on, numbered from the longest, and what the linked `fill` says; None ends it.
        bins: number of bins.
    """
    spaces: dict[int, list[tuple[int, int, Any]]] = {}  # by remaining room: first bin, bins, fill
    rooms: list[int] = []  # remaining in some bin, ascending
    closed: list[tuple[int, int, Any]] = []
    place = bins = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            least = bisect_left(rooms, length)
            space = rooms[least] if least < len(rooms) else room
            first, alike, fill = spaces[space].pop() if least < len(rooms) else (bins, left, None)
            times = min(space // length, left)
            taken = min(alike, left // times)
            if fill is None:
                bins += taken
            elif taken < alike:
                spaces[space].append((first + taken, alike - taken, fill))
            elif not spaces[space]:
                del spaces[space], rooms[least]
            now = space - times * length
            filled = first, taken, (place, times, first, fill)
            if not now:
                closed.append(filled)
            else:
                if now not in spaces:
                    spaces[now] = []
                    insort(rooms, now)
                spaces[now].append(filled)
            place, left = place + taken * times, left - taken * times
    ranges = sorted([*closed, *(alike for found in spaces.values() for alike in found)], key=lambda found: found[0])
    return np.array([first for first, _, _ in ranges], dtype=np.int64), [fill for _, _, fill in ranges], bins


def shuffled(count: int, *key: int) -> np.ndarray:
    """A permutation of `count`, in the smallest dtype, fixed by `key` in every version of NumPy (its bit streams do not change).

    Sorts random numbers one range at a time, so that it needs little more memory than its result.
    """
    order = np.empty(count, dtype=np.min_scalar_type(count))
    parts, filled = _parts(count), 0
    for part in range(parts):
        low, high = (2**64 * edge // parts for edge in (part, part + 1))
        generator = np.random.PCG64(np.random.SeedSequence(key))
        places, numbers = [], []
        for start in range(0, count, DRAWN):
            drawn = generator.random_raw(min(DRAWN, count - start))
            inside = np.flatnonzero(drawn - np.uint64(low) <= np.uint64(high - low - 1))  # below `low` it wraps around
            places.append((start + inside).astype(order.dtype))
            numbers.append(drawn[inside])
        if places:
            some = np.concatenate(places)[_stable_order(np.concatenate(numbers))]
            order[filled : filled + len(some)] = some
            filled += len(some)
    return order


def _stable_order(numbers: np.ndarray) -> np.ndarray:
    """The stable order of random numbers: that of a sort which takes a fifth of the time, unless two are equal."""
    order = np.argsort(numbers)
    ascending = numbers[order]
    return np.argsort(numbers, kind="stable") if (ascending[1:] == ascending[:-1]).any() else order


def _parts(count: int) -> int:
    """The number of parts in which `count` numbers are sorted: each is another pass over all."""
    return max(1, min(16, -(-count // PART)))
