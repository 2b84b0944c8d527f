# SPDX-License-Identifier: Apache-2.0
"""Copies whole weights and moments into a DeepSpeed ZeRO rank's partitions, float32 in flat groups."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ring_hilbert.training.optimizer import state_of
from ring_hilbert.training.storage.tensors import KINDS, MOMENTS, Reader


def base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The optimizer with which an engine of any stage updates."""
    return engine.optimizer.optimizer if engine.zero_optimization_stage() else engine.optimizer


def fill(engine: Any, reader: Reader) -> None:
    """Load a checkpoint's weights and moments into an engine whose module has the language model as `model`. On every rank.

    Raises:
        ValueError: if they are of another model.
    """
    model = engine.module.model
    named, persistent = dict(model.named_parameters()), model.state_dict().keys()
    buffers = {f"weight.{name}": buffer for name, buffer in model.named_buffers() if name in persistent}
    needed = {key: buffer.shape for key, buffer in buffers.items()}
    for name, parameter in named.items():
        shape = torch.Size(getattr(parameter, "ds_shape", parameter.shape))
        needed |= {f"{kind}.{name}": shape if kind != "step" else torch.Size() for kind in KINDS}
    reader.require(needed)
    steps = {reader[f"step.{name}"].item() for name in named}
    if engine.zero_optimization_stage() and len(steps) > 1:
        raise ValueError(f"{reader.folder}: parameters were updated {sorted(steps)} times; ZeRO has one count for all")
    base = base_optimizer(engine)
    for name, parameter in named.items():
        whole = {kind: reader[f"{kind}.{name}"] for kind in KINDS}
        place = _place_of(parameter, engine)
        if place is not None:
            flat, at, first, count = place
            state = state_of(flat, base)
            for kind, target in (("weight", flat), *((kind, state[kind]) for kind in MOMENTS)):
                target.detach().view(-1)[at : at + count].copy_(whole[kind].view(-1)[first : first + count])
            # DeepSpeed's own AdamW has integer step counts.
            base.state[flat]["step"] = whole["step"] if isinstance(base, torch.optim.AdamW) else int(whole["step"])
        _refresh(parameter, whole["weight"])
    for key, buffer in buffers.items():
        buffer.copy_(reader[key])


def _place_of(parameter: Any, engine: Any) -> tuple[Tensor, int, int, int] | None:
    """The flat float32 tensor with this rank's part of a parameter, the offset in it, the part's first element, and its size."""
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        return parameter, 0, 0, parameter.numel()
    if stage == 3:
        group, at, size = zero.grad_position[zero.get_param_id(parameter)]
        first = dist.get_rank() * size  # the last ranks' parts are padded
        count = max(0, min(size, parameter.ds_numel - first))
        return zero.fp32_partitioned_groups_flat[group], int(at), first, count
    part = parameter._hp_mapping
    if part is None:
        return None
    there, here = part.lp_fragment_address, part.hp_fragment_address
    return zero.single_partition_of_fp32_groups[part.param_group_index], here.start, there.start, there.numel


def _refresh(parameter: Any, whole: Tensor) -> None:
    """Update the compute copy of the parameter."""
    if not hasattr(parameter, "ds_tensor"):
        parameter.data.copy_(whole)
        return
    size = parameter.ds_tensor.numel()
    mine = whole.view(-1)[dist.get_rank() * size :][:size]
    parameter.ds_tensor.data[: mine.numel()].copy_(mine)
