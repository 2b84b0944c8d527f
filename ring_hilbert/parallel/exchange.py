# SPDX-License-Identifier: Apache-2.0
"""The exchange: the rows other ranks read, there and back, in one collective per direction.

The only file that puts rows on the wire. A payload row is one kv head of one row: `[2, D]`, K and V or dK and dV together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ring_hilbert.parallel.crossings import Block
from ring_hilbert.parallel.plan import RankPlan


@dataclass
class Pending:
    """A collective in flight: `buffer` is valid after `wait()`. Keeps what is being sent alive until then."""

    buffer: Tensor
    sending: Tensor
    work: dist.Work | None
    what: str

    def wait(self) -> Tensor:
        """Wait for the collective and return the received payload rows."""
        if self.work is not None:
            try:
                self.work.wait()
            except RuntimeError as failure:
                raise RuntimeError(f"{self.what} did not complete: {failure}") from failure
        return self.buffer


class Exchange:
    """The shipments of one rank as index tensors on a device.

    Args:
        rank_plan: whose `sent` and `received` blocks give the rows and their order in the buffers.
        group: the process group.
        device: where K and V live.
    """

    def __init__(self, rank_plan: RankPlan, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group, self.rank = group, rank_plan.rank
        self.received = [sum(block.size for block in blocks) for blocks in rank_plan.received]
        self.sent = [sum(block.size for block in blocks) for blocks in rank_plan.sent]
        indices = [_payload_index(blocks, rank_plan) for blocks in rank_plan.sent]
        self.send_index = [tuple(torch.from_numpy(i).to(device) for i in index) for index in indices]

    def fetch(self, k: Tensor, v: Tensor, name: str = "") -> Pending:
        """Start sending the rows of `k, v [B, S_local, Hkv, D]` that others read; the buffer receives `[rows, 2, D]`.

        `name` is what to call the caller, a layer, in an error message.
        """
        payload = torch.cat([torch.stack((k[index], v[index]), dim=1) for index in self.send_index])
        return self._start(payload, self.received, self.sent, f"the exchange of K and V rows{_of(name)}")

    def give_back(self, gradients: Tensor, name: str = "") -> Pending:
        """Start returning `gradients [rows, 2, D]` of received rows to their owners; they receive `[rows, 2, D]`."""
        return self._start(gradients, self.sent, self.received, f"the return of dK and dV rows{_of(name)}")

    def add(self, returned: Tensor, dk: Tensor, dv: Tensor) -> None:
        """Add `returned [rows, 2, D]` onto `dk, dv [B, S_local, Hkv, D]`, rank by rank: always in the same order."""
        for index, rows in zip(self.send_index, returned.split(self.sent), strict=True):
            dk[index] += rows[:, 0]  # rows of one rank are distinct, so nothing is lost and nothing depends on timing
            dv[index] += rows[:, 1]

    def _start(self, payload: Tensor, received: list[int], sent: list[int], what: str) -> Pending:
        buffer = payload.new_empty((sum(received), *payload.shape[1:]))
        work = dist.all_to_all_single(buffer, payload, received, sent, group=self.group, async_op=True)
        return Pending(buffer, payload, work, f"rank {self.rank}: {what}")


def _of(name: str) -> str:
    return f" of {name}" if name else ""


def _payload_index(blocks: list[Block], rank_plan: RankPlan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(batch entry, local row, kv head) of every payload row, in the order `Block` defines: entry, head, row."""
    parts = []
    for block in blocks:
        grid = np.meshgrid(
            np.asarray(block.entries), np.asarray(block.heads), _local(block.rows, rank_plan), indexing="ij"
        )
        parts.append(np.stack([axis.reshape(-1) for axis in grid]))
    entry, head, row = np.concatenate(parts, axis=1) if parts else np.empty((3, 0), np.int64)
    return entry, row, head


def _local(rows: np.ndarray, rank_plan: RankPlan) -> np.ndarray:
    """Local rows of whole-sequence `rows` that this rank owns."""
    local = np.empty_like(rows)
    for chunk in rank_plan.chunks:
        inside = (rows >= chunk.start) & (rows < chunk.stop)
        local[inside] = rows[inside] - chunk.start + chunk.local
    return local
