# SPDX-License-Identifier: Apache-2.0
"""Converts any engine's checkpoint, in one process, to the common form that every engine loads, or to a model folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ring_hilbert.training.config import RunConfig
from ring_hilbert.training.export import write_model
from ring_hilbert.training.model import model_config
from ring_hilbert.training.resume import refuse_other_model, written
from ring_hilbert.training.storage.folder import (
    COMMON,
    ENGINE,
    RUN_FILE,
    UNFINISHED,
    checkpoint_at,
    folder_of,
    read_run,
    step_of,
)
from ring_hilbert.training.storage.lock import FolderLock
from ring_hilbert.training.storage.manifest import (
    Manifest,
    check_files,
    read_manifest,
    sync_file,
    write_file,
    write_json,
    write_manifest,
)
from ring_hilbert.training.storage.tensors import INDEX, KINDS, NAMES, Reader, write_safetensors
from ring_hilbert.training.storage.zero import whole_tensors

FILE_BYTES = 5 << 30  # of tensors in one file


def convert(source: Path, target: Path, step: int | None = None, trust: bool = False) -> Path:
    """Write the newest checkpoint in `source`, or that of `step`, below `target` in the common form that every engine loads.

    Weights and moments become safetensors files of whole tensors; progress, the place in the data and the ranks' random states
    are copied. DeepSpeed's files are held in memory all at once, others a tensor at a time. Returns the new checkpoint.

    Raises:
        ValueError: if there is no such checkpoint, it is damaged, or it is DeepSpeed's and not trusted; or `target` already has it.
    """
    path = checkpoint_at(source, step, "--step")
    final = folder_of(target, step_of(path))
    if final.exists():
        raise ValueError(f"{final} is already there; remove it, or convert to another folder")
    files, run = _check(path), read_run(path)
    tensors = _whole(path, run["engine"], trust, "--trust")
    lock = FolderLock(target, {"convert": str(path)})
    try:
        unfinished = final.with_name(final.name + UNFINISHED)
        shutil.rmtree(unfinished, ignore_errors=True)
        (unfinished / ENGINE).mkdir(parents=True)
        written = {f"{ENGINE}/{name}": known for name, known in _write(tensors, unfinished / ENGINE).items()}
        for name in files.keys() - {RUN_FILE}:
            if not name.startswith(f"{ENGINE}/"):  # random states
                written[name] = write_file(unfinished / name, (path / name).read_bytes())
        run |= {"engine": {"name": COMMON}, "resume": None}
        write_manifest(unfinished, written | {RUN_FILE: write_json(unfinished / RUN_FILE, run)})
        unfinished.rename(final)
        sync_file(target)
    finally:
        lock.release()
    return final


def export_checkpoint(config: RunConfig, target: Path, step: int | None = None) -> Path:
    """Write the model of the newest checkpoint in `checkpoint.dir`, or that of `step`, as `export_model` would.

    Returns the checkpoint.

    Raises:
        ValueError: if there is no such checkpoint, it is damaged, is DeepSpeed's and `checkpoint.trust` is not set, or is of
            another model.
    """
    if target.exists() and not (target / "config.json").is_file():
        raise ValueError(f"{target} is there and is no model's folder; it would be replaced: give another")
    path = checkpoint_at(Path(config.checkpoint.dir), step, "--step")
    _check(path)
    run = read_run(path)
    if run["identity"]["model"] != config.identity()["model"]:
        raise ValueError(f"model: {path} is of the model {run['identity']['model']}, not of the configuration's")
    hf_config = model_config(config)
    refuse_other_model(path, written(hf_config))
    tensors = _whole(path, run["engine"], config.checkpoint.trust, "checkpoint.trust=true")
    state = {key.removeprefix("weight."): tensors[key].float() for key in tensors if key.startswith("weight.")}
    write_model(config, hf_config, state, target)
    return path


def _check(path: Path) -> Manifest:
    """The files of a checkpoint, after checking their checksums."""
    files = read_manifest(path)
    total = sum(known.bytes for known in files.values())
    with tqdm(total=total, desc=f"checking {path.name}", unit="B", unit_scale=True, delay=2) as bar:
        check_files(path, files, bar.update)
    return files


def _whole(path: Path, engine: dict[str, Any], trust: bool, how: str) -> Mapping[str, Tensor]:
    """The whole tensors of a checkpoint by the names of `storage.tensors`; `how`: what the user sets to trust it."""
    if engine["name"] != "deepspeed":
        return Reader(path / ENGINE)
    if not trust:
        raise ValueError(
            f"DeepSpeed's files in {path} are pickles, which can run any code when they are loaded; if they are yours, {how}"
        )
    return whole_tensors(path / ENGINE, engine["stage"])


def _head(tensors: Mapping[str, Tensor], key: str) -> tuple[torch.dtype, torch.Size]:
    return tensors.head(key) if isinstance(tensors, Reader) else (tensors[key].dtype, tensors[key].shape)


def _write(tensors: Mapping[str, Tensor], folder: Path) -> Manifest:
    """Write whole tensors, one or more files per kind, and the index."""
    heads = {key: _head(tensors, key) for key in tensors}
    sizes = {key: shape.numel() * dtype.itemsize for key, (dtype, shape) in heads.items()}
    needed, free = sum(sizes.values()), shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(f"{folder} has {free:,} bytes free, and {needed:,} are needed")
    files, index = {}, {}
    with tqdm(total=needed, desc="writing", unit="B", unit_scale=True, delay=2) as bar:

        def read(keys: list[str]) -> Iterator[Tensor]:
            for key in keys:
                yield tensors[key]
                bar.update(sizes[key])

        for name, keys in _by_file(heads, sizes):
            parts = [(key, *heads[key]) for key in keys]
            files[name] = write_safetensors(folder / name, parts, read(keys))
            for key, dtype, shape in parts:
                place = {"offsets": [0] * len(shape), "sizes": list(shape), "file": name}
                index[key] = {"dtype": NAMES[dtype], "size": list(shape), "parts": [place]}
    return files | {INDEX: write_json(folder / INDEX, index)}


def _by_file(
    heads: Mapping[str, tuple[torch.dtype, torch.Size]], sizes: Mapping[str, int]
) -> Iterator[tuple[str, list[str]]]:
    """File names, and the names of the tensors in each."""
    for kind in KINDS:
        keys = [key for key in heads if key.startswith(f"{kind}.")]
        keys.sort(key=lambda key: -heads[key][0].itemsize)  # keeps them aligned
        groups: list[list[str]] = [[]]
        size = 0
        for key in keys:
            if groups[-1] and size + sizes[key] > FILE_BYTES:
                groups.append([])
                size = 0
            groups[-1].append(key)
            size += sizes[key]
        for number, group in enumerate(groups, 1):
            if group:
                yield f"{kind}-{number:05d}.safetensors", group
