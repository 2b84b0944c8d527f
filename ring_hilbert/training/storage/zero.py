# SPDX-License-Identifier: Apache-2.0
"""Assembles whole weights and moments from the files of DeepSpeed's ranks, without its engine: ZeRO 0 to 3, in one process.

The files are pickles: nothing here is called unless the user trusts them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ring_hilbert.training.storage.tensors import MOMENTS

TAG = "deepspeed"  # the folder below the engine's to which DeepSpeed writes
PREFIX = "model."  # of the language model in the module that DeepSpeed trains


def whole_tensors(folder: Path, stage: int) -> dict[str, Tensor]:
    """All tensors by the `KINDS` of `storage.tensors`, float32, from the engine's folder of a checkpoint.

    Files are memory-mapped: only the assembled tensors take memory.

    Raises:
        ValueError: if the files are not those of such a checkpoint.
    """
    try:
        if stage == 0:
            return _of_stage_0(_load(folder / TAG / "mp_rank_00_model_states.pt"))
        optimizers = [_load(path)["optimizer_state_dict"] for path in _by_rank(folder / TAG, "optim_states.pt")]
        if stage == 3:
            models = [_load(path) for path in _by_rank(folder / TAG, "model_states.pt")[:1]]
            return _of_stage_3(optimizers, models[0]["param_shapes"]) | _buffers(models[0])
        model = _load(folder / TAG / "mp_rank_00_model_states.pt")
        shapes = {name: shape for group in model["param_shapes"] for name, shape in group.items()}
        return _of_stage_1_and_2(optimizers, shapes) | _buffers(model)
    except ImportError as error:
        raise ValueError(
            f"{folder}: DeepSpeed's files need DeepSpeed ({error}); pip install 'ring_hilbert[deepspeed]'"
        ) from error
    except (OSError, KeyError, IndexError, RuntimeError) as error:
        raise ValueError(
            f"{folder}: DeepSpeed's files cannot be put together: {type(error).__name__}: {error}"
        ) from error


def _of_stage_0(model: dict[str, Any]) -> dict[str, Tensor]:
    tensors = _buffers(model)
    named: dict[int, tuple[str, Tensor]] = {}
    for name, value in model["module"].items():
        if name not in model["buffer_names"]:
            named.setdefault(value.data_ptr(), (name, value))  # tied parameters once
    # The order of the optimizer: `optimizer.parameter_groups`.
    parameters = sorted(named.values(), key=lambda pair: pair[1].ndim < 2)
    states = model["optimizer"]["state"]
    for number, (name, value) in enumerate(parameters):
        state = states.get(number) or {"step": 0, **{kind: torch.zeros_like(value) for kind in MOMENTS}}
        parts = {"weight": value, **{kind: state[kind] for kind in MOMENTS}}
        tensors |= _named(name, parts, state["step"])
    return tensors


def _of_stage_1_and_2(optimizers: list[dict[str, Any]], shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Each rank has a slice of every group's flat tensor, and a table of the parameters in it."""
    parts: dict[str, dict[str, list[Tensor]]] = {name: {} for name in shapes}
    step: Any = 0
    for rank in optimizers:
        states = rank["base_optimizer_state"]["state"]
        for group, table in enumerate(rank["param_slice_mappings"]):
            flat = {"weight": rank["single_partition_of_fp32_groups"][group]}
            state = states.get(group) or {"step": 0, **{kind: torch.zeros_like(flat["weight"]) for kind in MOMENTS}}
            flat |= {kind: state[kind] for kind in MOMENTS}
            step = state["step"]
            for name, place in table.items():
                for kind, values in flat.items():
                    parts[name].setdefault(kind, []).append(values[place.start : place.start + place.numel])
    tensors = {}
    for name, kinds in parts.items():
        whole = {kind: torch.cat(values).view(shapes[name]) for kind, values in kinds.items()}
        tensors |= _named(name, whole, step)
    return tensors


def _of_stage_3(optimizers: list[dict[str, Any]], groups: list[dict[str, torch.Size]]) -> dict[str, Tensor]:
    """Each rank has an equal part of every parameter, concatenated in a flat tensor per group; the last ones are padded."""
    tensors = {}
    for group, shapes in enumerate(groups):
        flats = []
        for rank in optimizers:
            flat = {"weight": rank["fp32_flat_groups"][group]}
            state = rank["optimizer_state_dict"]["state"].get(group)
            state = state or {"step": 0, **{kind: torch.zeros_like(flat["weight"]) for kind in MOMENTS}}
            flats.append((flat | {kind: state[kind] for kind in MOMENTS}, state["step"]))
        at = 0
        for name, shape in shapes.items():
            size = -(-shape.numel() // len(optimizers))
            whole = {
                kind: torch.cat([flat[kind][at : at + size] for flat, _ in flats])[: shape.numel()].view(shape)
                for kind in ("weight", *MOMENTS)
            }
            tensors |= _named(name, whole, flats[0][1])
            at += size
    return tensors


def _named(name: str, whole: dict[str, Tensor], step: Any) -> dict[str, Tensor]:
    name = name.removeprefix(PREFIX)
    tensors = {f"{kind}.{name}": value.detach().float() for kind, value in whole.items()}
    return tensors | {f"step.{name}": torch.as_tensor(float(step))}


def _buffers(model: dict[str, Any]) -> dict[str, Tensor]:
    names = [name for name in model["buffer_names"] if name in model["module"]]
    return {f"weight.{name.removeprefix(PREFIX)}": model["module"][name] for name in names}


def _by_rank(folder: Path, ending: str) -> list[Path]:
    """The files of all ranks, in rank order."""
    numbered = re.compile(rf"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_{re.escape(ending)}")
    found = {int(match[1]): path for path in folder.iterdir() if (match := numbered.fullmatch(path.name))}
    if sorted(found) != list(range(len(found))) or not found:
        raise ValueError(f"{folder} has the {ending} of ranks {sorted(found)}, not of all from 0 on")
    return [found[rank] for rank in sorted(found)]


def _load(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)
