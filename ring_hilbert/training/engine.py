# SPDX-License-Identifier: Apache-2.0
"""The engine protocol of the training loop, and the choice of an engine by the configuration.

An engine owns the parameters and their sharding, the reduction of gradients, clipping and AdamW. The loop knows nothing more.
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
        """The module to call: given what `shard_batch` returns, it returns the loss of every row."""
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of this rank's part of the loss (a sum over its tokens, already divided by the global count)."""
        ...

    def step(self, learning_rate: float) -> float:
        """Clip the gradients, summed over all ranks, update, and clear them; returns their global norm before clipping.

        If that is not finite, nothing is updated.
        """
        ...

    def gradients(self) -> dict[str, torch.Tensor]:
        """Whole gradients by parameter name, before `step`: for inspection, in small models."""
        ...

    def prepare_to_save(self) -> None:
        """Do ahead of the first step what would delay the first `save`."""
        ...

    def save(self, folder: Path, publish: Callable[[Manifest], None]) -> Future[Any]:
        """Start writing model and optimizer below `folder`, which is new; `step` may be called before it is done.

        Rank 0 calls `publish` with what all ranks have written. The future completes when that returns or has failed.
        """
        ...

    def load(self, folder: Path) -> None:
        """Load what `save` or `ring-hilbert convert` wrote.

        Raises:
            ValueError: if it cannot be read, or is of another model.
        """
        ...

    def bytes_to_save(self) -> int:
        """At least the number of bytes that `save` will write, over all ranks."""
        ...

    def not_finite(self) -> list[str]:
        """Names of weights and moments that are not finite on this rank."""
        ...

    def whole_state(self) -> dict[str, torch.Tensor]:
        """The model's whole float32 state dict, on the CPU of rank 0; empty on the others."""
        ...

    def close(self) -> None:
        """Release its resources; it is not used afterwards."""
        ...


def check_engine(config: RunConfig) -> None:
    """Check the settings of the chosen engine.

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
    """Whether the newest checkpoint in a folder is in the common form that every engine loads."""
    found = checkpoints_in(folder)
    return bool(found) and read_run(found[-1])["engine"]["name"] == COMMON


def make_engine(config: RunConfig, hf_config: PretrainedConfig, world: World, *, to_load: bool = False) -> Engine:
    """The engine of a validated configuration, with its model in the initial state.

    `to_load`: `load` follows, so that engine torch leaves its parameters unset, rather than drawing or reading them for nothing.

    Raises:
        ValueError: if the model cannot be made or loaded.
    """
    with world.together():
        weights = initial_weights(config, hf_config, only_buffers=to_load and config.engine == "torch")
        skeleton = build_skeleton(config, hf_config, world.device)
    kind = DeepSpeedEngine if config.engine == "deepspeed" else TorchEngine
    engine = kind(skeleton, weights, config, world)
    world.whereabouts.follow(decoder_layers(engine.model))
    return engine
