# SPDX-License-Identifier: Apache-2.0
"""Next-token loss per token in float32 or better, from hidden states: logits exist only a chunk at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ring_hilbert.parallel.sharding import IGNORED

CHUNK_ELEMENTS = (
    2**25
)  # logits held at once, 128 MiB in float32; or as many as the weights, whose gradient every chunk adds to


class LossHead(nn.Module):
    """The output layer of a language model and its cross-entropy, in one.

    A module of its own, with the output layer's parameters, so that engines that shard them gather them around it.
    """

    def __init__(self, output: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = output.weight, output.bias

    def forward(self, hidden: Tensor, labels: Tensor, after: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Cross-entropy (nats) of every row: `hidden [B, S, E]`, `labels [B, S]` int64 -> `[B, S]`, 0 where IGNORED.

        float32, float64 for float64. Backward computes a chunk's logits again and sums the gradient of the weights in the
        same dtype. `after`: what else the model does to rows of logits `[n, V]`, which may be written to; nothing if None.
        """
        return _LinearLoss.apply(hidden, self.weight, self.bias, labels, after)


def count_targets(labels: Tensor) -> Tensor:
    """How many rows of `labels` have a target: int64 scalar on the device of `labels`."""
    return (labels != IGNORED).sum()


class _LinearLoss(torch.autograd.Function):
    """Cross-entropy of `after(hidden @ weight.T + bias)` by rows; keeps a logarithm per row for backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        after: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        result = hidden.new_empty(labels.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))
        hidden, labels, losses = hidden.flatten(0, -2), labels.flatten(), result.view(-1)
        totals = torch.empty_like(losses)  # log sum exp of a row's logits
        for rows in _chunks(hidden, weight):
            logits = _logits(hidden[rows], weight, bias, losses.dtype)
            logits = logits if after is None else after(logits)
            wanted = logits.gather(-1, labels[rows].clamp_min(0)[:, None]).squeeze(-1)
            most = logits.amax(-1, keepdim=True)
            totals[rows] = logits.sub_(most).exp_().sum(-1).log_().add_(most.squeeze(-1))  # in place: logits are large
            losses[rows] = totals[rows] - wanted
        ctx.save_for_backward(hidden, weight, bias, labels, totals)
        ctx.after = after
        losses.masked_fill_(labels == IGNORED, 0)
        return result

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, totals = ctx.saved_tensors
        shape, upstream = (*upstream.shape, hidden.shape[-1]), upstream.flatten().masked_fill(labels == IGNORED, 0)
        dhidden = torch.empty_like(hidden)
        dweight = torch.zeros_like(weight, dtype=totals.dtype)
        dbias = None if bias is None else torch.zeros_like(bias, dtype=totals.dtype)
        for rows in _chunks(hidden, weight):
            dlogits = logits = product = _logits(hidden[rows], weight, bias, totals.dtype)
            if ctx.after is not None:
                with torch.enable_grad():
                    logits = ctx.after(
                        product.requires_grad_().clone()
                    )  # `after` may write to the one, we to the other
                dlogits = logits.detach().clone()
            dlogits.sub_(totals[rows, None]).exp_()
            dlogits.scatter_add_(-1, labels[rows].clamp_min(0)[:, None], torch.full_like(dlogits[:, :1], -1))
            dlogits *= upstream[rows, None]
            if ctx.after is not None:
                (dlogits,) = torch.autograd.grad(logits, product, dlogits)
            rounded = dlogits.to(hidden.dtype)
            torch.mm(rounded, weight, out=dhidden[rows])
            dweight += _product(rounded.T, hidden[rows], dweight.dtype)
            if dbias is not None:
                dbias += dlogits.sum(0)
        return (
            dhidden.view(shape),
            dweight.to(weight.dtype),
            None if dbias is None else dbias.to(bias.dtype),
            None,
            None,
        )


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`[rows, V]`, not rounded to the dtype of the weights: in bfloat16 a logit of 10 would be off by 0.03."""
    logits = _product(hidden, weight.T, dtype)
    return logits if bias is None else logits.add_(bias)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """`a @ b` in `dtype`, at least as wide as theirs."""
    if a.dtype == dtype:
        return a @ b
    return torch.mm(a, b, out_dtype=dtype) if a.is_cuda else a.to(dtype) @ b.to(dtype)


def _chunks(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    step = max(CHUNK_ELEMENTS, weight.numel()) // len(weight)
    return (slice(first, first + step) for first in range(0, len(hidden), step))
