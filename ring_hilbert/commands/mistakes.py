# SPDX-License-Identifier: Apache-2.0
"""How a command ends that was asked for what cannot be, or for what is not installed."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from functools import wraps
from importlib.metadata import PackageNotFoundError, requires


def in_one_line(command: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], int]:
    """The exit status of a command: 0, or 2 and a line without traceback for what the user can mend."""

    @wraps(command)
    def run(chosen: argparse.Namespace) -> int:
        try:
            command(chosen)
        except (ValueError, OSError) as error:
            names = ["ring-hilbert", chosen.command, *vars(chosen).get("measurement", "").split()]
            print(f"{' '.join(names)}: error: {error}", file=sys.stderr)
            return 2
        return 0

    return run


def over_ranks(command: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], int]:
    """The same for a command that may be one of many ranks: what all of them know is said once, and 1 where a rank was lost."""

    @wraps(command)
    def run(chosen: argparse.Namespace) -> int:
        from ring_hilbert.training.watchdog import RankLost
        from ring_hilbert.training.world import RankError

        try:
            command(chosen)
        except (ValueError, FloatingPointError) as error:
            rank = os.environ.get("RANK", "0")
            shared = isinstance(error, (RankError, FloatingPointError))  # every rank knows of it
            if rank == "0" or not shared:
                where = "" if shared or "RANK" not in os.environ else f" (rank {rank})"
                print(f"ring-hilbert {chosen.command}: error{where}: {error}", file=sys.stderr)
            return 2
        except RankLost as error:
            print(f"ring-hilbert {chosen.command}: error: {error}: {error.__cause__}", file=sys.stderr)
            return 1
        return 0

    return run


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """What to install for a module that was not found; None if no extra of this package has it."""
    module = (error.name or "").partition(".")[0]
    try:
        lines = requires("ring_hilbert") or []
    except PackageNotFoundError:
        return None
    for line in lines:
        needed = re.match(r"([\w.-]+).*extra == [\"']([\w-]+)[\"']", line)
        if needed and needed[1].replace("-", "_").lower() == module:
            return f"this needs {module}, which is not installed: pip install 'ring_hilbert[{needed[2]}]'"
    return None
