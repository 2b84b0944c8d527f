# SPDX-License-Identifier: Apache-2.0
"""`gather_rows`: the rows of all ranks back in natural token order, for metrics, predictions and inspection."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ring_hilbert.parallel.prepared import Prepared
from ring_hilbert.parallel.wire import all_rows, from_all


def gather_rows(x: Tensor, prepared: Prepared) -> Tensor:
    """A model's outputs for all tokens of the sequence, as if one device had run it in natural order.

        logits = rh.gather_rows(model(**batch).logits.argmax(-1), batch["ring_hilbert"])  # [B, S], in the tokenizer's order

    A collective: every rank of the group calls it with its rows, and every rank gets the whole result, S / S_local times the
    memory. Without a group it only reorders. One value per row (predictions, token losses, labels) costs as little as the
    tokens; logits take `4 * B * S * vocabulary` bytes on every rank.

    Args:
        x: this rank's rows `[B, S_local, ...]` of any dtype, in the order of `prepared.rows`.
        prepared: of this batch, from `shard_batch` or `prepare`.

    Returns:
        `[B, S, ...]` on the device of `x`, without gradient: index t holds the row of token t; padding is where it was.

    Raises:
        ValueError: on every rank, if a rank's `x` does not have the rows of this batch, or differs in dtype or shape from others'.
    """
    error = None
    if x.ndim < 2 or x.shape[1] != prepared.local_len or prepared.rows.shape[0] not in (1, x.shape[0]):
        batch = prepared.rows.shape[0] if prepared.rows.shape[0] > 1 else "B"
        error = f"x must be [{batch}, S_local={prepared.local_len}, ...], the rows of this rank, got {list(x.shape)}"
    shape = (*x.shape[:1], *x.shape[2:])
    prepared.agree({"shape of x but for its rows": shape, "dtype of x": x.dtype, "device of x": x.device.type}, error)
    rows, values = [prepared.rows.to(x.device).expand(x.shape[0], -1)], [x.detach()]
    if prepared.group is not None:
        rows, values = (all_rows(mine[0], prepared.layout.lengths, prepared.group) for mine in (rows, values))
    whole = x.new_empty((x.shape[0], prepared.layout.seq_len, *x.shape[2:]))
    entries = torch.arange(x.shape[0], device=x.device)[:, None]
    for tokens, part in zip(rows, values, strict=True):
        whole[entries, tokens] = part
    return whole


def gather_batch(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`x [B, ...]` of all ranks, of the same shape on each, concatenated: `[P * B, ...]` on every rank."""
    return torch.cat(from_all(x, group))


def sum_over_ranks(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of all ranks' `x` (of the same shape) on every rank; the gradient is that of the sum of all ranks' losses."""
    return _Sum.apply(x, group)


class _Sum(torch.autograd.Function):
    """The sum over all ranks, in their order; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return torch.stack(from_all(x, group)).sum(0)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return torch.stack(from_all(grad_outputs[0], ctx.group)).sum(0), None
