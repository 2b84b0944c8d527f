# SPDX-License-Identifier: Apache-2.0
"""AdamW of a run, the same in every engine."""

from __future__ import annotations

from typing import Any

import torch

from ring_hilbert.training.config import RunConfig


def parameter_groups(model: torch.nn.Module, config: RunConfig) -> list[dict[str, Any]]:
    """Matrices and embeddings with weight decay; norms and biases without."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.optim.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def adamw(model: torch.nn.Module, config: RunConfig) -> torch.optim.AdamW:
    """The optimizer; its learning rate is set at every step."""
    betas = (config.optim.betas[0], config.optim.betas[1])
    return torch.optim.AdamW(parameter_groups(model, config), lr=config.optim.lr, betas=betas)
