# SPDX-License-Identifier: Apache-2.0
"""The names of `dilated-attention-pytorch`'s Hilbert kernels, each with the exact operator behind it.

What differs from the older classes, and why, is in docs/dilated_attention_pytorch.md. The five aliases
(`ALIASES`) are attributes of this module too; the first use of each warns.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ring_hilbert.attention import dilated_attention
from ring_hilbert.modules import MultiheadDilatedAttention
from ring_hilbert.ops import reference
from ring_hilbert.ops.order import TokenOrder, _lazy_clone
from ring_hilbert.ops.pattern import DilatedPattern
from ring_hilbert.parallel.agreement import Group
from ring_hilbert.parallel.prepared import Prepared

__all__ = [
    "CreatedMultiheadAttention",
    "HilbertAttentionCore",
    "HilbertAttentionTritonWrapper",
    "cache_stats",
    "clear_cache",
    "create_hilbert_mapping",
    "create_multihead_dilated_attention",
    "curve_mapping",
    "generate_hilbert_indices",
    "generate_hilbert_indices_rectangular",
]

ATTENTION_TYPES = ("hilbert", "ring", "standard", "auto")


# ---- curve mappings


class _CurveCache:
    """Mappings by order, length, direction and device; the least recently used are evicted first."""

    def __init__(self, max_entries: int, max_bytes: int) -> None:
        self.max_entries, self.max_bytes = max_entries, max_bytes
        self.clear()

    def clear(self) -> None:
        self.entries: OrderedDict[tuple[TokenOrder, int, bool, torch.device], Tensor] = OrderedDict()
        self.hits = self.misses = self.bytes = 0

    def get(self, order: TokenOrder, length: int, inverse: bool, device: torch.device) -> Tensor:
        key = order, length, inverse, device
        if key in self.entries:
            self.hits += 1
            self.entries.move_to_end(key)
            return self.entries[key]
        self.misses += 1
        mapping = (order.inverse(length) if inverse else order.permutation(length)).to(device)
        self.entries[key] = mapping
        self.bytes += mapping.nbytes
        while len(self.entries) > self.max_entries or self.bytes > self.max_bytes:
            self.bytes -= self.entries.popitem(last=False)[1].nbytes
        return mapping


_CACHE = _CurveCache(max_entries=32, max_bytes=2**28)


@torch.compiler.assume_constant_result
def curve_mapping(
    shape: int | Sequence[int],
    curve: str = "hilbert",
    device: torch.device | str | None = None,
    inverse: bool = False,
) -> Tensor:
    """The tokens of a sequence or of a grid in the order in which a curve visits them, cached per shape and device.

    A sequence of `N` tokens lies row-major on a grid of `floor(sqrt N)` rows and as few columns as hold it; cells beyond `N`
    are skipped: `TokenOrder(curve, block=N)`. Every step of the Hilbert curve and of the snake has length 1 on every rectangle
    and box, and on every sequence that fills its grid; on other sequences the steps past the empty cells of the grid's last row
    are longer. Writing to the result never changes the cache.

    Args:
        shape: number of tokens of a sequence, or the sides `(H, W)` or `(T, H, W)` of a row-major grid.
        curve: "hilbert", "morton", "peano", "snake" or "raster".
        device: of the result; default CPU.
        inverse: give the row of every token instead of the token of every row.

    Returns:
        int64 `[N]` or `[prod(shape)]`: row `s` holds token `mapping[s]`, so `x[:, mapping]` is `x` in curve order.

    Raises:
        ValueError: for an unknown curve, or sides that are not positive integers.
    """
    if isinstance(shape, int):
        order, length = _whole(shape, curve), shape
    else:
        order = TokenOrder(curve, grid=tuple(shape))
        length = torch.Size(shape).numel()
    where = torch.empty(0, device="cpu" if device is None else device).device
    return _lazy_clone(_CACHE.get(order, length, inverse, where))


def cache_stats() -> dict[str, int]:
    """What the cache of `curve_mapping` holds, and its use since the start or the last `clear_cache`.

    Returns:
        `hits`, `misses`, `entries`, `max_entries`, `bytes`, `max_bytes` (on all devices together).
    """
    return {
        "hits": _CACHE.hits, "misses": _CACHE.misses, "entries": len(_CACHE.entries), "max_entries": _CACHE.max_entries,
        "bytes": _CACHE.bytes, "max_bytes": _CACHE.max_bytes,
    }  # fmt: skip


def clear_cache() -> None:
    """Empty the cache of `curve_mapping` and reset its statistics.

    Returns:
        None.
    """
    _CACHE.clear()


def create_hilbert_mapping(seq_len: int, device: torch.device | str | None = None) -> Tensor:
    """`curve_mapping(seq_len)`: a whole sequence in Hilbert order, as the classes here order it.

    Args:
        seq_len: number of tokens, N.
        device: of the result; default CPU.

    Returns:
        int64 `[N]`, every token once, for every length.

    Raises:
        ValueError: for a negative length.
    """
    return curve_mapping(seq_len, device=device)


def generate_hilbert_indices(n: int) -> list[int]:
    """The cells of a square of side `2^n` along Hilbert's curve (1891), as row-major indices.

    Args:
        n: levels of the curve.

    Returns:
        `4^n` integers.

    Raises:
        ValueError: for a negative `n`.
    """
    if n < 0:
        raise ValueError(f"n must be at least 0, got {n}")
    return generate_hilbert_indices_rectangular(2**n, 2**n)


def generate_hilbert_indices_rectangular(width: int, height: int) -> list[int]:
    """The cells of a rectangle along the generalized Hilbert curve, in steps of length 1, as row-major indices.

    Args:
        width, height: columns and rows.

    Returns:
        `width * height` integers.

    Raises:
        ValueError: for sides that are not positive.
    """
    return curve_mapping((height, width)).tolist()


def _whole(length: int, curve: str = "hilbert") -> TokenOrder:
    return TokenOrder(curve, block=length if length else 1)


# ---- attention


class HilbertAttentionCore(nn.Module):
    """Exact non-causal dilated self-attention of one branch on a whole sequence in Hilbert order, between two projections.

    `dropout(out_proj(attention(qkv_proj(x))))`. Nothing is padded and the order is that of `TokenOrder("hilbert", block=N)`:
    for every N a segment is `segment_size` neighbours on the curve, the last one possibly shorter. Head `h` is dilated at offset
    `h mod dilation_rate` (LongNet, arXiv 2307.02486, section 2.2): with `dilation_rate > 1` it sees, and gives a result for,
    one row in `dilation_rate`; its result for the others is zero. With fewer heads than `dilation_rate` some rows get no
    attention at all: `HilbertAttentionTritonWrapper` can take a branch without dilation in addition.

    The parameters are the older class's, without bias: `qkv_proj.weight [3 * hidden_dim, hidden_dim]`, the rows of q, k, v in
    this order, head-major within each, and `out_proj.weight [hidden_dim, hidden_dim]`. Its state dicts load by name.

    Args:
        hidden_dim: size of the last axis of input and output.
        num_heads: H, a divisor of `hidden_dim`.
        segment_size: rows of a segment, w.
        dilation_rate: r, with `1 <= r <= segment_size`.
        dropout: probability with which elements of the output are dropped in training.
        use_custom_backward: True uses the operator, False the reference with autograd: the same function, at quadratic cost.

    Raises:
        ValueError: for sizes that are inconsistent.
    """

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        segment_size: int = 128,
        dilation_rate: int = 1,
        dropout: float = 0.0,
        use_custom_backward: bool = True,
    ) -> None:
        super().__init__()
        if num_heads < 1 or hidden_dim < 1 or hidden_dim % num_heads:
            raise ValueError(f"hidden_dim={hidden_dim} must be a positive multiple of num_heads={num_heads}")
        self.hidden_dim, self.num_heads, self.head_dim = hidden_dim, num_heads, hidden_dim // num_heads
        self.segment_size, self.dilation_rate = segment_size, dilation_rate
        self.use_custom_backward = use_custom_backward
        self.pattern = DilatedPattern((segment_size,), (dilation_rate,))
        self.qkv_proj = nn.Linear(hidden_dim, 3 * hidden_dim, bias=False)
        self.out_proj = nn.Linear(hidden_dim, hidden_dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, use_hilbert: bool = True) -> Tensor:
        """Attend among the tokens of `x`.

        Args:
            x: `[B, N, hidden_dim]`, in natural token order and in the dtype of the parameters.
            use_hilbert: cut segments along the Hilbert curve; False cuts the sequence as given (raster).

        Returns:
            `[B, N, hidden_dim]`, tokens as in `x`.

        Raises:
            ValueError: for another shape.
        """
        if x.ndim != 3 or x.shape[-1] != self.hidden_dim:
            raise ValueError(f"x must be [B, N, hidden_dim={self.hidden_dim}], got {list(x.shape)}")
        q, k, v = self.qkv_proj(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)
        return self.attend(q, k, v, use_hilbert=use_hilbert)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, use_hilbert: bool = True) -> Tensor:
        """The part after the projection of `x`: attention of `q, k, v [B, N, H, D]`, `out_proj`, dropout.

        Returns:
            `[B, N, hidden_dim]`.
        """
        order = _whole(q.shape[1]) if use_hilbert else None
        if self.use_custom_backward:
            out = dilated_attention(q, k, v, self.pattern, causal=is_causal, order=order)
        else:
            out, _ = reference.dilated_attention(q, k, v, self.pattern, causal=is_causal, order=order)
        return self.dropout(self.out_proj(out.flatten(2)))

    def get_hilbert_mapping(self, seq_len: int, device: torch.device | str | None = None) -> Tensor:
        """`create_hilbert_mapping(seq_len, device)`: the order that `forward` gives `seq_len` tokens."""
        return create_hilbert_mapping(seq_len, device)

    def extra_repr(self) -> str:
        """What `print` shows besides the projections."""
        return f"num_heads={self.num_heads}, {self.pattern}, use_custom_backward={self.use_custom_backward}"


class HilbertAttentionTritonWrapper(nn.Module):
    """Exact dilated attention of separate q, k and v over several branches, on a whole sequence in Hilbert order.

    `out_proj(attention.out_proj(A(W_q q_proj(q), W_k k_proj(k), W_v v_proj(v))))`, where `W_q, W_k, W_v` are the thirds of
    `attention.qkv_proj`: the parameters of the older class under its names, so that its state dicts load.

    Args:
        segment_lengths: w of every branch; None is the whole sequence.
        dilation_rates: r of every branch.
        dropout: as in `HilbertAttentionCore`, on the output of `attention`.
        num_heads: H.
        head_dim: D.
        use_custom_backward: as in `HilbertAttentionCore`.

    Raises:
        ValueError: for invalid branches or sizes.
    """

    def __init__(
        self,
        segment_lengths: Sequence[int | None],
        dilation_rates: Sequence[int],
        dropout: float = 0.0,
        num_heads: int = 8,
        head_dim: int = 64,
        use_custom_backward: bool = True,
    ) -> None:
        super().__init__()
        pattern = DilatedPattern(tuple(segment_lengths), tuple(dilation_rates))
        self.num_heads, self.head_dim = num_heads, head_dim
        size = num_heads * head_dim
        self.attention = HilbertAttentionCore(size, num_heads, dropout=dropout, use_custom_backward=use_custom_backward)
        self.attention.pattern = pattern
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(size, size, bias=False) for _ in range(4))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False, use_hilbert: bool = True) -> Tensor:
        """Attend from the tokens of `q` to those of `k` and `v`.

        Args:
            q, k, v: `[B, N, num_heads, head_dim]`, in natural token order and in the dtype of the parameters.
            is_causal: mask later tokens, in natural order whatever the curve.
            use_hilbert: as in `HilbertAttentionCore.forward`.

        Returns:
            `[B, N, num_heads, head_dim]`.

        Raises:
            ValueError: for other shapes.
        """
        heads = (self.num_heads, self.head_dim)
        for name, x in (("q", q), ("k", k), ("v", v)):
            if x.ndim != 4 or x.shape[2:] != heads:
                raise ValueError(
                    f"{name} must be [B, N, num_heads={heads[0]}, head_dim={heads[1]}], got {list(x.shape)}"
                )
        projections = zip((self.q_proj, self.k_proj, self.v_proj), self.attention.qkv_proj.weight.chunk(3), strict=True)
        q, k, v = (
            F.linear(outer(x.flatten(2)), inner).unflatten(-1, heads)
            for x, (outer, inner) in zip((q, k, v), projections, strict=True)
        )
        out = self.attention.attend(q, k, v, is_causal=is_causal, use_hilbert=use_hilbert)
        return self.out_proj(out).unflatten(-1, heads)


class CreatedMultiheadAttention(MultiheadDilatedAttention):
    """What `create_multihead_dilated_attention` returns: `rh.MultiheadDilatedAttention` with the older classes' signature.

    Args:
        embed_dim: size of the last axis of input and output.
        num_heads: H.
        pattern: the branches.
        whole: cut the whole sequence in Hilbert order, `TokenOrder("hilbert", block=N)` with N from each call.
        order: or cut it in this order; over ranks its `block` must divide every rank's first row. None: as given.
        group, strategy: as in `rh.prepare`.
        dropout: on the output.
        bias: whether the four projections have one.
        device, dtype: of the parameters.

    Raises:
        ValueError: as `rh.MultiheadDilatedAttention`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        pattern: DilatedPattern,
        *,
        whole: bool = False,
        order: TokenOrder | None = None,
        group: Group = None,
        strategy: str = "auto",
        dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, pattern, order=order, causal=False, bias=bias, device=device, dtype=dtype
        )
        self.whole, self.group, self.strategy = whole, group, strategy
        self.dropout = nn.Dropout(dropout)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        prepared: Prepared | None = None,
    ) -> Tensor | tuple[Tensor, None]:
        """Attend from the tokens of `query` to those of `key` and `value`.

        Args:
            query: `[B, S, embed_dim]`, the rows of this rank.
            key, value: the same; default `query`.
            key_padding_mask: bool `[B, S]`, True where a row is padding: it sees nothing and is seen by nothing.
            need_weights: return `(out, None)`, as the older classes did; weights are never computed.
            attn_mask: None.
            is_causal: mask later tokens.
            prepared: the batch's metadata, which torch.compile needs for a group or a mask; then leave out the mask.

        Returns:
            `[B, S, embed_dim]`, or a tuple of that and None.

        Raises:
            ValueError: for other shapes, an `attn_mask`, or an order that the ranks' rows do not allow; over ranks as
                `rh.dilated_attention`.
        """
        if attn_mask is not None:
            raise ValueError(
                "attn_mask is not supported: a pattern is given by is_causal, key_padding_mask and document ids"
            )
        if key_padding_mask is not None and key_padding_mask.dtype != torch.bool:
            raise ValueError(f"key_padding_mask must be bool, True for padding, got {key_padding_mask.dtype}")
        inputs = {"query": query, "key": query if key is None else key, "value": query if value is None else value}
        for name, x in inputs.items():
            if x.ndim != 3 or x.shape[-1] != self.embed_dim:
                raise ValueError(f"{name} must be [B, S, embed_dim={self.embed_dim}], got {list(x.shape)}")
        q, k, v = (
            projection(x).unflatten(-1, (self.num_heads, self.head_dim))
            for projection, x in zip((self.q_proj, self.k_proj, self.v_proj), inputs.values(), strict=True)
        )
        order = _whole(query.shape[1]) if self.whole else self.order
        documents = None if key_padding_mask is None else -key_padding_mask.long()
        if prepared is None:
            out = dilated_attention(
                q, k, v, self.pattern, causal=is_causal, order=order, document_ids=documents, group=self.group,
                strategy=self.strategy,
            )  # fmt: skip
        else:
            order = None if prepared.order is None else order
            out = dilated_attention(
                q, k, v, self.pattern, causal=is_causal, order=order, document_ids=documents, prepared=prepared
            )
        out = self.dropout(self.out_proj(out.flatten(2)))
        return (out, None) if need_weights else out

    def extra_repr(self) -> str:
        """What `print` shows besides the projections."""
        order = "the whole sequence along the Hilbert curve" if self.whole else self.order
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, {self.pattern}, order={order}, group={self.group}"
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for kind in ("weight", "bias"):
            fused = state_dict.pop(f"{prefix}qkv_proj.{kind}", None)  # of the older fused class: rows of q, k, v
            if fused is not None:
                thirds = zip(("q_proj", "k_proj", "v_proj"), fused.chunk(3), strict=True)
                state_dict.update({f"{prefix}{name}.{kind}": third for name, third in thirds})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def create_multihead_dilated_attention(
    attention_type: str = "auto",
    embed_dim: int = 768,
    num_heads: int = 12,
    segment_lengths: Sequence[int | None] | None = None,
    dilation_rates: Sequence[int] | None = None,
    **kwargs: Any,
) -> CreatedMultiheadAttention:
    """Multi-head dilated attention of a named type.

    Args:
        attention_type: "standard": one device, the sequence as given; "hilbert": one device, the whole sequence in Hilbert
            order (or in `order=`); "ring": the sequence sharded over `group=`, which must be given; "auto": "ring" if a
            group is given, else "standard".
        embed_dim: size of the last axis of input and output.
        num_heads: H.
        segment_lengths: default `(2048, 4096, 8192)`.
        dilation_rates: default `(1, 2, 4)`.
        kwargs: `dropout`, `bias` (default True), `device`, `dtype`; "hilbert" and "ring": `order`; "ring": `group`, `strategy`
            (default "auto").

    Returns:
        A `CreatedMultiheadAttention`.

    Raises:
        ValueError: for an unknown type, listing the known ones; for arguments that the type does not take; as the constructor.
    """
    if attention_type not in ATTENTION_TYPES:
        raise ValueError(f"attention_type={attention_type!r} is unknown, expected one of {', '.join(ATTENTION_TYPES)}")
    if attention_type == "auto":
        attention_type = "standard" if kwargs.get("group") is None else "ring"
        if attention_type == "standard":
            kwargs.pop("group", None)
    own = {"standard": (), "hilbert": ("order",), "ring": ("order", "group", "strategy")}[attention_type]
    known = ("dropout", "bias", "device", "dtype", *own)
    unknown = [key for key in kwargs if key not in known]
    if unknown:
        raise ValueError(
            f"{attention_type!r} attention does not take {', '.join(unknown)}; it takes {', '.join(known)}"
        )
    if attention_type == "ring" and "group" not in kwargs:
        raise ValueError("'ring' attention needs group=, the ranks that share the sequence; None is one device")
    pattern = DilatedPattern(
        (2048, 4096, 8192) if segment_lengths is None else tuple(segment_lengths),
        (1, 2, 4) if dilation_rates is None else tuple(dilation_rates),
    )
    whole = attention_type == "hilbert" and kwargs.get("order") is None
    return CreatedMultiheadAttention(embed_dim, num_heads, pattern, whole=whole, **kwargs)


# ---- aliases


def _triton_fixed(*args: Any, **kwargs: Any) -> HilbertAttentionCore | HilbertAttentionTritonWrapper:
    """`HilbertAttentionTritonFixed`, which was the core in some releases and the wrapper in others: the arguments tell which."""
    core = "hidden_dim" in kwargs or (len(args) > 0 and isinstance(args[0], int))
    return (HilbertAttentionCore if core else HilbertAttentionTritonWrapper)(*args, **kwargs)


_CORE = (HilbertAttentionCore, "HilbertAttentionCore")
ALIASES: dict[str, tuple[Any, str]] = {
    "HilbertAttentionTritonFixed": (
        _triton_fixed,
        "HilbertAttentionTritonWrapper for q, k, v or HilbertAttentionCore for x",
    ),
    "HilbertAttentionTritonFixedOptimized": _CORE,
    "HilbertAttentionOptimized": _CORE,
    "HilbertAttentionTritonSimple": _CORE,
    "HilbertAttentionTritonOptimized": _CORE,
}


def __getattr__(name: str) -> Any:
    if name not in ALIASES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    target, replacement = ALIASES[name]
    warnings.warn(f"{name} is deprecated, use {replacement}", DeprecationWarning, stacklevel=2)
    globals()[name] = target  # bypasses this function from now on: one warning each
    return target


def __dir__() -> list[str]:
    return sorted({*globals(), *ALIASES})
