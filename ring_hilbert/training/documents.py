# SPDX-License-Identifier: Apache-2.0
"""Tokenised documents: files are read and tokenised once through `datasets`, then memory-mapped.

Texts and tokens go through the cache of `datasets` (HF_HOME says where): file-locked, written under another name and moved, keyed
by the files' paths, sizes and times and by the tokenizer. Any number of processes may do it at the same time.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase

from ring_hilbert.training.texts import Errors, Format, file_format, read_texts
from ring_hilbert.training.tokens import Encoder, document_encoder, document_prefix, tokenizer_digest

VERSION = 2  # of what is read and how it is tokenised: another one finds nothing in the cache
BATCH = 128  # documents tokenised together, and rows of one Arrow batch
TEXTS = datasets.Features({"text": datasets.Value("large_string"), "file": datasets.Value("int32")})
TOKENS = datasets.Features(
    {
        "input_ids": datasets.LargeList(datasets.Value("int32")),
        "largest_id": datasets.Value("int32"),
        "hash": datasets.Value("uint64"),
        "file": datasets.Value("int32"),
    }
)


class Documents:
    """Random access to tokenised documents.

    Args:
        tables: of the features `TOKENS`.
        files: for every table what its `file` numbers.
        kinds: what they are, for `summary`.

    Attributes:
        lengths: int64 [number of documents], tokens of each, prefix and eos included. Never 0.
        largest_id: the largest token id.
        summary: what there is, for the log.
    """

    def __init__(self, tables: list[datasets.Dataset], files: list[list[Path]], kinds: str) -> None:
        chunks = [chunk for table in tables for chunk in table.data.column("input_ids").chunks if len(chunk)]
        offsets = [chunk.offsets.to_numpy() for chunk in chunks]
        self._values = [chunk.values.to_numpy(zero_copy_only=True) for chunk in chunks]
        self._chunk = np.repeat(np.arange(len(chunks)), [len(chunk) for chunk in chunks])
        self._start = np.concatenate([row[:-1] for row in offsets] or [np.zeros(0, dtype=np.int64)])
        self.lengths = np.concatenate([np.diff(row) for row in offsets] or [np.zeros(0, dtype=np.int64)])
        self._tables, self._files = tables, files
        self._ends = np.cumsum([len(table) for table in tables])
        self.largest_id = int(self._column("largest_id").max(initial=-1))
        self.summary = f"{len(self.lengths):,} documents, {self.lengths.sum():,} tokens; {kinds}"

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens `[start, stop)` of a document: int32 view of the memory map."""
        first = self._start[document]
        return self._values[self._chunk[document]][first + start : first + stop]

    @property
    def hashes(self) -> np.ndarray:
        """uint64 [number of documents], of the tokens of each; read anew from the cache, as they are needed once."""
        return self._column("hash")

    def file(self, document: int) -> Path:
        """The file that a document was read from."""
        table = int(np.searchsorted(self._ends, document, side="right"))
        place = document - int(self._ends[table])  # from the table's end, negative
        return self._files[table][self._tables[table].data.column("file")[place].as_py()]

    def _column(self, name: str) -> np.ndarray:
        columns = [table.data.column(name).to_numpy() for table in self._tables]
        return np.concatenate([np.zeros(0, dtype=TOKENS[name].dtype), *columns])


def open_documents(
    files: list[Path],
    field: str,
    tokenizer: PreTrainedTokenizerBase,
    encoding_errors: Errors = "strict",
    *,
    chosen: Literal["auto"] | Format = "auto",
    bos: bool | None = None,
) -> Documents:
    """Read and tokenise `files`, or find it done in the cache. Documents without text are left out.

    Files that are one document each come first, then those with rows.

    Args:
        files: as `read_texts` reads them.
        field: where JSON values and Parquet rows have their text; "meta.text" for a nested one.
        tokenizer: from `load_tokenizer`.
        encoding_errors: "strict" or "replace", for bytes that are not UTF-8 and for lone surrogates.
        chosen: what all the files hold; "auto" goes by their names.
        bos: see `document_prefix`.

    Raises:
        ValueError: a file cannot be read or decoded, or a row has no text in `field`; the message names file and line.
    """
    texts = [file for file in files if file_format(file, chosen)[0] == "text"]
    rows = [file for file in files if file_format(file, chosen)[0] != "text"]
    groups = ([texts] if texts else []) + [[file] for file in rows]
    encode, digest = document_encoder(tokenizer, bos), tokenizer_digest(tokenizer)
    tables = []
    for group in groups:
        source = _digest(field, chosen, encoding_errors, *map(_state, group))
        table = _read(partial(_rows, group, field, chosen, encoding_errors), source)
        tables.append(
            table.map(
                partial(_tokenise, encode=encode),
                batched=True,
                batch_size=BATCH,
                remove_columns=table.column_names,
                features=TOKENS,
                new_fingerprint=_digest(source, digest, document_prefix(tokenizer, bos)),
                desc="Tokenising",
            )
        )
    kinds = (f"a document per {unit}: {_names(some)}" for unit, some in (("file", texts), ("row", rows)) if some)
    return Documents(tables, groups, "; ".join(kinds))


def _names(files: list[Path]) -> str:
    """How many files have which suffix, the most frequent ones."""
    packed = (file_format(file, "text")[1] for file in files)
    names = ("".join(file.suffixes[-2 if some else -1 :]) for file, some in zip(files, packed, strict=True))
    counts = Counter(name.lower() or "without suffix" for name in names)
    rest = len(counts) - 8
    return ", ".join(f"{count:,} {name}" for name, count in counts.most_common(8)) + (
        f" and {rest} more" if rest > 0 else ""
    )


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr((VERSION, parts)).encode()).hexdigest()[:32]


def _state(file: Path) -> tuple[bytes, int, int, int]:
    """What changes when the file's content does."""
    found = file.stat()
    return os.fsencode(file), found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _read(rows: Callable[[], Iterator[dict[str, Any]]], key: str) -> datasets.Dataset:
    try:
        table = datasets.Dataset.from_generator(rows, TEXTS, fingerprint=key, writer_batch_size=BATCH)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):  # of `read_texts`
            raise error.__cause__ from None
        raise
    assert isinstance(table, datasets.Dataset)
    return table


def _rows(
    files: list[Path], field: str, chosen: Literal["auto"] | Format, encoding_errors: Errors
) -> Iterator[dict[str, Any]]:
    for number, file in enumerate(files):
        yield from ({"text": text, "file": number} for text in read_texts(file, field, chosen, encoding_errors))
    yield {"text": "", "file": 0}  # `datasets` makes no table of nothing


def _tokenise(batch: dict[str, list[Any]], encode: Encoder) -> dict[str, list[Any]]:
    filled = [number for number, text in enumerate(batch["text"]) if text]
    ids = encode([batch["text"][number] for number in filled])
    hashes = b"".join(hashlib.blake2b(row, digest_size=8).digest() for row in ids)
    return {
        "input_ids": ids,
        "largest_id": [int(row.max()) for row in ids],
        "hash": np.frombuffer(hashes, dtype="<u8"),
        "file": [batch["file"][number] for number in filled],
    }
