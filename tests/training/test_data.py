# SPDX-License-Identifier: Apache-2.0
"""Documents to packed sequences: what is read, held out, mixed and refused, and that `dataset[i]` never changes."""

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from ring_hilbert.training.config import DataConfig
from ring_hilbert.training.data import (
    MIXTURE,
    EndlessSource,
    EvaluationSequences,
    PackedDataset,
    TrainingSequences,
    open_dataset,
)
from ring_hilbert.training.documents import Documents
from ring_hilbert.training.files import find_files
from ring_hilbert.training.tokens import load_tokenizer, tokenizer_digest

VOCAB = 384  # ByT5's
EOS = 1
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """40 text files of 3 to 120 characters, each file one character repeated."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for n in range(40):
        (folder / f"{n:02}.txt").write_text(chr(48 + n) * (3 + 3 * n))
    return folder


def config(source: object, **keys: Any) -> DataConfig:
    sources = source if isinstance(source, list) else [{"path": str(source)}]
    return DataConfig.model_validate({"sources": sources, "seq_len": 64, **keys})


def train(source: object, seed: int = 0, **keys: Any) -> PackedDataset:
    return open_dataset(config(source, **keys), "train", VOCAB, seed)


def evaluation(path: object, **keys: Any) -> PackedDataset:
    return open_dataset(config("unused", eval={"path": str(path), **keys}), "eval", VOCAB, 0)


def text(ids: np.ndarray) -> str:
    return bytes((ids[ids > 2] - 3).astype(np.uint8)).decode()


def whole(dataset: PackedDataset) -> str:
    return "".join(text(dataset[i]["input_ids"]) for i in range(len(dataset)))


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(a[key], b[key]) for key in ("input_ids", "document_ids"))


# Packing


def test_evaluation_keeps_order_appends_eos_numbers_runs_and_pads(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A" * 70)
    (tmp_path / "b.txt").write_text("BB")
    (tmp_path / "c.txt").write_text("é")
    dataset = evaluation(tmp_path)
    assert len(dataset) == 2
    first, last = dataset[0], dataset[1]
    assert first["input_ids"].tolist() == [65 + 3] * 64
    assert first["document_ids"].tolist() == [0] * 64
    assert last["input_ids"][:13].tolist() == [68] * 6 + [EOS] + [69] * 2 + [EOS] + [0xC3 + 3, 0xA9 + 3, EOS]
    assert last["document_ids"].tolist() == [0] * 7 + [1] * 3 + [2] * 3 + [-1] * 51
    for item in (first, last):
        assert {key: (value.dtype, value.shape) for key, value in item.items()} == {
            "input_ids": (np.int64, (64,)),
            "document_ids": (np.int64, (64,)),
        }
    for outside in (2, -1):
        with pytest.raises(IndexError):
            dataset[outside]


def test_evaluation_cap_takes_sequences_evenly(texts: Path) -> None:
    every = evaluation(texts)
    some = evaluation(texts, sequences=4)
    assert len(every) > 20
    assert len(some) == 4
    for number in range(4):
        assert equal(some[number], every[number * len(every) // 4])
    assert len(evaluation(texts, sequences=10**6)) == len(every)


def test_an_epoch_holds_every_token_once_but_the_last_few(texts: Path) -> None:
    dataset = train(texts)
    tokens = sum(file.stat().st_size + 1 for file in texts.iterdir())
    assert len(dataset) == tokens // 64
    for epoch in range(3):
        items = [dataset[i] for i in range(epoch * len(dataset), (epoch + 1) * len(dataset))]
        counts = Counter(np.concatenate([item["input_ids"] for item in items]).tolist())
        wanted = Counter({EOS: 40, **{51 + n: 3 + 3 * n for n in range(40)}})
        assert sum((wanted - counts).values()) == tokens % 64
        assert not counts - wanted
        assert all((item["document_ids"] >= 0).all() for item in items)


def test_runs_in_a_sequence_are_single_documents(texts: Path) -> None:
    dataset = train(texts)
    for number in range(len(dataset)):
        item = dataset[number]
        runs = item["document_ids"]
        assert runs[0] == 0
        assert set(np.diff(runs)) <= {0, 1}
        for run in range(runs[-1] + 1):
            ids = item["input_ids"][runs == run]
            assert len(set(ids[ids != EOS])) <= 1, "files here hold one character each"
            assert EOS not in ids[:-1]
            assert run == runs[-1] or ids[-1] == EOS


def test_epochs_and_seeds_shuffle_documents_and_sequences(texts: Path) -> None:
    dataset = train(texts)
    epochs = [[text(dataset[e * len(dataset) + i]["input_ids"]) for i in range(len(dataset))] for e in range(2)]
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) != sorted(epochs[1]), "documents are joined in another order too"
    other = train(texts, seed=1)
    assert [text(other[i]["input_ids"]) for i in range(len(other))] != epochs[0]


def test_a_long_document_does_not_fill_consecutive_sequences(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("A" * 64 * 50)
    (tmp_path / "other.txt").write_text("B" * 64 * 50)
    dataset = train(tmp_path)
    letters = [chr(int(dataset[i]["input_ids"][5]) - 3) for i in range(len(dataset))]
    longest = max(len(run) for run in "".join(letters).replace("AB", "A B").replace("BA", "B A").split())
    assert longest < 25


def test_access_is_random_and_has_no_state(texts: Path) -> None:
    forward = train(texts)
    wanted = {i: forward[i] for i in range(3 * len(forward))}
    again = train(texts)
    for i in np.random.default_rng(0).permutation(3 * len(forward)).tolist():
        assert equal(again[i], wanted[i])
    with pytest.raises(IndexError):
        forward[-1]


def test_the_order_is_pinned(texts: Path) -> None:
    """Resuming relies on it: a change here breaks every run that is under way."""
    dataset = train(texts, seed=3)
    pinned = [(59, 2), (87, 0), (1, 3), (82, 1)]
    probes = [dataset[0], dataset[7], dataset[len(dataset)], dataset[10**9]]
    assert [(int(item["input_ids"][10]), int(item["document_ids"][-1])) for item in probes] == pinned


class InMemory(Documents):
    """Documents of numbered tokens: `first`, `first + 1`, ... through them all."""

    def __init__(self, lengths: list[int], first: int = 0) -> None:
        self.lengths = np.array(lengths)
        self._first = first + np.cumsum(self.lengths) - self.lengths

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Token numbers in place of a memory map."""
        assert 0 <= start < stop <= self.lengths[document]
        return np.arange(self._first[document] + start, self._first[document] + stop)


LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@given(lengths=LENGTHS, seq_len=st.integers(2, 50), limit=st.none() | st.integers(1, 5))
def test_evaluation_is_the_documents_cut_into_pieces(lengths: list[int], seq_len: int, limit: int | None) -> None:
    total = sum(lengths)
    dataset = EvaluationSequences(InMemory(lengths), seq_len, limit)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    pieces = -(-total // seq_len)
    assert len(dataset) == (pieces if limit is None else min(limit, pieces))
    for number in range(len(dataset)):
        begin = (number * pieces // len(dataset)) * seq_len
        stop = min(begin + seq_len, total)
        item = dataset[number]
        real = item["document_ids"] >= 0
        assert item["input_ids"][real].tolist() == list(range(begin, stop))
        assert real.tolist() == [True] * (stop - begin) + [False] * (seq_len - stop + begin)
        assert item["document_ids"][real].tolist() == (owner[begin:stop] - owner[begin]).tolist()


@given(lengths=LENGTHS, seq_len=st.integers(2, 50), seed=st.integers(0, 9), epoch=st.integers(0, 3))
def test_training_epochs_are_permutations_of_whole_documents(
    lengths: list[int], seq_len: int, seed: int, epoch: int
) -> None:
    total = sum(lengths)
    if total < seq_len:
        lengths, total = [*lengths, seq_len], total + seq_len
    source = EndlessSource(InMemory(lengths), seq_len, (seed, 0))
    assert len(source) == total // seq_len
    first = epoch * len(source)
    tokens = np.concatenate([source[i]["input_ids"] for i in range(first, first + len(source))])
    assert len(set(tokens.tolist())) == len(tokens) == total // seq_len * seq_len
    # within a run, the tokens of one document follow each other
    for i in range(first, first + len(source)):
        item = source[i]
        within = np.diff(item["document_ids"]) == 0
        assert (np.diff(item["input_ids"])[within] == 1).all()


# Mixing sources

FAR = 10**6  # between the token numbers of two sources


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.01, 10), min_size=4, max_size=4),
)
def test_sources_take_turns_by_weight_and_each_goes_on_where_it_was(sizes: list[int], weights: list[float]) -> None:
    weights = weights[: len(sizes)]
    sources = [EndlessSource(InMemory([8] * size, n * FAR), 8, (0, n)) for n, size in enumerate(sizes)]
    dataset = TrainingSequences(sources, weights)
    mixed = sum(sizes) if len(sizes) == 1 else sum(sizes) * -(-MIXTURE // sum(sizes))
    items = [dataset[i] for i in range(2 * len(dataset))]
    turns = [int(item["input_ids"][0]) // FAR for item in items]
    assert turns[: len(dataset)] == turns[len(dataset) :]
    for number, source in enumerate(sources):
        mine = [item for item, turn in zip(items, turns, strict=True) if turn == number]
        assert all(equal(item, source[nth]) for nth, item in enumerate(mine))
        count = len(mine) // 2
        assert abs(count - max(1.0, weights[number] / sum(weights) * mixed)) <= 1
        so_far = np.cumsum([turn == number for turn in turns[: len(dataset)]])
        assert (np.abs(so_far - np.arange(1, len(dataset) + 1) * count / len(dataset)) <= len(sizes)).all()


@pytest.mark.parametrize(
    "weights",
    [
        [1.0, *[1e-4] * 10],  # less than a sequence of the shortest mixture
        [0.928, *[0.0008] * 90],  # all of these are rounded up
        [0.872, *[0.0006] * 120, *[0.0007] * 80],  # and down
        [1.0, 1e-12],
    ],
)
def test_weights_are_shares_of_many_sources(weights: list[float]) -> None:
    """Within 0.1 % of all tokens, small weights too."""
    sources = [EndlessSource(InMemory([8], n * FAR), 8, (0, n)) for n in range(len(weights))]
    dataset = TrainingSequences(sources, weights)
    turns = [int(dataset[i]["input_ids"][0]) // FAR for i in range(min(len(dataset), 20_000))]
    found = np.bincount(turns, minlength=len(weights)) / len(turns)
    assert np.abs(found - np.array(weights) / sum(weights)).max() < 0.001
    assert len(dataset) <= 2**20 + len(weights)


def test_weights_are_shares_of_the_tokens_whatever_the_sizes(tmp_path: Path) -> None:
    for name, size in (("small", 64 * 4), ("large", 64 * 60)):
        (tmp_path / f"{name}.txt").write_text(name[0] * size)
    paths = [{"path": str(tmp_path / f"{name}.txt"), "weight": w} for name, w in (("small", 3.0), ("large", 1.0))]
    everything = whole(train(paths))
    assert everything.count("s") / len(everything) == pytest.approx(0.75, abs=0.02)


# Formats


def write_formats(folder: Path, column: str = "text") -> None:
    (folder / "a.txt").write_text("from text")
    rows = [{column: "json one", "other": 1}, {column: "json\ntwo", "other": {"deep": [2]}}]
    (folder / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = pyarrow.table({column: ["parquet one", "", "parquet two"], "other": [1, 2, 3]})
    pyarrow.parquet.write_table(table, folder / "c.parquet")


@pytest.mark.parametrize("column", ["text", "body"])
def test_text_jsonl_and_parquet_of_one_folder(tmp_path: Path, column: str) -> None:
    write_formats(tmp_path, column)
    item = evaluation(tmp_path, field=column)[0]
    runs, ids = item["document_ids"], item["input_ids"]
    found = [text(ids[runs == run]) for run in range(runs.max() + 1)]
    assert found == ["from text", "json one", "json\ntwo", "parquet one", "parquet two"]


def test_jsonl_files_may_differ_in_their_other_columns(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one", "n": 1}\n')
    (tmp_path / "b.jsonl").write_text('{"m": "x", "text": "two"}\n')
    assert whole(evaluation(tmp_path)) == "onetwo"


def test_rows_of_every_spelling_and_packing_and_files_without_any_in_one_folder(tmp_path: Path) -> None:
    rows = b'{"id": 1, "meta": {"text": "one"}}\n{"meta": {"text": "two", "n": []}, "id": "x", "new": 0}\n'
    (tmp_path / "a.JSONL.gz").write_bytes(gzip.compress(rows))
    (tmp_path / "b.ndjson.xz").write_bytes(lzma.compress(rows.replace(b"two", b"three")))
    (tmp_path / "c.json.zst").write_bytes(pyarrow.Codec("zstd").compress(b"[]", asbytes=True))
    (tmp_path / "d.jsonl.bz2").write_bytes(bz2.compress(b""))
    pyarrow.parquet.write_table(pyarrow.table({"id": pyarrow.array([], "int8")}), tmp_path / "e.parquet")
    (tmp_path / "f.md").write_text("text")
    dataset = evaluation(tmp_path, field="meta.text")
    assert whole(dataset) == "textonetwoonethree"
    assert dataset.documents["data.eval"].summary == (
        "5 documents, 23 tokens; a document per file: 1 .md; a document per row: 1 .jsonl.gz, 1 .ndjson.xz, 1 .json.zst, "
        "1 .jsonl.bz2, 1 .parquet"
    )


def test_the_format_may_be_said(tmp_path: Path) -> None:
    (tmp_path / "part-00000").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert whole(evaluation(tmp_path, format="json")) == "onetwo"
    assert whole(evaluation(tmp_path, format="text")) == '{"text": "one"}\n{"text": "two"}\n'
    assert "set `format: json`" in refusal(tmp_path)


def test_every_document_knows_its_file(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf")  # nothing but a byte-order mark
    (tmp_path / "aa.jsonl").write_text('{"text": "one"}\n{"text": ""}\n{"text": "two"}\n')
    (tmp_path / "bb.jsonl").write_text('{"text": "three"}\n')
    documents = evaluation(tmp_path).documents["data.eval"]
    names = [documents.file(number).name for number in range(len(documents.lengths))]
    assert names == ["a.txt", "c.txt", "aa.jsonl", "aa.jsonl", "bb.jsonl"]


def test_names_that_look_like_globs_and_uri_are_names(tmp_path: Path) -> None:
    folder = tmp_path / "a[b]"
    folder.mkdir()
    (folder / "x*.txt").write_text("star")
    (folder / "x1.txt").write_text("one")
    assert whole(evaluation(folder)) == "starone"
    assert whole(evaluation(folder / "x*.txt")) == "star"


def test_wrong_bytes_are_replaced_on_request(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9!")
    keys = {"encoding_errors": "replace", "eval": {"path": str(tmp_path)}}
    dataset = open_dataset(config("unused", **keys), "eval", VOCAB, 0)
    assert text(dataset[0]["input_ids"]) == "caf\ufffd!"


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("before")
    assert whole(evaluation(file)) == "before"
    file.write_text("after!")
    os.utime(file, (time.time() + 5, time.time() + 5))
    assert whole(evaluation(file)) == "after!"


# Files


def test_find_files_order_exclusion_and_repetition(tmp_path: Path) -> None:
    names = ["b/z.py", "b/a.py", "a.py", "test/t.py", "b/test/t.py", ".hidden/h.py", "b/notes.md", "b/empty.py"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("" if "empty" in name else name)

    def found(patterns: list[str], exclude: list[str]) -> list[str]:
        absolute = [f"{tmp_path}/{pattern}" for pattern in patterns]
        return [file.relative_to(tmp_path.resolve()).as_posix() for file in find_files(absolute, exclude)]

    assert found(["**/*.py"], []) == ["a.py", "b/a.py", "b/test/t.py", "b/z.py", "test/t.py"]
    assert found(["**/*.py"], ["test"]) == ["a.py", "b/a.py", "b/test/t.py", "b/z.py"]
    assert found(["**/*.py"], ["**/test"]) == ["a.py", "b/a.py", "b/z.py"]
    assert found([""], ["b", "test"]) == ["a.py"]
    assert found(["b"], ["*.md", "test/*"]) == ["b/a.py", "b/z.py"]
    assert found(["b/z.py", "b/*.py", "b/z.py"], []) == ["b/z.py", "b/a.py"]
    assert found([".hidden/h.py"], []) == [".hidden/h.py"]


def test_evaluation_files_are_held_out_of_every_source(texts: Path) -> None:
    (texts.parent / "link.txt").symlink_to(texts / "39.txt")
    held_out = {"path": [str(texts / "3?.txt")]}
    dataset = train(
        [{"path": str(texts)}, {"path": [str(texts / "*.txt"), str(texts.parent / "link.txt")]}], eval=held_out
    )
    seen = set(whole(dataset))
    assert seen <= {chr(48 + n) for n in range(30)}
    assert set(whole(open_dataset(config("unused", eval=held_out), "eval", VOCAB, 0))) == {
        chr(48 + n) for n in range(30, 40)
    }


# Tokenizers


def test_a_tokenizer_folder_and_its_digest(tmp_path: Path, texts: Path) -> None:
    def save(name: str, words: list[str], eos: str | None) -> str:
        inner = Tokenizer(WordLevel({word: n for n, word in enumerate(["?", *words])}, unk_token="?"))
        inner.pre_tokenizer = WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?", eos_token=eos).save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    first, second = save("first", ["ape", "bee", "<e>"], "<e>"), save("second", ["bee", "ape", "<e>"], "<e>")
    (tmp_path / "animals.txt").write_text("ape bee cat")
    for name, ids in ((first, [1, 2, 0, 3]), (second, [2, 1, 0, 3]), (first, [1, 2, 0, 3])):
        keys = {"tokenizer": name, "eval": {"path": str(tmp_path / "animals.txt")}}
        item = open_dataset(config("unused", **keys), "eval", 4, 0)[0]
        assert item["input_ids"][:4].tolist() == ids
        assert (item["document_ids"] >= 0).sum() == 4
    assert tokenizer_digest(load_tokenizer(first)) == tokenizer_digest(load_tokenizer(first))
    assert tokenizer_digest(load_tokenizer(first)) != tokenizer_digest(load_tokenizer(second))
    with pytest.raises(ValueError, match="has no eos token"):
        load_tokenizer(save("endless", ["ape"], None))
    with pytest.raises(ValueError, match=r"neither .* nor a folder"):
        load_tokenizer("gpt2")
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(str(texts))


def test_the_cache_tells_prefixes_apart(tmp_path: Path) -> None:
    """The tokenizer and the files are the same."""
    (tmp_path / "animals.txt").write_text("ape bee")
    inner = Tokenizer(WordLevel({"?": 0, "ape": 1, "bee": 2, "<s>": 3, "</s>": 4}, unk_token="?"))
    inner.pre_tokenizer = WhitespaceSplit()
    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="?")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for bos, ids in ((None, [3, 1, 2, 4]), (False, [1, 2, 4]), (True, [3, 1, 2, 4]), (False, [1, 2, 4])):
        keys = {"tokenizer": str(tmp_path / "tokenizer"), "bos": bos, "eval": {"path": str(tmp_path / "animals.txt")}}
        item = open_dataset(config("unused", **keys), "eval", 5, 0)[0]
        assert item["input_ids"][item["document_ids"] >= 0].tolist() == ids


# Refusals


def refusal(path: object, **keys: Any) -> str:
    with pytest.raises(ValueError) as caught:
        open_dataset(config("unused", eval={"path": str(path), **keys}), "eval", VOCAB, 0)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("latin.txt", b"caf\xe9", "is not UTF-8 text"),
        ("program.so", b"\x7fELF\x00\x01\xff\xfe", "is not UTF-8 text"),
        ("broken.jsonl", b'{"text": "a"}\n{"te', "cannot be read as json"),
        ("broken.parquet", b"PAR1 not really", "cannot be read as parquet"),
        ("other.jsonl", b'{"body": "a"}\n', "has no field 'text'; it has ['body']"),
        ("numbers.jsonl", b'{"text": 3}\n', "field 'text' holds"),
        ("gap.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "line 2 has no field 'text'; it has ['body']"),
    ],
)
def test_unreadable_files_are_named_with_the_cause(
    tmp_path: Path, cache: Path, name: str, content: bytes, cause: str
) -> None:
    for other in range(3):
        (tmp_path / f"good{other}.txt").write_text("good")
    (tmp_path / name).write_bytes(content)
    message = refusal(tmp_path)
    assert str(tmp_path / name) in message
    assert cause in message
    names = [file.name for file in cache.rglob("*") if file.suffix != ".lock"]
    assert not [name for name in names if "incomplete" in name or name.startswith("tmp")]


def test_missing_and_empty_data(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "rows.jsonl").write_text('{"text": ""}\n')
    assert "nowhere' matches no file" in refusal(tmp_path / "nowhere")
    assert "matches no file" in refusal(tmp_path / "*.csv")
    assert "1 files, 0 of them excluded, 1 empty" in refusal(tmp_path / "empty.txt")
    assert "2 files, 2 of them excluded" in refusal(tmp_path, exclude=["*"])
    assert "rows.jsonl'] is empty: its files hold no text" in refusal(tmp_path / "rows.jsonl")


def test_refusals_of_whole_datasets(texts: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.eval is not set"):
        open_dataset(config(texts), "eval", VOCAB, 0)
    with pytest.raises(ValueError, match=r"all its files are held out by data\.eval\.path"):
        train(texts, eval={"path": str(texts)})
    with pytest.raises(ValueError, match=r"data\.eval|nowhere"):
        train(texts, eval={"path": str(texts / "nowhere")})
    with pytest.raises(ValueError, match=r"data\.sources\.0 .* has 4 tokens, fewer than one sequence .* 64"):
        train(texts / "00.txt")
    assert len(evaluation(texts / "00.txt")) == 1, "an evaluation may be short"
    with pytest.raises(ValueError, match=r"token id 90 .* vocabulary of 90; it needs vocab_size >= 91"):
        open_dataset(config(texts), "train", 90, 0)
    assert len(open_dataset(config(texts), "train", 91, 0))


# Ranks, size, speed

OPEN = """
import hashlib, sys
from ring_hilbert.training.config import DataConfig
from ring_hilbert.training.data import open_dataset
dataset = open_dataset(DataConfig(sources=[{"path": [sys.argv[1]]}], seq_len=64), "train", 384, 5)
items = [dataset[i] for i in range(2 * len(dataset))]
print(hashlib.sha256(b"".join(v.tobytes() for item in items for v in item.values())).hexdigest())
"""


def test_processes_that_open_the_same_data_at_once_see_the_same(texts: Path, tmp_path: Path) -> None:
    def start(rank: int) -> subprocess.Popen[str]:
        environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "RANK": str(rank), "PYTHONHASHSEED": str(rank)}
        command = [sys.executable, "-c", OPEN, str(texts)]
        return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)

    ranks = [start(rank) for rank in range(2)]
    results = [process.communicate(timeout=120)[0].strip() for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0]
    assert len(set(results)) == 1
    assert len(results[0]) == 64


def test_tokens_are_views_of_the_memory_map(texts: Path) -> None:
    tokens = train(texts).documents["data.sources.0"].tokens(39, 0, 10)
    assert tokens.dtype == np.uint16, "the smallest for ByT5's 384 ids"
    assert not tokens.flags.owndata
    assert not tokens.flags.writeable
    assert pyarrow.total_allocated_bytes() < 10**6


def test_a_sequence_of_8192_tokens_takes_less_than_10_ms(tmp_path: Path) -> None:
    rows = (json.dumps({"text": "word " * (1 + n % 9)}) for n in range(20000))
    (tmp_path / "short.jsonl").write_text("\n".join(rows))
    dataset = open_dataset(config(tmp_path, seq_len=8192), "train", VOCAB, 0)
    dataset[0]
    start = time.perf_counter()
    for i in range(20):
        dataset[i % len(dataset)]
    assert (time.perf_counter() - start) / 20 < 0.01
