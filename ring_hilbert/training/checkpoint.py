# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are whole or not there, and exact resume.

A checkpoint is a folder `step_<n>` with the files of the engine, the random state of every rank and a `run.json` (progress,
configuration, digest, hashes of the data). It is written under another name, synced and renamed, so that a crash leaves at most a
folder that nothing reads.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ring_hilbert.training.config import RunConfig
from ring_hilbert.training.content import contents, differences
from ring_hilbert.training.documents import Documents
from ring_hilbert.training.engine import Engine
from ring_hilbert.training.world import World

COMPLETE = re.compile(r"step_(\d{8})")
UNFINISHED = ".unfinished"
RUN_FILE = "run.json"
ENGINE = "engine"
EXPORT = "model"  # the folder of the exported model, beside the checkpoints


@dataclass(frozen=True)
class Progress:
    """How far a run is: steps done, sequences read (the data cursor), target tokens, steps that updated nothing."""

    step: int = 0
    sequences: int = 0
    tokens: int = 0
    skipped: int = 0


class Checkpoints:
    """The checkpoints of one run in `checkpoint.dir`, which exists when one is saved, on a file system that all ranks see.

    Args:
        data: what the run reads, by its name in the configuration.

    Attributes:
        changes: on rank 0, how the data differ from those of the checkpoint that `latest` returned; checkpoint.changed_data
            accepts it.
    """

    def __init__(self, config: RunConfig, world: World, data: Mapping[str, Documents]) -> None:
        self.config = config
        self.world = world
        self.folder = Path(config.checkpoint.dir)
        self.data = data
        self.contents = contents(data)
        self.changes: list[str] = []

    def latest(self) -> Path | None:
        """The newest complete checkpoint, None if there is none; the same on every rank.

        Raises:
            ValueError: it was written by a run with another configuration or on other data; or ranks read other data than rank 0.
        """
        main = self.world.from_main(lambda: self.contents)
        with self.world.together():
            if main != self.contents:
                found = "; ".join(differences(main, self.data))
                raise ValueError(f"the data on this rank are not those on rank 0: {found}")
        return self.world.from_main(self._latest)

    def save(self, engine: Engine, progress: Progress) -> None:
        """Write a checkpoint, then remove all but the newest `checkpoint.keep`.

        Raises:
            OSError, CheckpointException: it cannot be written; the older ones are still there.
        """
        final = self.folder / f"step_{progress.step:08d}"
        unfinished = final.with_name(final.name + UNFINISHED)
        self.world.from_main(self._remove_unfinished)
        with self.world.together():
            (unfinished / ENGINE).mkdir(parents=True, exist_ok=True)
            torch.save(_rng_state(self.world.device), unfinished / f"rng_{self.world.rank}.pt")
        engine.save(unfinished / ENGINE)
        self.world.from_main(lambda: self._publish(unfinished, final, progress))

    def load(self, path: Path, engine: Engine) -> Progress:
        """Restore engine and random state from a checkpoint of `latest()`; returns where the run goes on.

        With another number of ranks than it was written by, random state is drawn anew from seed, step and rank.
        """
        run = self.world.from_main(lambda: _read_run(path))
        progress = Progress(**run["progress"])
        engine.load(path / ENGINE)
        if run["world_size"] == self.world.size:
            _set_rng_state(torch.load(path / f"rng_{self.world.rank}.pt", weights_only=True), self.world.device)
        else:
            seed_rank(self.config, self.world, progress.step)
        return progress

    def start_from(self, folder: Path, engine: Engine) -> None:
        """Take over weights and optimizer state, and nothing else, of the newest checkpoint of another run.

        Raises:
            ValueError: it has none.
        """
        found = self.world.from_main(lambda: _complete(folder))
        if not found:
            raise ValueError(f"checkpoint.init: there is no checkpoint in {folder}")
        engine.load(found[-1] / ENGINE)

    def _latest(self) -> Path | None:
        found = _complete(self.folder)
        if not found:
            return None
        run = _read_run(found[-1])
        if run["digest"] != self.config.digest():
            changed = ", ".join(_differences(run["identity"], self.config.identity()))
            hint = " (the schedule spans train.steps unless it is set)" if "optim.decay_steps" in changed else ""
            raise ValueError(
                f"checkpoint.dir: {found[-1]} was written by a run with another configuration: {changed}{hint}; to go on with it "
                "use its values, to start anew use another checkpoint.dir"
            )
        self.changes = list(differences(run["data"], self.data))
        if self.changes and self.config.checkpoint.changed_data == "refuse":
            changes = "; ".join(self.changes)
            raise ValueError(
                f"checkpoint.dir: {found[-1]} was written by a run on other data: {changes}. Give it the same data again, start "
                "anew with another checkpoint.dir, or set checkpoint.changed_data: accept to go on with the sequence of the same "
                "number in the data as they are now: of the epoch under way, documents may be read twice or never"
            )
        return found[-1]

    def _run(self, progress: Progress) -> dict[str, Any]:
        return {
            "progress": asdict(progress),
            "world_size": self.world.size,
            "digest": self.config.digest(),
            "identity": self.config.identity(),
            "data": self.contents,
            "torch": torch.__version__,
        }

    def _remove_unfinished(self) -> None:
        for path in self.folder.glob(f"step_*{UNFINISHED}"):
            shutil.rmtree(path)

    def _publish(self, unfinished: Path, final: Path, progress: Progress) -> None:
        with (unfinished / RUN_FILE).open("w") as file:
            json.dump(self._run(progress), file, indent=1, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(final)
        for old in _complete(self.folder)[: -self.config.checkpoint.keep]:
            shutil.rmtree(old)


def finished(config: RunConfig) -> bool:
    """Whether the run's last step is saved and its model exported."""
    folder = Path(config.checkpoint.dir)
    done = _complete(folder)
    return bool(done) and (folder / EXPORT).is_dir() and _read_run(done[-1])["progress"]["step"] >= config.train.steps


def _complete(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if COMPLETE.fullmatch(path.name) and (path / RUN_FILE).is_file())


def seed_rank(config: RunConfig, world: World, step: int) -> None:
    """Give this rank random numbers of its own (dropout), a function of seed, step and rank."""
    seeds = np.random.SeedSequence((config.train.seed, step, world.rank))
    torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> 1))


def _read_run(path: Path) -> dict[str, Any]:
    return json.loads((path / RUN_FILE).read_text())


def _differences(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """`key: old, now new` for every leaf of the two configurations that differs."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            yield f"{key}: {before.get(key)}, now {after.get(key)}"


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_rng_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
