# SPDX-License-Identifier: Apache-2.0
"""How often pairs count, `weights` and `count`: the definition, what every rank visits pair by pair, and the operator."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ring_hilbert as rh
from ring_hilbert.kernels.tables import VISIT_TIMES
from ring_hilbert.kernels.tiles import Tile
from ring_hilbert.ops.core import Shard
from ring_hilbert.ops.nesting import chains
from ring_hilbert.ops.pattern import LayerPattern, LayerRule, OwnPattern
from ring_hilbert.ops.shells import shell_visits
from ring_hilbert.ops.visits import Chunk, branch_visits
from ring_hilbert.parallel.call import Call
from ring_hilbert.parallel.execution import remote_walks
from ring_hilbert.parallel.layout import Layout
from tests.harness.cases import Case, assert_close, counting_cases, counting_patterns
from tests.ops.test_shells import counted
from tests.ops.test_walk import blocks
from tests.ops.test_walk import check as check_walk
from tests.parallel.test_crossings import member
from tests.parallel.test_exchange import ANY_WAY, KINDS, Way, check_any, check_problems, splits
from tests.parallel.test_plan import planned

LADDER = rh.DilatedPattern((8, 32, 64), (1, 2, 4), segment_shift=3, head_shift=1)
ONCE, WEIGHED = replace(LADDER, count="once"), replace(LADDER, weights=(1, 3, 10))
BOTH = replace(ONCE, weights=(1, 2, 4))
RAGGED = rh.DilatedPattern((7, 19, 50, None), (2, 3, 5, 4), "modulo", 1, segment_shift=3, weights=(5, 1, 2, 7))


def plain(pattern: rh.DilatedPattern) -> rh.DilatedPattern:
    """The same that counts per branch, without weights."""
    return replace(pattern, weights=None, count="per_branch")


# ---- the definition


@given(counting_patterns(12), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_the_definition(pattern: rh.DilatedPattern, heads: int):
    """Pair by pair: the branches that hold it, their weights summed, or that of the one with the shortest segment, then rate."""
    found = rh.reference.multiplicity(pattern, 14, heads)
    weights = pattern.weights or (1,) * len(pattern.branches)
    for head, a, b in itertools.product(range(heads), range(14), range(14)):
        held = []
        for branch, weight in zip(pattern.branches, weights, strict=True):
            segments = {member(pattern, branch, head, heads, row) for row in (a, b)}
            if len(segments) == 1 and None not in segments:
                held.append((branch.segment_length or 1e9, branch.dilation_rate, weight))
        expected = min(held)[2] if held and pattern.count == "once" else sum(weight for *_, weight in held)
        assert found[head, a, b] == expected


def test_what_counting_means():
    """Counted once alone is `m > 0`; weights that are equal change lse alone; a weight is as many duplicates of a branch."""
    assert torch.equal(rh.reference.multiplicity(ONCE, 90, 3), (rh.reference.multiplicity(LADDER, 90, 3) > 0).long())
    equal = Case(replace(LADDER, weights=(3, 3, 3)), 90).actual()
    expected = Case(LADDER, 90).actual()
    assert_close(equal | {"lse": equal["lse"] - np.log(3)}, expected)
    twice = rh.DilatedPattern((8, 32, 32), (1, 2, 2))
    weighed = rh.DilatedPattern((8, 32), (1, 2), weights=(1, 2))
    assert_close(Case(weighed, 90).actual(), Case(twice, 90).expected())
    differences = [(Case(p, 90).actual()["out"] - expected["out"]).abs().max() for p in (ONCE, WEIGHED, BOTH)]
    assert min(differences) > 0.01


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": "twice"}, "count must be 'per_branch' or 'once', got 'twice'"),
        ({"weights": (1, 2)}, "weights has 2 entries and segment_lengths 3; give one weight per branch"),
        ({"weights": (1, 0.5, 2)}, r"weights\[1\] must be a positive integer, got 0.5; .* multiply all weights by one factor"),
        ({"weights": (1, 2, 0)}, r"weights\[2\] must be a positive integer, got 0"),
        ({"weights": (1, 2, 2**15)}, "must sum to at most 32768, got 32771; divide all by one factor"),
        ({"weights": (1, 2, 3), "zero_keys": True, "segment_shift": 0}, r"weights=\(1, 2, 3\) with zero_keys=True"),
        ({"count": "once", "zero_keys": True, "segment_shift": 0}, "count='once' with zero_keys=True: .* use zero_keys=False"),
        ({"count": "once", "dilation_rates": (1, 2, 3)}, r"\(32, 2\) and \(64, 3\) are not nested .* use count='per_branch'"),
        ({"count": "once", "segment_lengths": (8, 20, 64)}, r"\(8, 1\) and \(20, 2\) are not nested"),
        ({"count": "once", "offset_rule": "block", "head_shift": 0}, "are not nested with 'block'"),
        ({"count": "once", "segment_lengths": (8, 8, 64), "dilation_rates": (2, 2, 4)}, r"branch \(8, 2\) given twice"),
        ({"weights": (1, 2, 3), "segment_lengths": (8, 8, 64), "dilation_rates": (2, 2, 4)}, "with the sum as its weight"),
    ],
)  # fmt: skip
def test_what_cannot_be_counted_is_named(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        replace(LADDER, **changes)


# ---- visits, walks and plans: every pair as often as defined, before attention is computed


@given(counting_patterns(24), st.data(), st.booleans())
@settings(max_examples=100, deadline=None)
def test_the_torch_core_visits_pairs_as_often_as_they_count(
    pattern: rh.DilatedPattern, data: st.DataObject, causal: bool
):
    length, heads = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 5))
    chunk = Chunk(0, length, 0)
    expected = rh.reference.multiplicity(pattern, length, heads).numpy()
    plan = planned(Case(pattern, length, 1, heads, heads, causal=causal), Layout((length,)))
    found = [plan.local(0)]
    if pattern.count == "once":
        assert not any(visit.repeats for visit in found[0]), "a weight is a matrix of biases"
    else:
        try:
            found.append(shell_visits(pattern, heads, chunk, causal))
        except ValueError:
            assert plan.pattern.count == "per_branch"
    for visits in found:
        np.testing.assert_array_equal(counted(visits, length, heads), np.tril(expected) if causal else expected)


def test_residues_of_unlike_weights_are_not_merged():
    """Both branches hold the same rows, of which those of the next head lie one further."""
    pattern = rh.DilatedPattern((100, 200), (2, 2), weights=(3, 5))
    visits = branch_visits(pattern, 2, Chunk(0, 20, 0), False)
    np.testing.assert_array_equal(counted(visits, 20, 2), rh.reference.multiplicity(pattern, 20, 2))


def test_how_often_a_pair_of_a_shell_counts():
    for pattern, expected in ((LADDER, 3), (ONCE, 1), (WEIGHED, 14), (BOTH, 1)):
        (chain,) = chains(pattern, 2)
        assert chain.multiplicity(0, 2) == expected


@given(counting_cases(max_length=24), blocks)
@settings(max_examples=8, deadline=None)
def test_the_triton_core_visits_pairs_as_often_as_they_count(case: Case, sizes: tuple[int, int]):
    check_walk(replace(case, batch=1, heads=min(case.kv_heads, 2), kv_heads=min(case.kv_heads, 2)), sizes)


@pytest.mark.full
@pytest.mark.timeout(1200)  # the interpreter takes seconds for an example
@given(counting_cases(max_length=120), blocks)
@settings(max_examples=300, deadline=None)
def test_the_triton_core_visits_pairs_as_often_as_they_count_at_length(case: Case, sizes: tuple[int, int]):
    check_walk(case, sizes)


@given(counting_cases(orders=False), st.integers(1, 4), KINDS, st.sampled_from(["contiguous", "zigzag"]), st.booleans())
@settings(max_examples=100, deadline=None)
def test_ranks_visit_pairs_as_often_as_they_count(case: Case, world: int, kind: str, layout: str, ring: bool):
    """Local visits and those over what other ranks send, together; and nothing more or less is sent than otherwise."""
    case = replace(case, positions="default", documents="none", batch=1)
    if layout == "zigzag":
        case = replace(case, seq_len=-(-case.seq_len // (2 * world)) * 2 * world)
    even = layout == "zigzag" or world == 1
    rows = Layout(splits(case.seq_len, world, "even" if even else kind, case.seed), layout)
    plan, other = (
        planned(c, rows, "ring" if ring else "exchange") for c in (case, replace(case, pattern=plain(case.pattern)))
    )
    expected = rh.reference.multiplicity(case.pattern, case.seq_len, case.kv_heads).numpy()
    expected = np.tril(expected) if case.causal else expected
    for rank in range(world):
        own = rows.rows(rank)
        found = np.zeros((case.kv_heads, len(own), case.seq_len), np.int64)
        found[:, :, own] = counted(plan.local(rank), len(own), case.kv_heads)
        for visit in (visit for hop in plan.hops(rank) for visit in hop.hop.visits):
            for head in visit.heads.indices:
                found[head][np.ix_(visit.queries.indices()[0], visit.rows)] += visit.weight
        mask = np.tril(np.ones((case.seq_len,) * 2, np.int64))[own] if case.causal else 1
        np.testing.assert_array_equal(found * mask, expected[:, own])
        for pass_ in ("forward", "backward"):
            assert plan.received_bytes(rank, pass_) == other.received_bytes(rank, pass_)
        assert plan.attention_flops(rank) == other.attention_flops(rank)


@pytest.mark.parametrize("transposed", [False, True])
def test_walks_over_received_rows_hold_the_weights(transposed: bool):
    """What is visited over lists is the business of test_walk.py."""
    plan = planned(Case(WEIGHED, 64), Layout((32, 32)))
    shard = Shard(plan.layout.chunks(1), 64)
    walks = remote_walks(plan.crossings, 1, False, shard, torch.device("cpu"))
    assert walks is not None
    found = walks.walk(0, Tile(16, 16, 1, 1), transposed).visits[:, VISIT_TIMES]
    assert set(found.tolist()) == {visit.weight for visit in plan.hops(1)[0].hop.visits} == {1, 3, 10}


def test_counting_once_computes_fewer_pairs():
    """The share that deduplication leaves of a doubling ladder; weights alone change nothing."""
    ladder = rh.DilatedPattern((64, 128, 256), (1, 2, 4))
    shares = {}
    for pattern in (ladder, replace(ladder, weights=(1, 2, 4)), replace(ladder, count="once")):
        plan = planned(Case(pattern, 256, causal=False), Layout((256,)))
        shares[pattern] = plan.executed_flops(0) / plan.attention_flops(0)
    assert list(shares.values()) == [1, 1, pytest.approx(0.7857, abs=1e-3)]


# ---- the operator, over ranks; one device is the business of test_operator.py


def test_the_reference_passes_gradcheck():
    x = Case(BOTH, 13, 1, 2, 1, 2).tensors()
    inputs = tuple(x[name].requires_grad_() for name in "qkv")
    assert torch.autograd.gradcheck(lambda *x: rh.reference.dilated_attention(*x, BOTH), inputs)


def problems() -> list[Case]:
    base = Case(ONCE, 71, 2, 4, 2, 4)
    return [
        base,
        replace(base, pattern=BOTH, causal=False, heads=3, kv_heads=3),
        replace(base, pattern=WEIGHED, documents="per-batch"),
        replace(base, pattern=RAGGED, documents="padding", positions="ties"),
        replace(base, documents="shared", positions="per-batch"),
        replace(base, pattern=replace(ONCE, segment_lengths=(8, 32, None)), positions="shuffled", causal=False),
        replace(base, seq_len=64, order=rh.TokenOrder("hilbert", block=16)),
        replace(base, pattern=WEIGHED, seq_len=64, order=rh.TokenOrder("morton", block=8), documents="shared"),
    ]


def problems_over(world: int, every: int) -> list[tuple[Case, tuple[int, ...], Way]]:
    ways = [Way(), Way("ring"), Way("ulysses"), Way("exchange", "zigzag", True), Way("ring", "zigzag")]
    found = []
    for i, (case, way) in enumerate(itertools.product(problems(), ways)):
        if way.layout == "zigzag" or case.order is not None:
            case = replace(case, seq_len=32 * world)
        if way.strategy == "ulysses":
            case = replace(case, heads=case.kv_heads * world)
        even = way.layout == "zigzag" or case.order is not None or world == 1
        lengths = splits(case.seq_len, world, "even" if even else "uneven", i)
        if (i + world) % every == 0:
            found.append((case, lengths, way))
    return found


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_equal_the_reference(world: int):
    check_problems(world, problems_over(world, 8))


@pytest.mark.full
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_ranks_equal_the_reference_in_every_way(world: int):
    check_problems(world, problems_over(world, 1))


@pytest.mark.full
@given(counting_cases(max_length=120, orders=False), st.integers(1, 8), KINDS, ANY_WAY)
@settings(max_examples=500, deadline=None)
def test_any_case_on_any_ranks(case: Case, world: int, kind: str, way: Way):
    check_any(case, world, kind, way)


def test_reports_say_how_pairs_count():
    assert LADDER.description == "8/1, 32/2, 64/4"
    assert BOTH.description == "8/1 weight 1, 32/2 weight 2, 64/4 weight 4; pairs counted once"
    plan = planned(Case(replace(ONCE, segment_lengths=(8, 32, None)), 64), Layout((64,)))
    assert "branches w/r 8/1, 32/2, all/4; pairs counted once; causal" in plan.summary()


def test_calls_and_layers_keep_how_pairs_count():
    options = {"causal": True, "order": None, "scale": 1.0, "name": None}
    for pattern in (LADDER, ONCE, WEIGHED, BOTH):
        assert Call.of(pattern, **options).pattern == pattern
        rule = LayerRule(pattern, 2, (OwnPattern(1, False, 0, 5, 2), OwnPattern(2, True, 0, 0)))
        call = Call.of(LayerPattern(rule, torch.tensor(0)), **options)
        for layer in range(4):
            assert call.at(torch.tensor(layer)).pattern == rule.of(layer)
        fewer = rule.of(1)
        assert (fewer.weights, fewer.count) == (pattern.weights and pattern.weights[:2], pattern.count)
