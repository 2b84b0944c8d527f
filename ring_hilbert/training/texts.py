# SPDX-License-Identifier: Apache-2.0
"""Reads raw data files as a series of texts.

A file's format follows from its name, case-insensitively: JSON values or Parquet rows, with a text in a field of each, or one
text. JSON and text may be compressed. For a link its own name counts, not its target's.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO, Literal

import pyarrow
import pyarrow.compute
import pyarrow.parquet

Format = Literal["text", "json", "parquet"]
Errors = Literal["strict", "replace"]

FORMATS: dict[str, Format] = {
    ".jsonl": "json", ".ndjson": "json", ".jsonlines": "json", ".json": "json", ".parquet": "parquet", ".pq": "parquet",
}  # fmt: skip
COMPRESSIONS: dict[str, Callable[[Any], Any]] = {
    ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open,
    ".zst": lambda file: io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd")),  # type: ignore[arg-type]
}  # fmt: skip
TABLES = {".csv", ".tsv"}  # text, but of rows: nobody wants their raw syntax as one document
WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)  # UTF-32 LE's BOM begins with UTF-16 LE's
SURROGATES = re.compile("[\ud800-\udfff]")
SPACE = re.compile(r"[ \t\r\n\ufeff]*")  # between JSON values; byte-order marks occur where files were joined
ROWS = 128  # rows of a Parquet file in memory


class DataError(ValueError):
    """An error in a file, with its place; `read_texts` adds the file's name."""


def file_format(file: Path, chosen: Literal["auto"] | Format = "auto") -> tuple[Format, str]:
    """A file's format, by the last suffixes of its name, and the suffix of its compression ("" if none).

    Raises:
        ValueError: if the name is that of an unsupported table, or of rows that cannot be read compressed.
    """
    suffixes = [suffix.lower() for suffix in file.suffixes]
    packed = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    last = suffixes[-1] if suffixes else ""
    kind = FORMATS.get(last, "text") if chosen == "auto" else chosen
    if chosen == "auto" and last in TABLES:
        raise ValueError(
            f"data file {file} is a table that cannot be read, {', '.join(FORMATS)} can: convert it, exclude it, or set "
            "`format: text` to have it as one document"
        )
    if last in COMPRESSIONS or (kind == "parquet" and packed):
        raise ValueError(f"data file {file} cannot be read as {kind} in {packed}: unpack it first")
    return kind, packed


def read_texts(
    file: Path,
    field: str,
    chosen: Literal["auto"] | Format = "auto",
    errors: Errors = "strict",
    opened: Callable[[BinaryIO], object] = lambda _: None,
) -> Iterator[str]:
    """The texts in a file, in order: `field` of every JSON value or Parquet row, else the whole file as one.

    A byte-order mark at the start of a file or of a JSON line is not part of any text. In files that are one text, line endings
    are normalised to a single newline. A file without rows has no texts, whatever its columns.

    Args:
        file: a local file.
        field: the column; "meta.text" is `text` in `meta` unless there is a column of that very name. Nothing else is read.
        chosen: "auto" goes by the name.
        errors: "replace" substitutes U+FFFD for bytes that are not UTF-8 and for lone surrogates; "strict" refuses them.
        opened: is called with the open file, whose position shows the progress of reading.

    Raises:
        ValueError: if it cannot be read or decoded, or a row has no text in `field`; names file and line (Parquet: row).
    """
    kind, packed = file_format(file, chosen)
    try:
        with file.open("rb") as raw, COMPRESSIONS[packed](raw) if packed else nullcontext(raw) as stream:
            opened(raw)
            if kind == "json":
                yield from _json_texts(stream, field, errors)
            elif kind == "parquet":
                yield from _parquet_texts(stream, field, errors)
            else:
                yield _text(stream, errors, chosen == "auto")
    except DataError as error:
        raise ValueError(f"data file {file}: {error}") from None
    except Exception as error:  # readers of broken files raise all sorts of exceptions
        raise ValueError(f"data file {file} cannot be read as {kind}{packed and f' in {packed}'}: {error}") from error


def _text(stream: BinaryIO, errors: Errors, check: bool) -> str:
    """`check`: refuse what does not look like a text, because its name does not say that it is one."""
    text = _decode(_utf8(stream.read()), errors, 1)
    if check and "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"line {line} has a NUL character, so it is not UTF-8 text; exclude it or set `format: text`")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if check and _like_rows(text):
        raise DataError(
            f"its lines are JSON objects, but its name has none of the suffixes {', '.join(FORMATS)}: set `format: json` to have "
            "them as rows, or `format: text` as one document"
        )
    return text


def _like_rows(text: str) -> bool:
    """Whether its first two lines are JSON objects."""
    lines = [line for line in text[: 2**20].split("\n", 8) if line.strip()][:2]
    try:
        return len(lines) == 2 and all(isinstance(json.loads(line), dict) for line in lines)
    except (ValueError, RecursionError):
        return False


def _utf8(data: bytes) -> bytes:
    """The start of a file without a byte-order mark."""
    if data.startswith(WIDE):
        raise DataError("it starts with the byte-order mark of UTF-16 or UTF-32; convert it to UTF-8")
    return data.removeprefix(codecs.BOM_UTF8)


def _decode(data: bytes, errors: Errors, line: int) -> str:
    """Decode text that begins at `line` of its file."""
    try:
        return data.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise _not_utf8(error, f"line {line + data.count(10, 0, error.start)}") from None


def _not_utf8(error: UnicodeDecodeError, where: str) -> DataError:
    wrong = error.object[error.start : error.end]
    return DataError(
        f"{where} is not UTF-8 text ({error.reason}: {wrong!r}); exclude the file or set data.encoding_errors: replace"
    )


def _json_texts(stream: BinaryIO, field: str, errors: Errors) -> Iterator[str]:
    for line, value in _json_values(stream, errors):
        for row in value if isinstance(value, list) else [value]:
            text = _field(row, field, line)
            try:
                text.encode()
            except UnicodeEncodeError as error:  # JSON can express what UTF-8 cannot
                if errors == "strict":
                    raise DataError(
                        f"line {line} has the lone surrogate {ascii(text[error.start])[1:-1]} in {field!r}, which is no character; "
                        "exclude the file or set data.encoding_errors: replace"
                    ) from None
                text = SURROGATES.sub("\ufffd", text)
            yield text


def _json_values(stream: BinaryIO, errors: Errors) -> Iterator[tuple[int, Any]]:
    """Every value and its line: one per line; or, if the first line is not a value, values over several lines."""
    first = True
    for line, data in enumerate(stream, 1):
        text = _decode(_utf8(data) if line == 1 else data, errors, line)
        start = _skip_space(text, 0)
        if start == len(text):
            continue
        try:
            value = json.loads(text[start:])
        except (ValueError, RecursionError) as error:
            if not first:
                raise _not_json(error, f"line {line}") from None
            yield from _spread_values(text + _decode(stream.read(), errors, line + 1), line)
            return
        first = False
        yield line, value


def _spread_values(text: str, line: int) -> Iterator[tuple[int, Any]]:
    """The values in a text that begins at `line` of its file."""
    decoder, end = json.JSONDecoder(), 0
    while (start := _skip_space(text, end)) < len(text):
        line += text.count("\n", end, start)
        try:
            value, end = decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            raise _not_json(error, f"line {line + text.count(chr(10), start, error.pos)}") from None
        except (ValueError, RecursionError) as error:
            raise _not_json(error, f"the value in line {line}") from None
        yield line, value
        line += text.count("\n", start, end)


def _not_json(error: Exception, where: str) -> DataError:
    cause = f"{error.msg} (column {error.colno})" if isinstance(error, json.JSONDecodeError) else error
    return DataError(f"{where} cannot be read as json: {cause}")


def _skip_space(text: str, start: int) -> int:
    found = SPACE.match(text, start)
    assert found is not None  # it also matches the empty string
    return found.end()


def _field(row: Any, field: str, line: int) -> str:
    if not isinstance(row, dict):
        raise DataError(f"line {line} holds {_type(row)}, expected an object with the field {field!r}")
    value = row
    for name in [field] if field in row else field.split("."):
        if not isinstance(value, dict) or name not in value:
            raise DataError(
                f"line {line} has no field {field!r}; it has {list(_leaves(row))}: set `field` to one of them"
            )
        value = value[name]
    if not isinstance(value, str):
        raise DataError(f"line {line}: field {field!r} holds {_type(value)}, expected text")
    return value


def _type(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _leaves(row: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in row.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def _parquet_texts(file: BinaryIO, field: str, errors: Errors) -> Iterator[str]:
    with pyarrow.parquet.ParquetFile(file) as table:
        if not table.metadata.num_rows:
            return
        names = [field] if field in table.schema_arrow.names else field.split(".")
        kind = _parquet_type(table, field, names)
        number = 0
        for batch in table.iter_batches(ROWS, columns=[field]):
            column = batch.column(names[0])
            for name in names[1:]:
                column = pyarrow.compute.struct_field(column, name)  # pyright: ignore[reportAttributeAccessIssue]  # made at import
            for value in column.cast(kind).cast(pyarrow.large_binary()).to_pylist():
                number += 1
                if value is None:
                    raise DataError(f"row {number} has null in the field {field!r}, expected text")
                try:
                    yield value.decode("utf-8", errors)
                except UnicodeDecodeError as error:
                    raise _not_utf8(error, f"row {number}") from None


def _parquet_type(table: pyarrow.parquet.ParquetFile, field: str, names: list[str]) -> pyarrow.DataType:
    """The string type of the column at the path `names`."""
    kind: pyarrow.DataType = pyarrow.struct(list(table.schema_arrow))
    for name in names:
        if not pyarrow.types.is_struct(kind) or kind.get_field_index(name) < 0:
            columns = [table.schema.column(number).path for number in range(len(table.schema.names))]
            raise DataError(f"it has no field {field!r}; it has {columns}: set `field` to one of them")
        kind = kind.field(name).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    strings = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)
    if not any(check(kind) for check in strings):
        raise DataError(f"field {field!r} holds {kind}, expected text")
    return kind
