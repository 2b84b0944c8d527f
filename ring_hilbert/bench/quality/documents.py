# SPDX-License-Identifier: Apache-2.0
"""The documents of a task, written once by its declaration alone, and how well a model does on those that are held out.

A folder has `train/`, documents compressed; `held_out/`, files of exactly one sequence, named by their unit and a number; and
`data.json`, written last. All is ASCII, so that a byte is a token. It may be carried to another machine, where the packages of a
text task are others.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
from tqdm import tqdm

from ring_hilbert.bench.quality.table import digest
from ring_hilbert.bench.quality.task import Pictures, Retrieval, Task, Text
from ring_hilbert.training.evaluate import by_power
from ring_hilbert.training.score import Scorer
from ring_hilbert.training.tokens import document_encoder, load_tokenizer

RECORD = "data.json"
LEVELS = 64  # of grey, written as the characters from "0" on
LARGEST_FILE = 300_000  # bytes of a source file; larger ones are tables
SMALLEST_PACKAGE = 100_000  # bytes

Answers = list[tuple[int, int]]  # where the value stands in a sequence, and how far behind the one that it repeats


class Scores(NamedTuple):
    """Of the primary metric: the value of every held-out unit, and the mean by the power of two of a position or distance."""

    units: dict[str, float]
    by_power: dict[int, float]


def write(task: Task, name: str, folder: Path) -> tuple[Path, str]:
    """The task's documents in a folder of their own below `folder`, written unless they are there; and a digest of all they hold.

    Raises:
        ValueError: packages are missing or too small, or what is there was changed.
    """
    keys = task.model_dump(mode="json", include=_deciding(task))
    target = folder / f"{name}-{digest(keys)}"
    if (target / RECORD).exists():
        content = json.loads((target / RECORD).read_text())["content"]
        if content != _content(target):
            raise ValueError(f"the files in {target} are not those that were written there; remove the folder")
        return target, content
    unfinished = target.with_name(target.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    for split in ("train", "held_out"):
        (unfinished / split).mkdir(parents=True)
    kinds = {Text: _write_text, Retrieval: _write_retrieval, Pictures: _write_pictures}
    answers, content = kinds[type(task)](task, unfinished), _content(unfinished)
    (unfinished / RECORD).write_text(json.dumps({"settings": keys, "content": content, "answers": answers}))
    shutil.rmtree(target, ignore_errors=True)
    unfinished.rename(target)
    return target, content


def scores(task: Task, scorer: Scorer, folder: Path) -> Scores:
    """Of the primary metric on the held-out sequences in `folder`."""
    encode, answers = document_encoder(load_tokenizer("bytes")), json.loads((folder / RECORD).read_text())["answers"]
    values, powers = defaultdict[str, list[float]](list), defaultdict[int, list[float]](list)
    for path in sorted((folder / "held_out").glob("*.txt")):
        (ids,) = encode([path.read_text()])
        losses, hits = (found[0] for found in scorer(ids[None].astype(np.int64)))
        if task.metric == "loss":
            losses = losses[:-2]  # the last target is the end that the file was cut to
            for power, mean in by_power(losses).items():
                powers[power].append(mean)
            found = losses[task.from_position - 1 :].numpy()
        else:
            places, distances = np.array(answers[path.name]).T
            found = hits.numpy()[places - 1].astype(float)
            for distance, hit in zip(distances.tolist(), found.tolist(), strict=True):
                powers[1 << (distance.bit_length() - 1)].append(hit)
        values[path.stem.rpartition("-")[0]].append(float(found.mean()))
    return Scores(_means(values), dict(sorted(_means(powers).items())))


def _means(values: dict[Any, list[float]]) -> dict[Any, float]:
    return {key: float(np.mean(some)) for key, some in values.items() if some}


def _deciding(task: Task) -> set[str]:
    """What the documents depend on."""
    return (set(type(task).model_fields) - set(Task.model_fields)) | {"seq_len", "seed", "kind"}


def _content(folder: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(folder.glob("*/*")):
        found.update(f"{path.parent.name}/{path.name}\0".encode() + path.read_bytes())
    return found.hexdigest()[:8]


def _put(path: Path, text: bytes) -> None:
    """A document to train on."""
    with pyarrow.CompressedOutputStream(str(path.with_suffix(".txt.zst")), "zstd") as file:
        file.write(text)


def _packages(root: str | None) -> Iterator[tuple[str, Path]]:
    """The names and folders of what is installed."""
    folder = Path(root or sysconfig.get_path("purelib"))
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.suffix not in (".dist-info", ".egg-info") and path.name != "__pycache__":
            yield path.name, path


def _source(folder: Path, most: int) -> bytes:
    """The Python files of a package, joined."""
    found, size = list[bytes](), 0
    for path in sorted(folder.rglob("*.py")):
        if path.is_file() and path.stat().st_size <= LARGEST_FILE and size < most:
            text = path.read_bytes().decode("utf-8", "replace").replace("\r\n", "\n").replace("\0", "")
            found.append(text.encode("ascii", "replace"))
            size += len(found[-1]) + 1
    return b"\n".join(found)[:most]


def _training_text(root: str | None, held_out: list[str], each: int, total: int) -> Iterator[tuple[str, bytes]]:
    """Packages that are not held out, as far as `total` goes."""
    for name, path in tqdm(list(_packages(root)), unit="package", mininterval=1):
        if name not in held_out and total > 0:
            text = _source(path, min(each, total))
            if len(text) >= SMALLEST_PACKAGE:
                total -= len(text)
                yield name, text


def _write_text(task: Text, folder: Path) -> dict[str, Answers]:
    installed, size = dict(_packages(task.root)), task.seq_len - 1
    sources = {name: _source(installed[name], 10**9) for name in task.held_out if name in installed}
    lacking = [name for name in task.held_out if len(sources.get(name, b"")) < task.sequences * size]
    if lacking:
        raise ValueError(
            f"held_out packages {lacking} are not installed in {task.root or sysconfig.get_path('purelib')}, or have less than "
            f"{task.sequences} sequences of {task.seq_len} bytes; hold others out, or carry the folder of a machine that has them"
        )
    for name, text in sources.items():
        starts = np.linspace(0, len(text) - size, task.sequences).astype(int)
        for number, start in enumerate(starts):
            (folder / "held_out" / f"{name}-{number}.txt").write_bytes(text[start : start + size])
    for name, text in _training_text(task.root, task.held_out, task.bytes_each, task.bytes):
        _put(folder / "train" / name, text)
    return {}


def _write_retrieval(task: Retrieval, folder: Path) -> dict[str, Answers]:
    random, size = np.random.default_rng(task.seed), task.seq_len - 1
    filler = np.full(size, ord(" "), np.uint8)
    if task.filler == "text":
        text = b"".join(text for _, text in _training_text(task.root, [], 2_000_000, 50_000_000))
        filler = np.frombuffer(text.replace(b"<", b"("), np.uint8)
    for number in tqdm(range(task.documents), unit="document", mininterval=1):
        start = random.integers(len(filler) - size + 1)
        document = filler[start : start + size].copy()
        if random.random() < task.share:
            _add_pairs(document, task, random)
        _put(folder / "train" / f"{number:06d}", document.tobytes())
    answers = {}
    for number in range(task.held_out):
        start = random.integers(len(filler) - size + 1)
        document = filler[start : start + size].copy()
        path = folder / "held_out" / f"{number:04d}-0.txt"
        answers[path.name] = _add_pairs(document, task, random)
        path.write_bytes(document.tobytes())
    return answers


def _add_pairs(document: np.ndarray, task: Retrieval, random: np.random.Generator) -> Answers:
    """`<key=v>`, and further on `<key?v>`: where the second v stands, and how far behind the first."""
    free, length, answers = np.ones(len(document), bool), task.key_length + 4, Answers()
    keys = set[bytes]()
    while len(answers) < task.pairs:
        distance = round(task.nearest * (task.farthest / task.nearest) ** random.random())
        first = int(random.integers(len(document) - distance - length + 1))
        places = [slice(start, start + length) for start in (first, first + distance)]
        key = bytes(random.integers(ord("A"), ord("Z") + 1, task.key_length).astype(np.uint8))
        if not all(free[place].all() for place in places) or (task.key_length > 2 and key in keys):
            continue
        keys.add(key)
        value = random.integers(task.values)
        other = value if random.random() < task.faithful else random.integers(task.values)
        for place, sign, told in zip(places, (b"=", b"?"), (value, other), strict=True):
            text = b"<" + key + sign + bytes([ord("a") + int(told)]) + b">"
            document[place] = np.frombuffer(text, np.uint8)
            free[place] = False
        answers.append((first + distance + length - 2, distance))
    return answers


def _write_pictures(task: Pictures, folder: Path) -> dict[str, Answers]:
    random = np.random.default_rng(task.seed)
    for number in tqdm(range(task.documents + task.held_out), unit="picture", mininterval=1):
        text = (_leaves(task.height, task.width, random).ravel() + ord("0")).astype(np.uint8).tobytes()[:-1]
        if number < task.documents:
            _put(folder / "train" / f"{number:06d}", text)
        else:
            (folder / "held_out" / f"{number - task.documents:04d}-0.txt").write_bytes(text)
    return {}


def _leaves(height: int, width: int, random: np.random.Generator) -> np.ndarray:
    """A picture of leaves that hide each other, of all sizes, each a wave of grey of its own with noise: [height, width].

    The statistics of such pictures are near those of photographs (Lee, Mumford and Huang, 2001).
    """
    picture = np.zeros((height, width))
    side = min(height, width)
    for _ in range(400):
        radius = 3 / np.sqrt(1 - random.random() * (1 - (3 / (0.4 * side + 3)) ** 2))  # density ~ r^-3
        row, column = random.integers(height), random.integers(width)
        top, left = max(0, int(row - radius)), max(0, int(column - radius))
        y, x = np.ogrid[top : min(height, int(row + radius) + 2), left : min(width, int(column + radius) + 2)]
        grey, angle, period = random.random(), random.random() * np.pi, 4 + 28 * random.random()
        wave = 0.15 * np.sin((np.cos(angle) * (x - column) + np.sin(angle) * (y - row)) * 2 * np.pi / period)
        inside = (y - row) ** 2 + (x - column) ** 2 <= radius**2
        part = picture[top : top + y.shape[0], left : left + x.shape[1]]
        part[inside] = (grey + wave)[inside]
    noisy = picture + random.normal(0, 0.01, picture.shape)
    return np.clip(np.floor(noisy * LEVELS), 0, LEVELS - 1).astype(np.int64)
