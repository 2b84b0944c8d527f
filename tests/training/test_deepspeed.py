# SPDX-License-Identifier: Apache-2.0
"""The DeepSpeed engine: the losses, gradients, checkpoints and exports of one process, at every ZeRO stage."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from ring_hilbert.integrations.deepspeed import SequenceParallel, gradient_divisor, loss_for_backward
from ring_hilbert.parallel.sharding import shard_batch
from ring_hilbert.training.checkpoint import Checkpoints
from ring_hilbert.training.config import RunConfig
from ring_hilbert.training.convert import convert
from ring_hilbert.training.engine import make_engine
from ring_hilbert.training.engine_deepspeed import _warn_of_locks, deepspeed_settings
from ring_hilbert.training.loop import Run, Summary, pretrain
from ring_hilbert.training.metrics import read_metrics
from ring_hilbert.training.model import model_config
from ring_hilbert.training.storage.tensors import Reader
from ring_hilbert.training.world import open_world
from tests.harness.deepspeed_rank import STAGES, deepspeed_rank, zero
from tests.harness.ranks import run_ranks, run_ranks_collect
from tests.harness.tiny_run import VOCAB, PaddedDataset, tiny_config

pytest.importorskip("deepspeed")
if not torch.cuda.is_available() and shutil.which("g++") is None:
    pytest.skip("DeepSpeed builds its CPU extension with g++", allow_module_level=True)


def run_to(rank: int, world_size: int, config: RunConfig) -> Summary:
    with deepspeed_rank(rank):
        return pretrain(config)


def test_a_lock_that_was_left_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build that was killed leaves one, for which the next run would wait without a word."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py3_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _warn_of_locks()
    os.utime(lock, (0, time.time() - 3600))
    with pytest.warns(match=r"wait for .*deepspeed_shm_comm/lock, which is 36\d\d s old.* remove that file"):
        _warn_of_locks()


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.full), 3])
def test_resume_and_export(tmp_path: Path, texts: Path, stage: int) -> None:
    """Interrupted and resumed is not interrupted, in bfloat16 too; the exported folder holds what was trained."""

    def config(name: str, steps: int, **changes: Any) -> RunConfig:
        places = {"checkpoint__dir": str(tmp_path / name), "log__dir": str(tmp_path / f"{name}-logs")}
        settings = zero({"stage": stage}, train__precision="bf16", parallel__sp=2, optim__decay_steps=8, **places)
        return tiny_config(texts, **settings, train__steps=steps, train__micro_batch=2, checkpoint__every=4, **changes)

    whole = run_ranks(run_to, 2, config("whole", 8, train__probe=True), timeout=200)[0]
    run_ranks(run_to, 2, config("parts", 4), timeout=200)
    errors = run_ranks_collect(run_to, 2, config("parts", 8), timeout=200)
    assert all("checkpoint.trust" in str(error) for error in errors)
    parts = run_ranks(run_to, 2, config("parts", 8, checkpoint__trust=True), timeout=200)[0]
    assert parts.eval_loss == pytest.approx(whole.eval_loss, rel=1e-6)
    other = {"checkpoint__dir": str(tmp_path / "torch"), "log__dir": str(tmp_path / "torch-logs")}
    again = tiny_config(texts, **other, model={"path": str(whole.model)}, train__steps=1, optim__lr=1e-9)
    assert pretrain(again).eval_loss == pytest.approx(whole.eval_loss, rel=5e-3)


Engines = dict[str, dict[str, Any]]
ENGINES: Engines = {"torch": {}} | {
    f"zero{stage}": zero({"stage": stage}, checkpoint__trust=True) for stage in range(4)
}
PAIRS = [
    (*pair, "fp32") if pair == ("zero3", "torch") else pytest.param(*pair, "fp32", marks=pytest.mark.full)
    for pair in itertools.permutations(ENGINES, 2)
]
PAIRS += [  # in bfloat16, where ZeRO-0 is refused, DeepSpeed has another optimizer for ZeRO-1
    pytest.param(*pair, "bf16", marks=pytest.mark.full)
    for engine in ("zero1", "zero2", "zero3")
    for pair in (("torch", engine), (engine, "torch"))
]
# With its own AdamW, on the host.
ENGINES["offloaded"] = zero({"stage": 2, "offload_optimizer": {"device": "cpu"}}, checkpoint__trust=True)
PAIRS.append(pytest.param("torch", "offloaded", "fp32", marks=pytest.mark.full))


HALVES = {"optim__decay_steps": 20, "data__eval": None, "train__micro_batch": 2}


@pytest.fixture(scope="module")
def halves(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By engine and precision, on two ranks: the losses of twenty steps, and the folder of a run that has done ten of them."""
    made: dict[tuple[str, str], tuple[list[float], Path]] = {}

    def of(engine: str, precision: str) -> tuple[list[float], Path]:
        if (engine, precision) not in made:
            folder = tmp_path_factory.mktemp(engine)
            shared = {"parallel__sp": 2, "train__precision": precision, **HALVES}
            settings = {**ENGINES[engine], **shared}
            for name, steps in (("whole", 20), ("half", 10)):
                places = {"checkpoint__dir": str(folder / name), "log__dir": str(folder / f"{name}-logs")}
                run_ranks(run_to, 2, tiny_config(texts, **settings, **places, train__steps=steps), timeout=200)
            losses = [x["loss"] for x in read_metrics(folder / "whole-logs" / "metrics.jsonl")]
            made[engine, precision] = losses, folder / "half"
        return made[engine, precision]

    return of


@pytest.mark.parametrize(("before", "after", "precision"), PAIRS)
def test_between_engines(tmp_path: Path, texts: Path, halves: Any, before: str, after: str, precision: str) -> None:
    """Ten steps with one engine, ten with another, on other ranks: the losses of twenty steps with the first."""
    expected, half = halves(before, precision)
    ranks = 3 if after == "zero3" else 2
    places = {"checkpoint__dir": str(tmp_path / "common"), "log__dir": str(tmp_path / "logs")}
    shared = {"parallel__sp": ranks, "train__precision": precision, "train__steps": 20, **HALVES}
    refused = tiny_config(texts, **{**ENGINES[after], **shared, **places, "checkpoint__dir": str(half)})
    with pytest.raises(
        ValueError, match=r"was written by engine .* and this run has engine .*ring-hilbert convert .*/half"
    ) as error:
        run_ranks(run_to, ranks, refused, timeout=200)
    assert len(set(re.findall(r"engine \w+ \(\S+, \d ranks", str(error.value)))) == 2
    convert(half, tmp_path / "common", trust=True)
    with nullcontext() if before == "torch" else pytest.raises(ValueError, match="--trust"):
        convert(half, tmp_path / "again")
    run_ranks(run_to, ranks, tiny_config(texts, **{**ENGINES[after], **shared, **places}), timeout=200)
    found = [x["loss"] for x in read_metrics(tmp_path / "logs" / "metrics.jsonl")]
    assert found == pytest.approx(expected[10:], rel=1e-5 if precision == "fp32" else 5e-3)


def test_common_form_in_bfloat16(tmp_path: Path, texts: Path) -> None:
    """The float32 weights come along, not those that are computed with; and a run with checkpoint.init needs no trust for it."""
    settings = zero({"stage": 2}, train__precision="bf16", parallel__sp=2, optim__decay_steps=8, data__eval=None)

    def config(name: str, steps: int, **changes: Any) -> RunConfig:
        places = {"checkpoint__dir": str(tmp_path / name), "log__dir": str(tmp_path / f"{name}-logs")}
        return tiny_config(texts, **settings, **places, train__steps=steps, **changes)

    run_ranks(run_to, 2, config("zero", 3), timeout=200)
    path = convert(tmp_path / "zero", tmp_path / "common", trust=True)
    run_ranks(run_to, 2, config("begun", 1, checkpoint__init=str(tmp_path / "common"), optim__lr=1e-30), timeout=200)
    again = convert(tmp_path / "begun", tmp_path / "again", trust=True)
    expected, found = Reader(path / "engine"), Reader(again / "engine")
    for key in expected:
        if key.startswith("weight"):
            assert torch.equal(found[key], expected[key]), key
    assert found["step.model.norm.weight"] == expected["step.model.norm.weight"] + 1


def frequencies(rank: int, world_size: int, configs: list[RunConfig]) -> list[torch.Tensor]:
    """Of RoPE in the engine's model."""
    found = []
    with deepspeed_rank(rank):
        for config in configs:
            with open_world(config.parallel) as world:
                engine = make_engine(config, model_config(config), world)
                buffers = dict(engine.model.named_buffers())
                found += [x.clone() for name, x in buffers.items() if name.endswith("rotary_emb.inv_freq")]
                engine.close()
    return found


def test_rope_stays_in_float32(tmp_path: Path) -> None:
    """In bfloat16 the frequencies would be up to 0.4 % off, and the exported model another one than was trained."""
    configs = [tiny_config(tmp_path, **zero({"stage": s}), parallel__sp=2, train__precision="bf16") for s in (1, 2, 3)]
    expected = 1e4 ** -(torch.arange(0, 8, 2) / 8)
    for found in run_ranks(frequencies, 2, configs, timeout=200):
        assert len(found) == 3 and all(torch.equal(x, expected) for x in found)


def poisoned(rank: int, world_size: int, configs: list[RunConfig]) -> list[tuple[float, bool, float, bool]]:
    """For each configuration the norm and whether weights moved, of a step with an infinite gradient and of the next one."""
    found = []
    with deepspeed_rank(rank):
        for config in configs:
            with open_world(config.parallel) as world:
                hf_config = model_config(config)
                engine = make_engine(config, hf_config, world)
                data = PaddedDataset()
                run = Run(config, world, engine, Checkpoints(config, world, {}), data, None, hf_config)
                states = [{name: value.clone() for name, value in engine.whole_state().items()}]
                backward = engine.backward
                engine.backward = lambda loss, do=backward: do(loss * (math.inf if rank == 1 else 1))  # type: ignore
                norms = [run.train_step()[1]]
                states.append({name: value.clone() for name, value in engine.whole_state().items()})
                engine.backward = backward  # type: ignore[method-assign]
                norms.append(run.train_step()[1])
                states.append(engine.whole_state())
                same = [all(torch.equal(a[n], b[n]) for n in a) for a, b in itertools.pairwise(states)]
                found.append((norms[0], not same[0], norms[1], not same[1]))
    return found


def test_gradients_that_are_not_finite(tmp_path: Path) -> None:
    """On one rank: nothing moves, on any, and the next step is as if it had not been; every stage, and bfloat16."""
    configs = [tiny_config(tmp_path, **zero(stage), parallel__sp=2) for stage in STAGES]
    configs += [tiny_config(tmp_path, **zero({"stage": s}), parallel__sp=2, train__precision="bf16") for s in (1, 2, 3)]
    results = run_ranks(poisoned, 2, configs, timeout=280)[0]
    for config, (bad, moved, good, moved_then) in zip(configs, results, strict=True):
        assert not math.isfinite(bad) and not moved
        assert (
            good == pytest.approx(results[0][2], rel=1e-5 if config.train.precision == "fp32" else 1e-2) and moved_then
        )


def dense_losses(rank: int, world_size: int, implementation: str) -> list[float]:
    """Of six ZeRO-1 steps of a dense model with grouped heads, sequences over all ranks: "sdpa" in DeepSpeed's Ulysses, or ours."""
    import deepspeed
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("llama", vocab_size=VOCAB, num_key_value_heads=2, **sizes)
    config.ring_hilbert = {"segment_lengths": [None], "dilation_rates": [1]}
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    kept, losses = ALL_ATTENTION_FUNCTIONS["sdpa"], []
    with deepspeed_rank(rank):
        deepspeed.init_distributed(dist_init_required=False)
        try:
            if implementation == "sdpa":
                mpu = UlyssesSPAttentionHF.register_with_transformers(model, "sdpa", world_size, micro_batch_size=1)
            else:
                mpu = SequenceParallel(world_size)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}}
            engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, mpu=mpu)
            for step in range(6):
                ids = torch.randint(3, VOCAB, (1, 256), generator=torch.Generator().manual_seed(step % 2))
                batch = shard_batch({"input_ids": ids}, mpu.get_sequence_parallel_group())
                labels, prepared = batch.pop("shift_labels"), batch.pop("ring_hilbert")
                own = {} if implementation == "sdpa" else {"ring_hilbert": prepared}
                logits = engine(input_ids=batch["input_ids"], position_ids=batch["position_ids"], **own).logits
                loss = F.cross_entropy(logits[0], labels[0], reduction="sum") / 255
                engine.backward(loss_for_backward(loss, engine), scale_wrt_gas=False)
                engine.step()
                total = loss.detach().clone()
                dist.all_reduce(total)
                losses.append(total.item())
            engine.destroy()
        finally:
            ALL_ATTENTION_FUNCTIONS["sdpa"] = kept
    return losses


def test_the_loss_of_deepspeeds_ulysses() -> None:
    theirs, ours = (run_ranks(dense_losses, 2, implementation)[0] for implementation in ("sdpa", "ring_hilbert"))
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert ours[-1] < ours[0] - 0.1  # the same batches again: it learns, so equal losses say something


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"config": {"zero_optimization": {"stage": 1}, "train_batch_size": 8}}, "leave out train_batch_size"),
    ({"config": {"zero_optimization": {"stage": 1}, "gradient_clipping": 0.5}}, "leave out gradient_clipping"),
    ({"config": {"zero_optimization": {"stage": 1}, "sequence_parallel_size": 2}}, "leave out sequence_parallel_size"),
    ({"config": {}}, "has no zero_optimization.stage"),
    ({"config": "/nowhere/zero.json"}, "/nowhere/zero.json"),
]


@pytest.mark.parametrize(("settings", "message"), MISTAKES)
def test_mistakes(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        deepspeed_settings(tiny_config(tmp_path, engine="deepspeed", deepspeed=settings))


def test_settings_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}))
    settings = deepspeed_settings(tiny_config(tmp_path, engine="deepspeed", deepspeed={"config": str(path)}))
    assert settings["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert settings["gradient_accumulation_steps"] == 4


class Bare:
    """What `gradient_divisor` asks of an engine."""

    sequence_parallel_size, mpu = 2, None

    def __init__(self, stage: int) -> None:
        self.zero_optimization_stage = lambda: stage
        self.zero_reduce_scatter = lambda: True


def refused_and_grouped(rank: int, world_size: int) -> tuple[int, int, list[int]]:
    for stage in (1, 2):
        with pytest.raises(ValueError, match="without an mpu"):
            gradient_divisor(Bare(stage))
    with pytest.raises(ValueError, match="must divide the 4 ranks, got 3"):
        SequenceParallel(3)
    mpu = SequenceParallel(2)
    return mpu.dp_rank, mpu.get_sequence_parallel_rank(), dist.get_process_group_ranks(mpu.group)


def test_groups() -> None:
    assert run_ranks(refused_and_grouped, 4) == [(0, 0, [0, 1]), (0, 1, [0, 1]), (1, 0, [2, 3]), (1, 1, [2, 3])]
