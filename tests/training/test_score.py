# SPDX-License-Identifier: Apache-2.0
"""Scoring saved models: the losses of training and of Transformers, by position, over ranks; likelihoods; lm-eval's tasks."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from ring_hilbert.cli import main
from ring_hilbert.training.config import DataConfig, ParallelConfig
from ring_hilbert.training.likelihood import Likelihood
from ring_hilbert.training.loop import pretrain
from ring_hilbert.training.metrics import read_metrics
from ring_hilbert.training.score import Scorer, score
from ring_hilbert.training.tokens import load_tokenizer
from ring_hilbert.training.world import open_world
from tests.harness.ranks import run_ranks
from tests.harness.tiny_run import SEQ_LEN, VOCAB, tiny_config, write_texts


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ten steps in Hilbert order."""
    folder = tmp_path_factory.mktemp("trained")
    write_texts(folder)
    pretrain(tiny_config(folder, train__steps=10))
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of Transformers' own."""
    folder = tmp_path_factory.mktemp("dense")
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    load_tokenizer("bytes").save_pretrained(folder)
    return folder


def scored(rank: int, world_size: int, trained: Path) -> tuple[float, dict[int, float]]:
    texts = str(trained / "eval")
    data = DataConfig.model_validate({"sources": [{"path": texts}], "seq_len": SEQ_LEN, "eval": {"path": texts}})
    with open_world(ParallelConfig(sp=world_size)) as world:
        found = score(Scorer(trained / "checkpoints" / "model", world), data)
    return found.loss, found.by_position()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 3])
def test_the_score_is_the_held_out_loss_of_training(trained: Path, ranks: int) -> None:
    """By position too, on any number of ranks."""
    last = read_metrics(trained / "logs" / "metrics.jsonl")[-1]
    for loss, positions in run_ranks(scored, ranks, trained):
        assert loss == pytest.approx(last["loss"], rel=1e-6)
        assert positions == pytest.approx({2**k: last[f"loss_at_{2**k}"] for k in range(8)}, rel=1e-5)


@pytest.mark.slow
def test_the_command(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, model = tmp_path / "new" / "score.json", str(trained / "checkpoints" / "model")
    assert main(["score", "--model", model, "--data", str(trained / "eval"), "--json", str(out)]) == 0
    found, page = json.loads(out.read_text()), capsys.readouterr().out
    assert f"loss {found['loss']:.4f} nats per token over {found['tokens']:,} tokens" in page
    assert found["seq_len"] == SEQ_LEN and found["loss"] == pytest.approx(scored(0, 1, trained)[0], rel=1e-9)


def test_a_dense_folder_is_scored_as_transformers_computes_it(dense: Path) -> None:
    """Losses and first choices, padding left out."""
    random = np.random.default_rng(0)
    ids, documents = random.integers(3, VOCAB, (2, 40)), np.zeros((2, 40), np.int64)
    documents[1, 30:] = -1
    with open_world(ParallelConfig()) as world:
        losses, hits = Scorer(dense, world)(ids, documents)
    model = AutoModelForCausalLM.from_pretrained(dense, attn_implementation="eager").eval()
    with torch.no_grad():
        for row, length in enumerate((40, 30)):
            logits, labels = model(torch.from_numpy(ids[row : row + 1, :length])).logits[0, :-1], ids[row, 1:length]
            wanted = F.cross_entropy(logits, torch.from_numpy(labels), reduction="none").double()
            torch.testing.assert_close(losses[row, : length - 1], wanted, rtol=1e-4, atol=1e-5)
            assert losses[row, length - 1 :].isnan().all() and not hits[row, length - 1 :].any()
            assert hits[row, : length - 1].tolist() == (logits.argmax(-1).numpy() == labels).tolist()
            most = logits.argmax(-1)[-1].item()
            ids[row, length - 1] = most  # what it would choose, to see a hit
    with open_world(ParallelConfig()) as world:
        _, hits = Scorer(dense, world)(ids, documents)
    assert hits[0, 38] and hits[1, 28]


def test_likelihoods(dense: Path) -> None:
    """Of continuations, in any order and length; of texts longer than the positions, window by window."""
    model = AutoModelForCausalLM.from_pretrained(dense, attn_implementation="eager").eval()

    def log(text: str, first: int, after: int = 1) -> float:
        ids = torch.tensor([[after, *(byte + 3 for byte in text.encode())]])
        with torch.no_grad():
            logs = model(ids).logits[0, :-1].log_softmax(-1)
        return logs.gather(-1, ids[0, 1:, None])[first:].sum().item()

    with open_world(ParallelConfig()) as world:
        likelihood = Likelihood(Scorer(dense, world), load_tokenizer("bytes"))
        found = likelihood.continuations([("a b", " c"), ("", "yes"), ("q" * 90, "no"), ("long " * 8, "é")])
        texts = likelihood.whole(["short", "x" * 100, ""])
        with pytest.raises(ValueError, match="continuation of 70 tokens does not fit into the model's 64"):
            likelihood.continuations([("a", "b" * 70)])
    wanted = [log("a b c", 3), log("yes", 0), log("q" * 61 + "no", 61, ord("q") + 3), log("long " * 8 + "é", 40)]
    assert [value for value, _ in found] == pytest.approx(wanted, rel=1e-4)
    assert texts == pytest.approx([log("short", 0), log("x" * 63, 0) + log("x" * 37, 0, ord("x") + 3), 0.0], rel=1e-4)


def test_what_cannot_be_scored(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words")
    wrong = {
        "give either --data PATH ... or --tasks": [],
        "65 tokens, but the model has positions for 64": ["--data", str(text), "--seq-len", "65"],
        "data.bos is true, but the tokenizer has no bos token": ["--data", str(text), "--bos"],
        "matches no file": ["--data", str(tmp_path / "none")],
        "cannot be loaded": ["--data", str(text), "--model", str(tmp_path)],
    }
    if importlib.util.find_spec("lm_eval") is None:
        wrong["pip install 'ring_hilbert[lm-eval]'"] = ["--tasks", "lambada"]
    for words, flags in wrong.items():
        assert main(["score", "--model", str(dense), *flags]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["lack lm_head.weight", "have what the model has not: model.layers.0.mlp.gate.bias"])
def test_weights_that_a_folder_lacks_or_has_in_vain(dense: Path, tmp_path: Path, kind: str) -> None:
    """Transformers would draw the one and drop the other."""
    shutil.copytree(dense, tmp_path / "copy")
    file, bias = tmp_path / "copy" / "model.safetensors", {"model.layers.0.mlp.gate.bias": torch.zeros(64)}
    tensors = load_file(file)
    less = {key: x for key, x in tensors.items() if key != "lm_head.weight"}
    save_file(less if "lack" in kind else tensors | bias, file, {"format": "pt"})
    with open_world(ParallelConfig()) as world, pytest.raises(ValueError, match=f"its files {kind}"):
        Scorer(tmp_path / "copy", world)


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the extra lm-eval")
def test_a_task_of_lm_eval_over_a_local_file(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Multiple choice: the accuracy is that of the likelihoods."""
    examples = [{"q": f"number {n}", "choices": ["one", "two", "six"], "gold": n % 3} for n in range(7)]
    (tmp_path / "examples.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    (tmp_path / "choose.yaml").write_text(
        "task: choose\ndataset_path: json\ndataset_kwargs: {data_files: {test: "
        + str(tmp_path / "examples.jsonl")
        + "}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: '{{gold}}'\nmetric_list: [{metric: acc}]\n"
    )
    out = tmp_path / "tasks.json"
    flags = ["--tasks", "choose", "--include-path", str(tmp_path), "--json", str(out)]
    assert main(["score", "--model", str(dense), *flags]) == 0, capsys.readouterr().err
    with open_world(ParallelConfig()) as world:
        likelihood = Likelihood(Scorer(dense, world), load_tokenizer("bytes"))
        logs = [[likelihood.continuations([(x["q"], " " + choice)])[0][0] for choice in x["choices"]] for x in examples]
    right = [int(np.argmax(log)) == x["gold"] for log, x in zip(logs, examples, strict=True)]
    assert json.loads(out.read_text())["tasks"]["choose"]["acc"] == pytest.approx(np.mean(right))
