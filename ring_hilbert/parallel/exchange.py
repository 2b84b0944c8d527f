# SPDX-License-Identifier: Apache-2.0
"""Communication of exchange and ring: sends the rows that other ranks read, and returns their gradients.

A payload row is one kv head of one row: `[2, D]`, K and V or dK and dV together.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from ring_hilbert.parallel.travel import HopTravel
from ring_hilbert.parallel.wire import Pending, collective, point_to_point


class Exchange:
    """The communication of one hop in one batch.

    Args:
        travel: the rows, and their order in the buffers.
        group: the process group.
        together: one collective of all ranks; otherwise point-to-point messages with the ranks of the hop.
    """

    def __init__(self, travel: HopTravel, group: dist.ProcessGroup, *, together: bool) -> None:
        self.group, self.together = group, together
        self.received, self.sent = travel.received.counts, travel.sent.counts
        self.send_index = travel.send_index()

    def fetch(self, k: Tensor, v: Tensor, name: str = "") -> Pending:
        """Start sending the rows of `k, v [B, S_local, Hkv, D]` that others read and receiving a buffer `[rows, 2, D]`.

        `name`: the calling layer's, for error messages.
        """
        payload = k.new_empty((sum(self.sent.values()), 2, k.shape[-1]))
        for index, rows in zip(self.send_index, payload.split(list(self.sent.values())), strict=True):
            rows[:, 0], rows[:, 1] = k[index], v[index]
        return self._start(payload, self.sent, self.received, f"the exchange of K and V rows{_of(name)}")

    def give_back(self, gradients: Tensor, name: str = "") -> Pending:
        """Start returning `gradients [rows, 2, D]` of received rows to their owners, which receive `[rows, 2, D]`."""
        return self._start(gradients, self.received, self.sent, f"the return of dK and dV rows{_of(name)}")

    def add(self, returned: Tensor, dk: Tensor, dv: Tensor) -> None:
        """Add `returned [rows, 2, D]` to `dk, dv [B, S_local, Hkv, D]`, rank by rank, always in the same order."""
        for index, rows in zip(self.send_index, returned.split(list(self.sent.values())), strict=True):
            dk[index] += rows[:, 0]  # the rows of one rank are distinct, so no sum is lost or depends on timing
            dv[index] += rows[:, 1]

    def _start(self, payload: Tensor, sent: dict[int, int], received: dict[int, int], what: str) -> Pending:
        start = collective if self.together else point_to_point
        return start(payload, sent, received, self.group, what)


def _of(name: str) -> str:
    return f" of {name}" if name else ""
