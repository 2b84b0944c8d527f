# SPDX-License-Identifier: Apache-2.0
"""Token orders: the permutation that lays tokens along a space-filling curve, in 1-D runs or on a 2-D or 3-D grid."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from math import isqrt, prod
from numbers import Integral
from typing import Any

import numpy as np
import torch

from ring_hilbert.ops.curves import CURVES

_CACHED = 8  # results kept per cache, the least recently used leaves first

# A copy-on-write clone costs microseconds at any length and copies only if somebody writes, so that callers own what
# they get and yet cannot reach the cache. A torch without it copies at once: the same results, milliseconds slower.
_lazy_clone: Callable[[torch.Tensor], torch.Tensor] = getattr(torch, "_lazy_clone", torch.clone)


@dataclass(frozen=True)
class TokenOrder:
    """Which token stands at which row: tokens in the order a space-filling curve visits them.

    With `block`, every run of `block` tokens is laid row-major on a grid of `floor(sqrt(block))` rows and
    `ceil(block / rows)` columns and visited along the curve; cells beyond `block`, and beyond the end of a shorter last
    run, are skipped. With `grid`, the whole sequence is one picture `(H, W)` or volume `(T, H, W)`, row-major. Either
    way every token has exactly one row. Order the real tokens first, then append padding rows.

    Args:
        curve: "hilbert", "morton", "peano", "snake" or "raster" (`ring_hilbert.ops.curves`).
        block: tokens per run, at least 1, for sequences of any length.
        grid: `(H, W)` or `(T, H, W)`, for sequences of exactly `prod(grid)` tokens.

    Raises:
        ValueError: for an unknown curve, for both or neither of `block` and `grid`, for sides that are not positive
            integers.
    """

    curve: str = "hilbert"
    block: int | None = None
    grid: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.curve, str) or self.curve not in CURVES:
            near = get_close_matches(str(self.curve).lower(), CURVES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"curve={self.curve!r} is unknown, expected one of {', '.join(map(repr, CURVES))}{hint}")
        if (self.block is None) == (self.grid is None):
            given = "neither" if self.block is None else f"both block={self.block!r} and grid={self.grid!r}"
            raise ValueError(
                f"exactly one of block and grid is needed, got {given}: block=4096 for text of any length, "
                "grid=(H, W) or (T, H, W) for pictures and volumes"
            )
        if self.block is not None:
            object.__setattr__(self, "block", _integer("block", self.block, 1))
            return
        if not isinstance(self.grid, Sequence) or isinstance(self.grid, str) or len(self.grid) not in (2, 3):
            raise ValueError(f"grid={self.grid!r} must be (H, W) or (T, H, W); for a 1-D sequence give block=")
        sides = tuple(_integer(f"grid[{axis}]", side, 1) for axis, side in enumerate(self.grid))
        object.__setattr__(self, "grid", sides)

    @torch.compiler.assume_constant_result
    def permutation(self, length: int, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """The tokens that stand at rows `start` to `stop` (default `length`): row `s` holds token `permutation[s]`.

        With `block`, only the runs that rows `[start, stop)` touch are built: O(stop - start + block). Recent results
        are cached; writing to what is returned never reaches the cache. In compiled code the result is a constant of the
        graph (`length` must be static there with torch 2.11).

        Returns:
            int64 `[stop - start]` on the CPU; over all rows, each of `0 .. length - 1` once.

        Raises:
            ValueError: if `length` is not `prod(grid)`, or unless `0 <= start <= stop <= length`.
        """
        length = self._checked(length)
        stop = length if stop is None else _integer("stop", stop, 0)
        start = _integer("start", start, 0)
        if not start <= stop <= length:
            raise ValueError(f"start={start}, stop={stop} must satisfy 0 <= start <= stop <= length={length}")
        return _owned(_permutation, self, length, start, stop)

    @torch.compiler.assume_constant_result
    def inverse(self, length: int) -> torch.Tensor:
        """The row at which each token stands: `inverse[permutation[s]] == s`. Cached like `permutation`.

        Returns:
            int64 `[length]` on the CPU.

        Raises:
            ValueError: if `length` is not `prod(grid)`.
        """
        return _owned(_inverse, self, self._checked(length))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TokenOrder:
        """The order of a mapping with the keys `curve` (default "hilbert") and `block` or `grid`; None is not given.

        Raises:
            ValueError: for other keys, and as the constructor.
        """
        known = ("curve", "block", "grid")
        unknown = [key for key in config if key not in known]
        if unknown:
            raise ValueError(f"order has unknown keys {unknown}, expected some of {list(known)}")
        return cls(**{key: value for key, value in config.items() if value is not None})

    def to_config(self) -> dict[str, Any]:
        """What `from_config` takes, in types that JSON and YAML keep."""
        size = {"block": self.block} if self.grid is None else {"grid": list(self.grid)}
        return {"curve": self.curve, **size}

    def _checked(self, length: int) -> int:
        length = _integer("length", length, 0)
        if self.grid is not None and length != prod(self.grid):
            raise ValueError(
                f"length={length} but grid={self.grid} holds {prod(self.grid)} tokens: order exactly these and append "
                "padding rows afterwards, or give block= instead of grid= for sequences of any length"
            )
        return length


def _integer(name: str, value: Any, minimum: int) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")
    return int(value)


@lru_cache(maxsize=_CACHED)
def _cells(curve: str, shape: tuple[int, ...]) -> np.ndarray:
    cells = CURVES[curve](shape)
    cells.flags.writeable = False
    return cells


def _tokens(order: TokenOrder, length: int, start: int, stop: int) -> np.ndarray:
    """The tokens at rows `[start, stop)`, int64 `[stop - start]`."""
    if order.block is None:
        assert order.grid is not None
        return _cells(order.curve, order.grid)[start:stop]
    n = order.block
    rows = isqrt(n)
    cells = _cells(order.curve, (rows, -(-n // rows)))
    run = cells[cells < n]
    first, last = start // n, -(-stop // n)
    tokens = (np.arange(first, last, dtype=np.int64)[:, None] * n + run).reshape(-1)
    if last * n > length:
        tokens = tokens[tokens < length]
    return tokens[start - first * n : stop - first * n]


def natural_places(rows: np.ndarray, seq_len: int, order: TokenOrder | None) -> np.ndarray:
    """The token that stands at each of `rows` (int64, any shape) of a sequence in `order`; rows behind a grid are themselves."""
    if order is None or not rows.size:
        return rows
    length = seq_len if order.grid is None else min(seq_len, prod(order.grid))
    first, stop = int(rows.min()), min(int(rows.max()) + 1, length)
    if first >= stop:
        return rows
    tokens = order.permutation(length, first, stop).numpy()
    return np.where(rows < length, tokens[np.minimum(rows, stop - 1) - first], rows)


@lru_cache(maxsize=_CACHED)
def _permutation(order: TokenOrder, length: int, start: int, stop: int) -> torch.Tensor:
    return _cacheable(_tokens(order, length, start, stop))


@lru_cache(maxsize=_CACHED)
def _inverse(order: TokenOrder, length: int) -> torch.Tensor:
    rows = np.empty(length, np.int64)
    rows[_tokens(order, length, 0, length)] = np.arange(length)
    return _cacheable(rows)


def _cacheable(array: np.ndarray) -> torch.Tensor:
    """A CPU tensor in memory of torch's own (others cannot be cloned lazily), fit for autograd wherever it is made."""
    with torch.inference_mode(False):
        return torch.tensor(array, device="cpu")


@torch.compiler.disable()
def _owned(cached: Callable[..., torch.Tensor], *key: TokenOrder | int) -> torch.Tensor:
    """The caller's own copy of a cached result. Compiled code calls it and does not trace into the curves."""
    return _lazy_clone(cached(*key))
