# SPDX-License-Identifier: Apache-2.0
"""What a core is: attention of the rows at hand over themselves, then over what each hop brings, forward and backward.

`TorchCore` and `TritonCore` are the two there are; `parallel/execution.py` runs them without knowing which.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ring_hilbert.ops.order import TokenOrder, natural_places
from ring_hilbert.ops.pattern import Heads
from ring_hilbert.ops.visits import Chunk, Rows


@dataclass(frozen=True)
class Shard:
    """The rows at hand: chunks of a sequence of `seq_len` rows, which are in `order`."""

    chunks: tuple[Chunk, ...]
    seq_len: int
    order: TokenOrder | None = None

    @property
    def size(self) -> int:
        """How many rows."""
        return sum(chunk.stop - chunk.start for chunk in self.chunks)

    def rows(self) -> np.ndarray:
        """The rows of the sequence, int64 `[S]`, ascending."""
        return np.concatenate([np.empty(0, np.int64), *(np.arange(c.start, c.stop) for c in self.chunks)])

    def places(self) -> np.ndarray:
        """The natural token index of every row, had the sequence no padding: int64 `[S]`."""
        return natural_places(self.rows(), self.seq_len, self.order)


@dataclass(frozen=True, eq=False)
class RemoteVisit:
    """Partial attention of local `queries` over candidates of a hop, for the kv heads of one offset.

    Attributes:
        keys: int64 `[B, heads, K]`, the number of each key among the candidates of the hop.
        rows: int64 `[K]`, the row of each in the sequence.
    """

    heads: Heads
    queries: Rows
    keys: np.ndarray
    rows: np.ndarray


class Incoming(NamedTuple):
    """What of a hop's candidates travels in one batch.

    Attributes:
        key: of every candidate, int32 `[n]`; hidden for one that does not travel.
        place: where it lies in what is received, int32 `[n]`, -1 for one that does not travel; None: all do, in their order.
        packed_key: of every row that is received, int32 `[rows]`.
    """

    key: Tensor
    place: Tensor | None
    packed_key: Tensor

    def on(self, device: torch.device) -> Incoming:
        """The same on a device."""
        place = None if self.place is None else self.place.to(device)
        return Incoming(self.key.to(device), place, self.packed_key.to(device))


@dataclass
class ForwardState:
    """A forward between its steps: what a core makes of it."""


@dataclass
class BackwardState:
    """A backward between its steps: the gradients so far, and what a core adds. dk and dv are float32 or wider with hops."""

    dq: Tensor
    dk: Tensor
    dv: Tensor


class Core(Protocol):
    """Attention of one rank. `q [B, S, H, D]`, `k, v [B, S, Hkv, D]`; rows that a hop brings are `[rows, 2, D]`, K and V."""

    def begin(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> ForwardState:
        """The visits among the rows at hand."""
        ...

    def forward_hop(self, state: ForwardState, hop: int, received: Tensor) -> None:
        """The visits over what a hop has brought."""
        ...

    def finish(self, state: ForwardState) -> tuple[Tensor, Tensor, Tensor]:
        """`out` in the dtype of q; `lse` and `lse_error`, what its rounding took, `[B, H, S]`, float32 or float64."""
        ...

    def begin_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lse_error: Tensor, scale: float,
        sums: torch.dtype, share: float,
    ) -> BackwardState:  # fmt: skip
        """About a `share` of the gradients among the rows at hand; dk and dv are summed in `sums` or wider."""
        ...

    def backward_hop(self, state: BackwardState, hop: int, received: Tensor) -> Tensor:
        """The visits over what a hop has brought, and its gradient `[rows, 2, D]`, float32 or float64."""
        ...

    def rest_of_backward(self, state: BackwardState) -> None:
        """What `begin_backward` left."""
        ...
