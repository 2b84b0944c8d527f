# SPDX-License-Identifier: Apache-2.0
"""What the training loop asks of an engine, and the choice of one by the configuration.

An engine owns the parameters and how they lie over the ranks, the gradients' sum, clipping and AdamW. The loop knows only this.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from ring_hilbert.training.config import RunConfig
from ring_hilbert.training.engine_torch import TorchEngine
from ring_hilbert.training.world import World


class Engine(Protocol):
    """A model in training. Every method is called by all ranks, in the same order."""

    @property
    def model(self) -> torch.nn.Module:
        """What computes: called with a micro-batch, it returns an object with `logits`."""
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of this rank's part of the loss (a sum over its tokens, already divided by the global count)."""
        ...

    def step(self, learning_rate: float) -> float:
        """Sum the gradients over all ranks, clip, update, clear them; returns the global gradient norm before clipping."""
        ...

    def state(self) -> dict[str, Any]:
        """Model and optimizer state for `torch.distributed.checkpoint` to save, or to load into."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over a `state()` that has been loaded into."""
        ...

    def export(self, folder: Path) -> None:
        """Write the model as Transformers does (`save_pretrained`), from rank 0."""
        ...


def check_engine(config: RunConfig) -> None:
    """Refuse what no engine does yet.

    Raises:
        ValueError: `engine` or `parallel` asks for it.
    """
    if config.engine != "torch":
        raise ValueError(f"engine: {config.engine} is not available in this version; use engine: torch")
    if config.parallel.dp_shard > 1:
        raise ValueError(
            f"parallel.dp_shard {config.parallel.dp_shard}: engine torch keeps whole parameters on every rank; use "
            f"parallel.dp_shard=1 parallel.dp_replicate={config.parallel.dp}"
        )


def make_engine(model: PreTrainedModel, config: RunConfig, world: World) -> Engine:
    """The engine of a checked configuration; `model` is in float32, the same on every rank."""
    return TorchEngine(model, config, world)
