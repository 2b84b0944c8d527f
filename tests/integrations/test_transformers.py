# SPDX-License-Identifier: Apache-2.0
"""The Transformers contract, on Llama and Qwen."""

from __future__ import annotations

import copy
from inspect import signature

import pytest
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.utils.generic import TransformersKwargs

import ring_hilbert as rh
from tests.harness import causal_models
from tests.harness.ranks import run_ranks, run_ranks_collect

SETTINGS = {
    "segment_lengths": [16, 32, None],
    "dilation_rates": [1, 2, 4],
    "head_shift": "auto",
    "order": {"curve": "hilbert", "block": 16},
}


def tiny_model(model_type: str = "llama", settings: dict | None = None, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type, **{"num_hidden_layers": 2, **changes}, vocab_size=50, hidden_size=32, intermediate_size=48,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=128,
    )  # fmt: skip
    config.ring_hilbert = SETTINGS if settings is None else settings
    return AutoModelForCausalLM.from_config(config).double().eval()


def tokens(batch: int = 2, length: int = 61) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    documents = torch.tensor([[0] * 20 + [1] * 30 + [2] * 11, [0] * 45 + [3] * 10 + [-1] * 6])[:batch, :length]
    return {"input_ids": torch.randint(0, 50, (batch, length), generator=generator), "document_ids": documents}


def _train(rank: int, world: int, model_type: str, order: rh.TokenOrder | None, checkpointing: bool):
    """Logits of this rank, and the gradient of the loss over all ranks."""
    model = tiny_model(model_type)
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = rh.shard_batch(tokens(), dist.group.WORLD, order=order)
    logits = model(**batch).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten(), reduction="sum").backward()
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return logits.detach(), batch["ring_hilbert"].rows, gradients


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_sharded_model_equals_one_device(model_type: str, checkpointing: bool):
    order = rh.TokenOrder("hilbert", block=16)
    results = {world: run_ranks(_train, world, model_type, order, checkpointing) for world in (1, 3)}
    natural = {}
    for world, ranks in results.items():
        logits = torch.cat([logits for logits, _, _ in ranks], dim=1)
        rows = torch.cat([rows.expand(2, -1) for _, rows, _ in ranks], dim=1)
        natural[world] = torch.zeros_like(logits).scatter(1, rows[..., None].expand_as(logits), logits)
    real = tokens()["document_ids"] >= 0
    torch.testing.assert_close(natural[3][real], natural[1][real], rtol=0, atol=1e-11)
    for name, gradient in results[1][0][2].items():
        for rank in range(3):
            torch.testing.assert_close(results[3][rank][2][name], gradient, rtol=1e-10, atol=1e-10, msg=name)


def test_natural_order_without_prepared_equals_shard_batch_with_order():
    """What `generate` runs: one device, natural order, the order of the configuration inside the call."""
    model, batch = tiny_model(), {"input_ids": tokens()["input_ids"]}
    sharded = rh.shard_batch(batch, order=rh.TokenOrder("hilbert", block=16))
    expected = model(**batch, use_cache=False).logits
    assert (sharded["ring_hilbert"].rows != torch.arange(61)).any()
    torch.testing.assert_close(
        model(**sharded).logits, expected[:, sharded["ring_hilbert"].rows[0]], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side: str):
    model, ids = tiny_model(), tokens(1, 45)["input_ids"]
    pad = torch.full((1, 9), 7)
    mask = torch.ones_like(ids)
    zeros = torch.zeros_like(pad)
    if side == "left":
        padded, mask, real = torch.cat((pad, ids), 1), torch.cat((zeros, mask), 1), slice(9, None)
    else:
        padded, mask, real = torch.cat((ids, pad), 1), torch.cat((mask, zeros), 1), slice(0, 45)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(padded, attention_mask=mask, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(logits[:, real], model(ids, use_cache=False).logits, rtol=0, atol=1e-12)


def test_restarting_position_ids_are_documents():
    model, ids = tiny_model(settings={"segment_lengths": [16], "dilation_rates": [1]}), tokens(1, 32)["input_ids"]
    packed = model(ids, position_ids=torch.arange(32)[None] % 16, use_cache=False).logits
    torch.testing.assert_close(packed[:, 16:], model(ids[:, 16:], use_cache=False).logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("lengths", [(16, 16), (1, 30), (5, 1, 1, 20, 4)])
def test_shard_batch_reads_position_ids_as_the_model_does(lengths: tuple[int, ...]):
    """What Transformers' padding-free collator makes: the same logits, and a loss in which no document predicts another."""
    from transformers import DataCollatorWithFlattening

    ids = tokens(1, sum(lengths))["input_ids"][0]
    packed = DataCollatorWithFlattening()([{"input_ids": part.tolist()} for part in ids.split(lengths)])
    model = tiny_model(settings={"segment_lengths": [8, None], "dilation_rates": [1, 2]})
    direct = model(packed["input_ids"], position_ids=packed["position_ids"], use_cache=False).logits
    order = rh.TokenOrder("hilbert", block=4)
    for options in ({}, {"order": order}):
        batch = rh.shard_batch(packed, **options)
        found = rh.gather_rows(model(**batch).logits, batch["ring_hilbert"])
        if not options:  # an order is another pattern
            torch.testing.assert_close(found, direct, rtol=0, atol=1e-12)
        targets = rh.gather_rows(batch["shift_labels"], batch["ring_hilbert"])
        assert torch.equal(targets[:, :-1], packed["labels"][:, 1:])  # -100 at the first token of each, by the collator


def test_a_dense_layer_and_shifts_of_a_layer():
    from ring_hilbert.integrations.transformers_config import pattern_of

    config = tiny_model(num_hidden_layers=3).config
    assert [pattern_of(config, layer).head_shift for layer in range(3)] == [0, 2, 4]
    config.ring_hilbert = SETTINGS | {"layers": {"1": {"dense": True}, "2": {"head_shift": 1, "segment_shift": 8}}}
    assert pattern_of(config, 1) == rh.DilatedPattern((None,), (1,))
    assert pattern_of(config, 2) == rh.DilatedPattern((16, 32, None), (1, 2, 4), head_shift=1, segment_shift=8)
    config.ring_hilbert = SETTINGS | {"layers": {"1": {"branches": 1}}}
    assert pattern_of(config, 1) == rh.DilatedPattern((16,), (1,), head_shift=2)
    assert len(pattern_of(config, 0).branches) == 3
    config.ring_hilbert = SETTINGS | {"layers": {"3": {"dense": True}}}
    with pytest.raises(ValueError, match="has layer 3; the model's are 0 to 2"):
        pattern_of(config, 1)
    config.ring_hilbert = SETTINGS | {"layers": {"1": {"branches": 4}}}
    with pytest.raises(ValueError, match="has branches 4; the first 1 to 3"):
        pattern_of(config, 1)
    dense, sdpa = tiny_model(settings=SETTINGS | {"layers": {"0": {"dense": True}, "1": {"dense": True}}}), tiny_model()
    sdpa.set_attn_implementation("sdpa")
    ids = tokens()["input_ids"]
    torch.testing.assert_close(
        dense(ids, use_cache=False).logits, sdpa(ids, use_cache=False).logits, rtol=0, atol=1e-11
    )


def test_settings_survive_saving_and_select_the_implementation(tmp_path):
    model, ids = tiny_model(), tokens()["input_ids"]
    model.save_pretrained(tmp_path)
    for loaded in (
        AutoModelForCausalLM.from_pretrained(tmp_path),
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)),
    ):
        assert loaded.config.ring_hilbert == SETTINGS and loaded.config._attn_implementation == "ring_hilbert"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(
        loaded(ids, use_cache=False).logits, model(ids, use_cache=False).logits, rtol=0, atol=1e-14
    )
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa").config._attn_implementation == "sdpa"
    )


def test_generation_without_a_cache():
    model, ids = tiny_model(), tokens(1, 20)["input_ids"]
    longer = model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert longer[0, 20] == model(ids).logits[0, -1].argmax()
    with pytest.raises(ValueError, match=r"generate\(use_cache=False\)"):
        model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0, use_cache=True)


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        ({"segment_lengths": [8]}, {}, r"lacks \['dilation_rates'\]"),
        ({"segment_lengths": [8], "dilation_rates": [1], "curve": "hilbert"}, {}, r"unknown keys \['curve'\]"),
        ({"segment_lengths": [8], "dilation_rates": [9]}, {}, "1 <= r <= segment length 8"),
        (
            {"segment_lengths": [8], "dilation_rates": [1], "layers": {"0": {"dens": True}}},
            {},
            r"unknown keys \['dens'\]",
        ),
        (SETTINGS, {"attention_dropout": 0.1}, "attention_dropout = 0"),
    ],
)
def test_mistakes_in_the_configuration_are_named(settings: dict, changes: dict, message: str):
    model = tiny_model(settings=settings, **changes).train()
    with pytest.raises(ValueError, match=message):
        model(tokens()["input_ids"], use_cache=False)


def test_sliding_windows_and_masks_of_other_kinds_are_refused():
    model = tiny_model("qwen3", use_sliding_window=True, sliding_window=8, max_window_layers=0)
    with pytest.raises(ValueError, match="has no sliding_window"):
        model(tokens()["input_ids"], use_cache=False)
    with pytest.raises(ValueError, match="must be 2-D"):
        tiny_model()(tokens()["input_ids"], attention_mask=torch.ones(2, 1, 61, 61), use_cache=False)


def pair(model_type: str, **changes):
    """A model with dense ring_hilbert attention, and the same with Transformers' own."""
    config = causal_models.tiny_config(model_type, full_attention=changes.pop("full_attention", True))
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    made = [AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="ring_hilbert").eval()]
    made.append(AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager").eval())
    for p in made[0].parameters():
        p.data.normal_(0, 0.5)
    made[1].load_state_dict(made[0].state_dict())
    return made


@pytest.mark.skipif("is_causal" not in TransformersKwargs.__annotations__, reason="needs Transformers 5.10")
@pytest.mark.parametrize("by", ["call", "configuration"])
@pytest.mark.parametrize("padding", [0, 9])
def test_an_attention_that_is_made_to_see_both_ways(by: str, padding: int):
    """By `is_causal`, which goes before what the layers say of themselves."""
    ours, theirs = pair("llama", **({"is_causal": False} if by == "configuration" else {}))
    ids, mask = tokens()["input_ids"], torch.ones(2, 61, dtype=torch.int64)
    mask[1, 61 - padding :] = 0
    options = {"attention_mask": mask} | ({"is_causal": False} if by == "call" else {})
    expected = theirs(ids, **options).logits
    torch.testing.assert_close(ours(ids, **options).logits[mask > 0], expected[mask > 0], rtol=1e-4, atol=1e-4)
    assert (theirs(ids, attention_mask=mask, is_causal=True).logits - expected).abs().max() > 1


@pytest.mark.parametrize("model_type", ["llama", "llama4_text"])
def test_documents_by_position_ids_in_layers_that_are_not_given_them(model_type: str):
    """Llama 4 does not pass position ids on to its attention; Transformers tells documents in the mask."""
    ours, theirs = pair(model_type)
    ids, positions = tokens(1)["input_ids"], torch.cat((torch.arange(20), torch.arange(41)))[None]
    expected = torch.cat([theirs(part).logits for part in ids.split((20, 41), 1)], 1)
    torch.testing.assert_close(theirs(ids, position_ids=positions).logits, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours(ids, position_ids=positions).logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("model_type", "changes", "given", "message"),
    [
        ("llama4_text", {"full_attention": False}, {}, "has no chunked_attention"),
        ("bloom", {}, {}, "has attention of its own or none"),
        ("mamba", {}, {}, "has attention of its own or none"),
        ("llama", {"is_encoder_decoder": True}, {}, "has no cross-attention"),
        (
            "llama",
            {},
            {"cu_seq_lens_q": torch.tensor([0, 20, 61])},
            r"has no cu_seq_lens_q \(got \[3\]\); use position_ids",
        ),
        ("llama", {}, {"seq_idx": torch.zeros(2, 61)}, "has no seq_idx"),
        ("llama", {}, {"position_bias": torch.zeros(61, 61)}, "has no position_bias"),
        (
            "llama",
            {},
            {"indices": [1]},
            r"has no indices \(got \[1\]\); use a call or a model without it: LlamaAttention",
        ),
    ],
)
def test_what_would_change_the_attention_is_refused(model_type: str, changes: dict, given: dict, message: str):
    with pytest.raises(ValueError, match=message):
        pair(model_type, **changes)[0](tokens()["input_ids"], use_cache=False, **given)


def test_positions_that_begin_behind_the_padding_token_are_refused():
    """RoBERTa and its kind: with rows of its own they would be those of other tokens, a difference of 0.4 in these logits."""
    batch = tokens()
    model = pair("roberta", is_decoder=True)[0]
    model(batch["input_ids"], use_cache=False)
    with pytest.raises(
        ValueError, match=r"RobertaForCausalLM counts positions from padding_idx \+ 1 on \(.*position_embeddings\)"
    ):
        model(**rh.shard_batch(batch), use_cache=False)
    bert = pair("bert", is_decoder=True)[0]
    bert(**rh.shard_batch(batch), use_cache=False)


@pytest.mark.skipif(
    "block_sequence_ids" not in signature(create_causal_mask).parameters, reason="Transformers is older"
)
@pytest.mark.parametrize("overlay", ["or_mask_function", "and_mask_function", "block_sequence_ids"])
def test_masks_that_a_model_lays_over_the_causal_one_are_refused(overlay: str):
    """As of images, within which all sees all."""
    given = torch.zeros(1, 8, dtype=torch.int64) if "ids" in overlay else lambda b, h, q, kv: q == kv
    call = (tiny_model().config, torch.zeros(1, 8, 32), None, None)
    assert create_causal_mask(*call) is None
    with pytest.raises(ValueError, match="has no masks of a model's own"):
        create_causal_mask(*call, **{overlay: given})


def test_recurrent_layers_are_not_sharded():
    with pytest.raises(ValueError, match="layers mix rows and know neither their order nor documents nor other ranks"):
        pair("falcon_h1")[0](**rh.shard_batch({"input_ids": tokens(1, 24)["input_ids"]}))


def test_layers_that_drop_keyword_arguments_are_not_sharded(monkeypatch: pytest.MonkeyPatch):
    """Every rank would attend by itself, and in another order: also of rows that met in another model before."""
    model, forward = tiny_model(), LlamaAttention.forward
    batch = rh.shard_batch({"input_ids": tokens()["input_ids"]})
    model(**batch)
    monkeypatch.setattr(
        LlamaAttention, "forward", lambda self, hidden_states, position_embeddings, attention_mask, **_: forward(
            self, hidden_states, position_embeddings, attention_mask
        )
    )  # fmt: skip
    with pytest.raises(
        ValueError, match="no attention layer of LlamaModel was given the ring_hilbert= of the model call"
    ):
        model(**batch)


def _without_positions(rank: int, world: int, how: str):
    model, batch = tiny_model(), rh.shard_batch({"input_ids": tokens()["input_ids"]}, dist.group.WORLD)
    if how == "again":
        model(**batch)
    if how in ("none", "again"):
        batch.pop("position_ids")
    if how == "prepare":
        batch = {
            "input_ids": batch["input_ids"],
            "ring_hilbert": rh.prepare(batch["input_ids"].shape[1], group=dist.group.WORLD),
        }
    if how == "mask":
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    return model(**batch).logits


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("none", "position_ids"),
        ("again", "position_ids"),
        ("prepare", "position_ids"),
        ("mask", "belongs in shard_batch"),
    ],
)
def test_sharded_calls_without_position_ids_are_refused(how: str, message: str):
    outcomes = run_ranks_collect(_without_positions, 2, how, timeout=40)
    assert isinstance(outcomes[1], ValueError) and message in str(outcomes[1])


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 30,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
LOCAL_ROPES = [
    ("llama", {"rope_parameters": DYNAMIC}, "dynamic"),
    ("qwen2", {"rope_parameters": LONGROPE}, "longrope"),
    ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 30, "pad_token_id": 0}, "longrope"),
    (
        "gemma3_text",
        {
            "rope_parameters": {"sliding_attention": LINEAR, "full_attention": DYNAMIC},
            "layer_types": ["full_attention"] * 2,
        },
        "dynamic",
    ),
    ("llama", {"rope_parameters": LINEAR}, None),
]


def _call(rank: int, world: int, layout: str) -> list[str | None]:
    """What a plain call says of each model, of ranks that share a sequence and of one rank that is a group."""
    outcomes: list[str | None] = []
    alone = dist.new_group([rank], use_local_synchronization=True)
    for group in (dist.group.WORLD, alone):
        batch = rh.shard_batch({"input_ids": torch.arange(48)[None]}, group, layout=layout)
        for model_type, changes, _ in LOCAL_ROPES:
            try:
                tiny_model(model_type, {**SETTINGS, "order": None}, **changes)(**batch)
                outcomes.append(None)
            except ValueError as error:
                outcomes.append(str(error))
    return outcomes


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_rope_that_looks_at_the_longest_position_of_a_rank(layout: str):
    for outcomes in run_ranks(_call, 2, layout):
        shared, alone = outcomes[: len(LOCAL_ROPES)], outcomes[len(LOCAL_ROPES) :]
        for outcome, (_, _, kind) in zip(shared, LOCAL_ROPES, strict=True):
            assert outcome is None if kind is None else f"rope_type '{kind}' derives its frequencies" in (outcome or "")
        assert alone == [None] * len(LOCAL_ROPES)
