# SPDX-License-Identifier: Apache-2.0
"""Compressed files as streams of bytes, read to their end or not at all."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Callable
from typing import Any, BinaryIO

import pyarrow

PACKED = 2**16  # bytes of a compressed file that are read together


class _Streams(io.RawIOBase):
    """The streams of a compressed file, zeros between them. Python's own readers take for the end what they cannot read as another
    stream, so that of a file of many streams the rest is missed without a word where one begins with a wrong byte.
    """

    def __init__(self, file: BinaryIO, decompressor: Callable[[], Any]) -> None:
        self._file, self._decompressor, self._stream = file, decompressor, decompressor()

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """See `io.RawIOBase`."""
        found = data = b""
        while not found:
            if self._stream.eof:
                data = self._stream.unused_data.lstrip(b"\0")
                while not data:
                    if not (more := self._file.read(PACKED)):
                        return 0
                    data = more.lstrip(b"\0")
                self._stream = self._decompressor()
            elif self._stream.needs_input and not (data := self._file.read(PACKED)):
                raise EOFError("it ends in the middle of a stream")
            found, data = self._stream.decompress(data, len(buffer)), b""
        buffer[: len(found)] = found
        return len(found)


COMPRESSIONS: dict[str, Callable[[Any], Any]] = {  # what opens a file, by the last suffix of its name
    ".gz": gzip.open,
    ".bz2": lambda file: io.BufferedReader(_Streams(file, bz2.BZ2Decompressor), PACKED),
    ".xz": lambda file: io.BufferedReader(_Streams(file, lzma.LZMADecompressor), PACKED),
    ".zst": lambda file: io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd")),  # type: ignore[arg-type]
}
