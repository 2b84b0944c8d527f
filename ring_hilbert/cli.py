# SPDX-License-Identifier: Apache-2.0
"""The command line: `ring-hilbert <command> ...`. A command is a function that adds its parser; see `COMMANDS`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PRETRAIN_EXAMPLES = """\
examples:
  ring-hilbert pretrain --config configs/quickstart.yaml parallel.sp=1 train.steps=20
  torchrun --nproc-per-node 2 -m ring_hilbert.cli pretrain --config configs/quickstart.yaml

A run goes on from the newest checkpoint in checkpoint.dir, if there is one. Ranks use Gloo on the CPU, NCCL with CUDA devices.
"""


def add_pretrain(commands: Any) -> None:
    """`ring-hilbert pretrain`: train a Transformers model from a YAML file."""
    parser = commands.add_parser(
        "pretrain",
        help="train a language model, alone or under torchrun",
        description="Pretrain a Transformers causal language model with dilated attention, as a YAML file says.",
        epilog=PRETRAIN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the YAML file of the run; see configs/")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.sub=value",
        help="replaces a value of the file, e.g. train.steps=20 optim.lr=1e-3",
    )
    parser.set_defaults(run=_pretrain)


def add_bench(commands: Any) -> None:
    """`ring-hilbert bench <measurement>`: measure and keep the rows; each measurement declares its own flags."""
    from ring_hilbert.bench.command import add_measurements

    parser = commands.add_parser(
        "bench",
        help="measure, and append rows to a CSV file",
        description="Measure, print, and append a row per figure to a CSV file, with date, commit, device and versions.",
    )
    add_measurements(parser)
    parser.set_defaults(run=_bench)


PLOT_EXAMPLES = """\
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
    parser = commands.add_parser(
        "plot",
        help="draw a pattern, its token order, what it covers and its shards",
        description="Draw what a pattern does, as PNG or SVG by the ending of FILE.",
        epilog=PLOT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
    parser.set_defaults(run=_plot)


COMMANDS: tuple[Callable[[Any], None], ...] = (add_pretrain, add_bench, add_plot)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets `run`, a function of the parsed arguments to the exit status."""
    parser = argparse.ArgumentParser(
        prog="ring-hilbert", description="Exact sequence-parallel dilated attention in space-filling-curve order."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="<command>")
    for add in COMMANDS:
        add(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 0, or 2 and a message, without traceback, for what the user can mend."""
    chosen = build_parser().parse_args(arguments)
    return chosen.run(chosen)


def _pretrain(chosen: argparse.Namespace) -> int:
    # Imported here so that --help answers at once.
    from ring_hilbert.training.config import load_config
    from ring_hilbert.training.loop import pretrain
    from ring_hilbert.training.world import RankError

    try:
        pretrain(load_config(chosen.config, chosen.overrides))
    except (ValueError, FloatingPointError) as error:
        rank = os.environ.get("RANK", "0")
        shared = isinstance(error, (RankError, FloatingPointError))  # every rank knows of it
        if rank == "0" or not shared:
            where = "" if shared or "RANK" not in os.environ else f" (rank {rank})"
            print(f"ring-hilbert pretrain: error{where}: {error}", file=sys.stderr)
        return 2
    return 0


def _bench(chosen: argparse.Namespace) -> int:
    from ring_hilbert.bench.command import run

    try:
        run(chosen)
    except ValueError as error:
        print(f"ring-hilbert bench {chosen.measurement}: error: {error}", file=sys.stderr)
        return 2
    return 0


def _length(text: str) -> int | None:
    return None if text == "all" else int(text)


def _plot(chosen: argparse.Namespace) -> int:
    import ring_hilbert as rh
    from ring_hilbert.bench.picture import Subject, draw

    try:
        grid = None if chosen.grid is None else tuple(chosen.grid)
        block = 256 if chosen.block is None and grid is None else chosen.block
        order = rh.TokenOrder(chosen.curve, block=block, grid=grid)
        subject = Subject(
            _layers(chosen), order, chosen.length, chosen.ranks, not chosen.full, chosen.kv_heads, chosen.head
        )
        draw(chosen.output, subject, chosen.what)
    except ValueError as error:
        print(f"ring-hilbert plot: error: {error}", file=sys.stderr)
        return 2
    return 0


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


if __name__ == "__main__":
    sys.exit(main())
