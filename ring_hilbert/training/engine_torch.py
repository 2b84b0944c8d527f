# SPDX-License-Identifier: Apache-2.0
"""The plain engine: whole parameters on every rank, gradients summed in float32, AdamW."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from transformers import PreTrainedModel

from ring_hilbert.training.config import RunConfig
from ring_hilbert.training.world import World

BUCKET_ELEMENTS = 2**24  # float32 gradients per all-reduce (64 MiB)


class TorchEngine:
    """Replicated parameters. `master` is float32 and belongs to the optimizer; `model` computes, and is a bfloat16 copy in bf16."""

    def __init__(self, model: PreTrainedModel, config: RunConfig, world: World) -> None:
        self.world = world
        self.clip_norm = math.inf if config.optim.clip_norm is None else config.optim.clip_norm
        self.master = model.to(world.device)  # type: ignore[arg-type]  # the stub of Transformers lacks self
        for tensor in (*self.master.parameters(), *self.master.buffers()):
            world.broadcast(tensor.data)
        self.model = self.master
        if config.train.precision == "bf16":
            self.model = copy.deepcopy(self.master)
            for parameter in self.model.parameters():  # buffers stay: RoPE frequencies need float32
                parameter.data = parameter.data.bfloat16()
        parameters = list(self.master.parameters())
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.optim.weight_decay},
                {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},  # norms and biases
            ],
            lr=config.optim.lr,
            betas=(config.optim.betas[0], config.optim.betas[1]),
        )

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate in float32 on this rank; see `Engine`."""
        loss.backward()
        if self.model is not self.master:
            for computed, kept in zip(self.model.parameters(), self.master.parameters(), strict=True):
                if computed.grad is not None:
                    gradient = computed.grad.float()
                    kept.grad = gradient if kept.grad is None else kept.grad.add_(gradient)
                    computed.grad = None

    def step(self, learning_rate: float) -> float:
        """See `Engine`.

        Raises:
            FloatingPointError: the gradient norm is not finite; the parameters are as they were.
        """
        parameters = list(self.master.parameters())
        sum_gradients(parameters, self.world)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.clip_norm).item()
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"the global gradient norm is {norm}; a lower optim.lr or a longer warm-up may help"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._refresh()
        return norm

    def state(self) -> dict[str, Any]:
        """See `Engine`."""
        model, optimizer = get_state_dict(self.master, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def load_state(self, state: dict[str, Any]) -> None:
        """See `Engine`."""
        set_state_dict(
            self.master, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        self._refresh()

    def export(self, folder: Path) -> None:
        """See `Engine`. Weights are the float32 ones; the saved `dtype` is that of training, which loading converts to."""
        if self.world.is_main:
            self.model.save_pretrained(folder, state_dict=self.master.state_dict())

    def _refresh(self) -> None:
        if self.model is not self.master:
            with torch.no_grad():
                for computed, kept in zip(self.model.parameters(), self.master.parameters(), strict=True):
                    computed.copy_(kept)


def sum_gradients(parameters: Iterable[torch.nn.Parameter], world: World) -> None:
    """Replace every gradient by its sum over all ranks, one all-reduce per bucket; a missing one counts as zero."""
    for bucket in _buckets(parameters):
        for parameter in bucket:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if world.size > 1:
            gradients = [parameter.grad for parameter in bucket if parameter.grad is not None]
            flat = world.sum(torch.cat([gradient.flatten() for gradient in gradients]))
            for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(total.view_as(gradient))


def _buckets(parameters: Iterable[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    bucket: list[torch.nn.Parameter] = []
    elements = 0
    for parameter in parameters:
        bucket.append(parameter)
        elements += parameter.numel()
        if elements >= BUCKET_ELEMENTS:
            yield bucket
            bucket, elements = [], 0
    if bucket:
        yield bucket
