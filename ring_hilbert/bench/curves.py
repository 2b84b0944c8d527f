# SPDX-License-Identifier: Apache-2.0
"""Whole runs that should learn equally well: their losses, step by step, against those of the first.

Each variant is a run of the configuration with some values replaced, in its own folders, alone or under torchrun:

    torchrun --nproc-per-node 2 -m ring_hilbert.cli bench curves --set parallel.sp=2 train.steps=200 \
        --variants train.precision=fp32 train.precision=bf16 engine=deepspeed

Several values of one variant are joined by a comma.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ring_hilbert.training.config import load_config
from ring_hilbert.training.metrics import METRICS_FILE, read_metrics

CONFIG = "configs/quickstart.yaml"
SMOOTH = 10  # steps averaged, in addition to single ones


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags of `bench curves`."""
    parser.add_argument("--config", default=CONFIG, metavar="FILE", help=f"the YAML file of a run; default: {CONFIG}")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="replaces values of the file in all")
    parser.add_argument(
        "--variants", nargs="+", required=True, metavar="KEY=VALUE", help="a run each; the first is compared with"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the losses of all: .png or .svg")


def rows(chosen: argparse.Namespace, device: torch.device, group: dist.ProcessGroup | None) -> Iterator[dict[str, Any]]:
    """One record per variant, from rank 0, with its losses by step in `losses`."""
    del device  # the run takes this rank's
    is_main = group is None or dist.get_rank(group) == 0
    with tempfile.TemporaryDirectory(prefix="curves-") as folder:
        shared = [folder]  # rank 0's
        if group is not None:
            dist.broadcast_object_list(shared, src=0)
        yield from _compared(chosen, Path(shared[0]), is_main)
        if group is not None:
            dist.barrier()  # no folder is removed before all are done


def _compared(chosen: argparse.Namespace, folder: Path, is_main: bool) -> Iterator[dict[str, Any]]:
    from ring_hilbert.training.loop import pretrain  # imports data loading, which the other measurements do not need

    first = None
    for number, variant in enumerate(chosen.variants):
        places = [f"{key}.dir={folder / str(number) / key}" for key in ("checkpoint", "log")]
        config = load_config(chosen.config, [*chosen.set, *places, "log.memory_plan=false", *variant.split(",")])
        summary = pretrain(config)
        if not is_main:
            continue
        metrics = read_metrics(Path(config.log.dir) / METRICS_FILE)
        losses = np.array([line["loss"] for line in metrics if line["kind"] == "train"], dtype=float)
        first = (losses, summary.eval_loss) if first is None else first
        apart = np.abs(losses / first[0] - 1)
        smooth = [np.convolve(x, np.full(SMOOTH, 1 / SMOOTH), "valid") for x in (losses, first[0])]
        mine, others = summary.eval_loss, first[1]
        held_out = None if mine is None or others is None else f"{abs(mine / others - 1):.2e}"
        yield {
            "config": Path(chosen.config).stem, "settings": " ".join(chosen.set), "variant": variant,
            "ranks": config.parallel.world_size, "steps": len(losses), "last_loss": f"{losses[-1]:.5f}",
            "held_out_loss": summary.eval_loss, "largest_difference": f"{apart.max():.2e}",
            "largest_difference_of_means": f"{np.abs(smooth[0] / smooth[1] - 1).max():.2e}" if len(losses) >= SMOOTH else None,
            "mean_difference": f"{apart.mean():.2e}", "held_out_difference": held_out,
            "losses": " ".join(f"{loss:.5f}" for loss in losses),
        }  # fmt: skip


def report(records: list[dict[str, Any]], _chosen: argparse.Namespace) -> None:
    """Print the table."""
    print(
        f"{'variant':32}{'last loss':>11}{'held out':>11}{'largest':>10}{'mean':>10}{'held out':>10}  relative to the first"
    )
    for r in records:
        held_out = "" if r["held_out_loss"] is None else f"{r['held_out_loss']:.5f}"
        print(
            f"{r['variant']:48}{r['last_loss']:>11}{held_out:>11}{r['largest_difference']:>10}"
            f"{r['largest_difference_of_means'] or '':>10}{r['mean_difference']:>10}{r['held_out_difference'] or '':>10}"
        )


def draw(path: Path, records: list[dict[str, Any]]) -> None:
    """Loss against step, a line per variant, and the difference of each from the first."""
    from ring_hilbert.bench.picture import figure_of, save

    figure, panels = figure_of(2, height=4.2)
    curves = {r["variant"]: np.array(r["losses"].split(), float) for r in records}
    first = next(iter(curves.values()))
    for name, losses in curves.items():
        steps = np.arange(1, len(losses) + 1)
        panels[0].plot(steps, losses, label=name, linewidth=1)
        panels[1].plot(steps, 100 * (losses / first - 1), label=name, linewidth=1)
    panels[0].set(title="loss", xlabel="step", ylabel="nats per token")
    panels[1].set(title="difference from the first", xlabel="step", ylabel="%")
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    save(figure, path)
