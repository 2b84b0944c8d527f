# SPDX-License-Identifier: Apache-2.0
"""Data at scale: tokenising against the tokenizer alone, opening many documents, packing.

tokenising: megabytes of text per second, including reading and writing, against `tokenizer.encode_batch` on the same number of
cores, which does neither; with a BPE tokenizer of 32768 ids trained on the standard library's files, on rows of these files.
opening: seconds, and the process's memory beyond its imports, for documents of 20 to 100 random tokens, reading sequences from
three shuffled epochs. packing: padding and cuts on the standard library's files, by bytes and by that BPE.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ring_hilbert.training.config import DataConfig
from ring_hilbert.training.content import contents
from ring_hilbert.training.data import open_dataset
from ring_hilbert.training.documents import COLUMNS, PATHS, RECORD, VERSION, checked, content_hash
from ring_hilbert.training.prepare import write_record
from ring_hilbert.training.prepared import prepare, write_manifest
from ring_hilbert.training.tokens import load_tokenizer

VOCAB = 32768
SOURCE = {
    "path": [f"{Path(sysconfig.get_path('stdlib')).as_posix()}/**/*.py"],
    "exclude": ["site-packages", "**/test", "**/tests"],
}
WHAT = ("tokenising", "opening", "packing")
READ = 500  # sequences read from each of three epochs


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags of `bench data`."""
    parser.add_argument("--what", nargs="+", default=list(WHAT), metavar="NAME", help="default: all three")
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2], metavar="N", help="that tokenise; default: 1 2")
    parser.add_argument("--megabytes", type=int, default=200, metavar="N", help="of text for each core; default: 200")
    parser.add_argument("--documents", type=int, default=10**7, metavar="N", help="that are opened; default: 10000000")


def rows(chosen: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One record per figure.

    Raises:
        ValueError: for an unknown measurement, or more cores than there are.
    """
    wrong = set(chosen.what) - set(WHAT)
    cores = sorted(os.sched_getaffinity(0))
    if wrong or max(chosen.cores) > len(cores):
        asked = wrong or max(chosen.cores)
        raise ValueError(f"--what knows {', '.join(WHAT)}, and --cores at most {len(cores)}; got {asked}")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if {"tokenising", "packing"} & set(chosen.what):
            _learn(folder / "bpe")
        if "tokenising" in chosen.what:
            for count in chosen.cores:
                _write_rows(folder / "rows.jsonl", chosen.megabytes * count * 10**6)
                yield from _apart("tokenising", folder, cores[:count])
        if "opening" in chosen.what:
            _write_part(folder / "many", chosen.documents)
            yield from _apart("opening", folder, cores)
        if "packing" in chosen.what:
            yield from _packing(folder)


def _record(what: str, setting: str, quantity: str, value: float) -> dict[str, Any]:
    return {"what": what, "setting": setting, "quantity": quantity, "value": f"{value:.5g}"}


def _apart(what: str, folder: Path, cores: list[int]) -> list[dict[str, Any]]:
    """The records measured in a separate process, on these cores."""
    environment = os.environ | {"RAYON_NUM_THREADS": str(len(cores)), "TOKENIZERS_PARALLELISM": "true"}
    command = [sys.executable, "-m", "ring_hilbert.bench.data", what, str(folder), *map(str, cores)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _learn(folder: Path) -> None:
    """Train a byte-level BPE tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0]).save_pretrained(folder)


def _texts() -> Iterator[str]:
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield path.read_text(encoding="utf-8", errors="replace")


def _write_rows(path: Path, size: int) -> None:
    texts, written = list(_texts()), 0
    with path.open("w") as file:
        while written < size:
            for text in texts:
                file.write(json.dumps({"text": text}) + "\n")
                written += len(text.encode())
                if written >= size:
                    return


def _tokenising(folder: Path, cores: list[int]) -> list[dict[str, Any]]:
    os.sched_setaffinity(0, cores)
    with (folder / "rows.jsonl").open() as file:
        texts = [json.loads(line)["text"] for line in file]
    size = sum(len(text.encode()) for text in texts) / 1e6
    name = str(folder / "bpe")
    tokenizer: Any = load_tokenizer(name).backend_tokenizer
    start = time.perf_counter()
    for first in range(0, len(texts), 1000):
        tokenizer.encode_batch(texts[first : first + 1000])
    alone = size / (time.perf_counter() - start)
    raw = {"sources": [{"path": str(folder / "rows.jsonl")}], "tokenizer": name, "seq_len": 2}
    raw |= {"prepared": str(folder / f"prepared{len(cores)}"), "workers": len(cores)}
    start = time.perf_counter()
    prepare(DataConfig.model_validate(raw), lambda _: None)
    ours = size / (time.perf_counter() - start)
    setting = f"{len(cores)} cores, {size:.0f} MB"
    return [
        _record("tokenising", setting, "encode_batch MB/s", alone),
        _record("tokenising", setting, "prepare-data MB/s", ours),
        _record("tokenising", setting, "share", ours / alone),
    ]


def _write_part(folder: Path, documents: int) -> None:
    """Write a prepared folder of `documents` documents, as `prepare` does."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(20, 101, documents).astype("<u4")
    tokens = generator.integers(3, VOCAB, int(lengths.sum()), dtype=np.uint16)
    ends = np.cumsum(lengths, dtype=np.int64)
    hashes = generator.integers(0, 2**64, documents, dtype=np.uint64)
    for document in checked(documents):
        hashes[document] = content_hash(tokens[ends[document] - lengths[document] : ends[document]])
    columns = dict(zip(COLUMNS, (tokens, lengths, hashes, np.zeros(documents, "<u4")), strict=True))
    part = folder / "data.sources.0"
    part.mkdir(parents=True)
    for name, column in columns.items():
        np.save(part / f"{name}.npy", column)
    (part / PATHS).write_text('["random"]')
    record = {
        "version": VERSION, "key": "random", "finished": True, "kinds": "random", "largest_id": VOCAB - 1,
        "columns": {name: {"dtype": column.dtype.str, "count": len(column)} for name, column in columns.items()},
        "checksums": {name: zlib.crc32(column.data) for name, column in columns.items()} | {PATHS: zlib.crc32(b'["random"]')},
    }  # fmt: skip
    write_record(part / RECORD, record)
    raw = {"sources": [{"path": "random"}], "prepared": str(folder), "seq_len": 2}
    write_manifest(DataConfig.model_validate(raw), ["data.sources.0"])


def _opening(folder: Path, _cores: list[int]) -> list[dict[str, Any]]:
    found, before = [], _memory("VmRSS")
    for packing in ("concat", "best_fit"):
        Path("/proc/self/clear_refs").write_text("5")  # resets peak memory
        start = time.perf_counter()
        config = DataConfig.model_validate({"prepared": str(folder / "many"), "seq_len": 8192, "packing": packing})
        dataset = open_dataset(config, "train", VOCAB)
        opened = time.perf_counter() - start
        contents(dataset.documents)
        numbers = [epoch * len(dataset) + i for epoch in range(3) for i in range(READ)]
        start = time.perf_counter()
        for number in numbers:
            dataset[number]
        each = 1e3 * (time.perf_counter() - start) / len(numbers)
        setting = f"{packing}, {len(dataset.documents['data.sources.0'].lengths)} documents"
        found += [
            _record("opening", setting, "seconds", opened),
            _record("opening", setting, "MiB beyond imports, peak", _memory("VmHWM") - before),
            _record("opening", setting, "ms a sequence, two new epochs included", each),
        ]
        del dataset
    return found


def _memory(name: str) -> float:
    """A memory figure of this process, in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def _packing(folder: Path) -> Iterator[dict[str, Any]]:
    for tokenizer in ("bytes", str(folder / "bpe")):
        name, output = Path(tokenizer).name, str(folder / f"stdlib-{Path(tokenizer).name}")
        raw = {"sources": [SOURCE], "tokenizer": tokenizer, "prepared": output, "seq_len": 2}
        prepare(DataConfig.model_validate(raw), lambda _: None)
        for seq_len in (8192, 131072):
            for packing in ("concat", "best_fit"):
                config = DataConfig.model_validate({"prepared": output, "seq_len": seq_len, "packing": packing})
                packed = open_dataset(config, "train", VOCAB).packings["data.sources.0"]
                setting = f"{packing}, {seq_len}, {name}, {len(packed.documents.lengths)} documents"
                yield _record("packing", setting, "% padding", 100 * (1 - packed.tokens / (packed.sequences * seq_len)))
                yield _record(
                    "packing", setting, "% of documents cut", 100 * packed.cut() / len(packed.documents.lengths)
                )


if __name__ == "__main__":
    what, folder, *cores = sys.argv[1:]
    print(json.dumps({"tokenising": _tokenising, "opening": _opening}[what](Path(folder), list(map(int, cores)))))
