# SPDX-License-Identifier: Apache-2.0
"""The one autograd node: `ring_hilbert::attention`, an opaque operator for autograd, torch.compile and checkpointing.

A compiled graph sees of a call only q, k, v, a `Call` (constants), the layer's number and the *handle* of the batch's `Prepared`,
the latter two each an integer in a CPU tensor. Everything that differs between batches is behind the handle, what differs
between layers follows from their number, and both are looked up when the operator runs, without synchronising: a new batch
recompiles nothing and all layers share one graph. For backward the node saves q, k, v, out, lse, lse_error and the handle, which
keeps the `Prepared` alive.

Where nothing but autograd is to see the operator, an eager call does without the dispatcher: it takes longer than small attention.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from ring_hilbert.ops.backends import choose
from ring_hilbert.parallel.call import Call, agreed_fields
from ring_hilbert.parallel.execution import Execution, span
from ring_hilbert.parallel.handles import held_by
from ring_hilbert.parallel.plan import Shapes
from ring_hilbert.parallel.prepared import Prepared
from ring_hilbert.parallel.ulysses import Ulysses

_Args = ParamSpec("_Args")
_Results = TypeVar("_Results")


def attend(
    q: Tensor, k: Tensor, v: Tensor, prepared: Prepared | None, call: Call, layer: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`out [B, S, H, D]` and `lse [B, H, S]` for validated `q [B, S, H, D]`, `k, v [B, S, Hkv, D]`, rows in the caller's order.

    `layer`: the number of the layer, int64 `[]` on the CPU, if the call is for several.

    Raises:
        ValueError: on every rank, if a rank's q does not fit `prepared` or its call differs.
        RuntimeError: if backward runs after the batch's `Prepared` was freed (see `Prepared.handle`).
    """
    handle = None if prepared is None else prepared.handle
    if torch.compiler.is_compiling() or _observed(q, k, v):
        out, lse, *_ = _forward(q, k, v, handle, layer, *call)
    else:
        with span("ring_hilbert::attention"):
            out, lse, *_ = (_Node.apply if call.trained else _attention)(q, k, v, handle, layer, call)
    return out, lse.detach()


def _observed(*tensors: Tensor) -> bool:
    """Whether the dispatcher has more to do than to call the operator: a mode, a transform, or tensors that are not ordinary."""
    state = torch._C._dispatch_tls_local_include_set()
    if (state - _ALWAYS).raw_repr() or torch._C._len_torch_function_stack():
        return True
    return any(
        x.is_meta or torch._C._dispatch_keys(x).raw_repr() & ~_ordinary_keys(x.device) or type(x) not in _ORDINARY
        for x in tensors
    )


_ORDINARY = Tensor, torch.nn.Parameter
_ALWAYS = torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.ADInplaceOrView
)


@lru_cache(maxsize=64)
def _ordinary_keys(device: torch.device) -> int:
    """The dispatch keys of a tensor that is not lazily negated, wrapped or the like, as bits."""
    with torch.inference_mode(False):
        return torch._C._dispatch_keys(torch.empty(0, device=device)).raw_repr()


_CALL = (
    "SymInt[] segment_lengths, SymInt[] dilation_rates, str offset_rule, SymInt[] shifts, SymInt head_step, SymInt[] own, "
    "SymInt[] heads, bool zero_keys, SymInt[] weights, str counted, bool causal, str curve, SymInt[] sides, float scale, "
    "str backend, str strategy, bool keep, bool return_lse, str name, bool trained"
)
# Unsafe in CUDA graphs: collectives, and tensors made on first use.
_OPTIONS: dict[str, Any] = {"mutates_args": (), "tags": (torch.Tag.cudagraph_unsafe,)}


def _as_given(function: Callable[_Args, _Results]) -> Callable[_Args, _Results]:
    """`function` of a tensor and more, with autocast off, which would lower sums that must be float32."""

    @wraps(function)
    def run(*args: _Args.args, **options: _Args.kwargs) -> _Results:
        tensor = args[0]
        assert isinstance(tensor, Tensor)
        if not torch.is_autocast_enabled(tensor.device.type):
            return function(*args, **options)
        with torch.autocast(tensor.device.type, enabled=False):
            return function(*args, **options)

    return run


@_as_given
def _attention(
    q: Tensor, k: Tensor, v: Tensor, handle: Tensor | None, layer: Tensor | None, call: Call
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`out`, `lse`, `lse_error` and what is kept of other ranks' rows for backward."""
    call = call.at(layer)
    prepared = call.default_facts(q.shape[1]) if handle is None else held_by(handle)
    batch, _, heads, dim = q.shape
    shapes = Shapes(batch, heads, k.shape[2], dim, q.dtype)
    misfit = prepared.misfit(q)
    if misfit and call.name:
        misfit = f"{call.name}: {misfit}"
    prepared.agree(agreed_fields(call.pattern, call.scale, shapes) | {"strategy": call.strategy}, misfit)
    execution = _execution(call, prepared, shapes, q.device)
    permutation = prepared.permutation(q.device)
    options = {"keep": call.keep, "lse": call.return_lse}
    if permutation is not None:
        q, k, v = (x.index_select(1, permutation[0]) for x in (q, k, v))
    if call.trained and isinstance(execution, Execution):
        execution.compile_ahead(q, k, v, call.scale)
    results = execution.forward(q, k, v, call.scale, call.name, **options)
    if permutation is None:
        return results
    (out, lse, lse_error, kept), (_, token) = results, permutation
    return out.index_select(1, token), lse.index_select(2, token), lse_error.index_select(2, token), kept


@_as_given
def _attention_backward(
    dout: Tensor, saved: list[Tensor], handle: Tensor | None, layer: Tensor | None, kv_heads: int, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    call, (batch, rows, heads, dim) = call.at(layer), dout.shape
    prepared = call.default_facts(rows) if handle is None else held_by(handle)
    execution = _execution(call, prepared, Shapes(batch, heads, kv_heads, dim, dout.dtype), dout.device)
    permutation = prepared.permutation(dout.device)
    if permutation is None:
        return execution.backward(dout, saved, call.scale, call.name)
    row, token = permutation
    if not call.keeps_all:
        q, k, v, out, lse, lse_error, *kept = saved
        by_row = [x.index_select(1, row) for x in (q, k, v, out)] + [x.index_select(2, row) for x in (lse, lse_error)]
        saved = [*by_row, *kept]
    dq, dk, dv = execution.backward(dout.index_select(1, row), saved, call.scale, call.name)
    return dq.index_select(1, token), dk.index_select(1, token), dv.index_select(1, token)


@torch.library.custom_op(
    "ring_hilbert::attention",
    schema=f"(Tensor q, Tensor k, Tensor v, Tensor? handle, Tensor? layer, {_CALL}) -> (Tensor, Tensor, Tensor, Tensor)",
    **_OPTIONS,
)
def _forward(
    q: Tensor, k: Tensor, v: Tensor, handle: Tensor | None, layer: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _attention(q, k, v, handle, layer, Call(*args))


@torch.library.custom_op(
    "ring_hilbert::attention_backward",
    schema=f"(Tensor dout, Tensor[] saved, Tensor? handle, Tensor? layer, SymInt kv_heads, {_CALL}) -> (Tensor, Tensor, Tensor)",
    **_OPTIONS,
)
def _backward(
    dout: Tensor, saved: list[Tensor], handle: Tensor | None, layer: Tensor | None, kv_heads: int, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _attention_backward(dout, saved, handle, layer, kv_heads, Call(*args))


def _execution(call: Call, prepared: Prepared, shapes: Shapes, device: torch.device) -> Execution | Ulysses:
    backend = choose(call.backend, device, shapes.dtype, shapes.head_dim)
    return prepared.execution(call.pattern, shapes, device, backend, call.strategy)


@_forward.register_fake
def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, handle: Tensor | None, layer: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=lse_dtype)
    call = Call(*args)
    size = torch.library.get_ctx().new_dynamic_size() if call.keep or call.keeps_all else 0  # behind the handle
    return q.new_empty(q.shape), lse, torch.empty_like(lse), q.new_empty(size, dtype=torch.uint8)


@_backward.register_fake
def _backward_fake(
    dout: Tensor, saved: list[Tensor], handle: Tensor | None, layer: Tensor | None, kv_heads: int, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    batch, rows, _, dim = dout.shape
    kv_shape = (batch, rows, kv_heads, dim)
    return dout.new_empty(dout.shape), dout.new_empty(kv_shape), dout.new_empty(kv_shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    q, k, v, handle, layer, *fields = inputs
    _keep(ctx, q, k, v, handle, layer, Call(*fields), output)


def _keep(
    ctx: Any, q: Tensor, k: Tensor, v: Tensor, handle: Tensor | None, layer: Tensor | None, call: Call,
    output: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """Save for backward."""
    out, lse, lse_error, kept = output
    tensors = [kept] if call.keeps_all else [q, k, v, out, lse, lse_error, *([kept] if call.keep else [])]
    ctx.save_for_backward(*tensors, handle, layer)
    ctx.set_materialize_grads(False)  # of results that have none; that of out is made below
    ctx.call, ctx.kv_heads, ctx.like = call, k.shape[2], (q.shape, q.dtype, q.device)
    # A copy of the handle made by hooks on saved tensors may not keep the batch alive. A tensor being traced has none.
    ctx.prepared = getattr(handle, "held", None)
    ctx.refreshed = None if ctx.prepared is None else ctx.prepared.visible.refreshed


def _gradients(ctx: Any, dout: Tensor | None, *_unused: Tensor | None) -> tuple[Tensor | None, ...]:
    *saved, handle, layer = ctx.saved_tensors
    if ctx.prepared is not None and ctx.prepared.visible.refreshed != ctx.refreshed:
        raise RuntimeError(
            "refresh() was called between forward and backward, so backward would see other documents and positions"
        )
    if dout is None:  # other ranks wait for this one's rows
        shape, dtype, device = ctx.like
        dout = torch.zeros(shape, dtype=dtype, device=device)
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or _observed(dout, *saved):
        gradients = _backward(dout, saved, handle, layer, ctx.kv_heads, *ctx.call)
    else:
        with span("ring_hilbert::attention_backward"):
            gradients = _attention_backward(dout, saved, handle, layer, ctx.kv_heads, ctx.call)
    return *gradients, *[None] * (2 + len(ctx.call))


class _Node(torch.autograd.Function):
    """The node of a call that only autograd sees; the same as the operator's."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, handle: Tensor | None, layer: Tensor | None, call: Call
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        output = _attention(q, k, v, handle, layer, call)
        _keep(ctx, q, k, v, handle, layer, call, output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, *gradients)[:6]


def _no_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "dilated_attention can be differentiated once; for second derivatives use rh.reference.dilated_attention"
    )


_forward.register_autograd(_gradients, setup_context=_save)
_backward.register_autograd(_no_double_backward)
