# SPDX-License-Identifier: Apache-2.0
"""Execution: one rank's part of a plan, bound to a device and a group, run forward and backward.

Local visits run while remote rows travel; the remote visits follow, hop by hop. Backward is the same list with the roles
exchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from ring_hilbert.parallel.cores import TorchVisits, TritonVisits, own_facts
from ring_hilbert.parallel.exchange import Exchange
from ring_hilbert.parallel.plan import Plan
from ring_hilbert.parallel.wire import Pending, communicator


class Execution:
    """Runs `plan.rank(rank)`, an exchange or a ring, on local tensors.

    Args:
        plan: the plan of the whole sequence.
        rank: this rank within `group`.
        group: the process group; None if there is one rank.
        device: of q, k, v.
        backend: "torch" or "triton", one that can run the plan's shapes on `device`.
    """

    def __init__(
        self, plan: Plan, rank: int, group: dist.ProcessGroup | None, device: torch.device, backend: str = "torch"
    ) -> None:
        self.plan, self.part = plan, plan.rank(rank)
        self.exchanges: list[Exchange] = []
        if group is not None and self.part.hops:
            own, together = communicator(group), plan.strategy == "exchange"
            self.exchanges = [Exchange(hop, self.part, own, device, together=together) for hop in self.part.hops]
        core = TritonVisits if backend == "triton" else TorchVisits
        self.core: Any = core(self.part, plan, own_facts(plan, rank), device)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, name: str = "", *, keep: bool = False, lse: bool = True
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Attend.

        Args:
            q, k, v: `[B, S_local, H or Hkv, D]`.
            scale: of the scores.
            name: of the layer, for errors.
            keep: return the received rows, so that backward need not fetch them again.
            lse: whether lse will be read; an exchange has it anyway.

        Returns:
            `out [B, S_local, H, D]` in the dtype of q; `lse` and its rounding `residue` `[B, H, S_local]`, float32 or float64;
            and what is kept, bytes `[n]`.
        """
        del lse
        core, kept = self.core, []
        pending = self._fetch(0, k, v, name)
        with record_function("ring_hilbert: local forward"):
            state = core.begin(q, k, v, scale)
        for i in range(len(self.exchanges)):
            assert pending is not None
            with record_function("ring_hilbert: wait"):
                rows = pending.wait()
            pending = self._fetch(i + 1, k, v, name)
            with record_function("ring_hilbert: remote forward"):
                core.forward_hop(state, i, rows)
            if keep:
                kept.append(rows.view(torch.uint8).flatten())
        return *core.finish(state), torch.cat(kept) if kept else q.new_empty(0, dtype=torch.uint8)

    def backward(
        self, dout: Tensor, saved: Sequence[Tensor], scale: float, name: str = "", *, wide: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients.

        Args:
            dout: `[B, S_local, H, D]`.
            saved: q, k, v and the results of `forward`, without what was not kept: then K and V rows are fetched again,
                behind local visits.
            scale, name: as in `forward`.
            wide: return dK and dV as they were summed, in float32 or float64.

        Returns:
            `dq, dk, dv` in the dtype and shape of `q, k, v`.
        """
        q, k, v, out, lse, residue, *kept = saved
        sums = k.dtype
        if self.exchanges or wide:
            # Rows that gather shares from many ranks gather a rounding from each, unless the sum has room.
            sums = torch.float64 if k.dtype in (torch.float32, torch.float64) else torch.float32
        core, hops = self.core, len(self.exchanges)
        arrived = self._unpack(kept[0], k) if kept else None
        pending = None if arrived else self._fetch(0, k, v, name)
        item = (
            k.dtype.itemsize
        )  # what is fetched travels behind that share of the local visits, what returns behind the rest
        share = 1.0 if not hops else 0.0 if arrived else item / (item + max(4, item))
        with record_function("ring_hilbert: local backward"):
            state = core.begin_backward(dout, q, k, v, out, lse, residue, scale, sums, share)
        returning: tuple[Exchange, Pending] | None = None
        for i, exchange in enumerate(self.exchanges):
            if arrived is not None:
                rows = arrived[i]
            else:
                assert pending is not None
                with record_function("ring_hilbert: wait"):
                    rows = pending.wait()
                pending = self._fetch(i + 1, k, v, name) if self._follows(i + 1) else None
            with record_function("ring_hilbert: remote backward"):
                gradients = core.backward_hop(state, i, rows)
            self._add(returning, state)
            returning = exchange, exchange.give_back(gradients, name)
            if arrived is None and pending is None:
                pending = self._fetch(i + 1, k, v, name)
        with record_function("ring_hilbert: local backward"):
            core.rest_of_backward(state)
        self._add(returning, state)
        keys = sums if wide else k.dtype
        return state.dq.to(q.dtype), state.dk.to(keys), state.dv.to(keys)

    def _fetch(self, hop: int, k: Tensor, v: Tensor, name: str) -> Pending | None:
        return self.exchanges[hop].fetch(k, v, name) if hop < len(self.exchanges) else None

    def _follows(self, hop: int) -> bool:
        """Whether a hop comes right after the one before, so that its rows may set out before the gradients of that one.

        Two ranks that fetch from each other, at distances `d` and `P - d`, must send and receive in one order: a rank
        without a hop between keeps the place of that hop.
        """
        hops = self.part.hops
        return hop < len(hops) and hops[hop].distance == hops[hop - 1].distance + 1

    def _add(self, returning: tuple[Exchange, Pending] | None, state: Any) -> None:
        if returning is not None:
            exchange, pending = returning
            with record_function("ring_hilbert: wait"):
                rows = pending.wait()
            exchange.add(rows, state.dk, state.dv)

    def _unpack(self, kept: Tensor, k: Tensor) -> list[Tensor]:
        """The received rows of every hop `[rows, 2, D]`."""
        rows = kept.view(k.dtype).view(-1, 2, k.shape[-1])
        return list(rows.split([sum(exchange.received.values()) for exchange in self.exchanges]))
