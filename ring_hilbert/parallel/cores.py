# SPDX-License-Identifier: Apache-2.0
"""The visits of a rank bound to a core and a device: among its own rows, and over what each hop brings.

Both classes have the steps of a forward (`begin`, `forward_hop` for every hop, `finish`) and of a backward (`begin_backward`,
`backward_hop`, `rest_of_backward`), between which a state is handed on; that of a backward has the gradients `dq`, `dk`, `dv`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ring_hilbert.ops import torch_core
from ring_hilbert.ops.dense import DenseKernel, dense_kernel
from ring_hilbert.ops.merge import RunningSoftmax
from ring_hilbert.ops.pattern import Heads
from ring_hilbert.ops.sight import RowFacts, clear_sight, sight
from ring_hilbert.ops.torch_core import Scope, Weights
from ring_hilbert.ops.triton_core import Facts as WalkFacts
from ring_hilbert.ops.triton_core import Remote, TritonCore
from ring_hilbert.ops.triton_core import RemoteVisit as WalkVisit
from ring_hilbert.ops.visits import Visit
from ring_hilbert.parallel.facts import PADDING
from ring_hilbert.parallel.plan import Plan, RankPlan
from ring_hilbert.parallel.remote import Hop, RemoteVisit

PARTS = 6  # of the local backward: some hide what is fetched, others what is returned


@dataclass
class BackwardState:
    """A backward between its steps: the gradients so far, in float32 or float64, and what the steps need."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    inputs: Any


@dataclass
class ForwardState:
    """A forward between its steps: the running softmax of all rows, and what the steps need."""

    softmax: RunningSoftmax
    q: Tensor
    dtype: torch.dtype
    scale: float


class TorchVisits:
    """The visits of a rank through the torch core, one after the other."""

    def __init__(self, part: RankPlan, plan: Plan, own: RowFacts, device: torch.device) -> None:
        kernel = dense_kernel(device, plan.shapes.dtype, plan.shapes.head_dim)
        local = [(visit, _local_scope(visit, plan, own, kernel, device)) for visit in part.local]
        opening = [scope for _, scope in local if scope.opens_queries]
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
            for visit, scope in local
        ]
        self.hops = [[_BoundVisit(visit, plan, own, kernel, device) for visit in hop.visits] for hop in part.hops]
        self.in_parts = _in_parts(self.local) if self.hops else self.local  # some before the hops, some after

    # ---- forward

    def begin(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> ForwardState:
        """The visits among own rows."""
        dtype, kv_heads = torch_core.compute_dtype(q.dtype), k.shape[2]
        out = torch.empty(q.shape, dtype=dtype, device=q.device)
        softmax = RunningSoftmax(out.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float64), out)
        if not self.opens_queries:
            softmax.clear()
        grouped = RunningSoftmax(_grouped(softmax.lse.transpose(1, 2), kv_heads), _grouped(out, kv_heads))
        state = ForwardState(softmax, _grouped(q, kv_heads), q.dtype, scale)
        for visit, scope in self.local:
            rows = RunningSoftmax(_queries(grouped.lse, visit), _queries(grouped.out, visit))
            keys = visit.view(k, visit.keys), visit.view(v, visit.keys)
            torch_core.forward(rows, _queries(state.q, visit), *keys, scope, scale)
        return state

    def forward_hop(self, state: ForwardState, hop: int, received: Tensor) -> None:
        """The visits over `received [rows, 2, D]`."""
        arena, kv_heads = _with_blank_row(received), state.q.shape[2]
        logs = _grouped(state.softmax.lse.transpose(1, 2), kv_heads)
        outs = _grouped(state.softmax.out, kv_heads)
        for bound in self.hops[hop]:
            rows = RunningSoftmax(_queries(logs, bound.visit), _queries(outs, bound.visit))
            queries = _queries(state.q, bound.visit)
            torch_core.forward(rows, queries, *bound.rows_of(arena), bound.scope, state.scale)

    def finish(self, state: ForwardState) -> tuple[Tensor, Tensor, Tensor]:
        """`out` in the dtype of q, `lse` and `residue`."""
        dtype = torch_core.compute_dtype(state.dtype)
        return state.softmax.out.to(state.dtype), *state.softmax.logarithms(dtype)

    # ---- backward

    def begin_backward(
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
        share: float,
    ) -> BackwardState:
        """About a `share` of the visits among own rows; dK and dV are summed in `sums` at least."""
        dtype, kv_heads = torch_core.compute_dtype(q.dtype), k.shape[2]
        exact = lse.double() + residue
        exact = exact.masked_fill(lse == float("-inf"), float("inf"))  # no key, no gradient
        done = np.cumsum([visit.cost for visit, _ in self.in_parts])
        upto = int(np.searchsorted(done, share * done[-1] - 0.5)) + 1 if share and len(done) else 0
        opens = upto >= sum(
            scope.opens_queries for _, scope in self.in_parts
        )  # else hops add to rows before they are opened
        fresh_q = torch.empty if self.opens_queries and opens else torch.zeros
        fresh_k = torch.empty if self.opens_keys and opens else torch.zeros
        dq = fresh_q(q.shape, dtype=dtype, device=q.device)
        sums = torch_core.compute_dtype(sums)
        dk, dv = (fresh_k(k.shape, dtype=sums, device=k.device) for _ in range(2))
        q, dout, out, dq_grouped, exact = (_grouped(x, kv_heads) for x in (q, dout, out, dq, exact.transpose(1, 2)))

        def add(visit: Visit, scope: Scope, keys: tuple[Tensor, Tensor], dkeys: tuple[Tensor, Tensor]) -> None:
            q_rows, dout_rows, out_rows, lse_rows = (_queries(x, visit) for x in (q, dout, out, exact))
            grads = (_queries(dq_grouped, visit), *dkeys)
            torch_core.backward(grads, q_rows, *keys, dout_rows, out_rows, lse_rows, scope, scale)

        def add_local(visits: list[tuple[Visit, Scope]]) -> None:
            for visit, scope in visits:
                k_rows, v_rows, dk_rows, dv_rows = (visit.view(x, visit.keys) for x in (k, v, dk, dv))
                scope = scope if opens else replace(scope, opens_queries=False, opens_keys=False)
                add(visit, scope, (k_rows, v_rows), (dk_rows, dv_rows))

        add_local(self.in_parts[:upto])
        return BackwardState(dq, dk, dv, (add, add_local, upto, dtype))

    def backward_hop(self, state: BackwardState, hop: int, received: Tensor) -> Tensor:
        """The visits over `received [rows, 2, D]`, and its gradient."""
        add, _, _, dtype = state.inputs
        arena = _with_blank_row(received)
        gradients = torch.zeros(arena.shape, dtype=state.dk.dtype, device=arena.device)
        for bound in self.hops[hop]:
            keys = bound.rows_of(arena)
            dk, dv = (torch.zeros(x.shape, dtype=state.dk.dtype, device=x.device) for x in keys)
            add(bound.visit, bound.scope, keys, (dk, dv))
            bound.add_to(gradients, dk, dv)
        return gradients[:-1].to(dtype)

    def rest_of_backward(self, state: BackwardState) -> None:
        """The visits among own rows that `begin_backward` left."""
        _, add_local, upto, _ = state.inputs
        add_local(self.in_parts[upto:])


class TritonVisits(TritonCore):
    """The visits of a rank on the Triton kernels."""

    def __init__(self, part: RankPlan, plan: Plan, own: RowFacts, device: torch.device) -> None:
        shapes, facts = plan.shapes, plan.facts
        queries = WalkFacts(*own)
        local = WalkFacts(None if facts.row_causal else queries.positions, queries.documents)
        super().__init__(
            plan.pattern, shapes.num_kv_heads, plan.layout.rows(part.rank), WalkFacts() if facts.by_row_alone else local,
            facts.causal, shapes.head_dim, shapes.dtype, device,
            [_walk_remote(hop, plan, queries) for hop in part.hops],
        )  # fmt: skip


def _walk_remote(hop: Hop, plan: Plan, queries: WalkFacts) -> Remote:
    """The visits of a hop as the Triton core takes them."""
    visits = [WalkVisit(v.heads.indices, v.queries.indices()[0], v.arena) for v in hop.visits]
    if plan.crossings.regular:
        return Remote(visits, WalkFacts(), WalkFacts())
    facts = plan.facts
    keys = WalkFacts(
        np.zeros((1, hop.rows), np.int64) if facts.causal else None,
        None if facts.documents is None else np.full((1, hop.rows), PADDING),
    )
    for visit in hop.visits:
        known = _key_facts(visit.keys, plan)
        for entry, places in enumerate(visit.arena):
            for values, found in zip(keys, known, strict=True):
                if values is not None and found is not None:
                    column = found[min(entry, len(found) - 1), 0, 0]
                    there = places >= 0
                    values[0, places[there]] = np.broadcast_to(column, places.shape)[there]
    return Remote(visits, queries, keys)


def _in_parts(local: list[tuple[Visit, Scope]]) -> list[tuple[Visit, Scope]]:
    """The same visits, expensive ones cut into some for each thread's worth of their heads."""
    most, parts = sum(visit.cost for visit, _ in local) / PARTS, []
    for visit, scope in local:
        start, stop, step = visit.heads
        heads = len(visit.heads.indices)
        size = max(torch.get_num_threads(), -(-heads // PARTS)) if visit.cost > most else heads
        cuts = [min(start + i * step, stop) for i in range(0, heads, size)] + [stop]
        parts += [(replace(visit, heads=Heads(a, b, step)), scope) for a, b in itertools.pairwise(cuts)]
    return parts


class _BoundVisit:
    """A remote visit with its index tensors on a device."""

    def __init__(
        self, remote: RemoteVisit, plan: Plan, own: RowFacts, kernel: DenseKernel, device: torch.device
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


def own_facts(plan: Plan, rank: int) -> RowFacts:
    """Positions and documents `[B or 1, S_local]` of the rows of `rank`, as far as they decide anything."""
    facts = plan.facts
    rows = plan.layout.rows(rank)
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
