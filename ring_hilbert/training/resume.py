# SPDX-License-Identifier: Apache-2.0
"""The checkpoint from which a run resumes: intact, and of the same configuration, data and engine."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PretrainedConfig

from ring_hilbert.integrations.transformers_config import NAME
from ring_hilbert.training.config import RunConfig
from ring_hilbert.training.content import differences
from ring_hilbert.training.documents import Documents
from ring_hilbert.training.engine_deepspeed import deepspeed_settings
from ring_hilbert.training.storage.folder import COMMON, checkpoint_at, checkpoints_in, read_run, step_of
from ring_hilbert.training.storage.manifest import check_files, read_manifest
from ring_hilbert.training.world import RankError, World

# Keys of a model's configuration that say how it is stored and run, beside those that begin with "_".
HOW = {"architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", NAME}
# Keys of a model's configuration that give tensors of the same shapes another meaning.
MEANING = ("model_type", "num_attention_heads", "num_key_value_heads", "head_dim")


@dataclass
class Choice:
    """A checkpoint, None if there is none; on rank 0 also notes for the user, and what to rename, and to what."""

    path: Path | None = None
    notes: list[str] = field(default_factory=list)
    aside: list[tuple[Path, str]] = field(default_factory=list)


def choose(config: RunConfig, world: World) -> Choice:
    """The newest intact checkpoint in `checkpoint.dir`, or that of `checkpoint.resume`.

    Raises:
        ValueError: if it is damaged, or there is none of that step.
    """
    candidates, newer = world.from_main(lambda: _candidates(config))
    choice = newest_whole(candidates, config, world, "checkpoint.dir")
    choice.aside += [(path, "aside") for path in newer]
    return choice


def newest_whole(candidates: list[Path], config: RunConfig, world: World, key: str) -> Choice:
    """The newest of the ordered `candidates`; a damaged one is skipped if `checkpoint.on_damage` says so.

    Args:
        key: the setting from which they come, checkpoint.dir or checkpoint.init.

    Raises:
        ValueError: if it is damaged; names file and step, and says what to do.
    """
    faults: list[str] = []
    choice = Choice()
    for path in reversed(candidates):
        fault = _fault(path, config, world)
        if fault is None:
            choice.path = path
            choice.notes = [f"passed over: {fault}" for fault in faults]
            return choice
        faults.append(f"the checkpoint of step {step_of(path)} is damaged: {fault}")
        choice.aside.append((path, "damaged"))
        if config.checkpoint.on_damage == "refuse":
            break
    if not faults:
        return choice
    before = [step_of(path) for path in candidates if path < choice.aside[-1][0]]
    raise ValueError(f"{key}: {'; '.join(faults)}. {_what_then(before, candidates[0].parent, key)}")


def written(model: PretrainedConfig) -> dict[str, Any]:
    """A model's whole configuration as JSON values, but for `HOW`: that of a folder, or of another Transformers, may change."""
    values = json.loads(model.to_json_string(use_diff=False))
    return {key: value for key, value in values.items() if key not in HOW and not key.startswith("_")}


def check_run(
    path: Path, config: RunConfig, data: Mapping[str, Documents], ranks: int, model: dict[str, Any]
) -> list[str]:
    """Check that a run may resume from a checkpoint; returns notes for the user.

    Args:
        model: what is `written` of it.

    Raises:
        ValueError: if it was written by a run with another configuration, engine or data, or of another model.
    """
    run = read_run(path)
    check_engine(path, config, ranks, "checkpoint.dir")
    if run["digest"] != config.digest():
        changed = ", ".join(_differences(run["identity"], config.identity()))
        hint = " (the schedule spans train.steps unless it is set)" if "optim.decay_steps" in changed else ""
        raise ValueError(
            f"checkpoint.dir: {path} was written by a run with another configuration: {changed}{hint}; to resume from it "
            "use its values, to start afresh use another checkpoint.dir"
        )
    refuse_other_model(path, model)
    changes = list(differences(run["data"], data))
    if changes and config.checkpoint.changed_data == "refuse":
        raise ValueError(
            f"checkpoint.dir: {path} was written by a run on other data: {'; '.join(changes)}. Give it the same data again, start "
            "afresh with another checkpoint.dir, or set checkpoint.changed_data: accept to resume at the sequence of the same "
            "number in the data as they are now: in the current epoch, documents may be read twice or never"
        )
    return [f"accepted by checkpoint.changed_data: {change}" for change in changes]


def refuse_other_model(path: Path, model: dict[str, Any]) -> None:
    """Raise ValueError if a checkpoint is of a model with other values than are `written` of this one."""
    theirs = read_run(path).get("model", {})
    changed = list(_differences(*_shared(theirs, model)))
    if changed:
        raise ValueError(
            f"{path} is of a model with another configuration: {', '.join(changed)}; the files in model.path, or what Transformers "
            "assumes, have changed since: give the model those values"
        )


def check_model(path: Path, config: RunConfig, model: dict[str, Any]) -> list[str]:
    """Whether the weights in the checkpoint of `checkpoint.init` mean in this model what they meant in theirs, shapes aside.

    Returns the values that differ, as the user should know of them. `model`: what is `written` of this one.

    Raises:
        ValueError: one of `MEANING` does.
    """
    run = read_run(path)
    theirs, ours = run["identity"]["model"], config.identity()["model"]
    then, now = run.get("model") or theirs["config"] or {}, model or ours["config"] or {}
    then, now = _shared(then, now)
    other = [
        f"model.config.{key}: {then[key]}, now {now[key]}"
        for key in MEANING
        if None not in (then.get(key), now.get(key)) and then[key] != now[key]
    ]
    if other:
        raise ValueError(f"checkpoint.init: {path} is of another model: {', '.join(other)}; give this one its values")
    changes = [*_differences(theirs, ours, "model")]
    if theirs["config"] is None and ours["config"] is None:  # of folders the values, not only the paths
        changes += _differences(then, now, "model.config")
    return [f"checkpoint.init has weights of a model with another {change}" for change in changes]


def check_engine(path: Path, config: RunConfig, ranks: int, key: str) -> None:
    """Check that the engine of a run of `ranks` ranks can load a checkpoint; `key` is the setting that requests it.

    Raises:
        ValueError: if it cannot, or may not.
    """
    run = read_run(path)
    theirs, ours = run["engine"], engine_of(config)
    if theirs["name"] == "deepspeed":
        fits = theirs == ours and run["world_size"] == ranks
    else:
        fits = theirs["name"] in (ours["name"], COMMON)
    if not fits:
        trust = " --trust" if theirs["name"] == "deepspeed" else ""
        raise ValueError(
            f"{key}: {path} was written by {describe_engine(theirs, run['world_size'])}, and this run has "
            f"{describe_engine(ours, ranks)}; write it in the form that every engine loads, and set {key} to that folder: "
            f"ring-hilbert convert {path.parent} {path.parent}-common --step {step_of(path)}{trust}"
        )
    if theirs["name"] == "deepspeed" and not config.checkpoint.trust:
        raise ValueError(
            f"checkpoint.trust: DeepSpeed's files in {path} are pickles, which can run any code when they are loaded; if "
            "they are yours, checkpoint.trust=true"
        )


def engine_of(config: RunConfig) -> dict[str, Any]:
    """The properties of the engine on which a checkpoint depends."""
    if config.engine == "deepspeed":
        return {"name": "deepspeed", "stage": deepspeed_settings(config)["zero_optimization"]["stage"]}
    return {"name": config.engine}


def describe_engine(engine: dict[str, Any], ranks: int) -> str:
    """The engine as named in messages."""
    name = f"engine deepspeed (ZeRO-{engine['stage']}" if engine["name"] == "deepspeed" else "engine torch (FSDP2"
    return f"{name}, {ranks} {'rank' if ranks == 1 else 'ranks'})"


def _candidates(config: RunConfig) -> tuple[list[Path], list[Path]]:
    """The checkpoints from which a run may resume, oldest first, and those newer than the one requested."""
    folder = Path(config.checkpoint.dir)
    found, step = checkpoints_in(folder), config.checkpoint.resume
    # After going back once, a run restarted with the same settings resumes from what it has written since.
    if step is None or (found and _resumed(found[-1]) == step):
        return found, []
    asked = checkpoint_at(folder, step, "checkpoint.resume")
    return [path for path in found if path <= asked], [path for path in found if path > asked]


def _fault(path: Path, config: RunConfig, world: World) -> str | None:
    """What is wrong with a checkpoint, None if nothing is; the same on every rank, though each checks only some files."""
    try:
        files = world.from_main(lambda: read_manifest(path))
        mine = dict(sorted(files.items())[world.rank :: world.size])
        total, name = sum(known.bytes for known in mine.values()), f"checking {path.name}"
        bar = tqdm(total=total, desc=name, unit="B", unit_scale=True, delay=2, disable=not world.is_main)
        with world.together(), bar:
            check_files(path, mine, bar.update if config.checkpoint.verify else None)
    except RankError as error:
        return str(error)
    return None


def _resumed(path: Path) -> int | None:
    """The `checkpoint.resume` of the run that wrote a checkpoint; None if that cannot be read."""
    try:
        return read_run(path).get("resume")
    except ValueError:
        return None


def _what_then(before: list[int], folder: Path, key: str) -> str:
    if not before:
        return f"There is none before it; to start afresh set another {key}, or move the contents of {folder} away"
    back = f"checkpoint.resume={before[-1]}, or " if key == "checkpoint.dir" else ""
    return (
        f"To resume from step {before[-1]} set {back}checkpoint.on_damage=previous, which uses the newest intact one and sets "
        "the damaged one aside without deleting it"
    )


def _shared(a: dict[str, Any], b: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both without the keys that one lacks: versions of Transformers differ in these."""
    keys = a.keys() & b.keys()
    return {key: a[key] for key in keys}, {key: b[key] for key in keys}


def _differences(old: dict[str, Any], new: dict[str, Any], section: str = "") -> Iterator[str]:
    """`key: old, now new` for every leaf of the two configurations, or of a section of them, that differs."""
    before, after = dict(_leaves(old, section)), dict(_leaves(new, section))
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
