# SPDX-License-Identifier: Apache-2.0
"""The plan's bytes and FLOPs against the literature's figures and against counting."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ring_hilbert as rh
from ring_hilbert.parallel.facts import Facts
from ring_hilbert.parallel.layout import Layout
from ring_hilbert.parallel.plan import Plan, Shapes
from tests.cases import Case, cases
from tests.test_exchange import crossing_rows, splits

LONGNET = rh.DilatedPattern((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12))
MIB = 2**20


def million_tokens(causal: bool) -> Plan:
    """2^20 rows over 64 ranks, the shapes of a 4096-wide model in bf16."""
    return rh.plan(LONGNET, 2**20, 64, num_heads=32, head_dim=128, dtype=torch.bfloat16, causal=causal)


def test_bytes_of_the_published_pattern():
    plan = million_tokens(causal=False)
    assert round(plan.received_bytes(32) / MIB, 1) == 21.3
    assert round(plan.received_bytes(32, "backward") / MIB, 1) == 42.7


def test_causality_halves_the_bytes():
    full, causal = million_tokens(causal=False), million_tokens(causal=True)
    mib = np.array([causal.received_bytes(rank) / MIB for rank in range(64)])
    mean = np.mean([full.received_bytes(rank) / MIB for rank in range(64)])
    print(f"causal, received per rank: min {mib.min():.1f}, mean {mib.mean():.1f}, max {mib.max():.1f} MiB")
    assert mib.min() == 0 and mib.max() <= 21.4
    assert 0.45 <= mib.mean() / mean <= 0.55
    returned = sum(causal.received_bytes(rank, "backward") for rank in range(64))
    assert returned == 2 * sum(causal.received_bytes(rank) for rank in range(64))


def planned(case: Case, lengths: tuple[int, ...]) -> Plan:
    facts = {name: None if x is None else np.atleast_2d(x.numpy()) for name, x in case.facts().items()}
    return Plan(
        case.pattern,
        Layout(lengths),
        Facts(case.seq_len, case.causal, facts["positions"] if case.causal else None, facts["document_ids"]),
        Shapes(case.batch, case.heads, case.kv_heads, case.head_dim, torch.float32),
    )


@given(cases(orders=False), st.integers(1, 6), st.sampled_from(["even", "uneven", "one empty"]))
@settings(max_examples=100, deadline=None)
def test_bytes_and_flops_are_those_of_the_definition(case: Case, world: int, kind: str):
    lengths = splits(case.seq_len, world, kind if world > 1 else "even", case.seed)
    plan = planned(case, lengths)
    facts = case.facts()
    positions = facts["positions"] if facts["positions"] is not None else torch.arange(case.seq_len)
    seen = rh.reference.allowed(case.causal, positions, facts["document_ids"])
    pairs = rh.reference.multiplicity(case.pattern, case.seq_len, case.kv_heads)
    pairs = (pairs * seen[:, None]).expand(case.batch, -1, -1, -1).sum((0, 1, 3)) * (case.heads // case.kv_heads)
    start = 0
    for rank, length in enumerate(lengths):
        assert plan.received_bytes(rank) == crossing_rows(case, lengths, rank) * 2 * case.head_dim * 4
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
    case_like = Facts(64, True, permutation.numpy()[None], documents.numpy()[permutation.numpy()][None])
    explicit = Plan(plan.pattern, plan.layout, case_like, plan.shapes)
    for rank in range(2):
        assert plan.received_bytes(rank) == explicit.received_bytes(rank)
        assert plan.attention_flops(rank) == explicit.attention_flops(rank)


def test_a_block_that_breaks_the_local_branch_is_warned_of():
    options = {"num_heads": 2, "head_dim": 8, "dtype": torch.float32}
    with pytest.warns(UserWarning, match="does not divide segment length 24"):
        rh.plan(rh.DilatedPattern((24,), (1,)), 64, 2, order=rh.TokenOrder("hilbert", block=16), **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, "multiple of num_kv_heads=3"),
        ({"local_lengths": [30, 30]}, "2 lengths >= 0 with sum 64"),
        ({"document_ids": torch.zeros(63)}, r"document_ids must be \[64\]"),
        ({"strategy": "carrier pigeon"}, "is not supported"),
    ],
)
def test_impossible_plans_are_named(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        rh.plan(LONGNET, 64, 2, **({"num_heads": 4, "head_dim": 8, "dtype": torch.float32} | changes))
