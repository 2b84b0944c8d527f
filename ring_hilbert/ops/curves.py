# SPDX-License-Identifier: Apache-2.0
"""Space-filling curves over any rectangle or box: the cells of a grid, listed in the order a curve visits them.

Every curve is a function `shape -> cells`: `shape` is `(H, W)` or `(T, H, W)` with positive sides, `cells` an int64
array `[prod(shape)]` that holds each row-major cell index once, in visiting order. `CURVES` names them all. None loops
over cells in Python: digits of the coordinates are combined for whole axes, and a box is walked once per *distinct
shape* of sub-box, of which a level of the recursion has a handful.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod
from typing import NamedTuple

import numpy as np

Shape = tuple[int, ...]


def raster(shape: Shape) -> np.ndarray:
    """Row after row, every row from its first column."""
    return np.arange(prod(shape), dtype=np.int64)


def snake(shape: Shape) -> np.ndarray:
    """Boustrophedon: like `raster`, every second row and every second plane backwards; all steps have length 1."""
    planes = raster(shape).reshape(-1, *shape[-2:])
    planes[1::2] = planes[1::2, ::-1].copy()
    rows = planes.reshape(-1, shape[-1])
    rows[1::2] = rows[1::2, ::-1].copy()
    return rows.reshape(-1)


def morton(shape: Shape) -> np.ndarray:
    """Z-order (Morton 1966): ascending in the interleaved bits of the coordinates, the first axis most significant.

    The same as walking the smallest enclosing square or cube of side `2^k` and skipping what lies outside `shape`.
    """
    bits = [(side - 1).bit_length() for side in shape]
    keys = np.zeros(shape, np.int64)
    for axis, side in enumerate(shape):
        index, key = np.arange(side, dtype=np.int64), np.zeros(side, np.int64)
        for level in range(bits[axis]):
            # A bit that is zero in every cell orders nothing, so only bits that some coordinate has take a place.
            place = sum(min(level, n) for n in bits) + sum(level < n for n in bits[axis + 1 :])
            key |= (index >> level & 1) << place
        keys += _along(axis, key, len(shape))
    return np.argsort(keys, axis=None)


def peano(shape: Shape) -> np.ndarray:
    """Peano's curve (1890) on the smallest enclosing square or cube of side `3^k`, skipping what lies outside `shape`.

    In base 3 a digit of the rank is the coordinate's digit, mirrored (`2 - digit`) if the digits of all *other* axes
    that precede it add up to an odd number. All steps have length 1 where every side is the same power of 3.
    """
    levels = 0
    while 3**levels < max(shape):
        levels += 1
    axes = range(len(shape))
    index = [_along(axis, np.arange(side, dtype=np.int64), len(shape)) for axis, side in enumerate(shape)]
    passed = [np.zeros_like(coordinate) for coordinate in index]  # per axis: the sum of its digits so far
    keys = np.zeros(shape, np.int64)
    for level in reversed(range(levels)):
        for axis in axes:
            if 3**level >= shape[axis]:
                continue  # this digit is zero in every cell; mirrored or not follows from digits already in the key
            digit = index[axis] // 3**level % 3
            mirrored = sum(passed[other] for other in axes if other != axis) % 2 == 1
            keys *= 3
            keys += np.where(mirrored, 2 - digit, digit)
            passed[axis] += digit
    return np.argsort(keys, axis=None)


def _along(axis: int, values: np.ndarray, dims: int) -> np.ndarray:
    """`values [n]` reshaped to lie along `axis` of a `dims`-dimensional array."""
    return values.reshape([-1 if other == axis else 1 for other in range(dims)])


def hilbert(shape: Shape) -> np.ndarray:
    """Hilbert's curve (1891), generalized to any rectangle or box: **every step has length 1, for every shape**.

    On squares and cubes of side `2^k` it is a Hilbert curve proper: every aligned square or cube of side `2^j` is one
    contiguous run. Elsewhere a box is cut the same way into nearly equal parts, at even coordinates where parity asks
    for it. A run of n cells has a bounding box of mean diagonal about 1.8 n^(1/2) in 2-D and 2.2 n^(1/3) in 3-D,
    whether sides are even or odd (down to 1.4 and 1.7 at powers of 2).

    Halving a box so that the curve ends at the far end of the longest side, as the usual generalizations do, forces a
    diagonal step where that side is odd and another one even: no path in unit steps ends there. Nothing needs that
    end, so the curve starts in cell 0 and ends

    - at the far end of the longest side if that is even, or if all sides are odd;
    - else at the far end of the longest *even* side, if that is at least 2/3 of the longest side;
    - else it walks half of the box along the longest side, and the rest from its first corner by these three rules.
    """
    sides = (1,) * (3 - len(shape)) + shape
    cells = _join(_crossings(sides), prod(shape), {})
    return (cells[0].astype(np.int64) * sides[1] + cells[1]) * sides[2] + cells[2]


class _Part(NamedTuple):
    """A box `[low, high)` walked along its axis `travel`, in by one corner and out by the next one along `travel`."""

    low: Shape
    high: Shape
    travel: int
    mirrored: tuple[bool, bool, bool] = (False, False, False)  # per axis: in at the high side


# The checkerboard decides where a path that visits each cell once, in unit steps, can end: a path over an even number
# of cells ends on the other colour, so a crossing from a corner to the next corner along a side of `a` cells needs `a`
# even; over an odd number of cells (all sides odd) both corners have the colour there is one more of. Hence the one
# invariant below: **the travelled side is even, or all sides are odd**, and every cut hands it on to the parts.


def _crossings(sides: Shape) -> list[_Part]:
    """The box `sides` as crossings that keep the invariant, each starting next to the end of the one before."""
    low, parts = (0, 0, 0), []
    while True:
        left = tuple(side - start for side, start in zip(sides, low, strict=True))
        longest = _longest(left, range(3))
        travel = _longest(left, [axis for axis in range(3) if left[axis] % 2 == 0] or range(3))
        if 2 * left[longest] <= 3 * left[travel]:
            return [*parts, _Part(low, sides, travel)]
        cut = low[longest] + _even_half(left[longest])
        parts.append(_Part(low, (*sides[:longest], cut, *sides[longest + 1 :]), longest))
        low = (*low[:longest], cut, *low[longest + 1 :])


def _longest(sides: Shape, axes: Iterable[int]) -> int:
    """Of `axes`, the one with the longest side; of equals the last."""
    return max(axes, key=lambda axis: (sides[axis], axis))


def _split(sides: Shape) -> list[_Part]:
    """Cuts the box `(a, b, c)`, travelled along `a`, as sorted by `_axes`, into smaller crossings that join end to end.

    Two halves along `a` if it is long; three parts in the plane (a, b), up, across and down, if `c` is short or all
    sides are odd; else five parts of a cube's eight octants: 1 up `b`, 2 along `c`, 2 along `a`, 2 along `c`, 1 down.
    """
    a, b, c = sides
    assert a % 2 == 0 or b * c % 2 == 1, f"no unit-step path crosses {sides}"
    if 2 * a > 3 * max(b, c):
        x = _even_half(a)
        return [_Part((0, 0, 0), (x, b, c), 0), _Part((x, 0, 0), sides, 0)]
    x, y, z = a // 2, _even_half(b), _even_half(c)
    if 3 * b > 4 * c or a % 2 == 1:
        return [
            _Part((0, 0, 0), (x, y, c), 1),
            _Part((0, y, 0), sides, 0),
            _Part((x, 0, 0), (a, y, c), 1, (True, True, False)),
        ]
    if c % 2 == 1:
        x |= 1  # b and c are odd, so the two parts along c need both halves of a odd
    return [
        _Part((0, 0, 0), (x, y, z), 1),
        _Part((0, y, 0), (x, b, c), 2),
        _Part((0, 0, z), (a, y, c), 0, (False, True, True)),
        _Part((x, y, 0), sides, 2, (True, False, True)),
        _Part((x, 0, 0), (a, y, z), 1, (True, True, False)),
    ]


def _even_half(side: int) -> int:
    """The even number nearest to half of `side`; 1 for 2."""
    return (side + 2) // 4 * 2 if side > 2 else 1


def _axes(sides: Shape, travel: int) -> list[int]:
    """The axes in the order `_split` takes them: `travel`, the longer, the shorter; if close, the even one last."""
    longer, shorter = sorted((axis for axis in range(3) if axis != travel), key=lambda axis: -sides[axis])
    close = 3 * sides[longer] <= 4 * sides[shorter]
    if close and sides[longer] % 2 == 0 and sides[shorter] % 2 == 1:
        longer, shorter = shorter, longer
    return [travel, longer, shorter]


def _join(parts: list[_Part], count: int, paths: dict[Shape, np.ndarray]) -> np.ndarray:
    """Coordinates `[3, count]` (int32) of the cells of `parts` in order; `paths` keeps each shape walked so far."""
    cells = np.empty((3, count), np.int32)
    start = 0
    for part in parts:
        sides = tuple(high - low for low, high in zip(part.low, part.high, strict=True))
        axes = _axes(sides, part.travel)
        path = _walk(tuple(sides[axis] for axis in axes), paths)
        stop = start + path.shape[1]
        for coordinate, axis in zip(path, axes, strict=True):
            if part.mirrored[axis]:
                np.subtract(part.high[axis] - 1, coordinate, out=cells[axis, start:stop])
            else:
                np.add(part.low[axis], coordinate, out=cells[axis, start:stop])
        start = stop
    assert start == count, f"parts hold {start} of {count} cells"
    return cells


def _walk(sides: Shape, paths: dict[Shape, np.ndarray]) -> np.ndarray:
    """Coordinates `[3, prod(sides)]` (int32) of a path in unit steps from the origin to the far end of axis 0."""
    if sides not in paths:
        count = prod(sides)
        if count == sides[0]:
            paths[sides] = np.zeros((3, count), np.int32)
            paths[sides][0] = np.arange(count)
        else:
            paths[sides] = _join(_split(sides), count, paths)
    return paths[sides]


CURVES: dict[str, Callable[[Shape], np.ndarray]] = {
    "hilbert": hilbert,
    "morton": morton,
    "peano": peano,
    "snake": snake,
    "raster": raster,
}
