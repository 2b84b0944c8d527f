# SPDX-License-Identifier: Apache-2.0
"""The plan: who visits which rows, who sends which rows to whom, and what that costs. Pure Python, no process group.

The operator executes the object that is counted here: what a plan predicts is what is sent, to the byte.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from ring_hilbert.ops.order import TokenOrder
from ring_hilbert.ops.pattern import Branch, DilatedPattern
from ring_hilbert.ops.rings import nested, ring_visits, rings_pay
from ring_hilbert.ops.visits import Chunk, Rows, Segments, Visit, branch_visits, crossing_visits, rows_in, segments_of
from ring_hilbert.parallel.crossings import Block, Crossings
from ring_hilbert.parallel.facts import Facts
from ring_hilbert.parallel.layout import Layout
from ring_hilbert.parallel.remote import RemoteVisit, remote_visits

STRATEGIES = ("exchange", "auto")


class Shapes(NamedTuple):
    """What all ranks must agree on besides the rows: `q [batch_size, S, num_heads, head_dim]`, `k, v [..., num_kv_heads, ...]`."""

    batch_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class RankPlan:
    """What one rank does: its visits, and its shipments from (`received`) and to (`sent`) every rank, own ones empty."""

    rank: int
    chunks: tuple[Chunk, ...]
    local: list[Visit]
    remote: list[RemoteVisit]
    received: list[list[Block]]
    sent: list[list[Block]]


class Plan:
    """The plan of one pattern on one sequence; made by `rh.plan`, or by a `Prepared` for the call at hand.

    Attributes:
        pattern, layout, facts, shapes, strategy: what it is a plan of.
        deduplicate: visit every pair of local rows once (True; the pattern must be nested), once per branch (False), or as is
            faster (None).
    """

    def __init__(
        self,
        pattern: DilatedPattern,
        layout: Layout,
        facts: Facts,
        shapes: Shapes,
        strategy: str = "exchange",
        deduplicate: bool | None = None,
    ) -> None:
        self.pattern, self.layout, self.facts, self.shapes = pattern, layout, facts, shapes
        self.strategy, self.deduplicate = check_strategy(strategy), deduplicate
        self.crossings = Crossings(pattern, layout, facts, shapes.num_kv_heads, shapes.batch_size)
        self._ranks: dict[int, RankPlan] = {}

    # ---- what a rank executes

    def rank(self, rank: int) -> RankPlan:
        """The part of `rank`, made on first use."""
        if rank not in self._ranks:
            world = range(self.layout.world_size)
            received = [self.crossings.shipment(rank, other) for other in world]
            sent = [self.crossings.shipment(other, rank) for other in world]
            chunks = self.layout.chunks(rank)
            local = [visit for chunk in chunks for visit in self._visits_within(chunk)]
            local += crossing_visits(self.pattern, self.shapes.num_kv_heads, chunks, self.facts.row_causal)
            remote = list(remote_visits(self.crossings, rank, received))
            self._ranks[rank] = RankPlan(rank, chunks, local, remote, received, sent)
        return self._ranks[rank]

    def deduplicates(self, chunk: Chunk) -> bool:
        """Whether the pairs among the rows of `chunk` are visited once instead of once per branch."""
        if self.deduplicate is not None:
            return self.deduplicate
        if self.facts.documents is not None or nested(self.pattern) is None:
            return False
        regular = self.facts.by_row_alone or self._in_equal_blocks(chunk)
        return regular and rings_pay(self.pattern, self.shapes.num_kv_heads, chunk, self.facts.causal)

    def _in_equal_blocks(self, chunk: Chunk) -> bool:
        """Whether the innermost segments of `chunk` follow each other in position, and all are in one order within."""
        if len(self.crossings.entries) > 1:
            return False
        innermost = min(self.pattern.branches, key=lambda branch: branch.segment_length or math.inf)
        latest = -math.inf
        for segments in segments_of(innermost, self.pattern.segment_shift, chunk.start, chunk.stop):
            rows = Rows(segments.start, 1, segments.stop - segments.start, segments.count, segments.pitch).indices()
            positions = self.facts.positions_of(rows.ravel()).reshape(rows.shape)
            first, last = positions.min(1), positions.max(1)
            order = positions.argsort(axis=1, kind="stable")
            if first[0] <= latest or (first[1:] <= last[:-1]).any() or (order != order[:1]).any():
                return False
            latest = last[-1]
        return True

    def _visits_within(self, chunk: Chunk) -> list[Visit]:
        make = ring_visits if self.deduplicates(chunk) else branch_visits
        return make(self.pattern, self.shapes.num_kv_heads, chunk, self.facts.row_causal)

    # ---- costs

    def received_bytes(self, rank: int, pass_: str = "forward") -> int:
        """Payload bytes that cross to `rank` from other ranks, nothing else counted.

        "forward": the K and V rows it reads, in their dtype (backward fetches them again). "backward": the dK and dV
        rows that come back for the rows it sent, in float32 (float64 for float64).
        """
        if pass_ not in ("forward", "backward"):
            raise ValueError(f"pass_ must be 'forward' or 'backward', got {pass_!r}")
        world, dtype = range(self.layout.world_size), self.shapes.dtype
        if pass_ == "forward":
            rows, item = sum(b.size for other in world for b in self.crossings.shipment(rank, other)), dtype.itemsize
        else:
            rows, item = (
                sum(b.size for other in world for b in self.crossings.shipment(other, rank)),
                max(4, dtype.itemsize),
            )
        return rows * 2 * self.shapes.head_dim * item

    def attention_flops(self, rank: int) -> int:
        """Forward FLOPs of the allowed pairs of the rows of `rank`, summed over branches: pairs x 4 D x query heads x batch."""
        shapes, pairs = self.shapes, 0
        group = shapes.num_heads // shapes.num_kv_heads
        repeat = shapes.batch_size // len(self.crossings.entries)
        for branch in self.pattern.branches:
            for chunk in self.layout.chunks(rank):
                for segments in segments_of(branch, self.pattern.segment_shift, chunk.start, chunk.stop):
                    for offset, heads in self.pattern.residues(branch, shapes.num_kv_heads):
                        pairs += self._pairs(branch, segments, offset) * repeat * len(heads.indices) * group
        return pairs * 4 * shapes.head_dim

    def executed_flops(self, rank: int) -> int:
        """Forward FLOPs of the pairs that the visits of `rank` compute, before documents and positions prune whole tiles.

        Below `attention_flops` where pairs are deduplicated.
        """
        shapes, part = self.shapes, self.rank(rank)
        pairs = shapes.batch_size * sum(visit.pairs for visit in part.local)
        pairs += sum(visit.queries.count * int((visit.arena >= 0).sum()) for visit in part.remote)
        return pairs * 4 * shapes.head_dim * (shapes.num_heads // shapes.num_kv_heads)

    def _pairs(self, branch: Branch, segments: Segments, offset: int) -> int:
        """Allowed pairs of the rows in `segments` with all rows of their segments, for one head; entries summed."""
        w, rate = branch
        queries = rows_in(segments, rate, offset)
        if queries is None:
            return 0
        seq_len, origin = self.layout.seq_len, segments.origin
        start, stop = (0, seq_len) if w is None else (max(origin, 0), min(origin + w, seq_len))
        keys = rows_in(Segments(origin, start, stop, 1, 0), rate, offset)
        assert keys is not None, "a segment holds the keys of its queries"
        if self.facts.by_row_alone:
            if not self.facts.causal:
                return queries.segments * queries.count * keys.count
            before = (queries.start - keys.start) // rate  # keys ahead of the first query
            return queries.segments * (queries.count * (before + 1) + queries.count * (queries.count - 1) // 2)
        pitches = segments.pitch * np.arange(segments.count)
        return sum(
            self.facts.pairs(rows, keys.indices()[0] + pitch, entry)
            for entry in self.crossings.entries
            for rows, pitch in zip(queries.indices(), pitches, strict=True)
        )

    @cached_property
    def imbalance(self) -> float:
        """Largest over mean `attention_flops` of the ranks; 1.0 is perfect balance."""
        flops = [self.attention_flops(rank) for rank in range(self.layout.world_size)]
        return max(flops) * len(flops) / sum(flops) if sum(flops) else 1.0

    def summary(self) -> str:
        """A few lines for a person: rows, bytes, FLOPs (min, mean, max over ranks), imbalance."""
        world, shapes, pattern = self.layout.world_size, self.shapes, self.pattern
        branches = ", ".join(f"{'all' if w is None else w}/{r}" for w, r in pattern.branches)
        lines = [
            f"{self.layout.seq_len} rows over {world} rank(s), {self.layout.kind}; branches w/r {branches}; "
            f"{'causal' if self.facts.causal else 'not causal'}",
            f"B {shapes.batch_size}  H {shapes.num_heads}  Hkv {shapes.num_kv_heads}  D {shapes.head_dim}  {shapes.dtype}; "
            f"strategy {self.strategy}",
        ]
        for pass_ in ("forward", "backward"):
            mib = [self.received_bytes(rank, pass_) / 2**20 for rank in range(world)]
            what = "K, V" if pass_ == "forward" else "dK, dV"
            lines.append(
                f"received {what} per rank: min {min(mib):.2f}  mean {sum(mib) / world:.2f}  max {max(mib):.2f} MiB"
            )
        gflops = [self.attention_flops(rank) / 1e9 for rank in range(world)]
        lines.append(
            f"attention FLOPs per rank, forward: min {min(gflops):.3f}  mean {sum(gflops) / world:.3f}  max {max(gflops):.3f} G; "
            f"imbalance {self.imbalance:.3f}"
        )
        return "\n".join(lines)


def check_strategy(strategy: str) -> str:
    """The strategy to run; ValueError names what this version does not have."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r} is not supported; use one of {', '.join(map(repr, STRATEGIES))}")
    return "exchange" if strategy == "auto" else strategy


def order_warnings(pattern: DilatedPattern, order: TokenOrder | None, causal: bool) -> list[str]:
    """What a person should know about causal text in this order (DESIGN: the local branch keeps its nearest tokens)."""
    if order is None or not causal or order.block is None:
        return []
    block = order.block
    return [
        f"order.block={block} does not divide segment length {w} of an undilated branch: its segments are then not the "
        "token sets of raster order, and a token loses some of its nearest predecessors"
        for w, r in pattern.branches
        if r == 1 and w is not None and w % block
    ]


def plan(
    pattern: DilatedPattern,
    seq_len: int,
    world_size: int,
    *,
    num_heads: int,
    num_kv_heads: int | None = None,
    head_dim: int,
    dtype: torch.dtype,
    causal: bool = True,
    batch_size: int = 1,
    layout: str = "contiguous",
    local_lengths: Sequence[int] | None = None,
    order: TokenOrder | None = None,
    document_ids: np.ndarray | torch.Tensor | None = None,
    strategy: str = "auto",
) -> Plan:
    """Plan dilated attention of `seq_len` rows over `world_size` ranks, without any of them.

    Args:
        pattern: the branches.
        seq_len: rows of the whole sequence, `S`.
        world_size: ranks, `P`.
        num_heads, num_kv_heads, head_dim, dtype, batch_size: of `q [B, S, H, D]` and `k, v [B, S, Hkv, D]`.
        causal: keys with a larger position are hidden; positions are token indices.
        layout: "contiguous".
        local_lengths: rows of each rank; default `seq_len // world_size`, the first ranks one more.
        order: the order that the rows are in.
        document_ids: `[S]` or `[B, S]` integers in natural token order, -1 for padding.
        strategy: "exchange" or "auto".

    Returns:
        A `Plan`: `received_bytes(rank, pass_)`, `attention_flops(rank)`, `imbalance`, `summary()`.

    Raises:
        ValueError: for sizes that do not fit each other.
    """
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"num_heads={num_heads} must be a multiple of num_kv_heads={num_kv_heads}")
    check_strategy(strategy)
    if local_lengths is None:
        rows = Layout.even(seq_len, world_size, layout)
    else:
        rows = Layout(tuple(local_lengths), layout)
        if len(rows.lengths) != world_size or rows.seq_len != seq_len or min(rows.lengths) < 0:
            raise ValueError(
                f"local_lengths={list(local_lengths)} must be {world_size} lengths >= 0 with sum {seq_len}, got sum {rows.seq_len}"
            )
    documents = None
    if document_ids is not None:
        documents = np.atleast_2d(np.asarray(document_ids, dtype=np.int64))
        if documents.shape not in ((1, seq_len), (batch_size, seq_len)):
            raise ValueError(
                f"document_ids must be [{seq_len}] or [{batch_size}, {seq_len}], got {list(np.shape(document_ids))}"
            )
        if order is not None:
            documents = documents[:, order.permutation(seq_len).numpy()]
    for message in order_warnings(pattern, order, causal):
        warnings.warn(message, UserWarning, stacklevel=2)
    facts = Facts(seq_len, causal, documents=documents, order=order)
    return Plan(pattern, rows, facts, Shapes(batch_size, num_heads, num_kv_heads, head_dim, dtype), strategy)
