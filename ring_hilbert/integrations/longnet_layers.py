# SPDX-License-Identifier: Apache-2.0
"""The layers of torchscale's LongNet, with its names of weights, on the rows of several slides one after the other."""

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
    """The rows `[T, embed_dim]` of a batch: slide after slide, of each this rank's, the class token first on the first rank.

    Attributes:
        rows: of every slide.
        prepared: what its attention needs to know.
        leading: 1 where each slide's first row is its class token, else 0.
        tiles: of every slide, over all ranks.
    """

    rows: tuple[slice, ...]
    prepared: tuple[Prepared, ...]
    leading: int
    tiles: tuple[int, ...]

    def per_row(self, x: Tensor) -> Tensor:
        """`x [slides]` as `[T, 1]`, the value of a slide in each of its rows."""
        counts = torch.tensor([rows.stop - rows.start for rows in self.rows], device=x.device)
        return x.repeat_interleave(counts, output_size=self.rows[-1].stop)[:, None]


class SelfAttention(nn.Module):
    """Dilated attention of every slide by itself, between its projections."""

    def __init__(self, embed_dim: int, num_heads: int, pattern: DilatedPattern) -> None:
        super().__init__()
        self.num_heads, self.pattern = num_heads, pattern
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
        return dilated_attention(q, k, v, self.pattern, prepared=prepared)


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
    """A layer of the encoder, normalised before and within."""

    def __init__(self, embed_dim: int, ffn_dim: int, num_heads: int, pattern: DilatedPattern, dropout: float) -> None:
        super().__init__()
        self.self_attn = SelfAttention(embed_dim, num_heads, pattern)
        self.self_attn_layer_norm = nn.LayerNorm(embed_dim, eps=EPS)
        self.ffn = FeedForward(embed_dim, ffn_dim, dropout)
        self.final_layer_norm = nn.LayerNorm(embed_dim, eps=EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, slides: Slides, paths: Tensor | None) -> Tensor:
        """`[T, embed_dim]` to the same; `paths [2, slides]`: what the two residual branches of a slide count, None for 1."""
        attention = self.dropout(self.self_attn(self.self_attn_layer_norm(x), slides))
        x = x + (attention if paths is None else attention * slides.per_row(paths[0]).to(x.dtype))
        hidden = self.ffn(self.final_layer_norm(x))
        return x + (hidden if paths is None else hidden * slides.per_row(paths[1]).to(x.dtype))
