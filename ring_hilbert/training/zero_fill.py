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
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


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
        part = Part(parameter, engine)
        for kind in ("weight", *MOMENTS):
            part.copy(kind, whole[kind])
        if part.flat is not None:  # DeepSpeed's own AdamW has integer step counts.
            base.state[part.flat]["step"] = whole["step"] if isinstance(base, torch.optim.AdamW) else int(whole["step"])
        _refresh(parameter, whole["weight"])
    for key, buffer in buffers.items():
        buffer.copy_(reader[key])


class Part:
    """This rank's part of a parameter, if it has any: `count` elements from `first` on, which lie in `flat` from `at` on."""

    def __init__(self, parameter: Any, engine: Any) -> None:
        zero, mapping = engine.optimizer, getattr(parameter, "_hp_mapping", None)
        self.engine, self.flat = engine, None
        if engine.zero_optimization_stage() == 3:
            group, at, size = zero.grad_position[zero.get_param_id(parameter)]
            self.first = dist.get_rank() * size  # the last ranks' parts are padded
            self.count = max(0, min(size, parameter.ds_numel - self.first))
            self.flat, self.at = zero.fp32_partitioned_groups_flat[group], int(at)
        elif mapping is not None:
            groups = getattr(zero, "single_partition_of_fp32_groups", None) or zero.fp32_groups_flat_partition
            there, here = mapping.lp_fragment_address, mapping.hp_fragment_address
            self.flat = groups[mapping.param_group_index]
            self.at, self.first, self.count = here.start, there.start, there.numel
        elif not hasattr(parameter, "_hp_mapping"):  # there is no other copy
            self.flat, self.at, self.first, self.count = parameter, 0, 0, parameter.numel()

    def copy(self, kind: str, whole: Tensor) -> None:
        """Set the weight or a moment to this part of `whole`."""
        if self.flat is not None:
            target = self.flat if kind == "weight" else state_of(self.flat, base_optimizer(self.engine))[kind]
            mine = whole.view(-1)[self.first : self.first + self.count]
            target.detach().view(-1)[self.at : self.at + self.count].copy_(mine)


def _refresh(parameter: Any, whole: Tensor) -> None:
    """Update the compute copy of the parameter."""
    if not hasattr(parameter, "ds_tensor"):
        parameter.data.copy_(whole)
        return
    size = parameter.ds_tensor.numel()
    mine = whole.view(-1)[dist.get_rank() * size :][:size]
    parameter.ds_tensor.data[: mine.numel()].copy_(mine)
