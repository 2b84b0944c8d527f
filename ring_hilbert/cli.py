# SPDX-License-Identifier: Apache-2.0
"""The command line: `ring-hilbert <command> ...`. A command is a function that adds its parser; see `COMMANDS`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ring_hilbert.commands.checkpoints import add_convert, add_export
from ring_hilbert.commands.data import add_data_info, add_prepare_data
from ring_hilbert.commands.foresee import add_plan, add_plot
from ring_hilbert.commands.measure import add_bench, add_check
from ring_hilbert.commands.mistakes import missing_extra
from ring_hilbert.commands.parser import Parser
from ring_hilbert.commands.run import add_pretrain
from ring_hilbert.commands.score import add_score

COMMANDS: tuple[Callable[[Any], None], ...] = (
    add_pretrain,
    add_prepare_data,
    add_data_info,
    add_convert,
    add_export,
    add_score,
    add_plan,
    add_check,
    add_bench,
    add_plot,
)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets `run`, a function of the parsed arguments to the exit status."""
    parser = Parser(
        prog="ring-hilbert", description="Exact sequence-parallel dilated attention in space-filling-curve order."
    )
    # Of DeepSpeed's launcher, which sets LOCAL_RANK too.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="<command>")
    for add in COMMANDS:
        add(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 0, or 2 and a message, without traceback, for what the user can mend."""
    try:
        chosen = build_parser().parse_args(arguments)
        return chosen.run(chosen)
    except ModuleNotFoundError as error:
        advice = missing_extra(error)
        if advice is None:
            raise
        print(f"ring-hilbert: error: {advice}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
