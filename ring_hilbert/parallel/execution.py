# SPDX-License-Identifier: Apache-2.0
"""Execution: one rank's part of a plan, bound to a device and a group, run forward and backward.

Local visits overlap the transfer of remote rows; the remote visits follow, hop by hop. Backward is the same list with the
roles exchanged.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from ring_hilbert.ops.core import BackwardState, Core, Shard
from ring_hilbert.ops.order import natural_places
from ring_hilbert.ops.remote_walk import RemoteWalks
from ring_hilbert.ops.sight import RowIntervals
from ring_hilbert.ops.torch_core import TorchCore
from ring_hilbert.ops.visible import HIDDEN, Intervals, Visible
from ring_hilbert.ops.zero_keys import count_zero_keys
from ring_hilbert.parallel.crossings import KEPT, Crossings
from ring_hilbert.parallel.exchange import Exchange
from ring_hilbert.parallel.plan import Plan
from ring_hilbert.parallel.remote import payload
from ring_hilbert.parallel.travel import HopTravel, hop_candidates, read_counts
from ring_hilbert.parallel.wire import Pending, communicator

_compiled: set[tuple[Any, ...]] = set()  # kinds of tensors whose kernels are


def span(name: str) -> AbstractContextManager:
    """A range in the traces of a profiler; without one nothing, since to enter a range takes as long as a launch."""
    return record_function(name) if torch.autograd.profiler._is_profiler_enabled else nullcontext()


class Execution:
    """Runs one rank's part of a plan, an exchange or a ring, on local tensors.

    Args:
        plan: the plan of the whole sequence.
        rank: this rank within `group`.
        group: the process group; None if there is one rank.
        device: of q, k, v.
        backend: "torch" or "triton", one that can run the plan's shapes on `device`.
        travels: what each hop sends in this batch, its counts read; None: find out, which reads from the device.
    """

    def __init__(
        self, plan: Plan, rank: int, group: dist.ProcessGroup | None, device: torch.device, backend: str = "torch",
        travels: Sequence[HopTravel] | None = None,
    ) -> None:  # fmt: skip
        self.plan, self.shard = plan, Shard(plan.layout.chunks(rank), plan.layout.seq_len, plan.visible.order)
        self.rank, self.hops = rank, plan.hops(rank)
        if travels is None:
            travels = travels_of(plan, rank, device)
            read_counts([shipment for travel in travels for shipment in (travel.received, travel.sent)])
        self.exchanges: list[Exchange] = []
        if group is not None and self.hops:
            own, together = communicator(group), plan.strategy == "exchange"
            self.exchanges = [Exchange(travel, own, together=together) for travel in travels]
        self.incoming, self.backend = [travel.incoming() for travel in travels], backend
        if backend == "triton":
            self.core: Core = self._triton_core(device, plan.visible)
        else:
            self.core = self._torch_core(device)
        self.zero_keys: Tensor | None = None
        if plan.pattern.zero_keys and not plan.visible.causal:
            rows = torch.from_numpy(self.shard.rows()).to(device)
            self.zero_keys = count_zero_keys(plan.pattern, rows, self.shard.seq_len, plan.shapes.num_kv_heads)

    def _torch_core(self, device: torch.device) -> Core:
        plan, own = self.plan, None
        if not plan.visible.by_row_alone:
            entries = [plan.visible.of(self.shard.rows(), entry) for entry in range(plan.visible.batch_size)]
            own = RowIntervals(*(np.stack(x) for x in zip(*entries, strict=True)))
        on_host = [arriving.on(torch.device("cpu")) for arriving in self.incoming]
        visits = [hop.hop.visits for hop in self.hops]
        return TorchCore(plan.local(self.rank), own, plan.shapes.head_dim, plan.shapes.dtype, device, visits, on_host)

    def _triton_core(self, device: torch.device, keeping: Visible | None) -> Core:
        """`keeping`: whose schedules it keeps."""
        from ring_hilbert.ops.triton_core import TritonCore

        plan, shapes, rank = self.plan, self.plan.shapes, self.rank
        own = Intervals(*(plan.layout.cut(rank, x) for x in plan.visible.on(device)))
        remote = remote_walks(plan.crossings, rank, plan.strategy == "ring", self.shard, device) if self.hops else None
        return TritonCore(
            plan.pattern, shapes.num_kv_heads, self.shard, own, shapes.head_dim, shapes.dtype, device, remote, self.incoming,
            visible=keeping, group=shapes.num_heads // shapes.num_kv_heads,
        )  # fmt: skip

    def _clean(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """K and V with padding rows zeroed: a weight of 0 times NaN is NaN."""
        visible = self.plan.visible
        if not visible.padded:
            return tensors
        padding = self.plan.layout.cut(self.rank, visible.on(tensors[0].device).key) == HIDDEN
        return tuple(x.masked_fill(padding[:, :, None, None], 0.0) for x in tensors)

    def compile_ahead(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        """Compile all kernels that forward and backward start, unless that was done for tensors like these.

        They run as in a step, on rows that nobody sent, and start nothing.
        """
        received = [sum(exchange.received.values()) for exchange in self.exchanges]
        kind = q.dtype, q.device, q.shape[2:], k.shape[2], *map(bool, received)
        if self.backend != "triton" or kind in _compiled or not q.is_cuda or torch.cuda.is_current_stream_capturing():
            return
        _compiled.add(kind)
        from ring_hilbert.kernels.starting import compiling

        try:
            with compiling():
                self._rehearse(q, k, v, scale, [q.new_empty(n, 2, q.shape[3]) for n in received])
        except Exception as error:  # what only saves time does not stop a run: memory may do for a step without this
            warnings.warn(f"ring_hilbert: kernels compile one after another, since together: {error}", stacklevel=2)

    def _rehearse(self, q: Tensor, k: Tensor, v: Tensor, scale: float, received: Sequence[Tensor]) -> None:
        core = self._triton_core(q.device, None)
        state = core.begin(q, k, v, scale)
        for hop, rows in enumerate(received):
            core.forward_hop(state, hop, rows)
        out, lse, lse_error = core.finish(state, self.zero_keys)
        gradients = core.begin_backward(q, q, k, v, out, lse, lse_error, scale, self._sums(k.dtype), 1.0)
        for hop, rows in enumerate(received):
            core.backward_hop(gradients, hop, rows)
        core.rest_of_backward(gradients)

    def _sums(self, dtype: torch.dtype, wide: bool = False) -> torch.dtype:
        """In which dK and dV are summed: rows with shares of many ranks collect a rounding error from each, unless it is wider."""
        if not self.exchanges and not wide:
            return dtype
        return torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, name: str = "", *, keep: bool = False, lse: bool = True
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Attend.

        Args:
            q, k, v: `[B, S_local, H or Hkv, D]`.
            scale: factor on the scores.
            name: of the layer, for errors.
            keep: return the received rows, so that backward need not fetch them again.
            lse: whether lse will be read; an exchange computes it anyway.

        Returns:
            `out [B, S_local, H, D]` in the dtype of q; `lse` and its rounding error `lse_error`, `[B, H, S_local]`, float32 or
            float64; and what is kept, bytes `[n]`.
        """
        del lse
        core, kept = self.core, []
        k, v = self._clean(k, v)
        pending = self._fetch(0, k, v, name)
        with span("ring_hilbert: local forward"):
            state = core.begin(q, k, v, scale)
        for i in range(len(self.exchanges)):
            assert pending is not None
            with span("ring_hilbert: wait"):
                rows = pending.wait()
            pending = self._fetch(i + 1, k, v, name)
            with span("ring_hilbert: remote forward"):
                core.forward_hop(state, i, rows)
            if keep:
                kept.append(rows.view(torch.uint8).flatten())
        result = core.finish(state, self.zero_keys)
        return *result, torch.cat(kept) if kept else q.new_empty(0, dtype=torch.uint8)

    def backward(
        self, dout: Tensor, saved: Sequence[Tensor], scale: float, name: str = "", *, wide: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients.

        Args:
            dout: `[B, S_local, H, D]`.
            saved: q, k, v and the results of `forward`; if rows were not kept, K and V are fetched again, overlapped with
                local visits.
            scale, name: as in `forward`.
            wide: return dK and dV as they were summed, in float32 or float64.

        Returns:
            `dq, dk, dv` in the dtype and shape of `q, k, v`.
        """
        q, k, v, out, lse, lse_error, *kept = saved
        k, v = self._clean(k, v)
        sums = self._sums(k.dtype, wide)
        core, hops = self.core, len(self.exchanges)
        arrived = self._unpack(kept[0], k) if kept else None
        pending = None if arrived else self._fetch(0, k, v, name)
        item = k.dtype.itemsize  # the fetch overlaps that share of the local visits, the return of gradients the rest
        share = 1.0 if not hops else 0.0 if arrived else item / (item + max(4, item))
        with span("ring_hilbert: local backward"):
            state = core.begin_backward(dout, q, k, v, out, lse, lse_error, scale, sums, share)
        returning: tuple[Exchange, Pending] | None = None
        for i, exchange in enumerate(self.exchanges):
            if arrived is not None:
                rows = arrived[i]
            else:
                assert pending is not None
                with span("ring_hilbert: wait"):
                    rows = pending.wait()
                pending = self._fetch(i + 1, k, v, name) if self._follows(i + 1) else None
            with span("ring_hilbert: remote backward"):
                gradients = core.backward_hop(state, i, rows)
            self._add(returning, state)
            returning = exchange, exchange.give_back(gradients, name)
            if arrived is None and pending is None:
                pending = self._fetch(i + 1, k, v, name)
        with span("ring_hilbert: local backward"):
            core.rest_of_backward(state)
        self._add(returning, state)
        keys = sums if wide else k.dtype
        return state.dq.to(q.dtype), state.dk.to(keys), state.dv.to(keys)

    def _fetch(self, hop: int, k: Tensor, v: Tensor, name: str) -> Pending | None:
        return self.exchanges[hop].fetch(k, v, name) if hop < len(self.exchanges) else None

    def _follows(self, hop: int) -> bool:
        """Whether a hop directly follows the one before, so that its rows may be sent before the gradients of that one.

        Two ranks that fetch from each other, at distances `d` and `P - d`, must send and receive in one order: a rank
        without an intermediate hop leaves its place empty.
        """
        hops = [candidates.hop for candidates in self.hops]
        return hop < len(hops) and hops[hop].distance == hops[hop - 1].distance + 1

    def _add(self, returning: tuple[Exchange, Pending] | None, state: BackwardState) -> None:
        if returning is not None:
            exchange, pending = returning
            with span("ring_hilbert: wait"):
                rows = pending.wait()
            exchange.add(rows, state.dk, state.dv)

    def _unpack(self, kept: Tensor, k: Tensor) -> list[Tensor]:
        """The received rows of every hop `[rows, 2, D]`."""
        rows = kept.view(k.dtype).view(-1, 2, k.shape[-1])
        return list(rows.split([sum(exchange.received.values()) for exchange in self.exchanges]))


def travels_of(plan: Plan, rank: int, device: torch.device) -> list[HopTravel]:
    """What is sent to and by a rank in every hop, except the counts, which `read_counts` reads."""
    return [hop.in_batch(plan.visible, device, plan.all_travel) for hop in plan.hops(rank)]


@lru_cache(maxsize=KEPT)
def remote_walks(crossings: Crossings, rank: int, ring: bool, shard: Shard, device: torch.device) -> RemoteWalks | None:
    """The walks over received rows, the same object for the same arguments; None if nothing is visited."""
    hops = hop_candidates(crossings, rank, ring=ring)
    places = [
        natural_places(payload(hop.received, crossings.batch_size)[1], shard.seq_len, shard.order) for hop in hops
    ]
    walks = RemoteWalks([hop.hop.visits for hop in hops], places, shard, crossings.num_kv_heads, device)
    return walks if walks.number else None
