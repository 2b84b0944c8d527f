# SPDX-License-Identifier: Apache-2.0
"""Initial weights come a part at a time: drawn by name, or read from a folder, and equal to what Transformers makes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from ring_hilbert.training.weights import Weights

SMALL = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": None,
}  # fmt: skip


def skeleton(model_type: str, **keys: Any) -> Any:
    config = AutoConfig.for_model(model_type, **{**SMALL, **keys})
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def filled(weights: Weights) -> Any:
    model = AutoModelForCausalLM.from_config(weights.skeleton.config).to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(torch.nan)
    weights.fill(model)
    return model


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "mistral", "gemma", "phi3", "gpt2"])
@pytest.mark.parametrize("tied", [False, True])
def test_drawn(model_type: str, tied: bool) -> None:
    """Everything gets a value, with the spread that Transformers gives it, and the same one every time."""
    weights = Weights(skeleton(model_type, tie_word_embeddings=tied), 3, None)
    model, theirs = filled(weights), AutoModelForCausalLM.from_config(weights.skeleton.config)
    for name, expected in {**dict(theirs.named_parameters()), **dict(theirs.named_buffers())}.items():
        mine = {**dict(model.named_parameters()), **dict(model.named_buffers())}[name]
        if (expected == expected.flatten()[0]).all() or "inv_freq" in name:
            assert torch.equal(mine, expected), name
        else:
            assert mine.std().item() == pytest.approx(expected.std().item(), rel=0.3), name
    again = filled(Weights(skeleton(model_type, tie_word_embeddings=tied), 3, None))
    other = filled(Weights(skeleton(model_type, tie_word_embeddings=tied), 4, None))
    last = "transformer.h.1.mlp.c_proj.weight" if model_type == "gpt2" else "model.layers.1.mlp.down_proj.weight"
    draws = [dict(x.named_parameters())[last] for x in (model, again, other)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], dict(model.named_parameters())[last.replace(".1.", ".0.")])


@pytest.mark.parametrize("model_type", ["llama", "gemma"])
def test_only_buffers(model_type: str) -> None:
    """A model that is loaded next gets its buffers, those that no checkpoint holds too, and no parameter is drawn."""
    model, theirs = (filled(Weights(skeleton(model_type), 3, None, only_buffers=only)) for only in (True, False))
    buffers = dict(theirs.named_buffers())
    assert buffers and all(torch.equal(x, buffers[name]) for name, x in model.named_buffers())
    assert all(p.isnan().all() for p in model.parameters())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shards", ["1GB", "20KB"])
def test_from_a_folder(tmp_path: Path, tied: bool, shards: str) -> None:
    """The logits are those of the model that was saved, in one file or many, in bfloat16 too."""
    config = skeleton("llama", tie_word_embeddings=tied).config
    saved = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    saved.save_pretrained(tmp_path, max_shard_size=shards)
    loaded = filled(Weights(skeleton("llama", tie_word_embeddings=tied), 0, tmp_path))
    ids = torch.randint(0, 100, (1, 20))
    assert torch.equal(loaded(ids).logits, saved.float()(ids).logits)


def test_wrong_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has neither model\.safetensors nor"):
        Weights(skeleton("llama"), 0, tmp_path)
    AutoModelForCausalLM.from_config(skeleton("llama").config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"files of .* have no model\.layers\.2\."):
        list(Weights(skeleton("llama", num_hidden_layers=3), 0, tmp_path))
    with pytest.raises(ValueError, match=r"embed_tokens\.weight in .* is \[100, 32\], the model's is \[101, 32\]"):
        list(Weights(skeleton("llama", vocab_size=101), 0, tmp_path))


def quantised(dtype: torch.dtype) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """As DeepSeek's files in FP8: a scale beside a matrix, whose name and shape stay."""

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        name = "model.layers.0.mlp.down_proj.weight"
        scale = tensors[name].abs().max() / 100
        return tensors | {name: (tensors[name] / scale).to(dtype)}

    return change


def with_scale(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"model.layers.0.mlp.down_proj.weight_scale_inv": torch.ones(1, 1)}


def twice(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}


TIED = {"tie_word_embeddings": True}


@pytest.mark.parametrize(
    ("saved", "change", "ours", "message"),
    [
        ({}, quantised(torch.float8_e4m3fn), {}, "down_proj.weight in .* is quantised, torch.float8_e4m3fn"),
        ({}, quantised(torch.int8), {}, "down_proj.weight in .* is quantised, torch.int8"),
        ({}, with_scale, {}, "have model.layers.0.mlp.down_proj.weight_scale_inv, which this LlamaForCausalLM has not"),
        ({"attention_bias": True}, dict, {}, "have model.layers.0.self_attn.k_proj.bias and 7 others"),
        ({"num_hidden_layers": 3}, dict, {}, "have model.layers.2.input_layernorm.weight and 8 others"),
        ({"tie_word_embeddings": False}, dict, TIED, "model.embed_tokens.weight and lm_head.weight in .* differ"),
        (TIED, twice, TIED, None),
    ],
)
def test_no_weight_of_a_folder_is_left_out_or_misread(
    tmp_path: Path,
    saved: dict[str, Any],
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    ours: dict[str, Any],
    message: str | None,
) -> None:
    AutoModelForCausalLM.from_config(skeleton("llama", **saved).config).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    if message is None:
        assert list(Weights(skeleton("llama", **ours), 0, tmp_path))
        return
    with pytest.raises(ValueError, match=message):
        list(Weights(skeleton("llama", **ours), 0, tmp_path))


def test_an_adapter_is_not_left_out(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(skeleton("llama").config).save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="has an adapter"):
        Weights(skeleton("llama"), 0, tmp_path)


def test_what_only_a_constructor_sets_is_not_left_to_chance() -> None:
    """Apertus' activations have learned numbers that nothing else initialises: the memory there would be anything."""
    with pytest.raises(
        ValueError, match=r"gives model\.layers\.0\.mlp\.act_fn\.alpha_p its first value in a constructor"
    ):
        list(Weights(skeleton("apertus"), 0, None))
