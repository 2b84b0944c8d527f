# SPDX-License-Identifier: Apache-2.0
"""The checkpoints in a folder, each an atomic `step_<n>`, and the description of each in its `run.json`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ring_hilbert.training.storage.manifest import check_files, read_manifest

COMPLETE = re.compile(r"step_(\d{8})")
UNFINISHED = ".unfinished"
RUN_FILE = "run.json"
RUN_KEYS = ("progress", "world_size", "engine", "digest", "identity", "data")
ENGINE = "engine"  # the folder of the engine's files in a checkpoint
COMMON = "common"  # the engine name of a checkpoint that any engine can load


def folder_of(folder: Path, step: int) -> Path:
    """The checkpoint of a step."""
    return folder / f"step_{step:08d}"


def step_of(path: Path) -> int:
    """The step after which a checkpoint was written, by its name."""
    return int(path.name.removeprefix("step_"))


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first, damaged ones too."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if COMPLETE.fullmatch(path.name) and path.is_dir())


def checkpoint_at(folder: Path, step: int | None, asked: str) -> Path:
    """The newest checkpoint in a folder, or that of a step.

    Raises:
        ValueError: if there is none; the message begins with `asked`, the setting or flag that requests it.
    """
    found = checkpoints_in(folder)
    if not found:
        raise ValueError(f"{asked}: there is no checkpoint in {folder}")
    if step is None:
        return found[-1]
    if folder_of(folder, step) not in found:
        steps = ", ".join(str(step_of(path)) for path in found)
        raise ValueError(f"{asked}: {folder} has no checkpoint of step {step}; it has those of {steps}")
    return folder_of(folder, step)


def read_run(path: Path) -> dict[str, Any]:
    """The description of the run that wrote a checkpoint, after checking it against the manifest.

    Raises:
        ValueError: if it is damaged; names the file.
    """
    files = read_manifest(path)
    if RUN_FILE not in files:
        raise ValueError(f"{path} has no {RUN_FILE} in its manifest")
    check_files(path, {RUN_FILE: files[RUN_FILE]}, lambda _: None)
    try:
        run = json.loads((path / RUN_FILE).read_text())
        missing = [key for key in RUN_KEYS if key not in run]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path / RUN_FILE} cannot be read: {error}") from error
    if missing:
        raise ValueError(f"{path / RUN_FILE} has no {', '.join(missing)}")
    if run["progress"]["step"] != step_of(path):
        raise ValueError(f"{path} holds the checkpoint of step {run['progress']['step']}: rename it back")
    return run


def set_aside(path: Path, why: str) -> Path:
    """Rename a checkpoint so that no run loads or deletes it; returns its new path."""
    number, aside = 1, path.with_name(f"{path.name}.{why}")
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.{why}{number}")
    path.rename(aside)
    return aside
