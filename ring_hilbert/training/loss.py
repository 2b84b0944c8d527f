# SPDX-License-Identifier: Apache-2.0
"""Next-token loss per token in float32 or better, from hidden states: logits exist only one chunk at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ring_hilbert.parallel.sharding import IGNORED

# Logits held at once, 128 MiB in float32; or as many as there are weights, to whose gradient every chunk adds.
CHUNK_ELEMENTS = 2**25


class LossHead(nn.Module):
    """The output layer of a language model fused with its cross-entropy.

    A separate module that holds the output layer's parameters, so that engines that shard them gather them around it.

    Args:
        output: the layer.
        fused: whether the passes over a chunk's logits are one kernel where there is a GPU, or run one after another.
    """

    def __init__(self, output: nn.Linear, fused: bool = False) -> None:
        super().__init__()
        self.weight, self.bias = output.weight, output.bias
        self._rows, self._fused = _row_losses, fused

    def forward(self, hidden: Tensor, labels: Tensor, after: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Cross-entropy (nats) of every row: `hidden [B, S, E]`, `labels [B, S]` int64 -> `[B, S]`, 0 where IGNORED.

        float32, float64 for float64. Gradients are computed with the losses while a chunk's logits exist, those of the weights
        summed in the same dtype; if backward then weights rows differently, they are recomputed. `after`: the model's own
        function of rows of logits `[n, V]`, which may be written to; None for none.
        """
        rows = self._rows
        if self._fused and hidden.is_cuda:
            from ring_hilbert.kernels.cross_entropy import row_losses

            rows = partial(row_losses, ignored=IGNORED)
        chunk = _Chunk(after, rows, rows is _row_losses)
        return _LinearLoss.apply(hidden, self.weight, self.bias, labels, chunk, torch.is_grad_enabled())


class HitHead(LossHead):
    """As `LossHead`, but 1 for rows of which no logit is above that of the label, else 0, and 0 where IGNORED. Has no gradient."""

    def __init__(self, output: nn.Linear) -> None:
        super().__init__(output)
        self._rows = _row_hits


def count_targets(labels: Tensor) -> Tensor:
    """Number of rows of `labels` with a target: int64 scalar on the device of `labels`."""
    return (labels != IGNORED).sum()


class _Chunk(NamedTuple):
    """The work on a chunk's logits; `in_place`: `rows` overwrites them with its results."""

    after: Callable[[Tensor], Tensor] | None
    rows: Callable[..., tuple[Tensor, Tensor | None]]
    in_place: bool

    def __call__(self, product: Tensor, labels: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
        """Losses of rows with output-layer result `product [n, V]`, and the gradient of their sum in `dtype`, unless None."""
        if self.after is None or dtype is None:
            logits = product if self.after is None else self.after(product)
            return self.rows(logits, labels, dtype, logits if self.in_place else None)
        with torch.enable_grad():
            logits = self.after(product.requires_grad_().clone())  # `after` may write to one, we to the other
        losses, dlogits = self.rows(logits.detach(), labels, product.dtype)
        (dproduct,) = torch.autograd.grad(logits, product, dlogits)
        return losses, dproduct.to(dtype)


class _LinearLoss(torch.autograd.Function):
    """Row-wise cross-entropy of `after(hidden @ weight.T + bias)`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        chunk: _Chunk,
        differentiable: bool,
    ) -> Tensor:
        inputs = hidden.flatten(0, -2), weight, bias, labels.flatten()
        # Made in its shape: of a module that returns a view FSDP2 warns.
        losses = hidden.new_empty(labels.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))
        gradients = _sum_chunks(losses.view(-1), *inputs, chunk, differentiable and any(ctx.needs_input_grad))
        ctx.save_for_backward(*inputs, *gradients)
        ctx.chunk = chunk
        return losses

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (upstream,) = grad_outputs
        hidden, weight, bias, labels, *gradients = ctx.saved_tensors
        shape, scale = (*upstream.shape, hidden.shape[-1]), upstream.flatten()[:1].sum()
        if any(upstream.stride()):  # rows are weighted differently
            losses = upstream.new_empty(len(hidden))
            gradients = _sum_chunks(losses, hidden, weight, bias, labels, ctx.chunk, True, upstream.flatten())
            scale = torch.ones_like(scale)
        like = (hidden, weight, bias)
        dhidden, dweight, dbias = (
            None if g is None else (g * scale).to(x.dtype) for g, x in zip(gradients, like, strict=True)
        )
        assert dhidden is not None
        return dhidden.view(shape), dweight, dbias, None, None, None


def _sum_chunks(
    losses: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    chunk: _Chunk,
    differentiable: bool,
    upstream: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Write the `losses [n]` of all rows; the gradients, weighted by `upstream [n]`, of hidden, weight and bias, or None."""
    dhidden = dweight = dbias = None
    if differentiable:
        dhidden, dweight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=losses.dtype)
        dbias = None if bias is None else torch.zeros_like(bias, dtype=losses.dtype)
    for rows in _chunks(hidden, weight):
        product = _logits(hidden[rows], weight, bias, losses.dtype)
        losses[rows], dlogits = chunk(product, labels[rows], hidden.dtype if differentiable else None)
        if dlogits is None or dhidden is None or dweight is None:
            continue
        if upstream is not None:
            dlogits = (dlogits * upstream[rows, None]).to(hidden.dtype)
        torch.mm(dlogits, weight, out=dhidden[rows])
        _add_product(dweight, dlogits.T, hidden[rows])
        if dbias is not None:
            dbias += dlogits.sum(0, dtype=dbias.dtype)
    return dhidden, dweight, dbias


def _row_losses(
    logits: Tensor, labels: Tensor, dtype: torch.dtype | None, scratch: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy of rows `[n]`, 0 where IGNORED, and, unless `dtype` is None, the gradient of their sum in it, `[n, V]`.

    `scratch`: `logits`, to be overwritten, as they are large; None to leave them.
    """
    real = labels != IGNORED
    at = labels.masked_fill(~real, 0)[:, None]
    wanted, most = logits.gather(-1, at), logits.amax(-1, keepdim=True)
    powers = torch.exp(torch.sub(logits, most, out=scratch), out=scratch)
    total = powers.sum(-1, keepdim=True)
    losses = torch.where(real, (total.log() + most - wanted).squeeze(-1), 0)
    if dtype is None:
        return losses, None
    total = total.masked_fill(~real[:, None], torch.inf)
    gradient = torch.div(powers, total, out=scratch).to(dtype)
    return losses, gradient.scatter_(-1, at, ((wanted - most).exp() / total - real[:, None].to(total.dtype)).to(dtype))


def _row_hits(
    logits: Tensor, labels: Tensor, dtype: torch.dtype | None, scratch: Tensor | None = None
) -> tuple[Tensor, None]:
    """Of rows `[n, V]`; `dtype` is None, as nothing is differentiated, and `scratch` too."""
    assert dtype is None and scratch is None
    real = labels != IGNORED
    wanted = logits.gather(-1, labels.masked_fill(~real, 0)[:, None]).squeeze(-1)
    return ((wanted >= logits.amax(-1)) & real).to(logits.dtype), None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`[rows, V]`, not rounded to the dtype of the weights: in bfloat16 a logit of 10 would be off by 0.03."""
    if hidden.dtype == dtype:
        logits = hidden @ weight.T
    elif hidden.is_cuda:
        logits = torch.mm(hidden, weight.T, out_dtype=dtype)
    else:
        logits = hidden.to(dtype) @ weight.T.to(dtype)
    return logits if bias is None else logits.add_(bias)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b`, summed in the dtype of `total`, which is at least as wide as theirs."""
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _chunks(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    step = max(CHUNK_ELEMENTS, weight.numel()) // len(weight)
    return (slice(first, first + step) for first in range(0, len(hidden), step))
