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
from ring_hilbert.training.engine_deepspeed import DeepSpeedEngine, deepspeed_settings
from ring_hilbert.training.engine_torch import TorchEngine
from ring_hilbert.training.model import build_skeleton, initial_weights
from ring_hilbert.training.weights import decoder_layers
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

    def close(self) -> None:
        """Let go of what it holds; it is not used any more."""
        ...


def check_engine(config: RunConfig) -> None:
    """Find what is wrong with the settings of the chosen engine.

    Raises:
        ValueError: naming the key.
    """
    if config.engine != "deepspeed":
        return
    deepspeed_settings(config)
    if config.checkpoint.init is not None and not config.checkpoint.trust:
        raise ValueError(
            "checkpoint.trust: a stage, or a run with checkpoint.init, loads DeepSpeed's files, which are pickles and can run any "
            "code; if those are yours, checkpoint.trust=true"
        )


def make_engine(config: RunConfig, hf_config: PretrainedConfig, world: World) -> Engine:
    """The engine of a checked configuration, with its model in initial state.

    Raises:
        ValueError: the model cannot be made or loaded.
    """
    with world.together():
        weights = initial_weights(config, hf_config)
        skeleton = build_skeleton(config, hf_config)
    kind = DeepSpeedEngine if config.engine == "deepspeed" else TorchEngine
    engine = kind(skeleton, weights, config, world)
    world.whereabouts.follow(decoder_layers(engine.model))
    return engine
