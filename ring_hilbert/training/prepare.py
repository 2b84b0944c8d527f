# SPDX-License-Identifier: Apache-2.0
"""From files to parts (`documents`): read by one process, tokenised by several, written in order by the first.

It resumes after a crash, and its output depends neither on that nor on the number of processes: `part.json` is updated from time
to time with how much of the columns is known to be complete; anything beyond is truncated and redone.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import time
import zlib
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from huggingface_hub import constants
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ring_hilbert.training.documents import (
    COLUMNS,
    HEADER,
    KNOWN,
    PATHS,
    RECORD,
    VERSION,
    Part,
    npy_header,
    read_record,
    record_checksum,
    refuse_foreign,
)
from ring_hilbert.training.encoding import Encoded, encoded
from ring_hilbert.training.reading import Batch, Reading
from ring_hilbert.training.tokens import document_prefix, eos_id, tokenizer_digest

SAVED = 10.0  # seconds between two records of progress


def cache_folder() -> Path:
    """Where runs cache the data that they prepare themselves."""
    return Path(constants.HF_HOME) / "ring_hilbert"


def cached(reading: Reading, tokenizer: PreTrainedTokenizerBase, workers: int | None) -> Part:
    """The part in `cache_folder`, written now if it is missing; others that need it at the same time wait.

    Raises:
        ValueError: see `tokenise`.
    """
    folder = cache_folder() / _key(reading, tokenizer)
    with locked(folder):
        tokenise(reading, tokenizer, folder, workers)
    return Part(folder)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the exclusive right to write to a folder, waiting for it if necessary."""
    folder = folder.resolve()  # "." has no name
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(folder.name + ".lock"))
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        tqdm.write(f"{folder} is being prepared by another process; waiting for it", file=sys.stderr)
        held = lock.acquire()
    with held:
        yield


def tokenise(
    reading: Reading,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    workers: int | None = None,
    label: str = "Tokenising",
) -> None:
    """Write a part, resume an interrupted one, or find it done. Empty texts are left out.

    Args:
        reading: what to read.
        tokenizer: from `load_tokenizer`.
        folder: for this part only.
        workers: number of tokenising processes; None for one per core that this process may use.
        label: of the progress bar.

    Raises:
        ValueError: if a file cannot be read or decoded, or a row has no text in its field (names file and line; nothing of the
            part is kept); or the folder holds a finished part of something else.
        OSError: if it cannot be written, or a process was killed; the same call resumes from there.
    """
    key = _key(reading, tokenizer)
    record = read_record(folder) if (folder / RECORD).is_file() else None
    if record is not None and record["finished"]:
        if record["key"] != key:
            raise ValueError(
                f"{folder} was prepared with other files, settings or tokenizer than these, or the files have changed since; "
                "remove it, or name another folder"
            )
        return
    if record is None or record["key"] != key:
        if folder.exists():
            refuse_foreign(folder, {*KNOWN, f"{RECORD}.new"})
            shutil.rmtree(folder)
        record = _begin(folder, key, reading, tokenizer)
    try:
        _go_on(reading, tokenizer, folder, record, _workers(workers), label)
    except ValueError:
        shutil.rmtree(folder)  # files or settings must change, which makes it another part
        raise
    except BrokenProcessPool as error:
        raise ChildProcessError(
            f"a process tokenising for {folder} was killed, perhaps for lack of memory; the same command resumes from there, and "
            "a smaller data.workers needs less memory"
        ) from error


def _begin(folder: Path, key: str, reading: Reading, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Create files without documents, and their record."""
    folder.mkdir(parents=True)
    ids = [*tokenizer.get_vocab().values(), *document_prefix(tokenizer, reading.bos), eos_id(tokenizer)]
    smallest = np.min_scalar_type(max(ids)).newbyteorder("<").str
    dtypes = dict(zip(COLUMNS, (smallest, "<u4", "<u8", "<u4"), strict=True))
    for name, dtype in dtypes.items():
        (folder / f"{name}.npy").write_bytes(npy_header(dtype, 0))
    paths = json.dumps([str(file) for file in reading.in_order]).encode()
    (folder / PATHS).write_bytes(paths)
    return {
        "version": VERSION, "key": key, "finished": False, "kinds": reading.kinds(), "largest_id": -1, "file": 0, "within": 0,
        "columns": {name: {"dtype": dtype, "count": 0} for name, dtype in dtypes.items()},
        "checksums": dict.fromkeys(COLUMNS, 0) | {PATHS: zlib.crc32(paths)},
    }  # fmt: skip


def _go_on(
    reading: Reading, tokenizer: PreTrainedTokenizerBase, folder: Path, record: dict[str, Any], workers: int, label: str
) -> None:
    size = sum(file.stat().st_size for file in reading.files)
    batches = reading.batches(record["file"], record["within"])
    means = tokenizer, reading.bos, record["columns"]["tokens"]["dtype"]
    columns = {name: (folder / f"{name}.npy").open("r+b") for name in COLUMNS}
    try:
        for name, file in columns.items():
            column = record["columns"][name]
            file.truncate(HEADER + column["count"] * np.dtype(column["dtype"]).itemsize)
            file.seek(0, os.SEEK_END)
        saved = time.monotonic()
        often = 1.0 if sys.stderr.isatty() else 30.0  # a log file keeps every line
        bar = tqdm(desc=label, total=size, unit="B", unit_scale=True, delay=1.0, mininterval=often)
        with bar, closing(encoded(batches, means, workers, size)) as done:
            for batch, found in done:
                _append(columns, record, found, batch)
                bar.update(batch.position - bar.n)
                if time.monotonic() - saved > SAVED:
                    _note(folder, columns, record)
                    saved = time.monotonic()
        if _key(reading, tokenizer) != record["key"]:
            raise ValueError(
                f"files changed while they were read into {folder}; start again once they no longer change"
            )
        for name, file in columns.items():
            file.seek(0)
            file.write(npy_header(**record["columns"][name]))
        _note(folder, columns, record | {"finished": True})
    finally:
        for file in columns.values():
            file.close()


def _append(columns: dict[str, Any], record: dict[str, Any], found: Encoded, batch: Batch) -> None:
    numbers = dict(zip(COLUMNS, (*found[:3], np.array(batch.files, dtype="<u4")), strict=True))
    for name, values in numbers.items():
        data = values.tobytes()
        columns[name].write(data)
        record["checksums"][name] = zlib.crc32(data, record["checksums"][name])
        record["columns"][name]["count"] += len(values)
    record["largest_id"] = max(record["largest_id"], found.largest_id)
    record["file"], record["within"] = batch.file, batch.within


def _note(folder: Path, columns: dict[str, Any], record: dict[str, Any]) -> None:
    """Sync what has been written to disk, then record it."""
    for file in columns.values():
        file.flush()
        os.fsync(file.fileno())
    write_record(folder / RECORD, record)


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a JSON file that `read_record` reads, whole or not at all."""
    unfinished = path.with_name(path.name + ".new")
    with unfinished.open("w") as file:
        json.dump(record | {"checksum": record_checksum(record)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def _workers(wanted: int | None) -> int:
    if multiprocessing.current_process().daemon:
        return 1  # a daemonic process may not have children
    if wanted is not None:
        return wanted
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _key(reading: Reading, tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest that changes whenever the content of a part may."""
    how = reading.field, reading.format, reading.encoding_errors, document_prefix(tokenizer, reading.bos)
    parts = VERSION, how, tokenizer_digest(tokenizer), reading.states()
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
