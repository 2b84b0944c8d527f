# SPDX-License-Identifier: Apache-2.0
"""A rank's random state, from which dropout draws: at the start of a run, and in a checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ring_hilbert.training.config import RunConfig
from ring_hilbert.training.storage.manifest import FileSum, read_tensors, write_tensors
from ring_hilbert.training.world import World


def seed_rank(config: RunConfig, world: World, step: int) -> None:
    """Seed this rank's own random numbers from seed, step and rank."""
    seeds = np.random.SeedSequence((config.train.seed, step, world.rank))
    torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> 1))


def random_file(world: World) -> str:
    """The name of this rank's file in a checkpoint."""
    return f"random_{world.rank:05d}.safetensors"


def write_random(path: Path, world: World) -> FileSum:
    """Write this rank's state."""
    state = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(world.device)
    return write_tensors(path, state)


def read_random(path: Path, world: World) -> None:
    """Restore what `write_random` wrote, including the device's state if both runs have a device.

    Raises:
        ValueError: if the file is damaged, or not a random state.
    """
    state = read_tensors(path)
    try:
        torch.set_rng_state(state["cpu"])
        if world.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], world.device)
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} is not a random state: {error}") from error
