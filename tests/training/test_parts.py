# SPDX-License-Identifier: Apache-2.0
"""The small parts of the trainer: loss, schedule, unigram model, metrics file, agreement of ranks."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ring_hilbert.kernels import cross_entropy
from ring_hilbert.training import loss
from ring_hilbert.training.engine import make_engine
from ring_hilbert.training.evaluate import Evaluation
from ring_hilbert.training.loss import LossHead, count_targets
from ring_hilbert.training.metrics import Metrics, read_metrics
from ring_hilbert.training.model import model_config
from ring_hilbert.training.plots import plot_loss_by_position
from ring_hilbert.training.schedule import learning_rate, with_decay_steps
from ring_hilbert.training.world import RankError, World, open_world
from tests.harness.ranks import run_ranks, run_ranks_collect
from tests.harness.tiny_run import tiny_config


@pytest.mark.parametrize("chunk_elements", [1, 40, 10**6])
@pytest.mark.parametrize("bias", [False, True])
def test_loss_head(monkeypatch: pytest.MonkeyPatch, chunk_elements: int, bias: bool) -> None:
    """Chunked or not: the cross-entropy of the logits and its gradients; zero where there is no target."""
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", chunk_elements)
    output = torch.nn.Linear(5, 11, bias=bias, dtype=torch.float64)
    head = LossHead(output)
    hidden = torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 11, (2, 7))
    labels[0, 3:], labels[1, 6] = -100, -100
    losses = head(hidden, labels)
    assert losses.shape == (2, 7)
    assert (losses[labels == -100] == 0).all()
    assert count_targets(labels) == 9
    weights = torch.rand(2, 7, dtype=torch.float64)  # a gradient of its own for every row
    plain = F.cross_entropy(output(hidden).flatten(0, 1), labels.flatten(), reduction="none").view(2, 7)
    torch.testing.assert_close(losses, plain)
    of = [hidden, *output.parameters()]
    expected = torch.autograd.grad((plain * weights).sum(), of)
    torch.testing.assert_close(torch.autograd.grad((losses * weights).sum(), of), expected)


@pytest.mark.parametrize("vocab", [5, 64, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_in_one_kernel(vocab: int, dtype: torch.dtype) -> None:
    """What the passes one after another give, logits of -inf and rows without a target included, and the logits stay."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    logits = torch.randn(7, vocab, dtype=dtype, device=device) * 20
    logits[0, 1], logits[1, : vocab - 1] = -math.inf, -math.inf
    labels = torch.randint(0, vocab, (7,), device=device)
    labels[0], labels[1], labels[5] = 0, vocab - 1, -100
    before = logits.clone()
    in_one = partial(cross_entropy.row_losses, ignored=-100)
    losses, gradient = in_one(logits, labels, dtype)
    expected = loss._row_losses(logits, labels, dtype)
    torch.testing.assert_close((losses, gradient), expected)
    assert losses[5] == 0 and gradient is not None and not gradient[5].any() and torch.equal(logits, before)
    if dtype == torch.float32:  # the interpreter cuts bits off
        rounded = in_one(logits.mT.contiguous().mT, labels, torch.bfloat16)[1]
        torch.testing.assert_close(rounded, gradient.bfloat16(), rtol=2**-7, atol=1e-30)
    of_pairs = torch.stack((labels, 1 - labels), 1)[:, 0]  # not next to one another in memory
    assert torch.equal(in_one(logits, of_pairs, dtype)[0], losses)
    only, nothing = in_one(logits, labels, None)
    assert torch.equal(only, losses) and nothing is None
    assert in_one(logits[:0], labels[:0], dtype)[0].shape == (0,)
    for wrong in (vocab, -1):  # never another column's loss
        labels[3] = wrong
        assert in_one(logits, labels, dtype)[0].isnan().tolist() == [number == 3 for number in range(7)]
        if device.type == "cpu":
            with pytest.raises(RuntimeError, match="out of bounds"):
                loss._row_losses(logits, labels, dtype)
    logits[2, 0] = math.nan
    assert in_one(logits, labels, dtype)[0][2].isnan()


def test_loss_head_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses are float32, and the weights' gradient is rounded about once however many chunks are summed."""
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 11 * 4)
    output = torch.nn.Linear(8, 11, bias=False, dtype=torch.bfloat16)
    hidden = torch.randn(1, 4096, 8, dtype=torch.bfloat16)
    labels = torch.randint(0, 11, (1, 4096))
    losses = LossHead(output)(hidden, labels)
    assert losses.dtype == torch.float32
    (gradient,) = torch.autograd.grad(losses.sum(), output.weight)
    exact = output.weight.detach().double().requires_grad_()
    plain = F.cross_entropy(F.linear(hidden.double(), exact)[0], labels[0], reduction="sum")
    (expected,) = torch.autograd.grad(plain, exact)
    assert losses.sum().item() == pytest.approx(plain.item(), rel=2e-3)
    assert (gradient - expected).norm() < 4e-3 * expected.norm()


def test_loss_of_padding_alone() -> None:
    """Zero, with a gradient of zeros; no rows at all are fine too."""
    for rows in (5, 0):
        hidden = torch.randn(1, rows, 3, requires_grad=True)
        total = LossHead(torch.nn.Linear(3, 4))(hidden, torch.full((1, rows), -100)).sum()
        total.backward()
        assert total.item() == 0
        assert hidden.grad is not None
        assert (hidden.grad == 0).all()


def test_schedule(tmp_path: Path) -> None:
    """Linear warm-up that starts above zero, then half a cosine down to the requested ratio, and no further."""
    config = tiny_config(
        tmp_path, optim={"lr": 1.0, "warmup_steps": 4, "decay_steps": 24, "min_lr_ratio": 0.1}, train__steps=40
    )
    rates = [learning_rate(config, step) for step in range(40)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[14] == pytest.approx(0.55)  # halfway
    assert rates[23] > 0.1
    assert rates[24:] == pytest.approx([0.1] * 16)
    assert rates[4:25] == sorted(rates[4:25], reverse=True)
    constant = tiny_config(tmp_path, optim={"lr": 1.0, "warmup_steps": 1, "schedule": "constant"})
    assert [learning_rate(constant, step) for step in range(3)] == [0.5, 1.0, 1.0]


def test_digest_covers_the_schedule(tmp_path: Path) -> None:
    """train.steps counts where it shapes the schedule, and only there."""

    def digest(**changes: object) -> str:
        return with_decay_steps(tiny_config(tmp_path, **changes)).digest()

    assert digest(train__steps=20) != digest(train__steps=30)
    assert digest(train__steps=20) == digest(train__steps=30, optim__decay_steps=20)
    constant = {"optim__schedule": "constant"}
    assert digest(train__steps=20, **constant) == digest(train__steps=30, **constant)


def test_unigram_loss() -> None:
    """The cross-entropy of add-one smoothed frequencies."""
    targets = torch.tensor([3, 1, 0])
    evaluation = Evaluation(1.0, 4, torch.zeros(1), targets)
    expected = -(3 * math.log(6 / 10) + math.log(3 / 10)) / 4
    assert evaluation.unigram_loss(torch.tensor([5, 2, 0])) == pytest.approx(expected)


def test_plot_with_holes(tmp_path: Path) -> None:
    """Positions without a target are left out."""
    losses = torch.linspace(3, 1, 100, dtype=torch.float64)
    losses[::7] = torch.nan
    losses[60:] = torch.nan
    plot_loss_by_position(Evaluation(2.0, 50, losses, torch.ones(2)), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_metrics_continue(tmp_path: Path) -> None:
    """Lines after the resumed step are dropped, as is a truncated one; none comes twice; a fresh run sets the old file aside."""
    config = tiny_config(tmp_path, log__dir=str(tmp_path))
    world = World(0, 1, torch.device("cpu"))
    path = tmp_path / "metrics.jsonl"
    with Metrics(config, world, None) as metrics:
        for step in (1, 2, 3):
            metrics.write("train", step, loss=float(step), norm=math.inf if step == 2 else 1.0)
        metrics.write("eval", 2, loss=0.5)
    assert [json.loads(line, parse_constant=pytest.fail).get("norm") for line in path.read_text().splitlines()][
        1
    ] is None
    with path.open("a") as file:
        file.write('{"kind": "train", "st')
    with Metrics(config, world, 2) as metrics:
        metrics.write("eval", 2, loss=0.7)
        metrics.write("train", 3, loss=3.5)
    found = [(line["kind"], line["step"], line["loss"]) for line in read_metrics(path)]
    assert found == [("train", 1, 1.0), ("train", 2, 2.0), ("eval", 2, 0.5), ("train", 3, 3.5)]
    before = path.read_bytes()
    with Metrics(config, world, None) as metrics:
        metrics.write("train", 1, loss=9.0)
    assert (tmp_path / "metrics.0.jsonl").read_bytes() == before
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [9.0]
    (tmp_path / "metrics.0.jsonl").rename(tmp_path / "metrics.1.jsonl")
    for _ in range(2):
        with Metrics(config, world, None):
            pass
    assert (tmp_path / "metrics.1.jsonl").read_bytes() == before


def disagree(rank: int, world_size: int, folder: Path, kind: str) -> None:
    """Rank 1 fails."""
    with open_world(tiny_config(folder, parallel__sp=world_size).parallel) as world, world.together():
        if rank == 1:
            raise {"user": ValueError, "bug": KeyError}[kind]("spam")


def test_together(tmp_path: Path) -> None:
    """A user's mistake is the same error everywhere; anything else keeps its type where it happened."""
    mine, theirs = run_ranks_collect(disagree, 2, tmp_path, "user")
    assert isinstance(mine, RankError)
    assert isinstance(theirs, RankError)
    assert str(mine) == str(theirs) == "rank 1: spam"
    mine, theirs = run_ranks_collect(disagree, 2, tmp_path, "bug")
    assert isinstance(theirs, KeyError)
    assert isinstance(mine, RankError)
    assert str(mine) == "rank 1: KeyError: 'spam'"


def places(rank: int, world_size: int, folder: Path) -> tuple[int, list[int]]:
    """Which data group this rank is in, and who shares its sequences."""
    assert world_size == 4
    with open_world(tiny_config(folder, parallel__sp=2, parallel__dp_replicate=2).parallel) as world:
        assert world.rank == rank
        assert world.sp_group is not None
        return world.dp_index, torch.distributed.get_process_group_ranks(world.sp_group)


def test_ranks_of_a_sequence_are_neighbours(tmp_path: Path) -> None:
    """A rank is `dp_index * sp + sp_index`."""
    assert run_ranks(places, 4, tmp_path) == [(0, [0, 1]), (0, [0, 1]), (1, [2, 3]), (1, [2, 3])]


def test_a_loaded_state_has_the_weight_decay_of_its_run(tmp_path: Path) -> None:
    """Its betas too, so that a stage's own take effect; moments and weights are the saved ones."""
    before = tiny_config(tmp_path, optim__weight_decay=0.1)
    after = tiny_config(tmp_path, optim__weight_decay=0.5, optim__betas=[0.8, 0.9], train__seed=1)
    with open_world(before.parallel) as world:
        engine: Any = make_engine(before, model_config(before), world)
        (tmp_path / "state").mkdir()
        engine.save(tmp_path / "state", lambda files: None).result()
        other: Any = make_engine(after, model_config(after), world)
        other.load(tmp_path / "state")
        saved, loaded = engine.whole_state(), other.whole_state()
        assert all(torch.equal(saved[name], loaded[name]) for name in saved)
        groups = [(group["weight_decay"], tuple(group["betas"])) for group in other.optimizer.param_groups]
        assert groups == [(0.5, (0.8, 0.9)), (0.0, (0.8, 0.9))]
