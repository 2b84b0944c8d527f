# SPDX-License-Identifier: Apache-2.0
"""The same losses whatever the number of ranks, how they share the work, and how many micro-steps a batch takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ring_hilbert.training.checkpoint import Checkpoints
from ring_hilbert.training.config import RunConfig
from ring_hilbert.training.engine import make_engine
from ring_hilbert.training.evaluate import evaluate
from ring_hilbert.training.loop import Run
from ring_hilbert.training.model import build_model, model_config
from ring_hilbert.training.world import open_world
from tests.ranks import run_ranks
from tests.tiny_run import VOCAB, PaddedDataset, tiny_config

STEPS = 20


def train(rank: int, world_size: int, config: RunConfig) -> dict[str, list[float]]:
    """Losses and gradient norms of `STEPS` steps, and the held-out loss and its positions after them."""
    assert world_size == config.parallel.world_size
    with open_world(config.parallel) as world:
        assert world.rank == rank
        dataset = PaddedDataset()
        hf_config = model_config(config)
        engine = make_engine(build_model(config, hf_config), config, world)
        run = Run(config, world, engine, Checkpoints(config, world), dataset, dataset, hf_config)
        assert run.eval_batches is not None
        steps = [run.train_step() for _ in range(STEPS)]
        evaluation = evaluate(engine.model, run.eval_batches, VOCAB, world)
        seen = torch.isfinite(evaluation.position_loss)
        return {
            "losses": [loss for loss, _, _ in steps],
            "norms": [norm for _, norm, _ in steps],
            "tokens": [run.progress.tokens, run.progress.sequences],
            "evaluation": [evaluation.loss, evaluation.tokens, evaluation.unigram_loss(torch.ones(VOCAB))],
            "positions": evaluation.position_loss[seen].tolist(),
        }


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """One rank, the whole batch in one micro-step."""
    (result,) = run_ranks(train, 1, tiny_config(tmp_path_factory.mktemp("run"), train__micro_batch=4))
    assert result["losses"][-1] < 0.9 * result["losses"][0]  # it learns, so equal losses say something
    return result


@pytest.mark.parametrize(
    ("sp", "dp", "micro_batch"), [(1, 1, 1), (2, 1, 2), (1, 2, 2), (1, 2, 1), (4, 1, 2), (2, 2, 2), (1, 4, 1)]
)
def test_same_losses(tmp_path: Path, one_rank: dict[str, list[float]], sp: int, dp: int, micro_batch: int) -> None:
    """Relative 1e-5 at each of 20 steps, in evaluation too, and the very same number on every rank."""
    config = tiny_config(tmp_path, parallel__sp=sp, parallel__dp_replicate=dp, train__micro_batch=micro_batch)
    results = run_ranks(train, sp * dp, config)
    assert all(result == results[0] for result in results)
    for key in ("losses", "evaluation"):
        assert results[0][key] == pytest.approx(one_rank[key], rel=1e-5)
    for key in ("norms", "positions"):
        assert results[0][key] == pytest.approx(one_rank[key], rel=1e-3)
    assert results[0]["tokens"] == one_rank["tokens"]


def test_bf16_keeps_float32_weights(tmp_path: Path, one_rank: dict[str, list[float]]) -> None:
    """Computing in bfloat16 follows the float32 run closely, over ranks and micro-steps too."""
    config = tiny_config(tmp_path, train__precision="bf16", parallel__sp=2)
    losses = run_ranks(train, 2, config)[0]["losses"]
    assert losses == pytest.approx(one_rank["losses"], rel=5e-3)
    assert losses != one_rank["losses"]
