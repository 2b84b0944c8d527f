# SPDX-License-Identifier: Apache-2.0
"""How a command ends that was asked for what cannot be."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import wraps


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
