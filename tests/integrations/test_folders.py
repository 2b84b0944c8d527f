# SPDX-License-Identifier: Apache-2.0
"""Model folders that leave the house: refused where nobody imported ring_hilbert, and used as they are where somebody did."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, ByT5Tokenizer, GenerationConfig, PreTrainedModel, pipeline

import ring_hilbert  # noqa: F401  so that Transformers knows the implementation

SETTINGS = {"segment_lengths": [8, None], "dilation_rates": [1, 4]}
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 384, "max_position_embeddings": 128}
KINDS = {
    "llama": {"hidden_size": 32, "intermediate_size": 48},
    "gpt2": {"hidden_size": 32},
    "qwen3": {"hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8},
    "mixtral": {"hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 2, "num_local_experts": 4},
}


def tiny(kind: str, **changes) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, **SIZES, **KINDS[kind], bos_token_id=1, eos_token_id=1, pad_token_id=0, **changes
    )
    if kind == "mixtral":
        config.sliding_window = None
    config.ring_hilbert = SETTINGS
    return AutoModelForCausalLM.from_config(config).eval()


def tiny_with_pictures() -> PreTrainedModel:
    """A model whose language model is a part of it, which alone has our attention."""
    text = {**SIZES, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "layer_types": ["full_attention"] * 2}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    config.text_config.ring_hilbert = SETTINGS
    return AutoModelForCausalLM.from_config(config).eval()


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=200).stdout


@pytest.mark.parametrize("kind", KINDS)
def test_files_name_the_implementation_and_no_cache(tmp_path: Path, kind: str) -> None:
    model, ids = tiny(kind), torch.randint(3, 384, (1, 40))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["_attn_implementation"] == "ring_hilbert" and saved["ring_hilbert"] == SETTINGS
    assert saved["use_cache"] is False
    assert GenerationConfig.from_pretrained(tmp_path).use_cache is False
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config._attn_implementation == "ring_hilbert"
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)
    assert loaded.generate(ids, max_new_tokens=2, do_sample=False).shape[1] > 40
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == saved


def test_a_part_with_settings_of_its_own(tmp_path: Path) -> None:
    model, ids = tiny_with_pictures(), torch.randint(3, 384, (1, 40))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.text_config._attn_implementation == "ring_hilbert"
    assert loaded.config.vision_config._attn_implementation != "ring_hilbert"
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert dense.config.text_config._attn_implementation == "eager"
    assert (dense(ids).logits - model(ids).logits).abs().max() > 1e-4


def test_pipeline(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    ByT5Tokenizer().save_pretrained(tmp_path)
    (text,) = pipeline("text-generation", str(tmp_path))("Hilbert's curve", max_new_tokens=3, do_sample=False)
    assert text["generated_text"].startswith("Hilbert's curve")


def test_another_implementation_is_obeyed(tmp_path: Path) -> None:
    """Whoever asks for dense attention gets it; a configuration without the settings is one like any other."""
    model = tiny("llama")
    model.save_pretrained(tmp_path)
    for loaded in (
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa"),
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path, attn_implementation="sdpa")),
    ):
        assert loaded.config._attn_implementation == "sdpa"
    for forget in (
        lambda config: delattr(config, "ring_hilbert"),
        lambda config: setattr(config, "ring_hilbert", None),
    ):
        config = AutoConfig.from_pretrained(tmp_path)
        forget(config)
        assert "_attn_implementation" not in config.to_dict()


def test_refused_without_us(tmp_path: Path) -> None:
    for kind in KINDS:
        tiny(kind).save_pretrained(tmp_path / kind)
    tiny_with_pictures().save_pretrained(tmp_path / "pictures")
    outcomes = run(f"""
from transformers import AutoConfig, AutoModelForCausalLM
for kind in {[*KINDS, "pictures"]!r}:
    folder = f"{tmp_path}/{{kind}}"
    for load in (
        lambda: AutoModelForCausalLM.from_pretrained(folder),
        lambda: AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)),
    ):
        try:
            print("loaded", load().config._attn_implementation)
        except ValueError as error:
            print(error)
""").splitlines()
    assert len(outcomes) == 2 * (len(KINDS) + 1)
    assert all('attn_implementation="ring_hilbert"` is not supported' in outcome for outcome in outcomes)


def test_late_import() -> None:
    """A configuration that no model was made of yet is taken over; of one that a model has, there is a warning."""
    outcome = run(f"""
import warnings
from transformers import AutoConfig, AutoModelForCausalLM
sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
waiting, used, other = (AutoConfig.for_model("llama", **sizes, ring_hilbert=value) for value in ({SETTINGS!r}, {SETTINGS!r}, None))
models = [AutoModelForCausalLM.from_config(config) for config in (used, other)]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import ring_hilbert
for warning in caught:
    if "ring_hilbert" in str(warning.message):
        print(warning.category.__name__, warning.message)
print(waiting._attn_implementation, waiting.use_cache, models[1].config._attn_implementation, other.use_cache)
""").splitlines()
    assert outcome[-1] == "ring_hilbert False sdpa True"
    (warning,) = outcome[:-1]
    assert warning.startswith(
        "UserWarning a LlamaConfig with ring_hilbert settings has attn_implementation='sdpa': models made"
    )
