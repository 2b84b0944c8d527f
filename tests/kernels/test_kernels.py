# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels against the definition, in Triton's interpreter (on a GPU where there is one).

Memory that is not written yet is NaN. What is visited is the business of test_walk.py.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ring_hilbert as rh
from ring_hilbert.bench import kernels, kernels_aot, kernels_shipped
from ring_hilbert.bench.contenders import Problem
from ring_hilbert.kernels import tiles
from ring_hilbert.kernels.tiles import Tile
from ring_hilbert.ops import backends, triton_core
from ring_hilbert.ops.nesting import chains
from ring_hilbert.ops.walk import plan_rows
from ring_hilbert.ops.zero_keys import add_zero_keys
from ring_hilbert.parallel.layout import Layout
from tests.harness.cases import Case, assert_close, cases
from tests.harness.ranks import run_ranks
from tests.parallel.test_exchange import EXCHANGE, Way, attend, problems_for, problems_in_every_way, splits, whole

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    import tests.harness.interpreter  # noqa: F401
on_the_cpu = pytest.mark.skipif(DEVICE.type != "cpu", reason="of CPU tensors, which only the interpreter takes")


@pytest.fixture(autouse=True)
def _nothing_is_zero_by_chance(monkeypatch: pytest.MonkeyPatch):
    poison(monkeypatch)


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `torch.empty` and `empty_like` return is NaN."""
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)

        def poisoned(*args, make=make, **options):
            tensor = make(*args, **options)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        monkeypatch.setattr(torch, name, poisoned)


def answer(case: Case, dtype: torch.dtype, tile: Tile | None = None, beside: int | None = None) -> dict[str, Tensor]:
    """out, lse, dq, dk, dv of the operator on the kernels, with `tile` where the interpreter would choose its own."""
    x = {name: _laid_out(value.to(DEVICE), beside) for name, value in case.tensors(dtype).items()}
    q, k, v = (x[name].requires_grad_() for name in "qkv")
    facts = {name: None if value is None else value.to(DEVICE) for name, value in case.facts().items()}
    before, tiles.INTERPRETER = tiles.INTERPRETER, tile or tiles.INTERPRETER
    try:
        out, lse = rh.dilated_attention(
            q, k, v, case.pattern, causal=case.causal, order=case.order, backend="triton", return_lse=True, **facts
        )
        out.backward(x["dout"])
    finally:
        tiles.INTERPRETER = before
    return {
        name: t.detach().cpu()
        for name, t in zip(("out", "lse", "dq", "dk", "dv"), (out, lse, q.grad, k.grad, v.grad), strict=True)
    }


def _laid_out(x: Tensor, beside: int | None) -> Tensor:
    """Unless `beside` is None, the same rows within a larger tensor of NaN, `[B, H, S + 6, D + beside]` in memory."""
    if beside is None:
        return x
    batch, rows, heads, dim = x.shape
    view = x.new_full((batch, heads, rows + 6, dim + beside), float("nan")).transpose(1, 2)[:, 3 : rows + 3, :, :dim]
    view.copy_(x)
    return view.detach()


def check(ours: dict[str, Tensor], case: Case, dtype: torch.dtype, floor: float | None = None) -> None:
    """Against float64 on the same inputs: max error at most 2x, mean at most 1.5x that of eager autograd in that dtype.

    `floor` is an error that is forgiven where eager makes none, in units of the dtype's rounding of the largest value: small cases
    have few sums. By default 4 in float32, 1 in others.
    """
    floor = (4.0 if dtype == torch.float32 else 1.0) if floor is None else floor
    exact, eager = case.expected(torch.float64, inputs=dtype), case.expected(dtype)
    for name, truth in exact.items():
        covered = truth != float("-inf")
        assert torch.equal(ours[name] != float("-inf"), covered), f"{name}: other rows uncovered"
        error, allowed = ((run[name].double() - truth)[covered].abs() for run in (ours, eager))
        assert torch.isfinite(error).all(), f"{name}: not finite"
        if error.numel():
            free = (
                floor
                * torch.finfo(torch.float32 if name == "lse" else dtype).eps
                * max(1.0, truth[covered].abs().max())
            )
            assert error.max() <= 2 * allowed.max() + free, f"{name}: {error.max():.3e} > 2 * {allowed.max():.3e}"
            assert error.mean() <= 1.5 * allowed.mean() + free, (
                f"{name}: {error.mean():.3e} > 1.5 * {allowed.mean():.3e}"
            )


LADDER = rh.DilatedPattern((32, 64, 128), (1, 2, 4))
COUNTED_ONCE = rh.DilatedPattern((8, 32, None), (1, 2, 4), weights=(1, 2, 4), count="once")
HILBERT = rh.TokenOrder("hilbert", block=32)
CASES = {
    "dense": Case(rh.DilatedPattern((None,), (1,)), 113, 2, 2, 1, 16),
    "ladder": Case(LADDER, 113, 1, 4, 2, 16),
    "ladder, shifted": Case(replace(LADDER, segment_shift=-37, head_shift=3), 113, 1, 4, 4, 16),
    "steep ladder": Case(rh.DilatedPattern((16, 64, 256), (1, 4, 16)), 150, 1, 3, 3, 16),
    "uncovered rows": Case(rh.DilatedPattern((24, 48), (3, 6)), 100, 1, 4, 4, 16),
    "duplicates": Case(rh.DilatedPattern((16, 16, 64, 64), (1, 1, 2, 4)), 90, 1, 2, 2, 16),
    "r does not divide w": Case(rh.DilatedPattern((15, 45), (3, 6), segment_shift=4), 100, 1, 4, 4, 16),
    "not nested": Case(rh.DilatedPattern((16, 40, 50), (1, 2, 3), segment_shift=-5), 113, 1, 2, 1, 16),
    "block rule": Case(rh.DilatedPattern((16, 64), (2, 4), "block"), 100, 1, 4, 4, 16),
    "hilbert": Case(LADDER, 113, 1, 2, 2, 16, order=HILBERT),
    "ties": Case(LADDER, 113, 2, 2, 2, 16, positions="ties"),
    "positions per entry": Case(LADDER, 70, 2, 2, 1, 16, positions="per-batch"),
    "documents": Case(LADDER, 113, 2, 2, 2, 16, documents="shared"),
    "documents per entry, hilbert": Case(LADDER, 70, 2, 2, 1, 16, order=HILBERT, documents="per-batch"),
    "padding": Case(LADDER, 113, 1, 4, 2, 16, documents="padding"),
    "counted once": Case(COUNTED_ONCE, 34, 1, 2, 1, 16, order=rh.TokenOrder("hilbert", block=8), documents="shared"),
    "weights": Case(rh.DilatedPattern((16, 40), (1, 3), segment_shift=-5, weights=(3, 700)), 34, 1, 2, 1, 16),
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_float32_is_as_good_as_eager(name: str, causal: bool):
    case = replace(CASES[name], causal=causal)
    check(answer(case, torch.float32), case, torch.float32)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "seq_len"),
    [
        (torch.bfloat16, 16, 63), (torch.bfloat16, 64, 113), (torch.bfloat16, 128, 1), (torch.bfloat16, 40, 113),
        (torch.float16, 40, 63), (torch.float16, 96, 113), (torch.float32, 80, 113), (torch.float32, 256, 63),
    ],
)  # fmt: skip
def test_dtypes_head_dims_and_odd_lengths(dtype: torch.dtype, head_dim: int, seq_len: int):
    case = Case(LADDER, seq_len, 1, 2, 1, head_dim, causal=head_dim != 40)
    check(answer(case, dtype), case, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_logits(dtype: torch.dtype):
    case = Case(rh.DilatedPattern((128, 256), (1, 2)), 300, 1, 2, 2, 32, logit_scale=16.0)
    check(answer(case, dtype, Tile(64, 64, 1, 1)), case, dtype, floor=0.0)


def test_the_largest_weights_in_half_precision():
    case = Case(rh.DilatedPattern((16, None), (1, 2), weights=(1, 2**15 - 1)), 24, 1, 1, 1, 16)
    check(answer(case, torch.float16), case, torch.float16)


@pytest.mark.parametrize("beside", [0, 3])
def test_rows_between_nan_and_at_strides(beside: int):
    case = Case(LADDER, 63, 2, 4, 2, 24)
    check(answer(case, torch.float32, beside=beside), case, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(2, 2, 48), (4, 2, 16)])
def test_zero_keys_in_half_precision(dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int):
    """Rows with none of them keep every bit, even those whose logarithm has no exponential; rows without a key get them."""
    from ring_hilbert.kernels import launch

    generator = torch.Generator().manual_seed(0)
    out = torch.randn(2, 150, heads, head_dim, generator=generator).to(DEVICE, dtype)
    lse = torch.randn(2, heads, 150, generator=generator).mul(30).to(DEVICE)
    lse[:, :, ::7], lse[:, :, 1::9] = float("-inf"), -200.0
    out.masked_fill_((lse == float("-inf")).transpose(1, 2)[..., None], 0.0)
    count = torch.randint(0, 900, (kv_heads, 150), generator=generator, dtype=torch.int32).to(DEVICE)
    count[:, ::3], count[:, 64:128] = 0, 0  # a block of rows without any
    expected = add_zero_keys(out.double(), lse.double(), torch.zeros_like(lse), count)
    before = out.clone(), lse.clone()
    launch.add_zero_keys(out, lse, count)
    assert_close({"out": out.double()}, {"out": expected[0]}, bound=torch.finfo(dtype).eps / 2)
    torch.testing.assert_close(lse.double(), expected[1], rtol=1e-6, atol=1e-6)
    kept = (count == 0).repeat_interleave(heads // kv_heads, dim=0)
    assert torch.equal(lse[:, kept], before[1][:, kept])
    assert torch.equal(out.transpose(1, 2)[:, kept], before[0].transpose(1, 2)[:, kept])


@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_scales_that_are_not_positive(scale: float):
    case = Case(LADDER, 50, 1, 2, 1, 16)
    results = []
    for dtype, run in ((torch.float64, rh.reference.dilated_attention), (torch.float32, rh.dilated_attention)):
        x = {name: value.to(DEVICE, dtype) for name, value in case.tensors(torch.float32).items()}
        q, k, v = (x[name].requires_grad_() for name in "qkv")
        options = {"backend": "triton", "return_lse": True} if dtype == torch.float32 else {}
        out, lse = run(q, k, v, case.pattern, scale=scale, **options)
        out.backward(x["dout"])
        results.append(
            {name: t.detach().double() for name, t in zip("oldkv", (out, lse, q.grad, k.grad, v.grad), strict=True)}
        )
    assert_close(results[1], results[0], 5e-6)


def test_results_repeat_to_the_bit():
    case = replace(CASES["documents per entry, hilbert"], heads=4)
    first, second = (answer(case, torch.bfloat16) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("heads", [4, 8])
def test_heads_and_tiles_along_either_axis_of_the_grid(heads: int, monkeypatch: pytest.MonkeyPatch):
    """The same results; also where there are as many heads as tiles."""
    from ring_hilbert.kernels import launch

    case = Case(LADDER, 113, 2, heads, 2, 16, positions="ties")
    by_tile = answer(case, torch.float32)
    monkeypatch.setattr(launch, "FEW_TILES", 0)
    by_head = answer(case, torch.float32)
    assert all(torch.equal(by_tile[name], by_head[name]) for name in by_tile)


def fits(case: Case) -> Case:
    """A head dim that the kernels have, and logits for which float32 alone can be compared to float64."""
    return replace(case, head_dim=16, logit_scale=1.0)


small_tiles = st.tuples(st.sampled_from([16, 32]), st.sampled_from([16, 32])).map(lambda blocks: Tile(*blocks, 1, 1))


@given(cases(), small_tiles)
@settings(max_examples=8)
def test_float32_equals_the_reference(case: Case, tile: Tile):
    check_any(case, tile)


@pytest.mark.full
@given(cases(max_length=120), small_tiles)
def test_float32_equals_the_reference_on_many(case: Case, tile: Tile):
    check_any(case, tile)


def check_any(case: Case, tile: Tile) -> None:
    case = fits(case)
    ours = {name: t.double() for name, t in answer(case, torch.float32, tile).items()}
    assert_close(ours, case.expected(torch.float64, inputs=torch.float32), 5e-6)


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [16, 40, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("seq_len", [1, 63, 113, 1023])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.timeout(900)
def test_matrix(dtype: torch.dtype, head_dim: int, seq_len: int, causal: bool):
    case = Case(rh.DilatedPattern((64, 256, 512), (1, 4, 8), segment_shift=9), seq_len, 1, 2, 1, head_dim, causal)
    check(answer(case, dtype, Tile(64, 64, 1, 1)), case, dtype)


# ---- ranks


RankProblem = tuple[Case, tuple[int, ...], Way]


def _run_cases(rank: int, world: int, problems: list[RankProblem], dtype: torch.dtype):
    import tests.harness.interpreter  # noqa: F401

    results = []
    with pytest.MonkeyPatch.context() as patch:
        poison(patch)
        for case, lengths, way in problems:
            results.append(attend(case, lengths, rank, dist.group.WORLD, dtype, backend="triton", way=way)[0])
    return results


def run_cases(world: int, problems: list[RankProblem], dtype: torch.dtype) -> list[dict[str, Tensor]]:
    ranks = run_ranks(_run_cases, world, problems, dtype, timeout=280)
    layouts = [Layout(lengths, way.layout) for _, lengths, way in problems]
    return [whole([rank[i] for rank in ranks], layout) for i, layout in enumerate(layouts)]


def check_ranks(world: int, problems: list[RankProblem]) -> None:
    problems = [(fits(case), lengths, way) for case, lengths, way in problems]
    for problem, result in zip(problems, run_cases(world, problems, torch.float32), strict=True):
        try:
            ours = {name: t.double() for name, t in result.items()}
            assert_close(ours, problem[0].expected(torch.float64, inputs=torch.float32), 5e-6)
        except AssertionError as error:
            raise AssertionError(f"{problem}") from error


def every_problem(world: int) -> list[RankProblem]:
    return [(*problem, EXCHANGE) for problem in problems_for(world)] + problems_in_every_way(world)


@on_the_cpu
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_equal_the_reference(world: int):
    every = every_problem(world)
    check_ranks(world, every[world // 2 :: 107 if world == 2 else 191])


@on_the_cpu
@pytest.mark.full
@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_count_pairs_as_often_as_the_reference(world: int):
    case = replace(CASES["counted once"], seq_len=24 * world, order=None)
    weighed = replace(CASES["weights"], seq_len=20 * world, documents="padding")
    check_ranks(world, [(case, (24,) * world, Way(layout="zigzag")), (weighed, (20,) * world, Way("ring"))])


@on_the_cpu
@pytest.mark.full
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("part", range(16))
@pytest.mark.timeout(900)
def test_ranks_equal_the_reference_everywhere(world: int, part: int):
    check_ranks(world, every_problem(world)[part::16])


@on_the_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_does_not_grow_with_the_ranks(dtype: torch.dtype):
    """Against float64 on the same inputs: RMS error at P = 4 at most 1.1x, max at most 2.5x that at P = 1."""
    case = Case(rh.DilatedPattern((32, 128, 256), (1, 2, 4)), 256, 1, 2, 2, 16, logit_scale=4.0)
    exact = case.expected(torch.float64, inputs=dtype)
    one, four = (run_cases(world, [(case, splits(256, world, "even"), EXCHANGE)], dtype)[0] for world in (1, 4))
    for name, truth in exact.items():
        covered = truth != float("-inf")
        alone, together = ((x[name].double() - truth)[covered].abs() for x in (one, four))
        assert together.square().mean().sqrt() <= 1.1 * alone.square().mean().sqrt(), name
        assert together.max() <= 2.5 * alone.max(), name


# ---- debugging and measuring


@on_the_cpu
def test_compare_tells_what_is_wrong():
    case = Case(LADDER, 50, 1, 2, 1, 16, documents="padding")
    x = case.tensors(torch.float32)

    def broken(q, k, v, *args, **options):
        out, lse = rh.dilated_attention(q, k, v, *args, **options)
        return out * 1.01, lse

    for call, factor in ((rh.dilated_attention, 2.0), (broken, 1e-3)):
        errors = rh.reference.compare(call, x["q"], x["k"], x["v"], LADDER, backend="triton", **case.facts())
        assert set(errors) == {"out", "lse", "dq", "dk", "dv"} and all(e.same_rows_uncovered for e in errors.values())
        worst = max(
            errors[name].max_error / (errors[name].eager_max_error * factor + 2e-6 * (factor > 1))
            for name in ("out", "dv")
        )
        assert (worst <= 1) == (call is rh.dilated_attention), errors


@on_the_cpu
def test_layers_of_a_batch_share_schedules(monkeypatch: pytest.MonkeyPatch):
    """One for forward and dQ, one for dK and dV, until other documents are written in place; none once a graph may do that."""
    from ring_hilbert.kernels import prune

    made = list[bool]()
    real = prune.prune

    def counted(*args, transposed: bool, **options):
        made.append(transposed)
        return real(*args, transposed=transposed, **options)

    monkeypatch.setattr(prune, "prune", counted)
    x = [torch.randn(1, 64, 2, 16, requires_grad=True) for _ in range(3)]
    documents = [torch.arange(64) // length for length in (64, 10, 23)]

    def layers(prepared: rh.Prepared, number: int = 2) -> list[Tensor]:
        made.clear()
        outs = [rh.dilated_attention(*x, LADDER, backend="triton", prepared=prepared) for _ in range(number)]
        return [*outs, *torch.autograd.grad(sum(outs), x, torch.ones_like(outs[0]))]

    def same(prepared: rh.Prepared, ids: Tensor) -> bool:
        fresh = layers(rh.prepare(64, document_ids=ids))
        return all(torch.equal(a, b) for a, b in zip(layers(prepared), fresh, strict=True))

    prepared = rh.prepare(64, document_ids=documents[0])
    layers(prepared)
    assert made == [False, True]
    assert same(prepared, documents[0]) and made == []
    prepared.refresh(document_ids=documents[1])
    assert same(prepared, documents[1]) and made == [False, True]
    monkeypatch.setattr(triton_core, "KEPT_SCHEDULES", 0)
    layers(rh.prepare(64, document_ids=documents[0]))
    layers(prepared)
    assert made == [False, True]  # those of the batch in between are kept, no others
    with monkeypatch.context() as capturing:
        capturing.setattr(torch.cuda, "is_initialized", lambda: True)
        capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        prepared.refresh(document_ids=documents[2])
    assert same(prepared, documents[2]) and made == [False, False, *[False, True] * 2]


@on_the_cpu
def test_bench_kernels_times_what_it_says():
    chosen = argparse.Namespace(order=["raster", "hilbert"], dense_limit=64, repeats=1, without=[], pause=0.0)
    problem = Problem(LADDER, 128, True, torch.float32, DEVICE, 1, 2, 2, 16)
    records = {(r["contender"], r["pass"]): r for r in kernels._measure(problem, "ladder", chosen)}
    assert {label for label, _ in records} >= {"ring_hilbert raster", "ring_hilbert hilbert", "longnet"}
    pairs = problem.plan(LADDER).attention_flops(0) / 64
    for (label, pass_), record in records.items():
        flops = pairs * 16 * {"forward": 4, "backward": 10}[pass_]
        assert float(record["tflops"]) == pytest.approx(flops / float(record["ms"]) / 1e9, rel=2e-2), label
    tile, schedule = kernels._core(problem, "raster").schedule("forward")
    share = schedule.blocks() * tile.block_outer * tile.block_inner / pairs
    assert float(records["ring_hilbert raster", "forward"]["executed_share"]) == pytest.approx(share, rel=1e-2)


@on_the_cpu
def test_bench_kernels_of_shipped_shapes(monkeypatch: pytest.MonkeyPatch):
    order = rh.TokenOrder("hilbert", block=32)
    one = kernels_shipped.Shape("ladder", LADDER, order, 64, 2, 1, 64, longnet=True, tail=True)
    monkeypatch.setattr(kernels_shipped, "SHAPES", (one, replace(one, documents=5, longnet=False, tail=False)))
    monkeypatch.setattr(kernels_shipped, "TAIL", 0.5)
    monkeypatch.setattr(kernels_shipped, "DENSE_ROWS", 64)
    records = list(kernels_shipped.rows(argparse.Namespace(repeats=1, pause=0.0), DEVICE))
    ours = ("ring_hilbert", kernels_shipped.KEPT, kernels_shipped.OPERATOR)
    of_one = {
        (r["documents"], r["contender"], r["pass"]): float(r["of_one_document"])
        for r in records
        if r["of_one_document"]
    }
    assert list(of_one) == list(itertools.product((5,), ours, ("forward", "backward"))) and min(of_one.values()) > 0
    measured = (*ours, kernels_shipped.FLOOR)
    with_one = (*ours[:2], kernels_shipped.CUT, kernels_shipped.OPERATOR, kernels_shipped.FLOOR, "longnet")
    wanted = [*itertools.product(with_one, (1,)), *itertools.product(measured, (5,))]
    assert [(r["contender"], r["documents"]) for r in records[::2]] == wanted
    pairs = one.problem(DEVICE).plan(LADDER, order).attention_flops(0) / 4 / 64
    assert float(records[0]["tflops"]) == pytest.approx(4 * 64 * pairs / float(records[0]["ms"]) / 1e9, rel=2e-3)
    (cut,) = {r["pairs"] for r in records if r["contender"] == kernels_shipped.CUT}
    assert 0.3 * pairs < cut < pairs
    assert not any(r["cudnn_healthy"] for r in records)


def compile_rows(*arguments: str) -> list[dict[str, str]]:
    """`kernels_aot.rows` in a process that does not interpret."""
    code = f"import csv, sys, torch; from ring_hilbert.bench import kernels_aot as a; rows = list(a.rows({', '.join(arguments)})); "
    code += "w = csv.DictWriter(sys.stdout, list(rows[0])); w.writeheader(); w.writerows(rows)"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return list(csv.DictReader(io.StringIO(result.stdout)))


def check_compiled(row: dict[str, str]) -> None:
    assert int(row["spilled_bytes"]) == 0 and int(row["shared_bytes"]) <= int(row["shared_limit"]), row
    assert (int(row["wgmma"]) > 0) == (row["capability"] == "90"), row


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_ahead_of_time_where_rows_are_at_equal_steps(capability: int):
    rows = compile_rows(
        f"({capability},)", "(64,)", "torch.bfloat16", "('forward', 'dkdv')", "('rows at equal steps',)"
    )
    assert len(rows) == 2
    for row in rows:
        check_compiled(row)


def test_kernels_without_gluon_compile():
    """Interpreted, they allow what Triton's compiler refuses, such as a name that changes its type in a loop."""
    rows = compile_rows("(80,)", "(64,)", "torch.bfloat16", "a.PASSES", "('rows in a list',)")
    assert [row["pass"] for row in rows] == list(tiles.PASSES)
    assert all(int(row["shared_bytes"]) <= int(row["shared_limit"]) and row["gluon"] == "False" for row in rows)


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles_ahead_of_time(capability: int):
    dims = (24, 40, 48, 64, 96, 128) if capability == 90 else (64, 128)
    rows = compile_rows(f"({capability},)", str(dims), "torch.bfloat16")
    assert len(rows) == len(dims) * 3 * len(kernels_aot.VARIANTS)
    for row in rows:
        check_compiled(row)


# ---- which backend


@on_the_cpu
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, "float16, bfloat16 and float32"),
        ({"head_dim": 20}, "multiples of 8"),
        ({"head_dim": 264}, "up to 256"),
        ({"interpret": "0"}, "CUDA device"),
    ],
)
def test_an_explicit_backend_works_or_says_why_not(monkeypatch: pytest.MonkeyPatch, change: dict, message: str):
    if "interpret" in change:
        monkeypatch.setenv("TRITON_INTERPRET", change["interpret"])
    x = torch.zeros(1, 8, 2, change.get("head_dim", 16), dtype=change.get("dtype", torch.float32))
    with pytest.raises(ValueError, match=message):
        rh.dilated_attention(x, x, x, LADDER, backend="triton")
    rh.dilated_attention(x, x, x, LADDER, backend="auto")


def test_auto_is_triton_on_cuda_and_torch_elsewhere(monkeypatch: pytest.MonkeyPatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for dtype, dim in itertools.product((torch.float16, torch.bfloat16, torch.float32), (16, 40, 256)):
        assert backends.choose("auto", cuda, dtype, dim) == "triton"
        assert backends.choose("auto", cpu, dtype, dim) == "torch"
    assert backends.choose("auto", cuda, torch.float64, 64) == "torch"
    assert backends.choose("auto", cuda, torch.float32, 20) == "torch"
    monkeypatch.setattr(backends, "has_triton_package", lambda: False)
    assert backends.choose("auto", cuda, torch.float32, 64) == "torch"


def test_every_call_the_kernels_take_has_tiles():
    shapes = itertools.product(tiles.PASSES, (80, 90, 100, 120), range(8, 257, 8), backends.DTYPES)
    for pass_, capability, dim, dtype in shapes:
        assert all(tile.block_outer >= 16 for tile in tiles.tiles_for(pass_, capability, dim, dtype))


def test_walks_that_take_registers_have_smaller_tiles():
    large, small = Tile(64, 64, 8, 2), Tile(64, 16, 8, 2)
    rows = torch.arange(256)

    def chosen(length: int, places: Tensor | None = None) -> Tile:
        of = chains(rh.DilatedPattern((length, None), (1, 2)), 1)
        return tiles.plan_tile((large, small), lambda t: plan_rows(of, 0, rows, places, block_outer=t.block_outer))[0]

    assert chosen(64) == large
    assert chosen(4) == small and chosen(64, rows.flip(0)) == small


def test_tiles_of_more_rows_are_not_taken_where_they_lie_in_several_segments():
    """Rows in a list have larger tiles for heads of 128."""
    found = tiles.tiles_for("dkdv", 90, 128, torch.bfloat16)
    rows, places = torch.arange(1024), torch.arange(1024).flip(0)

    def chosen(length: int) -> Tile:
        of = chains(rh.DilatedPattern((length, None), (1, 2)), 1)
        return tiles.plan_tile(found, lambda t: plan_rows(of, 0, rows, places, block_outer=t.block_outer))[0]

    assert found[1].block_outer == 128 and chosen(512) == found[1]
    assert chosen(64) == found[3] and not found[3].gluon
