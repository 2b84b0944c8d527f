# SPDX-License-Identifier: Apache-2.0
"""The Triton core: all local branches in one launch, rows received from elsewhere in one more each time, on one device.

Nothing here knows of ranks: remote rows arrive as buffers, and as lists of who sees which of their rows.

To see what the kernels make of a call, `rh.reference.compare(rh.dilated_attention, q, k, v, pattern, backend="triton", ...)`
runs it on them and by the definition in plain PyTorch, differentiated by autograd, and returns the errors of both.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._triton import has_triton_package

from ring_hilbert.kernels.tiles import PASSES, Pass, Tile, device_tiles, plan_tile
from ring_hilbert.kernels.upload import upload
from ring_hilbert.kernels.walk import Facts, Rule, Walk, chains, plan_lists, plan_rows
from ring_hilbert.kernels.workers import Worker
from ring_hilbert.ops.pattern import DilatedPattern

BACKENDS = ("triton", "torch", "auto")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
KEPT_WALKS = 64  # a walk is a few bytes per row, kv head and direction


def unsupported(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the kernels cannot run on `q [..., D]` of this device, dtype and D; None if they can."""
    if not has_triton_package():
        return "Triton is not installed"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the device is {device.type}; it needs a CUDA device, or Triton's interpreter (TRITON_INTERPRET=1)"
    if dtype not in DTYPES:
        return f"the dtype is {dtype}; it has kernels for float16, bfloat16 and float32"
    if head_dim % 8 or head_dim > 256:
        return f"the head dim is {head_dim}; it has kernels for multiples of 8 up to 256"
    return None


def choose(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The backend to run, "triton" or "torch", for `backend`, which may be "auto": Triton on CUDA devices wherever it can.

    Raises:
        ValueError: for another name, or for "triton" where it cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not supported; use one of {', '.join(map(repr, BACKENDS))}")
    why = unsupported(device, dtype, head_dim)
    if backend == "triton" and why:
        raise ValueError(f"backend='triton' is not supported here: {why}; use backend='torch' or 'auto'")
    automatic = "triton" if device.type == "cuda" and not why else "torch"
    return automatic if backend == "auto" else backend


class RemoteVisit(NamedTuple):
    """`queries [Q]` (rows at hand) of kv heads `heads` see the rows `keys [B, heads, K]` of the buffer, where these are not -1."""

    heads: range
    queries: np.ndarray
    keys: np.ndarray


@dataclass(frozen=True)
class Remote:
    """Who sees which rows of the received buffer.

    Attributes:
        visits: a row of the buffer belongs to one batch entry and head; in how many visits it is, so often it counts.
        queries, keys: facts of the rows at hand and of those of the buffer, `[B or 1, S]` and `[1, rows]`, positions of both
            sides or of none.
    """

    visits: Sequence[RemoteVisit]
    queries: Facts
    keys: Facts


@dataclass
class ForwardState:
    """A forward between its steps."""

    q: Tensor
    output: Any
    staging: Any
    scale: float


@dataclass
class BackwardState:
    """A backward between its steps: `dq` in the dtype of q, `dk, dv`, and what the steps need."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    terms: Any
    staging: Any
    scale: float
    owes_keys: bool


class TritonCore:
    """The rows at hand of one sequence under one pattern, on one device.

    Args:
        pattern: the branches.
        num_kv_heads: Hkv of k and v.
        rows: which rows of the sequence they are, ascending.
        facts: their positions, if not the rows, and documents.
        causal: rows see no larger position.
        head_dim, dtype, device: of q, k and v.
        remotes: what is received, one after the other.
        tiles: instead of those in the table.

    Attributes:
        local, remotes: tile and walk of every pass, of the rows at hand over themselves and over received ones.
    """

    def __init__(
        self,
        pattern: DilatedPattern,
        num_kv_heads: int,
        rows: np.ndarray,
        facts: Facts,
        causal: bool,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        remotes: Sequence[Remote] = (),
        tiles: Mapping[Pass, Tile] | None = None,
    ) -> None:
        self.exact = dtype == torch.float32  # float32 keeps what rounding takes from lse
        self.local: dict[Pass, tuple[Tile, Walk]] = {}
        self.remotes: list[dict[Pass, tuple[Tile, Walk]]] = [{} for _ in remotes]
        for pass_ in PASSES:
            back = pass_ == "dkdv"
            choice = (tiles[pass_],) if tiles else device_tiles(pass_, head_dim, dtype, device)

            def local_walk(tile: Tile, back: bool = back) -> Walk:
                return _local_walk(pattern, num_kv_heads, rows, facts, causal, tile, back, device)

            self.local[pass_] = plan_tile(pass_, choice, local_walk)
            for walks, remote in zip(self.remotes, remotes, strict=True):
                if remote.visits:

                    def remote_walk(tile: Tile, back: bool = back, remote: Remote = remote) -> Walk:
                        return _remote_walk(remote, num_kv_heads, tile, back).to(device)

                    walks[pass_] = plan_tile(pass_, choice, remote_walk)
        covered = _covered(pattern, num_kv_heads, rows)
        self.covers = bool(covered.all())  # else some rows are in no tile, and results start as those of no key
        self.slots, self.places = None, 0
        self.staged: Tensor | None = None  # kv head, row and place of every row that hops pass on, int64 `[3, n]`
        if any(self.remotes):
            slots = np.full((num_kv_heads, len(rows)), -1, np.int32)
            for heads, queries, _ in (visit for remote in remotes for visit in remote.visits):
                slots[np.array(heads)[:, None], queries] = 0
            slots[slots == 0] = (np.cumsum(slots + 1, axis=1, dtype=np.int32) - 1)[slots == 0]
            self.places = int(slots.max()) + 1
            self.slots = upload(torch.from_numpy(slots)[None], device)
            if len(self.remotes) > 1:
                head, row = np.nonzero(slots >= 0)
                self.staged = upload(torch.from_numpy(np.stack((head, row, slots[head, row]))), device)

    # ---- forward

    def begin(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> ForwardState:
        """Attend the rows at hand: `q [B, S, H, D]`, `k, v [B, S, Hkv, D]`; `scale` of the scores."""
        from ring_hilbert.kernels import launch

        state = ForwardState(q, launch.Output.allocate(q, self.exact, clear=not self.covers), self._staging(q), scale)
        if q.shape[1]:
            launch.forward(q, k, v, *self.local["forward"], scale, state.output, state.staging)
        return state

    def forward_hop(self, state: ForwardState, hop: int, received: Tensor) -> None:
        """Attend the rows `received [rows, 2, D]` of k and v."""
        from ring_hilbert.kernels import launch

        if self.remotes[hop]:
            k, v = self._spread(received, state.q)
            launch.forward(
                state.q,
                k,
                v,
                *self.remotes[hop]["forward"],
                state.scale,
                state.output,
                state.staging,
                stage=self._stage,
            )

    def finish(self, state: ForwardState) -> tuple[Tensor, Tensor, Tensor]:
        """`out [B, S, H, D]`, `lse` and its rounding `residue [B, H, S]` float32."""
        from ring_hilbert.kernels import launch

        if self.staged is not None:
            launch.finish_rows(state.output, state.staging, self.staged)
        out, lse, residue = state.output
        return out, lse, torch.zeros_like(lse) if residue is None else residue

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
        """Begin the gradients: those of the rows at hand over themselves, or (`share < 1`, and at most one hop) only that of q.

        The arguments are those of forward and what it returned. dK and dV are summed in `sums`, the dtype of k or wider.
        """
        from ring_hilbert.kernels import launch

        terms = launch.row_terms(dout, out, lse, residue if self.exact else None)
        allocate = torch.empty if self.covers else torch.zeros
        dq = allocate(q.shape, dtype=q.dtype, device=q.device)
        dk, dv = (allocate(k.shape, dtype=sums, device=k.device) for _ in range(2))
        state = BackwardState(dq, dk, dv, q, k, v, terms, self._staging(q), scale, share < 1 and len(self.remotes) <= 1)
        if q.shape[1]:
            launch.dq(q, k, v, terms, dq, *self.local["dq"], scale, state.staging)
        if not state.owes_keys:
            self._local_keys(state)
        return state

    def backward_hop(self, state: BackwardState, hop: int, received: Tensor) -> Tensor:
        """Add the share of rows `received [rows, 2, D]` to the gradient of q; return theirs, float32 `[rows, 2, D]`."""
        from ring_hilbert.kernels import launch

        returned = torch.zeros(received.shape, dtype=torch.float32, device=received.device)
        walks = self.remotes[hop]
        if walks:
            k, v = self._spread(received, state.q)
            q, terms, scale = state.q, state.terms, state.scale
            launch.dq(q, k, v, terms, state.dq, *walks["dq"], scale, state.staging, stage=self._stage)
            launch.dkdv(q, k, v, terms, self._spread(returned, q), *walks["dkdv"], scale)
        return returned

    def rest_of_backward(self, state: BackwardState) -> None:
        """What `begin_backward` left."""
        from ring_hilbert.kernels import launch

        if state.owes_keys:
            self._local_keys(state)
        if self.staged is not None:
            launch.finish_gradient(state.dq, state.staging, self.staged, state.scale)

    def _local_keys(self, state: BackwardState) -> None:
        from ring_hilbert.kernels import launch

        if state.q.shape[1]:
            gradients = state.dk, state.dv
            launch.dkdv(state.q, state.k, state.v, state.terms, gradients, *self.local["dkdv"], state.scale)

    @property
    def _stage(self) -> str:
        """What a hop does with the rows it takes up: a single one finishes them."""
        return "pass on" if self.staged is not None else "finish"

    def _staging(self, q: Tensor) -> Any:
        """Room for the rows that see received ones, if there are any."""
        from ring_hilbert.kernels import launch

        return None if self.slots is None else launch.Staging.allocate(q, self.slots, self.places)

    def _spread(self, buffer: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """`buffer [rows, 2, D]` as k and v `[B, rows, Hkv, D]`: every batch entry and head reads the rows of its own."""
        assert self.slots is not None
        shape = (q.shape[0], buffer.shape[0], self.slots.shape[1], buffer.shape[2])
        k, v = (buffer[:, i][None, :, None].expand(shape) for i in range(2))
        return k, v


# ---- walks


def _covered(pattern: DilatedPattern, num_kv_heads: int, rows: np.ndarray) -> np.ndarray:
    """Which rows are in some branch, bool `[Hkv, S]`."""
    s, covered = rows + pattern.segment_shift, np.zeros((num_kv_heads, len(rows)), bool)
    for branch in pattern.branches:
        w, r = branch
        offsets = np.array([pattern.offset(branch, g, num_kv_heads) for g in range(num_kv_heads)])
        covered |= (s if w is None else s % w) % r == offsets[:, None]
    return covered


_walks: OrderedDict[tuple[Any, ...], Walk] = OrderedDict()
_walks_lock = threading.Lock()  # layers are planned in several threads


def _local_walk(
    pattern: DilatedPattern,
    num_kv_heads: int,
    rows: np.ndarray,
    facts: Facts,
    causal: bool,
    tile: Tile,
    transposed: bool,
    device: torch.device,
) -> Walk:
    """The walk of the rows over themselves; what was planned for equal arguments is kept."""
    key = (pattern, num_kv_heads, _digest(rows, *facts), causal, tile[:2], transposed, device)
    with _walks_lock:
        walk = _walks.get(key)
    if walk is None:
        offsets = [[pattern.offset(b, g, num_kv_heads) for g in range(num_kv_heads)] for b in pattern.branches]
        walk = _planned(
            plan_rows, chains(pattern.branches, offsets), pattern.segment_shift, rows, facts, causal=causal,
            block_outer=tile.block_outer, block_inner=tile.block_inner, transposed=transposed,
        ).to(device)  # fmt: skip
    with _walks_lock:
        _walks[key] = walk
        _walks.move_to_end(key)
        while len(_walks) > KEPT_WALKS:
            _walks.popitem(last=False)
    return walk


def _digest(*arrays: np.ndarray | None) -> tuple[Any, ...]:
    """Equal for equal arrays."""
    return tuple(
        None if x is None else (x.shape, hashlib.blake2b(np.ascontiguousarray(x).data).digest()) for x in arrays
    )


def _remote_walk(remote: Remote, num_kv_heads: int, tile: Tile, transposed: bool) -> Walk:
    batch = len(remote.visits[0].keys)
    visits: list[list[list[tuple[np.ndarray, np.ndarray]]]] = [[[] for _ in range(num_kv_heads)] for _ in range(batch)]
    for heads, queries, keys in remote.visits:
        for entry in range(batch):
            for head, columns in zip(heads, keys[entry], strict=True):
                seen = columns[columns >= 0]
                visits[entry][head].append((seen, queries) if transposed else (queries, seen))
    sides = (remote.keys, remote.queries) if transposed else (remote.queries, remote.keys)
    causal = 0 if remote.keys.positions is None else 2
    return _planned(
        plan_lists, visits, *sides, Rule(tile.block_outer, tile.block_inner, transposed, causal, indexed=True)
    )


_elsewhere = threading.local()


def plan_elsewhere() -> None:
    """From now on this thread leaves the planning of walks to a process of its own."""
    _elsewhere.worker = Worker()


def _planned(plan: Callable[..., Walk], *args: Any, **options: Any) -> Walk:
    worker: Worker | None = getattr(_elsewhere, "worker", None)
    return plan(*args, **options) if worker is None else worker.call(plan, *args, **options)
