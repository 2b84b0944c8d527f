# SPDX-License-Identifier: Apache-2.0
"""The texts of many files, in batches to tokenise, resumable from any place."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from ring_hilbert.training.texts import Errors, Format, file_format, read_texts

CHARACTERS, DOCUMENTS = 2**18, 1024  # approximate size of a batch


class Batch(NamedTuple):
    """Texts to tokenise, the number of each one's file, and where reading resumes after them: file, values read of it, bytes."""

    texts: list[str]
    files: list[int]
    file: int
    within: int
    position: int


@dataclass(frozen=True)
class Reading:
    """Which files are read, and how: see `read_texts` and `document_prefix`. Files of one document each precede files of rows."""

    files: list[Path]
    field: str
    format: Literal["auto"] | Format
    encoding_errors: Errors
    bos: bool | None

    def states(self) -> list[tuple[bytes, int, int, int]]:
        """For each file, values that change with its content."""
        found = ((file, file.stat()) for file in self.in_order)
        return [(os.fsencode(file), its.st_size, its.st_mtime_ns, its.st_ctime_ns) for file, its in found]

    @cached_property
    def in_order(self) -> list[Path]:
        """The files in reading order."""
        return sorted(self.files, key=self._has_rows)

    def kinds(self) -> str:
        """A readable description of the documents."""
        found = (
            ("file", [f for f in self.files if not self._has_rows(f)]),
            ("row", [f for f in self.files if self._has_rows(f)]),
        )
        return "; ".join(f"a document per {unit}: {_names(some)}" for unit, some in found if some)

    def batches(self, file: int = 0, within: int = 0) -> Iterator[Batch]:
        """All texts from value `within` of a file on, by the number of the file; at least one batch, which may be empty."""
        texts: list[str] = []
        owners: list[int] = []
        files = self.in_order
        before, characters = sum(found.stat().st_size for found in files[:file]), 0
        for number in range(file, len(files)):
            raw: list[BinaryIO] = []
            values = read_texts(files[number], self.field, self.format, self.encoding_errors, raw.append)
            for nth, text in enumerate(values):
                if number == file and nth < within:
                    continue
                if text:
                    texts.append(text)
                    owners.append(number)
                    characters += len(text)
                if characters >= CHARACTERS or len(texts) >= DOCUMENTS:
                    yield Batch(texts, owners, number, nth + 1, before + raw[0].tell())
                    texts, owners, characters = [], [], 0
            before += files[number].stat().st_size
        yield Batch(texts, owners, len(files), 0, before)

    def _has_rows(self, file: Path) -> bool:
        return file_format(file, self.format)[0] != "text"


def _names(files: Iterable[Path]) -> str:
    """The number of files per suffix, for the most frequent ones."""
    packed = ((file, file_format(file, "text")[1]) for file in files)
    counts = Counter("".join(file.suffixes[-2 if some else -1 :]).lower() or "without suffix" for file, some in packed)
    rest = len(counts) - 8
    return ", ".join(f"{count:,} {name}" for name, count in counts.most_common(8)) + (
        f" and {rest} more" if rest > 0 else ""
    )
