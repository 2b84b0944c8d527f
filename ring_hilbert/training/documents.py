# SPDX-License-Identifier: Apache-2.0
"""Tokenised documents on disk: memory-mapped NumPy files, checked on opening.

A part is a folder with the documents of one source in order: `tokens.npy`, the tokens of all, concatenated; `lengths.npy`,
`hashes.npy` and `files.npy`, a number per document; `paths.json`, the files that `files.npy` numbers; and `part.json`, the sizes
of each. `prepare` writes parts, and can resume an unfinished one.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import zlib
from pathlib import Path
from typing import Any

import numpy as np

VERSION = 4  # changes with what is read, how it is tokenised and how it is stored
RECORD, PATHS = "part.json", "paths.json"
COLUMNS = ("tokens", "lengths", "hashes", "files")
KNOWN = {RECORD, PATHS, *(f"{name}.npy" for name in COLUMNS)}  # the contents of a part's folder
HEADER = 128  # bytes of a .npy file before its numbers: NumPy leaves room for any length
STRIDE = 64  # every STRIDE-th document's offset into the tokens is stored; the others are counted from there
SUMMED = 2**20  # documents whose lengths are summed together, a multiple of STRIDE
WINDOW = 2**25  # bytes of tokens kept mapped; what is unmapped stays in the system's cache
FAULT = 2**21  # bytes that a page fault may map, if the cache has large pages
CHECKED = 64, 2**26  # documents whose hashes are recomputed when a part is opened, and the most tokens of them


class Part:
    """The documents of one source.

    Args:
        folder: written by `prepare.tokenise`.

    Attributes:
        record: the content of `part.json`.
        lengths: uint32 [documents], tokens of each, prefix and eos included; never 0. A memory map.

    Raises:
        ValueError: if it is unfinished, or a file in it is missing, truncated, changed or foreign; names the file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record = read_record(folder)
        if not self.record["finished"]:
            raise ValueError(f"{folder} is not fully prepared; run the same `ring-hilbert prepare-data` again")
        refuse_foreign(folder, KNOWN)
        for name in COLUMNS:
            self._check_size(name)
        for name in COLUMNS[1:]:
            self._check_sum(name)
        paths = folder / PATHS
        if not paths.is_file() or zlib.crc32(paths.read_bytes()) != self.record["checksums"][PATHS]:
            raise ValueError(f"{paths} is missing or not the file written here; {MEND}")
        self._maps = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("tokens", "lengths")]
        self._tokens, self.lengths = map(np.asarray, self._maps)
        self._starts = np.zeros(-(-len(self.lengths) // STRIDE), dtype=np.int64)
        if len(self.lengths):
            # some at a time, for they are copied to be summed in 64 bits
            pieces = np.split(self.lengths, range(SUMMED, len(self.lengths), SUMMED))
            sums = [np.add.reduceat(x, np.arange(0, len(x), STRIDE), dtype=np.int64) for x in pieces]
            np.cumsum(np.concatenate(sums)[:-1], out=self._starts[1:])
        self.let_go()
        most = CHECKED[1]
        for document in checked(len(self.lengths)):
            if (most := most - int(self.lengths[document])) >= 0:
                self.check(document)

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens `[start, stop)` of a document: a view of the memory map, in the dtype of the file."""
        nearest = document // STRIDE
        before = int(self._starts[nearest]) + int(self.lengths[nearest * STRIDE : document].sum(dtype=np.int64))
        self._mapped += FAULT + (stop - start) * self._tokens.itemsize
        if self._mapped > WINDOW:
            self.let_go()
        return self._tokens[before + start : before + stop]

    def let_go(self) -> None:
        """Keep nothing of the files in this process's memory; it is read again where it is needed."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for mapped in self._maps:
                mapped.base.madvise(mmap.MADV_DONTNEED)  # type: ignore[union-attr]
        self._mapped = 0

    def hashes(self, documents: slice | np.ndarray = slice(None)) -> np.ndarray:
        """uint64, `content_hash` of each of these: a copy. The file is not kept mapped, being needed once."""
        return np.array(np.load(self.folder / "hashes.npy", mmap_mode="r")[documents])

    def file(self, document: int) -> Path:
        """The file that a document was read from."""
        number = np.load(self.folder / "files.npy", mmap_mode="r")[document]
        return Path(json.loads((self.folder / PATHS).read_text())[number])

    def check(self, document: int) -> None:
        """Compare a document's tokens with its hash.

        Raises:
            ValueError: if they differ from those written.
        """
        ids = self.tokens(document, 0, int(self.lengths[document]))
        if content_hash(ids) != self.hashes(slice(document, document + 1))[0]:
            path = self.folder / "tokens.npy"
            raise ValueError(f"{path} is not the file written here: document {document} has different tokens; {MEND}")

    def check_tokens(self) -> None:
        """Compare all tokens with their checksum; opening a part only compares some documents with their hashes."""
        self._check_sum("tokens")

    def _check_size(self, name: str) -> None:
        path, column = self.folder / f"{name}.npy", self.record["columns"][name]
        wanted = HEADER + column["count"] * np.dtype(column["dtype"]).itemsize
        if not path.is_file() or path.stat().st_size != wanted:
            found = f"has {path.stat().st_size} bytes" if path.is_file() else "is missing"
            raise ValueError(f"{path} {found}, but was written with {wanted}; {MEND}")
        with path.open("rb") as file:
            if file.read(HEADER) != npy_header(column["dtype"], column["count"]):
                raise ValueError(f"{path} is not the file written here: its header differs; {MEND}")

    def _check_sum(self, name: str) -> None:
        path, found = self.folder / f"{name}.npy", 0
        with path.open("rb") as file:
            file.seek(HEADER)
            while piece := file.read(2**22):
                found = zlib.crc32(piece, found)
        if found != self.record["checksums"][name]:
            raise ValueError(f"{path} is not the file written here: its checksum differs; {MEND}")


MEND = "copy the folder again, or remove it and prepare the data again"


class Documents:
    """Random access to the documents of one part or several, or to some of them.

    Args:
        parts: the parts that hold them.
        chosen: for every part the numbers of its chosen documents, ascending; None for all.

    Attributes:
        lengths: [number of documents], tokens of each; never 0.
        largest_id: an upper bound on the token ids.
        summary: a description for the log.
    """

    def __init__(self, parts: list[Part], chosen: list[np.ndarray | None]) -> None:
        self._parts, self._chosen = parts, chosen
        picked = [
            part.lengths if some is None else part.lengths[some] for part, some in zip(parts, chosen, strict=True)
        ]
        self.lengths = picked[0] if len(picked) == 1 else np.concatenate(picked)  # one, and all of it: a memory map
        self._ends = np.cumsum([len(lengths) for lengths in picked])
        for part, some in zip(parts, chosen, strict=True):
            if some is not None:
                part.let_go()  # its lengths are here now
        self.largest_id = max(part.record["largest_id"] for part in parts)
        kinds = "; ".join(dict.fromkeys(part.record["kinds"] for part in parts))
        count, known = len(self.lengths), sum(len(part.lengths) for part in parts)
        found = f"{count:,} of {known:,}" if count < known else f"{count:,}"
        self.summary = f"{found} documents, {self.lengths.sum(dtype=np.int64):,} tokens; {kinds}"

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens `[start, stop)` of a document: a view of the memory map, in the dtype of its file."""
        part, place = self._find(document)
        return part.tokens(place, start, stop)

    def hashes(self, start: int, stop: int) -> np.ndarray:
        """uint64 [stop - start], of the tokens of each of these documents: a copy, so that few need be held at a time."""
        found, begin = [], 0
        for part, chosen, end in zip(self._parts, self._chosen, self._ends.tolist(), strict=True):
            some = slice(max(start, begin) - begin, max(0, min(stop, end) - begin))
            found.append(part.hashes(some if chosen is None else chosen[some]))
            begin = end
        return np.concatenate(found)

    def file(self, document: int) -> Path:
        """The file that a document was read from."""
        part, place = self._find(document)
        return part.file(place)

    def _find(self, document: int) -> tuple[Part, int]:
        part = int(np.searchsorted(self._ends, document, side="right")) if len(self._ends) > 1 else 0
        place, chosen = document - (int(self._ends[part - 1]) if part else 0), self._chosen[part]
        return self._parts[part], place if chosen is None else int(chosen[place])


def checked(count: int) -> list[int]:
    """Which of `count` documents are compared with their hashes when a part is opened."""
    return np.unique(np.linspace(0, count - 1, min(CHECKED[0], count), dtype=np.int64)).tolist()


def content_hash(ids: np.ndarray) -> np.uint64:
    """A document's hash, of its token ids whatever their dtype: eight bytes of BLAKE2b."""
    return np.frombuffer(hashlib.blake2b(ids.astype("<i4", copy=False).data, digest_size=8).digest(), dtype="<u8")[0]


def npy_header(dtype: str, count: int) -> bytes:
    """The first `HEADER` bytes of a .npy file of `count` numbers."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": (count,)})
    return file.getvalue()


def read_record(folder: Path, name: str = RECORD) -> dict[str, Any]:
    """The JSON file that describes a folder of prepared data.

    Raises:
        ValueError: if it is missing, unreadable, of another version, or was changed.
    """
    path = folder / name
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(
            f"{folder} holds no {name}: `ring-hilbert prepare-data` did not write it, or has not finished; "
            "run it again, or name another folder"
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); {MEND}") from None
    if not isinstance(record, dict) or record.get("version") != VERSION:
        found = record.get("version") if isinstance(record, dict) else None
        raise ValueError(
            f"{path} has version {found}, expected {VERSION}; remove the folder and prepare the data again"
        )
    if record.get("checksum") != record_checksum(record):
        raise ValueError(f"{path} is not the one that belongs here: its checksum is another; {MEND}")
    return record


def record_checksum(record: dict[str, Any]) -> int:
    """Of what a JSON file says, but for its own checksum."""
    said = {key: value for key, value in record.items() if key != "checksum"}
    return zlib.crc32(json.dumps(said, sort_keys=True).encode())


def refuse_foreign(folder: Path, known: set[str]) -> None:
    """Refuse a folder that holds anything but `known`.

    Raises:
        ValueError: naming what does not belong there.
    """
    foreign = sorted(path.name for path in folder.iterdir() if path.name not in known)
    if foreign:
        raise ValueError(f"{folder / foreign[0]} does not belong in a folder of prepared data; move it away")
