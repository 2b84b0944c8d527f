# SPDX-License-Identifier: Apache-2.0
"""The Triton core: all local branches in one launch, the rows received in each hop in one more, on one device.

Nothing here knows of ranks: remote rows arrive as buffers, with lists of which rows may see which of them.

To check the kernels on a call, `rh.reference.compare(rh.dilated_attention, q, k, v, pattern, backend="triton", ...)` runs it
on them and by the definition in plain PyTorch, differentiated by autograd, and returns the errors of both.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ring_hilbert.kernels.tables import Walk
from ring_hilbert.kernels.tiles import Pass, Tile, device_tiles, plan_tile
from ring_hilbert.ops.core import BackwardState, ForwardState, Incoming, Shard
from ring_hilbert.ops.nesting import Chain, chains
from ring_hilbert.ops.pattern import DilatedPattern
from ring_hilbert.ops.remote_walk import RemoteWalks
from ring_hilbert.ops.visible import Intervals, Visible
from ring_hilbert.ops.walk import plan_rows
from ring_hilbert.ops.zero_keys import add_zero_keys

if TYPE_CHECKING:
    from ring_hilbert.kernels.launch import Output, RowTerms, Staging
    from ring_hilbert.kernels.tables import Schedule

KEPT_WALKS = 512  # for layers with offsets of their own: at most as many as there are rotations of the dilation rates
KEPT_BYTES = (
    2**31
)  # of all walks, beyond which those of unused lengths are evicted: slides come in any number of lengths
KEPT_SCHEDULES = 2**27  # bytes of all schedules, beyond which those of the cores least recently used are dropped

_walks: OrderedDict[Shard, dict[tuple[Any, ...], Walk]] = OrderedDict()
_schedules: WeakKeyDictionary[TritonCore, _Kept] = WeakKeyDictionary()


@dataclass
class _Forward(ForwardState):
    """State between the steps of a forward."""

    q: Tensor
    output: Output
    staging: Staging | None
    scale: float


@dataclass
class _Backward(BackwardState):
    """State between the steps of a backward; dq is in the dtype of q. `owes_keys`: dk and dv of the local rows are pending."""

    q: Tensor
    k: Tensor
    v: Tensor
    terms: RowTerms
    staging: Staging | None
    scale: float
    owes_keys: bool


_Planned = tuple[Tile, Hashable, Callable[[], "Schedule"]]


class _Kept(NamedTuple):
    """The schedules of a core since a refresh of its batch, and which of them each launch takes; by stream."""

    refreshed: int
    schedules: dict[Hashable, Schedule]
    calls: dict[Hashable, tuple[Tile, Schedule]]


class TritonCore:
    """Attention of the local rows of one sequence under one pattern, on one device.

    Args:
        pattern: the branches.
        num_kv_heads: Hkv of k and v.
        shard: the local rows.
        own: their intervals, int32 `[1 or B, S]` on the device.
        head_dim, dtype, device: of q, k and v.
        remote: the walks over received rows, if there are any.
        incoming: which of them are sent in this batch, hop by hop.
        tiles: used instead of those in the table.
        visible: what `own` is of. Schedules are kept until it is refreshed; without it, every launch makes its own.
        group: query heads per kv head, by which tiles are chosen.
    """

    def __init__(
        self,
        pattern: DilatedPattern,
        num_kv_heads: int,
        shard: Shard,
        own: Intervals,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        remote: RemoteWalks | None = None,
        incoming: Sequence[Incoming] = (),
        tiles: Mapping[Pass, Tile] | None = None,
        visible: Visible | None = None,
        group: int = 1,
    ) -> None:
        self.visible, self.group = visible, group
        self.exact = dtype == torch.float32  # float32 keeps the rounding error of lse
        self.own, self.remote, self.incoming, self.device = own, remote, incoming, device
        self.head_dim, self.dtype, self.tiles = head_dim, dtype, tiles
        self.chains, self.shift, self.shard = tuple(chains(pattern, num_kv_heads)), pattern.segment_shift, shard
        # If some rows are in no tile, results start as those of rows without a key.
        self.covers = any(r == 1 for _, r in pattern.branches)

    # ---- forward

    def begin(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> _Forward:
        """Attend to the local rows: `q [B, S, H, D]`, `k, v [B, S, Hkv, D]`; `scale` multiplies the scores."""
        from ring_hilbert.kernels import launch

        state = _Forward(q, launch.Output.allocate(q, self.exact, clear=not self.covers), self._staging(q), scale)
        if q.shape[1]:
            launch.forward(q, k, v, *self.schedule("forward"), scale, state.output, state.staging)
        return state

    def forward_hop(self, state: ForwardState, hop: int, received: Tensor) -> None:
        """Attend to the rows `received [rows, 2, D]`, K and V."""
        from ring_hilbert.kernels import launch

        assert isinstance(state, _Forward)
        if self.remote is not None and self.remote.hops[hop] and (len(received) or self._stage == "finish"):
            k, v = self._spread(received, state.q)
            launch.forward(
                state.q,
                k,
                v,
                *self._remote("forward", hop),
                state.scale,
                state.output,
                state.staging,
                stage=self._stage,
            )

    def finish(self, state: ForwardState, zero_keys: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """`out [B, S, H, D]`, `lse` and its rounding error `[B, H, S]` float32."""
        from ring_hilbert.kernels import launch

        assert isinstance(state, _Forward)
        if self._staged is not None and state.staging is not None:
            launch.finish_rows(state.output, state.staging, self._staged)
        out, lse, error = state.output
        if error is None:
            if zero_keys is not None:
                launch.add_zero_keys(out, lse, zero_keys)
            return out, lse, torch.zeros_like(lse)
        return (out, lse, error) if zero_keys is None else add_zero_keys(out, lse, error, zero_keys)

    # ---- backward

    def begin_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        lse_error: Tensor,
        scale: float,
        sums: torch.dtype,
        share: float,
    ) -> _Backward:
        """Begin the gradients of the local rows over themselves: all, or (`share < 1` and at most one hop) only that of q.

        The arguments are forward's and its results. dK and dV are summed in `sums`, the dtype of k or wider.
        """
        from ring_hilbert.kernels import launch

        terms = launch.row_terms(dout, out, lse, lse_error if self.exact else None)
        allocate = torch.empty if self.covers else torch.zeros
        dq = allocate(q.shape, dtype=q.dtype, device=q.device)
        dk, dv = (allocate(k.shape, dtype=sums, device=k.device) for _ in range(2))
        state = _Backward(dq, dk, dv, q, k, v, terms, self._staging(q), scale, share < 1 and len(self.incoming) <= 1)
        if q.shape[1]:
            launch.dq(q, k, v, terms, dq, *self.schedule("dq"), scale, state.staging)
        if not state.owes_keys:
            self._local_keys(state)
        return state

    def backward_hop(self, state: BackwardState, hop: int, received: Tensor) -> Tensor:
        """Add the part of rows `received [rows, 2, D]` to the gradient of q; return their own, float32 `[rows, 2, D]`."""
        from ring_hilbert.kernels import launch

        assert isinstance(state, _Backward)
        returned = torch.zeros(received.shape, dtype=torch.float32, device=received.device)
        if self.remote is not None and self.remote.hops[hop] and (len(received) or self._stage == "finish"):
            k, v = self._spread(received, state.q)
            q, terms, scale = state.q, state.terms, state.scale
            launch.dq(q, k, v, terms, state.dq, *self._remote("dq", hop), scale, state.staging, stage=self._stage)
            if len(received):
                launch.dkdv(q, k, v, terms, self._spread(returned, q), *self._remote("dkdv", hop), scale)
        return returned

    def rest_of_backward(self, state: BackwardState) -> None:
        """What `begin_backward` left."""
        from ring_hilbert.kernels import launch

        assert isinstance(state, _Backward)
        if state.owes_keys:
            self._local_keys(state)
        if self._staged is not None and state.staging is not None:
            launch.finish_gradient(state.dq, state.staging, self._staged, state.scale)

    def _local_keys(self, state: _Backward) -> None:
        from ring_hilbert.kernels import launch

        if state.q.shape[1]:
            gradients = state.dk, state.dv
            launch.dkdv(state.q, state.k, state.v, state.terms, gradients, *self.schedule("dkdv"), state.scale)

    # ---- schedules

    def schedule(self, pass_: Pass) -> tuple[Tile, Schedule]:
        """The tile and the schedule of the local rows over themselves."""
        from ring_hilbert.kernels.prune import prune

        def plan() -> _Planned:
            tile, walk = self.local_walk(pass_)
            key, low, high = self.own
            size, transposed = tile.block_inner, pass_ == "dkdv"

            def make() -> Schedule:
                return prune(walk, low, high, key, block_inner=size, transposed=transposed, entries=len(key))

            return tile, (id(walk), size, transposed), make

        return self._kept(pass_, plan)

    def _remote(self, pass_: Pass, hop: int) -> tuple[Tile, Schedule]:
        """The tile and the schedule of the local rows over those of a hop."""
        from ring_hilbert.kernels.prune import prune

        def plan() -> _Planned:
            assert self.remote is not None
            remote, incoming, transposed = self.remote, self.incoming[hop], pass_ == "dkdv"
            tile, walk = self._tile(pass_, lambda tile: remote.walk(hop, tile, transposed))

            def make() -> Schedule:
                rows, place = (walk.outer, walk.inner), incoming.place
                if place is not None:
                    rows = (place[walk.outer], walk.inner) if transposed else (walk.outer, place[walk.inner])
                return prune(
                    walk, self.own.low, self.own.high, incoming.key[None], block_inner=tile.block_inner, transposed=transposed,
                    rows=rows, places=incoming.packed_key[None],
                )  # fmt: skip

            return tile, (id(walk), tile.block_inner, transposed, hop), make

        return self._kept((pass_, hop), plan)

    def _kept(self, call: Hashable, plan: Callable[[], _Planned]) -> tuple[Tile, Schedule]:
        """The tile and the schedule of `call`, of which all layers of a batch share one, and passes with equal walks too.

        `plan` also returns what tells schedules apart; it may contain the id of a walk, which the schedule keeps. A CUDA graph
        makes its own schedules, since other intervals may be written in place before it is replayed. One made on another stream
        might not be finished.
        """
        cuda, visible = self.device.type == "cuda", self.visible
        if visible is None or visible.replayed or (cuda and torch.cuda.is_current_stream_capturing()):
            tile, _, make = plan()
            return tile, make()
        stream = torch.cuda.current_stream(self.device).cuda_stream if cuda else 0
        kept = _schedules.pop(self, None)
        if kept is None or kept.refreshed != visible.refreshed:
            kept = _Kept(visible.refreshed, {}, {})
        _schedules[self] = kept  # now the last
        if (call, stream) not in kept.calls:
            tile, key, make = plan()
            if (key, stream) not in kept.schedules:
                kept.schedules[key, stream] = make()
            kept.calls[call, stream] = tile, kept.schedules[key, stream]
            while len(_schedules) > 1 and _kept_bytes() > KEPT_SCHEDULES:
                del _schedules[next(iter(_schedules))]
        return kept.calls[call, stream]

    def local_walk(self, pass_: Pass) -> tuple[Tile, Walk]:
        """The tile and the walk of the local rows over themselves."""

        def plan(tile: Tile) -> Walk:
            return _local_walk(self.chains, self.shift, self.shard, tile.block_outer, tile.chunk, self.device)

        return self._tile(pass_, plan)

    def _tile(self, pass_: Pass, plan: Callable[[Tile], Walk]) -> tuple[Tile, Walk]:
        if self.tiles:
            return plan_tile((self.tiles[pass_],), plan)
        return plan_tile(device_tiles(pass_, self.head_dim, self.dtype, self.device, self.group), plan)

    @property
    def _staged(self) -> Tensor | None:
        return None if self.remote is None else self.remote.staged

    @property
    def _stage(self) -> str:
        """What a hop does with the rows that it resumes: a single hop finishes them."""
        return "pass on" if self._staged is not None else "finish"

    def _staging(self, q: Tensor) -> Staging | None:
        """Buffers for the rows that may see received ones, if there are any."""
        from ring_hilbert.kernels import launch

        return None if self.remote is None else launch.Staging.allocate(q, self.remote.slots, self.remote.number)

    def _spread(self, buffer: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """`buffer [rows, 2, D]` as k and v `[B, rows, Hkv, D]`: every batch entry and head reads its own rows."""
        assert self.remote is not None
        shape = (q.shape[0], buffer.shape[0], self.remote.num_kv_heads, buffer.shape[2])
        k, v = (buffer[:, i][None, :, None].expand(shape) for i in range(2))
        return k, v


def _kept_bytes() -> int:
    return sum(schedule.nbytes for kept in _schedules.values() for schedule in kept.schedules.values())


def _local_walk(
    of: tuple[Chain, ...], shift: int, shard: Shard, block_outer: int, chunk: int, device: torch.device
) -> Walk:
    """Made once, and cached until too many walks of other shards have been made since."""
    walks, key = _walks.setdefault(shard, {}), (of, shift, block_outer, chunk, device)
    _walks.move_to_end(shard)
    if key not in walks:
        rows, places = (torch.from_numpy(x).to(device) for x in (shard.rows(), shard.places()))
        walks[key] = plan_rows(of, shift, rows, places, block_outer=block_outer, chunk=chunk)
        if len(walks) > KEPT_WALKS:
            del walks[next(iter(walks))]
        while len(_walks) > 1 and sum(walk.nbytes for kept in _walks.values() for walk in kept.values()) > KEPT_BYTES:
            _walks.popitem(last=False)
    return walks[key]
