# SPDX-License-Identifier: Apache-2.0
"""Loops that people write themselves: the example scripts run, and their losses over ranks are those of one process."""

from __future__ import annotations

import itertools
import os
import re
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    WeightedRandomSampler,
)
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

from ring_hilbert.integrations.accelerate import ShardedLoader, loss_for_backward
from ring_hilbert.integrations.trainer import SequenceParallelTrainer
from tests.harness.launched import Launched
from tests.harness.loops import EpochStream

EXAMPLES = Path(__file__).parents[2] / "launch" / "examples"
STEPS = 6
STARTS = {
    "trainer": {},
    "accelerate_loop": {"ACCELERATE_USE_CPU": "1"},
    "deepspeed_loop": {"DS_ACCELERATOR": "cpu"},
}


def run_script(path: str, environment: dict[str, str]) -> None:
    os.environ |= environment
    sys.argv = [path]
    runpy.run_path(path, run_name="__main__")


def launched(script: str, ranks: int, folder: Path) -> str:
    """What a script prints, and its ranks to stderr."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {"CUDA_VISIBLE_DEVICES": "", "PATH": path, **STARTS[script]}
    with Launched(folder, ranks, run_script, str(EXAMPLES / f"{script}.py"), environment) as run:
        for process in run.processes:
            process.join(280)  # DeepSpeed may build its extension
        told = "".join(map(run.told, range(ranks)))
        assert all(process.exitcode == 0 for process in run.processes), told[-3000:]
    return told


@pytest.fixture(scope="module")
def one_process() -> list[float]:
    """The example's losses by plain PyTorch: one process, whole sequences, Transformers' own loss on the mean of both."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ring_hilbert.integrations.trainer.SequenceParallelTrainer.train", lambda self: None)
        patch.setattr("ring_hilbert.integrations.trainer.SequenceParallelTrainer.evaluate", lambda self: None)
        patch.setenv("WORLD_SIZE", "1")
        script = runpy.run_path(str(EXAMPLES / "trainer.py"))
    model: Any = script["model"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(STEPS):
        ids = torch.stack([row["input_ids"] for row in script["dataset"][2 * step : 2 * step + 2]])
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("script", STARTS)
def test_example(script: str, one_process: list[float], tmp_path: Path) -> None:
    """Two ranks of one sequence, two micro-steps: every printed loss."""
    if script == "deepspeed_loop":
        pytest.importorskip("deepspeed")
        if shutil.which("g++") is None:
            pytest.skip("DeepSpeed builds its CPU extension with g++")
    printed = re.findall(r"\bloss'?:? '?([\d.]+)", launched(script, 2, tmp_path))
    digits = 1e-3 if script == "trainer" else 1e-5  # the Trainer prints four
    assert [float(loss) for loss in printed] == pytest.approx(one_process, rel=digits)


@pytest.mark.parametrize("script", STARTS)
def test_examples_are_short(script: str) -> None:
    assert len((EXAMPLES / f"{script}.py").read_text().splitlines()) < 60


def trainer(folder: Path, **changes: Any) -> SequenceParallelTrainer:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("llama", vocab_size=20, **sizes)
    config.ring_hilbert = {"segment_lengths": [8], "dilation_rates": [1]}
    model = AutoModelForCausalLM.from_config(config)
    sp_size = changes.pop("sp_size", 1)
    arguments = TrainingArguments(str(folder), use_cpu=True, report_to="none", **changes)
    return SequenceParallelTrainer(model, arguments, sp_size=sp_size)


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"sp_size": 2}, "sp_size=2 with one rank; start torchrun --nproc-per-node 2"),
    ({"dataloader_num_workers": 1}, "only works with the default of dataloader_num_workers"),
    ({"average_tokens_across_devices": False}, "only works with the default of average_tokens_across_devices"),
    ({"label_smoothing_factor": 0.1}, "only works with the default of label_smoothing_factor"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES)
def test_mistakes_of_the_trainer(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **changes)


def test_rows_that_the_trainer_reads(tmp_path: Path) -> None:
    """Columns that nothing uses are left out; each epoch has an order of its own; an evaluation keeps that of the dataset."""
    reader = trainer(tmp_path, per_device_eval_batch_size=2)
    reader.train_dataset = [{"input_ids": torch.tensor([n, n, n]), "name": "x"} for n in range(20)]
    loader: Any = reader.get_train_dataloader()
    epochs = []
    for epoch in (0, 1, 0):
        loader.set_epoch(epoch)
        epochs.append(torch.cat([batch["input_ids"] for batch in loader])[:, 0].tolist())
    assert epochs[0] == epochs[2] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(20))
    first = next(iter(reader.get_eval_dataloader(reader.train_dataset)))
    assert {name: rows.tolist() for name, rows in first.items()} == {"input_ids": [[0, 0, 0], [1, 1, 1]]}


ROWS = [{"input_ids": torch.tensor([n, n])} for n in range(8)]


def read(loader: ShardedLoader, batches: int | None = None) -> list[int]:
    return [batch["input_ids"][0, 0].item() for batch in itertools.islice(loader, batches)]


class ByHand(Sampler):
    """Of an order that nobody can ask for again."""

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(len(ROWS)).tolist())

    def __len__(self) -> int:
        return len(ROWS)


LOADERS: dict[str, Callable[[], Any]] = {
    "shuffled": lambda: DataLoader(ROWS, shuffle=True),
    "a generator's": lambda: DataLoader(ROWS, shuffle=True, generator=torch.Generator().manual_seed(5)),
    "weighted": lambda: DataLoader(ROWS, sampler=WeightedRandomSampler(torch.ones(8), 8)),
    "a share": lambda: DataLoader(ROWS, sampler=DistributedSampler(ROWS, 1, 0)),
    "batches": lambda: DataLoader(ROWS, batch_sampler=BatchSampler(RandomSampler(ROWS), 1, drop_last=False)),
    "in order": lambda: DataLoader(ROWS),
    "a list": lambda: [{"input_ids": row["input_ids"][None]} for row in ROWS],
}


@pytest.mark.parametrize("kind", LOADERS)
def test_where_a_loader_is(kind: str) -> None:
    """A state saved at any moment leads to the same batches, and to the same epochs after them, whatever was drawn in between."""
    torch.manual_seed(7)
    loader = ShardedLoader(LOADERS[kind](), None)
    epochs = [read(loader) for _ in range(4)]
    assert (epochs[0] != epochs[1]) == (kind not in ("in order", "a list"))
    for epoch, batches in ((0, 3), (1, 0), (1, 1), (2, 7), (2, 8)):
        torch.manual_seed(7)
        first = ShardedLoader(LOADERS[kind](), None)
        before = [read(first) for _ in range(epoch)] + [read(first, batches)]
        torch.manual_seed(8)
        again = ShardedLoader(LOADERS[kind](), None)
        again.load_state_dict(first.state_dict())
        assert again.state_dict() == first.state_dict()
        again.set_epoch(again.epoch)  # as a loop over epochs does
        assert again.epoch == epoch and before[epoch] + read(again) == epochs[epoch]
        assert read(again) == epochs[epoch + 1]


def test_epochs_of_a_loader() -> None:
    """Each iteration is the next epoch; one that was left early begins again; an epoch set on the sampler is respected."""
    sampler: Any = DistributedSampler(ROWS, 1, 0)
    loader = ShardedLoader(DataLoader(ROWS, sampler=sampler), None)
    epochs = [read(loader) for _ in range(3)]
    for set_epoch in (loader.set_epoch, sampler.set_epoch):
        set_epoch(1)
        assert loader.epoch == 1 and read(loader, 2) == epochs[1][:2] and read(loader) == epochs[1]
        assert read(loader) == epochs[2]


def test_places_that_are_not_known() -> None:
    with pytest.raises(ValueError, match="ByHand has neither set_epoch nor generator"):
        ShardedLoader(DataLoader(ROWS, sampler=ByHand()), None).state_dict()
    stream = DataLoader(EpochStream(), num_workers=1, persistent_workers=True)
    with pytest.raises(ValueError, match="persistent_workers keep a stream in the state"):
        ShardedLoader(stream, None).state_dict()
    state = ShardedLoader(DataLoader(ROWS, batch_size=2), None).state_dict()
    with pytest.raises(ValueError, match="has 8 batches, but had 4 when"):
        ShardedLoader(DataLoader(ROWS), None).load_state_dict(state)


def test_accelerate_with_a_parallelism_of_its_own() -> None:
    taken = SimpleNamespace(parallelism_config=SimpleNamespace(tp_size=1, cp_size=2, sp_size=1))
    with pytest.raises(ValueError, match="parallelism_config uses cp; leave it out"):
        loss_for_backward(torch.ones(()), taken)
