# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy of rows of logits and its gradient in one kernel, which compiles once for all numbers of rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # logits at a time


@triton.jit(do_not_specialize=["ignored"])
def cross_entropy_kernel(logits, labels, losses, gradient, vocab, ignored, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    """Grid `(rows,)`."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    logits += row * vocab
    gradient += row * vocab
    columns = tl.arange(0, BLOCK)
    if label == ignored:
        tl.store(losses + row, 0.0)
        if GRADIENT:
            nothing = tl.zeros([BLOCK], gradient.dtype.element_ty)
            for first in range(0, vocab, BLOCK):
                tl.store(gradient + first + columns, nothing, first + columns < vocab)
        return
    most = tl.full([], float("-inf"), logits.dtype.element_ty)
    total = tl.zeros([], logits.dtype.element_ty)
    for first in range(0, vocab, BLOCK):
        x = tl.load(logits + first + columns, first + columns < vocab, float("-inf"))
        higher = tl.maximum(most, tl.max(x, 0))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(most - finite) + tl.sum(tl.exp(x - finite), 0)
        most = higher
    wanted = tl.load(logits + label, (label >= 0) & (label < vocab), float("nan"))
    tl.store(losses + row, tl.log(total) + most - wanted)
    if GRADIENT:
        for first in range(0, vocab, BLOCK):
            x = tl.load(logits + first + columns, first + columns < vocab, float("-inf"))
            share = tl.exp(x - most) / total - tl.where(first + columns == label, 1.0, 0.0)
            tl.store(gradient + first + columns, share.to(gradient.dtype.element_ty), first + columns < vocab)


def row_losses(
    logits: Tensor, labels: Tensor, dtype: torch.dtype | None, _scratch: Tensor | None = None, *, ignored: int
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy in nats of rows `[n]`, and the gradient of their sum in `dtype`, `[n, V]`, unless None.

    `logits [n, V]` float32 or float64, `labels [n]` int64; 0 where the label is `ignored`, NaN where it is no column.
    """
    logits, labels = logits.contiguous(), labels.contiguous()
    losses = logits.new_empty(len(logits))
    gradient = None if dtype is None else torch.empty_like(logits, dtype=dtype)
    if len(logits):
        cross_entropy_kernel[(len(logits),)](
            logits, labels, losses, losses if gradient is None else gradient, logits.shape[1], ignored,
            GRADIENT=gradient is not None, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
    return losses, gradient
