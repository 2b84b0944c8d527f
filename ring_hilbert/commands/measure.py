# SPDX-License-Identifier: Apache-2.0
"""`ring-hilbert bench` and `check`: what these devices and ranks do."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ring_hilbert.commands.mistakes import in_one_line
from ring_hilbert.commands.parser import add_command

BENCH = """\
measure, and append rows to a CSV file

Measure, print, and append a row per figure to a CSV file, with date, commit, device and versions.
"""

CHECK = """\
equality with one rank, link bandwidth and versions on these ranks: OK, or what to do

Check the operator on the ranks at hand: every strategy against one rank, the links, the versions.

example:
  torchrun --nproc-per-node 8 -m ring_hilbert.cli check
"""


def add_bench(commands: Any) -> None:
    """`ring-hilbert bench <measurement>`: measure and keep the rows; each measurement declares its own flags."""
    parser = add_command(commands, "bench", BENCH, _bench)
    parser.declare = _measurements


def _measurements(parser: argparse.ArgumentParser) -> None:
    from ring_hilbert.bench.command import add_measurements

    add_measurements(parser)


@in_one_line
def _bench(chosen: argparse.Namespace) -> None:
    from ring_hilbert.bench.command import run

    run(chosen)


def add_check(commands: Any) -> None:
    """`ring-hilbert check`: whether these ranks compute the right thing, and how fast they are joined."""
    parser = add_command(commands, "check", CHECK, _check)
    parser.add_argument(
        "--timeout", type=float, default=60.0, metavar="S", help="seconds to wait for another rank; default: 60"
    )


def _check(chosen: argparse.Namespace) -> int:
    from ring_hilbert.bench.check import check

    try:
        page, mine = check(chosen.timeout)
    except (ValueError, RuntimeError) as error:
        print(f"ring-hilbert check: NOT OK: {error}", file=sys.stderr)
        return 1
    if mine:
        print(page)
    return 1 if page.faults else 0
