# SPDX-License-Identifier: Apache-2.0
"""The plan: which rank visits which rows, which rows each sends to which rank, and the cost. Pure Python, no process group.

The operator executes the very object counted here: a plan's predictions match what is sent to the byte.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from ring_hilbert.ops.nesting import nested
from ring_hilbert.ops.pattern import Branch, DilatedPattern
from ring_hilbert.ops.shells import shell_visits, shells_pay
from ring_hilbert.ops.visible import Visible
from ring_hilbert.ops.visits import Chunk, Rows, Segments, Visit, branch_visits, crossing_visits, rows_in, segments_of
from ring_hilbert.parallel.arguments import check_choices
from ring_hilbert.parallel.crossings import crossings_of
from ring_hilbert.parallel.heads import head_shares
from ring_hilbert.parallel.layout import Layout
from ring_hilbert.parallel.travel import Candidates, HopCandidates, hop_candidates

PASSES = ("forward", "backward")


class Shapes(NamedTuple):
    """The shapes on which ranks must agree: `q [batch_size, S, num_heads, head_dim]`, `k, v [..., num_kv_heads, ...]`."""

    batch_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype


class Plan:
    """The plan of one pattern on one sequence; made by `rh.plan`, or by a `Prepared` for the current call.

    Attributes:
        pattern, layout, visible, shapes: what is planned.
        strategy: "exchange", all rows in one collective; "ring", the same rows in hops, from one rank at a time; "ulysses",
            heads for rows.
        deduplicate: visit every pair of local rows once (True; the pattern must be nested), once per branch (False), or
            whichever is faster (None). Of a pattern that counts pairs once every pair is visited once.
    """

    def __init__(
        self,
        pattern: DilatedPattern,
        layout: Layout,
        visible: Visible,
        shapes: Shapes,
        strategy: str = "exchange",
        deduplicate: bool | None = None,
    ) -> None:
        self.pattern, self.layout, self.visible, self.shapes = pattern, layout, visible, shapes
        self.strategy, self.deduplicate = strategy, deduplicate
        check_choices(strategy=strategy)
        if strategy == "auto":
            raise ValueError("a plan needs one strategy, got 'auto'; parallel/choice.py chooses one")
        if pattern.zero_keys and visible.has_documents:
            raise ValueError(
                "zero_keys=True counts the keys that fill up the segments of one whole sequence, but there are document_ids: "
                "call once per document and without padding, or use a pattern with zero_keys=False"
            )
        self.shares = (
            head_shares(shapes.num_heads, shapes.num_kv_heads, layout.world_size) if strategy == "ulysses" else ()
        )
        in_row_order = visible.causal and visible.rises_at(layout.cuts)
        self.crossings = crossings_of(pattern, layout, in_row_order, shapes.num_kv_heads, shapes.batch_size)
        # Otherwise only the candidates visible under the batch's documents and positions are sent.
        self.all_travel = not visible.has_documents and (not visible.causal or in_row_order)
        self._counts: dict[int, np.ndarray] = {}

    def under(self, strategy: str) -> Plan:
        """The same under another strategy; what both count is counted once."""
        other = Plan(self.pattern, self.layout, self.visible, self.shapes, strategy, self.deduplicate)
        other._counts = self._counts
        return other

    # ---- what a rank executes

    def local(self, rank: int) -> list[Visit]:
        """The visits among the rows of `rank` in an exchange or a ring, for the torch core."""
        chunks = self.layout.chunks(rank)
        local = [visit for chunk in chunks for visit in self._visits_within(chunk)]
        return local + crossing_visits(self.pattern, self.shapes.num_kv_heads, chunks, self.crossings.in_row_order)

    def hops(self, rank: int) -> tuple[HopCandidates, ...]:
        """What `rank` may receive and send, and the visits over it."""
        return hop_candidates(self.crossings, rank, ring=self.strategy == "ring")

    def of_heads(self, rank: int) -> Plan:
        """What `rank` computes under "ulysses": the whole sequence, for its share of the heads, as on one device."""
        share, shapes = self.shares[rank], self.shapes
        return Plan(
            self.pattern.for_heads(share.kv_heads.start, shapes.num_kv_heads), Layout((self.layout.seq_len,)), self.visible,
            shapes._replace(num_heads=len(share.heads), num_kv_heads=len(share.kv_heads)), "exchange", self.deduplicate,
        )  # fmt: skip

    def deduplicates(self, chunk: Chunk) -> bool:
        """Whether each pair of rows of `chunk` is visited once rather than once per branch."""
        if self.pattern.count == "once":
            return True
        if self.deduplicate is not None:
            return self.deduplicate
        if self.visible.has_documents or nested(self.pattern) is None:
            return False
        regular = self.visible.by_row_alone or self._in_equal_blocks(chunk)
        return regular and shells_pay(self.pattern, self.shapes.num_kv_heads, chunk, self.visible.causal)

    def _in_equal_blocks(self, chunk: Chunk) -> bool:
        """Whether the innermost segments of `chunk` ascend in position and all have the same order within."""
        if self.visible.batch_size > 1:
            return False
        innermost = min(self.pattern.branches, key=lambda branch: branch.segment_length or math.inf)
        latest = -math.inf
        for segments in segments_of(innermost, self.pattern.segment_shift, chunk.start, chunk.stop):
            rows = Rows(segments.start, 1, segments.stop - segments.start, segments.count, segments.pitch).indices()
            positions = self.visible.of(rows)[0]
            first, last = positions.min(1), positions.max(1)
            order = positions.argsort(axis=1, kind="stable")
            if first[0] <= latest or (first[1:] <= last[:-1]).any() or (order != order[:1]).any():
                return False
            latest = last[-1]
        return True

    def _visits_within(self, chunk: Chunk) -> list[Visit]:
        make = shell_visits if self.deduplicates(chunk) else branch_visits
        return make(self.pattern, self.shapes.num_kv_heads, chunk, self.visible.row_causal)

    # ---- costs

    def received_bytes(self, rank: int, pass_: str = "forward") -> int:
        """Payload bytes that `rank` receives from other ranks, nothing else.

        "forward": the K and V rows it reads, in their dtype; under "ulysses" the rows of q, K, V of its heads, and of out for
        its rows. "backward": the dK and dV rows returned for the rows it sent, in float32 (float64 for float64);
        under "ulysses" those of dout, dq, dK and dV, in the dtype of q unless kv heads are replicated. K and V that an
        exchange or ring fetches again in backward are not included: as much as in forward.
        """
        if pass_ not in PASSES:
            raise ValueError(f"pass_ must be 'forward' or 'backward', got {pass_!r}")
        if self.strategy == "ulysses" or "traffic" in self.__dict__:
            return self.traffic[pass_][rank]
        if not self.crossings.communicates:
            return 0
        if pass_ == "forward":
            return int(self.counts(rank).sum()) * self._row_bytes(pass_)
        if not self.all_travel:
            return self.traffic[pass_][rank]
        readers = self.crossings.readers(rank)
        return sum(self.crossings.count(reader, rank) for reader in readers) * self._row_bytes(pass_)

    def counts(self, reader: int) -> np.ndarray:
        """Payload rows sent to `reader` by every rank, int64 `[P]`."""
        if self.all_travel:
            return self.crossings.counts(reader)
        if reader in self._counts:
            return self._counts[reader]
        counts = self._counts[reader] = np.zeros(self.layout.world_size, np.int64)
        if self.crossings.communicates:
            candidates = Candidates(self.crossings, {reader: self.crossings.shipments(reader)})
            travel = candidates.travel(self.visible.on(torch.device("cpu")))
            for owner, flags in zip(candidates.owners[reader], travel.split(candidates.sizes), strict=True):
                counts[owner] = int(flags.sum())
        return counts

    @cached_property
    def traffic(self) -> dict[str, list[int]]:
        """`received_bytes` of all ranks, by pass: cheaper than one by one."""
        if self.strategy == "ulysses":
            return self._traffic_of_heads()
        world = self.layout.world_size
        forward, backward = np.zeros(world, np.int64), np.zeros(world, np.int64)
        for rank in range(world) if self.crossings.communicates else ():
            counts = self.counts(rank)
            forward[rank] = counts.sum()
            backward += counts
        return {p: (n * self._row_bytes(p)).tolist() for p, n in zip(PASSES, (forward, backward), strict=True)}

    def _row_bytes(self, pass_: str) -> int:
        """Of a payload row: K and V of one row of one kv head of one batch entry."""
        item = self.shapes.dtype.itemsize
        return 2 * self.shapes.head_dim * (item if pass_ == "forward" else max(4, item))

    def _traffic_of_heads(self) -> dict[str, list[int]]:
        batch, heads, kv_heads, dim, dtype = self.shapes
        item, copies = dtype.itemsize, sum(len(share.kv_heads) for share in self.shares)
        back = max(4, item) if copies > kv_heads else item
        traffic: dict[str, list[int]] = {pass_: [] for pass_ in PASSES}
        for own, share in zip(self.layout.lengths, self.shares, strict=True):
            here, kv_here, elsewhere = len(share.heads), len(share.kv_heads), self.layout.seq_len - own
            forward = item * (elsewhere * (here + 2 * kv_here) + own * (heads - here))
            backward = item * (elsewhere * here + own * (heads - here)) + back * own * 2 * (copies - kv_here)
            traffic["forward"].append(batch * dim * forward)
            traffic["backward"].append(batch * dim * backward)
        return traffic

    def refetched_bytes(self, rank: int) -> int:
        """Payload bytes of K and V that `rank` fetches again in backward, unless they were kept (`save_remote`)."""
        return 0 if self.strategy == "ulysses" else self.received_bytes(rank)

    def attention_flops(self, rank: int) -> int:
        """Forward FLOPs of the allowed pairs that `rank` computes, summed over branches: pairs x 4 D x query heads x batch.

        However often they count: a pattern that counts pairs once has the FLOPs of the same one that counts them per branch. Pairs
        are those of its rows; under "ulysses" of all rows, for its heads.
        """
        if self.strategy == "ulysses":
            return self.of_heads(rank).attention_flops(0)
        shapes, pairs = self.shapes, 0
        group = shapes.num_heads // shapes.num_kv_heads
        repeat = shapes.batch_size // self.visible.batch_size
        for branch in self.pattern.branches:
            for chunk in self.layout.chunks(rank):
                for segments in segments_of(branch, self.pattern.segment_shift, chunk.start, chunk.stop):
                    for offset, heads in self.pattern.residues(branch, shapes.num_kv_heads):
                        pairs += self._pairs(branch, segments, offset) * repeat * len(heads.indices) * group
        return pairs * 4 * shapes.head_dim

    def executed_flops(self, rank: int) -> int:
        """Forward FLOPs of the pairs that the visits of `rank` compute, before documents and positions prune whole tiles.

        Lower than `attention_flops` where pairs are deduplicated.
        """
        if self.strategy == "ulysses":
            return self.of_heads(rank).executed_flops(0)
        shapes = self.shapes
        pairs = shapes.batch_size * sum(visit.pairs for visit in self.local(rank))
        for candidates in self.hops(rank):
            travel = candidates.in_batch(self.visible, torch.device("cpu"), self.all_travel).received.flags
            for visit in candidates.hop.visits:
                keys = visit.keys.size if travel is None else int(travel.numpy()[visit.keys].sum())
                pairs += visit.queries.count * keys
        return pairs * 4 * shapes.head_dim * (shapes.num_heads // shapes.num_kv_heads)

    def memory_bytes(self, rank: int) -> int:
        """Peak bytes of one layer's attention on `rank`, in backward: tensors of its rows, and received data.

        q, k, v, out, dout, dq, dk, dv, lse and its rounding error; and received K and V with their gradients in float32 (in a
        ring: of two hops), or the same tensors again in the other layout ("ulysses").
        """
        return self.own_bytes(rank) + self.remote_bytes(rank)

    def own_bytes(self, rank: int) -> int:
        """The part of `memory_bytes` for tensors of the rank's own rows."""
        return self._tensor_bytes(self.layout.lengths[rank], self.shapes.num_heads, self.shapes.num_kv_heads)

    def remote_bytes(self, rank: int) -> int:
        """The part of `memory_bytes` received from other ranks."""
        if self.strategy == "ulysses":
            share = self.shares[rank]
            return self._tensor_bytes(self.layout.seq_len, len(share.heads), len(share.kv_heads))
        dtype = self.shapes.dtype
        return self.buffer_rows(rank) * 2 * self.shapes.head_dim * (dtype.itemsize + max(4, dtype.itemsize))

    def _tensor_bytes(self, rows: int, heads: int, kv_heads: int) -> int:
        batch, _, _, dim, dtype = self.shapes
        return batch * rows * (4 * (heads + kv_heads) * dim * dtype.itemsize + 2 * heads * max(4, dtype.itemsize))

    def buffer_rows(self, rank: int) -> int:
        """The most payload rows of other ranks that `rank` holds at once, in an exchange or a ring."""
        if not self.crossings.communicates:
            return 0
        counts = self.counts(rank)
        if self.strategy == "exchange":
            return int(counts.sum())
        in_turn = np.roll(counts, -rank)[:0:-1]  # of the rank before this one, the one before that, ...
        in_turn = in_turn[in_turn > 0]
        return int(max((in_turn[:-1] + in_turn[1:]).max(initial=0), in_turn.max(initial=0)))

    def _pairs(self, branch: Branch, segments: Segments, offset: int) -> int:
        """Allowed pairs of the rows in `segments` with all rows of their segments, for one head, summed over the batch."""
        w, rate = branch
        queries = rows_in(segments, rate, offset)
        if queries is None:
            return 0
        seq_len, origin = self.layout.seq_len, segments.origin
        start, stop = (0, seq_len) if w is None else (max(origin, 0), min(origin + w, seq_len))
        keys = rows_in(Segments(origin, start, stop, 1, 0), rate, offset)
        assert keys is not None, "a segment holds the keys of its queries"
        if self._countable:
            if not self.visible.causal:
                return queries.segments * queries.count * keys.count
            before = (queries.start - keys.start) // rate  # keys ahead of the first query
            return queries.segments * (queries.count * (before + 1) + queries.count * (queries.count - 1) // 2)
        pitches = segments.pitch * np.arange(segments.count)
        return sum(
            self.visible.pairs(rows, keys.indices()[0] + pitch, entry)
            for entry in range(self.visible.batch_size)
            for rows, pitch in zip(queries.indices(), pitches, strict=True)
        )

    @cached_property
    def _countable(self) -> bool:
        """Whether allowed pairs have a closed form: no documents, and the rows of a chunk see each other as a triangle."""
        return self.visible.default and (not self.visible.causal or self.crossings.in_row_order)

    @cached_property
    def imbalance(self) -> float:
        """Largest over mean `attention_flops` of the ranks; 1.0 is perfect balance."""
        return max(self.all_flops) * len(self.all_flops) / sum(self.all_flops) if sum(self.all_flops) else 1.0

    @cached_property
    def all_flops(self) -> list[int]:
        """`attention_flops` of every rank."""
        return [self.attention_flops(rank) for rank in range(self.layout.world_size)]

    def summary(self) -> str:
        """A short readable report: rows, bytes, FLOPs (min, mean, max over ranks), imbalance."""
        world, shapes = self.layout.world_size, self.shapes
        lines = [
            f"{self.layout.seq_len} rows over {world} rank(s), {self.layout.kind}; branches w/r {self.pattern.description}; "
            f"{'causal' if self.visible.causal else 'not causal'}",
            f"B {shapes.batch_size}  H {shapes.num_heads}  Hkv {shapes.num_kv_heads}  D {shapes.head_dim}  {shapes.dtype}; "
            f"strategy {self.strategy}",
        ]
        for pass_ in ("forward", "backward"):
            mib = [received / 2**20 for received in self.traffic[pass_]]
            what = "K, V" if pass_ == "forward" else "dK, dV"
            if self.strategy == "ulysses":
                what = "q, K, V, out" if pass_ == "forward" else "dout, dq, dK, dV"
            lines.append(
                f"received {what} per rank: min {min(mib):.2f}  mean {sum(mib) / world:.2f}  max {max(mib):.2f} MiB"
            )
        gflops = [flops / 1e9 for flops in self.all_flops]
        lines.append(
            f"attention FLOPs per rank, forward: min {min(gflops):.3f}  mean {sum(gflops) / world:.3f}  max {max(gflops):.3f} G; "
            f"imbalance {self.imbalance:.3f}"
        )
        return "\n".join(lines)
