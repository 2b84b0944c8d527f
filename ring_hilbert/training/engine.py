# SPDX-License-Identifier: Apache-2.0
"""What the training loop asks of an engine, and the choice of one by the configuration.

An engine owns the parameters and how they lie over the ranks, the gradients' sum, clipping and AdamW. The loop knows only this.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PretrainedConfig

from ring_hilbert.training.config import RunConfig
from ring_hilbert.training.engine_deepspeed import DeepSpeedEngine, deepspeed_settings
from ring_hilbert.training.engine_torch import TorchEngine
from ring_hilbert.training.model import build_skeleton, initial_weights
from ring_hilbert.training.storage.folder import COMMON, checkpoints_in, read_run
from ring_hilbert.training.storage.manifest import Manifest
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

    def prepare_to_save(self) -> None:
        """Do before the first step what would hold up the first `save`."""
        ...

    def save(self, folder: Path, publish: Callable[[Manifest], None]) -> Future[Any]:
        """Begin to write model and optimizer below `folder`, which is new; `step` may be called before it is over.

        Rank 0 calls `publish` with what all ranks have written. The result is done when that is, or when it failed.
        """
        ...

    def load(self, folder: Path) -> None:
        """Take over what `save` or `ring-hilbert convert` wrote.

        Raises:
            ValueError: it cannot be read, or is of another model.
        """
        ...

    def bytes_to_save(self) -> int:
        """What `save` will write, on all ranks together; at least that."""
        ...

    def not_finite(self) -> list[str]:
        """Names of weights and moments that are not finite on this rank."""
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
    init = config.checkpoint.init
    if init is not None and not config.checkpoint.trust and not _is_common(Path(init)):
        raise ValueError(
            "checkpoint.trust: a stage, or a run with checkpoint.init, loads DeepSpeed's files, which are pickles and can run any "
            "code; if those are yours, checkpoint.trust=true"
        )


def _is_common(folder: Path) -> bool:
    """Whether the newest checkpoint in a folder is in the form that every engine loads."""
    found = checkpoints_in(folder)
    return bool(found) and read_run(found[-1])["engine"]["name"] == COMMON


def make_engine(config: RunConfig, hf_config: PretrainedConfig, world: World) -> Engine:
    """The engine of a checked configuration, with its model in initial state.

    Raises:
        ValueError: the model cannot be made or loaded.
    """
    with world.together():
        weights = initial_weights(config, hf_config)
        skeleton = build_skeleton(config, hf_config, world.device)
    kind = DeepSpeedEngine if config.engine == "deepspeed" else TorchEngine
    engine = kind(skeleton, weights, config, world)
    world.whereabouts.follow(decoder_layers(engine.model))
    return engine
