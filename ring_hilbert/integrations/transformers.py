# SPDX-License-Identifier: Apache-2.0
"""`attn_implementation="ring_hilbert"` for Transformers models (Llama, Qwen, Mistral, Gemma, Phi, ...).

    config.ring_hilbert = {"segment_lengths": [...], "dilation_rates": [...], "order": {"curve": "hilbert", "block": 1024}}
    model = AutoModelForCausalLM.from_config(config)
    logits = model(**rh.shard_batch(batch, group, order=order)).logits

With `ring_hilbert=Prepared` among the model's arguments the rows are already sharded and ordered. Without it the call is on one
device in natural token order, and a 2-D attention mask or restarting position ids are respected as documents.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from wrapt import wrap_function_wrapper

from ring_hilbert.attention import dilated_attention
from ring_hilbert.integrations.transformers_config import (
    LOCAL_ROPE,
    MIXING,
    NAME,
    layer_rule,
    layer_types,
    local_rope,
    order_of,
    pattern_of,
    settings_of,
)
from ring_hilbert.ops.order import TokenOrder
from ring_hilbert.ops.pattern import LayerPattern
from ring_hilbert.parallel.prepared import Prepared
from ring_hilbert.parallel.sharding import prepare_tokens

LAYER = "ring_hilbert_layer"  # an attention layer's number as a tensor, which compiled code takes as data
ROWS_ALONE = (
    f"{NAME}_rows_alone"  # refuses what NAME refuses; every row sees only itself: to detect what else mixes rows
)
DOCUMENTS = (
    "position_ids that restart with every document, as DataCollatorWithFlattening() makes them, or rh.shard_batch"
)
UNSUPPORTED = {
    "softcap": "config.attn_logit_softcapping = None",
    "sliding_window": "config.sliding_window = None (and layer_types all 'full_attention')",
    "s_aux": "a model without attention sinks",
    "sinks": "a model without attention sinks",
    "cu_seq_lens_q": DOCUMENTS,
    "seq_idx": DOCUMENTS,
    "position_bias": "a model without relative position bias",
}
HARMLESS = {  # keyword arguments of the model call that come this far without a meaning here
    "cache_position", "cu_seq_lens_k", "deterministic", "document_ids", "labels", "logits_to_keep", "max_length_k", "max_length_q",
    "num_items_in_batch", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "shift_labels",
    "use_cache",
}  # fmt: skip
COMPILED_DOCUMENTS = (
    "a compiled model takes padding and packed documents by model(**rh.shard_batch(batch)), not by attention_mask or "
    "restarting position_ids"
)
WRONG_POSITIONS = (
    "position_ids are not those of the sharded rows; pass all that shard_batch returns: model(**rh.shard_batch(...)). "
    "Without position_ids a model counts from 0 on every rank"
)


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
    offset = next((name for name, module in model.named_modules() if _has_offset(name, module)), None)
    model.register_forward_hook(partial(_check_rows, offset), with_kwargs=True)
    if config._attn_implementation == NAME and not any(
        hasattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS") for module in model.modules()
    ):
        raise ValueError(
            f"{type(model).__name__} has attention of its own or none, so that attn_implementation='ring_hilbert' would have no "
            "effect; use a model whose attention Transformers looks up by name, as Llama, Qwen, Mistral, Gemma and Phi have"
        )
    for module in model.modules():
        number = getattr(module, "layer_idx", None)
        if isinstance(number, int) and getattr(getattr(module, "config", None), NAME, None) is not None:
            _number(module)


def _has_offset(name: str, module: nn.Module) -> bool:
    """Whether a module embeds positions as RoBERTa does, which counts them from behind the number of its padding token."""
    return "position" in name and isinstance(module, nn.Embedding) and module.padding_idx is not None


def _check_rows(
    offset: str | None, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    """Runs behind a model's forward: sharded rows must have their positions, and have met in our attention."""
    prepared = kwargs.get(NAME)
    if prepared is None:
        return
    if offset is not None:
        raise ValueError(
            f"{type(model).__name__} counts positions from padding_idx + 1 on ({offset}), and the position_ids of shard_batch from "
            "0; use a model that counts from 0, or one device without ring_hilbert="
        )
    if not torch.compiler.is_compiling() and not prepared.used:
        raise ValueError(
            f"no attention layer of {type(model).__name__} was given the ring_hilbert= of the model call: its layers drop keyword "
            "arguments, or have attention of their own or none"
        )


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
    if use_vmap or kind == "or_mask":
        raise ValueError(
            "attn_implementation='ring_hilbert' has no masks of a model's own (here one laid over the causal mask, as for images "
            "or prefixes); leave out the inputs that it is made for, such as token_type_ids"
        )
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
    for name, given in kwargs.items():
        if given is not None and name not in HARMLESS:
            got = list(given.shape) if isinstance(given, Tensor) else repr(given)
            instead = UNSUPPORTED.get(name, f"a call or a model without it: {type(module).__name__} passes it on")
            raise ValueError(f"attn_implementation='ring_hilbert' has no {name} (got {got}); use {instead}")
    if dropout:
        raise ValueError(
            f"attn_implementation='ring_hilbert' has no attention dropout (got {dropout}); set config.attention_dropout = 0"
        )
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"attn_implementation='ring_hilbert' needs as many query rows as key rows, got {query.shape[2]} and {key.shape[2]}; "
            "decoding with a key-value cache is not supported: generate(use_cache=False)"
        )
    config, number = module.config, getattr(module, LAYER, None)
    if (
        getattr(config, "is_encoder_decoder", False)
        or getattr(module, "is_cross_attention", False)
        or "CrossAttention" in type(module).__name__
    ):
        raise ValueError(
            f"attn_implementation='ring_hilbert' has no cross-attention, and {type(module).__name__} of a {type(config).__name__} "
            "may be one; use a decoder-only model"
        )
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
        _check_sharded(ring_hilbert, attention_mask, causal, config)
        v = _only_if(_has_its_positions(ring_hilbert, position_ids), WRONG_POSITIONS, v)
        if (
            not torch.compiler.is_compiling()
        ):  # compiled code neither reads nor writes state that changes within a batch
            ring_hilbert.position_ids_checked, ring_hilbert.attended = position_ids, True
        return dilated_attention(q, k, v, **call, prepared=ring_hilbert), None

    order, documents = order_of(config), None
    breaks = _breaks(attention_mask, position_ids, q)
    if breaks is not None and torch.compiler.is_compiling():
        v = _only_if(~breaks.any(), COMPILED_DOCUMENTS, v)
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


def _check_sharded(prepared: Prepared, mask: Tensor | None, causal: bool, config: Any) -> None:
    if mask is not None and mask.ndim != 3:  # local position ids restart anywhere
        raise ValueError(
            "with ring_hilbert= the mask belongs in shard_batch({'attention_mask': ...}), not in the model call"
        )
    if causal != prepared.causal:
        raise ValueError(
            f"the layer is {'' if causal else 'not '}causal but ring_hilbert was prepared with causal={prepared.causal}"
        )
    mixing = layer_types(config) & MIXING
    if mixing:
        raise ValueError(
            f"the model's {', '.join(sorted(mixing))} layers mix rows and know neither their order nor documents nor other ranks; "
            "use a model with attention alone, or one device without ring_hilbert="
        )
    kind = local_rope(config) if prepared.layout.world_size > 1 else None
    if kind is not None:
        raise ValueError(LOCAL_ROPE.format(kind) + ", or a group of one rank")


def _has_its_positions(prepared: Prepared, position_ids: Tensor | None) -> Tensor | bool:
    """Whether the model was given the position ids of the sharded rows; a tensor if their values must be compared."""
    expected = prepared.position_ids
    if position_ids is expected or (
        not torch.compiler.is_compiling() and position_ids is prepared.position_ids_checked
    ):
        return True
    if expected is not None:
        return position_ids is not None and (position_ids == expected).all()
    # From prepare(): only the default that Transformers fills in can be recognised.
    if prepared.rank == 0 or prepared.local_len < 2 or prepared.visible.has_documents:
        return True
    if position_ids is None:
        return False
    return (position_ids.flatten()[:2] != torch.arange(2, device=position_ids.device)).any()


def _only_if(condition: Tensor | bool, otherwise: str, x: Tensor) -> Tensor:
    """`x`, or ValueError(`otherwise`). Compiled code cannot branch on a tensor: there the error is raised at run time."""
    if isinstance(condition, Tensor) and torch.compiler.is_compiling():
        return _passed(x, condition, otherwise)
    if not condition:
        raise ValueError(otherwise)
    return x


@torch.library.custom_op("ring_hilbert::passed", mutates_args=())
def _passed(x: Tensor, condition: Tensor, otherwise: str) -> Tensor:
    if not condition:
        raise ValueError(otherwise)
    return x.clone()


@_passed.register_fake
def _passed_fake(x: Tensor, condition: Tensor, otherwise: str) -> Tensor:
    return torch.empty_like(x)


def _passed_gradients(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None]:
    return dx, None, None


_passed.register_autograd(_passed_gradients)
