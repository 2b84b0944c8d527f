# SPDX-License-Identifier: Apache-2.0
"""`strategy="auto"`: which strategy, from what the plans of all say of the rank that has most to do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from ring_hilbert.ops.pattern import DilatedPattern
from ring_hilbert.parallel.facts import Facts
from ring_hilbert.parallel.layout import Layout
from ring_hilbert.parallel.plan import PASSES, Plan, Shapes

BACKWARD_FLOPS = 2.5  # of forward
MOST_RECEIVED = 4.0  # what an exchange may hold of other ranks, in q, k, v and out of the rank's own rows


class Speeds(NamedTuple):
    """What a device does: FLOP/s of attention, and bytes per second that it receives. Of these only the ratio matters."""

    flops: float = 300e12
    link: float = 50e9


@dataclass(frozen=True)
class Cost:
    """One strategy, at the rank that has most of it to do.

    Attributes:
        plan: of the strategy.
        forward_bytes, backward_bytes: received; backward with what is fetched again.
        flops: of the pairs, in forward.
        memory: bytes of a layer's attention, see `Plan.memory_bytes`.
        seconds: of forward and backward; an exchange or ring computes while rows travel, Ulysses does not.
        fits: not more is held of other ranks than an exchange may.
    """

    plan: Plan
    forward_bytes: int
    backward_bytes: int
    flops: int
    memory: int
    seconds: float
    fits: bool

    @property
    def strategy(self) -> str:
        """Its name."""
        return self.plan.strategy

    @property
    def imbalance(self) -> float:
        """Largest over mean FLOPs of the ranks."""
        return self.plan.imbalance


class Choice(NamedTuple):
    """The strategy, why, and the costs of all that are possible; what is not possible, and why."""

    strategy: str
    reason: str
    costs: dict[str, Cost]
    impossible: dict[str, str]


def choose(
    pattern: DilatedPattern, layout: Layout, facts: Facts, shapes: Shapes, speeds: Speeds | None = None
) -> Choice:
    """The fastest strategy by the plans; the same on every rank that knows the same. Documents and positions are left out.

    A ring moves what an exchange moves, in hops: it is for patterns whose rows of other ranks are too many to be held at a time.
    """
    speeds = speeds or Speeds()
    facts = replace(facts, documents=None, positions=None)
    costs, impossible = {}, {}
    for strategy in ("exchange", "ring", "ulysses"):
        try:
            costs[strategy] = _cost(Plan(pattern, layout, facts, shapes, strategy), speeds)
        except ValueError as problem:
            impossible[strategy] = str(problem)
    exchange = costs["exchange"]
    if not exchange.plan.crossings.communicates:
        return Choice("exchange", "no segment reaches over a rank boundary: nothing travels", costs, impossible)
    mine, why = "exchange", "its rows travel behind the local visits"
    if not exchange.fits:
        mine, why = "ring", f"an exchange would hold over {MOST_RECEIVED:g} times a rank's own rows"
    if "ulysses" in costs and costs["ulysses"].seconds < costs[mine].seconds:
        return Choice("ulysses", f"fewer seconds than {mine} for the slowest rank", costs, impossible)
    return Choice(mine, why, costs, impossible)


def _cost(plan: Plan, speeds: Speeds) -> Cost:
    world = range(plan.layout.world_size)
    forward, returned = (plan.traffic[pass_] for pass_ in PASSES)
    refetched = [0 if plan.strategy == "ulysses" else received for received in forward]
    backward = [a + b for a, b in zip(refetched, returned, strict=True)]
    flops = plan.all_flops
    seconds = 0.0
    for work, there, back in zip(flops, forward, backward, strict=True):
        pairs = [(work / speeds.flops, there / speeds.link), (BACKWARD_FLOPS * work / speeds.flops, back / speeds.link)]
        join = sum if plan.strategy == "ulysses" else max
        seconds = max(seconds, sum(map(join, pairs)))
    shapes, item = plan.shapes, plan.shapes.dtype.itemsize
    row = 2 * shapes.head_dim * item * shapes.batch_size
    held = [received * (2 if plan.strategy == "exchange" else 0) for received in forward]
    own = [(shapes.num_heads + shapes.num_kv_heads) * row * rows for rows in plan.layout.lengths]
    fits = all(h <= MOST_RECEIVED * o for h, o in zip(held, own, strict=True))
    memory = max(plan.memory_bytes(rank) for rank in world)
    return Cost(plan, max(forward), max(backward), max(flops), memory, seconds, fits)
