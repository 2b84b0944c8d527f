# SPDX-License-Identifier: Apache-2.0
"""A run that stops and goes on is the run that did not stop; a crash while saving costs steps and nothing else."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from ring_hilbert.training.config import RunConfig
from ring_hilbert.training.convert import export_checkpoint
from ring_hilbert.training.loop import Summary, pretrain
from ring_hilbert.training.metrics import read_metrics
from tests.harness.ranks import run_ranks, run_ranks_collect
from tests.harness.tiny_run import VOCAB, tiny_config

# Phi has dropout outside attention, so that random state matters too.
PHI = {
    "model_type": "phi",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "resid_pdrop": 0.1,
}


def run_all(rank: int, world_size: int, configs: Sequence[RunConfig]) -> Summary:
    """`pretrain` with each configuration in turn; the last one's summary."""
    del rank, world_size
    return [pretrain(config) for config in configs][-1]


def outcome(folder: Path) -> tuple[list[tuple[str, int, float]], dict[str, torch.Tensor]]:
    """Every loss that was logged, and the exported weights."""
    losses = [(line["kind"], line["step"], line["loss"]) for line in read_metrics(folder / "logs" / "metrics.jsonl")]
    return losses, load_file(folder / "checkpoints" / "model" / "model.safetensors")


def config_in(texts: Path, folder: Path, **changes: Any) -> RunConfig:
    """A run of two micro-steps that reads `texts` and writes below `folder`."""
    places = {"checkpoint__dir": str(folder / "checkpoints"), "log__dir": str(folder / "logs")}
    return tiny_config(texts, **{**places, "optim__decay_steps": 20, "train__micro_batch": 2, **changes})


@pytest.fixture(scope="module")
def alone(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of twenty steps on one rank."""
    folder = tmp_path_factory.mktemp("alone")
    run_ranks(run_all, 1, [config_in(texts, folder)])
    return folder


@pytest.mark.parametrize(("sp", "precision"), [pytest.param(1, "fp32", marks=pytest.mark.full), (2, "bf16")])
def test_ten_and_ten_is_twenty(tmp_path: Path, texts: Path, sp: int, precision: str) -> None:
    """Bit for bit: every logged loss, every weight; with dropout, recomputation and evaluations in between."""
    common = {
        "model__config": PHI,
        "train__checkpoint_activations": True,
        "train__precision": precision,
        "parallel__sp": sp,
        "checkpoint__every": 7,
    }
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_ranks(run_all, sp, [config_in(texts, whole, **common)])
    run_ranks(run_all, sp, [config_in(texts, parts, **common, train__steps=steps) for steps in (10, 20)])
    expected_losses, expected_weights = outcome(whole)
    losses, weights = outcome(parts)
    assert losses == expected_losses
    assert [step for kind, step, _ in losses if kind == "train"] == list(range(1, 21))
    assert weights.keys() == expected_weights.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, expected_weights[name]), name


@pytest.mark.slow
def test_other_number_of_ranks(tmp_path: Path, texts: Path, alone: Path) -> None:
    """Ten steps on one rank, ten on two and none on one: the losses of twenty steps on one, up to rounding."""
    run_ranks(run_all, 1, [config_in(texts, tmp_path, train__steps=10)])
    run_ranks(run_all, 2, [config_in(texts, tmp_path, parallel__sp=2)])
    run_ranks(run_all, 1, [config_in(texts, tmp_path)])
    expected, found = outcome(alone)[0], outcome(tmp_path)[0]
    assert [line[:2] for line in found] == [line[:2] for line in expected]
    assert [line[2] for line in found] == pytest.approx([line[2] for line in expected], rel=1e-5)


@pytest.mark.full
def test_any_layout_of_ranks(tmp_path: Path, texts: Path, alone: Path) -> None:
    """Five steps each as replicas, in shards, in both and in shards of unequal size: the losses of twenty steps on one rank."""
    layouts = [(2, 1, 1), (1, 2, 2), (2, 2, 1), (1, 1, 3)]  # dp_replicate, dp_shard, sp
    for number, (replicate, shard, sp) in enumerate(layouts, 1):
        layout = {"parallel__dp_replicate": replicate, "parallel__dp_shard": shard, "parallel__sp": sp}
        layout["train__micro_batch"] = 1
        run_ranks(run_all, replicate * shard * sp, [config_in(texts, tmp_path, **layout, train__steps=5 * number)])
    expected, found = ([x for x in outcome(folder)[0] if x[0] == "train"] for folder in (alone, tmp_path))
    assert [line[1] for line in found] == list(range(1, 21))
    assert [line[2] for line in found] == pytest.approx([line[2] for line in expected], rel=1e-5)


def crash_while_saving(rank: int, world_size: int, config: RunConfig) -> None:
    """The disk fails when the second checkpoint is about to become visible, on the rank that does that."""
    del rank, world_size
    rename = Path.rename

    def fail_at_ten(self: Path, target: Path) -> Path:
        if "00000010" in self.name:
            raise OSError("no space left on device")
        return rename(self, target)

    Path.rename = fail_at_ten  # type: ignore[method-assign]
    try:
        pretrain(config)
    finally:
        Path.rename = rename


def test_crash_while_saving(tmp_path: Path, texts: Path) -> None:
    """Every rank raises, the checkpoint before is intact, and the next run resumes from it and cleans up."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = {"checkpoint__every": 5, "parallel__sp": 2}
    run_ranks(run_all, 2, [config_in(texts, whole, **options)])
    config = config_in(texts, parts, **options)
    errors = run_ranks_collect(crash_while_saving, 2, config)
    assert [str(error) for error in errors] == ["rank 0: no space left on device"] * 2
    names = sorted(path.name for path in (parts / "checkpoints").iterdir())
    assert names == ["step_00000005", "step_00000010.unfinished"]
    lines = len(read_metrics(parts / "logs" / "metrics.jsonl"))
    assert 11 <= lines <= 16  # ten steps and an evaluation, and those until the failure behind them was seen
    run_ranks(run_all, 2, [config])
    assert outcome(parts)[0] == outcome(whole)[0]
    names = sorted(path.name for path in (parts / "checkpoints").iterdir())
    assert names == ["model", "step_00000015", "step_00000020"]  # checkpoint.keep is 2


def test_another_configuration_is_refused(tmp_path: Path, texts: Path) -> None:
    """The error names what differs, and the files are left alone."""
    config = config_in(texts, tmp_path, train__steps=2, checkpoint__every=2, optim__decay_steps=None)
    run_ranks(run_all, 1, [config])
    before = (tmp_path / "logs" / "metrics.jsonl").read_bytes()
    other = config_in(texts, tmp_path, optim__decay_steps=2, optim__lr=1e-3, train__seed=3)
    with pytest.raises(ValueError, match=r"optim.lr: 0.003, now 0.001, train.seed: 0, now 3;.*another checkpoint.dir"):
        run_ranks(run_all, 1, [other])
    longer = config_in(texts, tmp_path, train__steps=4, optim__decay_steps=None)
    with pytest.raises(ValueError, match=r"optim.decay_steps: 2, now 4 \(the schedule spans train.steps unless"):
        run_ranks(run_all, 1, [longer])
    assert (tmp_path / "logs" / "metrics.jsonl").read_bytes() == before
    (done,) = run_ranks(run_all, 1, [config_in(texts, tmp_path, train__steps=4, optim__decay_steps=2)])
    assert done.progress.step == 4


def test_a_model_folder_that_changed_is_refused(tmp_path: Path, texts: Path) -> None:
    """Its path is the same, and so are the shapes."""
    folder = tmp_path / "folder"
    given = AutoConfig.for_model(
        "llama", vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    AutoModelForCausalLM.from_config(given).save_pretrained(folder)
    config = config_in(texts, tmp_path, model={"path": str(folder)}, train__steps=2)
    run_ranks(run_all, 1, [config])
    changed = given.to_dict()
    changed["rope_parameters"]["rope_theta"] = 500.0
    (folder / "config.json").write_text(json.dumps(changed))
    longer = config_in(texts, tmp_path, model={"path": str(folder)}, train__steps=3)
    message = r"step_00000002 is of a model with another configuration: rope_parameters.rope_theta: 10000.0, now 500.0;"
    with pytest.raises(ValueError, match=message):
        run_ranks(run_all, 1, [longer])
    with pytest.raises(ValueError, match=message):
        export_checkpoint(longer, tmp_path / "exported")
    given.save_pretrained(folder)
    (done,) = run_ranks(run_all, 1, [longer])
    assert done.progress.step == 3


def test_data_that_moved_are_the_same(tmp_path: Path, texts: Path, alone: Path) -> None:
    """Steps on text files, then on the same documents as packed rows elsewhere: bit for bit the steps on the files."""
    parts, moved = tmp_path / "parts", tmp_path / "moved"
    run_ranks(run_all, 1, [config_in(texts, parts, train__steps=3)])
    for split in ("train", "eval"):
        (moved / split).mkdir(parents=True)
        rows = [{"text": file.read_text()} for file in sorted((texts / split).iterdir())]
        packed = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
        (moved / split / "rows.jsonl.gz").write_bytes(packed)
    run_ranks(run_all, 1, [config_in(moved, parts, train__steps=6)])
    expected, found = ([loss for loss in outcome(folder)[0] if loss[0] == "train"] for folder in (alone, parts))
    assert len(found) == 6
    assert found == expected[:6]


def test_other_data_are_refused_or_accepted(tmp_path: Path, texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On either number of ranks, whatever changed; once accepted, the new data are those of the checkpoint."""
    data = tmp_path / "data"
    shutil.copytree(texts, data)
    run_ranks(run_all, 1, [config_in(data, tmp_path, train__steps=1)])
    saved = (tmp_path / "logs" / "metrics.jsonl").read_bytes()

    def refused(match: str, sp: int) -> None:
        with pytest.raises(ValueError, match=match):
            run_ranks(run_all, sp, [config_in(data, tmp_path, train__steps=2, parallel__sp=sp)])
        assert (tmp_path / "logs" / "metrics.jsonl").read_bytes() == saved

    (data / "train" / "03.txt").write_text("other words")
    refused(
        r"step_00000001 was .* on other data: data.sources.0: document 3 \(.*03.txt\) has changed.*: accept to", sp=2
    )
    shutil.copy(texts / "train" / "03.txt", data / "train")
    (data / "train" / "99.txt").write_text("more words")
    refused(
        r"data.sources.0: 1 documents of 11 tokens were appended to the 30 known ones, from .*99.txt on\. Give", sp=1
    )
    (data / "eval" / "00.txt").write_text("other words")
    refused(r"data.eval: document 0 \(.*00.txt\) has changed.*; data.sources.0: 1 documents", sp=2)
    pretrain(config_in(data, tmp_path, train__steps=2, checkpoint__changed_data="accept"))
    accepted = "accepted by checkpoint.changed_data: data.sources.0: 1 documents of 11 tokens were appended to"
    assert accepted in capsys.readouterr().out
    assert pretrain(config_in(data, tmp_path, train__steps=3)).progress.step == 3
    assert "accepted" not in capsys.readouterr().out


def run_on_data_of_its_own(rank: int, world_size: int, texts: Path, folder: Path) -> None:
    """Each rank finds something different at the same path, as on hosts with disks of their own."""
    del world_size
    shutil.copytree(texts, folder / f"rank{rank}")
    if rank == 1:
        (folder / "rank1" / "train" / "17.txt").write_text("other words")
    config = config_in(folder / f"rank{rank}", folder, parallel__sp=2, train__steps=1)
    pretrain(config)


def test_ranks_that_read_other_data_are_refused(tmp_path: Path, texts: Path) -> None:
    errors = run_ranks_collect(run_on_data_of_its_own, 2, texts, tmp_path)
    expected = (
        r"rank 1: the data on this rank are not those on rank 0: data.sources.0: document 17 \(.*17.txt\) has changed"
    )
    assert all(re.match(expected, str(error)) for error in errors)
    assert not (tmp_path / "checkpoints").exists()


def test_run_file(texts: Path, alone: Path) -> None:
    """A checkpoint says in JSON how far it got: steps, sequences read, target tokens."""
    run = json.loads((alone / "checkpoints" / "step_00000020" / "run.json").read_text())
    assert run["progress"]["sequences"] == 20 * 4
    assert 0.9 * 20 * 1024 < run["progress"]["tokens"] < 20 * 1024  # a document's last token predicts nothing
    assert run["digest"] == config_in(texts, alone).digest()
