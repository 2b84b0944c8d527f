# SPDX-License-Identifier: Apache-2.0
"""The same losses and gradients whatever the engine, the number of ranks, how they share the work, and the micro-steps."""

from __future__ import annotations

import importlib.util
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from ring_hilbert.integrations.transformers_config import order_of
from ring_hilbert.parallel.sharding import shard_batch
from ring_hilbert.training.checkpoint import Checkpoints
from ring_hilbert.training.config import RunConfig
from ring_hilbert.training.engine import make_engine
from ring_hilbert.training.evaluate import evaluate
from ring_hilbert.training.loop import Run
from ring_hilbert.training.model import initial_weights, model_config
from ring_hilbert.training.world import open_world
from tests.harness.deepspeed_rank import STAGES, deepspeed_rank, zero
from tests.harness.ranks import run_ranks
from tests.harness.tiny_run import VOCAB, PaddedDataset, tiny_config

pytestmark = pytest.mark.slow  # the references of its tests, and their ranks

STEPS = 20
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None or shutil.which("g++") is None,
    reason="needs DeepSpeed, and g++ to build it",
)
Gradients = dict[str, torch.Tensor]


def true_gradients(config: RunConfig) -> Gradients:
    """Of the first step, by autograd of Transformers' own model and loss on whole sequences, in float64."""
    hf_config = model_config(config)
    model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float64)
    initial_weights(config, hf_config).fill(model)
    samples = [PaddedDataset()[number] for number in range(config.sequences_per_step)]
    full = {key: torch.stack([torch.from_numpy(sample[key]) for sample in samples]) for key in samples[0]}
    batch = shard_batch(full, order=None if config.attention.order is None else order_of(hf_config))
    labels = batch.pop("shift_labels").flatten()
    logits = model(**batch).logits.flatten(0, 1)
    (F.cross_entropy(logits, labels, reduction="sum") / (labels != -100).sum()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def train(
    rank: int, world_size: int, config: RunConfig, truth: Gradients, steps: int = STEPS
) -> dict[str, list[float]]:
    """Losses and gradient norms of `steps` steps, relative errors of the first gradients, and the held-out loss at the end."""
    assert world_size == config.parallel.world_size
    with open_world(config.parallel) as world:
        assert world.rank == rank
        dataset, held_out = PaddedDataset(), PaddedDataset(16)
        hf_config = model_config(config)
        engine = make_engine(config, hf_config, world)
        run = Run(config, world, engine, Checkpoints(config, world, {}), dataset, held_out, hf_config)
        assert run.eval_batches is not None
        errors: list[float] = []
        update = engine.step

        def compare_and_update(learning_rate: float) -> float:
            if not errors:
                gradients = {name: gradient.cpu() for name, gradient in engine.gradients().items()}
                assert gradients.keys() == truth.keys()
                errors.extend(((gradients[name] - true).norm() / true.norm()).item() for name, true in truth.items())
            return update(learning_rate)

        engine.step = compare_and_update  # type: ignore[method-assign]
        numbers = [run.train_step() for _ in range(steps)]
        evaluation = evaluate(engine.model, run.eval_batches, VOCAB, world)
        seen = torch.isfinite(evaluation.position_loss)
        return {
            "errors": errors,
            "losses": [loss for loss, _, _ in numbers],
            "norms": [norm for _, norm, _ in numbers],
            "tokens": [run.progress.tokens, run.progress.sequences],
            "evaluation": [evaluation.loss, evaluation.tokens, evaluation.unigram_loss(torch.ones(VOCAB))],
            "positions": evaluation.position_loss[seen].tolist(),
        }


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Gradients:
    return true_gradients(tiny_config(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory, truth: Gradients) -> dict[str, list[float]]:
    """One rank, the whole batch in one micro-step, float64."""
    config = tiny_config(tmp_path_factory.mktemp("run"), train__micro_batch=4, train__precision="fp64")
    (result,) = run_ranks(train, 1, config, truth)
    assert max(result["errors"]) < 1e-10
    assert result["losses"][-1] < 0.9 * result["losses"][0]  # it learns, so equal losses say something
    return result


def check(results: list[dict[str, list[float]]], expected: dict[str, list[float]], tolerance: float) -> None:
    """Every rank has the very same numbers, and these are the expected ones up to rounding."""
    assert all(result == results[0] for result in results)
    assert results[0]["tokens"] == expected["tokens"]
    assert max(results[0]["errors"]) < tolerance
    for key in ("losses", "evaluation"):
        assert results[0][key] == pytest.approx(expected[key], rel=tolerance)
    for key in ("norms", "positions"):
        assert results[0][key] == pytest.approx(expected[key], rel=100 * tolerance)


LAYOUTS = [  # sp, dp_shard, dp_replicate, micro_batch; for four ranks float64 says more, and float32 is in the full tier
    *((*layout, "fp32") for layout in ((1, 1, 1, 1), (2, 1, 1, 2), (1, 2, 1, 2), (1, 1, 2, 1), (2, 1, 2, 1))),
    *(
        pytest.param(*layout, precision, marks=marks)
        for layout in ((1, 2, 2, 1), (2, 2, 1, 2), (4, 1, 1, 2))
        for precision, marks in (("fp32", pytest.mark.full), ("fp64", ()))
    ),
]


@pytest.mark.parametrize(("sp", "shard", "replicate", "micro_batch", "precision"), LAYOUTS)
def test_torch_engine(
    tmp_path: Path,
    truth: Gradients,
    one_rank: dict[str, list[float]],
    sp: int,
    shard: int,
    replicate: int,
    micro_batch: int,
    precision: str,
) -> None:
    """Losses and first gradients, with 1, 2 or 4 micro-steps, documents and padding unevenly spread."""
    parallel = {"sp": sp, "dp_shard": shard, "dp_replicate": replicate}
    config = tiny_config(tmp_path, parallel=parallel, train__micro_batch=micro_batch, train__precision=precision)
    tolerance = {"fp32": 1e-5, "fp64": 1e-10}[precision]
    check(run_ranks(train, config.parallel.world_size, config, truth), one_rank, tolerance)


def train_each(rank: int, world_size: int, configs: list[RunConfig], truth: Gradients) -> list[dict[str, list[float]]]:
    with deepspeed_rank(rank):
        return [train(rank, world_size, config, truth) for config in configs]


OWN_HEADS = {  # logits divided, multiplied, capped; features scaled, transformed
    "granite": {"logits_scaling": 7.0},
    "cohere": {"logit_scale": 0.3},
    "gemma2": {
        "final_logit_softcapping": 0.5, "attn_logit_softcapping": None, "layer_types": ["full_attention"] * 2, "head_dim": 8,
    },
    "minicpm3": {
        "dim_model_base": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "q_lora_rank": 16, "kv_lora_rank": 16,
    },
    "modernbert-decoder": {"layer_types": ["full_attention"] * 2, "bos_token_id": 1, "pad_token_id": 0},
}  # fmt: skip


def own_head(folder: Path, model_type: str, **changes: object) -> RunConfig:
    config = tiny_config(folder)
    model = {**config.model.config, "model_type": model_type, **OWN_HEADS[model_type]}
    if model_type == "modernbert-decoder":
        del model["num_key_value_heads"]
    return tiny_config(folder, model={"config": model}, **changes)


def test_models_with_heads_of_their_own(tmp_path: Path) -> None:
    """Gradients over two ranks are those of the model's own logits, on whole sequences. Norms of two classes are float32."""
    runs = [own_head(tmp_path, kind, train__precision="fp64", parallel__sp=2) for kind in OWN_HEADS]
    for ranks in zip(*run_ranks(train_own_heads, 2, runs, [true_gradients(run) for run in runs]), strict=True):
        assert max(max(rank["errors"]) for rank in ranks) < 1e-7


@needs_deepspeed
@pytest.mark.full
def test_heads_of_their_own_in_zero_3(tmp_path: Path) -> None:
    runs = [own_head(tmp_path, kind, parallel__sp=2, **zero({"stage": 3})) for kind in OWN_HEADS]
    truths = [true_gradients(own_head(tmp_path, kind)) for kind in OWN_HEADS]
    for ranks in zip(*run_ranks(train_own_heads, 2, runs, truths, timeout=280), strict=True):
        assert max(max(rank["errors"]) for rank in ranks) < 1e-5


def train_own_heads(
    rank: int, world_size: int, configs: list[RunConfig], truths: list[Gradients]
) -> list[dict[str, list[float]]]:
    with deepspeed_rank(rank) if configs[0].engine == "deepspeed" else nullcontext():
        return [train(rank, world_size, *run, steps=1) for run in zip(configs, truths, strict=True)]


SAVING = {
    "train__checkpoint_activations": True,
    "train__offload_activations": True,
    "train__mlp_tiles": 3,
    "train__micro_batch": 2,
}


def test_what_saves_memory_changes_nothing(tmp_path: Path, truth: Gradients, one_rank: dict[str, list[float]]) -> None:
    """Checkpointed layers whose inputs wait on the host, and a tiled MLP."""
    config = tiny_config(tmp_path, parallel__sp=2, train__precision="fp64", **SAVING)
    check(run_ranks(train, 2, config, truth), one_rank, 1e-10)


RECOMPUTING = [
    {"train__recompute": "all"},
    {"train__recompute": "selective"},
    {"train__recompute": "selective", "train__recompute_layers": 1},
    {"train__recompute": "none", "train__recompute_layers": 1},
    {"train__recompute": "none"},
]


@pytest.mark.parametrize("engine", ["torch", pytest.param("deepspeed", marks=[needs_deepspeed, pytest.mark.full])])
def test_what_is_recomputed_changes_no_bit(tmp_path: Path, truth: Gradients, engine: str) -> None:
    """Losses, gradients and the losses after an update, over two ranks."""
    common = {
        "parallel__sp": 2,
        "train__checkpoint_activations": True,
        **(zero({"stage": 3}) if engine == "deepspeed" else {}),
    }
    configs = [tiny_config(tmp_path, **common, **changes) for changes in RECOMPUTING]
    for ranks in run_ranks(train_own_heads, 2, configs, [truth] * len(configs), timeout=200):
        assert all(found == ranks[0] for found in ranks)


@needs_deepspeed
def test_what_saves_memory_in_zero_3(tmp_path: Path, truth: Gradients, one_rank: dict[str, list[float]]) -> None:
    config = tiny_config(tmp_path, **zero({"stage": 3}), parallel__sp=2, **SAVING)
    for each in zip(*run_ranks(train_each, 2, [config], truth, timeout=200), strict=True):
        check(list(each), one_rank, 1e-5)


@needs_deepspeed
@pytest.mark.parametrize(
    ("sp", "dp"), [(2, 2), pytest.param(4, 1, marks=pytest.mark.full), pytest.param(1, 4, marks=pytest.mark.full)]
)
def test_deepspeed_engine(tmp_path: Path, truth: Gradients, one_rank: dict[str, list[float]], sp: int, dp: int) -> None:
    """20 losses and the first gradients in float32; 4 / dp micro-steps, documents and padding unevenly spread."""
    parallel = {"sp": sp, "dp_shard": dp}
    configs = [tiny_config(tmp_path, **zero(stage), parallel=parallel) for stage in STAGES]
    results = run_ranks(train_each, 4, configs, truth, timeout=280)
    for each in zip(*results, strict=True):
        check(list(each), one_rank, 1e-5)


def whole_state(rank: int, world_size: int, config: RunConfig) -> Gradients:
    with deepspeed_rank(rank) if config.engine == "deepspeed" else nullcontext(), open_world(config.parallel) as world:
        engine = make_engine(config, model_config(config), world)
        try:
            return {name: value.clone() for name, value in engine.whole_state().items()}
        finally:
            engine.close()


@needs_deepspeed
def test_deepspeed_in_bf16_starts_with_float32_weights(tmp_path: Path) -> None:
    """Those of the torch engine to the bit, in pieces of uneven size too: it would start with weights rounded to bfloat16."""
    odd = {"train__precision": "bf16", "model__config__intermediate_size": 63, "parallel__sp": 2}
    expected = run_ranks(whole_state, 2, tiny_config(tmp_path, **odd))[0]
    for stage in (1, 2, 3):
        found = run_ranks(whole_state, 2, tiny_config(tmp_path, **odd, **zero({"stage": stage})), timeout=100)[0]
        assert expected.keys() - found.keys() <= {"lm_head.weight"}  # which is tied: DeepSpeed's engine names it once
        for name, value in found.items():
            assert torch.equal(expected[name], value), (stage, name)


def test_bf16_keeps_float32_weights(tmp_path: Path, truth: Gradients, one_rank: dict[str, list[float]]) -> None:
    """Computing in bfloat16 follows the exact run closely, over ranks and micro-steps too."""
    config = tiny_config(tmp_path, train__precision="bf16", train__micro_batch=2, parallel__sp=2)
    losses = run_ranks(train, 2, config, truth)[0]["losses"]
    assert losses == pytest.approx(one_rank["losses"], rel=5e-3)
    assert losses != one_rank["losses"]
