# SPDX-License-Identifier: Apache-2.0
"""`ring-hilbert plan`: the cost of every strategy, which one "auto" chooses and why, and warnings."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import ring_hilbert as rh
from ring_hilbert.ops.visible import Visible
from ring_hilbert.parallel.choice import Choice, Speeds, choose
from ring_hilbert.parallel.layout import Layout
from ring_hilbert.parallel.plan import Shapes
from ring_hilbert.parallel.planning import order_warnings

if TYPE_CHECKING:
    from ring_hilbert.training.config import RunConfig

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Question:
    """The problem to plan.

    Args:
        pattern, order, causal, layout: of the attention.
        seq_len, world: rows of the sequence, and ranks.
        shapes: of q, k and v.
        strategy: the requested one, or "auto".
        rotated: head_shift differs between layers, so that every residue has a head in some layer.
        ranks_per_host: None if not known.
    """

    pattern: rh.DilatedPattern
    seq_len: int
    world: int
    shapes: Shapes
    order: rh.TokenOrder | None = None
    causal: bool = True
    layout: str = "contiguous"
    strategy: str = "auto"
    rotated: bool = False
    ranks_per_host: int | None = None


def from_config(path: Path, overrides: Sequence[str]) -> Question:
    """The first dilated layer of a run's configuration; of its last stage, if it has stages.

    Raises:
        ValueError: if the file is not the configuration of a run.
    """
    from ring_hilbert.training.config import load_config

    return question_of(load_config(path, [*overrides]))


def question_of(config: RunConfig) -> Question:
    """The first dilated layer of a run."""
    from ring_hilbert.integrations.transformers_config import heads_of
    from ring_hilbert.training.model import model_config

    model = model_config(config).get_text_config(decoder=True)
    attention, train = config.attention, config.train
    heads, kv_heads, dim = heads_of(model)
    dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
    order = None if attention.order is None else rh.TokenOrder(**attention.order.model_dump(exclude_none=True))
    shapes = Shapes(train.micro_batch, heads, kv_heads, dim, dtype)
    return Question(
        attention.pattern(attention.segment_shift), config.data.seq_len, config.parallel.sp, shapes, order, True,
        attention.layout, attention.strategy, attention.head_shift == "auto",
    )  # fmt: skip


def answer(question: Question, speeds: Speeds) -> Choice:
    """The costs of every strategy, and the choice.

    Raises:
        ValueError: for a layout that does not divide evenly, or a requested strategy that is not possible.
    """
    layout = Layout.even(question.seq_len, question.world, question.layout)
    visible = Visible(question.seq_len, question.causal, order=question.order)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        choice = choose(question.pattern, layout, visible, question.shapes, speeds)
    if question.strategy in choice.impossible:
        raise ValueError(choice.impossible[question.strategy])
    return choice


def report(question: Question, choice: Choice, speeds: Speeds, links: Sequence[float]) -> str:
    """A readable page: the problem, a line per strategy, the choice, warnings. `links`: bytes per second."""
    shapes = question.shapes
    lines = [
        f"{question.seq_len} rows over {question.world} ranks ({question.layout}), B {shapes.batch_size}, H "
        f"{shapes.num_heads}, Hkv {shapes.num_kv_heads}, D {shapes.head_dim}, {str(shapes.dtype).removeprefix('torch.')}, "
        f"{'causal' if question.causal else 'not causal'}; branches w/r: {question.pattern.description}",
        "",
        "Per rank and layer, at the rank with most of it; backward includes K and V that are fetched again. An exchange or",
        f"ring computes while rows travel (seconds: the longer of both), at {speeds.flops / 1e12:g} TFLOP/s.",
        "",
        f"{'strategy':10}{'forward MiB':>13}{'backward MiB':>14}{'forward TFLOP':>15}{'imbalance':>11}{'memory GiB':>12}"
        + "".join(f"{f'ms at {link / 1e9:g} GB/s':>17}" for link in links),
    ]
    for name, cost in choice.costs.items():
        lines.append(
            f"{name:10}{cost.forward_bytes / MIB:13.1f}{cost.backward_bytes / MIB:14.1f}{cost.flops / 1e12:15.3f}"
            f"{cost.imbalance:11.3f}{cost.memory / GIB:12.2f}"
            + "".join(f"{1e3 * cost.seconds(speeds._replace(link=link)):17.2f}" for link in links)
        )
    lines += [f"{name:10}not possible: {why}" for name, why in choice.impossible.items()]
    lines += ["", f"auto takes {choice.strategy}: {choice.reason}."]
    if question.strategy not in ("auto", choice.strategy):
        lines.append(f"Asked for is {question.strategy}.")
    if question.ranks_per_host is not None and question.world > 1:
        lines += ["", *_between_hosts(question, choice)]
    found = list(cautions(question))
    lines += ["", *(f"Note: {caution}." for caution in found)] if found else []
    return "\n".join(lines)


def _between_hosts(question: Question, choice: Choice) -> Iterator[str]:
    """Each strategy's traffic between hosts, if a sequence's ranks are neighbours starting at a host's first rank."""
    per_host, world = question.ranks_per_host, question.world
    assert per_host is not None
    hosts = np.arange(world) // per_host
    if hosts[-1] == 0 and per_host % world == 0:
        yield f"Hosts of {per_host} ranks: every group of {world} is within one, nothing crosses hosts."
        return
    uneven = "" if world % per_host == 0 else f"; {world} is not a multiple of {per_host}, so that groups share hosts"
    yield f"Hosts of {per_host} ranks: a group of {world} lies on {hosts[-1] + 1}{uneven}. Into one host, per layer in forward:"
    other = hosts[:, None] != hosts
    for name, cost in choice.costs.items():
        if name == "ulysses":
            received = np.full((world, world), cost.forward_bytes / (world - 1))
        else:
            row = 2 * cost.plan.shapes.head_dim * cost.plan.shapes.dtype.itemsize
            received = np.stack([cost.plan.counts(rank) * row for rank in range(world)])
        np.fill_diagonal(received, 0)
        crossing = np.bincount(hosts, weights=(received * other).sum(1))
        share = (received * other).sum() / max(received.sum(), 1)
        yield f"  {name:10}{crossing.max() / MIB:10.1f} MiB at the host with most, {share:.0%} of all that travels"


def cautions(question: Question) -> Iterator[str]:
    """Warnings about settings that may be unintended."""
    yield from order_warnings(question.pattern, question.order, question.causal, question.seq_len)
    kv_heads = question.shapes.num_kv_heads
    for branch in question.pattern.branches:
        w, r = branch
        kept = {residue.offset for residue in question.pattern.residues(branch, kv_heads)}
        if len(kept) < r and not question.rotated:
            name = "all" if w is None else w
            yield (
                f"branch {name}/{r} has {r} residues but {kv_heads} kv heads: rows of {r - len(kept)} residues are in it for "
                "no head; another head_shift in every layer (attention.head_shift: auto) covers them in turn"
            )
    if question.causal and question.layout == "contiguous" and question.world > 1:
        far = [
            w for w, r in question.pattern.branches if r == 1 and (w is None or w > question.seq_len // question.world)
        ]
        if far:
            yield (
                f"the undilated branch of {'all' if None in far else max(w for w in far if w)} rows crosses ranks, so later "
                "ranks compute more than earlier ones; layout zigzag balances it"
            )


def draw(path: Path, choice: Choice, strategy: str) -> None:
    """Which ranks need which rows: a line per reader, a column per owner, MiB of K and V in forward."""
    from ring_hilbert.bench.picture import check_path, figure_of, save

    check_path(path)
    name = strategy if strategy in ("exchange", "ring") else "exchange"
    plan = choice.costs[name].plan
    world = plan.layout.world_size
    row = 2 * plan.shapes.head_dim * plan.shapes.dtype.itemsize / MIB
    needed = np.stack([plan.counts(rank) * row for rank in range(world)])
    figure, panels = figure_of(2)
    panel: Any = panels[0]
    shown = panel.imshow(np.where(needed > 0, needed, np.nan), cmap="viridis", interpolation="nearest", vmin=0)
    figure.colorbar(shown, ax=panel, label="MiB")
    panel.set(title=f"K and V rows that a rank reads, {name}", xlabel="owner", ylabel="reader")
    panels[1].plot(needed.sum(1), label="K, V received in forward")
    panels[1].plot(np.asarray(plan.traffic["backward"]) / MIB, label="dK, dV received in backward")
    panels[1].set(title="MiB per rank", xlabel="rank", ylim=(0, None))
    panels[1].legend()
    save(figure, path)
