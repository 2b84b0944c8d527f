# SPDX-License-Identifier: Apache-2.0
"""Every causal language model of Transformers at 2 layers, with our attention in it:
`python -m tests.harness.causal_models` prints a table of what training does with each, and why it refuses.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import warnings
from collections import Counter
from typing import Any

import torch
import transformers
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import ring_hilbert as rh
from ring_hilbert.training.model import LossModel, check_model, make_model

MODEL_TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
SETTINGS = {"segment_lengths": [None], "dilation_rates": [1]}  # dense, which the order of rows does not change
VOCAB, ROWS = 97, 24
SIZES = {  # by the names of configuration fields; those that a class lacks are left out
    VOCAB: ("vocab_size", "decoder_vocab_size", "unpadded_vocab_size"),
    32: (
        "hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size", "word_embed_proj_dim", "lru_width", "input_embedding_size",
        "output_embedding_size", "attention_hidden_size", "feed_forward_size", "kv_lora_rank", "q_lora_rank",
    ),
    48: (
        "intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "dff", "dim_ff", "d_inner",
        "ffn_hidden_size", "moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size",
        "dense_intermediate_size", "intermediate_size_mlp", "expert_ffn_hidden_size", "prefix_dense_intermediate_size",
    ),
    2: (
        "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "num_decoder_layers",
        "num_encoder_layers", "num_key_value_heads", "num_kv_heads", "num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts",
        "n_group", "topk_group", "num_blocks",
    ),
    4: (
        "num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads",
        "num_decoder_attention_heads", "num_encoder_attention_heads", "num_experts", "num_local_experts", "n_routed_experts",
        "moe_num_experts", "qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim",
    ),
    8: ("head_dim", "v_head_dim", "dim_head", "d_head", "attention_head_size", "kv_channels", "qk_head_dim"),
    64: ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions"),
    1: ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "first_k_dense_replace", "num_mtp_layers"),
    0: (
        "pad_token_id", "bos_token_id", "eos_token_id", "dropout", "attention_dropout", "activation_dropout", "hidden_dropout",
        "hidden_dropout_prob", "attention_probs_dropout_prob", "attn_pdrop", "resid_pdrop", "embd_pdrop", "emb_pdrop",
        "decoder_layerdrop", "layerdrop", "embedding_dropout", "residual_dropout", "resid_dropout", "embed_dropout", "dropout_p",
        "mlp_dropout", "attention_probs_dropout", "classifier_dropout",
    ),
    7.0: ("logits_scaling", "logits_mup_width_multiplier"),
    5.0: ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"),
    3.0: ("lm_head_multiplier",),
    0.25: ("logit_scale",),
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1}
OF_TYPE = {  # where the sizes above contradict each other, or have other names
    "bamba": MAMBA,
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "dots3_note": {"text_config": {"num_key_value_heads": 4}},
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global"], 2]]},
    "granitemoehybrid": MAMBA,
    "longcat_flash": {"qk_rope_head_dim": 8, "head_dim": 8},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "reformer": {"axial_pos_embds_dim": [8, 24], "axial_pos_shape": [8, 8]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["mamba", "hybrid"]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(model_type: str, full_attention: bool) -> PretrainedConfig:
    """The configuration of a model of 2 layers, 4 heads and some thousands of parameters, with `ring_hilbert` in its text part.

    Args:
        full_attention: of all layers; else of those that the class makes so.
    """
    cls = CONFIG_MAPPING[model_type]
    fields, given = _small(cls, full_attention), OF_TYPE.get(model_type, {})
    parts: Any = cls.sub_configs  # a dict, whatever its decorator's type
    text = parts.get("text_config")
    if text is AutoConfig:
        fields["text_config"] = {"model_type": "llama", **_small(CONFIG_MAPPING["llama"], full_attention)}
    elif text is not None:
        fields["text_config"] = _small(text, full_attention) | given.get("text_config", {})
    config = AutoConfig.for_model(model_type, **(given | fields if text else fields | given))
    decoder = config.get_text_config(decoder=True)
    for part in (config, decoder) if text is None else (decoder,):
        part.ring_hilbert = SETTINGS
    return config


def _small(cls: type[PretrainedConfig], full_attention: bool) -> dict:
    if dataclasses.is_dataclass(cls):
        kinds = {field.name: str(field.type) for field in dataclasses.fields(cls)}
    else:  # Transformers 5.0
        kinds = {name: str(given.annotation) for name, given in inspect.signature(cls).parameters.items()}
    names = set(kinds)
    small = {name: value for value, given in SIZES.items() for name in given if name in names}
    small |= {name: True for name in ("is_decoder", "causal") if name in names}
    for name in [name for name, value in small.items() if value == 0 and "float" in kinds[name]]:
        small[name] = 0.0
    if "layer_types" in names and full_attention:
        small["layer_types"] = ["full_attention"] * 2
    for name in names & {"sliding_window", "attn_logit_softcapping"}:
        if "None" in kinds[name] and not (name == "sliding_window" and "layer_types" in names):
            small[name] = None
    return small


def outcome(model_type: str) -> tuple[str, str]:
    """("right", "refused" or "not built"; figures or the reason), of the class's own kinds of layers, else of full attention alone.

    Raises:
        AssertionError: training would be wrong.
    """
    reasons = {}
    for full_attention in (False, True):
        try:
            config = tiny_config(model_type, full_attention)
        except Exception as error:
            reasons.setdefault("not built", f"{type(error).__name__}: {error}")
            continue
        try:
            check_model(config)
        except ValueError as error:
            reasons.setdefault("refused", str(error))
            continue
        return "right", f"{compared(config)}{' with full attention in all layers' if reasons else ''}"
    return next((kind, reasons[kind]) for kind in ("refused", "not built") if kind in reasons)


def compared(config: PretrainedConfig) -> str:
    torch.manual_seed(0)
    model = make_model(config).eval()
    for p in model.parameters():
        p.data = torch.randn_like(p) * (0.5 if p.ndim > 1 else 0.3)
    batch = {"input_ids": torch.randint(3, VOCAB, (1, ROWS))}
    natural, ordered = rh.shard_batch(batch), rh.shard_batch(batch, order=rh.TokenOrder("hilbert", block=ROWS))
    trained = LossModel(model)(**natural)[0, :-1]
    labels = natural.pop("shift_labels")[0, :-1]
    own = cross_entropy(model(**natural, use_cache=False).logits[0, :-1], labels, reduction="none")
    with torch.no_grad():
        other = LossModel(model)(**ordered)[0, ordered["ring_hilbert"].rows[0].argsort()][:-1]
    off = (trained - own).abs().max().item()
    moved = (other - trained).abs().max().item()
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad(loss.sum(), parameters, allow_unused=True) for loss in (trained, own)]
    skewed = max(((a - b).norm() / (b.norm() + 1e-3)).item() for a, b in zip(*gradients, strict=True) if a is not None)
    what = f"loss {own.mean():.3f}, off by {off:.1e}, gradients {skewed:.1e}, in another order {moved:.1e}"
    assert all((a is None) == (b is None) for a, b in zip(*gradients, strict=True)), "other parameters have gradients"
    assert max(off, moved, skewed) < 1e-3, what
    return what


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    counts = Counter()
    for model_type in sys.argv[1:] or MODEL_TYPES:
        try:
            result, why = outcome(model_type)
        except AssertionError as error:
            result, why = "wrong", str(error)
        counts[result] += 1
        print(f"{model_type:28} {result:10} {' '.join(why.split())[:300]}", flush=True)
    print(dict(counts))


if __name__ == "__main__":
    main()
