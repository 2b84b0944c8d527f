# SPDX-License-Identifier: Apache-2.0
"""Ulysses: every rank gets the whole sequence for its share of the heads, and attends as on one device.

After DeepSpeed Ulysses (arXiv 2309.14509). Heads keep their global offsets, shares may be uneven, and kv heads are replicated
where there are fewer of them than ranks. The received tensors are kept for backward instead of q, k, v and the results of this
rank's rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ring_hilbert.ops.torch_visit import compute_dtype
from ring_hilbert.parallel.execution import Execution, span
from ring_hilbert.parallel.plan import Plan
from ring_hilbert.parallel.wire import collective, communicator

ALIGNED = 16  # bytes to which tensors are aligned in the kept buffer


class Ulysses:
    """Runs a plan with the strategy "ulysses"; arguments and methods as in `Execution`."""

    def __init__(
        self, plan: Plan, rank: int, group: dist.ProcessGroup | None, device: torch.device, backend: str = "torch"
    ) -> None:
        self.plan, self.rank, self.layout = plan, rank, plan.layout
        self.group = None if group is None or plan.layout.world_size == 1 else communicator(group)
        self.inner = Execution(plan.of_heads(rank), 0, None, device, backend)
        self.heads = [slice(share.heads.start, share.heads.stop) for share in plan.shares]
        self.kv_heads = [slice(share.kv_heads.start, share.kv_heads.stop) for share in plan.shares]
        self.replicates = sum(len(share.kv_heads) for share in plan.shares) > plan.shapes.num_kv_heads

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, name: str = "", *, keep: bool = True, lse: bool = True
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Like `Execution.forward`; everything is kept, and `lse` is sent only on request, otherwise it is NaN."""
        del keep
        tensors = self._to_heads((q, k, v), (self.heads, self.kv_heads, self.kv_heads), f"q, K and V rows{_of(name)}")
        out, logs, lse_error, _ = self.inner.forward(tensors[0], tensors[1], tensors[2], scale, name)
        rows = q.new_empty(q.shape)
        self._to_rows((out,), (rows,), (self.heads,), f"out rows{_of(name)}")
        own = logs.new_full((q.shape[0], q.shape[1], q.shape[2], 1), float("nan"))
        if lse:
            self._to_rows((logs.transpose(1, 2)[..., None],), (own,), (self.heads,), f"lse{_of(name)}")
        own = own[..., 0].transpose(1, 2).contiguous()
        return rows, own, torch.zeros_like(own), _packed((*tensors, out, logs, lse_error))

    def backward(
        self, dout: Tensor, saved: Sequence[Tensor], scale: float, name: str = "", *, wide: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Like `Execution.backward`; `saved` is what was kept."""
        (dout_whole,) = self._to_heads((dout,), (self.heads,), f"dout rows{_of(name)}")
        gradients = self.inner.backward(
            dout_whole, self._unpacked(saved[-1], dout), scale, name, wide=wide or self.replicates
        )
        batch, rows, _, dim = dout.shape
        kv_shape = (batch, rows, self.plan.shapes.num_kv_heads, dim)
        dq, dk, dv = (gradients[0].new_zeros(dout.shape), *(x.new_zeros(kv_shape) for x in gradients[1:]))
        # Shares of replicated kv heads are added by the owner, so their rows are sent at higher precision.
        travels = compute_dtype(dout.dtype) if self.replicates else dout.dtype
        sent = gradients[0], gradients[1].to(travels), gradients[2].to(travels)
        kinds = (self.heads, self.kv_heads, self.kv_heads)
        for part in [slice(0, 3)] if travels == dq.dtype else [slice(0, 1), slice(1, 3)]:  # one message of each dtype
            self._to_rows(sent[part], (dq, dk, dv)[part], kinds[part], f"dq, dK and dV rows{_of(name)}")
        return (dq, dk, dv) if wide else (dq, dk.to(dout.dtype), dv.to(dout.dtype))

    # ---- rows for heads, heads for rows

    def _to_heads(self, tensors: Sequence[Tensor], kinds: Sequence[list[slice]], what: str) -> list[Tensor]:
        """Tensors `[B, S_local, heads, D]` as `[B, S, own heads, D]`; `kinds` are the heads of each rank."""
        parts = {
            other: [x[:, :, heads[other]] for x, heads in zip(tensors, kinds, strict=True)]
            for other in range(self.layout.world_size)
        }
        shapes = {
            other: [
                (len(x), rows, heads[self.rank].stop - heads[self.rank].start, x.shape[3])
                for x, heads in zip(tensors, kinds, strict=True)
            ]
            for other, rows in enumerate(self.layout.lengths)
        }
        whole = [
            x.new_empty((shape[0], self.layout.seq_len, *shape[2:]))
            for x, shape in zip(tensors, shapes[0], strict=True)
        ]
        for other, pieces in self._send(parts, shapes, what):
            for chunk in self.layout.chunks(other):
                local = slice(chunk.local, chunk.local + chunk.stop - chunk.start)
                for x, piece in zip(whole, pieces, strict=True):
                    x[:, chunk.start : chunk.stop] = piece[:, local]
        return whole

    def _to_rows(
        self, tensors: Sequence[Tensor], results: Sequence[Tensor], kinds: Sequence[list[slice]], what: str
    ) -> None:
        """Tensors `[B, S, own heads, D]` into `results [B, S_local, heads, D]`; shares of one head are added, rank by rank."""
        parts, shapes = {}, {}
        for other in range(self.layout.world_size):
            runs = self.layout.chunks(other)
            parts[other] = [torch.cat([x[:, c.start : c.stop] for c in runs] or [x[:, :0]], dim=1) for x in tensors]
            shapes[other] = [x[:, :, heads[other]].shape for x, heads in zip(results, kinds, strict=True)]
        written: set[tuple[int, int]] = set()
        for other, pieces in self._send(parts, shapes, what):
            for i, (x, heads, piece) in enumerate(zip(results, kinds, pieces, strict=True)):
                place = (i, heads[other].start)
                if place in written:
                    x[:, :, heads[other]] += piece
                else:
                    x[:, :, heads[other]] = piece
                written.add(place)

    def _send(
        self, parts: dict[int, list[Tensor]], shapes: dict[int, list[tuple[int, ...]]], what: str
    ) -> list[tuple[int, list[Tensor]]]:
        """Send every rank its `parts` in one collective; returns the parts received, of these `shapes`, by rank; our own as is."""
        own = parts.pop(self.rank)
        arrived = {self.rank: own}
        if self.group is not None:
            dim = own[0].shape[-1]
            payload = torch.cat([x.reshape(-1, dim) for pieces in parts.values() for x in pieces])
            sent = {other: sum(x.numel() // dim for x in pieces) for other, pieces in parts.items()}
            sizes = {r: [_rows(s) for s in shape] for r, shape in shapes.items() if r != self.rank}
            received = {other: sum(size) for other, size in sizes.items()}
            pending = collective(payload, sent, received, self.group, f"the exchange of {what}")
            with span("ring_hilbert: wait"):
                buffer = pending.wait()
            for other, rows in zip(sizes, buffer.split(list(received.values())), strict=True):
                pieces = rows.split(sizes[other])
                arrived[other] = [x.view(shape) for x, shape in zip(pieces, shapes[other], strict=True)]
        return sorted(arrived.items(), key=lambda item: item[0])

    def _unpacked(self, kept: Tensor, dout: Tensor) -> list[Tensor]:
        """q, k, v, out, lse and lse_error of this rank's heads."""
        batch, seq_len, dim = dout.shape[0], self.layout.seq_len, dout.shape[3]
        heads, kv_heads = (len(x) for x in self.plan.shares[self.rank])
        lse_dtype = torch.float64 if dout.dtype == torch.float64 else torch.float32
        shapes = [(batch, seq_len, n, dim) for n in (heads, kv_heads, kv_heads, heads)] + [(batch, heads, seq_len)] * 2
        tensors, at = [], 0
        for shape, dtype in zip(shapes, [dout.dtype] * 4 + [lse_dtype] * 2, strict=True):
            size = torch.Size(shape).numel() * dtype.itemsize
            tensors.append(kept[at : at + size].view(dtype).view(shape))
            at += -(-size // ALIGNED) * ALIGNED
        return tensors


def _packed(tensors: Sequence[Tensor]) -> Tensor:
    """The bytes of all tensors in one buffer, each aligned."""
    parts = []
    for x in tensors:
        parts.append(x.contiguous().view(-1).view(torch.uint8))
        parts.append(parts[-1].new_zeros(-len(parts[-1]) % ALIGNED))
    return torch.cat(parts)


def _rows(shape: tuple[int, ...]) -> int:
    return torch.Size(shape[:-1]).numel()


def _of(name: str) -> str:
    return f" of {name}" if name else ""
