# SPDX-License-Identifier: Apache-2.0
"""`ring-hilbert bench`: the baselines compute what they claim, and the figures follow from the times."""

from __future__ import annotations

import argparse
import csv
import importlib.util
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import Tensor

import ring_hilbert as rh
from ring_hilbert.bench import (
    attention,
    attention_report,
    contenders,
    curves,
    data,
    flex,
    kernels_shipped,
    longnet,
    overlap,
    peers,
    saving,
    timing,
    training,
)
from ring_hilbert.cli import main
from ring_hilbert.ops.visible import Visible
from ring_hilbert.training.checkpoint import Progress
from ring_hilbert.training.config import RunConfig, load_config
from ring_hilbert.training.loop import Summary
from ring_hilbert.training.metrics import METRICS_FILE
from tests.harness import torchscale
from tests.harness.ranks import run_ranks
from tests.harness.tiny_run import tiny_config, write_texts

CPU = torch.device("cpu")
DENSE = rh.DilatedPattern((None,), (1,))
SMALL = ["--lengths", "128", "256", "--segment-lengths", "64", "all", "--dilation-rates", "1", "4", "--heads", "2"]
SMALL += ["--head-dim", "8", "--repeats", "1", "--device", "cpu"]


def tensors(heads: int, kv_heads: int, length: int = 256, batch: int = 2) -> list[Tensor]:
    """q, k, v and dout in float64."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, length, h, 8, generator=generator, dtype=torch.float64).requires_grad_(i < 3)
        for i, h in enumerate((heads, kv_heads, kv_heads, heads))
    ]


def both(out: Tensor, x: list[Tensor]) -> list[Tensor]:
    """Out and the gradients of q, k, v."""
    return [out.detach(), *torch.autograd.grad(out, x[:3], x[3])]


def error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


# ---- baselines


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("pattern", "heads", "kv_heads"),
    [
        (rh.DilatedPattern((32, 64, 128, None), (1, 2, 4, 8)), 4, 4),
        (rh.DilatedPattern((64, None), (1, 4), head_shift=3), 6, 3),  # GQA; heads that the rate does not divide
        (rh.DilatedPattern((64, 128), (2, 4)), 3, 3),  # rows that no branch holds
        (rh.DilatedPattern((64, 128, 128), (1, 2, 2), offset_rule="block"), 5, 5),
    ],
)
def test_longnet(pattern: rh.DilatedPattern, heads: int, kv_heads: int, causal: bool) -> None:
    """Forward and dv are the definition's; dq and dk are not where branches mix, because the weights are detached."""
    x = tensors(heads, kv_heads)
    actual = both(longnet.dilated_attention(*x[:3], pattern, causal=causal), x)
    expected = both(rh.reference.dilated_attention(*x[:3], pattern, causal=causal)[0], x)
    out, dq, dk, dv = (error(a, e) for a, e in zip(actual, expected, strict=True))
    assert out < 1e-12 and dv < 1e-12
    assert min(dq, dk) > 1e-3


def test_longnet_fills_segments_up() -> None:
    """Forward is that of torchscale's algorithm where nothing divides."""
    pattern = rh.DilatedPattern((30, 70, 512), (1, 4, 6), offset_rule="block", zero_keys=True)
    q, k, v, _ = tensors(4, 4)
    actual, expected = (
        longnet.dilated_attention(q, k, v, pattern, causal=False),
        torchscale.dilated_attention(q, k, v, pattern),
    )
    assert error(actual, expected) < 1e-12


@pytest.mark.parametrize("rate", [1, 4])
def test_longnet_of_one_branch(rate: int) -> None:
    """Nothing is mixed: all gradients are the definition's, through gather and scatter."""
    pattern, x = rh.DilatedPattern((64,), (rate,)), tensors(4, 2)
    actual = both(longnet.dilated_attention(*x[:3], pattern, scale=0.3), x)
    expected = both(rh.reference.dilated_attention(*x[:3], pattern, scale=0.3)[0], x)
    assert max(error(a, e) for a, e in zip(actual, expected, strict=True)) < 1e-12


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        (rh.DilatedPattern((96,), (1,)), "w=96 and 256 rows"),
        (rh.DilatedPattern((64,), (3,)), "r=3 and w=64"),
        (rh.DilatedPattern((64,), (1,), segment_shift=1), "segment_shift"),
        (rh.DilatedPattern((64, 128), (1, 2), count="once"), "counts pairs per branch"),
        (rh.DilatedPattern((64, 128), (1, 2), weights=(1, 2)), "has no weights"),
    ],
)
def test_what_longnet_does_not_define(pattern: rh.DilatedPattern, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        longnet.dilated_attention(*tensors(2, 2)[:3], pattern)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "pattern",
    [
        rh.DilatedPattern((32, 100, None), (1, 3, 7), head_shift=1, segment_shift=13, weights=(2, 1, 5)),
        rh.DilatedPattern((64, 64, None), (1, 1, 2), offset_rule="block"),
        rh.DilatedPattern((32, 96, None), (1, 3, 6), segment_shift=13, weights=(2, 1, 5), count="once"),
    ],
)
def test_flex(pattern: rh.DilatedPattern, causal: bool) -> None:
    """The mask and the added log multiplicities are the pattern's (eager: the CPU has no backward, nor need of Triton)."""
    q, k, v = (x.detach() for x in tensors(6, 3)[:3])
    out = flex.attention(pattern, 256, 6, 3, causal, CPU, compiled=False)(q, k, v)
    expected = rh.reference.dilated_attention(q, k, v, pattern, causal=causal)[0]
    covered = expected.abs().amax(-1) > 0
    assert error(out[covered], expected[covered]) < 1e-6


def problem(length: int = 256, causal: bool = True, dtype: torch.dtype = torch.float64) -> contenders.Problem:
    return contenders.Problem(
        rh.DilatedPattern((64, length), (1, 4)), length, causal, dtype, CPU, heads=4, kv_heads=2, head_dim=8
    )


@pytest.mark.parametrize("causal", [True, False])
def test_contenders(causal: bool) -> None:
    """Each computes its definition on the same tensors; the one in curve order takes rows in that order."""
    p, order = problem(causal=causal), rh.TokenOrder("hilbert", block=64)
    q, k, v, _ = p.tensors().values()
    dense, raster = (
        rh.reference.dilated_attention(q, k, v, pattern, causal=causal)[0] for pattern in (DENSE, p.pattern)
    )
    tokens = order.permutation(p.length)
    rows = rh.reference.dilated_attention(q, k, v, p.pattern, causal=causal, positions=tokens)[0]
    expected = {"ring_hilbert raster": raster, "ring_hilbert hilbert/64": rows, "dense": dense, "longnet": raster}
    found, reasons = {}, []
    for contender in contenders.contenders(p, [None, order], "torch", 256):
        if isinstance(contender, str):
            reasons.append(contender)
        else:
            found[contender.label] = contender.attend(q, k, v)
    assert found.keys() == expected.keys()
    assert max(error(found[name], expected[name]) for name in expected) < 1e-12
    assert reasons == ["flex left out: FlexAttention has no backward on the CPU"]


def test_what_cannot_run_says_why() -> None:
    p = contenders.Problem(rh.DilatedPattern((100,), (1,)), 256, True, torch.float32, CPU, heads=2, kv_heads=2)
    reasons = [c for c in contenders.contenders(p, [], "auto", 128) if isinstance(c, str)]
    assert reasons[0] == "dense left out: 256 rows are above --dense-limit 128"
    assert "w=100" in reasons[1]


def test_flops_are_allowed_pairs() -> None:
    """4 D FLOPs per query head and allowed pair, branches summed, counted by brute force; in curve order by positions."""
    p, order = problem(), rh.TokenOrder("hilbert", block=64)
    count = rh.reference.multiplicity(p.pattern, p.length, p.kv_heads)
    for chosen, positions in ((None, torch.arange(p.length)), (order, order.permutation(p.length))):
        pairs = (count * (positions[None] <= positions[:, None])).sum().item() * p.heads // p.kv_heads
        assert contenders.operator(p, chosen, "auto").flops == pairs * 4 * p.head_dim


# ---- clocks


def test_interleaved() -> None:
    """In rounds, not one contender after the other."""
    said: list[str] = []
    calls: dict[str, timing.Call] = {name: lambda: None for name in "ab"}
    times = timing.interleaved(calls, 3, CPU, said.append)
    assert said == list("ababab")
    assert all(0 <= t.least <= t.median <= t.most for t in times.values())


def test_peak_bytes() -> None:
    """The most that is held at once, inside kernels and autograd too, not the sum and not what was there before."""
    x = torch.ones(1 << 18)
    assert timing.peak_bytes(lambda: x + 1, CPU) == pytest.approx(1 << 20, rel=1e-3)
    assert timing.peak_bytes(lambda: [(x + i).sum() for i in range(4)], CPU) < 1.1 * (1 << 20)
    assert timing.peak_bytes(lambda: (x + 1, x + 2), CPU) == pytest.approx(2 << 20, rel=1e-3)
    a, b, _ = (x.reshape(512, 512).clone().requires_grad_() for _ in range(3))
    peak = timing.peak_bytes(lambda: torch.autograd.grad((a @ b).sum(), (a, b)), CPU)
    assert 3 << 20 <= peak < 5 << 20  # a @ b or its gradient, da, db


def test_least_bytes() -> None:
    """q, k, v, out, lse and the gradients, as tensors hold them."""
    p = problem(dtype=torch.bfloat16)
    x = p.tensors()
    out, lse = rh.dilated_attention(x["q"], x["k"], x["v"], p.pattern, return_lse=True)
    grads = torch.autograd.grad(out, (x["q"], x["k"], x["v"]), x["dout"])
    assert p.input_bytes == sum(t.nbytes for t in x.values())
    assert p.least_bytes == sum(t.nbytes for t in (*x.values(), out, lse, *grads))


# ---- figures


def measured(name: str, order: str, ms: float, flops: int) -> attention.Measured:
    contender = contenders.Contender(name, order, "torch", lambda q, k, v: q, flops)
    times = {"forward": timing.Times(ms, ms, ms), "forward_backward": timing.Times(4 * ms, 3 * ms, 5 * ms)}
    return attention.Measured(contender, times, bytes=1 << 20)


def test_figures() -> None:
    """Floor = own FLOPs at dense attention's rate; above its limit, at the rate of the longest length it ran."""
    past = attention.Past()
    round_1 = [measured("ring_hilbert", "raster", 2.0, 100), measured("ring_hilbert", "hilbert/64", 3.0, 100)]
    round_1 += [measured("dense", "raster", 10.0, 1000), measured("longnet", "raster", 4.0, 100)]
    raster, hilbert, dense, _ = past.records(problem(128), round_1, 7)
    assert (raster["efficiency_forward"], raster["efficiency_forward_backward"]) == ("0.500", "0.500")
    assert (dense["efficiency_forward"], dense["floor_length"]) == ("1.000", 128)
    assert (raster["speed_vs_longnet"], hilbert["speed_vs_longnet"]) == ("2.000", "1.333")
    assert (raster["time_vs_raster"], hilbert["time_vs_raster"]) == ("", "1.500")
    assert raster["time_vs_half_length"] == ""
    assert (raster["forward_backward_ms"], raster["forward_backward_ms_min"]) == ("8.000", "6.000")
    (alone,) = past.records(problem(256), [measured("ring_hilbert", "raster", 5.0, 200)], 7)
    assert (alone["efficiency_forward"], alone["floor_length"]) == ("0.400", 128)
    assert (alone["speed_vs_longnet"], alone["time_vs_half_length"]) == ("", "2.500")
    assert float(alone["peak_mib"]) == round(1 + problem(256).input_bytes / 2**20, 2)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_bench_attention(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row per contender, length and mask; a table; a picture; further runs append."""
    output, picture = tmp_path / "rows.csv", tmp_path / "attention.svg"
    command = ["bench", "attention", *SMALL, "--output", str(output), "--dense-limit", "128"]
    assert main([*command, "--plot", str(picture)]) == 0
    rows = rows_of(output)
    assert [(r["length"], r["causal"], r["contender"], r["order"]) for r in rows] == [
        (length, causal, name, order)
        for length in ("128", "256")
        for causal in ("True", "False")
        for name, order in (
            ("ring_hilbert", "raster"),
            ("ring_hilbert", "hilbert/64"),
            ("dense", "raster"),
            ("longnet", "raster"),
        )
        if (length, name) != ("256", "dense")
    ]
    assert all(r["dtype"] == "float32" and r["floor_length"] == "128" and float(r["peak_vs_least"]) >= 1 for r in rows)
    assert all(float(r["forward_ms_min"]) <= float(r["forward_ms"]) <= float(r["forward_ms_max"]) for r in rows)
    assert {r["segment_lengths"] for r in rows} == {"64 128", "64 256"}
    printed = capsys.readouterr().out
    assert "above --dense-limit 128" in printed and "eff fwd+bwd" in printed
    assert picture.stat().st_size > 1000
    assert main([*command, "--causal", "--lengths", "128", "--order", "raster"]) == 0
    assert len(rows_of(output)) == len(rows) + 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--plot", "x.gif"], ".png or .svg"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--device", "spam"], "spam"),
        (["--backend", "spam"], "backend='spam'"),
        (["--dilation-rates", "1"], "one dilation rate per segment length"),
        (["--repeats", "0"], "--repeats"),
        (["--threads", "0"], "--threads"),
        (["--kv-heads", "3"], "num_heads=2"),
    ],
)
def test_bench_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    """Status 2 and a message; nothing measured, nothing written."""
    if arguments[1].startswith("cuda") and torch.cuda.device_count() > 99:
        pytest.skip("this machine has such a device")
    output = tmp_path / "rows.csv"
    assert main(["bench", "attention", *SMALL, "--output", str(output), *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not output.exists()


def test_bench_of_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["bench", "wire", "--output", str(tmp_path / "rows.csv")]) == 2
    assert "without torchrun" in capsys.readouterr().err


def test_table() -> None:
    """Aligned; an empty figure is a dash."""
    records = list(attention.Past().records(problem(), [measured("longnet", "raster", 2.0, 100)], 1))
    header, line = attention_report.table(records).splitlines()
    assert len(header) == len(line)
    assert line.split()[-1] == "-" and "longnet" in line.split()


# ---- over ranks


def _overlap(_rank: int, _world: int, load: float):
    chosen = argparse.Namespace(local_length=256, heads=4, head_dim=16, load=load, repeats=2)
    return list(overlap.rows(chosen, torch.device("cpu"), dist.group.WORLD)), chosen.traces


def test_overlap_on_a_slow_link(tmp_path: Path):
    """A record per strategy and pass, and a picture; rows that take far longer than the work to hide them are not hidden."""
    (records, traces), _ = run_ranks(_overlap, 2, 0.5)
    assert [(r["strategy"], r["pass"]) for r in records] == list(traces)
    assert len(records) == 4
    overlap.draw(tmp_path / "trace.png", traces)
    assert (tmp_path / "trace.png").stat().st_size > 1000
    (slow, _), _ = run_ranks(_overlap, 2, 20.0)
    for record in slow:
        assert float(record["hidden"]) < 0.6
        assert float(record["ms"]) > 0.9 * float(record["travel_ms"])


@pytest.mark.parametrize(
    ("measure", "words"), [(overlap, "bench overlap runs on CPU ranks"), (peers, "bench peers compares ranks")]
)
def test_measurements_that_need_ranks(measure, words: str):
    with pytest.raises(ValueError, match=words):
        next(iter(measure.rows(argparse.Namespace(train=None), torch.device("cpu"), None)))


def _peers(_rank: int, _world: int):
    sizes = {"dense_length": 64, "dilated_length": 128, "heads": 2, "head_dim": 8, "buckets": [16], "repeats": 1}
    chosen = argparse.Namespace(train=None, **sizes)
    return list(peers.rows(chosen, torch.device("cpu"), dist.group.WORLD))


def test_peers():
    if importlib.util.find_spec("ring_attention_pytorch") is None:
        with pytest.raises(ValueError, match="pip install ring-attention-pytorch"):
            run_ranks(_peers, 2)
    else:
        records, _ = run_ranks(_peers, 2)
        assert {r["problem"] for r in records} == {"dense", "dilated"} and len(records) == 5


@pytest.mark.slow
def test_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two runs, compared step by step; the second is the first in another precision."""
    write_texts(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tiny_config(tmp_path, train__steps=10).model_dump(mode="json")))
    chosen = argparse.Namespace(
        config=path, set=["data.eval.every=5"], variants=["train.seed=0", "train.precision=bf16"]
    )
    records = list(curves.rows(chosen, CPU, None))
    curves.report(records, chosen)
    curves.draw(tmp_path / "curves.png", records)
    first, second = (r["largest_difference"] for r in records)
    assert first == "0.00e+00" != second
    assert all(float(r["mean_difference"]) < 0.01 and len(r["losses"].split()) == 10 for r in records)
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert "train.precision=bf16" in capsys.readouterr().out


def test_curves_of_runs_with_and_without_held_out_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pretrain(config: RunConfig) -> Summary:
        folder = Path(config.log.dir)
        folder.mkdir(parents=True)
        (folder / METRICS_FILE).write_text('{"kind": "train", "loss": 2.0}\n')
        return Summary(Progress(), None if config.data.eval is None else 2.0, None, None)

    monkeypatch.setattr("ring_hilbert.training.loop.pretrain", pretrain)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tiny_config(tmp_path).model_dump(mode="json")))
    for variants in (["data.eval=null", "train.seed=0"], ["train.seed=0", "data.eval=null"]):
        records = list(curves.rows(argparse.Namespace(config=path, set=[], variants=variants), CPU, None))
        assert [r["held_out_loss"] for r in records] == [None if "eval" in v else 2.0 for v in variants]
        assert records[1]["held_out_difference"] is None


def test_peers_in_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On one rank the dense peer and one dense branch are the same model: the same loss."""
    config = tiny_config(tmp_path, attention={"segment_lengths": [None], "dilation_rates": [1]})
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    chosen = argparse.Namespace(train=path, train_lengths=[512], set=[], eager=True, repeats=1)
    theirs, ours = peers.rows(chosen, CPU, None)
    assert "context_parallel" in theirs["contender"] and float(ours["forward_backward_ms"]) > 0
    losses = re.findall(r"first loss ([0-9.]+)", capsys.readouterr().out)
    assert len(losses) == 2 and float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-5)


def test_training(tmp_path: Path) -> None:
    """What a rank held is what was planned, about; a record per vocabulary and length."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tiny_config(tmp_path, train__checkpoint_activations=True).model_dump(mode="json")))
    sizes = ["model.config.hidden_size=64", "model.config.intermediate_size=256", "log.peak_tflops=1"]
    kinds = {"lengths": [4096], "vocab": [8000], "documents": [3], "padding": 0.25}
    chosen = argparse.Namespace(config=path, set=sizes, steps=1, **kinds)
    (record,) = training.rows(chosen, CPU, None)
    assert float(record["peak_gib"]) == pytest.approx(float(record["planned_gib"]), rel=0.1)
    assert float(record["tokens_per_second"]) > 0 and 0 < float(record["mfu"]) < 1
    assert float(record["first_seconds"]) > 0 < float(record["products_seconds"])
    assert record["taken"] == "train.recompute=all train.recompute_layers=0 train.mlp_tiles=1"
    training.draw(tmp_path / "memory.png", [record])
    assert (tmp_path / "memory.png").stat().st_size > 1000


@pytest.mark.parametrize("name", ["llama_1b_1m", "llama_8b_1m", "continue_1m"])
def test_shapes_of_the_kernels_are_those_of_the_configurations(name: str):
    config = load_config(Path(__file__).parents[2] / f"configs/{name}.yaml")
    shape = next(shape for shape in kernels_shipped.SHAPES if shape.name == name)
    lengths, rates = zip(*shape.pattern.branches, strict=True)
    assert (list(lengths), list(rates)) == (config.attention.segment_lengths, config.attention.dilation_rates)
    assert config.attention.order is not None and shape.order is not None
    assert (shape.order.curve, shape.order.block) == (config.attention.order.curve, config.attention.order.block)
    if (model := config.model.config) is not None:
        heads = model["num_attention_heads"], model["num_key_value_heads"], model["head_dim"]
        assert (shape.heads, shape.kv_heads, shape.head_dim) == heads


def test_pairs_of_a_shape_are_those_of_the_plan_and_of_its_documents():
    pattern = rh.DilatedPattern((64, 256, None), (1, 4, 16), segment_shift=24)
    order = rh.TokenOrder("hilbert", block=8)
    shape = kernels_shipped.Shape("small", pattern, order, 1000, 2, 1, 64)
    cpu = torch.device("cpu")
    seen = Visible(shape.length, True, order=shape.order)
    plan = shape.problem(cpu).plan(pattern, shape.order)
    assert kernels_shipped.pairs_of(shape, seen, cpu) * 2 * 4 * 64 == plan.attention_flops(0)
    documents = kernels_shipped.document_ids(shape.length, 20, None)
    assert documents.unique().tolist() == list(range(20))
    by_row = kernels_shipped.document_ids(shape.length, 20, order)
    assert torch.equal(by_row[:, order.inverse(shape.length)], documents)
    seen = Visible(shape.length, True, order=None, documents=documents)
    dense = replace(shape, pattern=rh.DilatedPattern((None,), (1,)), order=None)
    sizes = documents[0].bincount()
    assert kernels_shipped.pairs_of(dense, seen, cpu) == int((sizes * (sizes + 1) // 2).sum())


def test_slides(tmp_path: Path) -> None:
    """Every part on the CPU: ours and the published algorithm, and a slide new to the process."""
    out, sizes = tmp_path / "slides.csv", ["--tiles", "70", "--heads", "4", "--embed-dim", "16", "--depth", "2"]
    main(
        [
            "bench",
            "slides",
            "--device",
            "cpu",
            "--output",
            str(out),
            "--head-dims",
            "4",
            "--lengths",
            "40",
            "--repeats",
            "1",
            *sizes,
        ]
    )
    with out.open(newline="") as file:
        found = list(csv.DictReader(file))
    names = [(row["part"], row["contender"], row["recomputed"]) for row in found]
    both = ("ring_hilbert", "longnet")
    assert names == [
        *(("attention", name, "") for name in both),
        *(("encoder", name, kept) for kept in ("True", "False") for name in both),
        ("planning", "ring_hilbert", ""),
    ]
    assert all(float(row["forward_backward_ms"]) > 0 for row in found) and float(found[-1]["first_ms"]) > 0
    assert all(float(row["time_vs_longnet"]) > 0 < float(row["extra_vs_longnet"]) for row in found[:6:2])


@pytest.mark.parametrize(
    "what", ["opening", *(pytest.param(x, marks=pytest.mark.full) for x in ("tokenising", "packing"))]
)
def test_data(what: str, tmp_path: Path) -> None:
    out, sizes = tmp_path / "data.csv", ["--documents", "3000", "--cores", "1", "--megabytes", "1", "--repeats", "2"]
    main(["bench", "data", "--what", what, *sizes, "--output", str(out)])
    with out.open(newline="") as file:
        found = {(row["setting"], row["quantity"]): float(row["value"]) for row in csv.DictReader(file)}
    if what == "opening":
        assert len(found) == 6 and all(value > 0 for value in found.values())
    elif what == "tokenising":
        rates = [found["1 cores, 1 MB, 2 rounds", f"{name}"] for name in ("share, least", "share", "share, most")]
        assert len(found) == 9 and 0 < rates[0] <= rates[1] <= rates[2] < 2
    else:
        padding = {setting: value for (setting, quantity), value in found.items() if quantity == "% padding"}
        assert (
            all((value > 0) == setting.startswith("best_fit") for setting, value in padding.items())
            and len(padding) == 8
        )
    with pytest.raises(ValueError, match="--repeats and --documents must be at least 1"):
        next(data.rows(argparse.Namespace(what=[what], cores=[1], megabytes=1, repeats=0, documents=1)))


def test_saving(tmp_path: Path) -> None:
    """A save affects the steps after the one it began after, at most until the one that begins the next save and waits for it."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tiny_config(tmp_path).model_dump(mode="json")))
    chosen = argparse.Namespace(config=path, set=[], length=256, every=4, saves=2, folder=tmp_path)
    (record,) = saving.rows(chosen, CPU, None)
    assert len(record["steps"].split()) == 12 and len(record["seconds_per_save"].split()) == 2
    assert all(1 <= int(count) <= 5 for count in record["touched_steps"].split())
    assert float(record["gigabytes"]) < 0.01 and not list(tmp_path.glob("tmp*"))
