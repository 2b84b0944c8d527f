# SPDX-License-Identifier: Apache-2.0
"""Token orders: the permutation that lays tokens along a space-filling curve, in 1-D runs, on a grid, or anywhere in a box."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property, lru_cache
from math import isqrt, prod
from numbers import Integral
from typing import Any, TypeVar

import numpy as np
import torch

from ring_hilbert.ops.curves import CURVES, MOST_CELLS, RANKS

_CACHED = 8  # results per cache; the least recently used is evicted first

# A copy-on-write clone costs microseconds at any length and copies only on a write, so that callers own what they get
# but cannot modify the cache. A torch without it copies at once: the same results, milliseconds slower.
_lazy_clone: Callable[[torch.Tensor], torch.Tensor] = getattr(torch, "_lazy_clone", torch.clone)

_Method = TypeVar("_Method", bound=Callable[..., torch.Tensor])


def _constant_when_compiled(method: _Method) -> _Method:
    """`torch.compiler.assume_constant_result`, which does just this, but after importing the compiler, for over a second."""
    method._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    return method


@dataclass(frozen=True, eq=False, repr=False)
class Listed:
    """An explicit list of the token of every row: int64 `[n]`. Compares by contents."""

    tokens: np.ndarray

    def __post_init__(self) -> None:
        self.tokens.flags.writeable = False

    @cached_property
    def digest(self) -> bytes:
        """Digest of the contents."""
        return hashlib.sha256(self.tokens.tobytes()).digest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Listed) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"<{len(self.tokens)} tokens, {self.digest.hex()[:8]}>"


@dataclass(frozen=True)
class TokenOrder:
    """Which token is at which row: tokens in the order in which a space-filling curve visits them.

    With `block`, every run of `block` tokens is laid out row-major on a grid of `floor(sqrt(block))` rows and
    `ceil(block / rows)` columns and visited along the curve; cells beyond `block`, and beyond the end of a shorter last
    run, are skipped. With `grid`, the whole sequence is one picture `(H, W)` or volume `(T, H, W)`, row-major. Either
    way every token has exactly one row. Order the real tokens first, then append padding rows. For tokens at arbitrary
    coordinates of a picture or volume, such as the tiles of a slide, see `from_coordinates`.

    Args:
        curve: "hilbert", "morton", "peano", "snake" or "raster" (`ring_hilbert.ops.curves`).
        block: tokens per run, at least 1, for sequences of any length.
        grid: `(H, W)` or `(T, H, W)`, for sequences of exactly `prod(grid)` tokens.
        listed: set by `from_coordinates`.

    Raises:
        ValueError: for an unknown curve, for both or neither of `block` and `grid`, for sides that are not positive
            integers.
    """

    curve: str = "hilbert"
    block: int | None = None
    grid: tuple[int, ...] | None = None
    listed: Listed | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.curve, str) or self.curve not in CURVES:
            near = get_close_matches(str(self.curve).lower(), CURVES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"curve={self.curve!r} is unknown, expected one of {', '.join(map(repr, CURVES))}{hint}")
        if self.listed is not None:
            if self.block is not None or self.grid is not None:
                raise ValueError(
                    "an order from coordinates has neither block nor grid; make it with TokenOrder.from_coordinates"
                )
            return
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

    @_constant_when_compiled
    def permutation(self, length: int, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """The tokens at rows `start` to `stop` (default `length`): row `s` holds token `permutation[s]`.

        With `block`, only the runs that rows `[start, stop)` touch are built: O(stop - start + block). Recent results
        are cached; writing to the result never changes the cache. In compiled code the result is a constant of the
        graph (with torch 2.11 `length` must be static there).

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

    @_constant_when_compiled
    def inverse(self, length: int) -> torch.Tensor:
        """The row at which each token stands: `inverse[permutation[s]] == s`. Cached like `permutation`.

        Returns:
            int64 `[length]` on the CPU.

        Raises:
            ValueError: if `length` is not `prod(grid)`.
        """
        return _owned(_inverse, self, self._checked(length))

    @classmethod
    def from_coordinates(cls, curve: str, coordinates: torch.Tensor | np.ndarray, *, leading: int = 0) -> TokenOrder:
        """The order of tokens at arbitrary coordinates: along the curve through their bounding box.

            order = rh.TokenOrder.from_coordinates("hilbert", coordinates // 256)  # tiles of a slide, by their pixels
            x = x[order.permutation(len(x))]

        The cells of the box are not listed, so its size costs nothing. Tokens in the same cell keep their order. If the tokens
        fill the box, the order is that of `grid=`.

        Args:
            curve: as in the constructor.
            coordinates: integers `[n, 2]` as (row, column), or `[n, 3]`, one per token; copied to the CPU if elsewhere.
            leading: number of tokens in front that are not on the curve and stay there, such as a class token.

        Returns:
            An order of exactly `leading + n` tokens, which `to_config` cannot represent.

        Raises:
            ValueError: for an unknown curve, coordinates of another shape or dtype, or a box of more than 2^58 cells.
        """
        given = coordinates.detach().cpu().numpy() if isinstance(coordinates, torch.Tensor) else np.asarray(coordinates)
        if given.ndim != 2 or given.shape[1] not in (2, 3):
            raise ValueError(f"coordinates must be [n, 2] or [n, 3], one row per token, got {list(given.shape)}")
        if not np.issubdtype(given.dtype, np.integer):
            raise ValueError(
                f"coordinates must be integers, got {given.dtype}; count in tiles, such as (pixels // 256).long()"
            )
        leading = _integer("leading", leading, 0)
        tokens = np.arange(leading)
        empty = cls(curve, listed=Listed(tokens))  # checks the curve
        if not len(given):
            return empty
        lowest = given.min(0)
        shape = tuple(int(high) - int(low) + 1 for low, high in zip(lowest, given.max(0), strict=True))
        if prod(shape) > MOST_CELLS:
            sides = " x ".join(map(str, shape))
            raise ValueError(f"coordinates lie in a box of {sides} cells, more than 2^58; count in larger units")
        cells = given.astype(np.int64) - lowest.astype(np.int64)
        ranks = RANKS[curve](shape, list(cells.T))
        return cls(curve, listed=Listed(np.concatenate((tokens, leading + ranks.argsort(kind="stable")))))

    @property
    def size(self) -> int | None:
        """The number of tokens that this orders; None: any."""
        if self.listed is not None:
            return len(self.listed.tokens)
        return None if self.grid is None else prod(self.grid)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TokenOrder:
        """The order from a mapping with the keys `curve` (default "hilbert") and `block` or `grid`; None counts as not given.

        Raises:
            ValueError: for other keys, and as the constructor.
        """
        known = ("curve", "block", "grid")
        unknown = [key for key in config if key not in known]
        if unknown:
            raise ValueError(f"order has unknown keys {unknown}, expected some of {list(known)}")
        return cls(**{key: value for key, value in config.items() if value is not None})

    def to_config(self) -> dict[str, Any]:
        """The argument of `from_config`, in types that JSON and YAML preserve.

        Raises:
            ValueError: for an order from coordinates, which belongs to one sequence.
        """
        if self.listed is not None:
            raise ValueError(
                "an order from coordinates belongs to one sequence and has no config; save the coordinates instead"
            )
        size = {"block": self.block} if self.grid is None else {"grid": list(self.grid)}
        return {"curve": self.curve, **size}

    def _checked(self, length: int) -> int:
        length = _integer("length", length, 0)
        if self.size not in (None, length):
            what = f"grid={self.grid} holds" if self.listed is None else "this order from coordinates has"
            raise ValueError(
                f"length={length} but {what} {self.size} tokens: order exactly these and append "
                "padding rows afterwards, or give block= for sequences of any length"
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
    if order.listed is not None:
        return order.listed.tokens[start:stop]
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
    """The token at each of `rows` (int64, any shape) of a sequence in `order`; rows behind all tokens map to themselves."""
    if order is None or not rows.size:
        return rows
    length = seq_len if order.size is None else min(seq_len, order.size)
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
    """A CPU tensor in torch-owned memory (other memory cannot be cloned lazily), usable in autograd wherever it is made."""
    with torch.inference_mode(False):
        return torch.tensor(array, device="cpu")


def _owned(cached: Callable[..., torch.Tensor], *key: TokenOrder | int) -> torch.Tensor:
    """The caller's own copy of a cached result. Compiled code calls this without tracing into the curves."""
    if torch.compiler.is_dynamo_compiling():  # as a decorator, `disable` would import the compiler into every program
        return torch.compiler.disable(_owned)(cached, *key)  # pyright: ignore[reportReturnType]  # untyped
    return _lazy_clone(cached(*key))
