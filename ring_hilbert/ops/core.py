# SPDX-License-Identifier: Apache-2.0
"""The protocol of a core: attention of the local rows over themselves, then over what each hop brings, forward and backward.

`TorchCore` and `TritonCore` implement it; `parallel/execution.py` runs either without knowing which.
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
    """The local rows: chunks of a sequence of `seq_len` rows, which are in `order`."""

    chunks: tuple[Chunk, ...]
    seq_len: int
    order: TokenOrder | None = None

    @property
    def size(self) -> int:
        """Number of local rows."""
        return sum(chunk.stop - chunk.start for chunk in self.chunks)

    def rows(self) -> np.ndarray:
        """The rows of the sequence, int64 `[S]`, ascending."""
        return np.concatenate([np.empty(0, np.int64), *(np.arange(c.start, c.stop) for c in self.chunks)])

    def places(self) -> np.ndarray:
        """The natural token index of every row if the sequence had no padding: int64 `[S]`."""
        return natural_places(self.rows(), self.seq_len, self.order)


@dataclass(frozen=True, eq=False)
class RemoteVisit:
    """Partial attention of local `queries` over candidates of a hop, for the kv heads of one offset.

    Attributes:
        keys: int64 `[B, heads, K]`, the index of each key among the candidates of the hop.
        rows: int64 `[K]`, the row of each key in the sequence.
        weight: how often a pair counts.
    """

    heads: Heads
    queries: Rows
    keys: np.ndarray
    rows: np.ndarray
    weight: int


class Incoming(NamedTuple):
    """Which of a hop's candidates are sent in one batch.

    Attributes:
        key: of every candidate, int32 `[n]`; `HIDDEN` if it is not sent.
        place: of every candidate, its index in the receive buffer, int32 `[n]`, -1 if it is not sent; None: all are, in order.
        packed_key: of every received row, int32 `[rows]`.
    """

    key: Tensor
    place: Tensor | None
    packed_key: Tensor

    def on(self, device: torch.device) -> Incoming:
        """The same on `device`."""
        place = None if self.place is None else self.place.to(device)
        return Incoming(self.key.to(device), place, self.packed_key.to(device))


@dataclass
class ForwardState:
    """A core's state between the steps of a forward."""


@dataclass
class BackwardState:
    """State of a backward between its steps: gradients so far, and what a core adds. With hops, dk and dv are float32 or wider."""

    dq: Tensor
    dk: Tensor
    dv: Tensor


class Core(Protocol):
    """Attention of one rank. `q [B, S, H, D]`, `k, v [B, S, Hkv, D]`; the rows that a hop brings are `[rows, 2, D]`, K and V."""

    def begin(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> ForwardState:
        """The visits among the local rows."""
        ...

    def forward_hop(self, state: ForwardState, hop: int, received: Tensor) -> None:
        """The visits over the rows that a hop brought."""
        ...

    def finish(self, state: ForwardState, zero_keys: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """`out` in the dtype of q; `lse` and its rounding error `lse_error`, `[B, H, S]`, float32 or float64.

        `zero_keys`: how many zero keys every row sees besides, int32 `[Hkv, S]`.
        """
        ...

    def begin_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lse_error: Tensor, scale: float,
        sums: torch.dtype, share: float,
    ) -> BackwardState:  # fmt: skip
        """About a fraction `share` of the gradients among the local rows; dk and dv are summed in `sums` or wider."""
        ...

    def backward_hop(self, state: BackwardState, hop: int, received: Tensor) -> Tensor:
        """The visits over the rows that a hop brought; returns their gradient `[rows, 2, D]`, float32 or float64."""
        ...

    def rest_of_backward(self, state: BackwardState) -> None:
        """What `begin_backward` left."""
        ...
