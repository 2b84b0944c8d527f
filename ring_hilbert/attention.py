# SPDX-License-Identifier: Apache-2.0
"""The public operator: validation, agreement between ranks, and the one autograd node."""

from __future__ import annotations

import itertools
import math
import weakref
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ring_hilbert.ops.order import TokenOrder
from ring_hilbert.ops.pattern import DilatedPattern
from ring_hilbert.parallel.execution import Execution
from ring_hilbert.parallel.plan import Shapes
from ring_hilbert.parallel.prepare import Group, Prepared, prepare_call, resolve_group

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BACKENDS = ("torch", "auto")


@overload
def dilated_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: DilatedPattern, *, causal: bool | None = ..., order: TokenOrder | None = ...,
    positions: Tensor | None = ..., document_ids: Tensor | None = ..., group: Group = ..., layout: str | None = ...,
    strategy: str | None = ..., backend: str = ..., scale: float | None = ..., prepared: Prepared | None = ...,
    return_lse: Literal[False] = ..., name: str | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def dilated_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: DilatedPattern, *, causal: bool | None = ..., order: TokenOrder | None = ...,
    positions: Tensor | None = ..., document_ids: Tensor | None = ..., group: Group = ..., layout: str | None = ...,
    strategy: str | None = ..., backend: str = ..., scale: float | None = ..., prepared: Prepared | None = ...,
    return_lse: Literal[True], name: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: DilatedPattern,
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
    prepared: Prepared | None = None,
    return_lse: bool = False,
    name: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact dilated attention (LongNet, arXiv 2307.02486) of the rows of one sequence, sharded over a group or not.

    The result is one softmax over the multiset union of every branch's keys, and the gradient is the exact gradient of that
    softmax; both equal the one-device result at every world size up to rounding. Differentiable once with respect to
    q, k and v.

    Args:
        q: `[B, S, H, D]`, the rows of this rank; fp16, bf16, fp32 or fp64.
        k, v: `[B, S, Hkv, D]`, `H % Hkv == 0`; query head `h` reads kv head `h // (H / Hkv)`.
        pattern: segment lengths and dilation rates, in rows of the whole sequence.
        causal: hide keys with a larger position. Default True (or as `prepared` says).
        order: q, k, v, positions, document ids and results are in natural token order; the pattern acts on rows in this
            order. Without it rows are as given.
        positions: integers `[S]` or `[B, S]`; default the row index (with `order`, the token index).
        document_ids: integers `[S]` or `[B, S]`; documents do not see each other; -1 marks padding rows.
        group: process group or 1-D DeviceMesh the sequence is sharded over; None is one device, never the world.
        layout: "contiguous" (default).
        strategy: "exchange" or "auto" (default).
        backend: "torch" or "auto".
        scale: of the scores; default `D ** -0.5`.
        prepared: the facts of this batch from `prepare` or `shard_batch`; then causal, order, positions, document_ids,
            group, layout and strategy are its own, and saying something else here is an error.
        return_lse: also return `lse`.
        name: what error messages call this layer.

    Returns:
        `out [B, S, H, D]` in the dtype of q; with `return_lse` also `lse [B, H, S]`, the natural logarithm of the sum of
        exponentials, float32 (float64 for float64), not differentiable. A row without a key has `out = 0`, `lse = -inf`.

    Raises:
        ValueError: for arguments that are wrong or differ between ranks; on every rank, naming rank and argument.
    """
    chosen = {"causal": causal, "order": order, "layout": layout, "strategy": strategy}
    error, shapes = None, None
    try:
        shapes = _check_tensors(q, k, v)
        if not isinstance(pattern, DilatedPattern):
            raise ValueError(f"pattern must be a DilatedPattern, got {type(pattern).__name__}")
        if backend not in BACKENDS:
            raise ValueError(f"backend={backend!r} is not supported; use one of {', '.join(map(repr, BACKENDS))}")
        if scale is not None and not math.isfinite(scale):
            raise ValueError(f"scale must be a finite number, got {scale!r}")
        if prepared is None:
            _check_facts(q, positions=positions, document_ids=document_ids)
        else:
            _check_prepared(prepared, q, group, chosen, positions, document_ids)
    except ValueError as problem:
        error = f"{name}: {problem}" if name else str(problem)

    fields: dict[str, Any] = {"pattern": pattern, "scale": scale}
    if shapes is not None:
        fields |= {
            "B (batch size of q)": shapes.batch_size, "H (heads of q)": shapes.num_heads,
            "Hkv (heads of k, v)": shapes.num_kv_heads, "D (head dim)": shapes.head_dim, "dtype": shapes.dtype,
        }  # fmt: skip
    if prepared is None:
        defaults = {"causal": True, "order": None, "layout": "contiguous", "strategy": "auto"}
        options = {key: defaults[key] if value is None else value for key, value in chosen.items()}
        local_len = q.shape[1] if q.ndim == 4 else 0
        prepared = prepare_call(
            local_len, fields, error, group=group, positions=positions, document_ids=document_ids, **options
        )
    else:
        prepared.agree(fields, error)
    assert shapes is not None, "an invalid call has raised on every rank"

    permutation = prepared.permutation(q.device)
    if permutation is not None:
        q, k, v = (x.index_select(1, permutation[0]) for x in (q, k, v))
    execution = prepared.execution(pattern, shapes, q.device)
    factor = shapes.head_dim**-0.5 if scale is None else float(scale)
    out, lse, _ = _forward(q, k, v, _handle(execution), factor, name or "")
    if permutation is not None:
        out = out.index_select(1, permutation[1])
    if not return_lse:
        return out
    return out, lse.detach() if permutation is None else lse.detach().index_select(2, permutation[1])


# ---- validation


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
        raise ValueError(f"k and v must have equally many heads, got {k.shape[2]} and {v.shape[2]}")
    if k.shape[2] < 1 or heads % k.shape[2]:
        raise ValueError(f"H={heads} heads of q must be a multiple of the Hkv={k.shape[2]} heads of k and v")
    if q.dtype not in DTYPES:
        raise ValueError(f"q, k, v must be float16, bfloat16, float32 or float64, got {q.dtype}")
    return Shapes(batch, heads, k.shape[2], dim, q.dtype)


def _check_facts(q: Tensor, **facts: Tensor | None) -> None:
    for name, value in facts.items():
        if isinstance(value, Tensor) and value.ndim == 2 and value.shape[0] not in (1, q.shape[0]):
            raise ValueError(f"{name} must be [S] or [B={q.shape[0]}, S={q.shape[1]}], got {list(value.shape)}")


def _check_prepared(
    prepared: Prepared,
    q: Tensor,
    group: Group,
    chosen: dict[str, Any],
    positions: Tensor | None,
    document_ids: Tensor | None,
) -> None:
    if not isinstance(prepared, Prepared):
        raise ValueError(f"prepared must come from prepare() or shard_batch(), got {type(prepared).__name__}")
    if q.shape[1] != prepared.local_len:
        raise ValueError(
            f"q must have the {prepared.local_len} rows that prepared says this rank holds, got {list(q.shape)}"
        )
    if prepared.facts.batch_size not in (1, q.shape[0]):
        raise ValueError(f"q must have the batch size {prepared.facts.batch_size} of prepared, got {list(q.shape)}")
    if positions is not None or document_ids is not None:
        raise ValueError("positions and document_ids belong into prepare(); with prepared= leave them out")
    if group is not None and resolve_group(group)[0] is not prepared.group:
        raise ValueError("group is not the one prepared was made for; leave it out or make another prepared")
    own = {
        "causal": prepared.causal, "order": prepared.order, "layout": prepared.layout.kind, "strategy": prepared.strategy,
    }  # fmt: skip
    for key, value in chosen.items():
        if value is not None and value != own[key] and (key, value) != ("strategy", "auto"):
            raise ValueError(f"{key}={value!r} disagrees with prepared, which was made with {own[key]!r}")


# ---- the autograd node

_executions: weakref.WeakValueDictionary[int, Execution] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def _handle(execution: Execution) -> int:
    """An integer that stands for `execution` in the operator's schema, for as long as it lives."""
    if execution.handle is None:
        execution.handle = next(_numbers)
        _executions[execution.handle] = execution
    return execution.handle


@torch.library.custom_op("ring_hilbert::attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, handle: int, scale: float, name: str) -> tuple[Tensor, Tensor, Tensor]:
    return _executions[handle].forward(q, k, v, scale, name)


@torch.library.custom_op("ring_hilbert::attention_backward", mutates_args=())
def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    residue: Tensor,
    handle: int,
    scale: float,
    name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _executions[handle].backward(dout, q, k, v, out, lse, residue, scale, name)


@_forward.register_fake
def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=lse_dtype)
    return q.new_empty(q.shape), lse, torch.empty_like(lse)


@_backward.register_fake
def _backward_fake(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, *ctx.call = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.execution = _executions.get(ctx.call[0])  # keeps it alive until backward; absent only while tracing


def _gradients(ctx: Any, dout: Tensor, _dlse: Tensor, _dresidue: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(dout, *ctx.saved_tensors, *ctx.call), None, None, None


def _no_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "dilated_attention can be differentiated once; for second derivatives use rh.reference.dilated_attention"
    )


_forward.register_autograd(_gradients, setup_context=_save)
_backward.register_autograd(_no_double_backward)
