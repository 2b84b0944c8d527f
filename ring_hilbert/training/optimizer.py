# SPDX-License-Identifier: Apache-2.0
"""A run's AdamW, the same in every engine."""

from __future__ import annotations

from typing import Any

import torch

from ring_hilbert.training.config import RunConfig


def parameter_groups(model: torch.nn.Module, config: RunConfig) -> list[dict[str, Any]]:
    """Matrices and embeddings with weight decay; norms and biases without."""
    groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for parameter in model.parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves an empty tensor, with its shape here
        groups[len(shape) >= 2].append(parameter)
    return [
        {"params": groups[True], "weight_decay": config.optim.weight_decay},
        {"params": groups[False], "weight_decay": 0.0},
    ]


def adamw(model: torch.nn.Module, config: RunConfig, *, fused: bool = False) -> torch.optim.AdamW:
    """The optimizer; its learning rate is set at every step. `fused`: one kernel, which can be told on the device to do nothing."""
    groups = parameter_groups(model, config)
    return torch.optim.AdamW(groups, lr=config.optim.lr, betas=betas_of(config), fused=fused or None)


def betas_of(config: RunConfig) -> tuple[float, float]:
    """The betas of both moments."""
    return config.optim.betas[0], config.optim.betas[1]


def state_of(parameter: torch.Tensor, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """AdamW's state of a parameter: `step`, `exp_avg`, `exp_avg_sq`; before the first update its initial state."""
    state = optimizer.state[parameter]
    if not state:
        zero = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        fused = isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["fused"]
        state.update(step=torch.zeros((), device=parameter.device if fused else None), **zero)
    return {key: state[key] for key in ("step", "exp_avg", "exp_avg_sq")}


def as_configured(optimizer: Any, config: RunConfig) -> None:
    """Set this run's weight decay and betas, after loading a state that has another run's."""
    for group, decay in zip(optimizer.param_groups, (config.optim.weight_decay, 0.0), strict=True):
        group.update(weight_decay=decay, betas=betas_of(config))
