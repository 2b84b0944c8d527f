# SPDX-License-Identifier: Apache-2.0
"""A parser that declares flags when they are asked for, as those of `bench` need an extra; and what commands share of theirs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def add_command(commands: Any, name: str, text: str, run: Callable[[argparse.Namespace], Any]) -> Any:
    """The parser of a command, carried out by `run`. Paragraphs of `text`: its line in the list, its description, examples."""
    listed, description, *examples = text.split("\n\n", 2)
    plain = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(
        name, help=listed, description=description, epilog="".join(examples), formatter_class=plain
    )
    parser.set_defaults(run=run)
    return parser


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """What comes behind the flags of a command that reads a run's file."""
    example = "replaces a value of the file, e.g. data.seq_len=8192"
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help=example)


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
