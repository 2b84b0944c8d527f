# SPDX-License-Identifier: Apache-2.0
"""One visit of the torch core, forward and backward, by the device's dense kernel, in pieces of bounded size.

Works on any device and dtype in which PyTorch multiplies matrices. Nothing here knows of patterns or ranks: a visit arrives
as strided views.

Shapes: `B` batch, `n` segments, `c` residues, `h` kv heads, `G` query heads per kv head, `Q` query rows, `K` key rows, `D`
head dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ring_hilbert.ops.dense import DenseKernel, MatrixProducts
from ring_hilbert.ops.merge import RunningSoftmax
from ring_hilbert.ops.sight import Part, Sight, Tile

PIECE = 1 << 20  # elements of a tensor returned by one kernel call, where the rows of a segment allow it

MATRIX_QUERIES, MATRIX_KEYS = 256, 1024  # the tile of a kernel that holds its scores in memory

Index = tuple[int | slice, ...]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64, everything else is merged and summed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Weights(NamedTuple):
    """How often pairs count: log multiplicity `logs[..., levels[..., i], j]` of query `i` and key `j`, in the sight's order.

    Attributes:
        levels: int64 `[B or 1, n or 1, c or 1, Q]`.
        logs: logarithms in the dtype of the kernel, `[B or 1, n or 1, c or 1, L, K]`.
    """

    levels: Tensor
    logs: Tensor


@dataclass(frozen=True)
class Scope:
    """How a visit is computed.

    Attributes:
        kernel: the dense kernel.
        sight: which keys are seen.
        weights: how often the pairs count; None: all alike.
        log_weight: logarithm of how often they count if they count alike.
    """

    kernel: DenseKernel
    sight: Sight
    weights: Weights | None = None
    log_weight: float = 0.0


def forward(state: RunningSoftmax, q: Tensor, k: Tensor, v: Tensor, scope: Scope, scale: float) -> None:
    """Merge a visit into `state`.

    Args:
        state: views `lse [G, B, n, c, h, Q]`, `out [G, B, n, c, h, Q, D]`, updated in place.
        q: `[G, B, n, c, h, Q, D]`.
        k, v: `[B, n, c, h, K, D]`.
        scope: how it is computed.
        scale: factor on the scores.
    """
    made: dict[tuple[int, ...], Tensor] = {}
    for part, index in _pieces(scope, k.shape, q.shape[-2]):
        keys, values = (_take(x[index], scope, index) for x in (k, v))
        for group in range(q.shape[0]):
            queries = _take(q[group][index], scope, index)
            piece: RunningSoftmax | None = None
            for tile, kernel, bias, hidden in _tiles(part, index, queries, keys, scope, made):
                block = (queries[:, :, tile.queries], keys[:, :, tile.keys], values[:, :, tile.keys])
                qt, kt, vt = (x.to(kernel.dtype) for x in block)
                out, lse = kernel.forward(qt, kt, vt, tile.diagonal == 0, bias, scale)
                if hidden is not None:
                    lse = lse.masked_fill(hidden, float("-inf"))
                if tile.whole:
                    piece = RunningSoftmax(lse, out)
                    break
                if piece is None:
                    piece = RunningSoftmax(
                        lse.new_empty(queries.shape[:-1], dtype=torch.float64),
                        torch.empty_like(queries, dtype=state.out.dtype),
                    )
                    piece.clear()
                RunningSoftmax(piece.lse[:, :, tile.queries], piece.out[:, :, tile.queries]).add(lse, out)
            if piece is not None:
                rows = RunningSoftmax(state.lse[group][index], state.out[group][index])
                lse = _put_back(piece.lse.unsqueeze(-1), scope, index).squeeze(-1)
                rows.add(lse.double() + scope.log_weight, _put_back(piece.out, scope, index))


def backward(
    grads: tuple[Tensor, Tensor, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    scope: Scope,
    scale: float,
) -> None:
    """Add a visit's share of the gradient of the *merged* softmax.

    Args:
        grads: `dq [G, B, n, c, h, Q, D]`, `dk`, `dv [B, n, c, h, K, D]`: float32 or float64 views, added to in place.
        q, k, v, scope, scale: as in `forward`.
        dout, out: `[G, B, n, c, h, Q, D]`; out is merged.
        lse: merged log-sum-exp `[G, B, n, c, h, Q]` in float64, +inf (not -inf) for rows without a key.
    """
    made: dict[tuple[int, ...], Tensor] = {}
    for part, index in _pieces(scope, k.shape, q.shape[-2]):
        keys, values = (_take(x[index], scope, index) for x in (k, v))
        for group in range(q.shape[0]):
            queries, douts, outs = (_take(x[group][index], scope, index) for x in (q, dout, out))
            logs = _take(lse[group][index].unsqueeze(-1), scope, index, convert=False).squeeze(-1) - scope.log_weight
            pieces: list[Tensor] = []
            for tile, kernel, bias, _ in _tiles(part, index, queries, keys, scope, made):
                rows, columns = (slice(None), slice(None), tile.queries), (slice(None), slice(None), tile.keys)
                block = (douts[rows], queries[rows], keys[columns], values[columns], outs[rows])
                dt, qt, kt, vt, ot = (x.to(kernel.dtype) for x in block)
                results = kernel.backward(dt, qt, kt, vt, ot, logs[rows], tile.diagonal == 0, bias, scale)
                if tile.whole:
                    pieces = list(results)
                    break
                if not pieces:
                    pieces = [torch.zeros_like(x, dtype=grads[0].dtype) for x in (queries, keys, values)]
                for piece, where, result in zip(pieces, (rows, columns, columns), results, strict=True):
                    piece[where] += result
            for target, piece in zip((grads[0][group], grads[1], grads[2]), pieces, strict=False):
                target[index].add_(_put_back(piece, scope, index))


# ---- pieces: a visit cut into kernel calls


def _pieces(scope: Scope, k_shape: torch.Size, q_rows: int) -> Iterator[tuple[Part, Index]]:
    """The pieces, one per kernel call: indices into `[B, n, c, h]` that leave two axes, and the part in which they lie."""
    batch, segments, residues, heads, k_rows, head_dim = k_shape
    items = max(1, PIECE // (max(q_rows, k_rows) * head_dim))
    for part in scope.sight.parts:
        ranges = [range(batch)[part.entries], range(segments)[part.segments], range(residues), range(heads)]
        inner = sorted(sorted(range(4), key=lambda axis: len(ranges[axis]))[2:])  # a call takes the two longest axes
        steps = [1, 1, 1, 1]
        steps[inner[1]] = len(ranges[inner[1]])
        room = max(items, 2 * torch.get_num_threads())  # the CPU kernel's backward is parallel over these axes only
        steps[inner[0]] = max(1, -(-room // steps[inner[1]]))
        starts = [r[::step] for r, step in zip(ranges, steps, strict=True)]
        for corner in itertools.product(*starts):
            yield (
                part,
                tuple(
                    slice(start, min(start + steps[axis], ranges[axis].stop)) if axis in inner else start
                    for axis, start in enumerate(corner)
                ),
            )


def _tiles(
    part: Part, index: Index, queries: Tensor, keys: Tensor, scope: Scope, made: dict[tuple[int, ...], Tensor]
) -> Iterator[tuple[Tile, DenseKernel, Tensor | None, Tensor | None]]:
    """The tiles of a piece, each with its kernel, the bias of its scores, and the query rows that see nothing."""
    for tile in part.tiles:
        plain = not tile.masked and scope.weights is None and tile.diagonal in (None, 0)
        kernel = scope.kernel if plain or scope.kernel.takes_bias else MatrixProducts(compute_dtype(queries.dtype))
        whole = Tile(slice(0, queries.shape[2]), slice(0, keys.shape[2]), tile.masked, tile.diagonal)
        tile = whole if tile.whole else tile
        for small in [tile] if kernel.max_scores is None else _cut(tile):
            bias, hidden = _bias(small, index, scope, kernel.dtype, queries.device, made)
            yield small._replace(whole=small[:2] == whole[:2]), kernel, bias, hidden


def _cut(tile: Tile) -> Iterator[Tile]:
    """A tile cut into smaller ones, without those above its diagonal."""
    first = tile.queries.start
    for i in range(first, tile.queries.stop, MATRIX_QUERIES):
        queries = slice(i, min(i + MATRIX_QUERIES, tile.queries.stop))
        for j in range(tile.keys.start, tile.keys.stop, MATRIX_KEYS):
            keys = slice(j, min(j + MATRIX_KEYS, tile.keys.stop))
            diagonal = None if tile.diagonal is None else tile.diagonal + (i - first) - (j - tile.keys.start)
            if diagonal is None or diagonal > -(queries.stop - i):
                yield Tile(queries, keys, tile.masked, diagonal)


def _bias(
    tile: Tile,
    index: Index,
    scope: Scope,
    dtype: torch.dtype,
    device: torch.device,
    made: dict[tuple[int, ...], Tensor],
) -> tuple[Tensor | None, Tensor | None]:
    hidden: Tensor | None = None
    sight = scope.sight
    if tile.masked:
        assert sight.key is not None and sight.low is not None and sight.high is not None
        key = _of_piece(sight.key, index)[:, :, tile.keys].unsqueeze(-2)
        low, high = (_of_piece(x, index)[:, :, tile.queries].unsqueeze(-1) for x in (sight.low, sight.high))
        hidden = (key < low) | (key > high)
    if tile.diagonal:
        shape = (tile.queries.stop - tile.queries.start, tile.keys.stop - tile.keys.start)
        hidden = torch.ones(shape, dtype=torch.bool, device=device).triu_(tile.diagonal + 1)[None, None]
    counts = None if scope.weights is None else _log_counts(scope.weights, tile, index, dtype, made)
    if hidden is None:
        return counts, None
    shape = torch.broadcast_shapes(hidden.shape, () if counts is None else counts.shape)
    bias = torch.zeros(shape, dtype=dtype, device=device) if counts is None else counts.expand(shape)
    return bias.masked_fill(hidden, float("-inf")), hidden.all(-1)


def _log_counts(
    weights: Weights, tile: Tile, index: Index, dtype: torch.dtype, made: dict[tuple[int, ...], Tensor]
) -> Tensor:
    """`[X or 1, Y or 1, Q, K]` for the pairs of a tile; cached in `made` where it is the same for all pieces."""
    place = (tile.queries.start, tile.queries.stop, tile.keys.start, tile.keys.stop)
    if place in made:
        return made[place]
    levels = _of_piece(weights.levels, index)[:, :, tile.queries]
    logs = _of_piece(weights.logs, index)[..., tile.keys].to(dtype)
    x, y, depth, keys = logs.shape
    start = torch.arange(0, x * y * depth, depth, device=logs.device).view(x, y, 1)
    result = logs.reshape(-1, keys).index_select(0, (levels + start).flatten()).view(x, y, -1, keys)
    if weights.levels.shape[:3] == (1, 1, 1):
        made[place] = result
    return result


def _of_piece(values: Tensor, index: Index) -> Tensor:
    """Per-row values `[B or 1, n, c, rows]` of a piece as `[.., .., rows]`, with size 1 along axes where they are equal."""
    chosen = list(index)
    for axis in (axis for axis in range(4) if axis == 3 or values.shape[axis] == 1):
        chosen[axis] = slice(0, 1) if isinstance(chosen[axis], slice) else 0
    return values.unsqueeze(3)[tuple(chosen)]


# ---- rows in the order that makes triangles


def _take(x: Tensor, scope: Scope, index: Index, convert: bool = True) -> Tensor:
    """Rows `[X, Y, rows, D]` of a piece in the order of its sight, in the dtype of its kernel."""
    if scope.sight.order is not None:
        x = _reorder(x, _of_piece(scope.sight.order, index))
    return x.to(scope.kernel.dtype) if convert else x


def _put_back(x: Tensor, scope: Scope, index: Index) -> Tensor:
    return x if scope.sight.inverse is None else _reorder(x, _of_piece(scope.sight.inverse, index))


def _reorder(x: Tensor, order: Tensor) -> Tensor:
    """`x [X, Y, rows, D]` with its rows in `order [X or 1, Y or 1, rows]`, each row read contiguously."""
    width = x.shape[-1]
    stride_x, stride_y, stride_rows, unit = x.stride()
    strides = (stride_x, stride_y, stride_rows)
    if unit != 1 or any(s % width for s in strides):
        x = x.contiguous()
        strides = x.stride()[:3]
    reach = sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=False)) // width + 1
    flat = x.as_strided((reach, width), (width, 1))
    rows = order * (strides[2] // width)
    for axis in range(2):
        steps = torch.arange(x.shape[axis], device=x.device) * (strides[axis] // width)
        rows = rows + steps.view(-1, *[1] * (2 - axis))
    return flat.index_select(0, rows.reshape(-1)).view(*rows.shape, width)
