# SPDX-License-Identifier: Apache-2.0
"""The pure PyTorch engine: FSDP2 over `dp_shard x sp` ranks, replicas over `dp_replicate`, AdamW on float32 shards."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from ring_hilbert.training.config import RunConfig
from ring_hilbert.training.model import LossModel
from ring_hilbert.training.optimizer import adamw, as_configured, state_of
from ring_hilbert.training.readback import read_later
from ring_hilbert.training.storage.background import Saver, State, first_failure
from ring_hilbert.training.storage.manifest import Manifest
from ring_hilbert.training.storage.tensors import Reader, Writer, not_finite
from ring_hilbert.training.weights import Weights, decoder_layers
from ring_hilbert.training.world import World


class TorchEngine:
    """See `Engine`. A layer's parameters are gathered while it computes; gradients are reduced in float32, every micro-step."""

    def __init__(self, skeleton: PreTrainedModel, weights: Weights | None, config: RunConfig, world: World) -> None:
        self.config = config
        self.clip_norm = math.inf if config.optim.clip_norm is None else config.optim.clip_norm
        self.world = world
        self.model = model = LossModel(skeleton)
        _shard(model, config, world)
        model.to_empty(device=world.device)
        if config.train.precision == "fp64":
            model.double()
        if weights is not None:  # otherwise it is only inspected
            _fill(model.model, weights)
        self.optimizer = adamw(model, config, fused=True)

    def backward(self, loss: torch.Tensor) -> None:
        """See `Engine`."""
        loss.backward()

    def step(self, learning_rate: float) -> float:
        """See `Engine`."""
        norm = _whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm))
        found = read_later(norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if self._saver is not None:
            self._saver.fence()
        # Whether there is an update is decided on the device, which would be idle until the host has read the norm.
        self.optimizer.found_inf = norm.isfinite().logical_not().float()  # pyright: ignore[reportAttributeAccessIssue]
        self.optimizer.step()
        del self.optimizer.found_inf  # pyright: ignore[reportAttributeAccessIssue]
        self.optimizer.zero_grad(set_to_none=True)
        return found()

    def gradients(self) -> dict[str, torch.Tensor]:
        """See `Engine`."""
        named = self.model.model.named_parameters()
        return {name: _whole(p.grad) for name, p in named if p.grad is not None}

    def prepare_to_save(self) -> None:
        """See `Engine`."""
        self._saver = Saver(self.world.device, self.config.checkpoint.asynchronous, self.config.timeouts.longest)
        self._saver.prepare(self._state())

    def save(self, folder: Path, publish: Callable[[Manifest], None]) -> Future[Any]:
        """See `Engine`: files of `storage.tensors`, which any number of ranks can load."""
        if self._saver is None:
            self.prepare_to_save()
        assert self._saver is not None
        return self._saver.save(self._state(), Writer(folder, publish))

    def load(self, folder: Path) -> None:
        """See `Engine`."""
        state, reader = self._named_state(), Reader(folder)
        reader.require({key: tensor.shape for key, tensor in state.items()})
        try:
            load(dict(state), storage_reader=reader, process_group=self.world.control)
        except CheckpointException as error:
            raise ValueError(str(first_failure(error)[1])) from error
        as_configured(self.optimizer, self.config)

    def bytes_to_save(self) -> int:
        """See `Engine`."""
        return sum(tensor.numel() * tensor.itemsize for tensor in self._named_state().values())

    def not_finite(self) -> list[str]:
        """See `Engine`."""
        return not_finite({key: _local(tensor) for key, tensor in self._named_state().items()})

    def whole_state(self) -> dict[str, torch.Tensor]:
        """See `Engine`."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return cast(dict[str, torch.Tensor], get_model_state_dict(self.model.model, options=options))

    def close(self) -> None:
        """See `Engine`."""
        if self._saver is not None:
            self._saver.close()

    _saver: Saver | None = None

    def _state(self) -> State:
        """All that is saved: parameters (tied ones once), persistent buffers, AdamW's state."""
        model = self.model.model
        persistent = model.state_dict().keys()  # this also reshards parameters left gathered by an evaluation
        parameters = dict(model.named_parameters())
        tensors = parameters | {name: x for name, x in model.named_buffers() if name in persistent}
        state = {"weight": {name: tensor.detach() for name, tensor in tensors.items()}}
        for name, parameter in parameters.items():
            for kind, value in state_of(parameter, self.optimizer).items():
                state.setdefault(kind, {})[name] = value
        return state

    def _named_state(self) -> dict[str, torch.Tensor]:
        """The same by the names of `storage.tensors`."""
        return {f"{kind}.{name}": x for kind, tensors in self._state().items() for name, x in tensors.items()}


def _shard(model: LossModel, config: RunConfig, world: World) -> None:
    """Make every layer, and the rest of the model, an FSDP2 unit that sums gradients instead of averaging them."""
    assert world.mesh is not None
    mesh = world.mesh if world.mesh.size(0) > 1 else world.mesh["shard"]
    bf16 = config.train.precision == "bf16"
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    for module in (*decoder_layers(model), model):
        unit = fully_shard(module, mesh=mesh, mp_policy=policy)
        assert isinstance(unit, FSDPModule)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)


def _fill(model: torch.nn.Module, weights: Weights) -> None:
    """Give every tensor of `model` this rank's part of its initial values."""
    tensors = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    with torch.no_grad():
        for part in weights:
            for name, value in part.items():
                target = tensors[name]
                if isinstance(target, DTensor):
                    mine = distribute_tensor(
                        value.to(target.device), target.device_mesh, target.placements, src_data_rank=None
                    )
                    target.to_local().copy_(mine.to_local())
                else:
                    target.copy_(value)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x
