# SPDX-License-Identifier: Apache-2.0
"""What `attn_implementation="ring_hilbert"` refuses: models, masks and calls whose attention would silently be another one.

Every check raises ValueError, saying what to use instead.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from ring_hilbert.integrations.transformers_config import LOCAL_ROPE, MIXING, NAME, layer_types, local_rope
from ring_hilbert.parallel.prepared import Prepared

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


def check_model(model: nn.Module) -> None:
    """Refuse a model that computes its attention itself, whatever implementation it is asked for."""
    config: Any = model.config
    if config._attn_implementation == NAME and not any(
        hasattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS") for module in model.modules()
    ):
        raise ValueError(
            f"{type(model).__name__} has attention of its own or none, so that attn_implementation='ring_hilbert' would have no "
            "effect; use a model whose attention Transformers looks up by name, as Llama, Qwen, Mistral, Gemma and Phi have"
        )


def offset_positions(model: nn.Module) -> str | None:
    """The module that embeds positions as RoBERTa does, counted from behind the number of its padding token; None if none."""
    for name, module in model.named_modules():
        if "position" in name and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return name
    return None


def before_forward(offset: str | None, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A hook: a model with `offset_positions` would give sharded rows those of other tokens. See also `after_forward`."""
    prepared = kwargs.get(NAME)
    if prepared is None:
        return
    if offset is not None:
        raise ValueError(
            f"{type(model).__name__} counts positions from padding_idx + 1 on ({offset}), and the position_ids of shard_batch from "
            "0; use a model that counts from 0, or one device without ring_hilbert="
        )
    if not torch.compiler.is_compiling():
        prepared.attended = False


def after_forward(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """A hook: sharded rows must have met in our attention, of this model too where they have in another."""
    prepared = kwargs.get(NAME)
    if prepared is not None and not torch.compiler.is_compiling() and not prepared.attended:
        raise ValueError(
            f"no attention layer of {type(model).__name__} was given the ring_hilbert= of the model call: its layers drop keyword "
            "arguments, or have attention of their own or none"
        )


def check_mask(kind: str, use_vmap: bool) -> None:
    """Refuse a mask that the model lays over the usual one, as for images.

    `kind`: the name of the outermost mask function.
    """
    if use_vmap or kind == "or_mask":
        raise ValueError(
            "attn_implementation='ring_hilbert' has no masks of a model's own (here one laid over the causal mask, as for images "
            "or prefixes); leave out the inputs that it is made for, such as token_type_ids"
        )


def check_layer(module: nn.Module, query_rows: int, key_rows: int, dropout: float, others: dict[str, Any]) -> None:
    """Refuse a call of an attention layer that asks for another attention; `others`: its further keyword arguments."""
    for name, given in others.items():
        if given is not None and name not in HARMLESS:
            got = list(given.shape) if isinstance(given, Tensor) else repr(given)
            instead = UNSUPPORTED.get(name, f"a call or a model without it: {type(module).__name__} passes it on")
            raise ValueError(f"attn_implementation='ring_hilbert' has no {name} (got {got}); use {instead}")
    if dropout:
        raise ValueError(
            f"attn_implementation='ring_hilbert' has no attention dropout (got {dropout}); set config.attention_dropout = 0"
        )
    if query_rows != key_rows:
        raise ValueError(
            f"attn_implementation='ring_hilbert' needs as many query rows as key rows, got {query_rows} and {key_rows}; "
            "decoding with a key-value cache is not supported: generate(use_cache=False)"
        )
    if (
        getattr(module.config, "is_encoder_decoder", False)
        or getattr(module, "is_cross_attention", False)
        or "CrossAttention" in type(module).__name__
    ):
        raise ValueError(
            f"attn_implementation='ring_hilbert' has no cross-attention, and {type(module).__name__} of a "
            f"{type(module.config).__name__} may be one; use a decoder-only model"
        )


def check_sharded(prepared: Prepared, mask: Tensor | None, causal: bool, config: Any) -> None:
    """Refuse sharded rows where a layer would see them in another order, or with another mask, than one device would."""
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


def with_positions(x: Tensor, prepared: Prepared, position_ids: Tensor | None) -> Tensor:
    """`x`, if the model was given the position ids of the sharded rows."""
    if torch.compiler.is_compiling():  # which neither reads nor writes state that changes within a batch
        return only_if(_has_its_positions(prepared, position_ids), WRONG_POSITIONS, x)
    if position_ids is None or position_ids is not prepared.position_ids_checked:
        x = only_if(_has_its_positions(prepared, position_ids), WRONG_POSITIONS, x)
    prepared.position_ids_checked, prepared.attended = position_ids, True
    return x


def _has_its_positions(prepared: Prepared, position_ids: Tensor | None) -> Tensor | bool:
    """Whether these are the position ids of the sharded rows; a tensor if their values must be compared."""
    expected = prepared.position_ids
    if position_ids is expected:
        return True
    if expected is not None:
        return position_ids is not None and (position_ids == expected).all()
    # From prepare(): only the default that Transformers fills in can be recognised.
    if prepared.rank == 0 or prepared.local_len < 2 or prepared.visible.has_documents:
        return True
    if position_ids is None:
        return False
    return (position_ids.flatten()[:2] != torch.arange(2, device=position_ids.device)).any()


def only_if(condition: Tensor | bool, otherwise: str, x: Tensor) -> Tensor:
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
