# SPDX-License-Identifier: Apache-2.0
"""The published LongNet algorithm on one device, as a baseline: gather, dense kernel, scatter, mix.

Written from the paper (arXiv 2307.02486, sections 2.2 and 2.3). Every branch gathers its rows into dense segments, runs the
device's fused kernel on the segments as a batch, and scatters outputs and log-sum-exps back to all rows; the branches are then
mixed by the softmax of their log-sum-exps. As in the authors' release the mixing weights are detached, so the forward equals the
operator's but the gradients of q and k do not. With `zero_keys` rows of zeros fill segments up, as there, so that lengths need not
divide; they are removed again segment by segment, which the release does not do (docs/torchscale.md).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ring_hilbert.ops.pattern import DilatedPattern, Residue


def check(pattern: DilatedPattern, length: int) -> None:
    """Raise ValueError unless the algorithm is defined: segments start at row 0, and are full or filled up with zeros.

    Its branches count alike and each for itself.
    """
    if pattern.weights is not None or pattern.count != "per_branch":
        raise ValueError(f"LongNet counts pairs per branch and has no weights, got {pattern}; use the defaults")
    if pattern.segment_shift:
        raise ValueError(f"LongNet has no segment_shift, got {pattern.segment_shift}; use 0")
    if pattern.zero_keys:
        return
    for w, r in pattern.branches:
        w = length if w is None else w
        if length % w:
            raise ValueError(f"LongNet needs segment lengths that divide the length, got w={w} and {length} rows")
        if w % r:
            raise ValueError(f"LongNet needs dilation rates that divide the segment length, got r={r} and w={w}")


def dilated_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: DilatedPattern, *, causal: bool = True, scale: float | None = None
) -> Tensor:
    """LongNet's dilated attention, differentiated by autograd with detached mixing weights.

    Args:
        q: `[B, S, H, D]`.
        k, v: `[B, S, Hkv, D]`, `H % Hkv == 0`.
        pattern: the branches.
        causal: mask keys of later rows.
        scale: factor on the scores; default `D ** -0.5`.

    Returns:
        `[B, S, H, D]`; rows that no branch holds are 0.

    Raises:
        ValueError: if lengths do not divide (`check`), or if no fused kernel takes the tensors.
    """
    batch, length, kv_heads = q.shape[0], q.shape[1], k.shape[2]
    check(pattern, length)
    outs, places, logs = [], [], []
    for branch in pattern.branches:
        w, r = min(branch.segment_length or length, length), branch.dilation_rate
        residues = pattern.residues(branch, kv_heads)
        qs, ks, vs = (_Gather.apply(_segments(_filled(x, w, r), r, kv_heads), residues) for x in (q, k, v))
        out, lse = _kernel(qs, ks, vs, causal, scale)
        outs.append(out)
        places.append((residues, r))
        logs.append(_cut(_scatter(lse[..., None], residues, r, float("-inf")), (batch, length, q.shape[2], 1), w))
    weights = torch.stack(logs).softmax(0).nan_to_num(0.0)  # NaN: no branch holds the row
    terms = (
        _cut(_Scatter.apply(out, *place), q.shape, min(branch.segment_length or length, length)) * weight.to(q.dtype)
        for out, place, weight, branch in zip(outs, places, weights, pattern.branches, strict=True)
    )
    return functools.reduce(operator.add, terms)


def _filled(x: Tensor, w: int, r: int) -> Tensor:
    """`[B, S, H, D]` as `[B * segments, rows, H, D]`, padded with zero rows to whole segments and these to a multiple of `r`."""
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % w)) if x.shape[1] % w else x
    x = x.reshape(-1, w, *x.shape[2:])
    return F.pad(x, (0, 0, 0, 0, 0, -w % r)) if w % r else x


def _cut(x: Tensor, shape: Sequence[int], w: int) -> Tensor:
    """The inverse of `_filled` and `_segments`: `shape [B, S, H, D]`."""
    batch, length, heads, dim = shape
    return x.reshape(batch, -1, x.shape[1] * x.shape[2], heads, dim)[:, :, :w].flatten(1, 2)[:, :length]


def _segments(x: Tensor, r: int, kv_heads: int) -> Tensor:
    """`[N, rows, H, D]` as `[N, rows / r, r, Hkv, G, D]`: a view."""
    return x.reshape(len(x), -1, r, kv_heads, x.shape[2] // kv_heads, x.shape[3])


def _gather(x: Tensor, residues: list[Residue]) -> Tensor:
    """Each head's own rows of `[N, rows, r, Hkv, G, D]`, as `[N, H, rows, D]`."""
    if x.shape[2] == 1:
        return x.squeeze(2).flatten(2, 3).transpose(1, 2)
    rows = x.new_empty((*x.shape[:2], *x.shape[3:]))
    for offset, heads in residues:
        rows[:, :, heads.slice] = x[:, :, offset, heads.slice]
    return rows.flatten(2, 3).transpose(1, 2)


def _scatter(rows: Tensor, residues: list[Residue], r: int, fill: float) -> Tensor:
    """The inverse of `_gather`: `[N, H, rows, D]` as `[N, rows, r, Hkv, G, D]`, `fill` elsewhere."""
    kv_heads = sum(len(heads.indices) for _, heads in residues)
    rows = rows.transpose(1, 2).unflatten(2, (kv_heads, -1))
    if r == 1:
        return rows.unsqueeze(2)
    full = rows.new_full((*rows.shape[:2], r, *rows.shape[2:]), fill)
    for offset, heads in residues:
        full[:, :, offset, heads.slice] = rows[:, :, heads.slice]
    return full


class _Gather(torch.autograd.Function):
    """`_gather`; its gradient scatters. One copy either way, where indexing would take a full-size copy per head class."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residues: list[Residue]) -> Tensor:
        ctx.place = residues, x.shape[2]
        return _gather(x, residues)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        residues, r = ctx.place
        return _scatter(grad_outputs[0], residues, r, 0.0), None


class _Scatter(torch.autograd.Function):
    """`_scatter` into zeros; its gradient gathers."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, residues: list[Residue], r: int) -> Tensor:
        ctx.residues = residues
        return _scatter(rows, residues, r, 0.0)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return _gather(grad_outputs[0], ctx.residues), None, None


def _kernel(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    """Fused attention of `[N, H, rows, D]`: the output, and lse `[N, H, rows]` outside autograd."""
    aten, name = torch.ops.aten, kernel_for(q.device, q.dtype, q.shape[3], causal)
    if name == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    elif name == "cudnn":
        out, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, scale=scale)[:2]
    elif name == "flash":
        out, lse = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)[:2]
    else:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)[:2]
        lse = lse[..., : q.shape[2]]  # the kernel rounds the rows up
    return out, lse.detach().reshape(q.shape[:3])


@functools.cache
def kernel_for(device: torch.device, dtype: torch.dtype, head_dim: int, causal: bool) -> str:
    """PyTorch's fastest fused kernel that returns lse: "cpu", on CUDA devices "cudnn", "flash" or "efficient".

    Raises:
        ValueError: if none takes such tensors (for instance float64 on CUDA).
    """
    if device.type == "cpu":
        return "cpu"
    cuda, x = torch.backends.cuda, torch.empty(1, 1, 128, head_dim, device=device, dtype=dtype, requires_grad=True)
    params = cuda.SDPAParams(x, x, x, None, 0.0, causal, False)
    if cuda.can_use_cudnn_attention(params):
        return "cudnn"
    if cuda.can_use_flash_attention(params) and head_dim % 8 == 0:
        return "flash"
    if cuda.can_use_efficient_attention(params):
        return "efficient"
    raise ValueError(
        f"LongNet needs a fused kernel, and PyTorch has none for {dtype} with head dim {head_dim} on {device}"
    )
