# SPDX-License-Identifier: Apache-2.0
"""The plan's bytes and FLOPs against the literature's figures and against counting."""

from __future__ import annotations

import argparse
import time
import tracemalloc
import warnings
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ring_hilbert as rh
from ring_hilbert.bench import scale, wire
from ring_hilbert.ops.visible import Visible
from ring_hilbert.parallel.layout import Layout
from ring_hilbert.parallel.plan import Plan, Shapes
from ring_hilbert.parallel.remote import payload
from ring_hilbert.parallel.travel import Candidates
from tests.harness.cases import Case, cases
from tests.parallel.test_exchange import crossing_rows, splits

LONGNET = rh.DilatedPattern((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12))
MIB = 2**20


def million_tokens(causal: bool) -> Plan:
    """2^20 rows over 64 ranks, the shapes of a 4096-wide model in bf16."""
    return rh.plan(LONGNET, 2**20, 64, num_heads=32, head_dim=128, dtype=torch.bfloat16, causal=causal)


def test_bytes_of_the_published_pattern():
    plan = million_tokens(causal=False)
    assert round(plan.received_bytes(32) / MIB, 1) == 21.3
    assert round(plan.received_bytes(32, "backward") / MIB, 1) == 42.7


@pytest.mark.slow
def test_bytes_of_the_ladder_of_ring_and_of_ulysses():
    """Two to the twentieth rows, 64 ranks, H D = 4096 in bf16, not causal (a doubling ladder of 10 branches; dense)."""
    received = {(r["pattern"], r["strategy"]): r for r in wire.rows() if not r["causal"] and r["pass"] == "forward"}
    ladder, dense = "doubling ladder to the whole sequence, r 1..512", "dense"
    assert received[ladder, "exchange"]["max_mib"] == "96.00"
    assert received[ladder, "exchange"]["undeduplicated_mib"] == "160.50"
    assert received[dense, "ring"]["max_mib"] == "16128.00"
    assert received[dense, "ulysses"]["max_mib"] == "504.00"


def costs(worlds: list[int], causal: bool) -> Iterator[list[dict[str, float]]]:
    """The work of the busiest rank, by `bench scale`, at 1024 rows each: a list for each ladder."""
    found = list(scale.rows(argparse.Namespace(ranks=worlds, local_length=1024, causal=causal)))
    for name in scale.LADDERS:
        yield [{key: float(r[key]) for key in r if key.endswith("_max")} for r in found if r["ladder"] == name]


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
def test_cost_at_equal_rows_per_rank(causal: bool):
    fixed, steep, doubling = costs([4, 16, 64, 256], causal)
    assert all(cost == fixed[0] for cost in fixed)  # from as many ranks on as the longest segment spans
    for key in steep[0]:
        assert steep[-1][key] <= 1.1 * steep[1][key], key
    grown = [cost["forward_mib_max"] for cost in doubling]
    assert grown[2] - grown[1] == pytest.approx(grown[1] - grown[0], rel=0.01)


@pytest.mark.slow
def test_a_rank_of_thousands_is_planned_in_seconds():
    """4096 ranks, a billion rows, 12 branches; memory is that of the rows that one rank reads, whatever the length."""
    pattern = rh.DilatedPattern(tuple(2 ** (19 + i) for i in range(12)), tuple(4**i for i in range(12)))

    def planned_bytes(world: int) -> int:
        plan = rh.plan(
            pattern, 2**18 * world, world, num_heads=8, head_dim=128, dtype=torch.bfloat16, strategy="exchange",
            order=rh.TokenOrder("hilbert", block=2**16),
        )  # fmt: skip
        rows = sum(plan.hops(world // 2)[0].sizes[0])
        assert plan.received_bytes(world // 2) == rows * 2 * 128 * 2
        return plan.received_bytes(world // 2, "backward") + plan.attention_flops(world // 2)

    began = time.monotonic()
    assert planned_bytes(4096) > 0
    assert time.monotonic() - began < 10
    most = {}
    for world in (64, 4096):
        tracemalloc.start()
        planned_bytes(world)
        most[world] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert most[4096] < 1.2 * most[64]


@pytest.mark.slow
@given(cases(), st.integers(1, 6), st.sampled_from(["contiguous", "zigzag"]))
@settings(max_examples=150, deadline=None)
def test_rows_that_are_counted_are_those_that_are_listed(case: Case, world: int, kind: str):
    """Closed forms, the lists of both ends, what is seen, and the definition by positions that are given as numbers."""
    if kind == "zigzag":
        case = replace(case, seq_len=-(-case.seq_len // (2 * world)) * 2 * world)
    layout = Layout.even(case.seq_len, world, kind)
    arrays = planned(case, layout)
    plan = arrays
    if case.positions == "default":
        documents = arrays_of(case)["document_ids"]
        visible = Visible(case.seq_len, case.causal, order=case.order, documents=documents)
        plan = Plan(case.pattern, layout, visible, arrays.shapes)
        if case.order is not None and case.causal:
            tokens = case.order.permutation(case.seq_len)[None]
            visible = Visible(case.seq_len, True, positions=tokens, documents=documents)
            arrays = Plan(case.pattern, layout, visible, arrays.shapes)
    cpu = torch.device("cpu")
    for reader in range(world):
        counts, shipments = plan.crossings.counts(reader), plan.crossings.shipments(reader)
        for owner in range(world):
            listed = shipments.get(owner, [])
            size = case.batch * sum(len(block.rows) for block in listed)
            assert counts[owner] == plan.crossings.count(reader, owner) == size
            other = plan.crossings.shipment(reader, owner)
            assert [(b.head, b.rows.tolist()) for b in other] == [(b.head, b.rows.tolist()) for b in listed]
        travelling = [set(), set()]
        for found, of in zip(travelling, (plan, arrays), strict=True):
            candidates = Candidates(of.crossings, {reader: of.crossings.shipments(reader)})
            flags = candidates.travel(of.visible.on(cpu)) if candidates.blocks else torch.zeros(0, dtype=torch.bool)
            assert not of.all_travel or flags.all()
            found |= {
                x
                for x, flag in zip(zip(*payload(candidates.blocks, case.batch), strict=True), flags, strict=True)
                if flag
            }
            assert of.counts(reader).sum() == len(found)
        assert travelling[0] == travelling[1]


def test_causality_halves_the_bytes():
    full, causal = million_tokens(causal=False), million_tokens(causal=True)
    mib = np.array([causal.received_bytes(rank) / MIB for rank in range(64)])
    mean = np.mean([full.received_bytes(rank) / MIB for rank in range(64)])
    print(f"causal, received per rank: min {mib.min():.1f}, mean {mib.mean():.1f}, max {mib.max():.1f} MiB")
    assert mib.min() == 0 and mib.max() <= 21.4
    assert 0.45 <= mib.mean() / mean <= 0.55
    returned = sum(causal.received_bytes(rank, "backward") for rank in range(64))
    assert returned == 2 * sum(causal.received_bytes(rank) for rank in range(64))


def arrays_of(case: Case) -> dict[str, torch.Tensor | None]:
    return {name: None if x is None else torch.atleast_2d(x) for name, x in case.facts().items()}


def planned(case: Case, layout: Layout, strategy: str = "exchange") -> Plan:
    facts = arrays_of(case)
    return Plan(
        case.pattern,
        layout,
        Visible(case.seq_len, case.causal, positions=facts["positions"], documents=facts["document_ids"]),
        Shapes(case.batch, case.heads, case.kv_heads, case.head_dim, torch.float32),
        strategy,
    )


@given(cases(orders=False), st.integers(1, 6), st.sampled_from(["even", "uneven", "one empty"]))
@settings(max_examples=100, deadline=None)
def test_bytes_and_flops_are_those_of_the_definition(case: Case, world: int, kind: str):
    lengths = splits(case.seq_len, world, kind if world > 1 else "even", case.seed)
    plan = planned(case, Layout(lengths))
    facts = case.facts()
    positions = facts["positions"] if facts["positions"] is not None else torch.arange(case.seq_len)
    seen = rh.reference.allowed(case.causal, positions, facts["document_ids"])
    pairs = rh.reference.multiplicity(case.pattern, case.seq_len, case.kv_heads)
    pairs = (pairs * seen[:, None]).expand(case.batch, -1, -1, -1).sum((0, 1, 3)) * (case.heads // case.kv_heads)
    start = 0
    for rank, length in enumerate(lengths):
        assert plan.received_bytes(rank) == crossing_rows(case, Layout(lengths), rank) * 2 * case.head_dim * 4
        assert plan.attention_flops(rank) == int(pairs[start : start + length].sum()) * 4 * case.head_dim
        start += length


def test_imbalance_and_summary():
    plan = rh.plan(rh.DilatedPattern((None,), (1,)), 64, 4, num_heads=2, head_dim=8, dtype=torch.float32)
    assert plan.imbalance == pytest.approx(sum(range(49, 65)) * 4 / sum(range(65)))
    assert "64 rows over 4 rank(s)" in plan.summary() and "imbalance 1.738" in plan.summary()


def test_order_and_documents_of_the_plan_are_in_natural_order():
    order, documents = rh.TokenOrder("hilbert", block=16), torch.arange(64) // 10
    options = {"num_heads": 2, "head_dim": 8, "dtype": torch.float32}
    plan = rh.plan(rh.DilatedPattern((32,), (2,)), 64, 2, order=order, document_ids=documents, **options)
    permutation = order.permutation(64)
    case_like = Visible(64, True, positions=permutation[None], documents=documents[permutation][None])
    explicit = Plan(plan.pattern, plan.layout, case_like, plan.shapes)
    for rank in range(2):
        assert plan.received_bytes(rank) == explicit.received_bytes(rank)
        assert plan.attention_flops(rank) == explicit.attention_flops(rank)


@pytest.mark.parametrize(
    ("branches", "shift", "message"),
    [
        (((24,), (1,)), 0, r"divide segment length 24 of .* nearest: segment length 16 or 32, or order.block=12"),
        (((8, 64), (1, 4)), 0, r"divide segment length 8 of .* nearest: segment length 16, or order.block=8"),
        (((32,), (1,)), 24, r"divide segment_shift 24: .* nearest: segment_shift 16 or 32, or order.block=8"),
        (((32, 64), (1, 4)), 8, r"divide segment_shift 8: .* nearest: segment_shift 0 or 16, or order.block=8"),
        (((32,), (1,)), -8, r"divide segment_shift -8: .* nearest: segment_shift -16 or 0, or order.block=8"),
    ],
)
def test_a_block_that_breaks_the_local_branch_is_warned_of(branches: tuple, shift: int, message: str):
    options = {"num_heads": 2, "head_dim": 8, "dtype": torch.float32}
    pattern = rh.DilatedPattern(*branches, segment_shift=shift)
    with pytest.warns(UserWarning, match=message):
        rh.plan(pattern, 96, 2, order=rh.TokenOrder("hilbert", block=16), **options)


@pytest.mark.parametrize(
    ("pattern", "order"),
    [
        (rh.DilatedPattern((32, 64), (1, 4), segment_shift=16), rh.TokenOrder("hilbert", block=16)),
        (rh.DilatedPattern((24,), (1,), segment_shift=8), rh.TokenOrder("raster", block=16)),  # in natural order
        (rh.DilatedPattern((24,), (1,), segment_shift=8), rh.TokenOrder("hilbert", grid=(8, 12))),  # one patch
        (rh.DilatedPattern((24,), (2,), segment_shift=8), rh.TokenOrder("hilbert", block=16)),  # no local branch
        (rh.DilatedPattern((100, None), (1, 1), segment_shift=4), rh.TokenOrder("hilbert", block=16)),  # one segment
    ],
)
def test_a_block_that_breaks_nothing_is_not_warned_of(pattern: rh.DilatedPattern, order: rh.TokenOrder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rh.plan(pattern, 96, 2, order=order, num_heads=2, head_dim=8, dtype=torch.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, "multiple of num_kv_heads=3; the nearest that fits is 2"),
        ({"local_lengths": [30, 30]}, "2 lengths >= 0 with sum 64"),
        ({"document_ids": torch.zeros(63, dtype=torch.int64)}, r"document_ids must be \[64\] or \[1, 64\]"),
        ({"document_ids": torch.zeros(64)}, "must be a tensor of integers"),
        ({"document_ids": torch.full((64,), -2)}, "-1 for padding"),
        ({"order": "hilbert"}, "order must be a TokenOrder or None, got str"),
        ({"strategy": "carrier pigeon"}, "is not supported"),
    ],
)
def test_impossible_plans_are_named(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        rh.plan(LONGNET, 64, 2, **({"num_heads": 4, "head_dim": 8, "dtype": torch.float32} | changes))
