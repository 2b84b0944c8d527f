# SPDX-License-Identifier: Apache-2.0
"""Curves beside each other in one, two and three dimensions: how compact segments are, and what that costs.

One branch of every dilation rate over so many cells: a run of tokens (1-D, in blocks of a segment), a picture (2-D) or a volume
(3-D). In units of a cell: `distance_within`, the mean distance of two kept cells of a segment, and `distance_to_kept`, that of any
cell to the nearest kept cell (of one head). `crossing_rows`: rows that some rank reads of another, for one head, summed over ranks.
`blocks` are what the walk visits in forward, of which `masked_blocks` need a mask; on the CPU Triton's interpreter counts them.
`forward_ms`, and what it is relative to raster, are measured where there is a CUDA device.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import torch

import ring_hilbert as rh
from ring_hilbert.bench.contenders import Problem, core_passes
from ring_hilbert.bench.timing import interleaved
from ring_hilbert.ops.core import Shard
from ring_hilbert.ops.triton_core import TritonCore
from ring_hilbert.ops.visible import Visible
from ring_hilbert.ops.visits import Chunk

CURVES = ("raster", "snake", "morton", "hilbert", "peano")
SAMPLES = 1024  # cells that distances are averaged over, at most


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags of `bench geometry`."""
    parser.add_argument(
        "--cells",
        type=int,
        metavar="N",
        help="a square and a cube, so 64, 4096, 262144 ...; default: 262144, on the CPU 4096",
    )
    parser.add_argument("--rates", type=int, nargs="+", default=[1, 4, 16], metavar="R", help="default: 1 4 16")
    parser.add_argument("--ranks", type=int, default=8, metavar="P", help="default: 8")
    parser.add_argument("--repeats", type=int, default=15, help="rounds that are timed on a CUDA device; default 15")


def rows(chosen: argparse.Namespace, device: torch.device, _group: object = None) -> Iterator[dict[str, Any]]:
    """A record for every geometry, rate and curve; a segment is a quarter of the cells.

    Raises:
        ValueError: for a number of cells that is no square or no cube.
    """
    cells = chosen.cells or (4096 if device.type == "cpu" else 262144)
    square, cube = round(cells**0.5), round(cells ** (1 / 3))
    if square**2 != cells or cube**3 != cells:
        near = max(2, round(cells ** (1 / 6))) ** 6
        raise ValueError(f"--cells {cells} is not both a square and a cube; the nearest that is: {near}")
    if min(chosen.rates) < 1 or max(chosen.rates) > cells // 4:
        raise ValueError(f"--rates must be 1 to {cells // 4}, a segment of {cells} cells, got {chosen.rates}")
    segment = cells // 4
    shapes: dict[str, dict[str, Any]] = {
        "1-D": {"block": segment},
        "2-D": {"grid": (square, square)},
        "3-D": {"grid": (cube,) * 3},
    }
    with _process(device) as counted:
        yield from _records(chosen, device, shapes, cells, counted)


@contextlib.contextmanager
def _process(device: torch.device) -> Iterator[Callable[..., tuple[int, int]]]:
    """`_blocks`; on the CPU, unless Triton was imported as its interpreter, in a process where it is."""
    if device.type != "cpu" or os.environ.get("TRITON_INTERPRET") == "1":
        yield _blocks
        return
    os.environ["TRITON_INTERPRET"] = "1"
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield lambda *args: pool.submit(_blocks, *args).result()


def _records(
    chosen: argparse.Namespace,
    device: torch.device,
    shapes: dict[str, dict[str, Any]],
    cells: int,
    counted: Callable[..., tuple[int, int]],
) -> Iterator[dict[str, Any]]:
    segment = cells // 4
    for geometry, sizes in shapes.items():
        for rate in chosen.rates:
            pattern = rh.DilatedPattern((segment,), (rate,))
            raster = None
            for curve in CURVES:
                order = rh.TokenOrder(curve, **sizes)
                places = _places(order, cells, sizes.get("grid", (cells,)))
                full, masked = counted(pattern, order, cells, device)
                ms = None if device.type == "cpu" else _milliseconds(pattern, order, cells, chosen.repeats, device)
                raster = raster or ms
                yield {
                    "geometry": geometry, "rate": rate, "curve": curve, "cells": cells, "segment": segment, "ranks": chosen.ranks,
                    "distance_within": f"{_within(places, segment, rate):.3f}",
                    "distance_to_kept": f"{_to_kept(places, segment, rate):.3f}",
                    "crossing_rows": _crossing(pattern, order, cells, chosen.ranks), "blocks": full + masked,
                    "masked_blocks": masked, "forward_ms": "" if ms is None else f"{ms:.4f}",
                    "of_raster": "" if ms is None or raster is None else f"{ms / raster:.3f}",
                }  # fmt: skip


def report(records: list[dict[str, Any]], _chosen: argparse.Namespace) -> None:
    """A table."""
    names = (
        "geometry", "rate", "curve", "distance_within", "distance_to_kept", "crossing_rows", "blocks", "masked_blocks",
        "of_raster",
    )  # fmt: skip
    print("".join(f"{name:>18}" for name in names))
    for record in records:
        print("".join(f"{record[name]:>18}" for name in names))


def _places(order: rh.TokenOrder, cells: int, grid: tuple[int, ...]) -> np.ndarray:
    """Where the cell of every row lies, float `[cells, dimensions]`."""
    return np.stack(np.unravel_index(order.permutation(cells).numpy(), grid), axis=1).astype(float)


def _within(places: np.ndarray, segment: int, rate: int) -> float:
    """Mean distance of two different kept cells of one segment; of a longer one, of all pairs of a sample."""
    random, found = np.random.default_rng(0), []
    for start in range(0, len(places), segment):
        kept = places[start : start + segment : rate]
        kept = kept[random.choice(len(kept), min(SAMPLES, len(kept)), replace=False)]
        apart = np.linalg.norm(kept[:, None] - kept[None], axis=2)
        found.append(apart.sum() / max(1, len(kept) * (len(kept) - 1)))
    return float(np.mean(found))


def _to_kept(places: np.ndarray, segment: int, rate: int) -> float:
    """Mean distance of a cell to the nearest kept one, by samples."""
    kept = np.concatenate([places[start : start + segment : rate] for start in range(0, len(places), segment)])
    some = places[np.random.default_rng(0).choice(len(places), min(SAMPLES, len(places)), replace=False)]
    return float(np.mean([np.sqrt(((kept - cell) ** 2).sum(1).min()) for cell in some]))


def _crossing(pattern: rh.DilatedPattern, order: rh.TokenOrder, cells: int, ranks: int) -> int:
    plan = rh.plan(
        pattern, cells, ranks, num_heads=1, head_dim=64, dtype=torch.bfloat16, order=order, strategy="exchange"
    )
    return sum(int(plan.counts(rank).sum()) for rank in range(ranks))


def _core(pattern: rh.DilatedPattern, order: rh.TokenOrder, cells: int, device: torch.device) -> TritonCore:
    """Of one head."""
    seen = Visible(cells, True, order=order).on(device)
    shard = Shard((Chunk(0, cells, 0),), cells, order)
    return TritonCore(pattern, 1, shard, seen, 64, torch.bfloat16, device)


def _blocks(pattern: rh.DilatedPattern, order: rh.TokenOrder, cells: int, device: torch.device) -> tuple[int, int]:
    """How many blocks the walk visits in forward: without a mask, and with one."""
    _, schedule = _core(pattern, order, cells, device).schedule("forward")
    full, masked = schedule.steps.sum((0, 1)).tolist()
    return full, masked


def _milliseconds(
    pattern: rh.DilatedPattern, order: rh.TokenOrder, cells: int, repeats: int, device: torch.device
) -> float:
    problem = Problem(pattern, cells, True, torch.bfloat16, device, heads=1, kv_heads=1)
    tensors = {name: x.detach() for name, x in problem.tensors().items()}
    forward, _ = core_passes(_core(pattern, order, cells, device), tensors, problem.head_dim**-0.5)
    for _ in range(3):
        forward()
    return interleaved({"forward": forward}, repeats, device, lambda _: None)["forward"].median
