# SPDX-License-Identifier: Apache-2.0
"""The definition of dilated attention in slow, plain PyTorch, against which every other path is tested.

Quadratic in memory and differentiable by ordinary autograd. Give it float64 tensors for the exact answer, or another dtype
for what plain eager autograd makes of the same definition. No optimised path imports this file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ring_hilbert.ops.order import TokenOrder
from ring_hilbert.ops.pattern import Branch, DilatedPattern


def multiplicity(
    pattern: DilatedPattern,
    length: int,
    num_kv_heads: int,
    queries: Tensor | None = None,
    keys: Tensor | None = None,
) -> Tensor:
    """How often a pair counts before any mask: int64 `[Hkv, Q, K]` for the rows `queries [Q]` and `keys [K]`, by default all.

    The sum of the weights of the branches that hold both rows in one segment; or, with `count="once"`, the weight of the innermost.
    """
    queries, keys = (torch.arange(length) if rows is None else rows for rows in (queries, keys))
    count = torch.zeros(num_kv_heads, len(queries), len(keys), dtype=torch.int64, device=queries.device)
    weights = pattern.weights or (1,) * len(pattern.branches)

    def size(weighted: tuple[Branch, int]) -> tuple[float, int]:
        return weighted[0].segment_length or math.inf, weighted[0].dilation_rate

    for branch, weight in sorted(zip(pattern.branches, weights, strict=True), key=size, reverse=True):  # innermost last
        (segment, phase), (key_segment, key_phase) = (segments(pattern, branch, rows) for rows in (queries, keys))
        same_segment = segment[:, None] == key_segment[None, :]
        for g in range(num_kv_heads):
            offset = pattern.offset(branch, g, num_kv_heads)
            held = same_segment & (phase == offset)[:, None] & (key_phase == offset)[None, :]
            count[g] = torch.where(held, weight, count[g]) if pattern.count == "once" else count[g] + weight * held
    return count


def segments(pattern: DilatedPattern, branch: Branch, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The segment of a branch in which each row lies, and its phase there: a head with that offset holds the row."""
    rows = rows + pattern.segment_shift
    w, r = branch
    segment = torch.zeros_like(rows) if w is None else rows.div(w, rounding_mode="floor")
    return segment, (rows if w is None else rows.remainder(w)).remainder(r)


def zero_keys(pattern: DilatedPattern, length: int, num_kv_heads: int) -> Tensor:
    """How many zero keys every query sees if segments are filled up with rows of zeros: int64 `[Hkv, S]`.

    All segments of a branch are padded to the length of the first, rounded up to a multiple of `r`.
    """
    count = torch.zeros(num_kv_heads, length, dtype=torch.int64)
    if not pattern.zero_keys:
        return count
    for branch in pattern.branches:
        w, r = min(branch.segment_length or length, length), branch.dilation_rate
        filled = torch.arange(-(-w // r) * r)  # the rows of one segment
        for start in range(0, length, w):
            stop = min(start + w, length)
            for g in range(num_kv_heads):
                kept = filled[filled % r == pattern.offset(branch, g, num_kv_heads)]
                real = kept[kept < stop - start]
                count[g, start + real] += len(kept) - len(real)
    return count


def allowed(
    causal: bool,
    positions: Tensor,
    document_ids: Tensor | None,
    queries: Tensor | slice = slice(None),
    keys: Tensor | slice = slice(None),
) -> Tensor:
    """Which row of `queries` may see which of `keys`: bool `[B or 1, Q, K]` from `[S]` or `[B, S]` positions and document ids."""
    positions = positions.reshape(-1, positions.shape[-1])
    at, of = positions[:, queries], positions[:, keys]
    mask = torch.ones(1, at.shape[-1], of.shape[-1], dtype=torch.bool, device=positions.device)
    if causal:
        mask = mask & (of[:, None, :] <= at[:, :, None])
    if document_ids is not None:
        ids = document_ids.reshape(-1, document_ids.shape[-1])
        at, of = ids[:, queries], ids[:, keys]
        mask = mask & (of[:, None, :] == at[:, :, None]) & (of[:, None, :] != -1)
    return mask


def dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: DilatedPattern,
    *,
    causal: bool = True,
    order: TokenOrder | None = None,
    positions: Tensor | None = None,
    document_ids: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`out[a] = sum_b m e^{s_ab} v_b / sum_b m e^{s_ab}` and `lse[a] = log sum_b m e^{s_ab}` over the whole sequence.

    Args:
        q: `[B, S, H, D]`.
        k, v: `[B, S, Hkv, D]`, `H % Hkv == 0`.
        pattern: the branches; `m` says how often they count both rows (`multiplicity`). With `zero_keys`, the keys that fill
            segments up are in both sums, with score 0 and value 0, unless causal: then they come after all rows.
        causal: key rows with a larger position are masked.
        order: if given, all tensors are in natural token order and the pattern acts on rows in this order.
        positions: integers `[S]` or `[B, S]`; default the row index (with `order`, the token index).
        document_ids: integers `[S]` or `[B, S]`; rows of different documents do not see each other, -1 sees nothing.
        scale: default `D ** -0.5`.

    Returns:
        `out [B, S, H, D]` in the dtype of q; `lse [B, H, S]` in float32 (float64 for float64). A row without a key has
        `out = 0` and `lse = -inf`. Both are differentiable here.

    Raises:
        ValueError: for `zero_keys` with document ids.
    """
    if pattern.zero_keys and document_ids is not None:
        raise ValueError("zero_keys fill up the segments of one whole sequence; leave out document_ids")
    length, num_kv_heads = q.shape[1], k.shape[2]
    positions = torch.arange(length, device=q.device) if positions is None else positions
    count = multiplicity(pattern, length, num_kv_heads).to(q.device)
    zeros = zero_keys(pattern, length, num_kv_heads).to(q.device) if pattern.zero_keys and not causal else None
    if order is not None:  # token t is at row inverse[t]: look the pattern up there and leave every tensor as it is
        row = order.inverse(length).to(q.device)
        count, zeros = count[:, row][:, :, row], None if zeros is None else zeros[:, row]
    m = count * allowed(causal, positions, document_ids)[:, None]
    return weighted_softmax(q, k, v, m, q.shape[-1] ** -0.5 if scale is None else scale, zeros)


def weighted_softmax(
    q: Tensor, k: Tensor, v: Tensor, m: Tensor, scale: float, zeros: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention in which every pair counts as often as `m` says; what `dilated_attention` returns.

    Args:
        q: `[B, Q, H, D]`.
        k, v: `[B, K, Hkv, D]`.
        m: integers `[B or 1, Hkv, Q, K]`.
        scale: factor on the scores.
        zeros: how many keys of score 0 and value 0 a query sees besides, integers `[Hkv, Q]`.
    """
    num_heads = q.shape[2]
    heads_first = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    qh, kh, vh = (x.repeat_interleave(num_heads // x.shape[1], dim=1) for x in heads_first)  # [B, H, Q or K, D]
    m = m.repeat_interleave(num_heads // m.shape[1], dim=1)
    scores = scale * (qh @ kh.transpose(-1, -2))
    scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    scores = torch.where(m > 0, scores + m.clamp(min=1).to(scores.dtype).log(), float("-inf"))
    covered = (m > 0).any(-1, keepdim=True).expand((*scores.shape[:-1], 1))
    if zeros is not None:  # one more key, of value 0, counted as often as there are zero keys
        zeros = zeros.repeat_interleave(num_heads // len(zeros), dim=0)[..., None].to(scores.dtype)
        scores = torch.cat((scores, zeros.log().expand_as(covered)), dim=-1)
        vh = torch.nn.functional.pad(vh, (0, 0, 0, 1))
    safe = torch.where(covered, scores, 0.0)  # keeps NaN out of the gradient of rows without a key
    lse = torch.where(covered[..., 0], safe.logsumexp(-1), float("-inf"))
    weights = torch.where(covered, safe.softmax(-1), 0.0)
    out = (weights.to(q.dtype) @ vh).transpose(1, 2)
    return out, lse


class Comparison(NamedTuple):
    """Errors of one quantity against float64, over the rows that see a key: of a path and of eager autograd."""

    max_error: float
    mean_error: float
    eager_max_error: float
    eager_mean_error: float
    same_rows_uncovered: bool


def compare(
    attend: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: DilatedPattern,
    *,
    dout: Tensor | None = None,
    backend: str = "auto",
    **facts: Any,
) -> dict[str, Comparison]:
    """The debug switch: run a call on its path, and by the definition with autograd in float64 and in the dtype of q.

        rh.reference.compare(rh.dilated_attention, q, k, v, pattern, backend="triton", document_ids=ids)

    Args:
        attend: `rh.dilated_attention`, or a callable with its arguments.
        q, k, v: of the call, `[B, S, H, D]` and twice `[B, S, Hkv, D]`, on one device; quadratic memory.
        pattern: of the call.
        dout: gradient of out, `[B, S, H, D]`; default random.
        backend: of `attend`.
        facts: causal, order, positions, document_ids and scale of the call.

    Returns:
        The errors of "out", "lse", "dq", "dk" and "dv".
    """
    if dout is None:
        dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(0)).to(q)

    def run(call: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
        x = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
        out, lse = call(*x, pattern, **facts, **options)
        gradients = torch.autograd.grad(out, x, dout.to(out.dtype))
        return dict(zip(("out", "lse", "dq", "dk", "dv"), (out.detach(), lse.detach(), *gradients), strict=True))

    exact, eager = run(dilated_attention, torch.float64), run(dilated_attention, q.dtype)
    ours = run(attend, q.dtype, backend=backend, return_lse=True)
    result = {}
    for name, truth in exact.items():
        seen = truth != float("-inf")
        errors = [(x[name].double() - truth)[seen].abs() for x in (ours, eager)]
        (most, mean), (eager_most, eager_mean) = (
            (float(e.max()), float(e.mean())) if len(e) else (0.0, 0.0) for e in errors
        )
        alike = bool(torch.equal(ours[name] != float("-inf"), seen))
        result[name] = Comparison(most, mean, eager_most, eager_mean, alike)
    return result
