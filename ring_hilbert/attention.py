# SPDX-License-Identifier: Apache-2.0
"""The public operator: checks a call's arguments and that all ranks agree on them; `parallel/node.py` runs it."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ring_hilbert.ops.backends import choose
from ring_hilbert.ops.order import TokenOrder
from ring_hilbert.ops.pattern import DilatedPattern, LayerPattern
from ring_hilbert.parallel.agreement import Group, resolve_group
from ring_hilbert.parallel.arguments import check_choices, kv_heads_of, metadata
from ring_hilbert.parallel.call import Call, agreed_fields
from ring_hilbert.parallel.node import attend
from ring_hilbert.parallel.plan import Shapes
from ring_hilbert.parallel.prepare import prepare_call
from ring_hilbert.parallel.prepared import Prepared

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@overload
def dilated_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: DilatedPattern | LayerPattern, *, causal: bool | None = ...,
    order: TokenOrder | None = ...,
    positions: Tensor | None = ..., document_ids: Tensor | None = ..., group: Group = ..., layout: str | None = ...,
    strategy: str | None = ..., backend: str = ..., scale: float | None = ..., save_remote: bool | None = ...,
    prepared: Prepared | None = ..., return_lse: Literal[False] = ..., name: str | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def dilated_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: DilatedPattern | LayerPattern, *, causal: bool | None = ...,
    order: TokenOrder | None = ...,
    positions: Tensor | None = ..., document_ids: Tensor | None = ..., group: Group = ..., layout: str | None = ...,
    strategy: str | None = ..., backend: str = ..., scale: float | None = ..., save_remote: bool | None = ...,
    prepared: Prepared | None = ..., return_lse: Literal[True], name: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: DilatedPattern | LayerPattern,
    *,
    causal: bool | None = None,
    order: TokenOrder | None = None,
    positions: Tensor | None = None,
    document_ids: Tensor | None = None,
    group: Group = None,
    layout: str | None = None,
    strategy: str | None = None,
    backend: str = "auto",
    scale: float | None = None,
    save_remote: bool | None = None,
    prepared: Prepared | None = None,
    return_lse: bool = False,
    name: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact dilated attention (LongNet, arXiv 2307.02486) of the rows of one sequence, sharded over a group or not.

    The result is one softmax over the multiset union of every branch's keys, and the gradient is the exact gradient of that
    softmax; both equal the one-device result at every world size up to rounding. Differentiable once with respect to
    q, k and v.

    Two forms: `dilated_attention(q, k, v, pattern, causal=..., group=..., ...)` for a call on its own, which describes the batch
    as `prepare` is told of it; and, for the layers of a model, `dilated_attention(q, k, v, pattern, prepared=...)`, where
    `prepare` or `shard_batch` has been told all of it once per batch.

    Under `torch.autocast` q, k and v are cast to its dtype, float64 excepted, as `scaled_dot_product_attention` does.

    Args:
        q: `[B, S, H, D]`, the rows of this rank; fp16, bf16, fp32 or fp64.
        k, v: `[B, S, Hkv, D]`, `H % Hkv == 0`; query head `h` reads kv head `h // (H / Hkv)`.
        pattern: segment lengths and dilation rates, in rows of the whole sequence; a `LayerPattern` for layers that are to share
            one compiled graph.
        causal, order, positions, document_ids, group, layout, strategy, save_remote: as in `prepare`, with its defaults.
        backend: "triton", "torch" or "auto" (default): Triton on CUDA devices where it is installed, for fp16, bf16 and fp32.
        scale: factor on the scores; default `D ** -0.5`.
        prepared: this batch's metadata from `prepare` or `shard_batch`, in place of these eight; contradicting it here is an error.
        return_lse: also return `lse`.
        name: this layer's name in error messages.

    Returns:
        `out [B, S, H, D]` in the dtype of q; with `return_lse` also `lse [B, H, S]`, the natural logarithm of the sum of
        exponentials, float32 (float64 for float64), not differentiable. A row without a key has `out = 0`, `lse = -inf`.

    Raises:
        ValueError: for arguments that are wrong or differ between ranks; raised on every rank, naming rank and argument.
        RuntimeError: for forward-mode and for second derivatives.
    """
    _check_no_tangents(q, k, v)
    if isinstance(pattern, LayerPattern) and not torch.compiler.is_compiling():
        number = int(pattern.layer)
        pattern, name = pattern.rule.of(number), name or f"layer {number}"
    chosen = {"causal": causal, "order": order, "layout": layout, "strategy": strategy, "save_remote": save_remote}
    layout, strategy = "contiguous" if layout is None else layout, "auto" if strategy is None else strategy
    facts = {"positions": positions, "document_ids": document_ids}
    error, shapes, factor = None, None, scale
    try:
        q, k, v = (_autocast(x) for x in (q, k, v))
        shapes = _check_tensors(q, k, v)
        factor = shapes.head_dim**-0.5 if scale is None else float(scale)
        if not isinstance(pattern, (DilatedPattern, LayerPattern)):
            raise ValueError(f"pattern must be a DilatedPattern, got {type(pattern).__name__}")
        if backend != "auto" and not torch.compiler.is_compiling():  # compiled code checks it at run time
            choose(backend, q.device, shapes.dtype, shapes.head_dim)
        if not math.isfinite(factor):
            raise ValueError(f"scale must be a finite number, got {scale!r}")
        if prepared is None:
            check_choices(order=order, layout=layout, strategy=strategy)
            for key, value in facts.items():
                if value is not None and not torch.compiler.is_compiling():  # compiled code takes none
                    metadata(key, value, q.shape[1], len(q))
        else:
            _check_prepared(prepared, group, chosen, facts)
    except ValueError as problem:
        error = f"{name}: {problem}" if name else str(problem)

    causal = True if causal is None else causal
    agreed = agreed_fields(pattern, factor, shapes)
    listed = isinstance(order, TokenOrder) and order.listed is not None
    if prepared is None and (group is not None or listed or not all(value is None for value in facts.values())):
        if torch.compiler.is_compiling():
            raise ValueError(
                "under torch.compile, group, positions, document_ids and an order from coordinates belong in "
                "prepared=rh.prepare(...), made outside the compiled function once per batch"
            )
        prepared = prepare_call(
            q.shape[1] if q.ndim == 4 else 0, agreed, error, group=group, causal=causal, order=order,
            layout=layout, strategy=strategy, save_remote=bool(save_remote), **facts,
        )  # fmt: skip
    elif error:
        if isinstance(prepared, Prepared) and not torch.compiler.is_compiling():
            prepared.agree(agreed, error)  # raises, on every rank
        raise ValueError(error)
    assert shapes is not None and factor is not None, "an invalid call has raised on every rank"

    keep = prepared is not None and prepared.save_remote
    how = "exchange" if prepared is None else prepared.strategy
    if (
        prepared is not None
        and how == "auto"
        and isinstance(pattern, DilatedPattern)
        and not torch.compiler.is_compiling()
    ):
        how = prepared.strategy_for(pattern, shapes)
    trained = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    call = Call.of(
        pattern, causal=causal, order=order, scale=factor, backend=backend, strategy=how, keep=keep, return_lse=return_lse,
        name=name, trained=trained,
    )  # fmt: skip
    out, lse = attend(q, k, v, prepared, call, pattern.layer if isinstance(pattern, LayerPattern) else None)
    return (out, lse) if return_lse else out


def _autocast(x: Tensor) -> Tensor:
    """`x` in autocast's dtype for its device."""
    kind = x.device.type
    if x.dtype == torch.float64 or not x.is_floating_point() or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))


# ---- validation


def _check_no_tangents(*tensors: Tensor) -> None:
    """Raise where forward-mode derivatives are asked for: autograd would silently take them to be 0."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise RuntimeError(
            "dilated_attention has no forward-mode derivative (torch.func.jvp, torch.autograd.forward_ad); use reverse mode, "
            "or rh.reference.dilated_attention, which is plain PyTorch"
        )


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> Shapes:
    if q.ndim != 4 or q.shape[2] < 1 or q.shape[3] < 1 or q.shape[0] < 1:
        raise ValueError(f"q must be [B, S, H, D], got {list(q.shape)}")
    batch, rows, heads, dim = q.shape
    for name, x in (("k", k), ("v", v)):
        if x.ndim != 4 or x.shape[:2] != (batch, rows) or x.shape[3] != dim:
            hint = "; [B, H, S, D] tensors need transpose(1, 2)" if x.ndim == 4 and x.shape[2] == rows else ""
            raise ValueError(f"{name} must be [B={batch}, S={rows}, Hkv, D={dim}] to fit q, got {list(x.shape)}{hint}")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} must have the dtype of q, {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {x.device}")
    if k.shape[2] != v.shape[2]:
        raise ValueError(f"k and v must have the same number of heads, got {k.shape[2]} and {v.shape[2]}")
    kv_heads = kv_heads_of(heads, k.shape[2], ("the heads of q, H=", "those of k and v, Hkv="))
    if q.dtype not in DTYPES:
        raise ValueError(f"q, k, v must be float16, bfloat16, float32 or float64, got {q.dtype}")
    return Shapes(batch, heads, kv_heads, dim, q.dtype)


def _check_prepared(prepared: Prepared, group: Group, chosen: dict[str, Any], facts: dict[str, Tensor | None]) -> None:
    """Check that the call does not contradict `prepared`; the node checks q against it when it runs, as its sizes may vary."""
    if not isinstance(prepared, Prepared):
        raise ValueError(f"prepared must come from prepare() or shard_batch(), got {type(prepared).__name__}")
    if not all(value is None for value in facts.values()):
        raise ValueError("positions and document_ids belong in prepare(); leave them out when prepared= is given")
    if group is not None and resolve_group(group)[0] is not prepared.group:
        raise ValueError(
            "group is not the one that prepared was made for; leave it out or prepare the batch for this group"
        )
    for key, value in chosen.items():
        if value is None or (key, value) == ("strategy", "auto"):
            continue
        own = prepared.layout.kind if key == "layout" else getattr(prepared, key)
        if value != own:
            raise ValueError(f"{key}={value!r} disagrees with prepared, which was made with {own!r}")
