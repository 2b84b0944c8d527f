# SPDX-License-Identifier: Apache-2.0
"""Atomic checkpoints, and exact resume.

A checkpoint is a folder `step_<n>` with the files of the engine, the random state of every rank, a `run.json` (progress,
configuration, engine, hashes of the data) and, written last, a manifest with the checksum of each. It is written under a
temporary name, synced and renamed, so that a crash leaves at most a folder that nothing reads.
"""

from __future__ import annotations

import errno
import shutil
import socket
from collections.abc import Mapping
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from transformers import PretrainedConfig

from ring_hilbert.training.config import RunConfig
from ring_hilbert.training.content import contents, differences
from ring_hilbert.training.documents import Documents
from ring_hilbert.training.engine import Engine
from ring_hilbert.training.random_state import random_file, read_random, seed_rank, write_random
from ring_hilbert.training.resume import check_engine, check_model, check_run, choose, engine_of, newest_whole, written
from ring_hilbert.training.schedule import with_decay_steps
from ring_hilbert.training.storage.background import first_failure
from ring_hilbert.training.storage.folder import (
    ENGINE,
    RUN_FILE,
    UNFINISHED,
    checkpoints_in,
    folder_of,
    read_run,
    set_aside,
    step_of,
)
from ring_hilbert.training.storage.lock import FolderLock, require_same_folder
from ring_hilbert.training.storage.manifest import Manifest, sync_file, write_json, write_manifest
from ring_hilbert.training.world import RankError, World

EXPORT = "model"  # the folder of the exported model, beside the checkpoints
FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Progress:
    """The progress of a run: steps done, sequences read (the data cursor), target tokens, skipped updates."""

    step: int = 0
    sequences: int = 0
    tokens: int = 0
    skipped: int = 0


class Checkpoints:
    """The checkpoints of one run in `checkpoint.dir`, on a file system that all ranks see. Every rank calls every method.

    Args:
        data: the run's data, by their names in the configuration.
        model: its model's configuration, to be compared with that of another run; None leaves that out.

    Attributes:
        notes: on rank 0, messages for the user: data that changed, checkpoints that were damaged or set aside.
    """

    def __init__(
        self, config: RunConfig, world: World, data: Mapping[str, Documents], model: PretrainedConfig | None = None
    ) -> None:
        self.config = config
        self.world = world
        self.folder = Path(config.checkpoint.dir)
        self.data = data
        self.contents = contents(data)
        self.model = {} if model is None else written(model)
        self.notes: list[str] = []
        self._lock: FolderLock | None = None
        self._aside: list[tuple[Path, str]] = []  # to be set aside by `load`, and why
        self._saving: tuple[Future[Any], int, int] | None = None  # with its step and bytes

    def latest(self) -> Path | None:
        """Lock the folder for this run, and find the intact checkpoint from which to resume, the same on every rank.

        None if there is none. A damaged one is skipped if `checkpoint.on_damage` says so.

        Raises:
            ValueError: if another run uses the folder, or the hosts do not share it; if the checkpoint is damaged, or was written
                by a run with another configuration, engine or data; or if ranks read other data than rank 0.
        """
        main = self.world.from_main(lambda: self.contents)
        with self.world.together():
            if main != self.contents:
                found = "; ".join(differences(main, self.data))
                raise ValueError(f"the data on this rank are not those on rank 0: {found}")
        self._take_folder()
        choice = choose(self.config, self.world)
        path, self._aside = choice.path, choice.aside
        self.notes += choice.notes
        if path is not None:
            self.notes += self.world.from_main(
                lambda: check_run(path, self.config, self.data, self.world.size, self.model)
            )
        return path

    def load(self, path: Path, engine: Engine) -> Progress:
        """Restore engine and random state from a checkpoint of `latest()`; returns the progress to resume from.

        If the number of ranks differs from that of its writer, random state is re-seeded from seed, step and rank. Newer
        checkpoints, from which the run does not resume, are renamed, never deleted.
        """
        run = self.world.from_main(lambda: read_run(path))
        progress = Progress(**run["progress"])
        with self.world.together():
            engine.load(path / ENGINE)
            if run["world_size"] == self.world.size:
                read_random(path / random_file(self.world), self.world)
            else:
                seed_rank(self.config, self.world, progress.step)
        self.world.from_main(self._set_aside)
        return progress

    def initial(self) -> Path | None:
        """The newest checkpoint of the run in `checkpoint.init`, None if that is not set.

        Raises:
            ValueError: if there is none, it is damaged, this engine cannot load it, or its weights mean something else here.
        """
        if self.config.checkpoint.init is None:
            return None
        folder = Path(self.config.checkpoint.init)
        candidates = self.world.from_main(lambda: checkpoints_in(folder))
        choice = newest_whole(candidates, self.config, self.world, "checkpoint.init")
        path = choice.path
        if path is None:
            raise ValueError(f"checkpoint.init: there is no checkpoint in {folder}")
        self.notes += choice.notes
        self.world.from_main(lambda: check_engine(path, self.config, self.world.size, "checkpoint.init"))
        self.notes += self.world.from_main(lambda: check_model(path, self.config, self.model))
        return path

    def start_from(self, path: Path, engine: Engine) -> None:
        """Load only weights and optimizer state from the checkpoint of `initial()`."""
        with self.world.together():
            engine.load(path / ENGINE)

    def save(self, engine: Engine, progress: Progress) -> None:
        """Start writing a checkpoint; once it is complete, all but the newest `checkpoint.keep` are removed.

        Waits for the previous one and, unless `checkpoint.asynchronous`, for this one.

        Raises:
            ValueError: if weights or moments are not finite, there is too little space, or the previous one could not be
                written; the older ones are kept.
        """
        self.wait()
        final = folder_of(self.folder, progress.step)
        unfinished = final.with_name(final.name + UNFINISHED)
        with self.world.together():
            if bad := engine.not_finite():
                raise ValueError(
                    f"step {progress.step}: {bad[0]} is not finite"
                    + (f" nor {len(bad) - 1} others" if bad[1:] else "")
                    + f"; nothing was saved over the older checkpoints in {self.folder}. A lower optim.lr may help"
                )
        needed = engine.bytes_to_save()
        self.world.from_main(lambda: self._make_room(unfinished, needed))
        with self.world.together():
            name = random_file(self.world)
            random = {name: write_random(unfinished / name, self.world)}
        files = {name: known for rank in self.world.collect(random) for name, known in rank.items()}

        # Called last, on one rank; with FSDP2 by `Writer.finish` of storage/tensors.py.
        def publish(written: Manifest) -> None:
            engine_files = {f"{ENGINE}/{name}": known for name, known in written.items()}
            self._publish(unfinished, final, progress, files | engine_files)

        try:
            self._saving = engine.save(unfinished / ENGINE, publish), progress.step, needed
        except RuntimeError as error:  # torch.save's error on a full disk does not say so
            if needed > shutil.disk_usage(self.folder).free:
                raise ValueError(f"{_room(self.folder, progress.step, needed)}: {error}") from error
            raise
        if not self.config.checkpoint.asynchronous:
            self.wait()

    @property
    def under_way(self) -> bool:
        """Whether a save is still in progress on this rank."""
        return self._saving is not None and not self._saving[0].done()

    @property
    def failed(self) -> bool:
        """Whether this rank knows that the save in progress has failed: then all should call `wait`."""
        return self._saving is not None and self._saving[0].done() and self._saving[0].exception() is not None

    def wait(self) -> None:
        """Wait for the save in progress.

        Raises:
            ValueError: if it failed.
        """
        if self._saving is None:
            return
        (future, step, needed), self._saving = self._saving, None
        try:
            future.result()
        except CheckpointException as error:
            rank, cause = first_failure(error)
            text = str(cause)
            if isinstance(cause, OSError) and cause.errno in FULL:
                text = f"{_room(self.folder, step, needed)}: {text}"
            elif not isinstance(cause, (ValueError, OSError)):
                text = f"{type(cause).__name__}: {text}"
            raise RankError(text if self.world.size == 1 else f"rank {rank}: {text}") from error

    def close(self) -> None:
        """Release the folder, once nothing more is written to it."""
        if self._saving is not None:  # another error is propagating
            wait([self._saving[0]])
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _take_folder(self) -> None:
        def take() -> tuple[str, str]:
            self._lock = FolderLock(self.folder, {"log": str(Path(self.config.log.dir).absolute())})
            self.notes += [self._lock.note] if self._lock.note else []
            return self._lock.nonce, socket.gethostname()

        nonce, host = self.world.from_main(take)
        with self.world.together():
            require_same_folder(self.folder, nonce, host)

    def _set_aside(self) -> None:
        for path, why in self._aside:
            self.notes.append(f"{path} is now {set_aside(path, why).name}")
        self._aside.clear()

    def _make_room(self, unfinished: Path, needed: int) -> None:
        """Make the folder for a checkpoint, removing what an interrupted save left."""
        if self._lock is not None:
            self._lock.check()
        for path in self.folder.glob(f"step_*{UNFINISHED}"):
            shutil.rmtree(path)
        self.folder.mkdir(parents=True, exist_ok=True)
        if needed > shutil.disk_usage(self.folder).free:
            step = step_of(unfinished.with_suffix(""))
            raise ValueError(f"{_room(self.folder, step, needed)}; nothing was written")
        (unfinished / ENGINE).mkdir(parents=True)

    def _publish(self, unfinished: Path, final: Path, progress: Progress, files: Manifest) -> None:
        if self._lock is not None:
            self._lock.check()
        run = {
            "progress": asdict(progress),
            "world_size": self.world.size,
            "engine": engine_of(self.config),
            "digest": self.config.digest(),
            "identity": self.config.identity(),
            "data": self.contents,
            "model": self.model,
            "resume": self.config.checkpoint.resume,
            "torch": torch.__version__,
        }
        write_manifest(unfinished, files | {RUN_FILE: write_json(unfinished / RUN_FILE, run)})
        unfinished.rename(final)
        sync_file(self.folder)
        for old in checkpoints_in(self.folder)[: -self.config.checkpoint.keep]:
            shutil.rmtree(old)


def finished(config: RunConfig) -> bool:
    """Whether the run's last step is saved and its model exported, and its configuration still the same."""
    folder = Path(config.checkpoint.dir)
    done = checkpoints_in(folder)
    if not done or not (folder / EXPORT).is_dir() or step_of(done[-1]) < config.train.steps:
        return False
    with suppress(ValueError):  # that it is damaged the run itself will say
        return read_run(done[-1])["digest"] == with_decay_steps(config).digest()
    return False


def _room(folder: Path, step: int, needed: int) -> str:
    free = shutil.disk_usage(folder).free
    return (
        f"checkpoint.dir: the checkpoint of step {step} needs at least {needed:,} bytes, and {folder} has {free:,} bytes free; "
        "make room, lower checkpoint.keep, or use another checkpoint.dir"
    )
