# SPDX-License-Identifier: Apache-2.0
"""A parser that declares flags when they are asked for, as those of `bench` need an extra; and flags that commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """What comes behind the flags of a command that reads a run's file."""
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="replaces a value of the file")


def add_config_or_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The file of a run; returns the group of the flags that stand for one."""
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="the YAML file of a run, instead of the flags below"
    )
    add_overrides(parser)
    return parser.add_argument_group("without --config")


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose `declare`, if set, adds its flags the first time that it parses."""

    declare: Callable[[argparse.ArgumentParser], None] | None = None

    def parse_known_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]  # overloads
        """As the base class."""
        declare, self.declare = self.declare, None
        if declare is not None:
            declare(self)
        return super().parse_known_args(args, namespace)
