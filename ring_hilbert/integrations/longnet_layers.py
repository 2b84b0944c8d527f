# SPDX-License-Identifier: Apache-2.0
"""The layers of torchscale's LongNet, with the same weight names, on the concatenated rows of several slides."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ring_hilbert.attention import dilated_attention
from ring_hilbert.ops.pattern import DilatedPattern
from ring_hilbert.parallel.prepare import Prepared

EPS = 1e-5


@dataclass(frozen=True)
class Slides:
    """The rows `[T, embed_dim]` of a batch: this rank's rows of one slide after another, class tokens first on the first rank.

    Attributes:
        rows: number of every slide's local rows.
        prepared: every slide's metadata for attention.
        leading: 1 if each slide's first row is its class token, else 0.
        tiles: number of every slide's tiles, over all ranks.
    """

    rows: tuple[slice, ...]
    prepared: tuple[Prepared, ...]
    leading: int
    tiles: tuple[int, ...]

    def per_row(self, x: Tensor) -> Tensor:
        """`x [slides]` as `[T, 1]`, each slide's value in all of its rows."""
        counts = torch.tensor([rows.stop - rows.start for rows in self.rows], device=x.device)
        return x.repeat_interleave(counts, output_size=self.rows[-1].stop)[:, None]


class SelfAttention(nn.Module):
    """Dilated attention within every slide, between its projections."""

    def __init__(self, embed_dim: int, num_heads: int, pattern: DilatedPattern, misplaced: bool) -> None:
        super().__init__()
        self.num_heads, self.pattern, self.misplaced = num_heads, pattern, misplaced
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(embed_dim, embed_dim) for _ in range(4))
        self.inner_attn_ln = nn.LayerNorm(embed_dim, eps=EPS)

    def forward(self, x: Tensor, slides: Slides) -> Tensor:
        """`[T, embed_dim]` to the same."""
        q, k, v = (f(x).unflatten(-1, (self.num_heads, -1))[None] for f in (self.q_proj, self.k_proj, self.v_proj))
        parts = [
            self.attend(q[:, rows], k[:, rows], v[:, rows], prepared)
            for rows, prepared in zip(slides.rows, slides.prepared, strict=True)
        ]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return self.out_proj(self.inner_attn_ln(out[0].flatten(1)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, prepared: Prepared) -> Tensor:
        """One slide: `[1, rows, H, D]` each."""
        if self.misplaced and misplaces(self.pattern, q.shape[1]):
            return misplaced_attention(q, k, v, self.pattern)
        return dilated_attention(q, k, v, self.pattern, prepared=prepared)


def misplaces(pattern: DilatedPattern, length: int) -> bool:
    """Whether torchscale's code puts outputs on rows of other queries: there are several segments that `r` does not divide."""
    return any(w is not None and w < length and w % r for w, r in pattern.branches)


def misplaced_attention(q: Tensor, k: Tensor, v: Tensor, pattern: DilatedPattern) -> Tensor:
    """What torchscale's code computes for any length, on one device; not a softmax where it `misplaces`.

    Segments are padded with zero rows to a multiple of `r`, and the code does not remove them before joining segments: the outputs
    of segment j land j times the padding too late, and those of the zeros on rows of the slide. So every branch attends separately,
    including its padding, and each row mixes what landed on it. As published, no gradient flows through the mixing weights.

    Args:
        q, k, v: `[B, L, H, D]`, not causal.
        pattern: with `zero_keys`.
    """
    length, outs, logs = q.shape[1], list[Tensor](), list[Tensor]()
    for branch in pattern.branches:
        w, r = min(branch.segment_length or length, length), branch.dilation_rate
        own = DilatedPattern((w + -w % r,), (r,), pattern.offset_rule)
        filled = (_filled(q, w, r), _filled(k, w, r), _filled(v, w, r))
        out, log = dilated_attention(*filled, own, causal=False, return_lse=True)
        outs.append(out[:, :length])
        logs.append(log[:, :, :length].transpose(1, 2))
    weights = torch.stack(logs).softmax(0).nan_to_num(0.0).to(q.dtype)  # NaN: no branch holds the row
    return torch.stack([weight[..., None] * out for weight, out in zip(weights, outs, strict=True)]).sum(0)


def _filled(x: Tensor, w: int, r: int) -> Tensor:
    """`[B, L, H, D]` padded with zero rows to whole segments of `w`, and each segment to a multiple of `r`."""
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % w)).unflatten(1, (-1, w))
    return F.pad(x, (0, 0, 0, 0, 0, -w % r)).flatten(1, 2)


class FeedForward(nn.Module):
    """Two projections with a layer norm between."""

    def __init__(self, embed_dim: int, ffn_dim: int, dropout: float) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(embed_dim, ffn_dim), nn.Linear(ffn_dim, embed_dim)
        self.ffn_layernorm, self.dropout = nn.LayerNorm(ffn_dim, eps=EPS), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """`[T, embed_dim]` to the same."""
        return self.dropout(self.fc2(self.ffn_layernorm(F.gelu(self.fc1(x)))))


class Layer(nn.Module):
    """An encoder layer with norms before and within its branches."""

    def __init__(
        self, embed_dim: int, ffn_dim: int, num_heads: int, pattern: DilatedPattern, misplaced: bool, dropout: float
    ) -> None:
        super().__init__()
        self.self_attn = SelfAttention(embed_dim, num_heads, pattern, misplaced)
        self.self_attn_layer_norm = nn.LayerNorm(embed_dim, eps=EPS)
        self.ffn = FeedForward(embed_dim, ffn_dim, dropout)
        self.final_layer_norm = nn.LayerNorm(embed_dim, eps=EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, slides: Slides, paths: Tensor | None) -> Tensor:
        """`[T, embed_dim]` to the same; `paths [2, slides]`: weights of each slide's two residual branches, None for 1."""
        attention = self.dropout(self.self_attn(self.self_attn_layer_norm(x), slides))
        x = x + (attention if paths is None else attention * slides.per_row(paths[0]).to(x.dtype))
        hidden = self.ffn(self.final_layer_norm(x))
        return x + (hidden if paths is None else hidden * slides.per_row(paths[1]).to(x.dtype))
