# SPDX-License-Identifier: Apache-2.0
"""torchscale's dilated attention, written from what it does, for any dtype: the judge of `zero_keys`.

For every branch rows of zeros fill the sequence up to whole segments of `w' = min(w, L)` rows, and every segment up to a multiple
of `r`. Head h keeps the rows at offset `h // ceil(H / r)`; the kept rows of a segment attend to each other densely, zeros
included. The branches are mixed by the softmax of their logarithms.

The published code joins segments as long as they were filled up to, without cutting them to `w'` first: with `misplaced`, so
does this. It is no softmax then: a row's branches are of different queries.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import ring_hilbert as rh

SCORES = 2**20  # at a time; they are recomputed in backward


def dilated_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: rh.DilatedPattern, *, misplaced: bool = False, detached: bool = False
) -> Tensor:
    """`out [B, L, H, D]` of `q, k, v [B, L, H, D]`, not causal. `detached`: no gradient through the mixture, as published."""
    outs, logs = zip(*(_branch(q, k, v, w, r, misplaced) for w, r in pattern.branches), strict=True)
    weights = torch.stack(logs).softmax(0)
    weights = weights.detach() if detached else weights
    return sum(weight[..., None] * out for weight, out in zip(weights, outs, strict=True))  # type: ignore[return-value]


def touched(pattern: rh.DilatedPattern, length: int) -> bool:
    """Whether the misplacement changes anything: several segments whose length the rate does not divide."""
    return any(w < length and w % r for w, r in pattern.branches if w is not None)


def _dense(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = q @ k.mT
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def _branch(q: Tensor, k: Tensor, v: Tensor, w: int | None, r: int, misplaced: bool) -> tuple[Tensor, Tensor]:
    """Output `[B, L, H, D]` of one branch and its logarithm `[B, L, H]`; 0 and about -inf in rows that a head does not keep."""
    batch, length, heads, dim = q.shape
    w = min(w or length, length)
    segments, filled = -(-length // w), -(-w // r) * r

    def cut(x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, 0, 0, segments * w - length)).view(batch, segments, w, heads, dim)
        return F.pad(x, (0, 0, 0, 0, 0, filled - w))

    out = q.new_zeros(batch, segments, filled, heads, dim)
    log = q.new_full((batch, segments, filled, heads), -1e8)
    q, k, v = cut(q), cut(k), cut(v)
    for head in range(heads):
        kept = slice(head // -(-heads // r), None, r)
        queries, *keys = (x[:, :, kept, head] for x in (q, k, v))
        chunks = queries.split(max(1, SCORES // (segments * queries.shape[2])), dim=2)
        parts = [checkpoint(_dense, chunk * dim**-0.5, *keys, use_reentrant=False) for chunk in chunks]
        out[:, :, kept, head], log[:, :, kept, head] = (torch.cat(x, dim=2) for x in zip(*parts, strict=True))
    size = filled if misplaced else w
    return (x[:, :, :size].flatten(1, 2)[:, :length] for x in (out, log))  # type: ignore[return-value]


def slide_encoder(
    state: dict[str, Tensor],
    x: Tensor,
    coords: Tensor,
    pattern: rh.DilatedPattern,
    *,
    heads: int,
    grids: int,
    global_pool: bool = False,
    misplaced: bool = False,
) -> list[Tensor]:
    """Prov-GigaPath's slide encoder without dropout, from a state dict: `[B, embed_dim]` before, between and after the layers, and
    as the last the one that it returns by itself. `x [B, L, in_chans]`, `coords [B, L, 2]` in pixels of tiles of 256.
    """
    depth = 1 + max(int(key.split(".")[2]) for key in state if key.startswith("encoder.layers."))

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x: Tensor, name: str, eps: float = 1e-5) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    def wave(at: Tensor, size: int) -> Tensor:
        angle = at[..., None] * 10000 ** (-torch.arange(size // 2).double() / (size // 2))
        return torch.cat((angle.sin(), angle.cos()), -1).float()

    size = state["cls_token"].shape[-1]
    place = (coords / 256).floor().long()
    assert place.min() >= 0 and place.max() < grids
    x = linear(x, "patch_embed.proj") + torch.cat((wave(place[..., 1], size // 2), wave(place[..., 0], size // 2)), -1)
    x = torch.cat((state["cls_token"].expand(len(x), -1, -1), x), 1)
    states = [x]
    for layer in range(depth):
        name = f"encoder.layers.{layer}"
        y = norm(x, f"{name}.self_attn_layer_norm")
        q, k, v = (linear(y, f"{name}.self_attn.{p}_proj").unflatten(-1, (heads, -1)) for p in "qkv")
        y = norm(dilated_attention(q, k, v, pattern, misplaced=misplaced).flatten(2), f"{name}.self_attn.inner_attn_ln")
        x = x + linear(y, f"{name}.self_attn.out_proj")
        y = linear(norm(x, f"{name}.final_layer_norm"), f"{name}.ffn.fc1")
        y = y * 0.5 * (1 + torch.erf(y / 2**0.5))
        x = x + linear(norm(y, f"{name}.ffn.ffn_layernorm"), f"{name}.ffn.fc2")
        states.append(x)
    states.append(norm(x, "encoder.layer_norm"))
    return [norm(x[:, 1:].mean(1) if global_pool else x[:, 0], "norm", 1e-6) for x in states]
