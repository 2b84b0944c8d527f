# SPDX-License-Identifier: Apache-2.0
"""`ring-hilbert bench`: run a measurement and keep its rows."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ring_hilbert.bench import (
    attention,
    attention_report,
    curves,
    data,
    exactness,
    geometry,
    kernels,
    overlap,
    peers,
    quality,
    sampled,
    saving,
    scale,
    slides,
    training,
    wire,
)
from ring_hilbert.bench.records import RESULTS, append

Record = dict[str, Any]
Rows = Callable[[argparse.Namespace, torch.device, dist.ProcessGroup | None], Iterable[Record]]


def no_options(parser: argparse.ArgumentParser) -> None:
    """For measurements without additional flags."""


def print_rows(records: list[Record], _chosen: argparse.Namespace) -> None:
    """Print one record per line."""
    for record in records:
        print("  ".join(f"{name} {value}" for name, value in record.items()))


@dataclass(frozen=True)
class Measurement:
    """One thing to measure.

    Args:
        summary: one line of description.
        description: the text of `--help` above the flags.
        rows: yields the records, from the parsed flags, the device and the group of all ranks (None: one process).
        add_options: declares additional flags, besides --output and, if `on_device`, --device.
        report: prints what was measured.
        draw: draws it into a file, for --plot.
        file: the default name of the CSV, without suffix.
        on_device: whether it computes, rather than plans.
        over_ranks: whether it may run under torchrun.
    """

    summary: str
    description: str | None
    rows: Rows
    add_options: Callable[[argparse.ArgumentParser], None] = no_options
    report: Callable[[list[Record], argparse.Namespace], None] = print_rows
    draw: Callable[[Path, list[Record]], None] | None = None
    file: Callable[[argparse.Namespace], str] = lambda chosen: chosen.measurement
    on_device: bool = True
    over_ranks: bool = False


MEASUREMENTS = {
    "exactness": Measurement(
        "errors against the float64 definition, of small problems or of a run's attention at full length, alone or under torchrun",
        exactness.__doc__,
        exactness.measured,
        sampled.add_options,
        exactness.report,
        over_ranks=True,
        file=exactness.file,
    ),
    "wire": Measurement(
        "bytes received per rank at a million tokens, from the plan",
        wire.__doc__,
        lambda *_: wire.rows(),
        on_device=False,
    ),
    "scale": Measurement(
        "bytes and FLOPs per rank from 2 to 4096 ranks, from the plan",
        scale.__doc__,
        lambda chosen, *_: scale.rows(chosen),
        scale.add_options,
        scale.report,
        scale.draw,
        on_device=False,
    ),
    "attention": Measurement(
        "time and memory against dense SDPA, published LongNet and FlexAttention",
        attention.__doc__,
        lambda chosen, device, _: attention.rows(chosen, device),
        attention.add_options,
        lambda records, _: print(attention_report.table(records)),
        attention_report.draw,
    ),
    "overlap": Measurement(
        "how much of the rows' travel is hidden behind attention, on a link made slow, under torchrun",
        overlap.__doc__,
        overlap.rows,
        overlap.add_options,
        overlap.report,
        over_ranks=True,
    ),
    "peers": Measurement(
        "time and bytes over ranks against ring-attention-pytorch, under torchrun",
        peers.__doc__,
        peers.rows,
        peers.add_options,
        peers.report,
        over_ranks=True,
    ),
    "training": Measurement(
        "memory against its plan, tokens per second and MFU of a model in training, alone or under torchrun",
        training.__doc__,
        training.rows,
        training.add_options,
        training.report,
        training.draw,
        over_ranks=True,
    ),
    "saving": Measurement(
        "how much longer steps are while checkpoints are saved behind them, alone or under torchrun",
        saving.__doc__,
        saving.rows,
        saving.add_options,
        saving.report,
        over_ranks=True,
    ),
    "curves": Measurement(
        "losses of whole runs that ought to learn alike, in bfloat16 and float32 for instance, alone or under torchrun",
        curves.__doc__,
        curves.rows,
        curves.add_options,
        curves.report,
        curves.draw,
        over_ranks=True,
    ),
    "geometry": Measurement(
        "curves in one, two and three dimensions: distances within segments, rows that cross ranks, blocks, kernel time",
        geometry.__doc__,
        geometry.rows,
        geometry.add_options,
        geometry.report,
    ),
    "quality": Measurement(
        "what dilation, order and shifted segments do for a model: a declared table of training runs, with statistics",
        quality.__doc__,
        quality.rows,
        quality.add_options,
        quality.report,
    ),
    "slides": Measurement(
        "attention and slide encoder of whole slides against published LongNet, alone or under torchrun",
        slides.__doc__,
        slides.rows,
        slides.add_options,
        over_ranks=True,
    ),
    "data": Measurement(
        "tokenising against the tokenizer alone, ten million documents opened and shuffled, padding and cuts of packings",
        data.__doc__,
        lambda chosen, *_: data.rows(chosen),
        data.add_options,
        on_device=False,
    ),
    "kernels": Measurement(
        "TFLOP/s of the Triton kernels against dense kernels, FlexAttention and published LongNet; what they compile to",
        kernels.__doc__,
        kernels.rows,
        kernels.add_options,
        draw=kernels.draw,
        file=kernels.file,
    ),
}


def add_measurements(parser: argparse.ArgumentParser) -> None:
    """A command per measurement, each with its own flags."""
    commands = parser.add_subparsers(title="measurements", dest="measurement", required=True, metavar="<measurement>")
    for name, measurement in MEASUREMENTS.items():
        command = commands.add_parser(
            name,
            help=measurement.summary,
            description=measurement.description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument(
            "--output", type=Path, metavar="FILE", help=f"CSV to append to; default bench/results/{name}.csv"
        )
        if measurement.on_device:
            command.add_argument("--device", help="cpu, cuda or cuda:N; default cuda if there is one")
        measurement.add_options(command)


def run(chosen: argparse.Namespace) -> None:
    """Run the chosen measurement, append its rows to a file as they come, and report them.

    Raises:
        ValueError: for flags that cannot be, or torchrun where the measurement is of one process.
    """
    measurement = MEASUREMENTS[chosen.measurement]
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1 and not measurement.over_ranks:
        raise ValueError(
            f"bench {chosen.measurement} runs in one process, but WORLD_SIZE is {ranks}; start it without torchrun"
        )
    device = _device(chosen.device) if measurement.on_device else torch.device("cpu")
    output = chosen.output = chosen.output or RESULTS / f"{measurement.file(chosen)}.csv"
    group = None
    if ranks > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        group = dist.group.WORLD
    try:
        records = list(_kept(measurement.rows(chosen, device, group), output, device))
        if group is None or dist.get_rank(group) == 0:
            measurement.report(records, chosen)
            if measurement.draw is not None and chosen.plot is not None:
                measurement.draw(chosen.plot, records)
                print(f"drawn: {chosen.plot}")
            print(f"{len(records)} rows appended to {output}")
    finally:
        if group is not None:
            dist.destroy_process_group()


def _kept(records: Iterable[Record], output: Path, device: torch.device) -> Iterator[Record]:
    """The records, each written to the file before the next is measured."""
    for record in records:
        append(output, [record], device)
        yield record


def _device(name: str | None) -> torch.device:
    """The device by name, by default a CUDA device if there is one; "cuda" is this rank's own."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"--device {name!r} is unknown: {str(error).splitlines()[0]}") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"--device {name!r}, but PyTorch sees no CUDA device here")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index)
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise ValueError(f"--device {name!r} is not supported; use cpu or cuda")
    return device
