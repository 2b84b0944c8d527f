# SPDX-License-Identifier: Apache-2.0
"""The operator as modules: with its projections, and for the heads that another library assigns to this rank."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ring_hilbert.attention import dilated_attention
from ring_hilbert.ops.order import TokenOrder
from ring_hilbert.ops.pattern import DilatedPattern
from ring_hilbert.parallel.agreement import Group, resolve_group
from ring_hilbert.parallel.arguments import check_choices, kv_heads_of
from ring_hilbert.parallel.heads import head_shares
from ring_hilbert.parallel.prepared import Prepared


class MultiheadDilatedAttention(nn.Module):
    """Exact dilated self-attention (LongNet, arXiv 2307.02486) with its projections, on one device or sharded over ranks.

    `out_proj(dilated_attention(q_proj(x), k_proj(x), v_proj(x)))`, without dropout, position encoding or cache. Its parameters
    are those of four `nn.Linear` named `q_proj`, `k_proj`, `v_proj`, `out_proj`, with torch's initialisation.
    Works under `torch.compile(fullgraph=True)`; a new batch of the same shape recompiles nothing.

    Args:
        embed_dim: size of the last axis of the input and the output.
        num_heads: query heads H.
        pattern: segment lengths and dilation rates.
        num_kv_heads: key and value heads, a divisor of `num_heads`; default `num_heads`.
        head_dim: D; default `embed_dim / num_heads`.
        order: the order in which the pattern cuts the tokens of a call without `prepared`; input and output stay in
            natural order. None cuts them as given.
        causal: as in `prepare`.
        bias: whether the projections have one.
        device, dtype: of the parameters; float16, bfloat16, float32 or float64.

    Raises:
        ValueError: for sizes that are not positive or not multiples as required, or a pattern or order of another type.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        pattern: DilatedPattern,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        order: TokenOrder | None = None,
        causal: bool = True,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"embed_dim": embed_dim, "num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        for name, size in sizes.items():
            if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
                raise ValueError(f"{name} must be a positive integer, got {size!r}")
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(
                f"embed_dim={embed_dim} must be a multiple of num_heads={num_heads}, or head_dim must be given"
            )
        num_kv_heads = kv_heads_of(num_heads, num_kv_heads)
        check_choices(order=order)
        if not isinstance(pattern, DilatedPattern):
            raise ValueError(f"pattern must be a DilatedPattern, got {type(pattern).__name__}")
        self.embed_dim, self.num_heads, self.num_kv_heads = embed_dim, num_heads, num_kv_heads
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.pattern, self.order, self.causal = pattern, order, causal

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=bias, device=device, dtype=dtype)

        self.q_proj = linear(embed_dim, num_heads * self.head_dim)
        self.k_proj = linear(embed_dim, num_kv_heads * self.head_dim)
        self.v_proj = linear(embed_dim, num_kv_heads * self.head_dim)
        self.out_proj = linear(num_heads * self.head_dim, embed_dim)

    def forward(self, x: Tensor, *, prepared: Prepared | None = None) -> Tensor:
        """Attend among the rows of `x`.

        Without `prepared`, `x` is the whole sequence on one device, in natural token order and one document. With it, the rows
        of `x` are what `prepared` says they are: rows from `shard_batch` are in curve order already and are not permuted again,
        whatever the module's `order`; only rows prepared with `prepare(order=...)` are in natural order, and then that order
        must be the module's, if it has one.

        Args:
            x: `[B, S, embed_dim]`, the rows of this rank, in the dtype of the parameters.
            prepared: the batch's metadata, from `prepare` or `shard_batch`.

        Returns:
            `[B, S, embed_dim]`, rows as in `x`.

        Raises:
            ValueError: for another shape; for a `prepared` that was made for other rows, or whose `causal` or order differs
                from the module's.
        """
        if x.ndim != 3 or x.shape[-1] != self.embed_dim:
            raise ValueError(f"x must be [B, S, embed_dim={self.embed_dim}], got {list(x.shape)}")
        order = self.order if prepared is None or prepared.order is not None else None
        q, k, v = (
            projection(x).unflatten(-1, (heads, self.head_dim))
            for projection, heads in (
                (self.q_proj, self.num_heads),
                (self.k_proj, self.num_kv_heads),
                (self.v_proj, self.num_kv_heads),
            )
        )
        out = dilated_attention(q, k, v, self.pattern, causal=self.causal, order=order, prepared=prepared)
        return self.out_proj(out.flatten(2))

    def extra_repr(self) -> str:
        """What `print` shows besides the projections."""
        order = "" if self.order is None else f", order={self.order}"
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, causal={self.causal}, {self.pattern}{order}"
        )


class UlyssesAttention(nn.Module):
    """Dilated attention of one rank's heads, for libraries that exchange heads for rows themselves (DeepSpeed Ulysses).

        attention = deepspeed.sequence.layer.DistributedAttention(rh.UlyssesAttention(pattern, group, 32, 8), group)
        out = attention(q, k, v, 0)  # q [B, S_local, 32, D]; k, v [B, S_local, 8, D]; 0: the axis of the batch

    Heads keep the offsets that they have among all heads, so the result is that of `dilated_attention` on all of them. Without
    such a library, `dilated_attention(..., strategy="ulysses")` does all of it. Source: arXiv 2309.14509.

    Args:
        pattern: segment lengths and dilation rates.
        group: process group or 1-D DeviceMesh over which heads are exchanged for rows.
        num_heads, num_kv_heads: heads of q, and of k and v, over all ranks; `num_kv_heads` defaults to `num_heads`.
        causal, scale, backend: as in `dilated_attention`; `causal` is that of `prepared`, if there is one.
        batch_dim: axis of the batch, 0 for `[B, S, heads, D]`, 1 for `[S, B, heads, D]`.

    Raises:
        ValueError: for more ranks than heads, or `num_heads` that is no multiple of `num_kv_heads`.
    """

    def __init__(
        self,
        pattern: DilatedPattern,
        group: Group,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        causal: bool = True,
        scale: float | None = None,
        backend: str = "auto",
        batch_dim: int = 0,
    ) -> None:
        super().__init__()
        num_kv_heads = kv_heads_of(num_heads, num_kv_heads)
        if batch_dim not in (0, 1):
            raise ValueError(f"batch_dim must be 0 or 1, got {batch_dim!r}")
        _, rank, world = resolve_group(group)
        self.share = head_shares(num_heads, num_kv_heads, world)[rank]
        self.pattern = pattern.for_heads(self.share.kv_heads.start, num_kv_heads)
        self.causal, self.scale, self.backend, self.batch_dim = causal, scale, backend, batch_dim

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, prepared: Prepared | None = None) -> Tensor:
        """Attend.

        Args:
            q, k, v: `[B, S, heads of this rank, D]`, or as `batch_dim` says; all rows of the sequence.
            prepared: metadata of all rows, from `prepare` or `shard_batch` without a group.

        Returns:
            The shape and dtype of q.

        Raises:
            ValueError: if the heads are not those of this rank, or as `dilated_attention`.
        """
        given, own = (q.shape[2], k.shape[2]), (len(self.share.heads), len(self.share.kv_heads))
        if given != own:
            raise ValueError(
                f"q and k have {given[0]} and {given[1]} heads, but this rank has {own[0]} (from {self.share.heads.start} on) "
                f"and {own[1]} (from {self.share.kv_heads.start} on): heads are split evenly, the remainder to the first ranks"
            )
        if prepared is not None and prepared.group is not None:
            raise ValueError(
                "prepared was made for sharded rows, but this module sees all rows: use prepare(...) without a group"
            )
        q, k, v = (x.transpose(0, self.batch_dim) for x in (q, k, v))
        out = dilated_attention(
            q, k, v, self.pattern, causal=self.causal if prepared is None else None, scale=self.scale, backend=self.backend,
            prepared=prepared,
        )  # fmt: skip
        return out.transpose(0, self.batch_dim)

    def extra_repr(self) -> str:
        """What `print` shows of the module."""
        return f"heads={self.share.heads}, kv_heads={self.share.kv_heads}, {self.pattern}"
