# SPDX-License-Identifier: Apache-2.0
"""Packed sequences of documents, by number: `dataset[i]` is always the same, on every rank and in every process.

The data cursor of a run is the integer `i`. Within an epoch the documents of a source are shuffled and packed into sequences, and
these are shuffled again, so that a long document does not fill consecutive batches. The remainder of `concat` at an epoch's end
is dropped, a different one in every epoch.
"""

from __future__ import annotations

import math
from typing import Literal, Protocol

import numpy as np

from ring_hilbert.training.config import DataConfig
from ring_hilbert.training.documents import Documents, Part
from ring_hilbert.training.packing import PART, BestFit, Concat, Packing, Piece, shuffled
from ring_hilbert.training.prepared import HELD_OUT, open_part, with_prepared

Sequence = dict[str, np.ndarray]
Packed = Literal["concat", "best_fit"]
MIXTURE = 2000  # sequences over which several sources are mixed, at least: a share that is one off is right to 0.05 %
MOST_MIXED = 2**20  # and at most, where a source has so small a share that it would be none of them


class Sequences(Protocol):
    """Numbered sequences, all of one length.

    `dataset[i]` has `input_ids`, int64 [seq_len], and `document_ids`, int64 [seq_len]: 0, 1, 2, ... for the runs of
    documents in this sequence (an eos belongs to the document that it ends), -1 for padding. `len(dataset)` is the
    number of sequences in an epoch; `i` may exceed it in training, but not in evaluation (IndexError).
    """

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Sequence: ...


class PackedDataset(Sequences, Protocol):
    """The data on which a run trains or evaluates.

    `documents`: the contents of the sequences, by the name of the source in the configuration; `packings`: likewise how packed.
    """

    documents: dict[str, Documents]
    packings: dict[str, Packing]


def open_dataset(config: DataConfig, split: Literal["train", "eval"], vocab_size: int, seed: int = 0) -> PackedDataset:
    """Open the documents of a split: see `open_part`.

    Held-out documents, those in the files of `data.eval.path` and any with the same tokens, or those that `data.eval.share`
    takes, are left out of training.

    Args:
        config: the data section.
        split: "train" or "eval".
        vocab_size: of the model; every token id must be below it.
        seed: fixes the order of training sequences.

    Raises:
        ValueError: if data are missing, unreadable, empty or shorter than one training sequence, or a token id is beyond
            the vocabulary; the message names the path.
    """
    config = with_prepared(config)
    held_out, sources = config.eval, config.sources
    assert sources is not None
    names = [f"data.sources.{number}" for number in range(len(sources))]
    if split == "eval":
        if held_out is None:
            raise ValueError("data.eval is not set; give it a path or a share")
        parts = [open_part(config, name) for name in ([HELD_OUT] if held_out.share is None else names)]
        share = held_out.share
        documents = Documents(parts, [None if share is None else _chosen(part, share, None, True) for part in parts])
        if not len(documents.lengths):
            raise ValueError(f"data.eval.share {held_out.share} takes none of the documents; give a larger share")
        _check_ids(documents, config, str(held_out.path or "of data.eval.share"), vocab_size)
        return EvaluationSequences(documents, config.seq_len, held_out.sequences, config.packing)
    known = None
    if held_out is not None and held_out.share is None:
        known = np.sort(open_part(config, HELD_OUT).hashes())
    found = []
    for number, (name, source) in enumerate(zip(names, sources, strict=True)):
        part = open_part(config, name)
        share = None if held_out is None else held_out.share
        documents = Documents([part], [None if held_out is None else _chosen(part, share, known, False)])
        tokens = int(documents.lengths.sum(dtype=np.int64))
        if not tokens:
            raise ValueError(f"data path {source.path} is empty: all its documents are held out by data.eval")
        _check_ids(documents, config, str(source.path), vocab_size)
        if tokens < config.seq_len and config.packing == "concat":
            raise ValueError(
                f"data.sources.{number} ({source.path}) has {tokens} tokens, fewer than one sequence of data.seq_len "
                f"{config.seq_len}; give it more documents or lower data.seq_len to {tokens} or less"
            )
        found.append(EndlessSource(documents, config.seq_len, (seed, number), config.packing))
    return TrainingSequences(found, [source.weight for source in sources])


def _check_ids(documents: Documents, config: DataConfig, path: str, vocab_size: int) -> None:
    if documents.largest_id >= vocab_size:
        raise ValueError(
            f"data path {path} has the token id {documents.largest_id} with tokenizer {config.tokenizer!r}, "
            f"beyond the model's vocabulary of {vocab_size}; it needs vocab_size >= {documents.largest_id + 1}"
        )


def _chosen(part: Part, share: float | None, known: np.ndarray | None, held_out: bool) -> np.ndarray | None:
    """The numbers of the held-out documents, or of the others; None for all.

    Args:
        part: the documents.
        share: held-out share of the documents, chosen by their hashes, which are as good as random.
        known: hashes of held-out documents, ascending, at least one.
        held_out: return the held-out ones rather than the others.
    """
    count = len(part.lengths)
    belongs = np.empty(count, dtype=bool)
    for start in range(0, count, PART):
        hashes = part.hashes(slice(start, start + PART))
        out = np.zeros(len(hashes), dtype=bool)
        if share is not None:
            out |= hashes < np.uint64(share * 2**64)
        if known is not None:
            out |= known[np.searchsorted(known, hashes).clip(max=len(known) - 1)] == hashes
        belongs[start : start + PART] = out == held_out
    if belongs.all():
        return None
    numbers, filled = np.empty(np.count_nonzero(belongs), dtype=np.min_scalar_type(count)), 0
    for start in range(0, count, PART):
        found = start + np.flatnonzero(belongs[start : start + PART])
        numbers[filled : filled + len(found)] = found
        filled += len(found)
    return numbers


def _sequence(documents: Documents, pieces: list[Piece], seq_len: int) -> Sequence:
    """The pieces concatenated, followed by padding: id 0, document -1."""
    ids, runs = np.zeros(seq_len, dtype=np.int64), np.full(seq_len, -1, dtype=np.int64)
    filled = 0
    for run, (document, start, stop) in enumerate(pieces):
        after = filled + stop - start
        ids[filled:after] = documents.tokens(document, start, stop)
        runs[filled:after] = run
        filled = after
    return {"input_ids": ids, "document_ids": runs}


class EvaluationSequences:
    """Documents in their given order, the last sequence padded; at most `limit` sequences, evenly spaced."""

    def __init__(self, documents: Documents, seq_len: int, limit: int | None, packing: Packed = "concat") -> None:
        packed = Concat(documents, seq_len, last=True) if packing == "concat" else BestFit(documents, seq_len)
        self.documents = {HELD_OUT: documents}
        self.packings: dict[str, Packing] = {HELD_OUT: packed}
        self._documents, self._seq_len, self._whole = documents, seq_len, packed.sequences
        self._pieces = packed.epoch(None)
        self._taken = self._whole if limit is None else min(limit, self._whole)

    def __len__(self) -> int:
        return self._taken

    def __getitem__(self, number: int) -> Sequence:
        if not 0 <= number < self._taken:
            raise IndexError(f"sequence {number} of an evaluation set of {self._taken}")
        return _sequence(self._documents, self._pieces(number * self._whole // self._taken), self._seq_len)


class EndlessSource:
    """One training source, epoch after epoch, each in its own order fixed by `key` (seed, number of source)."""

    def __init__(self, documents: Documents, seq_len: int, key: tuple[int, ...], packing: Packed = "concat") -> None:
        self.documents, self._seq_len, self._key = documents, seq_len, key
        self.packing: Packing = (
            Concat(documents, seq_len, last=False) if packing == "concat" else BestFit(documents, seq_len)
        )
        self._open_epoch(0)

    def __len__(self) -> int:
        return self.packing.sequences

    def __getitem__(self, number: int) -> Sequence:
        epoch, place = divmod(number, len(self))
        if epoch != self._epoch:
            self._open_epoch(epoch)
        assert self._pieces is not None and self._places is not None
        return _sequence(self.documents, self._pieces(int(self._places[place])), self._seq_len)

    def _open_epoch(self, epoch: int) -> None:
        self._pieces = self._places = None  # free the previous epoch
        self._pieces = self.packing.epoch((*self._key, epoch))
        self._places = shuffled(len(self), *self._key, epoch, 1)
        self._epoch = epoch


def _apportioned(shares: np.ndarray, length: int) -> np.ndarray:
    """How many of `length` sequences each source has, int64: at least one, else its share to within one."""
    exact = shares * length
    counts = np.maximum(1, np.rint(exact)).astype(np.int64)
    for sign in (1, -1):  # those that rounding gave the most give one back, or the others are given one more
        order = np.argsort(sign * (exact - counts), kind="stable")
        order = order[counts[order] > sign]
        counts[order[: max(0, sign * (int(counts.sum()) - length))]] -= sign
    return counts


class TrainingSequences:
    """Sources interleaved evenly.

    An epoch is as long as all sources together, or so often that as several sources need to make `MIXTURE` sequences, more if one
    of them would have none. Each has the share of the tokens that its weight gives, to within a sequence, so that a source may be
    repeated or left unfinished within an epoch.
    """

    def __init__(self, sources: list[EndlessSource], weights: list[float]) -> None:
        names = [f"data.sources.{number}" for number in range(len(sources))]
        self.documents = {name: source.documents for name, source in zip(names, sources, strict=True)}
        self.packings = {name: source.packing for name, source in zip(names, sources, strict=True)}
        held = [source.packing.tokens / len(source) for source in sources]  # padding does not count
        shares = np.array(weights) / held
        shares /= shares.sum()
        self._sources = sources
        total = sum(map(len, sources))
        mixed = max(MIXTURE, min(MOST_MIXED, math.ceil(0.5 / shares.min())))
        self._counts = _apportioned(shares, total if len(sources) == 1 else total * -(-mixed // total))
        turns = np.concatenate([(np.arange(count) + 0.5) / count for count in self._counts])
        by_turn = np.argsort(turns, kind="stable")
        self._source = np.repeat(np.arange(len(sources)), self._counts)[by_turn]
        self._nth = np.concatenate([np.arange(count) for count in self._counts])[by_turn]

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, number: int) -> Sequence:
        if number < 0:
            raise IndexError(f"sequence {number}; sequences are numbered from 0")
        epoch, place = divmod(number, len(self))
        source = self._source[place]
        return self._sources[source][int(epoch * self._counts[source] + self._nth[place])]
