# SPDX-License-Identifier: Apache-2.0
"""A whole run from a configuration: what it writes, what its export computes, and what a mistake leaves behind."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from ring_hilbert.training.checkpoint import Checkpoints
from ring_hilbert.training.config import RunConfig
from ring_hilbert.training.data import TrainingSequences, open_dataset
from ring_hilbert.training.engine import make_engine
from ring_hilbert.training.engine_torch import TorchEngine, _local
from ring_hilbert.training.export import export_model
from ring_hilbert.training.loop import Run, Summary, pretrain
from ring_hilbert.training.metrics import read_metrics
from ring_hilbert.training.model import model_config
from ring_hilbert.training.tokens import load_tokenizer
from ring_hilbert.training.world import open_world
from tests.harness.ranks import run_ranks, run_ranks_collect
from tests.harness.tiny_run import SEQ_LEN, VOCAB, tiny_config

PNG = b"\x89PNG\r\n\x1a\n"


def in_folder(folder: Path) -> dict[str, str]:
    return {"checkpoint__dir": str(folder / "checkpoints"), "log__dir": str(folder / "logs")}


def run(rank: int, world_size: int, config: RunConfig) -> Summary:
    del rank, world_size
    return pretrain(config)


def test_a_run_learns_and_says_so(tmp_path: Path, texts: Path) -> None:
    """Two ranks; metrics of every step and evaluation, plots, TensorBoard, a model better than token frequencies."""
    changes = {"optim__lr": 1e-2, "log__tensorboard": True, "parallel__sp": 2, "train__probe": True}
    untied = {"model__config__tie_word_embeddings": False}  # learns faster
    config = tiny_config(texts, **in_folder(tmp_path), train__steps=40, train__micro_batch=2, **changes, **untied)
    first, second = run_ranks(run, 2, config)
    assert first == second
    assert first.eval_loss < 0.9 * first.unigram_loss
    logs = tmp_path / "logs"
    lines = read_metrics(logs / "metrics.jsonl")
    train = [line for line in lines if line["kind"] == "train"]
    held_out = [line for line in lines if line["kind"] == "eval"]
    assert [line["step"] for line in train] == list(range(1, 41))
    assert [line["step"] for line in held_out] == [10, 20, 30, 40]
    assert held_out[-1]["loss"] == first.eval_loss
    assert train[-1]["tokens"] == first.progress.tokens
    assert train[-1]["learning_rate"] < train[10]["learning_rate"]
    assert all(line["memory_bytes"] > 2**20 and line["tokens_per_second"] > 0 for line in train)
    for name in ("loss.png", "loss_by_position.png"):
        assert (logs / name).read_bytes().startswith(PNG)
    assert list(logs.glob("events.out.tfevents.*"))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "model",
        "step_00000030",
        "step_00000040",
    ]


def test_export_computes_what_training_computed(tmp_path: Path, texts: Path) -> None:
    """Loaded by AutoModelForCausalLM, the first token that `generate` samples from has the training logits."""
    config = tiny_config(texts, **in_folder(tmp_path))
    hf_config = model_config(config)
    prompt = torch.arange(SEQ_LEN)[None] % VOCAB
    with open_world(config.parallel) as world:
        engine = make_engine(config, hf_config, world)
        dataset = open_dataset(config.data, "train", vocab_size=VOCAB)
        training = Run(config, world, engine, Checkpoints(config, world, {}), dataset, None, hf_config)
        for _ in range(3):
            training.train_step()
        export_model(engine, config, hf_config, world, tmp_path / "model")
        batch = training.train_batches.shard({"input_ids": prompt, "document_ids": torch.zeros_like(prompt)})
        with torch.no_grad():
            losses = engine.model.eval()(**batch)[0]
    order = batch["ring_hilbert"].rows[0].argsort()  # back to natural order

    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.config._attn_implementation == "ring_hilbert"
    assert loaded.config.ring_hilbert == config.attention.to_mapping()
    expected = loaded(prompt).logits[0]
    after = F.cross_entropy(expected[:-1], prompt[0, 1:], reduction="none")
    torch.testing.assert_close(losses[order][:-1], after, rtol=1e-4, atol=1e-5)
    generated = loaded.generate(
        prompt, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    torch.testing.assert_close(generated.logits[0][0], expected[-1], rtol=1e-4, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer("é").input_ids == [0xC3 + 3, 0xA9 + 3, tokenizer.eos_token_id]
    assert loaded.config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.slow
def test_continues_from_an_exported_model(tmp_path: Path, texts: Path) -> None:
    """`model.path` starts from the weights of a folder, whose settings for generation stay, but for what is changed."""
    first = pretrain(tiny_config(texts, **in_folder(tmp_path / "first"), train__steps=4))
    # A temperature without sampling: found in published models, though Transformers refuses to write it.
    generation = {"eos_token_id": [1, 7], "pad_token_id": 0, "temperature": 0.6}
    (first.model / "generation_config.json").write_text(json.dumps(generation))
    places, model = in_folder(tmp_path / "second"), {"path": str(first.model), "changes": {"pad_token_id": 5}}
    again = pretrain(tiny_config(texts, **places, model=model, train__steps=1, optim__lr=1e-9))
    assert again.eval_loss == pytest.approx(first.eval_loss, rel=1e-5)
    loaded: Any = AutoModelForCausalLM.from_pretrained(again.model)
    kept = loaded.generation_config.to_dict()
    assert {key: kept[key] for key in generation} == generation | {"pad_token_id": 5}
    loaded.generate(torch.arange(3)[None], max_new_tokens=2)  # without a key-value cache, which is refused
    (first.model / "generation_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"model: .*generation_config.json is not a JSON object"):
        model_config(tiny_config(texts, model=model))


def test_what_draws_at_the_end_is_missed_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"plots of a run need Matplotlib, .*: pip install 'ring_hilbert\[train\]'"):
        pretrain(tiny_config(tmp_path, **in_folder(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_a_model_is_not_continued_on_the_ids_of_another_tokenizer(tmp_path: Path) -> None:
    """Bytes are the default, and ids that any model takes."""
    model, other = tmp_path / "model", tmp_path / "other"
    AutoConfig.for_model("llama", vocab_size=VOCAB, hidden_size=32, num_attention_heads=4).save_pretrained(model)
    continued = tiny_config(tmp_path, model={"path": str(model)})
    model_config(continued)  # nobody knows its tokenizer
    load_tokenizer("bytes").save_pretrained(model)
    model_config(continued)
    pieces = {"</s>": 0, "one": 1, "two": 2}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(pieces)), eos_token="</s>").save_pretrained(other)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(other / name, model / name)
    with pytest.raises(ValueError, match=r"data.tokenizer: its id 0 is '<pad>', and '</s>' to the model in model.path"):
        model_config(continued)
    model_config(tiny_config(tmp_path, model={"path": str(model)}, data__tokenizer=str(other)))


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": 1e6}, "changes.rope_theta would not take effect beside rope_parameters"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "changes.rope_scaling would not take effect"),
        (
            {"rope_parameters": {"factor": 32.0}},
            "replaces all of .*, and has no rope_theta, rope_type; give it in full",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "and has no rope_theta; give it in full"),
        ({"rope_parameters": {**LLAMA3, "beta_fsat": 32.0}}, "has no key 'beta_fsat'; did you mean beta_fast"),
        ({"rope_parameters": {**LLAMA3, "factor": 32.0}}, None),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0}}, None),
    ],
)
def test_rope_is_changed_as_said_or_not_at_all(tmp_path: Path, changes: dict[str, Any], message: str | None) -> None:
    """Transformers would ignore an older name, and take a default of its own for what a mapping leaves out."""
    folder = str(tmp_path / "model")
    AutoConfig.for_model(
        "llama", vocab_size=VOCAB, hidden_size=32, num_attention_heads=4, rope_parameters=LLAMA3
    ).save_pretrained(folder)
    config = tiny_config(tmp_path, model={"path": folder, "changes": copy.deepcopy(changes)})
    if message is None:
        assert model_config(config).rope_parameters == changes["rope_parameters"]
    else:
        with pytest.raises(ValueError, match=message):
            model_config(config)
    # Nor does it write into the configuration, of which checkpoints keep a digest.
    assert config.model.changes == changes


def test_rope_of_a_new_model_is_not_misspelt(tmp_path: Path) -> None:
    """It would be the default one."""
    rope = {"rop_type": "llama3", "rope_theta": 5e5}
    with pytest.raises(ValueError, match="rope_parameters has no key 'rop_type'; did you mean rope_type"):
        model_config(tiny_config(tmp_path, model__config__rope_parameters=rope))
    rope = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 2.0}
    config = tiny_config(tmp_path, model__config__rope_parameters=rope)
    digest = config.digest()
    model_config(config)
    assert config.digest() == digest


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"engine": "deepspeed", "deepspeed": {"config": {}}}, r"deepspeed.config: .* no zero_optimization.stage"),
    ({"parallel__sp": 3}, r"sp 3 = 3 ranks, but 1 is running; start `torchrun --nproc-per-node 3"),
    ({"model__config__model_type": "lama"}, r"model: .*lama"),
    ({"model__config__hiden_size": 32}, r"no key 'hiden_size'; did you mean hidden_size\?"),
    ({"model__config__hidden_size": "wide"}, r"model: .*hidden_size"),
    ({"model__config__num_key_value_heads": 3}, r"model: .*H=4 .* Hkv=3"),
    ({"model__config__attention_dropout": 0.1}, r"model: .*attention_dropout = 0"),
    ({"model__config__vocab_size": 100}, r"vocab"),
    ({"model": {"path": "/nowhere/model"}}, r"model: .*/nowhere/model"),
    ({"data__sources": [{"path": "/nowhere/texts"}]}, r"/nowhere/texts"),
    ({"data__tokenizer": "/nowhere/tokenizer"}, r"/nowhere/tokenizer"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES, ids=[next(iter(changes)) for changes, _ in MISTAKES])
def test_mistakes_are_told_before_anything_is_written(
    tmp_path: Path, texts: Path, changes: dict[str, Any], message: str
) -> None:
    """A ValueError that names the key and a way out; no folder appears, no process group stays."""
    with pytest.raises(ValueError, match=message):
        pretrain(tiny_config(texts, **in_folder(tmp_path), **changes))
    assert list(tmp_path.iterdir()) == []
    assert not dist.is_initialized()


def test_mistakes_in_folders(tmp_path: Path, texts: Path) -> None:
    """A file in the place of a folder."""
    (tmp_path / "logs").write_text("")
    with pytest.raises(ValueError, match="logs"):
        pretrain(tiny_config(texts, **in_folder(tmp_path)))


def run_with_own_texts(rank: int, world_size: int, folder: Path, texts: Path) -> Summary:
    """The second rank does not see the data."""
    changes = {"data__sources": [{"path": str(texts / "elsewhere")}]} if rank else {}
    return pretrain(tiny_config(texts, **in_folder(folder), parallel__sp=world_size, **changes))


def test_a_mistake_on_one_rank_is_an_error_on_all(tmp_path: Path, texts: Path) -> None:
    """Every rank raises the same error, which names the rank; nobody waits."""
    errors = run_ranks_collect(run_with_own_texts, 2, tmp_path, texts)
    assert all(isinstance(error, ValueError) for error in errors)
    assert len({str(error) for error in errors}) == 1
    assert str(errors[0]).startswith("rank 1: ")
    assert "elsewhere" in str(errors[0])
    assert list(tmp_path.iterdir()) == []


def run_until_unreadable(
    rank: int, world_size: int, folder: Path, texts: Path, unreadable: int, stop_at: int | None
) -> Summary:
    """The last rank cannot read sequences from `unreadable` on; a rank is told to stop in step `stop_at`."""
    changes = {"parallel__sp": world_size, "checkpoint__every": 4, "train__micro_batch": 2}
    read, count_skipped = TrainingSequences.__getitem__, Run._count_skipped

    def unread(self: TrainingSequences, number: int) -> Any:
        if number >= unreadable and rank == world_size - 1:
            raise OSError(f"sequence {number} is gone")
        return read(self, number)

    def stopped(self: Run, norm: float) -> None:
        if stop_at == self.progress.step + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        count_skipped(self, norm)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingSequences, "__getitem__", unread)
        patch.setattr(Run, "_count_skipped", stopped)
        return pretrain(tiny_config(texts, **in_folder(folder), **changes))


@pytest.mark.parametrize("world_size", [1, 2])
def test_no_step_is_lost_to_the_batch_behind_it(tmp_path: Path, texts: Path, world_size: int) -> None:
    """The fifth step's batch, read while the fourth is computed, is an error on all ranks, once the fourth is saved."""
    errors = run_ranks_collect(run_until_unreadable, world_size, tmp_path, texts, 16, None)
    assert all(isinstance(error, ValueError) and "sequence 16 is gone" in str(error) for error in errors), errors
    assert [path.name for path in (tmp_path / "checkpoints").glob("step_*")] == ["step_00000004"]
    assert [line["step"] for line in read_metrics(tmp_path / "logs" / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_run_stops_where_it_is_told_to_though_the_next_batch_is_gone(tmp_path: Path, texts: Path) -> None:
    """A host that loses its file system and its time at once."""
    (summary,) = run_ranks(run_until_unreadable, 1, tmp_path, texts, 12, 3)
    assert summary.progress.step == 3 and summary.model is None
    assert [path.name for path in (tmp_path / "checkpoints").glob("step_*")] == ["step_00000003"]


def test_gradients_that_are_not_finite(tmp_path: Path, texts: Path) -> None:
    """Neither weights nor optimizer change; the run goes on with the next batch, and stops after several in a row."""
    config = tiny_config(texts, **in_folder(tmp_path), optim__max_skipped=3)
    with open_world(config.parallel) as world:
        engine = make_engine(config, model_config(config), world)
        dataset = open_dataset(config.data, "train", vocab_size=VOCAB)
        training = Run(config, world, engine, Checkpoints(config, world, {}), dataset, None, model_config(config))
        backward, bad = engine.backward, {1, 3, 4, 5}

        def poisoned(loss: torch.Tensor) -> None:
            backward(loss * (torch.inf if training.progress.step in bad else 1))

        def state() -> dict[str, torch.Tensor]:
            assert isinstance(engine, TorchEngine)
            return {name: _local(x).clone() for name, x in engine._named_state().items()}

        engine.backward = poisoned  # type: ignore[method-assign]
        changed = []
        for _ in range(5):
            before = state()
            training.train_step()
            changed.append({name.partition(".")[0] for name, x in state().items() if not torch.equal(before[name], x)})
        everything = {"weight", "exp_avg", "exp_avg_sq", "step"}
        assert changed == [everything, set(), everything, set(), set()]
        with pytest.raises(FloatingPointError, match=r"3 steps in a row.*lower optim.lr"):
            training.train_step()
    assert training.progress.skipped == 4
