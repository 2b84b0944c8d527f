# SPDX-License-Identifier: Apache-2.0
"""Tokenised documents: files are found, read and tokenised once through `datasets`, then memory-mapped.

Reading and tokenising go through the cache of `datasets` (HF_HOME says where): file-locked, written under another name
and moved, keyed by the files' paths and times and by the tokenizer. Any number of processes may do it at the same time.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase

from ring_hilbert.training.tokens import Encoder, document_encoder, tokenizer_digest

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}  # any other suffix: text, a document per file
BATCH = 128  # documents tokenised together, and rows of one Arrow batch
TOKENS = datasets.Features(
    {"input_ids": datasets.LargeList(datasets.Value("int32")), "largest_id": datasets.Value("int32")}
)


class Documents:
    """Random access to tokenised documents.

    Attributes:
        lengths: int64 [number of documents], tokens of each, the eos at its end included. Never 0.
        largest_id: the largest token id.
    """

    def __init__(self, tables: list[datasets.Dataset]) -> None:
        chunks = [chunk for table in tables for chunk in table.data.column("input_ids").chunks if len(chunk)]
        offsets = [chunk.offsets.to_numpy() for chunk in chunks]
        self._values = [chunk.values.to_numpy(zero_copy_only=True) for chunk in chunks]
        self._chunk = np.repeat(np.arange(len(chunks)), [len(chunk) for chunk in chunks])
        self._start = np.concatenate([row[:-1] for row in offsets] or [np.zeros(0, dtype=np.int64)])
        self.lengths = np.concatenate([np.diff(row) for row in offsets] or [np.zeros(0, dtype=np.int64)])
        self.largest_id = max((int(table.data.column("largest_id").to_numpy().max()) for table in tables), default=-1)

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens `[start, stop)` of a document: int32 view of the memory map."""
        first = self._start[document]
        return self._values[self._chunk[document]][first + start : first + stop]


def find_files(patterns: list[str], exclude: list[str]) -> list[Path]:
    """The files, folders and globs of `patterns` as resolved paths of non-empty files, without repetition.

    Sorted within each pattern, so that every machine sees one order. Hidden files are found only by their own name.
    `exclude`: see `SourceConfig`.

    Raises:
        ValueError: a pattern matches no file, or nothing but empty or excluded ones.
    """
    files: dict[Path, None] = {}
    for pattern in patterns:
        base, names = _expand(pattern)
        matched = [base / name for name in sorted(names) if (base / name).is_file()]
        dropped = {base / name for rule in exclude for name in _below(base, rule)}
        kept = [file for file in matched if file not in dropped and dropped.isdisjoint(file.parents)]
        filled = [file.resolve() for file in kept if file.stat().st_size]
        if not filled:
            counts = f"{len(matched)} files, {len(matched) - len(kept)} of them excluded, {len(kept)} empty"
            raise ValueError(f"data path {pattern!r} matches {counts if matched else 'no file'}")
        files |= dict.fromkeys(filled)
    return list(files)


def _expand(pattern: str) -> tuple[Path, list[str]]:
    """The folder that a pattern starts from, and what it matches below that."""
    path = Path(pattern).expanduser()
    if path.is_file():
        return path.parent, [path.name]
    if path.is_dir():
        return path, _below(path, "**")
    fixed = next((n for n, part in enumerate(path.parts) if glob.has_magic(part)), len(path.parts))
    base = Path(*path.parts[:fixed])
    return base, _below(base, "/".join(path.parts[fixed:]))


def _below(base: Path, pattern: str) -> list[str]:
    # Path.glob takes hidden files too, and its ** means something else in each version of Python
    return glob.glob(pattern, root_dir=base, recursive=True)  # noqa: PTH207


def open_documents(
    files: list[Path], field: str, tokenizer: PreTrainedTokenizerBase, encoding_errors: str = "strict"
) -> Documents:
    """Read and tokenise `files`, or find it done in the cache. Documents without text are left out.

    Args:
        files: text (a document each), .jsonl / .json and .parquet files (a document per row).
        field: the column that holds the text, in JSON and Parquet.
        tokenizer: from `load_tokenizer`.
        encoding_errors: "strict" or "replace", for bytes that are not UTF-8.

    Raises:
        ValueError: a file cannot be read or decoded, lacks `field`, or has something else than text there; the message
            names the file.
    """
    rows = partial(_tokenise, encode=document_encoder(tokenizer), field=field)
    digest = tokenizer_digest(tokenizer)
    tables = []
    for table in _read(files, field, encoding_errors):
        key = hashlib.sha256(f"{table._fingerprint} {digest} {field}".encode()).hexdigest()[:32]
        tables.append(
            table.map(
                rows,
                batched=True,
                batch_size=BATCH,
                remove_columns=table.column_names,
                features=TOKENS,
                new_fingerprint=key,
                desc="Tokenising",
            )
        )
    return Documents([table for table in tables if len(table)])


def _tokenise(batch: dict[str, list[str | None]], encode: Encoder, field: str) -> dict[str, list]:
    ids = encode([text for text in batch[field] if text])
    return {"input_ids": ids, "largest_id": [int(row.max()) for row in ids]}


def _read(files: list[Path], field: str, encoding_errors: str) -> Iterator[datasets.Dataset]:
    """Tables with one string column `field`: one for all text files, one for every other file."""
    texts = [file for file in files if file.suffix not in FORMATS]
    if texts:
        features = datasets.Features({field: datasets.Value("string")})
        try:
            yield _load("text", texts, sample_by="document", features=features, encoding_errors=encoding_errors)
        except DatasetGenerationError as error:
            raise ValueError(_unreadable(texts, encoding_errors) or f"text files cannot be read: {error}") from error
    for file in files:
        if file.suffix in FORMATS:
            yield _column(file, field, encoding_errors)


def _load(kind: str, files: list[Path], **options: Any) -> datasets.Dataset:
    names = [glob.escape(os.fspath(file)) for file in files]
    table = datasets.load_dataset(kind, data_files=names, split="train", **options)
    assert isinstance(table, datasets.Dataset)
    return table


def _column(file: Path, field: str, encoding_errors: str) -> datasets.Dataset:
    kind = FORMATS[file.suffix]
    try:
        table = _load(kind, [file], **({"encoding_errors": encoding_errors} if kind == "json" else {}))
    except Exception as error:  # readers of broken files raise all sorts of exceptions
        raise ValueError(f"data file {file} cannot be read as {kind}: {error.__cause__ or error}") from error
    if field not in table.column_names:
        raise ValueError(
            f"data file {file} has no field {field!r}; it has {table.column_names}: set `field` to one of them"
        )
    if table.features[field] not in (datasets.Value("string"), datasets.Value("large_string")):
        raise ValueError(f"data file {file}: field {field!r} holds {table.features[field]}, text is needed")
    table = table.select_columns([field])
    missing = table.data.column(field).null_count
    if missing:
        raise ValueError(f"data file {file}: {missing} of its {len(table)} rows have no {field!r}")
    return table


def _unreadable(files: list[Path], encoding_errors: str) -> str | None:
    """The first file that cannot be read as UTF-8 text, and why."""
    for file in files:
        try:
            file.read_text(encoding="utf-8", errors=encoding_errors)
        except UnicodeDecodeError as error:
            return f"data file {file} is not UTF-8 text ({error}); exclude it or set data.encoding_errors: replace"
        except OSError as error:
            return f"data file {file} cannot be read: {error}"
    return None
