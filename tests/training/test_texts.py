# SPDX-License-Identifier: Apache-2.0
"""Files as found in the wild: what is a row, what is a document, and what is refused by file and line, never misread."""

from __future__ import annotations

import bz2
import codecs
import glob
import gzip
import itertools
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_hilbert.training.files import find_files
from ring_hilbert.training.texts import read_texts


def zstd(data: bytes) -> bytes:
    return pyarrow.Codec("zstd").compress(data, asbytes=True)


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd,
}  # fmt: skip


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def refusal(file: Path, field: str = "text", **keys: Any) -> str:
    """What the error says behind the file's name."""
    with pytest.raises(ValueError) as caught:
        list(read_texts(file, field, **keys))
    start = f"data file {file}"
    assert str(caught.value).startswith(start)
    return str(caught.value)[len(start) :].lstrip(": ")


# Rows, however they are packed and spelt


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("suffix", [".jsonl", ".JSONL", ".ndjson", ".NdJson", ".json", ".jsonlines"])
def test_packed_and_differently_spelt_rows_are_rows(tmp_path: Path, packed: str, suffix: str) -> None:
    for number, spelling in enumerate({packed, packed.upper()}):
        file = tmp_path / f"a.2026-11{number}{suffix}{spelling}"
        file.write_bytes(PACKERS[packed](lines({"text": "one", "n": 1}, {"text": "two\u2028\x85\nlines"})))
        assert list(read_texts(file, "text")) == ["one", "two\u2028\x85\nlines"]


@pytest.mark.parametrize("packed", PACKERS)
def test_files_packed_in_pieces_are_read_to_the_end(tmp_path: Path, packed: str) -> None:
    """As parallel compressors and `cat` write them."""
    file = tmp_path / f"a.jsonl{packed}"
    file.write_bytes(b"".join(PACKERS[packed](lines({"text": word})) for word in ("one", "two", "three")))
    assert list(read_texts(file, "text")) == ["one", "two", "three"]


@pytest.mark.parametrize("packed", [".gz", ".bz2", ".xz", ".zst"])
def test_packed_files_that_end_early_are_refused(tmp_path: Path, packed: str) -> None:
    file = tmp_path / f"a.jsonl{packed}"
    whole = PACKERS[packed](lines(*({"text": str(n)} for n in range(1000))))
    for kept in (len(whole) - 1, len(whole) // 2, 3):
        file.write_bytes(whole[:kept])
        assert refusal(file).startswith(f"cannot be read as json in {packed}: ")
    file.write_bytes(lines({"text": "not packed at all"}))
    assert refusal(file).startswith(f"cannot be read as json in {packed}: ")


@pytest.mark.parametrize("packed", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("behind", ["junk", "stream", "short"])
def test_packed_files_are_read_to_the_end_or_refused(tmp_path: Path, packed: str, behind: str) -> None:
    """Python's own readers of two of the formats leave out what begins with a wrong byte, whatever comes then."""
    file = tmp_path / f"a.jsonl{packed}"
    first, second = (PACKERS[packed](lines({"text": word})) for word in ("one", "two"))
    wrong = {"junk": b"junk", "stream": b"?" + second[1:] + second, "short": second[:2]}[behind]
    file.write_bytes(first + wrong)
    assert refusal(file).startswith(f"cannot be read as json in {packed}: ")


@pytest.mark.parametrize("packed", [".gz", ".bz2", ".xz"])
def test_zeros_between_and_behind_streams_are_padding(tmp_path: Path, packed: str) -> None:
    file = tmp_path / f"a.jsonl{packed}"
    streams = [PACKERS[packed](lines({"text": word})) for word in ("one", "two")]
    for padding in (4, 2**17):
        file.write_bytes(b"".join(stream + bytes(padding) for stream in streams))
        assert list(read_texts(file, "text")) == ["one", "two"]


@pytest.mark.parametrize("packed", PACKERS)
def test_a_packed_text_is_one_document(tmp_path: Path, packed: str) -> None:
    file = tmp_path / f"notes.txt{packed}"
    file.write_bytes(PACKERS[packed]("née\r\nB\n".encode()))
    assert list(read_texts(file, "text")) == ["née\nB\n"]


@pytest.mark.parametrize(
    "content",
    [
        '{"text": "a"}\n\n  \n{"text": "b"}',
        '{"text": "a"}\r\n{"text": "b"}\r\n',
        '\ufeff{"text": "a"}\n\ufeff{"text": "b"}\n',
        '[{"text": "a"}, {"text": "b"}]',
        '[\n {"text": "a"},\n {"text": "b"}\n]\n',
        '{\n "text": "a"\n}\n{\n "text":\n "b"}',
        '\ufeff\n[{"text": "a"}]\n[{"text": "b"}]\n[]',
        '{"text": "a"} {"text": "b"}',
    ],
)
@pytest.mark.parametrize("suffix", [".json", ".ndjson"])
def test_json_values_may_be_laid_out_in_any_way(tmp_path: Path, content: str, suffix: str) -> None:
    file = tmp_path / f"a{suffix}"
    file.write_bytes(content.encode())
    assert list(read_texts(file, "text")) == ["a", "b"]


# Columns

OTHERS = [
    {},
    {"n": 1},
    {"n": "x"},
    {"n": None},
    {"n": [1, "x"]},
    {"n": {"text": 5}},
    {"m": 10**30, "n": [{}]},
    {"n": 1e400},
]


def test_other_columns_may_appear_vanish_and_change_type(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    rows = [{"text": str(n)} | other for n, other in enumerate(itertools.chain(*itertools.permutations(OTHERS, 2)))]
    file.write_bytes(lines(*rows))
    assert list(read_texts(file, "text")) == [str(n) for n in range(len(rows))]


@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {"text": st.text(max_size=5)},
            optional={"a": st.none() | st.integers() | st.text(max_size=3) | st.lists(st.booleans(), max_size=2)},
        ),
        max_size=20,
    ),
    packed=st.sampled_from(list(PACKERS)),
)
def test_any_rows_come_back(rows: list[dict[str, Any]], packed: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("rows") / f"a.jsonl{packed}"
    content = "".join(json.dumps(row, ensure_ascii=bool(n % 2)) + "\n" for n, row in enumerate(rows))
    file.write_bytes(PACKERS[packed](content.encode()))
    assert list(read_texts(file, "text")) == [row["text"] for row in rows]


def test_nested_fields_go_by_dotted_name(tmp_path: Path) -> None:
    rows = [{"meta": {"body": {"raw": "one"}, "n": 1}}, {"meta": {"body": {"raw": "two"}}, "meta.body": "x"}]
    (tmp_path / "a.jsonl").write_bytes(lines(*rows))
    assert list(read_texts(tmp_path / "a.jsonl", "meta.body.raw")) == ["one", "two"]
    (tmp_path / "b.jsonl").write_bytes(lines({"meta.body": "by that very name", "meta": {"body": "nested"}}))
    assert list(read_texts(tmp_path / "b.jsonl", "meta.body")) == ["by that very name"]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert list(read_texts(tmp_path / "a.parquet", "meta.body.raw")) == ["one", "two"]
    pyarrow.parquet.write_table(pyarrow.table({"meta.body": ["very"], "meta": [{"body": "nested"}]}), tmp_path / "b.pq")
    assert list(read_texts(tmp_path / "b.pq", "meta.body")) == ["very"]
    for name in ("a.jsonl", "a.parquet"):
        assert "has no field 'meta.raw'; it has ['meta.body.raw', 'meta.n']" in refusal(tmp_path / name, "meta.raw")


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.string_view(),
        pyarrow.dictionary(pyarrow.int8(), pyarrow.string()),
    ],
    ids=str,
)
def test_parquet_text_of_any_type(tmp_path: Path, kind: pyarrow.DataType) -> None:
    texts = [f"row {n % 50}é" for n in range(300)]
    table = pyarrow.table({"x": list(range(300)), "text": pyarrow.array(texts).cast(kind)})
    pyarrow.parquet.write_table(table, tmp_path / "a.PARQUET", row_group_size=70)
    assert list(read_texts(tmp_path / "a.PARQUET", "text")) == texts


# Nothing in it


@pytest.mark.parametrize("content", ["", "\n\n", " \r\n", "[]", "[\n]\n", "\ufeff", "\ufeff\n[]"])
def test_json_without_rows_has_no_texts(tmp_path: Path, content: str) -> None:
    for name in ("a.jsonl", "a.json.zst"):
        (tmp_path / name).write_bytes(PACKERS[".zst" if "zst" in name else ""](content.encode()))
        assert list(read_texts(tmp_path / name, "text")) == []


def test_parquet_without_rows_has_no_texts_whatever_its_columns(tmp_path: Path) -> None:
    for number, table in enumerate(({}, {"text": pyarrow.array([], "string")}, {"other": pyarrow.array([], "int8")})):
        file = tmp_path / f"{number}.parquet"
        pyarrow.parquet.write_table(pyarrow.table(table), file)
        assert list(read_texts(file, "text")) == []


# Bytes that are no text


def test_byte_order_marks_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF8 + b"a\xef\xbb\xbfb")
    assert list(read_texts(tmp_path / "a.txt", "text")) == ["a\ufeffb"]
    (tmp_path / "a.jsonl").write_bytes(codecs.BOM_UTF8 + '{"text": "\ufeffkept"}'.encode())
    assert list(read_texts(tmp_path / "a.jsonl", "text")) == ["\ufeffkept"]
    for codec in ("utf-16", "utf-16-be", "utf-32"):
        for name in ("b.txt", "b.jsonl"):
            mark = codecs.BOM_UTF16_BE if codec.endswith("be") else b""
            (tmp_path / name).write_bytes(mark + '{"text": "a"}\n'.encode(codec))
            for errors in ("strict", "replace"):
                assert "byte-order mark of UTF-16 or UTF-32; convert it to UTF-8" in refusal(
                    tmp_path / name, errors=errors
                )


def test_lone_surrogates_and_wrong_bytes_are_refused_with_their_line_or_replaced(tmp_path: Path) -> None:
    def check(name: str, content: bytes, where: str, replaced: list[str]) -> None:
        (tmp_path / name).write_bytes(content)
        assert where in refusal(tmp_path / name)
        assert list(read_texts(tmp_path / name, "text", errors="replace")) == replaced

    good = rb'{"text": "\ud83d\ude00"}' + b"\n"
    check(
        "a.jsonl",
        good + rb'{"text": "x\ud83dy"}',
        r"line 2 has the lone surrogate \ud83d in 'text'",
        ["😀", "x\ufffdy"],
    )
    check("b.json", b"[" + good + rb',{"text": "\ude00\ud83d"}]', r"surrogate \ude00", ["😀", "\ufffd\ufffd"])
    check("c.ndjson", good * 2 + b'{"text": "caf\xe9"}', "line 3 is not UTF-8 text (", ["😀", "😀", "caf\ufffd"])
    check("d.json", b'[\n{"text": "a"},\n{"text": "caf\xe9"}]', "line 3 is not UTF-8 text (", ["a", "caf\ufffd"])
    check(
        "e.py",
        b"a\nb\ncaf\xe9\n",
        r"line 3 is not UTF-8 text (invalid continuation byte: b'\xe9')",
        ["a\nb\ncaf\ufffd\n"],
    )
    bad = pyarrow.Array.from_buffers(pyarrow.string(), 2, pyarrow.array([b"ok", b"\xff\xfe"]).buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": bad}), tmp_path / "f.parquet")
    check("f.parquet", (tmp_path / "f.parquet").read_bytes(), "row 2 is not UTF-8 text", ["ok", "\ufffd\ufffd"])
    (tmp_path / "g.jsonl").write_bytes(rb'{"text": "ok", "other": "\ud83d"}')
    assert list(read_texts(tmp_path / "g.jsonl", "text")) == ["ok"], "nothing but the field is looked at"


# Suffixes that say nothing


def test_rows_under_an_unknown_name_are_refused_until_the_format_is_said(tmp_path: Path) -> None:
    content = lines({"body": "a"}, {"body": "b"})
    for name in ("part-00000", "a.jl", "a.jsonl.1", "a.txt", "part-00000.gz", ".jsonl"):
        file = tmp_path / name
        file.write_bytes(PACKERS[file.suffix if file.suffix in PACKERS else ""](content))
        assert "its lines are JSON objects, but its name has none of the suffixes .jsonl" in refusal(file)
        assert list(read_texts(file, "body", "json")) == ["a", "b"]
        assert list(read_texts(file, "body", "text")) == [content.decode()]
    (tmp_path / "one.webmanifest").write_bytes(b'{\n "a": 1\n}\n')
    assert list(read_texts(tmp_path / "one.webmanifest", "text")) == ['{\n "a": 1\n}\n']


def test_tables_that_cannot_be_read_are_no_documents(tmp_path: Path) -> None:
    for name in ("a.csv", "a.TSV", "a.csv.gz"):
        (tmp_path / name).write_bytes(PACKERS[Path(name).suffix if name.endswith("gz") else ""](b"text\na\n"))
        assert refusal(tmp_path / name).startswith("is a table that cannot be read")
        assert list(read_texts(tmp_path / name, "text", "text")) == ["text\na\n"]
    (tmp_path / "a.tar").write_bytes(b"a.txt\0\0\0\0text")
    assert "line 1 has a NUL character" in refusal(tmp_path / "a.tar")
    for name, packed in (("a.parquet.gz", "parquet in .gz"), ("a.jsonl.zst.GZ", "text in .gz")):
        (tmp_path / name).write_bytes(b"any")
        assert refusal(tmp_path / name) == f"cannot be read as {packed}: unpack it first"


@pytest.mark.parametrize(
    ("content", "where"),
    [
        (b'{"text": "a"}\n\n{"te', "line 3 cannot be read as json: Unterminated string"),
        (b'{"te', "line 1 cannot be read as json: Unterminated string"),
        (b'{"text": "a"}\n{"text": "b"} {"text": "c"}', "line 2 cannot be read as json: Extra data"),
        (b'[\n{"text": "a"},\n{"text" "b"}]', "line 3 cannot be read as json: Expecting ':' delimiter"),
        (b'{"text":\n "a"}\n\n{"text":\n 3}', "line 4: field 'text' holds a number, expected text"),
        (b'{"text": "a"}\n{"text": null}', "line 2: field 'text' holds null, expected text"),
        (b'{"text": "a"}\n{"text": {"b": 1}}', "line 2: field 'text' holds an object, expected text"),
        (b'{"text": "a"}\n"text"', "line 2 holds a string, expected an object with the field 'text'"),
        (b'{"text": "a"}\n{"Text": "b", "m": {"n": 1}}', "line 2 has no field 'text'; it has ['Text', 'm.n']"),
        (
            b'{"text": "a", "deep": ' + b"[" * 10**5 + b"]" * 10**5 + b"}",
            "line 1 cannot be read as json: maximum recursion",
        ),
    ],
)
def test_mistakes_in_rows_are_refused_with_their_line(tmp_path: Path, content: bytes, where: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    assert where in refusal(tmp_path / "a.jsonl")


def test_mistakes_in_parquet_are_refused_with_their_row(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"] * 200 + [None], "meta": [{"n": 1}] * 200 + [None]}), file)
    assert refusal(file) == "row 201 has null in the field 'text', expected text"
    assert refusal(file, "meta.n") == "field 'meta.n' holds int64, expected text"
    assert refusal(file, "body").startswith("it has no field 'body'; it has ['text', 'meta.n']")
    pyarrow.parquet.write_table(pyarrow.table({"meta": [{"text": "a"}, None]}), file)
    assert refusal(file, "meta.text") == "row 2 has null in the field 'meta.text', expected text"
    file.write_bytes(b"PAR1 not really")
    assert refusal(file).startswith("cannot be read as parquet: ")


# Names

NAMES = ["a::b.jsonl", "file:x.jsonl", "zip:::x.jsonl", "a b.jsonl", "a[1].jsonl", "*.jsonl", "?.jsonl", "~.jsonl", "ä.jsonl",
         "-.jsonl", "{a,b}.jsonl", "%20.jsonl", "#1.jsonl", "$HOME.jsonl", os.fsdecode(b"\xff.jsonl")]  # fmt: skip


def test_any_name_is_the_name_of_a_local_file(tmp_path: Path) -> None:
    folder = tmp_path / "s3:::bucket [x] *"
    folder.mkdir()
    for name in NAMES:
        (folder / name).write_bytes(lines({"text": name.encode("utf-8", "replace").decode()}))
    found = find_files([str(folder)], [])
    assert sorted(file.name for file in found) == sorted(NAMES)
    for file in found:
        assert list(read_texts(file, "text")) == [file.name.encode("utf-8", "replace").decode()]
        assert find_files([str(file)], []) == [file]


def test_links_are_read_as_what_they_are_called(tmp_path: Path) -> None:
    """As in a cache that keeps contents under their hashes."""
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    folder.mkdir()
    (blobs / "0a1b").write_bytes(gzip.compress(lines({"text": "one"})))
    (blobs / "2c3d").write_bytes(b"plain")
    (folder / "train.jsonl.gz").symlink_to("../blobs/0a1b")
    (folder / "notes.md").symlink_to(blobs / "2c3d")
    (tmp_path / "again").symlink_to(folder)
    found = find_files([str(folder), str(tmp_path / "again"), str(blobs / "0a1b")], [])
    assert [file.name for file in found] == ["notes.md", "train.jsonl.gz"]
    assert [list(read_texts(file, "text")) for file in found] == [["plain"], ["one"]]
    (folder / "gone.txt").symlink_to(blobs / "nothing")
    with pytest.raises(ValueError, match=r"matches the link .*gone.txt, which leads nowhere; mend it or exclude it"):
        find_files([str(folder)], [])
    for exclude in ("gone.txt", "**/gone.*", f"{folder}/**/g*"):
        assert len(find_files([str(folder)], [exclude])) == 2


def test_links_between_folders_are_followed_but_never_round_and_round(tmp_path: Path) -> None:
    folder, disk = tmp_path / "data", tmp_path / "disk"
    for inner in (folder / "b", disk / "deep"):
        inner.mkdir(parents=True)
    for file in (folder / "a.txt", folder / "b" / "b.txt", disk / "deep" / "c.txt", disk / ".hidden.txt"):
        file.write_text(file.name)
    for name in ("again", "b/up", "b/down"):
        (folder / name).symlink_to(folder)
    (folder / "disk").symlink_to(disk)
    found = find_files([str(folder)], [])
    assert sorted(file.name for file in found) == ["a.txt", "b.txt", "c.txt"]
    assert found[-1].relative_to(folder).as_posix() == "disk/deep/c.txt"
    assert [file.name for file in find_files([f"{folder}/**/deep/**/*.txt"], [])] == ["c.txt"]
    assert [file.name for file in find_files([f"{folder}/b/**/a.*"], [])] == ["a.txt"]


@pytest.mark.parametrize(
    "pattern", ["**", "*", "**/*.py", "**/b/**", "a/**/*.py", "*/**/c/*", "**/**/*.md", "[ab]/*", "a/b/?.py"]
)
def test_globs_are_those_of_the_standard_library(tmp_path: Path, pattern: str) -> None:
    for name in ("a/b/c/x.py", "a/b/y.py", "a/z.md", "b/c/w.py", ".h/v.py", "a/.h/u.py", "a/b/.t.py", "s.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    wanted = {tmp_path / name for name in glob.glob(pattern, root_dir=tmp_path, recursive=True)}  # noqa: PTH207
    files = sorted(path for path in wanted if path.is_file())
    assert find_files([f"{tmp_path}/{pattern}"], []) == files
    assert files
