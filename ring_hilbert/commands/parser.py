# SPDX-License-Identifier: Apache-2.0
"""A parser that declares flags when they are asked for: those of `bench` need the packages of an extra."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose `declare`, if set, adds its flags the first time that it parses."""

    declare: Callable[[argparse.ArgumentParser], None] | None = None

    def parse_known_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]  # overloads
        """As the base class."""
        declare, self.declare = self.declare, None
        if declare is not None:
            declare(self)
        return super().parse_known_args(args, namespace)
