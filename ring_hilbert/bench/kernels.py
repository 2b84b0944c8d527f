# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels alone: TFLOP/s forward and backward, against other kernels in the same run.

A row is one pass of one contender on one problem. `tflops` counts the pairs of the branches (4 D FLOPs each forward, 10 D
backward, for all contenders), `executed_tflops` the pairs in the visited blocks: fewer where pairs of several branches are
visited once, more where some are masked. `efficiency` is tflops relative to dense cuDNN attention with the same mask in the
same run, at --dense-limit rows if the problem has more (one head of these does not fill a GPU: compare the milliseconds of
--dilations with each other). Contenders alternate; medians are kept, with minimum and maximum.

With --tune every tile of a list is tried (executed_tflops then counts the products that a pass computes); the table in
`kernels/tiles.py` is edited by hand. With --aot nothing runs: the rows give the registers, spills, shared memory and
instructions of the compiled kernels, and no GPU is needed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend

import ring_hilbert as rh
from ring_hilbert.bench import kernels_aot, kernels_shipped
from ring_hilbert.bench.contenders import (
    DENSE,
    Contender,
    Problem,
    Unsupported,
    autograd_passes,
    core_passes,
    dense,
    programmable,
    published,
)
from ring_hilbert.bench.kernels_shipped import FLOPS
from ring_hilbert.bench.timing import interleaved
from ring_hilbert.kernels.tiles import PASSES, Pass, Tile, device_tiles
from ring_hilbert.ops.backends import choose
from ring_hilbert.ops.core import Shard
from ring_hilbert.ops.triton_core import TritonCore
from ring_hilbert.ops.visible import Visible
from ring_hilbert.ops.visits import Chunk

Record = dict[str, Any]
# Of one head at every dilation: enough for the cost of clearing the rows between them to be negligible.
DILATED_ROWS = 131072
PRODUCTS = {"forward": 2, "dq": 3, "dkdv": 4}  # matrix products of a pass per block
CANDIDATES = {
    "forward": [
        (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (128, 64, 4, 2),
        (128, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2),
    ],
    "dq": [
        (128, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 8, 2),
        (128, 32, 8, 3), (64, 32, 4, 3),
    ],
    "dkdv": [
        (128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3), (128, 32, 8, 2),
        (128, 32, 8, 3), (64, 32, 4, 2), (64, 32, 4, 3), (64, 32, 8, 2),
    ],
}  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags of `ring-hilbert bench kernels`."""
    add = parser.add_argument
    add(
        "--lengths", type=int, nargs="+", default=[16384, 32768, 131072], metavar="S", help="default 16384 32768 131072"
    )
    add("--head-dims", type=int, nargs="+", default=[64, 128], metavar="D", help="default 64 128")
    add("--heads", type=int, default=8, metavar="H", help="default 8")
    add("--kv-heads", type=int, metavar="HKV", help="default: as many as --heads")
    add("--dtype", choices=("float16", "bfloat16"), default="bfloat16", help="default bfloat16")
    add(
        "--order", nargs="+", default=["raster", "hilbert"], metavar="CURVE", help="of the rows; default raster hilbert"
    )
    add("--causal", action=argparse.BooleanOptionalAction, help="default: both")
    add(
        "--dilations", type=int, nargs="*", default=[1, 8, 64], metavar="R",
        help=f"also one head with {DILATED_ROWS} rows at these dilations, so with equal pairs; default 1 8 64",
    )  # fmt: skip
    add("--repeats", type=int, default=15, help="rounds that are timed; default 15")
    add(
        "--pause", type=float, default=0.0, metavar="SECONDS",
        help="rest before each measurement, in which a GPU at its power limit recovers its clock; default 0",
    )  # fmt: skip
    add(
        "--dense-limit",
        type=int,
        default=32768,
        metavar="S",
        help="no dense attention above this length; default 32768",
    )
    add(
        "--without", nargs="+", default=[], choices=("flex", "longnet", "cudnn", "flash"), metavar="NAME",
        help="leave out some of flex (which takes a minute to compile), longnet, cudnn, flash",
    )  # fmt: skip
    add("--tune", action="store_true", help="time the kernels with every tile of a list, and nothing else")
    add("--aot", action="store_true", help="compile for compute capabilities 8.0, 9.0 and 10.0, and run nothing")
    add(
        "--shipped", action="store_true", help="the shapes of the shipped configurations, 131072 rows, and nothing else"
    )
    add("--plot", type=Path, metavar="FILE", help="draw TFLOP/s against length: .png or .svg")


def file(chosen: argparse.Namespace) -> str:
    """The name of the CSV."""
    for name in ("aot", "tune", "shipped"):
        if getattr(chosen, name):
            return f"kernels_{name}"
    return "kernels"


def rows(chosen: argparse.Namespace, device: torch.device, _group: object = None) -> Iterable[Record]:
    """The records that the flags ask for.

    Raises:
        ValueError: without a CUDA device that the kernels can run on, unless with --aot.
    """
    dtype = getattr(torch, chosen.dtype)
    if chosen.aot:
        return kernels_aot.rows(kernels_aot.CAPABILITIES, tuple(chosen.head_dims), dtype)
    for head_dim in chosen.head_dims:
        choose("triton", device, dtype, head_dim)
    if device.type != "cuda":
        raise ValueError("bench kernels times kernels on a CUDA device; --aot compiles them without one")
    if chosen.shipped:
        return kernels_shipped.rows(chosen, device)
    problems = _problems(chosen, dtype, device)
    return (row for problem, name in problems for row in (_tune if chosen.tune else _measure)(problem, name, chosen))


def patterns(length: int) -> Iterator[tuple[str, rh.DilatedPattern]]:
    """The patterns timed at every length: dense, five branches, and the ladder of the shipped 1B configuration."""
    if length <= 32768:
        yield "dense", DENSE
    yield (
        "five branches",
        rh.DilatedPattern(tuple(min(2048 << i, length) for i in range(5)), tuple(1 << i for i in range(5))),
    )
    if length >= 65536:  # otherwise its longer segments coincide
        yield "llama_1b_1m", rh.DilatedPattern((4096, 16384, 65536, 262144, None), (1, 4, 16, 64, 256))


def _problems(chosen: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[Problem, str]]:
    kv_heads = chosen.kv_heads or chosen.heads
    for head_dim in chosen.head_dims:
        for length in chosen.lengths:
            for causal in [True, False] if chosen.causal is None else [chosen.causal]:
                for name, pattern in patterns(length):
                    yield Problem(pattern, length, causal, dtype, device, 1, chosen.heads, kv_heads, head_dim), name
        for rate in chosen.dilations:
            for causal in [True, False] if chosen.causal is None else [chosen.causal]:
                length, pattern = DILATED_ROWS * rate, rh.DilatedPattern((DILATED_ROWS * rate,), (rate,))
                yield Problem(pattern, length, causal, dtype, device, 1, 1, 1, head_dim), f"dilation {rate}"


def _core(problem: Problem, curve: str, tiles: dict[Pass, Tile] | None = None) -> TritonCore:
    """The kernels on rows in the order of a curve within blocks of the shortest segment."""
    order = None
    if curve != "raster":
        block = min(w or problem.length for w in problem.pattern.segment_lengths)
        order = rh.TokenOrder(curve, block=block)
    seen = Visible(problem.length, problem.causal, order=order).on(problem.device)
    shard = Shard((Chunk(0, problem.length, 0),), problem.length, order)
    return TritonCore(
        problem.pattern, problem.kv_heads, shard, seen, problem.head_dim, problem.dtype, problem.device, tiles=tiles,
        group=problem.heads // problem.kv_heads,
    )  # fmt: skip


def _executed(core: TritonCore, problem: Problem, pass_: Pass) -> float:
    """Pairs in the blocks that a pass visits, over query heads."""
    tile, schedule = core.schedule(pass_)
    return schedule.blocks() * tile.block_outer * tile.block_inner * (problem.heads // problem.kv_heads)


def _measure(problem: Problem, name: str, chosen: argparse.Namespace) -> Iterator[Record]:
    x = {key: value.detach() for key, value in problem.tensors().items()}
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    pairs: dict[str, float] = {}
    executed: dict[tuple[str, str], float] = {}
    for curve in chosen.order if problem.causal else ["raster"]:
        core, label = _core(problem, curve), f"ring_hilbert {curve}"
        calls[label, "forward"], calls[label, "backward"] = core_passes(core, x, problem.head_dim**-0.5)
        pairs[label] = problem.plan(problem.pattern).attention_flops(0) / (4 * problem.head_dim)
        executed[label, "forward"] = _executed(core, problem, "forward")
        executed[label, "backward"] = (_executed(core, problem, "dq") + _executed(core, problem, "dkdv")) / 2
    for label, length, contender in _baselines(problem, chosen.dense_limit, chosen.without):
        inputs = [x[key][:, :length].clone().requires_grad_() for key in "qkv"]
        try:
            passes = autograd_passes(contender, inputs, x["dout"][:, :length])
            for call in passes:
                call()  # compiles
        except RuntimeError as failure:
            print(f"{label} left out: {str(failure).splitlines()[0]}")
            continue
        calls[label, "forward"], calls[label, "backward"] = passes
        pairs[label] = contender.flops / (4 * problem.head_dim)
    for call in calls.values():
        call()
    names = {f"{label}, {pass_}": call for (label, pass_), call in calls.items()}
    times = interleaved(names, chosen.repeats, problem.device, lambda _: None, chosen.pause)

    def rate(count: float, label: str, pass_: str) -> float:
        return count * FLOPS[pass_] * problem.head_dim / times[f"{label}, {pass_}"].median / 1e9

    for label, pass_ in calls:
        t, visited = times[f"{label}, {pass_}"], executed.get((label, pass_))
        tflops = rate(pairs[label], label, pass_)
        dense_tflops = rate(pairs["cudnn"], "cudnn", pass_) if ("cudnn", pass_) in calls else None
        yield _facts(problem, name) | {
            "contender": label, "pass": pass_, "ms": f"{t.median:.4f}", "ms_min": f"{t.least:.4f}", "ms_max": f"{t.most:.4f}",
            "tflops": f"{tflops:.4g}",
            "executed_tflops": "" if visited is None else f"{rate(visited, label, pass_):.4g}",
            "executed_share": "" if visited is None else f"{visited / pairs[label]:.3f}",
            "efficiency": "" if dense_tflops is None else f"{tflops / dense_tflops:.3f}",
        }  # fmt: skip


def _tune(problem: Problem, name: str, chosen: argparse.Namespace) -> Iterator[Record]:
    """Every candidate for every pass, with the table's tiles for the other passes."""
    from ring_hilbert.kernels import launch

    x = {key: value.detach() for key, value in problem.tensors().items()}
    q, k, v, scale = x["q"], x["k"], x["v"], problem.head_dim**-0.5
    shipped: dict[Pass, Tile] = {p: device_tiles(p, problem.head_dim, problem.dtype, problem.device)[0] for p in PASSES}
    core = _core(problem, "raster")
    out, lse, _ = core.finish(core.begin(q, k, v, scale))
    terms = launch.row_terms(x["dout"], out, lse, None)
    dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
    for pass_ in PASSES:
        for candidate in CANDIDATES[pass_]:
            tiles: dict[Pass, Tile] = {**shipped, pass_: Tile(*candidate)}
            core = _core(problem, "raster", tiles)
            tile, schedule = core.schedule(pass_)
            output = launch.Output(out, lse, None)
            calls: dict[str, Callable[[], object]] = {
                "forward": lambda s=schedule, t=tile, o=output: launch.forward(q, k, v, t, s, scale, o),
                "dq": lambda s=schedule, t=tile: launch.dq(q, k, v, terms, dq, t, s, scale),
                "dkdv": lambda s=schedule, t=tile: launch.dkdv(q, k, v, terms, (dk, dv), t, s, scale),
            }
            row = _facts(problem, name) | {
                "pass": pass_,
                "tile": "x".join(map(str, tile)),
                "shipped": tile == shipped[pass_],
            }
            try:
                calls[pass_]()
                one = {pass_: calls[pass_]}
                t = interleaved(one, chosen.repeats, problem.device, lambda _: None, chosen.pause)[pass_]
            except RuntimeError as failure:  # too much shared memory
                yield row | {"ms": "", "executed_tflops": "", "note": str(failure).splitlines()[0]}
                continue
            rate = _executed(core, problem, pass_) * PRODUCTS[pass_] * 2 * problem.head_dim / t.median / 1e9
            yield row | {"ms": f"{t.median:.4f}", "executed_tflops": f"{rate:.1f}", "note": ""}


def _baselines(problem: Problem, limit: int, without: list[str]) -> Iterator[tuple[str, int, Contender]]:
    """`(label, rows, contender)`: dense attention, up to the limit, and other implementations of the pattern."""
    length = min(problem.length, limit)
    short = replace(problem, length=length)
    makers: dict[str, tuple[int, Callable[[], Contender]]] = {
        "flex": (problem.length, lambda: programmable(problem, limit)),
        "longnet": (problem.length, lambda: published(problem)),
    }
    if problem.device.type == "cuda":
        makers["cudnn"] = length, lambda: dense(short, limit)
        makers["flash"] = length, lambda: dense(short, limit, SDPBackend.FLASH_ATTENTION)
    for label, (length, make) in makers.items():
        if label in without:
            continue
        try:
            yield label, length, make()
        except (Unsupported, RuntimeError) as reason:
            print(f"{label} left out: {str(reason).splitlines()[0]}")


def _facts(problem: Problem, name: str) -> Record:
    return {
        "length": problem.length, "pattern": name, "causal": problem.causal, "dtype": str(problem.dtype)[6:],
        "heads": problem.heads, "kv_heads": problem.kv_heads, "head_dim": problem.head_dim,
    }  # fmt: skip


def draw(path: Path, records: list[Record]) -> None:
    """TFLOP/s of the five branches' pairs against length: a panel for each mask and pass, a colour for each contender.

    The greatest head dim is solid, others are dashed.
    """
    from ring_hilbert.bench.picture import figure_of, save

    drawn = sorted((r for r in records if r["pattern"] == "five branches"), key=lambda record: record["length"])
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(record["contender"] for record in drawn))}
    largest = max((record["head_dim"] for record in drawn), default=0)
    figure, panels = figure_of(4, height=4.2)
    for axes, (causal, pass_) in zip(panels, product((True, False), FLOPS), strict=True):
        lines: dict[tuple[str, int], list[tuple[int, float]]] = {}
        for record in drawn:
            if (record["causal"], record["pass"]) == (causal, pass_):
                point = record["length"], float(record["tflops"])
                lines.setdefault((record["contender"], record["head_dim"]), []).append(point)
        for (name, head_dim), points in lines.items():
            axes.plot(
                *zip(*points, strict=True), "-" if head_dim == largest else "--",
                color=colours[name], marker="o", markersize=4, label=name if head_dim == largest else None,
            )  # fmt: skip
        axes.set(xlabel="rows", title=f"{pass_}, {'causal' if causal else 'not causal'} (TFLOP/s)", ylim=(0, None))
        axes.set_xscale("log", base=2)
        lengths = sorted({record["length"] for record in drawn})
        axes.set_xticks(lengths, [f"{n >> 20}M" if n >= 1 << 20 else f"{n >> 10}k" for n in lengths])
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=7, title=f"D = {largest}; dashed: less", title_fontsize=7)
    save(figure, path)
