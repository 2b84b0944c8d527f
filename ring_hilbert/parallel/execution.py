# SPDX-License-Identifier: Apache-2.0
"""Execution: one rank's part of a plan, bound to a device and a group, run forward and backward.

Local visits run while remote rows travel; the remote visits follow. Backward is the same list with the roles exchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ring_hilbert.ops import torch_core
from ring_hilbert.ops.dense import DenseKernel, dense_kernel
from ring_hilbert.ops.merge import RunningSoftmax
from ring_hilbert.ops.sight import RowFacts, clear_sight, sight
from ring_hilbert.ops.torch_core import Scope, Weights
from ring_hilbert.ops.triton_core import Facts as WalkFacts
from ring_hilbert.ops.triton_core import Remote, RemoteVisit, TritonCore
from ring_hilbert.ops.visits import Visit
from ring_hilbert.parallel.exchange import Exchange
from ring_hilbert.parallel.facts import PADDING
from ring_hilbert.parallel.plan import Plan, RankPlan
from ring_hilbert.parallel.remote import RemoteVisit as ReceivedVisit

Buffer = Callable[[], Tensor] | None


class Execution:
    """Runs `plan.rank(rank)` on local tensors.

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
        self.exchange = (
            Exchange(self.part, group, device) if group is not None and plan.crossings.communicates else None
        )
        own = _own_facts(plan, rank)
        self.core: TorchVisits | TritonCore
        if backend == "triton":
            self.core = _triton_core(self.part, plan, own, device)
        else:
            self.core = TorchVisits(self.part, plan, own, device)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, name: str = "") -> tuple[Tensor, Tensor, Tensor]:
        """`out [B, S_local, H, D]` in the dtype of q; `lse` and its rounding `residue` `[B, H, S_local]`, float32 or float64."""
        pending = self.exchange.fetch(k, v, name) if self.exchange else None
        return self.core.forward(q, k, v, scale, pending and pending.wait)

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        residue: Tensor,
        scale: float,
        name: str = "",
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`dq, dk, dv` in the dtype and shape of `q, k, v`. K and V rows are fetched again, behind the local visits."""
        pending = self.exchange.fetch(k, v, name) if self.exchange else None
        sums = k.dtype
        if (
            self.exchange
        ):  # rows that gather shares from many ranks gather a rounding from each, unless the sum has room
            sums = torch.float64 if k.dtype in (torch.float32, torch.float64) else torch.float32
        dq, dk, dv, returned = self.core.backward(
            dout, q, k, v, out, lse, residue, scale, sums, pending and pending.wait
        )
        if self.exchange is not None and returned is not None:
            self.exchange.add(self.exchange.give_back(returned, name).wait(), dk, dv)
        return dq.to(k.dtype), dk.to(k.dtype), dv.to(k.dtype)


class TorchVisits:
    """The visits of a rank through the torch core, one after the other."""

    def __init__(self, part: RankPlan, plan: Plan, own: RowFacts, device: torch.device) -> None:
        kernel = dense_kernel(device, plan.shapes.dtype, plan.shapes.head_dim)
        self.local = [(visit, _local_scope(visit, plan, own, kernel, device)) for visit in part.local]
        opening = [scope for _, scope in self.local if scope.opens_queries]
        self.opens_queries = bool(opening) and all(scope.sight.covers for scope in opening)
        self.opens_keys = self.opens_queries and all(scope.opens_keys for scope in opening)
        self.local = [
            (
                visit,
                replace(
                    scope,
                    opens_queries=scope.opens_queries and self.opens_queries,
                    opens_keys=scope.opens_keys and self.opens_keys,
                ),
            )
            for visit, scope in self.local
        ]
        self.remote = [_BoundVisit(visit, plan, own, kernel, device) for visit in part.remote]

    # ---- forward

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, buffer: Buffer) -> tuple[Tensor, Tensor, Tensor]:
        """`out`, `lse` and `residue`; `buffer` waits for the received rows and is asked after the local visits."""
        dtype, kv_heads = torch_core.compute_dtype(q.dtype), k.shape[2]
        out = torch.empty(q.shape, dtype=dtype, device=q.device)
        state = RunningSoftmax(out.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float64), out)
        if not self.opens_queries:
            state.clear()
        q, logs, outs = _grouped(q, kv_heads), _grouped(state.lse.transpose(1, 2), kv_heads), _grouped(out, kv_heads)

        for visit, scope in self.local:
            rows = RunningSoftmax(_queries(logs, visit), _queries(outs, visit))
            torch_core.forward(
                rows, _queries(q, visit), visit.view(k, visit.keys), visit.view(v, visit.keys), scope, scale
            )
        if buffer is not None:
            arena = _with_blank_row(buffer())
            for bound in self.remote:
                rows = RunningSoftmax(_queries(logs, bound.visit), _queries(outs, bound.visit))
                torch_core.forward(rows, _queries(q, bound.visit), *bound.rows_of(arena), bound.scope, scale)
        return out.to(k.dtype), *state.logarithms(dtype)

    # ---- backward

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        residue: Tensor,
        scale: float,
        sums: torch.dtype,
        buffer: Buffer,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """`dq, dk, dv` and the gradient of the received rows `[rows, 2, D]`, all in float32 or float64."""
        dtype, kv_heads = torch_core.compute_dtype(q.dtype), k.shape[2]
        exact = lse.double() + residue
        exact = exact.masked_fill(lse == float("-inf"), float("inf"))  # no key, no gradient
        fresh_q = torch.empty if self.opens_queries else torch.zeros
        fresh_k = torch.empty if self.opens_keys else torch.zeros
        dq = fresh_q(q.shape, dtype=dtype, device=q.device)
        sums = torch_core.compute_dtype(sums)
        dk, dv = (fresh_k(k.shape, dtype=sums, device=k.device) for _ in range(2))
        q, dout, out, dq_grouped, exact = (_grouped(x, kv_heads) for x in (q, dout, out, dq, exact.transpose(1, 2)))

        def add(visit: Visit, scope: Scope, keys: tuple[Tensor, Tensor], dkeys: tuple[Tensor, Tensor]) -> None:
            q_rows, dout_rows, out_rows, lse_rows = (_queries(x, visit) for x in (q, dout, out, exact))
            grads = (_queries(dq_grouped, visit), *dkeys)
            torch_core.backward(grads, q_rows, *keys, dout_rows, out_rows, lse_rows, scope, scale)

        for visit, scope in self.local:
            k_rows, v_rows, dk_rows, dv_rows = (visit.view(x, visit.keys) for x in (k, v, dk, dv))
            add(visit, scope, (k_rows, v_rows), (dk_rows, dv_rows))
        returned: Tensor | None = None
        if buffer is not None:
            arena = _with_blank_row(buffer())
            darena = torch.zeros(arena.shape, dtype=sums, device=arena.device)
            for bound in self.remote:
                keys = bound.rows_of(arena)
                dkr, dvr = (torch.zeros(x.shape, dtype=sums, device=x.device) for x in keys)
                add(bound.visit, bound.scope, keys, (dkr, dvr))
                bound.add_to(darena, dkr, dvr)
            returned = darena[:-1].to(dtype)
        return dq, dk, dv, returned


class _BoundVisit:
    """A remote visit with its index tensors on a device."""

    def __init__(
        self, remote: ReceivedVisit, plan: Plan, own: RowFacts, kernel: DenseKernel, device: torch.device
    ) -> None:
        self.visit = Visit(remote.heads, remote.queries, remote.queries)
        self.arena = torch.from_numpy(remote.arena).to(device)
        seen = clear_sight(remote.queries.count, triangle=False)
        if remote.masked:
            seen = sight(_cut(own, self.visit.rows(remote.queries)), _key_facts(remote.keys, plan), False, device)
        self.scope = Scope(kernel, seen)

    def rows_of(self, arena: Tensor) -> tuple[Tensor, Tensor]:
        """The visit's K and V as `[B, 1, 1, h, K, D]`."""
        kv = arena[self.arena][:, None, None]
        return kv[..., 0, :], kv[..., 1, :]

    def add_to(self, darena: Tensor, dk: Tensor, dv: Tensor) -> None:
        """Add gradients `[B, 1, 1, h, K, D]` to the buffer; its rows are distinct within a visit (padding is the blank row)."""
        darena[self.arena] += torch.stack((dk, dv), dim=-2)[:, 0, 0]


def _triton_core(part: RankPlan, plan: Plan, own: RowFacts, device: torch.device) -> TritonCore:
    """The kernels for the rows of a rank."""
    shapes, facts = plan.shapes, plan.facts
    rows = np.concatenate([np.arange(c.start, c.stop) for c in part.chunks] or [np.empty(0, np.int64)])
    received = sum(block.size for blocks in part.received for block in blocks)
    keys = WalkFacts(
        np.zeros((1, received), np.int64) if facts.causal else None,
        None if facts.documents is None else np.full((1, received), PADDING),
    )
    visits = []
    for visit in part.remote:
        heads = visit.heads.indices
        visits.append(RemoteVisit(heads, visit.queries.indices()[0], visit.arena))
        known = _key_facts(visit.keys, plan)
        for entry, places in enumerate(visit.arena):
            for values, found in zip(keys, known, strict=True):
                if values is not None and found is not None:
                    column = found[min(entry, len(found) - 1), 0, 0]
                    there = places >= 0
                    values[0, places[there]] = np.broadcast_to(column, places.shape)[there]
    queries = WalkFacts(*own)
    if facts.by_row_alone:
        queries = keys = WalkFacts()
    local = queries._replace(positions=None) if facts.row_causal else queries
    return TritonCore(
        plan.pattern, shapes.num_kv_heads, rows, local, facts.causal, shapes.head_dim, shapes.dtype, device,
        Remote(visits, queries, keys),
    )  # fmt: skip


def _own_facts(plan: Plan, rank: int) -> RowFacts:
    """Positions and documents `[B or 1, S_local]` of the rows of `rank`, as far as they decide anything."""
    facts = plan.facts
    rows = np.concatenate([np.arange(c.start, c.stop) for c in plan.layout.chunks(rank)] or [np.empty(0, np.int64)])
    positions = None
    if facts.causal and not facts.row_causal:
        positions = np.stack([facts.positions_of(rows, e) for e in plan.crossings.entries])
    elif facts.causal:  # rows of this rank may also be compared to those of others
        positions = rows[None]
    return RowFacts(positions, None if facts.documents is None else facts.documents[:, rows])


def _local_scope(visit: Visit, plan: Plan, own: RowFacts, kernel: DenseKernel, device: torch.device) -> Scope:
    facts = plan.facts
    if facts.row_causal and not visit.causal:  # all keys come before all queries
        own = own._replace(positions=None)
    if facts.by_row_alone and (visit.is_self or not visit.causal):
        seen = clear_sight(visit.queries.count, visit.causal)
    else:
        queries, keys = (_cut(own, visit.rows(rows)) for rows in (visit.queries, visit.keys))
        seen = sight(queries, keys, visit.is_self, device)
    weights = None
    if visit.repeats:
        queries_in, keys_in = visit.depths()
        times = 1 + np.minimum.outer(np.arange(len(visit.repeats) + 1), keys_in)
        weights = Weights(seen.arrange(queries_in, device), seen.arrange(np.log(times), device).to(kernel.dtype))
    return Scope(kernel, seen, weights, visit.opening, visit.opening and visit.is_self)


def _cut(facts: RowFacts, rows: np.ndarray) -> RowFacts:
    """Facts `[B or 1, S_local]` of `rows [n, c, rows]`."""
    return RowFacts(*(None if x is None else x[:, rows] for x in facts))


def _key_facts(keys: np.ndarray, plan: Plan) -> RowFacts:
    """Positions and documents `[B or 1, 1, 1, K]` of remote keys; columns of -1 get facts that no query sees."""
    facts = plan.facts
    positions = np.full(keys.shape, np.iinfo(np.int64).max) if facts.causal else None
    documents = None if facts.documents is None else np.full(keys.shape, PADDING)
    for entry, rows in enumerate(keys):
        real = rows >= 0
        if positions is not None:
            positions[entry, real] = facts.positions_of(rows[real], entry)
        if documents is not None:
            documents[entry, real] = facts.documents_of(rows[real], entry)
    return RowFacts(*(None if x is None else x[:, None, None] for x in (positions, documents)))


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """`[B, S, H, ...]` as `[B, S, Hkv, G, ...]`."""
    return x.unflatten(2, (kv_heads, -1))


def _with_blank_row(arena: Tensor) -> Tensor:
    """The received rows and one row of zeros after them, which index -1 reads."""
    return torch.cat((arena, arena.new_zeros(1, *arena.shape[1:])))


def _queries(x: Tensor, visit: Visit) -> Tensor:
    """The visit's query rows of `[B, S, Hkv, G, ...]` as `[G, B, n, c, h, Q, ...]`."""
    return visit.view(x, visit.queries).movedim(5, 0)
