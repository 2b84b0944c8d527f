# SPDX-License-Identifier: Apache-2.0
"""The wire of exchange and ring: the rows other ranks read, there and back.

A payload row is one kv head of one row: `[2, D]`, K and V or dK and dV together.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ring_hilbert.kernels.upload import upload
from ring_hilbert.parallel.crossings import Block
from ring_hilbert.parallel.plan import RankPlan
from ring_hilbert.parallel.remote import Hop
from ring_hilbert.parallel.wire import Pending, collective, point_to_point


class Exchange:
    """The shipments of one hop as index tensors on a device.

    Args:
        hop: what travels: the blocks give the rows and their order in the buffers.
        rank_plan: of this rank.
        group: the process group.
        device: where K and V live.
        together: one collective of all ranks; else messages from and to the ranks of the hop.
    """

    def __init__(
        self, hop: Hop, rank_plan: RankPlan, group: dist.ProcessGroup, device: torch.device, *, together: bool
    ) -> None:
        self.group, self.together = group, together
        self.received = {owner: sum(block.size for block in blocks) for owner, blocks in sorted(hop.received.items())}
        self.sent = {reader: sum(block.size for block in blocks) for reader, blocks in sorted(hop.sent.items())}
        indices = [_payload_index(hop.sent[reader], rank_plan) for reader in self.sent]
        self.send_index = [tuple(upload(torch.from_numpy(i), device) for i in index) for index in indices]

    def fetch(self, k: Tensor, v: Tensor, name: str = "") -> Pending:
        """Start sending the rows of `k, v [B, S_local, Hkv, D]` that others read; the buffer receives `[rows, 2, D]`.

        `name` is what to call the caller, a layer, in an error message.
        """
        payload = k.new_empty((sum(self.sent.values()), 2, k.shape[-1]))
        for index, rows in zip(self.send_index, payload.split(list(self.sent.values())), strict=True):
            rows[:, 0], rows[:, 1] = k[index], v[index]
        return self._start(payload, self.sent, self.received, f"the exchange of K and V rows{_of(name)}")

    def give_back(self, gradients: Tensor, name: str = "") -> Pending:
        """Start returning `gradients [rows, 2, D]` of received rows to their owners; they receive `[rows, 2, D]`."""
        return self._start(gradients, self.received, self.sent, f"the return of dK and dV rows{_of(name)}")

    def add(self, returned: Tensor, dk: Tensor, dv: Tensor) -> None:
        """Add `returned [rows, 2, D]` onto `dk, dv [B, S_local, Hkv, D]`, rank by rank: always in the same order."""
        for index, rows in zip(self.send_index, returned.split(list(self.sent.values())), strict=True):
            dk[index] += rows[:, 0]  # rows of one rank are distinct, so nothing is lost and nothing depends on timing
            dv[index] += rows[:, 1]

    def _start(self, payload: Tensor, sent: dict[int, int], received: dict[int, int], what: str) -> Pending:
        start = collective if self.together else point_to_point
        return start(payload, sent, received, self.group, what)


def _of(name: str) -> str:
    return f" of {name}" if name else ""


def _payload_index(blocks: list[Block], rank_plan: RankPlan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(batch entry, local row, kv head) of every payload row: block by block, in these by entry, then row."""
    sizes = [block.size for block in blocks]
    empty = np.empty(0, np.int64)
    entry = np.concatenate([empty, *(np.repeat(block.entries, len(block.rows)) for block in blocks)])
    row = np.concatenate([empty, *(np.tile(_local(block.rows, rank_plan), len(block.entries)) for block in blocks)])
    return entry, row, np.repeat(np.array([block.head for block in blocks], np.int64), sizes)


def _local(rows: np.ndarray, rank_plan: RankPlan) -> np.ndarray:
    """Local rows of whole-sequence `rows` that this rank owns."""
    local = np.empty_like(rows)
    for chunk in rank_plan.chunks:
        inside = (rows >= chunk.start) & (rows < chunk.stop)
        local[inside] = rows[inside] - chunk.start + chunk.local
    return local
