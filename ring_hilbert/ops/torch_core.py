# SPDX-License-Identifier: Apache-2.0
"""The torch core: one partial attention, forward and backward, in tiles of bounded size.

Works on any device and dtype PyTorch multiplies matrices in. Low precision is computed in float32. Nothing here knows of
patterns or ranks: a visit arrives as strided views.

Shapes: `B` batch, `n` segments, `h` kv heads, `G` query heads per kv head, `Q` query rows, `K` key rows, `D` head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ring_hilbert.ops.merge import RunningSoftmax

TILE_QUERIES, TILE_KEYS = 256, 1024
TILE_SCORES = 1 << 20  # scores in flight: 4 MiB of float32, whatever the sequence length


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64, everything else is computed and merged in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class RowFacts(NamedTuple):
    """What masks look at, for one side of a visit: integer `[B or 1, n, rows]` tensors, None where not needed."""

    positions: Tensor | None
    documents: Tensor | None


NO_FACTS = RowFacts(None, None)


@dataclass(frozen=True)
class VisitMask:
    """Which keys a query of the visit sees.

    `triangle`: query row `j` sees the key rows `<= j` (a causal self visit in row order). `queries` / `keys`: rows see
    each other where `key position <= query position` and the documents are equal and not -1, as far as given.
    """

    triangle: bool = False
    queries: RowFacts = NO_FACTS
    keys: RowFacts = NO_FACTS

    def hidden(self, tile: Tile, device: torch.device) -> Tensor | None:
        """The hidden pairs of a tile as bool `[B or 1, n, 1, 1, Q, K]` (sizes 1 broadcast); None if there are none."""
        hidden: list[Tensor] = []
        if self.triangle and tile.keys.stop > tile.queries.start + 1:
            rows = torch.arange(tile.queries.start, tile.queries.stop, device=device)
            columns = torch.arange(tile.keys.start, tile.keys.stop, device=device)
            hidden.append((columns > rows[:, None])[None, None])
        if self.queries.positions is not None and self.keys.positions is not None:
            rows, columns = self._cut(tile, self.queries.positions, self.keys.positions)
            hidden.append(columns > rows)
        if self.queries.documents is not None and self.keys.documents is not None:
            rows, columns = self._cut(tile, self.queries.documents, self.keys.documents)
            hidden.append((columns != rows) | (columns == -1))
        if not hidden:
            return None
        result = hidden[0]
        for other in hidden[1:]:
            result = result | other
        return result[:, :, None, None]

    @staticmethod
    def _cut(tile: Tile, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        return queries[:, tile.segments, tile.queries, None], keys[:, tile.segments, None, tile.keys]


class Tile(NamedTuple):
    """A block of segments x kv heads x query rows x key rows."""

    segments: slice
    heads: slice
    queries: slice
    keys: slice


def tiles(batch: int, n: int, heads: int, group: int, q_rows: int, k_rows: int, triangle: bool) -> Iterator[Tile]:
    """Cut a visit into tiles of at most `TILE_SCORES` scores where that is possible, skipping those above the diagonal."""
    q_step, k_step = min(q_rows, TILE_QUERIES), min(k_rows, TILE_KEYS)
    room = max(1, TILE_SCORES // (batch * group * q_step * k_step))
    h_step = min(heads, room)
    n_step = max(1, room // h_step)
    for s in range(0, n, n_step):
        for h in range(0, heads, h_step):
            for i in range(0, q_rows, q_step):
                i_stop = min(i + q_step, q_rows)
                k_stop = min(k_rows, i_stop) if triangle else k_rows
                for j in range(0, k_stop, k_step):
                    yield Tile(
                        slice(s, min(s + n_step, n)),
                        slice(h, min(h + h_step, heads)),
                        slice(i, i_stop),
                        slice(j, min(j + k_step, k_stop)),
                    )


def _fold(x: Tensor, tile: Tile, dtype: torch.dtype) -> Tensor:
    """The tile's query rows of `x [B, n, h, G, Q, D]` as `[B, n, h, G * Q, D]` in `dtype`."""
    return x[:, tile.segments, tile.heads, :, tile.queries].to(dtype).flatten(3, 4)


def _keys(x: Tensor, tile: Tile, dtype: torch.dtype) -> Tensor:
    return x[:, tile.segments, tile.heads, tile.keys].to(dtype)


def _scores(q: Tensor, k: Tensor, scale: float, mask: VisitMask, tile: Tile, group: int) -> Tensor:
    """Scores `[B, n, h, G * Q, K]` of a tile, -inf where hidden."""
    scores = (q @ k.transpose(-1, -2)).mul_(scale)
    hidden = mask.hidden(tile, q.device)
    if hidden is not None:
        scores.unflatten(3, (group, -1)).masked_fill_(hidden, float("-inf"))
    return scores


def _tiles_of(q: Tensor, k: Tensor, mask: VisitMask) -> Iterator[Tile]:
    batch, n, heads, group, q_rows, _ = q.shape
    return tiles(batch, n, heads, group, q_rows, k.shape[3], mask.triangle)


def forward(state: RunningSoftmax, q: Tensor, k: Tensor, v: Tensor, mask: VisitMask, scale: float) -> None:
    """Merge a visit into `state`.

    Args:
        state: views `[B, n, h, G, Q]` (values `[B, n, h, G, Q, D]`) of float32 or float64 tensors, updated in place.
        q: `[B, n, h, G, Q, D]`.
        k, v: `[B, n, h, K, D]`.
        mask: which pairs count.
        scale: factor of the scores.
    """
    dtype = state.values.dtype
    for tile in _tiles_of(q, k, mask):
        group, rows = q.shape[3], (slice(None), tile.segments, tile.heads, slice(None), tile.queries)
        scores = _scores(_fold(q, tile, dtype), _keys(k, tile, dtype), scale, mask, tile, group)
        part = RunningSoftmax(state.maximum[rows], state.total[rows], state.values[rows])
        part.add(scores, _keys(v, tile, dtype))


def backward(
    grads: tuple[Tensor, Tensor, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    mask: VisitMask,
    scale: float,
) -> None:
    """Add a visit's share of the gradient of the *merged* softmax.

    Args:
        grads: `dq [B, n, h, G, Q, D]`, `dk`, `dv [B, n, h, K, D]`: float32 or float64 views, added to in place.
        q, k, v, mask, scale: as in `forward`.
        dout: `[B, n, h, G, Q, D]`.
        lse: merged log-sum-exp `[B, n, h, G, Q]`, +inf (not -inf) for rows without a key.
        delta: `rowsum(dout * out)` `[B, n, h, G, Q]`.
    """
    dq, dk, dv = grads
    group, dtype = q.shape[3], dq.dtype
    for tile in _tiles_of(q, k, mask):
        rows = (slice(None), tile.segments, tile.heads, slice(None), tile.queries)
        keys = (slice(None), tile.segments, tile.heads, tile.keys)
        qt, kt, vt, dout_t = (
            _fold(q, tile, dtype),
            _keys(k, tile, dtype),
            _keys(v, tile, dtype),
            _fold(dout, tile, dtype),
        )
        weights = _scores(qt, kt, scale, mask, tile, group).sub_(lse[rows].flatten(3, 4).unsqueeze(-1)).exp_()
        dv[keys].add_(weights.transpose(-1, -2) @ dout_t)
        dscores = (
            (dout_t @ vt.transpose(-1, -2)).sub_(delta[rows].flatten(3, 4).unsqueeze(-1)).mul_(weights).mul_(scale)
        )
        dk[keys].add_(dscores.transpose(-1, -2) @ qt)
        dq[rows].add_((dscores @ kt).unflatten(3, (group, -1)))
