# SPDX-License-Identifier: Apache-2.0
"""Execution: one rank's part of a plan, bound to a device and a group, run forward and backward.

Local visits run while remote rows travel; the remote visits follow. Backward is the same list with the roles exchanged.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ring_hilbert.ops import torch_core
from ring_hilbert.ops.merge import RunningSoftmax
from ring_hilbert.ops.pattern import Heads
from ring_hilbert.ops.torch_core import NO_FACTS, RowFacts, VisitMask
from ring_hilbert.ops.visits import Rows, Visit
from ring_hilbert.parallel.exchange import Exchange
from ring_hilbert.parallel.facts import PADDING
from ring_hilbert.parallel.plan import Plan
from ring_hilbert.parallel.remote import RemoteVisit


class Execution:
    """Runs `plan.rank(rank)` on local tensors.

    Args:
        plan: the plan of the whole sequence.
        rank: this rank within `group`.
        group: the process group; None if there is one rank.
        device: of q, k, v.
    """

    def __init__(self, plan: Plan, rank: int, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self.plan, self.part = plan, plan.rank(rank)
        self.handle: int | None = None  # its number in the operator registry
        facts, entries = plan.facts, plan.crossings.entries
        rows = np.concatenate([np.arange(c.start, c.stop) for c in self.part.chunks] or [np.empty(0, np.int64)])
        self.own = NO_FACTS
        if not facts.by_row_alone:
            positions = np.stack([facts.positions_of(rows, e) for e in entries]) if facts.causal else None
            documents = None if facts.documents is None else facts.documents[:, rows]
            self.own = RowFacts(_tensor(positions, device), _tensor(documents, device))
        self.exchange = (
            Exchange(self.part, group, device) if group is not None and plan.crossings.communicates else None
        )
        self.remote = [_BoundVisit(visit, plan, device) for visit in self.part.remote]

    # ---- forward

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, name: str = "") -> tuple[Tensor, Tensor, Tensor]:
        """`out [B, S_local, H, D]` in the dtype of q; `lse` and its rounding `residue` `[B, H, S_local]`, float32 or float64."""
        pending = self.exchange.fetch(k, v, name) if self.exchange else None
        dtype = torch_core.compute_dtype(q.dtype)
        q = _grouped(q, k.shape[2])
        state = RunningSoftmax.empty(tuple(q.shape[:-1]), q.shape[-1], dtype, q.device)

        for visit, mask in self._local_visits():
            torch_core.forward(_state(state, visit), _q(q, visit), _kv(k, visit), _kv(v, visit), mask, scale)
        if pending is not None:
            arena = _with_blank_row(pending.wait())
            for visit in self.remote:
                kr, vr = visit.rows_of(arena)
                torch_core.forward(_state(state, visit), _q(q, visit), kr, vr, visit.mask(self.own), scale)

        out, lse, residue = state.finish()
        lse, residue = (x.flatten(2, 3).transpose(1, 2).contiguous() for x in (lse, residue))
        return out.flatten(2, 3).to(k.dtype), lse, residue

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
        name: str = "",
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`dq, dk, dv` in the dtype and shape of `q, k, v`. K and V rows are fetched again, behind the local visits."""
        pending = self.exchange.fetch(k, v, name) if self.exchange else None
        dtype, kv_heads = torch_core.compute_dtype(q.dtype), k.shape[2]
        # every weight is exp(score - lse - residue): the row factor exp(-residue) moves into dout, where it costs nothing
        dout = dout.to(dtype) * residue.neg().exp().transpose(1, 2).unsqueeze(-1)
        delta = _grouped((dout * out.to(dtype)).sum(-1), kv_heads)
        lse = _grouped(lse.transpose(1, 2), kv_heads)
        lse = lse.masked_fill(lse == float("-inf"), float("inf"))  # exp(score - inf) = 0: no key, no gradient
        q, dout = _grouped(q, kv_heads), _grouped(dout, kv_heads)
        dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v))

        def visit_backward(visit: Visit | _BoundVisit, mask: VisitMask, keys: tuple[Tensor, ...]) -> None:
            kt, vt, dkt, dvt = keys
            grads = _q(dq, visit), dkt, dvt
            torch_core.backward(
                grads, _q(q, visit), kt, vt, _q(dout, visit), _q(lse, visit), _q(delta, visit), mask, scale
            )

        for visit, mask in self._local_visits():
            visit_backward(visit, mask, (_kv(k, visit), _kv(v, visit), _kv(dk, visit), _kv(dv, visit)))
        if pending is not None and self.exchange is not None:
            arena = _with_blank_row(pending.wait())
            darena = torch.zeros(arena.shape, dtype=dtype, device=arena.device)
            for visit in self.remote:
                kr, vr = visit.rows_of(arena)
                dkr, dvr = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (kr, vr))
                visit_backward(visit, visit.mask(self.own), (kr, vr, dkr, dvr))
                visit.add_to(darena, dkr, dvr)
            self.exchange.add(self.exchange.give_back(darena[:-1], name).wait(), dk, dv)
        return dq.flatten(2, 3).to(k.dtype), dk.to(k.dtype), dv.to(k.dtype)

    def _local_visits(self) -> Iterator[tuple[Visit, VisitMask]]:
        row_causal = self.plan.facts.row_causal
        for visit in self.part.local:
            queries, keys = _cut(self.own, visit.queries), _cut(self.own, visit.keys)
            if row_causal:  # a self visit is a triangle; any other local visit looks back to rows that all come before
                queries, keys = queries._replace(positions=None), keys._replace(positions=None)
            yield visit, VisitMask(row_causal and visit.is_self, queries, keys)


class _BoundVisit:
    """A remote visit with its index tensors on a device."""

    def __init__(self, visit: RemoteVisit, plan: Plan, device: torch.device) -> None:
        self.heads: Heads = visit.heads
        self.queries: Rows = visit.queries
        self.arena = torch.from_numpy(visit.arena).to(device)
        self.keys = NO_FACTS
        if visit.masked:
            self.keys = RowFacts(*(_tensor(x, device) for x in _key_facts(visit.keys, plan)))

    def rows_of(self, arena: Tensor) -> tuple[Tensor, Tensor]:
        """The visit's K and V as `[B, 1, h, K, D]`."""
        kv = arena[self.arena].unsqueeze(1)
        return kv[..., 0, :], kv[..., 1, :]

    def add_to(self, darena: Tensor, dk: Tensor, dv: Tensor) -> None:
        """Add gradients `[B, 1, h, K, D]` to the buffer; its rows are distinct within a visit (padding is the blank row)."""
        darena[self.arena] += torch.stack((dk, dv), dim=-2).squeeze(1)

    def mask(self, own: RowFacts) -> VisitMask:
        if self.keys.positions is None and self.keys.documents is None:
            return VisitMask()
        return VisitMask(False, _cut(own, self.queries), self.keys)


def _key_facts(keys: np.ndarray, plan: Plan) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Positions and documents `[B or 1, 1, K]` of remote keys; columns of -1 get facts that no query sees."""
    facts = plan.facts
    positions = np.full(keys.shape, np.iinfo(np.int64).max) if facts.causal else None
    documents = None if facts.documents is None else np.full(keys.shape, PADDING)
    for entry, rows in enumerate(keys):
        real = rows >= 0
        if positions is not None:
            positions[entry, real] = facts.positions_of(rows[real], entry)
        if documents is not None:
            documents[entry, real] = facts.documents_of(rows[real], entry)
    return tuple(None if x is None else x[:, None] for x in (positions, documents))  # type: ignore[return-value]


def _tensor(array: np.ndarray | None, device: torch.device) -> Tensor | None:
    return None if array is None else torch.from_numpy(np.ascontiguousarray(array)).to(device)


def _cut(facts: RowFacts, rows: Rows) -> RowFacts:
    return RowFacts(*(None if x is None else rows.view(x) for x in facts))


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """`[B, S, H, ...]` as `[B, S, Hkv, G, ...]`."""
    return x.unflatten(2, (kv_heads, -1))


def _with_blank_row(arena: Tensor) -> Tensor:
    """The received rows and one row of zeros after them, which index -1 reads."""
    return torch.cat((arena, arena.new_zeros(1, *arena.shape[1:])))


def _q(x: Tensor, visit: Visit | _BoundVisit) -> Tensor:
    """The visit's query rows of `[B, S, Hkv, G, ...]` as `[B, n, h, G, Q, ...]`."""
    return visit.queries.view(x[:, :, visit.heads.slice]).movedim(2, 4)


def _kv(x: Tensor, visit: Visit) -> Tensor:
    """The visit's key rows of `[B, S, Hkv, D]` as `[B, n, h, K, D]`."""
    return visit.keys.view(x[:, :, visit.heads.slice]).movedim(2, 3)


def _state(state: RunningSoftmax, visit: Visit | _BoundVisit) -> RunningSoftmax:
    return RunningSoftmax(_q(state.maximum, visit), _q(state.total, visit), _q(state.values, visit))
