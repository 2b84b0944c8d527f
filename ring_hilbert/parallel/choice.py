# SPDX-License-Identifier: Apache-2.0
"""`strategy="auto"`: chooses a strategy by each one's plan for the busiest rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ring_hilbert.ops.pattern import DilatedPattern
from ring_hilbert.ops.visible import Visible
from ring_hilbert.parallel.layout import Layout
from ring_hilbert.parallel.plan import PASSES, Plan, Shapes

BACKWARD_FLOPS = 2.5  # relative to forward
MOST_RECEIVED = 2.0  # most K and V of other ranks in an exchange, relative to q, k, v and out of the rank's own rows


class Speeds(NamedTuple):
    """A device's FLOP/s of attention and bytes received per second; only their ratio matters."""

    flops: float = 300e12
    link: float = 50e9


@dataclass(frozen=True)
class Cost:
    """The cost of one strategy at its busiest rank.

    Attributes:
        plan: the plan of the strategy.
        forward_bytes, backward_bytes: received; backward includes what is fetched again.
        flops: of the pairs, in forward.
        memory: bytes of a layer's attention, see `Plan.memory_bytes`.
        fits: whether no more is held of other ranks than an exchange may hold.
    """

    plan: Plan
    forward_bytes: int
    backward_bytes: int
    flops: int
    memory: int
    fits: bool

    @property
    def strategy(self) -> str:
        """Its name."""
        return self.plan.strategy

    def seconds(self, speeds: Speeds) -> float:
        """Forward and backward of the slowest rank: an exchange or ring overlaps communication with compute, Ulysses does not."""
        join, slowest = sum if self.strategy == "ulysses" else max, 0.0
        for flops, forward, backward in zip(self.plan.all_flops, *_received(self.plan), strict=True):
            passes = [(flops, forward), (BACKWARD_FLOPS * flops, backward)]
            slowest = max(slowest, sum(join((work / speeds.flops, size / speeds.link)) for work, size in passes))
        return slowest

    @property
    def imbalance(self) -> float:
        """Largest over mean FLOPs of the ranks."""
        return self.plan.imbalance


class Choice(NamedTuple):
    """The strategy and why; the costs of all possible ones; the impossible ones and why."""

    strategy: str
    reason: str
    costs: dict[str, Cost]
    impossible: dict[str, str]


def choose(
    pattern: DilatedPattern, layout: Layout, visible: Visible, shapes: Shapes, speeds: Speeds | None = None
) -> Choice:
    """The fastest strategy by the plans; the same on all ranks given the same inputs. Ignores documents and positions.

    A ring moves the rows of an exchange in hops: it is for patterns that read more of other ranks than fits at once.
    """
    speeds = speeds or Speeds()
    visible = Visible(visible.seq_len, visible.causal, order=visible.order)
    exchange = _cost(Plan(pattern, layout, visible, shapes))
    costs, impossible = {"exchange": exchange}, {}
    for strategy in ("ring", "ulysses"):
        try:
            costs[strategy] = _cost(exchange.plan.under(strategy))
        except ValueError as problem:
            impossible[strategy] = str(problem)
    if not exchange.plan.crossings.communicates:
        return Choice("exchange", "no segment crosses a rank boundary: nothing is sent", costs, impossible)
    mine, why = "exchange", "its communication overlaps the local visits"
    if not exchange.fits:
        mine, why = "ring", f"an exchange would hold over {MOST_RECEIVED:g} times a rank's own rows"
    if "ulysses" in costs and costs["ulysses"].seconds(speeds) < costs[mine].seconds(speeds):
        return Choice("ulysses", f"faster than {mine} on the slowest rank", costs, impossible)
    return Choice(mine, why, costs, impossible)


def _received(plan: Plan) -> tuple[list[int], list[int]]:
    """Bytes that every rank receives in forward and in backward, including what it fetches again."""
    forward, returned = (plan.traffic[pass_] for pass_ in PASSES)
    again = [0 if plan.strategy == "ulysses" else received for received in forward]
    return forward, [a + b for a, b in zip(again, returned, strict=True)]


def _cost(plan: Plan) -> Cost:
    forward, backward = _received(plan)
    shapes = plan.shapes
    row = 2 * shapes.batch_size * (shapes.num_heads + shapes.num_kv_heads) * shapes.head_dim * shapes.dtype.itemsize
    fits = all(r <= MOST_RECEIVED * row * rows for r, rows in zip(forward, plan.layout.lengths, strict=True))
    memory = max(plan.memory_bytes(rank) for rank in range(plan.layout.world_size))
    return Cost(plan, max(forward), max(backward), max(plan.all_flops), memory, fits or plan.strategy != "exchange")
