# SPDX-License-Identifier: Apache-2.0
"""Whether the data are still those on which a checkpoint was trained: hashes of their tokens in reading order.

Paths, times, compression and how documents are spread over files do not matter: data may move. Any change of a document does, even
one appended at the end: every epoch is an order of all documents of a source, and one more changes all of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ring_hilbert.training.documents import Documents

MOST_HASHES = 1024  # per source: a checkpoint stays small, and a change is located to within a few documents


@dataclass(frozen=True)
class Content:
    """Documents and tokens of a source, and a hash of every `chunk` documents, hexadecimal."""

    documents: int
    tokens: int
    chunk: int
    hashes: list[str]

    @classmethod
    def of(cls, source: Documents) -> Content:
        """The current content of `source`."""
        count = len(source.lengths)
        chunk = 1 << max(0, -(-count // MOST_HASHES) - 1).bit_length()  # a power of two
        return cls(count, int(source.lengths.sum(dtype=np.int64)), chunk, _hashes(source, count, chunk))

    def difference(self, source: Documents) -> str | None:
        """How `source` differs from this, None if it does not."""
        count = len(source.lengths)
        found = _hashes(source, min(count, self.documents), self.chunk)
        same = next(
            (n for n, pair in enumerate(zip(self.hashes, found, strict=False)) if pair[0] != pair[1]), len(found)
        )
        first, last = same * self.chunk, min((same + 1) * self.chunk, self.documents, count)
        if first < last:
            where = f"document {first}" if last - first == 1 else f"one of the documents {first} to {last - 1}"
            files = list(dict.fromkeys(str(source.file(number)) for number in (first, last - 1)))
            return f"{where} ({' to '.join(files)}) has changed, with {self.documents} documents then and {count} now"
        if count < self.documents:
            return f"of {self.documents} documents, those from {count} on are missing"
        if count > self.documents:
            tokens = int(source.lengths[self.documents :].sum(dtype=np.int64))
            return (
                f"{count - self.documents} documents of {tokens} tokens were appended to the {self.documents} known ones, from "
                f"{source.file(self.documents)} on"
            )
        return None


def contents(sources: Mapping[str, Documents]) -> dict[str, Any]:
    """The `Content` of every source by name, as JSON values."""
    return {name: asdict(Content.of(source)) for name, source in sources.items()}


def differences(known: Mapping[str, Any], sources: Mapping[str, Documents]) -> Iterator[str]:
    """`source: difference` for every source that differs from what `contents` recorded."""
    for name in sorted({*known, *sources}):
        if name not in known or name not in sources:
            yield f"{name} {'was not there' if name not in known else 'is no longer there'}"
        elif (found := Content(**known[name]).difference(sources[name])) is not None:
            yield f"{name}: {found}"


def _hashes(source: Documents, count: int, chunk: int) -> list[str]:
    chunks = (source.hashes(start, min(start + chunk, count)) for start in range(0, count, chunk))
    return [hashlib.sha256(part.astype("<u8").tobytes()).hexdigest()[:16] for part in chunks]
