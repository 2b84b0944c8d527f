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
    """`ring-hilbert bench`: measure and keep the rows."""
    from ring_hilbert.bench.command import MEASUREMENTS

    parser = commands.add_parser(
        "bench",
        help="measure, and append rows to a CSV file",
        description="\n".join(f"{name}: {what}" for name, what in MEASUREMENTS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("measurement", choices=MEASUREMENTS)
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: the measurement's file in bench/results")
    parser.set_defaults(run=_bench)


def add_plot(commands: Any) -> None:
    """`ring-hilbert plot`: draw a pattern, its order and its exchange."""
    parser = commands.add_parser(
        "plot",
        help="draw a pattern, its token order and its exchange",
        description="Draw which keys a row sees, how the order lays out segments, and who reads whose rows.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("output", type=Path, metavar="FILE", help="a .png or .svg file")
    parser.add_argument(
        "--segment-lengths", type=_length, nargs="+", default=[64, 128, 256], metavar="W", help="or 'all'"
    )
    parser.add_argument("--dilation-rates", type=int, nargs="+", default=[1, 2, 8], metavar="R")
    parser.add_argument("--length", type=int, default=256, help="rows of the sequence")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--curve", default="hilbert")
    parser.add_argument("--block", type=int, default=256, help="tokens that the curve orders at a time")
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

    run(chosen.measurement, chosen.output)
    return 0


def _length(text: str) -> int | None:
    return None if text == "all" else int(text)


def _plot(chosen: argparse.Namespace) -> int:
    import ring_hilbert as rh
    from ring_hilbert.bench.picture import draw

    try:
        pattern = rh.DilatedPattern(tuple(chosen.segment_lengths), tuple(chosen.dilation_rates))
        order = rh.TokenOrder(chosen.curve, block=chosen.block)
        draw(chosen.output, pattern, order, chosen.length, chosen.ranks, causal=not chosen.full)
    except ValueError as error:
        print(f"ring-hilbert plot: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
