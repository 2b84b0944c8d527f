# SPDX-License-Identifier: Apache-2.0
"""The wire: asynchronous transfer of rows to and from the other ranks of a group.

The only file that sends rows. Everything runs on a separate communicator, so that it cannot be confused with other collectives
in flight in the caller's group, in whatever order. On CUDA devices NCCL works on its own stream, which first waits for the
caller's; `Pending` keeps what is being sent alive until the caller's stream waits for it.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_communicators: weakref.WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = weakref.WeakKeyDictionary()


def communicator(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of the same ranks, backend and timeout for the rows of this package alone, made on first use by all its ranks."""
    if group not in _communicators:
        ranks = dist.get_process_group_ranks(group)
        own: Any = group
        if len(ranks) > 1:
            timeout = group._get_backend(_device(group)).options._timeout
            unsorted: Any = {} if ranks == sorted(ranks) else {"sort_ranks": False}  # torch 2.11 only has sorted groups
            own = dist.new_group(
                ranks, timeout=timeout, backend=dist.get_backend_config(group), use_local_synchronization=True,
                group_desc="ring_hilbert", **unsorted,
            )  # fmt: skip
        _communicators[group] = own
    return _communicators[group]


def _device(group: dist.ProcessGroup) -> torch.device:
    return group._device_types[0] if group._device_types else torch.device("cpu")


waiting_for: list[str] = []  # `Pending.transfer` of those that threads of this process wait for


@dataclass
class Pending:
    """Rows in flight: `buffer` is valid after `wait()`. Keeps what is being sent alive until then."""

    buffer: Tensor
    sending: Tensor | None
    works: list[dist.Work]
    what: str

    @property
    def transfer(self) -> str:
        """`what`, without the rank that it begins with."""
        return self.what.partition(": ")[2]

    def wait(self) -> Tensor:
        """Wait until the rows have arrived and those to send have left; return the former.

        Raises:
            RuntimeError: if a rank died or did not arrive within the group's timeout; names the rank and the transfer.
        """
        waiting_for.append(self.transfer)
        try:
            for work in self.works:
                work.wait()
        except RuntimeError as failure:
            raise RuntimeError(f"{self.what} did not complete: {failure}") from failure
        finally:
            waiting_for.remove(self.transfer)
        self.works, self.sending = [], None
        return self.buffer


def collective(
    payload: Tensor, sent: Mapping[int, int], received: Mapping[int, int], group: dist.ProcessGroup, what: str
) -> Pending:
    """Start sending `sent[rank]` rows of `payload [rows, ...]` to every rank, in rank order, and receiving `received[rank]`.

    All ranks of the group call this, even those with nothing to send.
    """
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    splits = [[rows.get(other, 0) for other in range(world)] for rows in (received, sent)]
    buffer = payload.new_empty((sum(splits[0]), *payload.shape[1:]))
    what = f"rank {rank}: {what}"
    try:
        work = dist.all_to_all_single(buffer, payload, *splits, group=group, async_op=True)
    except RuntimeError as failure:
        raise RuntimeError(f"{what} did not start: {failure}") from failure
    return Pending(buffer, payload, [work] if work is not None else [], what)


def point_to_point(
    payload: Tensor, sent: Mapping[int, int], received: Mapping[int, int], group: dist.ProcessGroup, what: str
) -> Pending:
    """Like `collective`, with messages between the ranks concerned; only these call it, all in the same order."""
    buffer = payload.new_empty((sum(received.values()), *payload.shape[1:]))
    messages = []
    for operation, rows, tensor in ((dist.irecv, received, buffer), (dist.isend, sent, payload)):
        for other, part in zip(rows, tensor.split(list(rows.values())), strict=True):
            if len(part):
                messages.append(dist.P2POp(operation, part, group=group, group_peer=other))
    what = f"rank {dist.get_rank(group)}: {what}"
    try:
        works = dist.batch_isend_irecv(messages) if messages else []
    except RuntimeError as failure:
        raise RuntimeError(f"{what} did not start: {failure}") from failure
    return Pending(buffer, payload, works, what)


def all_rows(
    x: Tensor, lengths: Sequence[int], group: dist.ProcessGroup, what: str = "gathering rows of all ranks"
) -> list[Tensor]:
    """`x [B, L_p, ...]` of every rank on every rank, on its device; `lengths` are `L_0 ... L_{P-1}`, `what` is for errors.

    All are padded to the longest in transit, because Gloo only sends equal sizes.
    """
    padded = x.new_zeros((x.shape[0], max(lengths), *x.shape[2:]))
    padded[:, : x.shape[1]] = x
    return [piece[:, :length] for piece, length in zip(from_all(padded, group, what), lengths, strict=True)]


def from_all(x: Tensor, group: dist.ProcessGroup, what: str = "gathering values of all ranks") -> list[Tensor]:
    """`x` of every rank, of one shape on all, on every rank, on its device.

    Raises:
        RuntimeError: if a rank died or did not arrive within the group's timeout; names this rank, and `what` it was doing.
    """
    device, sends = x.device, [str(kind).split(":")[0] for kind in group._device_types]
    if sends and device.type not in sends:  # NCCL with rows on the host
        device = torch.device("cuda", torch.cuda.current_device())
    sent = x.to(device).contiguous()
    pieces = [torch.empty_like(sent) for _ in range(dist.get_world_size(group))]
    try:
        dist.all_gather(pieces, sent, group=communicator(group))
    except RuntimeError as failure:
        raise RuntimeError(f"rank {dist.get_rank(group)}: {what} did not complete: {failure}") from failure
    return [piece.to(x.device) for piece in pieces]
