# SPDX-License-Identifier: Apache-2.0
"""`ring-hilbert plan` and `plot`: what a pattern costs and looks like, before anything runs."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from ring_hilbert.commands.mistakes import in_one_line
from ring_hilbert.commands.parser import add_command, add_config_or_flags

PLAN = """\
what every strategy sends, computes and holds, and which one auto takes

Bytes, FLOPs, balance, memory and seconds of every strategy, for the configuration of a run or for flags.

examples:
  ring-hilbert plan --config configs/quickstart.yaml parallel.sp=4
  ring-hilbert plan --length 1048576 --ranks 64 --heads 32 --head-dim 128 \\
      --segment-lengths 2048 8192 32768 all --dilation-rates 1 4 16 64 --link-gbps 25 50 450 --plot needs.png
"""


def add_plan(commands: Any) -> None:
    """`ring-hilbert plan`: what every strategy costs, before anything runs."""
    parser = add_command(commands, "plan", PLAN, _plan)
    asked = add_config_or_flags(parser)
    asked.add_argument("--length", type=int, metavar="S", help="rows of the sequence")
    asked.add_argument("--ranks", type=int, metavar="P", help="ranks of the sequence-parallel group")
    asked.add_argument("--segment-lengths", type=_length, nargs="+", metavar="W", help="or 'all'")
    asked.add_argument("--dilation-rates", type=int, nargs="+", metavar="R")
    asked.add_argument("--heads", type=int, default=32, metavar="H", help="default: 32")
    asked.add_argument("--kv-heads", type=int, metavar="HKV", help="default: as many as --heads")
    asked.add_argument("--head-dim", type=int, default=128, metavar="D", help="default: 128")
    asked.add_argument("--batch", type=int, default=1, metavar="B", help="default: 1")
    asked.add_argument(
        "--dtype", default="bfloat16", choices=["float16", "bfloat16", "float32", "float64"], help="default: bfloat16"
    )
    asked.add_argument("--full", action="store_true", help="not causal")
    asked.add_argument("--layout", default="contiguous", help="contiguous (default) or zigzag")
    asked.add_argument("--strategy", default="auto", help="exchange, ring, ulysses or auto (default)")
    asked.add_argument("--curve", help="token order: hilbert, morton, peano, snake or raster")
    asked.add_argument("--block", type=int, metavar="N", help="tokens that the curve orders at a time")
    parser.add_argument(
        "--link-gbps", type=float, nargs="+", default=[50.0], metavar="GB/S",
        help="gigabytes per second that a rank receives; auto takes the first; default: 50",
    )  # fmt: skip
    parser.add_argument("--ranks-per-host", type=int, metavar="N", help="say what crosses hosts of so many ranks")
    parser.add_argument("--tflops", type=float, default=300.0, metavar="X", help="of attention on a rank; default: 300")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw who needs whose rows: .png or .svg")


@in_one_line
def _plan(chosen: argparse.Namespace) -> None:
    from ring_hilbert.bench import planning
    from ring_hilbert.parallel.choice import Speeds

    if min(chosen.link_gbps) <= 0 or chosen.tflops <= 0:
        raise ValueError("--link-gbps and --tflops must be above 0")
    speeds = Speeds(chosen.tflops * 1e12, chosen.link_gbps[0] * 1e9)
    question = planning.from_config(chosen.config, chosen.overrides) if chosen.config is not None else _question(chosen)
    if chosen.ranks_per_host is not None:
        if chosen.ranks_per_host < 1:
            raise ValueError(f"--ranks-per-host must be at least 1, got {chosen.ranks_per_host}")
        question = replace(question, ranks_per_host=chosen.ranks_per_host)
    choice = planning.answer(question, speeds)
    print(planning.report(question, choice, speeds, [link * 1e9 for link in chosen.link_gbps]))
    if chosen.plot is not None:
        planning.draw(chosen.plot, choice, question.strategy)
        print(f"\ndrawn: {chosen.plot}")


def _question(chosen: argparse.Namespace) -> Any:
    import torch

    import ring_hilbert as rh
    from ring_hilbert.bench.planning import Question
    from ring_hilbert.parallel.arguments import check_choices, kv_heads_of
    from ring_hilbert.parallel.plan import Shapes

    flags = {
        "--length": chosen.length,
        "--ranks": chosen.ranks,
        "--segment-lengths": chosen.segment_lengths,
        "--dilation-rates": chosen.dilation_rates,
    }
    missing = [flag for flag, value in flags.items() if value is None]
    if missing or chosen.overrides:
        what = f"without it {', '.join(missing)} is needed" if missing else "key=value needs it"
        raise ValueError(f"--config FILE is not given; {what}")
    if min(chosen.length, chosen.ranks, chosen.heads, chosen.head_dim, chosen.batch) < 1:
        raise ValueError("--length, --ranks, --heads, --head-dim and --batch must be at least 1")
    kv_heads = kv_heads_of(chosen.heads, chosen.kv_heads, ("--heads ", "--kv-heads "))
    check_choices(layout=chosen.layout, strategy=chosen.strategy)
    order = None
    if chosen.curve is not None or chosen.block is not None:
        order = rh.TokenOrder(chosen.curve or "hilbert", block=chosen.block)
    return Question(
        rh.DilatedPattern(tuple(chosen.segment_lengths), tuple(chosen.dilation_rates)), chosen.length, chosen.ranks,
        Shapes(chosen.batch, chosen.heads, kv_heads, chosen.head_dim, getattr(torch, chosen.dtype)), order,
        not chosen.full, chosen.layout, chosen.strategy,
    )  # fmt: skip


PLOT = """\
draw a pattern, its token order, what it covers and its shards

Draw what a pattern does, as PNG or SVG by the ending of FILE.

pictures (--what):
  overview   the mask of a row, the curve, and who reads whose rows: the picture of the README
  mask       how often each key counts for each query: by row, and by natural token
  order      the curve over one block or grid
  coverage   the tokens that a token reaches through one layer and through two, and the share of those it may see
  shards     who owns which tokens, and whose rows each rank reads

examples:
  ring-hilbert plot idea.png
  ring-hilbert plot blind.svg --what coverage --kv-heads 2 --head-shift 0 2 --segment-shift 0 32
  ring-hilbert plot shards.png --what shards --grid 32 32 --length 1024 --ranks 8
"""


def add_plot(commands: Any) -> None:
    """`ring-hilbert plot`: draw a pattern, its order, what it covers and its shards."""
    parser = add_command(commands, "plot", PLOT, _plot)
    parser.add_argument("output", type=Path, metavar="FILE", help="a .png or .svg file")
    parser.add_argument("--what", default="overview", metavar="PICTURE", help="default: overview")
    parser.add_argument(
        "--segment-lengths", type=_length, nargs="+", default=[64, 128, 256], metavar="W",
        help="or 'all'; default: 64 128 256",
    )  # fmt: skip
    parser.add_argument("--dilation-rates", type=int, nargs="+", default=[1, 2, 8], metavar="R", help="default: 1 2 8")
    parser.add_argument(
        "--head-shift", type=int, nargs="+", default=[0], metavar="N", help="of the first layer [and the second]"
    )
    parser.add_argument(
        "--segment-shift", type=int, nargs="+", default=[0], metavar="N", help="of the first layer [and the second]"
    )
    parser.add_argument("--length", type=int, default=256, metavar="S", help="rows of the sequence; default: 256")
    parser.add_argument("--ranks", type=int, default=4, metavar="P", help="default: 4")
    parser.add_argument("--kv-heads", type=int, metavar="HKV", help="default: one for each residue")
    parser.add_argument("--head", type=int, default=0, metavar="G", help="the kv head whose mask is drawn; default: 0")
    parser.add_argument("--curve", default="hilbert", help="default: hilbert")
    parser.add_argument("--block", type=int, metavar="N", help="tokens that the curve orders at a time; default: 256")
    parser.add_argument("--grid", type=int, nargs="+", metavar="N", help="instead of --block: sides H W of a picture")
    parser.add_argument("--full", action="store_true", help="not causal")


@in_one_line
def _plot(chosen: argparse.Namespace) -> None:
    import ring_hilbert as rh
    from ring_hilbert.bench.picture import Subject, draw

    grid = None if chosen.grid is None else tuple(chosen.grid)
    block = 256 if chosen.block is None and grid is None else chosen.block
    order = rh.TokenOrder(chosen.curve, block=block, grid=grid)
    subject = Subject(
        _layers(chosen), order, chosen.length, chosen.ranks, not chosen.full, chosen.kv_heads, chosen.head
    )
    draw(chosen.output, subject, chosen.what)


def _layers(chosen: argparse.Namespace) -> tuple[Any, ...]:
    """The pattern of one layer, or of two where a shift differs between them."""
    import ring_hilbert as rh

    shifts = {"--head-shift": chosen.head_shift, "--segment-shift": chosen.segment_shift}
    for flag, values in shifts.items():
        if len(values) > 2:
            raise ValueError(f"{flag} takes one value, or one for each of two layers, got {len(values)}")
    layers = max(map(len, shifts.values()))
    return tuple(
        rh.DilatedPattern(
            tuple(chosen.segment_lengths),
            tuple(chosen.dilation_rates),
            head_shift=chosen.head_shift[min(i, len(chosen.head_shift) - 1)],
            segment_shift=chosen.segment_shift[min(i, len(chosen.segment_shift) - 1)],
        )
        for i in range(layers)
    )


def _length(text: str) -> int | None:
    return None if text == "all" else int(text)
