# SPDX-License-Identifier: Apache-2.0
"""What dilation, curve order and shifted segments do for a model: a declared table of training runs, and what follows from it.

The table (--table) says before the first run which tasks, primary metrics, arms, learning rates, seeds and comparisons there are,
and what the smallest difference is that changes a default. The same command runs what is not in the CSV yet, one run to a process,
and reports; interrupted, or on another machine, it goes on. Every run that starts has a row when it starts and one when it ends.

    ring-hilbert bench quality --table configs/quality/evidence.yaml --minutes 9
    ring-hilbert bench quality --table configs/quality/toy.yaml --device cpu --output runs/toy.csv
    ring-hilbert bench quality --report
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TABLE = "configs/quality/evidence.yaml"
FOLDER = "runs/quality"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags of `bench quality`."""
    parser.add_argument("--table", type=Path, default=TABLE, metavar="FILE", help=f"the declaration; default: {TABLE}")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="replaces values: another declaration"
    )
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="only these; default: all")
    parser.add_argument(
        "--folder", type=Path, default=FOLDER, metavar="FOLDER", help=f"for data, checkpoints, logs; default: {FOLDER}"
    )
    parser.add_argument("--minutes", type=float, metavar="M", help="start no run that could not be over by then")
    parser.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="runs at a time; default: one per CUDA device, else one. Several small runs keep a GPU busier than one, but what they "
        "take is then not compared",
    )
    parser.add_argument("--again", action="store_true", help="try runs that failed once more")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--report", action="store_true", help="run nothing, report what there is")
    what.add_argument("--data-only", action="store_true", help="run nothing, write the documents")
    what.add_argument("--arms", action="store_true", help="run nothing, show what every arm attends to and costs")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the comparisons and the metric by position")


def rows(chosen: argparse.Namespace, device: torch.device, group: dist.ProcessGroup | None) -> Iterator[dict[str, Any]]:
    """A record for every run that starts or ends."""
    from ring_hilbert.bench.quality import documents, outcome, runs
    from ring_hilbert.bench.quality.table import load_table

    del group
    chosen.declared = table = load_table(chosen.table, chosen.set)
    names = chosen.tasks or list(table.tasks)
    unknown = sorted(set(names) - set(table.tasks))
    if unknown:
        raise ValueError(f"--tasks: {chosen.table} has no {unknown}; it has {', '.join(table.tasks)}")
    if chosen.processes is not None and chosen.processes < 1:
        raise ValueError(f"--processes must be at least 1, got {chosen.processes}")
    chosen.data = {}
    if chosen.report or chosen.arms:
        return
    found = {name: documents.write(table.tasks[name], name, chosen.folder / "data") for name in names}
    chosen.data = {name: content for name, (_, content) in found.items()}
    for name, (folder, content) in found.items():
        print(f"data of {name}: {folder} ({content})")
    if chosen.data_only:
        return

    def read() -> outcome.Outcome:
        return outcome.Outcome(table, outcome.read_rows(chosen.output), chosen.data, chosen.again)

    seconds = float("inf") if chosen.minutes is None else 60 * chosen.minutes
    yield from runs.Runner(table, chosen.folder, found, read, _devices(device, chosen.processes), seconds).rows()


def report(_records: list[dict[str, Any]], chosen: argparse.Namespace) -> None:
    """All that the CSV says of the table."""
    from ring_hilbert.bench.quality import page
    from ring_hilbert.bench.quality.outcome import Outcome, read_rows

    table = chosen.declared
    if chosen.arms:
        for (task, arm), attention in table.attention.items():
            layers = {number: layer.model_dump(exclude_unset=True) for number, layer in attention.layers.items()}
            order = None if attention.order is None else attention.order.model_dump(exclude_none=True)
            pattern = attention.pattern(attention.segment_shift).description
            print(
                f"{task:12}{arm:28}{table.flops[task, arm] / 1e12:10.4g} TFLOP a step  {pattern}  {order or 'raster'}  {layers}"
            )
        return
    found = Outcome(table, read_rows(chosen.output), chosen.data)
    for line in page.lines(found):
        print(line)
    if chosen.plot is not None:
        page.draw(chosen.plot, found)
        print(f"drawn: {chosen.plot}")


def _devices(device: torch.device, processes: int | None) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each process that may run at a time."""
    if device.type != "cuda":
        return [""] * (processes or 1)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(n) for n in range(torch.cuda.device_count())] if visible is None else visible.split(",")
    return [names[number % len(names)] for number in range(processes or len(names))]
