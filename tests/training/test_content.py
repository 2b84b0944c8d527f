# SPDX-License-Identifier: Apache-2.0
"""A checkpoint identifies the data it was trained on by its tokens, wherever it is stored, and says where others begin."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_hilbert.training import content
from ring_hilbert.training.config import DataConfig
from ring_hilbert.training.content import Content, contents, differences
from ring_hilbert.training.data import open_dataset
from ring_hilbert.training.documents import Documents

pytestmark = pytest.mark.usefixtures("cache")


class Numbers(Documents):
    """Documents of a token each, in files of ten."""

    def __init__(self, hashes: list[int]) -> None:
        self._hashes = np.array(hashes, dtype=np.uint64)
        self.lengths = np.ones(len(hashes), dtype=np.int64)

    def hashes(self, start: int, stop: int) -> np.ndarray:
        """As they were given."""
        return self._hashes[start:stop]

    def file(self, document: int) -> Path:
        """A file of that number."""
        return Path(f"file{document // 10}")


@given(
    known=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=200),
    edit=st.sampled_from(["none", "another", "inserted", "gone", "behind", "ends early"]),
    data=st.data(),
)
def test_every_change_is_found_where_it_is(known: list[int], edit: str, data: st.DataObject) -> None:
    now, first = list(known), data.draw(st.integers(0, len(known) - 1))
    if edit == "another":
        now[first] ^= 1
    elif edit == "inserted":
        now.insert(first, known[first] ^ 1)
    elif edit == "gone":
        del now[first]
    elif edit == "ends early":
        del now[first:]
    elif edit == "behind":
        now += [1] * (1 + first)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(content, "MOST_HASHES", 8)
        saved = Content(**json.loads(json.dumps(asdict(Content.of(Numbers(known))))))
    assert len(saved.hashes) <= 8
    found = saved.difference(Numbers(now))
    if now == known:
        assert found is None
        return
    assert found is not None
    if edit == "behind":
        assert found.startswith(
            f"{1 + first} documents of {1 + first} tokens were appended to the {len(known)} known ones"
        )
        assert found.endswith(f"from file{len(known) // 10} on")
        return
    differ = next(n for n in range(len(known)) if n >= len(now) or known[n] != now[n])
    if differ >= len(now) and (differ % saved.chunk == 0):
        assert found == f"of {len(known)} documents, those from {len(now)} on are missing"
    else:
        begin = differ // saved.chunk * saved.chunk
        end = min(begin + saved.chunk, len(known), len(now))
        which = f"document {begin} " if end - begin == 1 else f"one of the documents {begin} to {end - 1} "
        assert found.startswith(which)
        assert f"(file{begin // 10}" in found


def test_there_are_few_hashes_of_many_documents() -> None:
    for count, chunk in ((1, 1), (1024, 1), (1025, 2), (2048, 2), (2049, 4), (10**6, 1024)):
        found = Content.of(Numbers([0] * count))
        assert (found.chunk, len(found.hashes)) == (chunk, -(-count // chunk))


TEXTS = [f"document {n} " * (1 + n % 7) for n in range(40)]


def documents(path: Path | list[Path], **keys: Any) -> dict[str, Documents]:
    paths = [str(part) for part in (path if isinstance(path, list) else [path])]
    config = DataConfig.model_validate({"sources": [{"path": paths, **keys}], "seq_len": 64})
    return open_dataset(config, "train", 384).documents


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for n, text in enumerate(TEXTS):
        (folder / f"{n:02}.txt").write_text(text)
    return folder


def rows(texts: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({field: text}) + "\n" for text in texts).encode()


def test_data_may_move_be_touched_packed_and_spread_over_other_files(texts: Path, tmp_path: Path) -> None:
    known = contents(documents(texts))
    assert not list(differences(known, documents(texts)))
    for file in texts.iterdir():
        os.utime(file, (1, 1))
    assert not list(differences(known, documents(texts)))
    shutil.move(texts, tmp_path / "elsewhere")
    assert not list(differences(known, documents(tmp_path / "elsewhere")))
    spread = tmp_path / "spread"
    spread.mkdir()
    (spread / "0.md").write_text(TEXTS[0])
    (spread / "1.jsonl.gz").write_bytes(gzip.compress(rows([*TEXTS[1:15], ""], "body")))
    (spread / "2.ndjson").write_bytes(rows(TEXTS[15:], "body"))
    assert not list(differences(known, documents(spread, field="body")))


@pytest.mark.parametrize(
    ("name", "text", "difference"),
    [
        ("07.txt", TEXTS[7] + "!", "document 7 (.*07.txt) has changed, with 40 documents then and 40 now"),
        ("07.txt", TEXTS[7].replace("7", "8"), "document 7 (.*07.txt) has changed, with 40 documents then and 40 now"),
        ("07.txt", "", "document 7 (.*08.txt) has changed, with 40 documents then and 39 now"),
        ("39.txt", "", "of 40 documents, those from 39 on are missing"),
        ("070.txt", "new", "document 8 (.*070.txt) has changed, with 40 documents then and 41 now"),
        ("40.txt", "new", "1 documents of 4 tokens were appended to the 40 known ones, from .*40.txt on"),
    ],
)
def test_other_tokens_are_found_and_their_file_named(texts: Path, name: str, text: str, difference: str) -> None:
    known = contents(documents(texts))
    (texts / name).write_text(text)
    (found,) = differences(known, documents(texts))
    assert re.fullmatch("data.sources.0: " + difference.replace("(", r"\(").replace(")", r"\)"), found)


def test_sources_that_come_go_and_change_places_are_named(texts: Path) -> None:
    first, second = (documents([texts / f"{n}*.txt"])["data.sources.0"] for n in (1, 2))
    known = contents({"data.sources.0": first, "data.sources.1": second})
    assert list(differences(known, {"data.sources.0": first})) == ["data.sources.1 is no longer there"]
    assert list(differences(contents({}), {"data.eval": first})) == ["data.eval was not there"]
    swapped = list(differences(known, {"data.sources.0": second, "data.sources.1": first}))
    assert [found.split(":")[0] for found in swapped] == ["data.sources.0", "data.sources.1"]
