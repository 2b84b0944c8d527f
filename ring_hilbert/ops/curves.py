# SPDX-License-Identifier: Apache-2.0
"""Space-filling curves over any rectangle or box: the cells of a grid, listed in the order a curve visits them.

Every curve is a function `shape -> cells`: `shape` is `(H, W)` or `(T, H, W)` with positive sides, `cells` an int64
array `[prod(shape)]` that holds each row-major cell index once, in visiting order. `CURVES` names them all. None loops
over cells in Python: digits of the coordinates are combined for whole axes, and a box is walked once per *distinct
shape* of sub-box, of which each level of the recursion has only a handful.

`RANKS` has the same curves cell by cell, for a few cells of a box that is too large to list: functions
`(shape, cells) -> ranks` of the coordinates `cells`, an array per axis, int64. Ranks ascend along the curve.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import NamedTuple

import numpy as np

Shape = tuple[int, ...]
Cells = Sequence[np.ndarray]

MOST_CELLS = 2**58  # per box, so that a cell's rank fits in 64 bits on every curve
LISTED_CELLS = 4096  # boxes up to this size are listed, larger ones ranked cell by cell


def raster(shape: Shape) -> np.ndarray:
    """Row by row, each from its first column."""
    return np.arange(prod(shape), dtype=np.int64)


def _raster_ranks(shape: Shape, cells: Cells) -> np.ndarray:
    rank = np.zeros_like(cells[0])
    for side, coordinate in zip(shape, cells, strict=True):
        rank = rank * side + coordinate
    return rank


def snake(shape: Shape) -> np.ndarray:
    """Boustrophedon: like `raster`, but with every second row and every second plane reversed; all steps have length 1."""
    planes = raster(shape).reshape(-1, *shape[-2:])
    planes[1::2] = planes[1::2, ::-1].copy()
    rows = planes.reshape(-1, shape[-1])
    rows[1::2] = rows[1::2, ::-1].copy()
    return rows.reshape(-1)


def _snake_ranks(shape: Shape, cells: Cells) -> np.ndarray:
    rank = np.zeros_like(cells[0])
    for side, coordinate in zip(shape, cells, strict=True):
        rank = rank * side + np.where(rank % 2 == 1, side - 1 - coordinate, coordinate)
    return rank


def morton(shape: Shape) -> np.ndarray:
    """Z-order (Morton 1966): ascending in the interleaved bits of the coordinates, the first axis most significant.

    The same as walking the smallest enclosing square or cube of side `2^k` and skipping what lies outside `shape`.
    """
    return np.argsort(_morton_ranks(shape, _axes_of(shape)), axis=None)


def _morton_ranks(shape: Shape, cells: Cells) -> np.ndarray:
    bits = [(side - 1).bit_length() for side in shape]
    ranks = np.zeros((1,) * cells[0].ndim, np.int64)
    for axis, coordinate in enumerate(cells):
        spread = np.zeros_like(coordinate)
        for level in range(bits[axis]):
            # A bit that is zero in every cell does not affect the order, so only bits set in some coordinate are used.
            place = sum(min(level, n) for n in bits) + sum(level < n for n in bits[axis + 1 :])
            spread |= (coordinate >> level & 1) << place
        ranks = ranks + spread
    return ranks


def peano(shape: Shape) -> np.ndarray:
    """Peano's curve (1890) on the smallest enclosing square or cube of side `3^k`, skipping what lies outside `shape`.

    In base 3 a digit of the rank is the coordinate's digit, mirrored (`2 - digit`) if the digits of all *other* axes
    that precede it add up to an odd number. All steps have length 1 where every side is the same power of 3.
    """
    return np.argsort(_peano_ranks(shape, _axes_of(shape)), axis=None)


def _peano_ranks(shape: Shape, cells: Cells) -> np.ndarray:
    levels = 0
    while 3**levels < max(shape):
        levels += 1
    axes = range(len(shape))
    passed = [np.zeros_like(coordinate) for coordinate in cells]  # per axis: the sum of its digits so far
    ranks = np.zeros(np.broadcast(*cells).shape, np.int64)
    for level in reversed(range(levels)):
        for axis in axes:
            if 3**level >= shape[axis]:
                continue  # zero in every cell; whether it is mirrored follows from digits already in the rank
            digit = cells[axis] // 3**level % 3
            mirrored = sum(passed[other] for other in axes if other != axis) % 2 == 1
            ranks *= 3
            ranks += np.where(mirrored, 2 - digit, digit)
            passed[axis] += digit
    return ranks


def _axes_of(shape: Shape) -> list[np.ndarray]:
    """The coordinates of all cells: one array per axis, laid out along that axis."""
    return list(np.meshgrid(*(np.arange(side, dtype=np.int64) for side in shape), indexing="ij", sparse=True))


def hilbert(shape: Shape) -> np.ndarray:
    """Hilbert's curve (1891), generalized to any rectangle or box: **every step has length 1, for every shape**.

    On squares and cubes of side `2^k` it is a Hilbert curve proper: every aligned square or cube of side `2^j` is one
    contiguous run. Any other box is cut the same way into nearly equal parts, at even coordinates where parity requires
    it. A run of n cells has a bounding box of mean diagonal about 1.8 n^(1/2) in 2-D and 2.2 n^(1/3) in 3-D,
    whether sides are even or odd (down to 1.4 and 1.7 at powers of 2).

    Halving a box so that the curve ends at the far end of the longest side, as the usual generalizations do, forces a
    diagonal step where that side is odd and another one even: no path in unit steps ends there. Nothing requires that
    end, so the curve starts in cell 0 and ends

    - at the far end of the longest side if that is even, or if all sides are odd;
    - otherwise at the far end of the longest *even* side, if that is at least 2/3 of the longest side;
    - otherwise it walks half of the box along the longest side, and the rest from its first corner by these three rules.
    """
    sides = (1,) * (3 - len(shape)) + shape
    cells = _join(_crossings(sides), prod(shape), {})
    return (cells[0].astype(np.int64) * sides[1] + cells[1]) * sides[2] + cells[2]


def _hilbert_ranks(shape: Shape, cells: Cells) -> np.ndarray:
    """By the same cuts as `hilbert`; all boxes of one shape are cut together."""
    sides = (1,) * (3 - len(shape)) + shape
    points = np.zeros((5, len(cells[0])), np.int64)  # the index of a cell, its rank so far, its place in its box
    points[0] = np.arange(len(cells[0]))
    points[5 - len(shape) :] = cells
    boxes: dict[Shape, list[np.ndarray]] = {}
    _enter(_crossings(sides), points, boxes)
    ranks, paths = np.empty(len(cells[0]), np.int64), dict[Shape, np.ndarray]()
    while boxes:
        sides = max(boxes, key=prod)  # the largest first: no box cut later has parts of this shape
        points = np.concatenate(boxes.pop(sides), axis=1)
        if prod(sides) == sides[0]:
            ranks[points[0]] = points[1] + points[2]
        elif prod(sides) <= LISTED_CELLS:
            place = np.empty(sides, np.int64)
            place[tuple(_walk(sides, paths))] = np.arange(prod(sides))
            ranks[points[0]] = points[1] + place[tuple(points[2:])]
        else:
            _enter(_split(sides), points, boxes)
    return ranks


def _enter(parts: Sequence[_Part], points: np.ndarray, boxes: dict[Shape, list[np.ndarray]]) -> None:
    """Sort the points of a box into its parts, in the coordinates of `_walk`: from the origin, the axis of travel first."""
    before = 0
    for number, part in enumerate(parts):
        inside = points
        if number + 1 < len(parts):
            outside = np.zeros(points.shape[1], bool)
            for coordinate, low, high in zip(points[2:], part.low, part.high, strict=True):
                outside |= coordinate < low
                outside |= coordinate >= high
            inside, points = (points.take(np.flatnonzero(x), axis=1) for x in (~outside, outside))
        sides = tuple(high - low for low, high in zip(part.low, part.high, strict=True))
        axes = _axes(sides, part.travel)
        seen = np.empty_like(inside)
        seen[0], seen[1] = inside[0], inside[1] + before
        for place, axis in enumerate(axes):
            coordinate = inside[2 + axis]
            seen[2 + place] = part.high[axis] - 1 - coordinate if part.mirrored[axis] else coordinate - part.low[axis]
        if seen.shape[1]:
            boxes.setdefault(tuple(sides[axis] for axis in axes), []).append(seen)
        before += prod(sides)


class _Part(NamedTuple):
    """A box `[low, high)` walked along its axis `travel`, entered at one corner and left at the next one along `travel`."""

    low: Shape
    high: Shape
    travel: int
    mirrored: tuple[bool, bool, bool] = (False, False, False)  # per axis: entered at the high side


# A checkerboard colouring decides where a path that visits each cell once, in unit steps, can end: a path over an even
# number of cells ends on the other colour, so a crossing from a corner to the next corner along a side of `a` cells needs
# `a` even; over an odd number of cells (all sides odd) both corners have the majority colour. Hence the one invariant
# below: **the travelled side is even, or all sides are odd**, and every cut preserves it in the parts.


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
    """Of `axes`, the one with the longest side; among equals the last."""
    return max(axes, key=lambda axis: (sides[axis], axis))


def _split(sides: Shape) -> list[_Part]:
    """Cut the box `(a, b, c)`, travelled along `a`, as sorted by `_axes`, into smaller crossings that join end to end.

    Two halves along `a` if it is long; three parts in the plane (a, b), up, across and down, if `c` is short or all
    sides are odd; otherwise five parts of the eight octants: 1 up `b`, 2 along `c`, 2 along `a`, 2 along `c`, 1 down.
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
        x |= 1  # b and c are odd, so the two parts along c need both halves of a to be odd
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
    """The axes in the order `_split` expects: `travel`, the longer, the shorter; if close, the even one last."""
    longer, shorter = sorted((axis for axis in range(3) if axis != travel), key=lambda axis: -sides[axis])
    close = 3 * sides[longer] <= 4 * sides[shorter]
    if close and sides[longer] % 2 == 0 and sides[shorter] % 2 == 1:
        longer, shorter = shorter, longer
    return [travel, longer, shorter]


def _join(parts: list[_Part], count: int, paths: dict[Shape, np.ndarray]) -> np.ndarray:
    """Coordinates `[3, count]` (int32) of the cells of `parts` in order; `paths` caches each shape walked so far."""
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

RANKS: dict[str, Callable[[Shape, Cells], np.ndarray]] = {
    "hilbert": _hilbert_ranks,
    "morton": _morton_ranks,
    "peano": _peano_ranks,
    "snake": _snake_ranks,
    "raster": _raster_ranks,
}
