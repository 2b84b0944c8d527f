# SPDX-License-Identifier: Apache-2.0
"""A pattern as a FlexAttention mask: the same softmax by PyTorch's own programmable kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from ring_hilbert.ops.pattern import Branch, DilatedPattern

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Weighted = tuple[Branch, int]  # a branch and its weight


def multiplicity(
    pattern: DilatedPattern, from_outermost: Sequence[Weighted], kv_heads: int, g: Tensor, a: Tensor, b: Tensor
) -> Tensor:
    """How often rows `a` and `b` count for kv head `g` (broadcastable int tensors), whatever masks them: int32."""
    a, b = a + pattern.segment_shift, b + pattern.segment_shift
    count = torch.zeros_like(a, dtype=torch.int32)
    for (w, r), weight in from_outermost:
        offset = (g + pattern.head_shift) % r if pattern.offset_rule == "modulo" else g // -(-kv_heads // r)
        within_a, within_b = (a, b) if w is None else (a % w, b % w)
        held = (within_a % r == offset) & (within_b % r == offset)
        held = held if w is None else held & (a // w == b // w)
        times = held.to(torch.int32) * weight
        count = torch.where(held, times, count) if pattern.count == "once" else count + times
    return count


def attention(
    pattern: DilatedPattern,
    length: int,
    heads: int,
    kv_heads: int,
    causal: bool,
    device: torch.device,
    compiled: bool = True,
) -> Attention:
    """The operator on rows in natural order by FlexAttention, as a function of q, k, v `[B, S, H, D]`.

    A block mask skips 128 x 128 blocks that the pattern leaves out entirely; log multiplicities are added to the scores.

    Args:
        pattern: the branches.
        length: rows, S.
        heads, kv_heads: of q and of k, v.
        causal: mask keys of later rows.
        device: of the block mask.
        compiled: if False, PyTorch's eager fallback runs, quadratic in memory: for tests only.
    """
    group = heads // kv_heads
    weighted = [(branch, pattern.weight(branch)) for branch in reversed(pattern.from_innermost)]

    def mask_mod(_b: Tensor, h: Tensor, a: Tensor, b: Tensor) -> Tensor:
        held = multiplicity(pattern, weighted, kv_heads, h // group, a, b) > 0
        return held & (b <= a) if causal else held

    def score_mod(score: Tensor, _b: Tensor, h: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return score + multiplicity(pattern, weighted, kv_heads, h // group, a, b).clamp(min=1).to(score.dtype).log()

    make, kernel = create_block_mask, flex_attention
    if compiled:
        make, kernel = torch.compile(make), torch.compile(kernel, dynamic=False)
    block_mask = make(mask_mod, None, heads, length, length, device=str(device))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = kernel(q, k, v, score_mod=score_mod, block_mask=block_mask, enable_gqa=group > 1)
        return out.transpose(1, 2)

    return call
