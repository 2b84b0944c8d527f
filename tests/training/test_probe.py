# SPDX-License-Identifier: Apache-2.0
"""The probe at the start of a run: right engines pass, planted faults are named."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from ring_hilbert.training import engine_deepspeed, engine_torch
from ring_hilbert.training.config import RunConfig
from ring_hilbert.training.model import model_config
from ring_hilbert.training.probe import Finding, probe, worst
from ring_hilbert.training.world import World, open_world
from tests.harness.deepspeed_rank import STAGES, deepspeed_rank, zero
from tests.harness.ranks import run_ranks, run_ranks_collect
from tests.harness.tiny_run import tiny_config
from tests.training.test_invariance import needs_deepspeed

WIDE = {"attention__head_shift": 0, "train__checkpoint_activations": True}


def right(rank: int, world_size: int, configs: list[RunConfig]) -> list[tuple[Finding, float]]:
    found = []
    with deepspeed_rank(rank):
        for config in configs:
            with open_world(config.parallel) as world:
                if config.engine == "deepspeed":
                    engine_deepspeed.import_deepspeed(world)  # builds its extension, once per machine
                start = time.monotonic()
                found.append((probe(config, model_config(config), world), time.monotonic() - start))
    return found


def test_right_engines(tmp_path: Path) -> None:
    """Both ways to spread four ranks, bfloat16, zigzag, other families, dropout."""
    shared = {"sp": 2, "dp_shard": 2}
    configs = [
        tiny_config(tmp_path, parallel=shared),
        tiny_config(tmp_path, parallel=shared, train__precision="bf16", **WIDE),
        tiny_config(tmp_path, parallel={"sp": 2, "dp_replicate": 2}, attention__layout="zigzag"),
        tiny_config(tmp_path, parallel=shared, model__config__model_type="phi", model__config__resid_pdrop=0.5),
        tiny_config(tmp_path, parallel={"sp": 1, "dp_shard": 2, "dp_replicate": 2}, model__config__model_type="qwen3"),
    ]
    for config, (finding, seconds) in zip(configs, run_ranks(right, 4, configs)[0], strict=True):
        tolerance = 0.03 if config.train.precision == "bf16" else 1e-5
        assert abs(finding.factor - 1) < tolerance and finding.rest < tolerance
        assert seconds < 20


@needs_deepspeed
def test_right_deepspeed(tmp_path: Path) -> None:
    configs = [tiny_config(tmp_path, **zero(stage), parallel__sp=2) for stage in STAGES]
    for finding, seconds in run_ranks(right, 2, configs, timeout=200)[0]:
        assert abs(finding.factor - 1) < 1e-5 and finding.rest < 1e-5
        assert seconds < 20


def scaled(world: World) -> World:
    """FSDP2's own mean."""
    engine_torch.FSDPModule.set_gradient_divide_factor = lambda *_: None  # type: ignore[method-assign]
    return world


def without_sp(world: World) -> World:
    """Gradients summed over the ranks of a sequence nowhere."""
    mesh = init_device_mesh("cpu", (world.size, 1), mesh_dim_names=("shard", "replicate"))
    return replace(world, mesh=_Alone(mesh["replicate"]))


class _Alone:
    """A mesh of one rank in the place of the mesh of all."""

    def __init__(self, mesh: Any) -> None:
        self.mesh = mesh

    def size(self, _: int) -> int:
        return 1

    def __getitem__(self, _: str) -> Any:
        return self.mesh


def per_rank_mean(world: World) -> World:
    """Every rank divides by its own count."""
    return _OwnCounts(**vars(world))


class _OwnCounts(World):
    """A world whose counts are not summed."""

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if tensor.dtype == torch.int64 else super().sum(tensor)


FAULTS: dict[str, tuple[Callable[[World], World], str]] = {
    "factor": (scaled, r"is 0\.5 times the true one \(1 / sp\)"),
    "no sum": (without_sp, "not a multiple of the true one .* sum over the ranks of a sequence is missing"),
    "per rank": (per_rank_mean, "not a multiple of the true one .* its own count"),
}


def faulty(rank: int, world_size: int, config: RunConfig, fault: str) -> None:
    kept = engine_torch.FSDPModule.set_gradient_divide_factor
    try:
        with open_world(config.parallel) as world:
            probe(config, model_config(config), FAULTS[fault][0](world))
    finally:
        engine_torch.FSDPModule.set_gradient_divide_factor = kept  # type: ignore[method-assign]


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults(tmp_path: Path, fault: str) -> None:
    config = tiny_config(tmp_path, parallel__sp=2, parallel__dp_shard=1)
    for error in run_ranks_collect(faulty, 2, config, fault):
        assert isinstance(error, ValueError)
        assert re.search(FAULTS[fault][1], str(error)), error


def faulty_deepspeed(rank: int, world_size: int, config: RunConfig) -> None:
    """The loss as it is, without what `loss_for_backward` knows of DeepSpeed."""
    kept = engine_deepspeed.loss_for_backward
    engine_deepspeed.loss_for_backward = lambda loss, _: loss
    try:
        with deepspeed_rank(rank), open_world(config.parallel) as world:
            probe(config, model_config(config), world)
    finally:
        engine_deepspeed.loss_for_backward = kept


@needs_deepspeed
@pytest.mark.parametrize(("sp", "named"), [(2, "sp"), (1, "dp")])
def test_wrong_factor_of_deepspeed(tmp_path: Path, sp: int, named: str) -> None:
    config = tiny_config(tmp_path, **zero({"stage": 3}), parallel={"sp": sp, "dp_shard": 2 // sp})
    for error in run_ranks_collect(faulty_deepspeed, 2, config):
        assert rf"is 0.5 times the true one (1 / {named})" in str(error)


def test_gradients_that_are_rounding_say_nothing() -> None:
    """A key's bias, for instance; but a gradient that should be zero and is not does."""
    truth = {"weight": torch.ones(3, dtype=torch.float64), "bias": torch.full((3,), 1e-17, dtype=torch.float64)}
    good = {"weight": torch.ones(3), "bias": torch.tensor([1e-9, -1e-9, 0.0])}
    assert worst(good, truth).factor == 1 and worst(good, truth).rest < 1e-6
    assert worst({**good, "bias": torch.ones(3)}, truth).name == "bias"
