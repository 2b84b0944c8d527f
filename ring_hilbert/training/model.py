# SPDX-License-Identifier: Apache-2.0
"""The Transformers model of a run: its configuration with our attention in it, and its weights. No model code of ours."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ring_hilbert.checkpointing import checkpoint_contexts
from ring_hilbert.integrations.transformers_config import NAME
from ring_hilbert.parallel.sharding import shard_batch
from ring_hilbert.training.config import RunConfig
from ring_hilbert.training.tokens import load_tokenizer

_LEGACY_KEYS = {
    "rope_theta",
    "rope_scaling",
    "torch_dtype",
    "dtype",
}  # still understood, but fields of no configuration class


def model_config(config: RunConfig) -> PretrainedConfig:
    """The Transformers configuration of `config.model`, with the `attention` section as its `ring_hilbert`.

    A new model takes the longest position from data.seq_len and its special tokens from the tokenizer, unless they are given.

    Raises:
        ValueError: Transformers knows no such model_type, key, value or folder, or the tokenizer cannot be loaded.
    """
    tokenizer = load_tokenizer(config.data.tokenizer)
    try:
        if config.model.path is not None:
            hf_config = AutoConfig.from_pretrained(config.model.path, local_files_only=True)
        else:
            assert config.model.config is not None  # RunConfig checked that one of the two is there
            keys = {
                "max_position_embeddings": config.data.seq_len,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                **config.model.config,
            }
            hf_config = AutoConfig.for_model(keys.pop("model_type"), **keys)
            _refuse_unknown(hf_config, keys)
    except (ValueError, TypeError, KeyError, OSError, StrictDataclassError) as error:
        raise ValueError(f"model: Transformers cannot make a configuration of this: {error}") from error
    hf_config.ring_hilbert = config.attention.to_mapping()
    return hf_config


def vocab_size(hf_config: PretrainedConfig) -> int:
    """How many token ids the model knows."""
    return hf_config.get_text_config(decoder=True).vocab_size


def build_model(config: RunConfig, hf_config: PretrainedConfig) -> PreTrainedModel:
    """The model in float32 on the CPU, in training mode; fresh weights are drawn from `train.seed`, the same on every rank.

    Raises:
        ValueError: the model cannot be made or loaded from this configuration, or needs what our attention does not have.
    """
    torch.manual_seed(config.train.seed)
    options: dict[str, Any] = {"attn_implementation": NAME, "dtype": torch.float32}
    try:
        if config.model.path is not None:
            model = AutoModelForCausalLM.from_pretrained(
                config.model.path, config=hf_config, local_files_only=True, **options
            )
        else:
            model = AutoModelForCausalLM.from_config(hf_config, **options)
        model.train()
        with torch.no_grad():  # two tokens, so that what the attention refuses is known before anything is written
            model(**shard_batch({"input_ids": torch.zeros(1, 2, dtype=torch.int64)}), use_cache=False)
    except (ValueError, OSError) as error:
        raise ValueError(f"model: this causal language model cannot be made or run: {error}") from error
    if config.train.checkpoint_activations:
        # The name of Transformers 5.2x; gradient_checkpointing_enable is the older one, deprecated there.
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False, "context_fn": checkpoint_contexts})
    return model


def _refuse_unknown(hf_config: PretrainedConfig, keys: dict[str, Any]) -> None:
    """Transformers keeps a misspelt key as an attribute that nothing reads."""
    if not dataclasses.is_dataclass(hf_config):
        return
    known = {field.name for field in dataclasses.fields(hf_config)} | set(hf_config.attribute_map) | _LEGACY_KEYS
    for key in keys:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise ValueError(f"{type(hf_config).__name__} has no key {key!r}{hint}")
