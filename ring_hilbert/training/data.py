# SPDX-License-Identifier: Apache-2.0
"""Packed sequences of documents, by number: `dataset[i]` is the same at all times, on every rank, in every process.

The data cursor of a run is the integer `i`. Within an epoch the documents of a source are shuffled, concatenated and
cut into sequences, and these are shuffled again, so that a long document does not fill consecutive batches. What is
left over at an epoch's end is dropped, something else in every epoch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from ring_hilbert.training.config import DataConfig, EvalConfig, SourceConfig
from ring_hilbert.training.documents import Documents, open_documents
from ring_hilbert.training.files import find_files
from ring_hilbert.training.tokens import load_tokenizer

Sequence = dict[str, np.ndarray]


class PackedDataset(Protocol):
    """What a run trains or evaluates on.

    `dataset[i]` has `input_ids`, int64 [seq_len], and `document_ids`, int64 [seq_len]: 0, 1, 2, ... for the runs of
    documents in this sequence (an eos belongs to the document that it ends), -1 for padding. `len(dataset)` is the
    number of sequences in an epoch; `i` goes on past it in training, and ends there in evaluation (IndexError).
    `documents`: what the sequences are made of, by the name of the source in the configuration.
    """

    documents: dict[str, Documents]

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Sequence: ...


def open_dataset(config: DataConfig, split: Literal["train", "eval"], vocab_size: int, seed: int = 0) -> PackedDataset:
    """Open the documents of a split, tokenising what is not yet in the cache of `datasets`.

    Safe to call on several ranks at once; quicker if one rank calls it before the others. Files that `data.eval.path`
    matches are left out of training.

    Args:
        config: the data section.
        split: "train" or "eval".
        vocab_size: of the model; every token id must be below it.
        seed: fixes the order of training sequences.

    Raises:
        ValueError: data are missing, unreadable, empty or shorter than one training sequence, or a token id is beyond
            the vocabulary; the message names the path.
    """
    tokenizer = load_tokenizer(config.tokenizer)

    def tokenised(source: SourceConfig | EvalConfig, held_out: set[Path]) -> Documents:
        paths = source.path
        files = [file for file in find_files(paths, source.exclude) if file.resolve() not in held_out]
        documents = open_documents(
            files, source.field, tokenizer, config.encoding_errors, chosen=source.format, bos=config.bos
        )
        if not len(documents.lengths):
            cause = "its files hold no text" if files else "all its files are held out by data.eval.path"
            raise ValueError(f"data path {paths} is empty: {cause}")
        if documents.largest_id >= vocab_size:
            raise ValueError(
                f"data path {paths} has the token id {documents.largest_id} with tokenizer {config.tokenizer!r}, "
                f"beyond the model's vocabulary of {vocab_size}; it needs vocab_size >= {documents.largest_id + 1}"
            )
        return documents

    if split == "eval":
        if config.eval is None:
            raise ValueError("data.eval is not set; give it a path")
        documents = tokenised(config.eval, set())
        return EvaluationSequences(documents, config.seq_len, config.eval.sequences)
    held_out = {file.resolve() for file in find_files(config.eval.path, config.eval.exclude)} if config.eval else set()
    sources = []
    for number, source in enumerate(config.sources):
        documents = tokenised(source, held_out)
        tokens = int(documents.lengths.sum())
        if tokens < config.seq_len:
            raise ValueError(
                f"data.sources.{number} ({source.path}) has {tokens} tokens, fewer than one sequence of data.seq_len "
                f"{config.seq_len}; give it more documents or lower data.seq_len to {tokens} or less"
            )
        sources.append(EndlessSource(documents, config.seq_len, (seed, number)))
    return TrainingSequences(sources, [source.weight for source in config.sources])


class PackedEpoch:
    """Documents concatenated in `order` (int64 [documents]) and cut into sequences; past the end, padding with id 0."""

    def __init__(self, documents: Documents, order: np.ndarray, seq_len: int) -> None:
        self._documents, self._order, self._seq_len = documents, order, seq_len
        self._ends = np.cumsum(documents.lengths[order])

    def __getitem__(self, number: int) -> Sequence:
        """Tokens `[number * seq_len, (number + 1) * seq_len)` of the concatenation."""
        ids = np.zeros(self._seq_len, dtype=np.int64)
        runs = np.full(self._seq_len, -1, dtype=np.int64)
        begin = number * self._seq_len
        place = int(np.searchsorted(self._ends, begin, side="right"))
        filled = run = 0
        while filled < self._seq_len and place < len(self._order):
            document = self._order[place]
            length = int(self._documents.lengths[document])
            start = begin + filled - int(self._ends[place]) + length
            piece = self._documents.tokens(document, start, min(length, start + self._seq_len - filled))
            ids[filled : filled + len(piece)] = piece
            runs[filled : filled + len(piece)] = run
            filled, place, run = filled + len(piece), place + 1, run + 1
        return {"input_ids": ids, "document_ids": runs}


class EvaluationSequences:
    """Documents in their given order, the last sequence padded; at most `limit` sequences, evenly spaced."""

    def __init__(self, documents: Documents, seq_len: int, limit: int | None) -> None:
        self.documents = {"data.eval": documents}
        self._packed = PackedEpoch(documents, np.arange(len(documents.lengths)), seq_len)
        self._whole = -(-int(documents.lengths.sum()) // seq_len)
        self._taken = self._whole if limit is None else min(limit, self._whole)

    def __len__(self) -> int:
        return self._taken

    def __getitem__(self, number: int) -> Sequence:
        if not 0 <= number < self._taken:
            raise IndexError(f"sequence {number} of an evaluation set of {self._taken}")
        return self._packed[number * self._whole // self._taken]


class EndlessSource:
    """One training source: epoch after epoch, each in an order of its own that `key` (seed, number of source) fixes."""

    def __init__(self, documents: Documents, seq_len: int, key: tuple[int, ...]) -> None:
        self.documents, self._seq_len, self._key = documents, seq_len, key
        self._per_epoch = int(documents.lengths.sum()) // seq_len
        self._open_epoch(0)

    def __len__(self) -> int:
        return self._per_epoch

    def __getitem__(self, number: int) -> Sequence:
        epoch, place = divmod(number, self._per_epoch)
        if epoch != self._epoch:
            self._open_epoch(epoch)
        return self._packed[int(self._places[place])]

    def _open_epoch(self, epoch: int) -> None:
        order = _shuffled(len(self.documents.lengths), *self._key, epoch, 0)
        self._packed = PackedEpoch(self.documents, order, self._seq_len)
        self._places = _shuffled(self._per_epoch, *self._key, epoch, 1)
        self._epoch = epoch


def _shuffled(count: int, *key: int) -> np.ndarray:
    """A permutation of `count`, int64, fixed by `key` in every version of NumPy (its bit streams do not change)."""
    return np.argsort(np.random.PCG64(np.random.SeedSequence(key)).random_raw(count), kind="stable")


class TrainingSequences:
    """Sources taking turns, spread evenly.

    An epoch is as long as all sources together; each source has the share of it that its weight gives, to the nearest
    sequence and at least one, so that a source may be repeated or left unfinished within an epoch.
    """

    def __init__(self, sources: list[EndlessSource], weights: list[float]) -> None:
        self.documents = {f"data.sources.{number}": source.documents for number, source in enumerate(sources)}
        shares = np.array(weights) / sum(weights)
        self._sources = sources
        self._counts = np.maximum(1, np.rint(shares * sum(map(len, sources)))).astype(np.int64)
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
