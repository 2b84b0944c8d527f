# SPDX-License-Identifier: Apache-2.0
"""The manifest of a checkpoint: size and checksum of each of its files, computed as they are written. It is written last."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor

MANIFEST = "manifest.json"
CHUNK = 1 << 24  # bytes read or written at once

Buffer: TypeAlias = bytes | memoryview


@dataclass(frozen=True)
class FileSum:
    """Size of a file in bytes, and its 128-bit XXH3, hexadecimal."""

    bytes: int
    xxh3: str


Manifest: TypeAlias = dict[str, FileSum]  # by the file's path below the checkpoint's folder


class SummedFile:
    """A new file that is checksummed while it is written. A context manager.

    Raises:
        OSError: if it cannot be written; names the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._hash = xxhash.xxh3_128()

    def __enter__(self) -> SummedFile:
        self._file = self.path.open("xb")
        return self

    def __exit__(self, *_: object) -> None:
        self._naming(self._file.close)

    def write(self, data: Buffer) -> None:
        """Append `data`."""
        view = memoryview(data)
        for start in range(0, len(view), CHUNK):
            part = view[start : start + CHUNK]
            self._hash.update(part)
            self._naming(lambda part=part: self._file.write(part))
        self.size += len(view)

    def finish(self, sync: bool = True) -> FileSum:
        """Size and checksum of what was written, once it is on disk."""
        self._naming(self._file.flush)
        if sync:
            self._naming(lambda: os.fsync(self._file.fileno()))
        return FileSum(self.size, self._hash.hexdigest())

    def _naming(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error


def write_file(path: Path, data: Buffer, sync: bool = True) -> FileSum:
    """Write a whole new file and, with `sync`, wait until it is on disk; otherwise `write_manifest` waits."""
    with SummedFile(path) as file:
        file.write(data)
        return file.finish(sync)


def write_json(path: Path, value: Any) -> FileSum:
    """As `write_file`."""
    return write_file(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode())


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> FileSum:
    """Write a safetensors file of small tensors without waiting for the disk, which `write_manifest` does."""
    return write_file(path, to_safetensors(tensors), sync=False)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read what `write_tensors` wrote.

    Raises:
        ValueError: if it is not such a file.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def sum_file(path: Path) -> FileSum:
    """Size and checksum of a file, which is read in full.

    Raises:
        OSError: if it cannot be read.
    """
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(min(CHUNK, max(1, path.stat().st_size))))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return FileSum(size, digest.hexdigest())


def sync_file(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_manifest(folder: Path, files: Manifest) -> None:
    """Write the manifest of `folder`, once all its files are on disk.

    Raises:
        OSError: if a file is missing or of another size: the folder is not the one to which the ranks have written.
    """
    for name, known in files.items():
        found = (folder / name).stat().st_size
        if found != known.bytes:
            raise OSError(f"{folder / name} has {found:,} bytes, but {known.bytes:,} were written to it")
        sync_file(folder / name)
    for inner in {(folder / name).parent for name in files}:
        sync_file(inner)
    write_file(folder / MANIFEST, _render(files).encode())
    sync_file(folder)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        ValueError: if it is missing, or not as it was written.
    """
    path = folder / MANIFEST
    try:
        text = path.read_text()
        files = {name: FileSum(**known) for name, known in json.loads(text)["files"].items()}
        whole = _render(files) == text
    except FileNotFoundError:
        raise ValueError(f"{path} is missing (or an earlier version of ring_hilbert wrote the checkpoint)") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        whole, files = False, {}
    if not whole or any(".." in Path(name).parts or Path(name).is_absolute() for name in files):
        raise ValueError(f"{path} is not as it was written")
    return files


def check_files(folder: Path, files: Mapping[str, FileSum], progress: Callable[[int], object] | None) -> None:
    """Compare files with the manifest, including their contents if `progress` is given, which is called with bytes read.

    Raises:
        ValueError: for the first that is missing or differs in size or checksum.
    """
    for name, known in files.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != known.bytes:
                raise ValueError(f"{path} has {size:,} bytes, but was written with {known.bytes:,}")
            if progress is not None:
                if sum_file(path) != known:
                    raise ValueError(f"{path} has another checksum than when it was written")
                progress(size)
        except FileNotFoundError:
            raise ValueError(f"{path} is missing") from None
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error


def _render(files: Manifest) -> str:
    """A manifest as text, a function of the files only, with its own checksum."""
    known = {name: asdict(files[name]) for name in sorted(files)}
    own = xxhash.xxh3_128(json.dumps(known).encode()).hexdigest()
    return json.dumps({"files": known, "xxh3": own}, indent=1)
