# SPDX-License-Identifier: Apache-2.0
"""Weak scaling: a rank's bytes and FLOPs, forward and backward, as ranks are added and each keeps its rows; from the plan.

Up to 4096 ranks, which with 2^18 rows each is a billion tokens. Three ladders, from a segment length of a quarter of a rank's rows:
five branches whatever the length of the sequence; segment lengths times two and dilation rates times four up to the whole sequence;
and both times two, where every doubling of the sequence adds the same amount again.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import ring_hilbert as rh
from ring_hilbert.parallel.choice import BACKWARD_FLOPS

HEADS, HEAD_DIM, DTYPE = 32, 128, torch.bfloat16
LADDERS = {  # factors from a branch's (segment length, dilation rate) to the next; most branches
    "fixed, w x2, r x2, 5 branches": (2, 5),
    "to N, w x2, r x4": (4, None),
    "to N, w x2, r x2": (2, None),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags of `bench scale`."""
    parser.add_argument("--ranks", type=int, nargs="+", default=[2**i for i in range(1, 13)], metavar="P")
    parser.add_argument("--local-length", type=int, default=2**18, metavar="S", help="rows of a rank; default 262144")
    parser.add_argument("--causal", action=argparse.BooleanOptionalAction, default=None, help="default: both")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the costs against the ranks: .png or .svg")


def ladder(name: str, first: int, seq_len: int) -> rh.DilatedPattern:
    """The branches of a ladder from segment length `first` up to the whole sequence."""
    factor, most = LADDERS[name]
    branches, w, r = [], first, 1
    while r <= w <= seq_len and (most is None or len(branches) < most):
        branches.append((w, r))
        w, r = 2 * w, factor * r
    return rh.DilatedPattern(*map(tuple, zip(*branches, strict=True)))  # type: ignore[arg-type]


def rows(chosen: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One record per ladder, causality and number of ranks: mean and maximum over ranks, of a layer."""
    for name in LADDERS:
        for causal in (False, True) if chosen.causal is None else (chosen.causal,):
            for world in chosen.ranks:
                seq_len = chosen.local_length * world
                pattern = ladder(name, max(1, chosen.local_length // 4), seq_len)
                plan = rh.plan(
                    pattern, seq_len, world, num_heads=HEADS, head_dim=HEAD_DIM, dtype=DTYPE, causal=causal,
                    strategy="exchange",
                )  # fmt: skip
                forward, returned = plan.traffic["forward"], plan.traffic["backward"]
                backward = [a + b for a, b in zip(forward, returned, strict=True)]  # K and V are fetched again
                record: dict[str, Any] = {
                    "ladder": name, "branches": len(pattern.branches), "causal": causal, "ranks": world, "seq_len": seq_len,
                    "heads": HEADS, "head_dim": HEAD_DIM,
                }  # fmt: skip
                for pass_, received, factor in (("forward", forward, 1.0), ("backward", backward, BACKWARD_FLOPS)):
                    record[f"{pass_}_mib_mean"] = f"{sum(received) / world / 2**20:.3f}"
                    record[f"{pass_}_mib_max"] = f"{max(received) / 2**20:.3f}"
                    record[f"{pass_}_tflop_mean"] = f"{factor * sum(plan.all_flops) / world / 1e12:.4f}"
                    record[f"{pass_}_tflop_max"] = f"{factor * max(plan.all_flops) / 1e12:.4f}"
                yield record


def report(records: list[dict[str, Any]], _chosen: argparse.Namespace) -> None:
    """Print the table."""
    print(f"{'ladder':32} causal   ranks  forward MiB mean, max   backward MiB mean, max  forward TFLOP mean, max")
    for r in records:
        print(
            f"{r['ladder']:32} {r['causal']!s:6} {r['ranks']:7}  {r['forward_mib_mean']:>10} {r['forward_mib_max']:>10}   "
            f"{r['backward_mib_mean']:>10} {r['backward_mib_max']:>10}   {r['forward_tflop_mean']:>10} "
            f"{r['forward_tflop_max']:>10}"
        )


def draw(path: Path, records: list[dict[str, Any]]) -> None:
    """Bytes forward, bytes backward and FLOPs of the busiest rank against the number of ranks; dashed: the mean."""
    from ring_hilbert.bench.picture import figure_of, save

    figure, panels = figure_of(3, height=4.2)
    colours = {name: f"C{i}" for i, name in enumerate(LADDERS)}
    quantities = {
        "forward_mib": "received in forward (MiB)",
        "backward_mib": "received in backward (MiB)",
        "forward_tflop": "attention, forward (TFLOP)",
    }
    for axes, (key, title) in zip(panels, quantities.items(), strict=True):
        for name, colour in colours.items():
            mine = [r for r in records if r["ladder"] == name and r["causal"] in (True, "True")]
            x = [int(r["ranks"]) for r in mine]
            axes.plot(
                x, [float(r[f"{key}_max"]) for r in mine], "-", color=colour, marker="o", markersize=3, label=name
            )
            axes.plot(x, [float(r[f"{key}_mean"]) for r in mine], "--", color=colour)
        axes.set(title=f"{title}, causal", xlabel="ranks", ylim=(0, None))
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=7, title="dashed: mean over ranks", title_fontsize=7)
    save(figure, path)
