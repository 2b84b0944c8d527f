# SPDX-License-Identifier: Apache-2.0
"""Data prepared elsewhere: the same to the byte however they were written, opened without the source files, refused if faulty."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from ring_hilbert.cli import main
from ring_hilbert.training import batches, encoding, prepare, reading
from ring_hilbert.training.config import DataConfig
from ring_hilbert.training.content import contents
from ring_hilbert.training.data import PackedDataset, open_dataset
from ring_hilbert.training.documents import VERSION
from ring_hilbert.training.loop import pretrain
from ring_hilbert.training.metrics import read_metrics
from ring_hilbert.training.prepare import locked
from ring_hilbert.training.prepared import prepare as prepare_folder
from ring_hilbert.training.prepared import with_prepared
from tests.harness.tiny_run import SEQ_LEN, tiny_config, write_texts
from tests.training.test_data import ROOT, VOCAB, equal, whole

WORDS = ["ape", "bee", "cat", "dog", "eel", "<e>", "?"]

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Rows and files, words of five animals."""
    folder, draw = tmp_path / "texts", np.random.default_rng(0)
    folder.mkdir()
    some = [" ".join(draw.choice(WORDS[:5], n)) for n in draw.integers(1, 60, 90)]
    for number in range(30):
        (folder / f"{number:02}.txt").write_text(some[number])
    for name, part in (("a", some[30:60]), ("b", some[60:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    return folder


def words(folder: Path) -> str:
    inner = Tokenizer(WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="?"))
    inner.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?", eos_token="<e>").save_pretrained(folder)
    return str(folder)


def config(texts: Path, prepared: Path | None, **keys: Any) -> DataConfig:
    sources = [{"path": str(texts / "*.txt"), "weight": 3.0}, {"path": str(texts / "*.jsonl")}]
    folder = None if prepared is None else str(prepared)
    return DataConfig.model_validate({"sources": sources, "seq_len": 64, "prepared": folder, **keys})


def opened(prepared: Path, split: str = "train", **keys: Any) -> PackedDataset:
    data = DataConfig.model_validate({"prepared": str(prepared), "seq_len": 64, **keys})
    return open_dataset(data, split, VOCAB)  # type: ignore[arg-type]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def parts(folder: Path) -> dict[str, bytes]:
    """All but the manifest, which names the folder it was told to write."""
    return {name: data for name, data in files(folder).items() if name != "manifest.json"}


# Writing


def test_interrupted_anywhere_and_gone_on_it_is_the_same_to_the_byte(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "CHARACTERS", 500)
    monkeypatch.setattr(prepare, "SAVED", 0.0)
    held_out = {"path": str(texts / "2*.txt")}
    prepare_folder(config(texts, tmp_path / "whole", eval=held_out), lambda _: None)
    append, left = prepare._append, [0]

    def full_disk(columns: dict[str, Any], *rest: Any) -> None:
        left[0] -= 1
        append(columns, *rest)
        if left[0] < 0:
            for file in columns.values():  # what was written since the last note may be there in part, or be garbage
                file.write(b"torn")
            raise OSError("no space left on device")

    monkeypatch.setattr(prepare, "_append", full_disk)
    interruptions = 0
    while True:
        left[0] = interruptions % 3
        try:
            prepare_folder(config(texts, tmp_path / "parts", eval=held_out), lambda _: None)
            break
        except OSError:
            interruptions += 1
            with pytest.raises(ValueError, match=r"holds no manifest.json: .*has not finished"):
                opened(tmp_path / "parts")
    assert interruptions > 10
    assert parts(tmp_path / "parts") == parts(tmp_path / "whole")


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Small batches, all but two of them for other processes; what these were asked to do."""
    asked: list[str] = []
    start, submit = encoding._start, encoding.ProcessPoolExecutor.submit

    def started(pool: Any) -> threading.Thread:
        thread = start(pool)
        thread.join()
        return thread

    def submitted(pool: Any, function: Callable[..., Any], *some: Any) -> Any:
        asked.append(function.__name__)
        return submit(pool, function, *some)

    monkeypatch.setattr(reading, "CHARACTERS", 200)
    monkeypatch.setattr(encoding, "ALONE", -1.0)
    monkeypatch.setattr(encoding, "_start", started)
    monkeypatch.setattr(encoding.ProcessPoolExecutor, "submit", submitted)
    return asked


def test_several_processes_write_what_one_does(tmp_path: Path, texts: Path, processes: list[str]) -> None:
    data = {"tokenizer": words(tmp_path / "words")}
    prepare_folder(config(texts, tmp_path / "one", workers=1, **data), lambda _: None)
    assert not processes
    prepare_folder(config(texts, tmp_path / "three", workers=3, **data), lambda _: None)
    assert processes.count("_encode_there") > 30
    assert parts(tmp_path / "three") == parts(tmp_path / "one")
    assert np.load(tmp_path / "one" / "data.sources.0" / "tokens.npy").dtype == np.uint8, "seven ids"


PREPARE = """
import os, sys
from ring_hilbert.training import encoding, prepare
from ring_hilbert.cli import main
encoding.ALONE, prepare.SAVED = -1.0, 0.05
encoding._start = lambda pool, start=encoding._start: (thread := start(pool), thread.join())[0]
prepare._append = lambda *a, append=prepare._append: (append(*a), print("batch", os.getpid(), flush=True))
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.full
@pytest.mark.parametrize("after", [1, 4, 30])
def test_killed_and_started_again_it_is_the_same_and_no_process_stays(tmp_path: Path, after: int) -> None:
    draw = np.random.default_rng(0)
    rows = (json.dumps({"text": " ".join(draw.choice(WORDS, 40))}) for _ in range(150_000))
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    script = tmp_path / "script.py"
    script.write_text(PREPARE)

    def start(output: str) -> subprocess.Popen[str]:
        flags = [
            "prepare-data",
            "--sources",
            str(tmp_path / "rows.jsonl"),
            "--workers",
            "2",
            "--output",
            str(tmp_path / output),
        ]
        command = [sys.executable, str(script), *flags, "--tokenizer", words(tmp_path / "words")]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)

    killed = start("killed")
    assert killed.stdout is not None
    for _ in range(after):
        assert killed.stdout.readline().startswith("batch")
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    deadline = time.monotonic() + 30
    while subprocess.run(["pgrep", "-s", str(killed.pid)], stdout=subprocess.DEVNULL, check=False).returncode == 0:
        assert time.monotonic() < deadline, "processes of the killed one are still there"
        time.sleep(0.2)
    for output in ("killed", "whole"):
        process = start(output)
        process.communicate(timeout=200)
        assert process.returncode == 0
    assert parts(tmp_path / "killed") == parts(tmp_path / "whole")


def test_a_process_that_dies_is_an_error_and_the_work_goes_on(
    tmp_path: Path, texts: Path, processes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    append = prepare._append

    def killing(*some: Any) -> None:
        append(*some)
        for process in multiprocessing.active_children() if "_encode_there" in processes else []:
            process.kill()

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_append", killing)
        with pytest.raises(OSError, match=r"was killed.*the same command resumes.*data\.workers"):
            prepare_folder(config(texts, tmp_path / "folder", workers=2), lambda _: None)
    prepare_folder(config(texts, tmp_path / "folder"), lambda _: None)
    assert len(opened(tmp_path / "folder"))


def test_other_data_in_a_finished_folder_and_folders_of_something_else_are_left_alone(
    tmp_path: Path, texts: Path
) -> None:
    prepare_folder(config(texts, tmp_path / "folder"), lambda _: None)
    before = files(tmp_path / "folder")
    prepare_folder(config(texts, tmp_path / "folder"), lambda _: None)
    assert files(tmp_path / "folder") == before
    (texts / "00.txt").write_text("changed")
    with pytest.raises(ValueError, match=r"folder/data.sources.0 was prepared with other files.*remove it"):
        prepare_folder(config(texts, tmp_path / "folder"), lambda _: None)
    assert files(tmp_path / "folder") == before
    (tmp_path / "mine" / "data.sources.0").mkdir(parents=True)
    (tmp_path / "mine" / "data.sources.0" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"thesis.txt does not belong"):
        prepare_folder(config(texts, tmp_path / "mine"), lambda _: None)
    (tmp_path / "mine" / "novel.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"novel.txt does not belong"):
        prepare_folder(config(texts, tmp_path / "mine"), lambda _: None)
    assert (tmp_path / "mine" / "data.sources.0" / "thesis.txt").read_text() == "mine"


def test_files_that_change_while_they_are_read_are_no_data(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = prepare._append

    def changing(*some: Any) -> None:
        (texts / "00.txt").write_text("changed meanwhile")
        append(*some)

    monkeypatch.setattr(prepare, "_append", changing)
    with pytest.raises(ValueError, match="files changed while they were read"):
        prepare_folder(config(texts, tmp_path / "folder"), lambda _: None)


# Reading


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_a_run_reads_the_same_prepared_or_not_and_needs_nothing_else(tmp_path: Path, texts: Path, packing: str) -> None:
    keys = {"tokenizer": words(tmp_path / "words"), "eval": {"path": str(texts / "2*.txt"), "sequences": 3}}
    own = config(texts, None, packing=packing, **keys)
    wanted = {split: open_dataset(own, split, 7) for split in ("train", "eval")}  # type: ignore[arg-type]
    prepare_folder(config(texts, tmp_path / "there", **keys), lambda _: None)
    (tmp_path / "there").rename(tmp_path / "here")
    shutil.rmtree(texts)
    shutil.rmtree(tmp_path / "words")
    found = {split: opened(tmp_path / "here", split, packing=packing) for split in ("train", "eval")}
    for split, dataset in wanted.items():
        assert len(found[split]) == len(dataset)
        for number in range(len(dataset) * (3 if split == "train" else 1)):
            assert equal(found[split][number], dataset[number])
        assert contents(found[split].documents) == contents(dataset.documents)
    resolved = with_prepared(DataConfig(prepared=str(tmp_path / "here"), seq_len=64))
    assert resolved.sources is not None and [source.weight for source in resolved.sources] == [3.0, 1.0]
    assert resolved.tokenizer == str(tmp_path / "here" / "tokenizer")
    assert with_prepared(resolved) == resolved
    said = config(texts, tmp_path / "here", packing=packing, **keys)  # the configuration that it was prepared with
    assert equal(open_dataset(said, "train", 7)[5], wanted["train"][5])


@pytest.mark.parametrize(
    ("keys", "difference"),
    [
        (
            {"sources": [{"path": "elsewhere/*.txt"}, {"path": "b"}]},
            r"data.sources.0.path: \['.*txt'\] in the folder, now",
        ),
        ({"sources": [{"path": "a"}]}, "data.sources: 2 of them in the folder, now 1"),
        ({"bos": True}, "data.bos: None in the folder, now True"),
        ({"encoding_errors": "replace"}, "data.encoding_errors: strict in the folder, now replace"),
        ({"eval": {"path": "x"}}, "data.eval.path: none in the folder"),
        ({"tokenizer": "other"}, "data.tokenizer: bytes in the folder, now .*other, a different one"),
        ({"tokenizer": "nowhere"}, "data.tokenizer: bytes in the folder, now nowhere, a different one"),
    ],
)
def test_a_configuration_that_says_something_else_is_refused(
    tmp_path: Path, texts: Path, keys: dict[str, Any], difference: str
) -> None:
    prepare_folder(config(texts, tmp_path / "folder"), lambda _: None)
    if keys.get("tokenizer") == "other":
        keys = {"tokenizer": words(tmp_path / "other")}
    with pytest.raises(ValueError, match=f"differs from the configuration: {difference}"):
        opened(tmp_path / "folder", **keys)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def flip(path: Path) -> None:
    """The first number of a column, any byte of others."""
    data = bytearray(path.read_bytes())
    data[128 if path.suffix == ".npy" else 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, lengthen, flip, Path.unlink])
@pytest.mark.parametrize(
    "name",
    [
        *(
            f"data.sources.1/{name}"
            for name in ("tokens.npy", "lengths.npy", "hashes.npy", "files.npy", "paths.json", "part.json")
        ),
        "manifest.json",
        "tokenizer/tokenizer_config.json",
    ],
)
def test_truncated_missing_and_changed_files_are_named(
    tmp_path: Path, texts: Path, name: str, damage: Callable[[Path], None]
) -> None:
    prepare_folder(config(texts, tmp_path / "folder"), lambda _: None)
    damage(tmp_path / "folder" / name)
    file = re.escape(name.replace("tokenizer/tokenizer_config.json", "tokenizer"))
    with pytest.raises(
        ValueError, match=rf"folder/{file}|folder/data.sources.1 holds no part.json|folder holds no manifest.json"
    ):
        opened(tmp_path / "folder")


@pytest.mark.parametrize("name", ["manifest.json", "data.sources.0/part.json"])
def test_a_record_with_any_other_byte_is_refused(tmp_path: Path, texts: Path, name: str) -> None:
    """A digit of a weight or of the largest id, for one, would still be JSON."""
    prepare_folder(config(texts, tmp_path / "folder"), lambda _: None)
    path = tmp_path / "folder" / name
    written = path.read_bytes()
    digits = [place for place, byte in enumerate(written) if chr(byte).isdigit()]
    for place in [*range(0, len(written), 37), *digits[::5]]:
        path.write_bytes(written[:place] + bytes([written[place] ^ 1]) + written[place + 1 :])
        with pytest.raises(ValueError, match=re.escape(f"folder/{name}")):
            opened(tmp_path / "folder")
    path.write_text(json.dumps({"version": VERSION}))
    with pytest.raises(ValueError, match=re.escape(f"folder/{name} is not the one that belongs here")):
        opened(tmp_path / "folder")


def test_foreign_files_are_named(tmp_path: Path, texts: Path) -> None:
    for name, keys in (("folder", {}), ("other", {"encoding_errors": "replace"})):
        prepare_folder(config(texts, tmp_path / name, **keys), lambda _: None)
    folder, other = tmp_path / "folder", tmp_path / "other"
    for stray in (
        folder / "x.npy",
        folder / ".hidden",
        folder / "data.sources.0" / "y.bin",
        folder / "tokenizer" / "z.json",
    ):
        stray.write_text("")
        with pytest.raises(ValueError, match=f"{stray.name} does not belong|tokenizer is not the tokenizer"):
            opened(folder)
        stray.unlink()
    (folder / "data.sources.0" / "tokens.npy").rename(tmp_path / "kept.npy")
    same = np.load(tmp_path / "kept.npy")
    np.save(folder / "data.sources.0" / "tokens.npy", same[::-1].copy())
    with pytest.raises(
        ValueError, match=r"data.sources.0/tokens.npy is not the file written here: document 0 has different"
    ):
        opened(folder)
    (tmp_path / "kept.npy").replace(folder / "data.sources.0" / "tokens.npy")
    assert len(opened(folder))
    shutil.rmtree(folder / "data.sources.1")
    shutil.copytree(other / "data.sources.1", folder / "data.sources.1")
    with pytest.raises(ValueError, match=r"data.sources.1 does not belong in .*folder: it was prepared separately"):
        opened(folder)


@pytest.mark.slow
def test_a_run_goes_on_with_its_data_prepared(tmp_path: Path) -> None:
    """Its checkpoint is of the same data and configuration, though neither sources nor eval are given any more."""
    write_texts(tmp_path)

    def run(folder: str, steps: int, **keys: Any) -> list[float]:
        places = {
            "checkpoint__dir": str(tmp_path / folder / "checkpoints"),
            "log__dir": str(tmp_path / folder / "logs"),
        }
        asked = tiny_config(tmp_path, train__steps=steps, optim__decay_steps=2, checkpoint__every=1, **places)
        if keys:
            asked = asked.model_copy(update={"data": DataConfig(seq_len=SEQ_LEN, **keys)})
        pretrain(asked)
        lines = read_metrics(tmp_path / folder / "logs" / "metrics.jsonl")
        return [line["loss"] for line in lines if line["kind"] == "train"]

    prepare_folder(tiny_config(tmp_path).data.model_copy(update={"prepared": str(tmp_path / "there")}), lambda _: None)
    run("parts", 1)
    assert run("parts", 2, prepared=str(tmp_path / "there")) == run("whole", 2)


# Held out


def hashes(dataset: PackedDataset) -> set[int]:
    """Of all documents, asked for some at a time."""
    found = (
        source.hashes(start, start + 7)
        for source in dataset.documents.values()
        for start in range(0, len(source.lengths), 7)
    )
    return set(np.concatenate(list(found)).tolist())


def test_what_is_held_out_stays_so_when_it_moves_or_is_joined(tmp_path: Path, texts: Path) -> None:
    """By content: neither by the path of a file nor by which file it is in."""
    held_out = tmp_path / "held_out"
    held_out.mkdir()
    for name in ("03.txt", "04.txt"):
        shutil.copy(texts / name, held_out / f"other-{name}")
    again = (texts / "04.txt").read_text()
    with (texts / "a.jsonl").open("a") as file:
        file.write(json.dumps({"text": again}) + "\n")
    dataset = open_dataset(config(texts, None, eval={"path": str(held_out)}), "train", VOCAB)
    sources = dataset.documents
    assert [len(documents.lengths) for documents in sources.values()] == [28, 60]
    assert sources["data.sources.0"].summary.startswith("28 of 30 documents, ")
    evaluated = open_dataset(config(texts, None, eval={"path": str(held_out)}), "eval", VOCAB)
    assert not hashes(evaluated) & hashes(dataset)
    names = [sources["data.sources.0"].file(number).name for number in range(28)]
    assert names == [f"{number:02}.txt" for number in range(30) if number not in (3, 4)]


def test_a_share_is_the_same_documents_wherever_they_lie(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    share = {"eval": {"share": 0.3}}
    monkeypatch.setattr("ring_hilbert.training.data.PART", 16)  # of 90 documents
    monkeypatch.setattr("ring_hilbert.training.documents.SUMMED", 64)

    def split(data: DataConfig) -> list[set[int]]:
        return [hashes(open_dataset(data, split, VOCAB)) for split in ("train", "eval")]  # type: ignore[arg-type]

    train, held_out = split(config(texts, None, **share))
    assert not train & held_out
    assert 10 < len(held_out) < 45
    joined = tmp_path / "joined"
    joined.mkdir()
    everything = [path.read_text() for path in texts.glob("*.txt")]
    everything += [json.loads(line)["text"] for path in texts.glob("*.jsonl") for line in path.read_text().splitlines()]
    (joined / "all.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in everything))
    one = DataConfig.model_validate({"sources": [{"path": str(joined)}], "seq_len": 64, **share})
    assert split(one) == [train, held_out]
    prepare_folder(config(texts, tmp_path / "folder"), lambda _: None)  # the share may be chosen later
    assert split(DataConfig.model_validate({"prepared": str(tmp_path / "folder"), "seq_len": 64, **share})) == [
        train,
        held_out,
    ]
    sequences = whole(open_dataset(one, "eval", VOCAB))
    with pytest.raises(ValueError, match="takes none of the documents"):
        open_dataset(one.model_copy(update={"eval": one.eval.model_copy(update={"share": 1e-9})}), "eval", VOCAB)  # type: ignore[union-attr]
    assert sequences


# Ranks


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
@pytest.mark.parametrize("epoch", [0, 7])
def test_the_same_sequences_in_the_same_order_at_any_dp_sp_and_micro_batch(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch, packing: str, epoch: int
) -> None:
    """A step's sequences from the cursor on, whichever rank reads them, even across epochs; each rank opens the data itself."""
    prepare_folder(config(texts, tmp_path / "folder"), lambda _: None)
    monkeypatch.setattr(batches.Batches, "shard", lambda _, full: [row.numpy().tobytes() for row in full["input_ids"]])
    wanted = opened(tmp_path / "folder", packing=packing, seq_len=SEQ_LEN)

    class Place:
        sp_group, device, together = None, None, staticmethod(nullcontext)

        def __init__(self, dp_index: int) -> None:
            self.dp_index = dp_index

    for first in (epoch * len(wanted), epoch * len(wanted) + len(wanted) - 5):
        sequences = [wanted[number]["input_ids"].tobytes() for number in range(first, first + 12)]
        assert len(set(sequences)) > 6
        for dp, sp, micro in ((1, 1, 1), (1, 8, 12), (2, 1, 3), (4, 2, 3), (12, 1, 1)):
            changes = {"parallel__dp_shard": dp, "parallel__sp": sp, "train__micro_batch": micro}
            run = tiny_config(tmp_path, **changes, train__global_batch_tokens=12 * SEQ_LEN)
            data = [opened(tmp_path / "folder", packing=packing, seq_len=SEQ_LEN) for _ in range(dp)]
            ranks = [
                batches.Batches(data[rank // sp], run, None, Place(rank // sp)).of(first, first + 12)  # type: ignore[arg-type]
                for rank in range(dp * sp)
            ]
            assert all(ranks[rank] == ranks[rank // sp * sp] for rank in range(dp * sp)), "sp ranks share a sequence"
            rounds = zip(*ranks[::sp], strict=True)
            assert [found for turn in rounds for micro_batch in turn for found in micro_batch] == sequences


def test_what_was_read_ahead_is_what_is_asked_for_or_nothing(tmp_path: Path) -> None:
    loaded: list[tuple[int, int]] = []

    class Counted(batches.Batches):
        def load(self, first: int, stop: int, number: int) -> dict[str, Any]:
            loaded.append((first, stop))
            return {"numbers": (first, stop, number)}

    class Place:
        sp_group, device, dp_index = None, None, 0

    run = tiny_config(tmp_path, train__micro_batch=2, train__global_batch_tokens=4 * SEQ_LEN)
    made = Counted([], run, None, Place())  # type: ignore[arg-type]
    wanted = [{"numbers": (4, 8, number)} for number in range(2)]
    made.read_ahead(4, 8)
    assert made.of(4, 8) == wanted and loaded == [(4, 8)] * 2
    assert made.of(4, 8) == wanted and loaded == [(4, 8)] * 4, "read twice, loaded twice"
    made.read_ahead(8, 12)
    assert made.of(4, 8) == wanted, "a run that went back"
    loaded.clear()
    assert made.of(8, 12) == [{"numbers": (8, 12, number)} for number in range(2)] and loaded, "and forgot"


# The command line


def test_the_commands(tmp_path: Path, texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "folder")
    flags = [
        "--sources",
        str(texts / "*.txt"),
        str(texts / "*.jsonl"),
        "--eval",
        str(texts / "00.txt"),
        "--output",
        folder,
    ]
    assert main(["prepare-data", *flags]) == 0
    assert "data.sources.1: 60 documents, " in capsys.readouterr().out
    assert main(["data-info", folder, "--seq-len", "64", "--sample", "20", "--verify"]) == 0
    out = capsys.readouterr().out
    assert "data.sources.0: 29 documents, " in out
    assert "% of the tokens, weight 1 of 2, all tokens verified" in out
    assert "data.eval: 1 documents" in out and "held out" in out
    assert re.search(r"best_fit: \d+ sequences of 64: \d+\.\d\d% padding, \d+\.\d\d% of documents cut", out)
    assert re.search(r"document 14, from .*15.txt, begins: '[a-z]{3} [a-z ]*'", out)
    assert re.search(r"^ +64 \.\. 127 +\d+ +\d+\.\d\d%$", out, re.MULTILINE)
    path = tmp_path / "folder" / "data.sources.1" / "tokens.npy"
    data = bytearray(path.read_bytes())
    data[128 + 2 * 80] ^= 1
    path.write_bytes(data)
    assert main(["data-info", folder, "--verify"]) == 2
    assert "data.sources.1/tokens.npy is not the file written here" in capsys.readouterr().err
    assert main(["data-info", str(texts)]) == 2
    assert "holds no manifest.json" in capsys.readouterr().err
    assert main(["prepare-data", "--output", folder]) == 2
    assert "give either --config FILE or --sources PATH" in capsys.readouterr().err


def test_the_folder_may_be_the_one_that_it_is_called_in(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["prepare-data", "--sources", str(texts), "--output", "."]) == 0
    assert len(opened(tmp_path / "here"))


def test_who_waits_for_another_process_says_so_apart_from_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def enter() -> None:
        with locked(tmp_path / "part"):
            pass

    said, deadline = "", time.monotonic() + 60
    with ThreadPoolExecutor(1) as pool, locked(tmp_path / "part"):
        waiting = pool.submit(enter)
        while "another process" not in said and time.monotonic() < deadline:
            out, err = capsys.readouterr()
            assert not out
            said += err
            time.sleep(0.01)
        assert not waiting.done()
    waiting.result(60)
    assert "part is being prepared by another process" in said
