# SPDX-License-Identifier: Apache-2.0
"""What the training loop asks of an engine, and the choice of one by the configuration.

An engine owns the parameters and how they lie over the ranks, the gradients' sum, clipping and AdamW. The loop knows only this.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from transformers import PretrainedConfig

from ring_hilbert.training.config import RunConfig
from ring_hilbert.training.engine_torch import TorchEngine
from ring_hilbert.training.model import LossModel, build_skeleton, initial_weights
from ring_hilbert.training.world import World


class Engine(Protocol):
    """A model in training. Every method is called by all ranks, in the same order."""

    @property
    def model(self) -> torch.nn.Module:
        """What computes: called with what `shard_batch` returns, it gives the loss of every row."""
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of this rank's part of the loss (a sum over its tokens, already divided by the global count)."""
        ...

    def step(self, learning_rate: float) -> float:
        """Clip the gradients, summed over all ranks, update, clear them; returns their global norm before clipping.

        Where that is not finite nothing is updated.
        """
        ...

    def gradients(self) -> dict[str, torch.Tensor]:
        """Whole gradients by the name of the parameter, before `step`: to look at, in small models."""
        ...

    def save(self, folder: Path) -> None:
        """Write model and optimizer below `folder`, which is new."""
        ...

    def load(self, folder: Path) -> None:
        """Take over what `save` wrote."""
        ...

    def whole_state(self) -> dict[str, torch.Tensor]:
        """The model's whole float32 state dict, on the CPU of rank 0; empty on the others."""
        ...


def check_engine(config: RunConfig) -> None:
    """Refuse what no engine does yet.

    Raises:
        ValueError: `engine` asks for it.
    """
    if config.engine != "torch":
        raise ValueError(f"engine: {config.engine} is not available in this version; use engine: torch")


def make_engine(config: RunConfig, hf_config: PretrainedConfig, world: World) -> Engine:
    """The engine of a checked configuration, with its model in initial state.

    Raises:
        ValueError: the model cannot be made or loaded.
    """
    with world.together():
        weights = initial_weights(config, hf_config)
        model = LossModel(build_skeleton(config, hf_config))
    return TorchEngine(model, weights, config, world)
