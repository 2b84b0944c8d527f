# SPDX-License-Identifier: Apache-2.0
"""Every kind of causal language model that Transformers has: trained on its own logits, or refused before anything runs."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, GraniteForCausalLM, LlamaForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

import ring_hilbert as rh
from ring_hilbert.training import loss as loss_module
from ring_hilbert.training.head import OwnHead
from ring_hilbert.training.model import LossModel, check_model, make_model
from tests.harness.causal_models import MODEL_TYPES, SETTINGS, VOCAB, outcome, tiny_config

RIGHT = [  # logits multiplied, divided and capped, with a bias; features scaled and transformed; experts; learned positions
    "bert", "cohere", "gemma2", "gpt2", "granite", "hyperclovax", "llama", "minicpm3", "mixtral", "phi",
]  # fmt: skip
REFUSED = {
    "falcon": "KeyError: .* Transformers looks up by name",  # a table of its own
    "falcon_h1": "mamba layers mix rows",  # a recurrence beside the attention of every layer
    "gpt_oss": "no sliding_window",
    "mamba": "no attention layer of MambaModel",
    "mllama": "no linear output layer over a base model",
    "openai-gpt": "no attention layer of OpenAIGPTModel",  # it has its own
    "opt": "is not given the ring_hilbert=",
}


@pytest.mark.parametrize("model_type", RIGHT)
def test_trained_on_its_own_logits(model_type: str) -> None:
    assert outcome(model_type)[0] == "right"


@pytest.mark.parametrize("model_type", REFUSED)
def test_refused(model_type: str) -> None:
    with pytest.raises(
        ValueError, match=f"model: this causal language model cannot be made or run: .*{REFUSED[model_type]}"
    ):
        check_model(tiny_config(model_type, full_attention=False))


@pytest.mark.full
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_causal_model(model_type: str) -> None:
    """`python -m tests.harness.causal_models` prints the outcome for each."""
    assert outcome(model_type)[0] in ("right", "refused", "not built")


def tiny(model_type: str) -> PreTrainedModel:
    model = make_model(tiny_config(model_type, full_attention=True)).double()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.5)
    return model


@pytest.mark.parametrize("model_type", ["granite", "gemma2", "minicpm3", "bert"])
@pytest.mark.parametrize("chunk_elements", [1, 10**6])
def test_gradients_a_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch, model_type: str, chunk_elements: int) -> None:
    """Over rows in documents and with padding, in float64."""
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", chunk_elements)
    torch.manual_seed(0)
    model, ids = tiny(model_type).eval(), torch.randint(3, VOCAB, (2, 150))
    batch = rh.shard_batch({"input_ids": ids, "document_ids": torch.arange(150)[None].expand(2, -1) // 60 - 1})
    trained = LossModel(model)(**batch)
    labels, logits = batch.pop("shift_labels"), model(**batch).logits
    own = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(2, 150)
    torch.testing.assert_close(trained, own, rtol=1e-10, atol=1e-10)
    weights = torch.rand_like(own)
    found, expected = (
        torch.autograd.grad((x * weights).sum(), [*model.parameters()], allow_unused=True) for x in (trained, own)
    )
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_bfloat16_logits_are_not_rounded() -> None:
    """What a model does to its logits is done in float32, as the product is."""
    model = tiny("granite").bfloat16()
    hidden = torch.randn(1, 8, 32, dtype=torch.bfloat16)
    features, after = OwnHead(model).features(hidden)
    logits = after((features @ model.lm_head.weight.T).float()[0])
    assert logits.dtype == torch.float32
    assert (logits != logits.bfloat16()).any()


def _adds_a_row_sum(self, input_ids, **options):
    hidden = self.model(input_ids, **options)[0]
    return CausalLMOutput(logits=self.lm_head(hidden) + hidden * hidden.new_ones(hidden.shape[-1]).cumsum(0))


def _calls_its_output_layer_twice(self, input_ids, **options):
    hidden = self.model(input_ids, **options)[0]
    return CausalLMOutput(logits=self.lm_head(hidden) + self.lm_head(hidden.flip(-1)))


def _goes_around_its_base_model(self, input_ids, **options):
    return CausalLMOutput(logits=self.lm_head(self.model.norm(self.model.embed_tokens(input_ids))))


def _scales_before_and_after(self, input_ids, **options):
    return CausalLMOutput(logits=self.lm_head(self.model(input_ids, **options)[0] * 2) / 3)


def _normalises_over_rows(self, input_ids, **options):
    logits = self.lm_head(self.model(input_ids, **options)[0])
    return CausalLMOutput(logits=logits - logits.mean(1, keepdim=True))


def _multiplies_by_what_it_learns(self, input_ids, **options):
    return CausalLMOutput(
        logits=self.lm_head(self.model(input_ids, **options)[0]) * self.model.norm.weight.mean().exp()
    )


HEADS = {
    _multiplies_by_what_it_learns: "no gradient",
    _adds_a_row_sum: "RuntimeError: .*|off by|no gradient",
    _calls_its_output_layer_twice: "its output layer 2 times",
    _goes_around_its_base_model: "its base model 0 times",
    _scales_before_and_after: "before its output layer and changes its logits",
    _normalises_over_rows: "off by",
}


@pytest.mark.parametrize("forward", HEADS, ids=lambda forward: forward.__name__)
def test_heads_that_cannot_be_followed(monkeypatch: pytest.MonkeyPatch, forward) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    with pytest.raises(ValueError, match=f"model: this causal .*({HEADS[forward]})"):
        check_model(tiny_config("llama", full_attention=True))


def test_the_guard_does_not_trust_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that forgets what the model does to its logits is noticed, though with initial weights they would all be about 0."""
    check_model(tiny_config("granite", full_attention=True))
    monkeypatch.setattr(OwnHead, "features", lambda self, hidden: (hidden, None))
    for model_type in ("granite", "gemma2", "cohere", "minicpm3"):
        with pytest.raises(ValueError, match=r"log-probabilities of .* are off by"):
            check_model(tiny_config(model_type, full_attention=True))
    check_model(tiny_config("llama", full_attention=True))


def test_the_check_does_not_grow_with_the_model() -> None:
    """70 billion parameters: no tensor of theirs is made. The generator and the number of threads stay as they were."""
    config = AutoConfig.for_model(
        "llama", vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8,
    )  # fmt: skip
    config.ring_hilbert = SETTINGS
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    check_model(config)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_buffers_of_the_head_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `forward` reads when the loss is computed, not what was there when its module was made."""
    monkeypatch.setattr(GraniteForCausalLM, "forward", _adds_a_buffer)
    model = tiny("granite")
    model.register_buffer("final_logits_bias", torch.zeros(1, VOCAB, dtype=torch.float64))
    trained, batch = LossModel(model), rh.shard_batch({"input_ids": torch.arange(20)[None]})
    model.final_logits_bias = torch.randn(1, VOCAB, dtype=torch.float64)
    losses, labels = trained(**batch), batch.pop("shift_labels")
    own = cross_entropy(model(**batch).logits[0], labels[0], reduction="none")
    torch.testing.assert_close(losses[0], own)


def _adds_a_buffer(self, input_ids, **options):
    return CausalLMOutput(logits=self.lm_head(self.model(input_ids, **options)[0]) + self.final_logits_bias)


def test_a_loss_beside_that_of_the_tokens_is_not_left_out() -> None:
    config = tiny_config("mixtral", full_attention=True)
    check_model(config)
    config.output_router_logits = True
    with pytest.raises(ValueError, match="output_router_logits adds a loss that balances experts"):
        check_model(config)
