# SPDX-License-Identifier: Apache-2.0
"""`attn_implementation="ring_hilbert"` for Transformers models (Llama, Qwen, Mistral, Gemma, Phi, ...).

    config.ring_hilbert = {"segment_lengths": [...], "dilation_rates": [...], "order": {"curve": "hilbert", "block": 1024}}
    model = AutoModelForCausalLM.from_config(config)
    logits = model(**rh.shard_batch(batch, group, order=order)).logits

With `ring_hilbert=Prepared` among the model's arguments the rows are already sharded and ordered. Without it the call is on one
device in natural token order, and a 2-D attention mask or restarting position ids are respected as documents.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from wrapt import wrap_function_wrapper

from ring_hilbert.attention import dilated_attention
from ring_hilbert.integrations import transformers_refusals as refusals
from ring_hilbert.integrations.transformers_config import NAME, layer_rule, order_of, pattern_of, settings_of
from ring_hilbert.ops.order import TokenOrder
from ring_hilbert.ops.pattern import LayerPattern
from ring_hilbert.parallel.prepared import Prepared
from ring_hilbert.parallel.sharding import prepare_tokens

LAYER = "ring_hilbert_layer"  # an attention layer's number as a tensor, which compiled code takes as data
# Refuses what NAME refuses; every row sees only itself: to detect what else mixes rows.
ROWS_ALONE = f"{NAME}_rows_alone"


def register(module: ModuleType) -> None:
    """Register with `transformers.modeling_utils`, called once that is imported."""
    from transformers.masking_utils import AttentionMaskInterface

    for name, forward in ((NAME, attention_forward), (ROWS_ALONE, rows_alone)):
        module.AttentionInterface.register(name, forward)
        AttentionMaskInterface.register(name, attention_mask)
    wrap_function_wrapper(module.PreTrainedModel, "post_init", _number_layers)


def _number_layers(
    wrapped: Callable[..., None], model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Runs at the end of a model's construction: gives its attention layers their numbers as data as well.

    Raises:
        ValueError: if the model computes its attention itself, whatever implementation it is asked for.
    """
    wrapped(*args, **kwargs)
    config: Any = model.config
    if getattr(config, NAME, None) is None:
        return
    refusals.check_model(model)
    model.register_forward_pre_hook(
        partial(refusals.before_forward, refusals.offset_positions(model)), with_kwargs=True
    )
    model.register_forward_hook(refusals.after_forward, with_kwargs=True)
    for module in model.modules():
        number = getattr(module, "layer_idx", None)
        if isinstance(number, int) and getattr(getattr(module, "config", None), NAME, None) is not None:
            _number(module)


def _number(module: nn.Module) -> None:
    number: Any = torch.tensor(module.layer_idx, device="cpu")
    number.made_of, number.check = module.layer_idx, partial(_check_number, module)
    setattr(module, LAYER, number)


def _check_number(module: nn.Module, number: int) -> None:
    """Check that a layer's number as data is still correct: layers may have been removed."""
    if module.layer_idx != number:
        raise ValueError(
            f"layer {number} of the model now has layer_idx {module.layer_idx}, but compiled code was given its original number; "
            "after renumbering layers, run the model once without torch.compile"
        )


def attention_mask(
    *,
    batch_size: int,
    mask_function: Callable[..., Any],
    q_length: int = 0,
    cache_position: Tensor | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Tensor | None:
    """The mask function of the implementation: a 2-D mask is passed on as is, to become document ids. Where there is none, but
    position ids that restart, it is `[B, S, 1]`, true for the first token of every further document.

    Raises:
        ValueError: for a mask that the model lays over the usual one, as for images.
    """
    kind = getattr(mask_function, "__name__", "")  # of the outermost function
    if attention_mask is not None or local_size is not None:  # local layers are refused by themselves
        return attention_mask
    refusals.check_mask(kind, use_vmap)
    if cache_position is not None:  # Transformers 5.0
        q_length, device = len(cache_position), cache_position.device
    if kind != "and_mask" or q_length < 2:
        return None
    rows, entries = torch.arange(q_length, device=device), torch.arange(batch_size, device=device)[:, None]
    joined = mask_function(entries, 0, rows, (rows - 1).clamp_min(0))  # rows that see the one before
    return ~joined[..., None]


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_ids: Tensor | None = None,
    ring_hilbert: Prepared | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface.

    Args:
        module: the attention layer, with `config`, `layer_idx`, `is_causal`.
        query: `[B, H, S, D]`.
        key, value: `[B, Hkv, S, D]`.
        attention_mask: None, 2-D `[B, S]` with 0 for padding, or what `attention_mask` made of restarting position ids.
        position_ids: `[1 or B, S]`; without `ring_hilbert`, every jump starts another document.
        ring_hilbert: the `Prepared` of `shard_batch`.
        is_causal: default: that of `module`.

    Returns:
        `[B, S, H, D]`, and None for the attention weights.

    Raises:
        ValueError: for what dilated attention does not support: soft-capping, sliding windows, sinks, dropout in training,
            key-value caches, cross-attention, other masks; and for any other argument, as it may change the attention.
    """
    refusals.check_layer(module, query.shape[2], key.shape[2], dropout, kwargs)
    config, number = module.config, getattr(module, LAYER, None)
    settings = settings_of(config)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    call: dict[str, Any] = {"scale": scaling, "backend": settings.get("backend", "auto")}
    if number is not None and torch.compiler.is_compiling():
        call["pattern"] = LayerPattern(layer_rule(config), number)
    else:
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        call |= {"pattern": pattern_of(config, layer), "name": f"layer {layer}"}
        if number is not None and not torch.compiler.is_compiling() and number.made_of != layer:
            _number(module)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if ring_hilbert is not None:
        refusals.check_sharded(ring_hilbert, attention_mask, causal, config)
        v = refusals.with_positions(v, ring_hilbert, position_ids)
        return dilated_attention(q, k, v, **call, prepared=ring_hilbert), None

    order, documents = order_of(config), None
    breaks = _breaks(attention_mask, position_ids, q)
    if breaks is not None and torch.compiler.is_compiling():
        v = refusals.only_if(~breaks.any(), refusals.COMPILED_DOCUMENTS, v)
    elif breaks is not None and bool(breaks.any()):
        padding = attention_mask is not None and attention_mask.ndim == 2
        documents = torch.where(breaks, -1, 0) if padding else breaks.cumsum(1)
    if documents is None:
        return dilated_attention(q, k, v, **call, order=order, causal=causal), None
    documents = documents.expand(q.shape[:2])
    prepared = prepare_tokens(documents, order or TokenOrder("raster", block=1), causal=causal)
    rows = prepared.rows.to(q.device).expand(q.shape[0], -1)[..., None, None]
    q, k, v = (torch.take_along_dim(x, rows, 1) for x in (q, k, v))
    out = dilated_attention(q, k, v, **call, prepared=prepared)
    return torch.take_along_dim(out, rows.argsort(1), 1), None


def rows_alone(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """`attention_forward` in shapes and settings only; the result of every row is its own value and query."""
    if kwargs.get("ring_hilbert") is None:
        raise ValueError(
            f"{type(module).__name__} is not given the ring_hilbert= of the model call: the layers around it drop keyword arguments"
        )
    q, k, v = (torch.zeros_like(x) for x in (query, key, value))
    out, _ = attention_forward(module, q, k, v, attention_mask, **kwargs)
    values = value.transpose(1, 2).repeat_interleave(query.shape[1] // value.shape[1], 2)
    return out + values + query.transpose(1, 2).mean(-1, keepdim=True), None


def _breaks(mask: Tensor | None, position_ids: Tensor | None, q: Tensor) -> Tensor | None:
    """Where natural-order tokens are not one document, bool `[1 or B, S]`, or None: with a mask the padding, without one the
    first tokens of further documents, where position ids jump (Transformers' convention for packed sequences).
    """
    batch, rows = q.shape[:2]
    if mask is not None and mask.shape == (batch, rows, 1):
        return mask[..., 0]
    if mask is not None:
        if mask.ndim != 2 or mask.shape != (batch, rows):
            raise ValueError(
                f"attention_mask must be 2-D [B={batch}, S={rows}] for 'ring_hilbert', got {list(mask.shape)}"
            )
        return mask == 0
    if position_ids is None or rows < 2:
        return None
    return position_ids.diff(dim=-1, prepend=position_ids[..., :1] - 1) != 1
