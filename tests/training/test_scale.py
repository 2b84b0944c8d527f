# SPDX-License-Identifier: Apache-2.0
"""What a long run needs: a memory plan, a dry run, stages, leaving when told to, and seeing where time goes."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from ring_hilbert.cli import main
from ring_hilbert.training import fitting, loop
from ring_hilbert.training.breakdown import PARTS, Span, of_device
from ring_hilbert.training.config import RunConfig, load_config, load_stages
from ring_hilbert.training.fitting import Planning, advice, fit, settled
from ring_hilbert.training.loop import Summary, pretrain, pretrain_stages
from ring_hilbert.training.memory import GIB, plan_memory
from ring_hilbert.training.metrics import read_metrics
from ring_hilbert.training.model import model_config
from ring_hilbert.training.tokens import load_tokenizer
from tests.harness.deepspeed_rank import zero
from tests.harness.ranks import run_ranks
from tests.harness.tiny_run import SEQ_LEN, VOCAB, tiny_config
from tests.test_cli import run_main

CONFIGS = Path(__file__).parents[2] / "configs"


def places(folder: Path) -> dict[str, Any]:
    return {"checkpoint__dir": str(folder / "checkpoints"), "log__dir": str(folder / "logs")}


@pytest.mark.slow
def test_memory_plan(tmp_path: Path) -> None:
    """Linear in the rows of a rank, with a vocabulary of any size; states are divided among the ranks."""
    wide = {
        "model__config__vocab_size": 32_000,
        "model__config__hidden_size": 64,
        "train__checkpoint_activations": True,
    }

    def planned(ranks: int, rows: int, **changes: Any) -> Any:
        length = rows * ranks
        sizes = {"data__seq_len": length, "train__global_batch_tokens": length, "parallel__sp": ranks}
        return plan_memory(tiny_config(tmp_path, **sizes, **{**wide, **changes}), cuda=False)

    small, middle, large = (planned(2, rows) for rows in (4096, 8192, 16384))
    assert large.total - middle.total == pytest.approx(2 * (middle.total - small.total), rel=0.02)
    assert planned(4, 4096).optimizer == pytest.approx(small.optimizer / 2, rel=0.05)
    assert small.host == small.parameters + small.optimizer and " per rank: 0.01 GiB for checkpoints" in str(small)
    offloaded = planned(2, 4096, train__offload_activations=True).offloaded
    assert offloaded == 2 * 4096 * 64 * 4 and small.offloaded == 0  # layers, rows, width, float32
    tiled = planned(2, 16384, train__mlp_tiles=4, model__config__intermediate_size=1024)
    assert tiled.total < 0.8 * planned(2, 16384, model__config__intermediate_size=1024).total
    alone = tiny_config(tmp_path, parallel__sp=2)
    found = Planning(alone, None, cuda=False).result()
    assert found == fit(alone, None, cuda=False) and found.plan == plan_memory(alone, cuda=False)
    steps = {"train__global_batch_tokens": 2 * SEQ_LEN, "data__eval": None}
    twice, once = (plan_memory(tiny_config(tmp_path, **steps, train__micro_batch=n), cuda=False) for n in (1, 2))
    assert twice.gradients == pytest.approx(twice.parameters, rel=0.01) and once.gradients == 0
    one, three = (plan_memory(tiny_config(tmp_path, **zero({"stage": s}), parallel__sp=2), cuda=False) for s in (1, 3))
    assert one.total > three.total and one.host == three.host == 0
    away = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "none"}}
    host = plan_memory(tiny_config(tmp_path, **zero({"stage": 3, **away}), parallel__sp=2), cuda=False)
    assert host.offloaded == three.optimizer + three.gradients and host.optimizer == 0 < host.parameters
    assert three.parameters == 4 * three.model_parameters // 2 and three.optimizer == 12 * three.model_parameters // 2


def test_the_plan_is_of_the_fused_parts(tmp_path: Path) -> None:
    """With Liger's kernels a layer's recomputation holds less; layers that are compiled count as they are."""
    pytest.importorskip("liger_kernel")
    sizes = {**DEEP, "train__precision": "bf16", "model__config__num_hidden_layers": 2}

    def planned(fused: str) -> Any:
        return plan_memory(tiny_config(tmp_path, **sizes, train__fused=fused), cuda=True)

    plain, liger = planned("none"), planned("liger")
    assert planned("auto") == liger and planned("compile") == plain
    assert liger.temporary < 0.75 * plain.temporary and liger.parameters == plain.parameters


DEEP = {
    "model__config__num_hidden_layers": 4, "model__config__hidden_size": 64, "model__config__intermediate_size": 512,
    "data__seq_len": 16384, "train__global_batch_tokens": 16384, "train__checkpoint_activations": True,
}  # fmt: skip


@pytest.mark.slow
def test_the_memory_decides_what_is_recomputed(tmp_path: Path) -> None:
    """The fastest settings that leave 5 % of it; one that is not auto stays; what fits nowhere is refused with what would."""
    sizes = {**DEEP, "train__fused": "none"}  # whose MLP is most of what is held
    config = tiny_config(tmp_path, **sizes)

    def total(recompute: str) -> int:
        return fit(tiny_config(tmp_path, **sizes, train__recompute=recompute), None, cuda=True).plan.total

    def taken(room: float, **changes: Any) -> tuple[Any, ...]:
        fitted = fit(tiny_config(tmp_path, **sizes, **changes), int(room), cuda=True)
        assert fitted.refusal is None and fitted.plan.total <= room
        return tuple(fitted.train.values())

    everything, selective, least = total("none"), total("selective"), total("all")
    assert least < selective < everything
    assert taken(everything / 0.85 + 1) == ("none", 0, 1)
    kind, layers, tiles = taken((least + selective) / 1.7)
    assert kind == "selective" and 1 <= layers <= 3 and tiles == 1
    assert taken(least / 0.95 + 1) == ("all", 0, 1)
    assert taken(0.9 * least)[2] > 1
    assert taken(everything / 0.95 + 1, train__recompute="all", train__mlp_tiles=2) == ("all", 0, 2)
    assert taken(2 * everything, train__memory_gib=(least / 0.95 + 1) / GIB) == ("all", 0, 1)
    refused = fit(tiny_config(tmp_path, **sizes, train__mlp_tiles=1), least - 1, cuda=True).refusal
    assert refused is not None and "train.mlp_tiles=8 (1." in refused and "more time" in refused
    assert "; train.offload_activations=true (1." in refused
    assert "train.mlp_tiles=8" in advice(settled(config))
    assert "The nearest: " in str(fit(config, 2**20, cuda=True).refusal)


def test_a_run_that_does_not_fit_is_refused(tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before an engine is made; and a device out of memory says what to change."""
    config = tiny_config(texts, **places(tmp_path), train__memory_gib=0.01, log__memory_plan=True)
    monkeypatch.setattr(fitting, "_on_gpu", lambda device: True)
    monkeypatch.setattr(loop, "make_engine", lambda *_, **__: pytest.fail("made"))
    with pytest.raises(
        ValueError, match=r"memory: 0.0 GiB are available per rank, but it needs 1\.\d\d GiB .* The nearest: "
    ):
        pretrain(config)

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    monkeypatch.setattr(loop, "make_engine", full)
    config = tiny_config(texts, **places(tmp_path), log__memory_plan=True)
    with pytest.raises(
        ValueError, match=r"out of memory: CUDA out of memory\. The memory plan was .*\(parameters .*(fit|nearest): "
    ):
        pretrain(config)


@pytest.mark.full
@pytest.mark.parametrize("name", ["llama_1b_1m", "llama_8b_1m", "llama_8b_1m_8gpu", "continue_1m"])
def test_shipped_configs_fit_their_hardware(name: str, tmp_path: Path) -> None:
    """GPUs of 80 GB have 79.1 GiB. The 1B model also on half as many as its file says."""
    model = ["model.path=" + str(_llama_1b(tmp_path))] if name == "continue_1m" else []
    for override in ([], ["parallel.sp=4", "train.global_batch_tokens=1048576"]) if name == "llama_1b_1m" else ([],):
        for config in load_stages(CONFIGS / f"{name}.yaml", [*model, *override, "train.memory_gib=79.1"]).values():
            fitted = fit(config, None, cuda=True)
            assert fitted.refusal is None and fitted.plan.total <= 0.95 * 79.1 * GIB, fitted.taken(config)


def _llama_1b(folder: Path) -> Path:
    """The configuration and the byte tokenizer of a model like Llama 3.2 1B, without its weights."""
    config = load_config(CONFIGS / "llama_1b_1m.yaml").model.config
    assert config is not None
    AutoConfig.for_model(
        config["model_type"], **{k: v for k, v in config.items() if k != "model_type"}
    ).save_pretrained(folder)
    load_tokenizer("bytes").save_pretrained(folder)
    return folder


def test_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    """Of 64 ranks, from one process."""
    tiny = ["model.config.vocab_size=1000", "model.config.num_hidden_layers=2", "data.seq_len=65536"]
    tiny += ["train.global_batch_tokens=65536", "parallel.sp=64", "train.mlp_tiles=1", "attention.order.block=1024"]
    assert main(["pretrain", "--dry-run", "--config", str(CONFIGS / "llama_1b_1m.yaml"), *tiny]) == 0
    printed = capsys.readouterr().out
    assert (
        "64 ranks, dp_replicate 1 * dp_shard 1 * sp 64; a step is 1 sequence of 65,536 tokens in 1 micro-step, "
        in printed
    )
    assert "auto takes exchange" in printed
    assert "GiB per rank at the peak of a step (parameters" in printed


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_are_valid(path: Path) -> None:
    for config in load_stages(path).values():
        assert config.sequences_per_step >= 1
        if config.model.config is not None:
            model_config(config)


def stop_after(rank: int, world_size: int, config: RunConfig, step: int) -> Summary:
    """Rank 1 is told to stop in its step `step`."""
    learning_rate = loop.learning_rate

    def signalling(config: RunConfig, done: int) -> float:
        if rank == 1 and done == step - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return learning_rate(config, done)

    loop.learning_rate = signalling
    try:
        return pretrain(config)
    finally:
        loop.learning_rate = learning_rate


def test_a_signal_on_one_rank_ends_the_run_after_a_checkpoint(tmp_path: Path, texts: Path) -> None:
    """All ranks leave together, and the next start goes on to what an uninterrupted run reaches."""
    config = tiny_config(texts, **places(tmp_path), train__steps=6, parallel__sp=2, checkpoint__every=100)
    for summary in run_ranks(stop_after, 2, config, 3):
        assert summary.progress.step in (3, 4) and summary.model is None
    resumed = run_ranks(stop_after, 2, config, 99)[0]
    whole = run_ranks(stop_after, 2, tiny_config(texts, **places(tmp_path / "x"), train__steps=6, parallel__sp=2), 99)[
        0
    ]
    assert resumed.progress == whole.progress
    assert resumed.eval_loss == whole.eval_loss


@pytest.mark.slow
def test_where_time_goes(tmp_path: Path, texts: Path) -> None:
    """MFU, seconds by part and their spread in the metrics; loss by position; a trace of the steps asked for."""
    look = {"log__breakdown_every": 2, "log__profile": [3, 3], "log__peak_tflops": 0.1}
    pretrain(tiny_config(texts, **places(tmp_path), train__steps=4, **look))
    lines = read_metrics(tmp_path / "logs" / "metrics.jsonl")
    train = [line for line in lines if line["kind"] == "train"]
    assert all(0 < line["mfu"] < 1 and line["seconds"] > 0 and line["seconds_spread"] >= 0 for line in train)
    measured = [line["step"] for line in train if "seconds_products" in line]
    assert measured == [2, 3, 4]
    for line in train[1:]:
        assert sum(line[f"seconds_{part}"] for part in PARTS) == pytest.approx(line["seconds"], rel=0.05)
        for part in ("products", "attention_forward", "attention_backward", "elementwise", "loss"):
            assert 0 < line[f"seconds_{part}"] < line["seconds"], part
    assert [path.name for path in (tmp_path / "logs" / "trace").iterdir()] == ["step_3_rank_0.json"]
    evaluation = next(line for line in lines if line["kind"] == "eval")
    assert evaluation["loss_at_1"] > 0 and evaluation[f"loss_at_{SEQ_LEN // 2}"] > 0


def test_parts_of_a_step_on_a_device() -> None:
    """Kernels by the range they ran in, else by name; what travels is hidden behind them, or not."""
    spans = [
        Span("ring_hilbert: local forward", 0, 100, True), Span("attend_kernel", 0, 60), Span("prune_kernel", 60, 100),
        Span("ncclDevKernel_AllGather", 50, 150),
        Span("nvjet_hsh_128x256", 200, 300), Span("void at::native::vectorized_elementwise_kernel", 300, 340),
        Span("Optimizer.step#AdamW.step", 0, 1000, True), Span("ring_hilbert: loss", 400, 500, True),
        Span("sm90_xmma_gemm_bf16", 400, 450), Span("ncclDevKernel_ReduceScatter", 450, 520), Span("exp", 460, 500),
        Span("ring_hilbert: remote backward", 600, 650, True), Span("dq_kernel", 600, 650), Span("Memcpy DtoH", 700, 710),
    ]  # fmt: skip
    found = {part: round(1e6 * value) for part, value in of_device(spans, 1e-3).items()}
    assert found == {
        "attention_forward": 100, "attention_backward": 50, "products": 100, "elementwise": 40, "loss": 90, "copies": 10,
        "communication_hidden": 90, "communication_exposed": 80, "idle": 530,
    }  # fmt: skip


def staged(folder: Path, texts: Path, model: Path) -> Path:
    """A dense folder continued at 1, 2 and 4 times its length."""
    raw = tiny_config(texts, **places(folder), train__steps=3).model_dump(mode="json")
    raw["model"] = {
        "path": str(model),
        "changes": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    }
    raw["attention"]["order"]["block"] = 32
    raw["attention"]["layers"] = {"0": {"dense": True}, "1": {"segment_shift": 32}}
    raw["optim"]["schedule"] = "constant"
    raw["parallel"]["sp"] = 2
    longer = {"data": {"seq_len": 2 * SEQ_LEN}}, {"data": {"seq_len": 4 * SEQ_LEN}}
    raw["stages"] = {"short": {}, "middle": longer[0], "long": longer[1]}
    path = folder / "staged.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


def run_stages(rank: int, world_size: int, path: Path, only: str | None) -> Summary | None:
    stages = load_stages(path)
    return pretrain_stages({only: stages[only]} if only else stages)


def test_stages(tmp_path: Path, texts: Path) -> None:
    """Each goes on from the one before; a finished one is not run again; the export computes what was trained."""
    dense = AutoConfig.for_model(
        "llama", vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=SEQ_LEN,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(dense).save_pretrained(tmp_path / "dense")
    path = staged(tmp_path, texts, tmp_path / "dense")
    first = run_ranks(run_stages, 2, path, "short")[0]
    assert first is not None and first.model == tmp_path / "checkpoints" / "short" / "model"
    for status, told in run_ranks(run_main, 2, ["pretrain", "--config", str(path)]):
        assert status == 0, told
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["long", "middle", "short"]
    evaluations = [
        line for line in read_metrics(tmp_path / "logs" / "long" / "metrics.jsonl") if line["kind"] == "eval"
    ]
    assert evaluations[-1]["step"] == 3 and evaluations[-1]["loss"] < first.eval_loss
    assert run_ranks(run_stages, 2, path, None)[0] is None
    other = tmp_path / "other.yaml"
    other.write_text(path.read_text().replace("stages:\n  short: {}", "stages:\n  short: {optim: {lr: 0.5}}"))
    with pytest.raises(
        ValueError, match=r"short.* was written by a run with another configuration: optim.lr: 0.003, now 0.5"
    ):
        run_ranks(run_stages, 2, other, None)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoints" / "long" / "model")
    assert loaded.config.max_position_embeddings == 4 * SEQ_LEN
    assert loaded.config.rope_parameters["rope_type"] == "linear"
    assert torch.isfinite(loaded(torch.arange(4 * SEQ_LEN)[None] % VOCAB).logits).all()
    with pytest.raises(ValueError, match="no stage 'longest'; it has short, middle, long"):
        load_config(path, stage="longest")


def test_rope_that_differs_between_ranks_is_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    with pytest.raises(ValueError, match="rope_type 'dynamic' derives its frequencies from the longest position"):
        model_config(tiny_config(tmp_path, model__config__rope_parameters=rope, parallel__sp=2))
