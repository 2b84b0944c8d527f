# SPDX-License-Identifier: Apache-2.0
"""The torch core: the visits of a rank one after the other, on any device and dtype that PyTorch multiplies matrices in."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ring_hilbert.ops import torch_visit
from ring_hilbert.ops.core import BackwardState, ForwardState, Incoming, RemoteVisit
from ring_hilbert.ops.dense import DenseKernel, dense_kernel
from ring_hilbert.ops.merge import RunningSoftmax
from ring_hilbert.ops.pattern import Heads
from ring_hilbert.ops.sight import RowIntervals, clear_sight, sight
from ring_hilbert.ops.torch_visit import Scope, Weights
from ring_hilbert.ops.visits import Visit
from ring_hilbert.ops.zero_keys import add_zero_keys

PARTS = 6  # of the local backward: some overlap the fetch, others the return of gradients


@dataclass
class _Forward(ForwardState):
    """State between the steps of a forward: the running softmax of all rows, and what the steps need."""

    softmax: RunningSoftmax
    q: Tensor
    dtype: torch.dtype
    scale: float


@dataclass
class _Backward(BackwardState):
    """State between the steps of a backward. `add` adds one visit, `add_local` some local ones, of which `done` are finished."""

    add: Callable[..., None]
    add_local: Callable[[list[tuple[Visit, Scope]]], None]
    done: int
    dtype: torch.dtype


class TorchCore:
    """Attention of the local rows of one sequence under one pattern.

    Args:
        local: the visits among the local rows.
        own: intervals of the local rows, int64 `[1 or B, S]` each; None where the visits suffice (`Visible.by_row_alone`).
        head_dim, dtype, device: of q, k and v.
        hops: the visits over what each hop brings.
        incoming: which of it is sent in this batch, hop by hop, on the CPU.
    """

    def __init__(
        self, local: Sequence[Visit], own: RowIntervals | None, head_dim: int, dtype: torch.dtype, device: torch.device,
        hops: Sequence[Sequence[RemoteVisit]] = (), incoming: Sequence[Incoming] = (),
    ) -> None:  # fmt: skip
        kernel = dense_kernel(device, dtype, head_dim)
        self.local = [(visit, _local_scope(visit, own, kernel, device)) for visit in local]
        bound = [
            [_BoundVisit(visit, arriving, own, kernel, device) for visit in visits]
            for visits, arriving in zip(hops, incoming, strict=True)
        ]
        self.hops = [[visit for visit in visits if visit.places.shape[-1]] for visits in bound]
        self.in_parts = _in_parts(self.local) if self.hops else self.local  # some before the hops, some after

    # ---- forward

    def begin(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> _Forward:
        """The visits among the local rows."""
        dtype, kv_heads = torch_visit.compute_dtype(q.dtype), k.shape[2]
        out = torch.empty(q.shape, dtype=dtype, device=q.device)
        softmax = RunningSoftmax(out.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float64), out)
        softmax.clear()
        grouped = RunningSoftmax(_grouped(softmax.lse.transpose(1, 2), kv_heads), _grouped(out, kv_heads))
        state = _Forward(softmax, _grouped(q, kv_heads), q.dtype, scale)
        for visit, scope in self.local:
            rows = RunningSoftmax(_queries(grouped.lse, visit), _queries(grouped.out, visit))
            keys = visit.view(k, visit.keys), visit.view(v, visit.keys)
            torch_visit.forward(rows, _queries(state.q, visit), *keys, scope, scale)
        return state

    def forward_hop(self, state: ForwardState, hop: int, received: Tensor) -> None:
        """The visits over `received [rows, 2, D]`."""
        assert isinstance(state, _Forward)
        buffer, kv_heads = _with_blank_row(received), state.q.shape[2]
        logs = _grouped(state.softmax.lse.transpose(1, 2), kv_heads)
        outs = _grouped(state.softmax.out, kv_heads)
        for bound in self.hops[hop]:
            rows = RunningSoftmax(_queries(logs, bound.visit), _queries(outs, bound.visit))
            queries = _queries(state.q, bound.visit)
            torch_visit.forward(rows, queries, *bound.rows_of(buffer), bound.scope, state.scale)

    def finish(self, state: ForwardState, zero_keys: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """`out` in the dtype of q, `lse` and `lse_error`."""
        assert isinstance(state, _Forward)
        dtype = torch_visit.compute_dtype(state.dtype)
        result = state.softmax.out.to(state.dtype), *state.softmax.logarithms(dtype)
        return result if zero_keys is None else add_zero_keys(*result, zero_keys)

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
        """About a fraction `share` of the visits among the local rows; dK and dV are summed in `sums` or wider."""
        dtype, kv_heads = torch_visit.compute_dtype(q.dtype), k.shape[2]
        exact = lse.double() + lse_error
        exact = exact.masked_fill(lse == float("-inf"), float("inf"))  # no key, no gradient
        done = np.cumsum([visit.cost for visit, _ in self.in_parts])
        upto = int(np.searchsorted(done, share * done[-1] - 0.5)) + 1 if share and len(done) else 0
        dq = torch.zeros(q.shape, dtype=dtype, device=q.device)
        sums = torch_visit.compute_dtype(sums)
        dk, dv = (torch.zeros(k.shape, dtype=sums, device=k.device) for _ in range(2))
        q, dout, out, dq_grouped, exact = (_grouped(x, kv_heads) for x in (q, dout, out, dq, exact.transpose(1, 2)))

        def add(visit: Visit, scope: Scope, keys: tuple[Tensor, Tensor], dkeys: tuple[Tensor, Tensor]) -> None:
            q_rows, dout_rows, out_rows, lse_rows = (_queries(x, visit) for x in (q, dout, out, exact))
            grads = (_queries(dq_grouped, visit), *dkeys)
            torch_visit.backward(grads, q_rows, *keys, dout_rows, out_rows, lse_rows, scope, scale)

        def add_local(visits: list[tuple[Visit, Scope]]) -> None:
            for visit, scope in visits:
                k_rows, v_rows, dk_rows, dv_rows = (visit.view(x, visit.keys) for x in (k, v, dk, dv))
                add(visit, scope, (k_rows, v_rows), (dk_rows, dv_rows))

        add_local(self.in_parts[:upto])
        return _Backward(dq, dk, dv, add, add_local, upto, dtype)

    def backward_hop(self, state: BackwardState, hop: int, received: Tensor) -> Tensor:
        """The visits over `received [rows, 2, D]`; returns its gradient."""
        assert isinstance(state, _Backward)
        buffer = _with_blank_row(received)
        gradients = torch.zeros(buffer.shape, dtype=state.dk.dtype, device=buffer.device)
        for bound in self.hops[hop]:
            keys = bound.rows_of(buffer)
            dk, dv = (torch.zeros(x.shape, dtype=state.dk.dtype, device=x.device) for x in keys)
            state.add(bound.visit, bound.scope, keys, (dk, dv))
            bound.add_to(gradients, dk, dv)
        return gradients[:-1].to(state.dtype)

    def rest_of_backward(self, state: BackwardState) -> None:
        """The visits among the local rows that `begin_backward` left."""
        assert isinstance(state, _Backward)
        state.add_local(self.in_parts[state.done :])


def _in_parts(local: list[tuple[Visit, Scope]]) -> list[tuple[Visit, Scope]]:
    """The same visits, expensive ones cut by heads, each part with at least one per thread."""
    most, parts = sum(visit.cost for visit, _ in local) / PARTS, []
    for visit, scope in local:
        start, stop, step = visit.heads
        heads = len(visit.heads.indices)
        size = max(torch.get_num_threads(), -(-heads // PARTS)) if visit.cost > most else heads
        cuts = [min(start + i * step, stop) for i in range(0, heads, size)] + [stop]
        parts += [(replace(visit, heads=Heads(a, b, step)), scope) for a, b in itertools.pairwise(cuts)]
    return parts


class _BoundVisit:
    """A remote visit in one batch: those of its candidates that are sent, as index tensors on a device."""

    def __init__(
        self,
        remote: RemoteVisit,
        arriving: Incoming,
        own: RowIntervals | None,
        kernel: DenseKernel,
        device: torch.device,
    ) -> None:
        self.visit = Visit(remote.heads, remote.queries, remote.queries, weight=remote.weight)
        at = remote.keys  # [B, heads, K]
        places = at if arriving.place is None else arriving.place.numpy().astype(np.int64)[at]
        travels = (places >= 0).any((0, 1))
        at, places = at[..., travels], places[..., travels]
        self.places = torch.from_numpy(np.ascontiguousarray(places)).to(device)
        seen = clear_sight(remote.queries.count, triangle=False)
        if own is not None:
            key = arriving.key.numpy().astype(np.int64)[at].max(1)  # a head for which a row is not sent does not see it
            seen = sight(_cut(own, self.visit.rows(remote.queries)), key[: len(own.low), None, None], False, device)
        self.scope = Scope(kernel, seen, log_weight=math.log(remote.weight))

    def rows_of(self, buffer: Tensor) -> tuple[Tensor, Tensor]:
        """The visit's K and V as `[B, 1, 1, h, K, D]`."""
        kv = buffer[self.places][:, None, None]
        return kv[..., 0, :], kv[..., 1, :]

    def add_to(self, gradients: Tensor, dk: Tensor, dv: Tensor) -> None:
        """Add gradients `[B, 1, 1, h, K, D]` to the buffer's; a visit's rows are distinct (apart from the blank row)."""
        gradients[self.places] += torch.stack((dk, dv), dim=-2)[:, 0, 0]


def _local_scope(visit: Visit, own: RowIntervals | None, kernel: DenseKernel, device: torch.device) -> Scope:
    if own is None:
        seen = clear_sight(visit.queries.count, visit.causal)
    else:
        keys = own.key[:, visit.rows(visit.keys)]
        seen = sight(_cut(own, visit.rows(visit.queries)), keys, visit.is_self, device)
    if not visit.repeats:
        return Scope(kernel, seen, log_weight=math.log(visit.weight))
    queries_in, keys_in = visit.depths()
    times = visit.times[np.minimum.outer(np.arange(len(visit.repeats) + 1), keys_in)]
    weights = Weights(seen.arrange(queries_in, device), seen.arrange(np.log(times), device).to(kernel.dtype))
    return Scope(kernel, seen, weights)


def _cut(own: RowIntervals, rows: np.ndarray) -> RowIntervals:
    """The intervals `[B or 1, S]` of `rows [n, c, rows]`."""
    return RowIntervals(*(x[:, rows] for x in own))


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """`[B, S, H, ...]` as `[B, S, Hkv, G, ...]`."""
    return x.unflatten(2, (kv_heads, -1))


def _with_blank_row(received: Tensor) -> Tensor:
    """The received rows followed by a row of zeros, which index -1 reads."""
    return torch.cat((received, received.new_zeros(1, *received.shape[1:])))


def _queries(x: Tensor, visit: Visit) -> Tensor:
    """The visit's query rows of `[B, S, Hkv, G, ...]` as `[G, B, n, c, h, Q, ...]`."""
    return visit.view(x, visit.queries).movedim(5, 0)
