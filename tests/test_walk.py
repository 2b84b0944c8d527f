# SPDX-License-Identifier: Apache-2.0
"""The walks that the kernels follow, against the definition pair by pair: no kernel runs here."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ring_hilbert as rh
from ring_hilbert.kernels.walk import Chain, Facts, Rule, Walk, chains, plan_lists, plan_rows
from ring_hilbert.kernels.workers import Worker
from tests.cases import Case, cases


def pairs_of(walk: Walk, entry: int, head: int, outer_rows: int, inner_rows: int, transposed: bool) -> np.ndarray:
    """How often the kernels count each pair of an outer and an inner row: int64 `[outer_rows, inner_rows]`.

    Rows in no tile have -1. Also checks that no row is in two, and that steps without a mask hide nothing.
    """
    found = np.zeros((outer_rows, inner_rows), np.int64)
    seen = np.zeros(outer_rows, np.int64)
    tables, tiles, rows, runs, index = (
        x.numpy().astype(np.int64) for x in (walk.tables, walk.tiles, walk.rows, walk.runs, walk.index)
    )
    positions = []
    documents = []
    for side in (walk.facts[:2], walk.facts[2:]):
        of_entry = [x[min(entry, len(x) - 1)].numpy().astype(np.int64) for x in side]
        positions.append(of_entry[0] if walk.causal == 2 else np.arange(max(outer_rows, inner_rows)))
        documents.append(of_entry[1])
    for place, run, full, masked in tiles[tables[min(entry, len(tables) - 1), head]]:
        if place == 0:
            continue
        outer = rows[place][rows[place] >= 0]
        seen[outer] += 1
        done, left = 0, 0
        for step in range(full + masked):
            if left <= 0:
                (first, code, left, _, length, ahead, hole, hole_ahead), done = runs[run], 0
                rate, times = code >> 8, code & 255
                run += 1
            at = first + rate * (done + np.arange(walk.block_inner))[: min(left, walk.block_inner)]
            inner = index[at] if walk.indexed else at
            a, b = outer[:, None], inner[None, :]
            visible = np.ones((len(outer), len(inner)), bool)
            if walk.causal:
                visible &= (positions[0][a] <= positions[1][b]) if transposed else (positions[1][b] <= positions[0][a])
            if walk.documents:
                visible &= (documents[0][a] == documents[1][b]) & (documents[1][b] >= 0)
            if walk.segments:
                visible &= (a + ahead) // length == (b + ahead) // length
                if hole:
                    visible &= (a + hole_ahead) // hole != (b + hole_ahead) // hole
            if step < full:
                assert visible.all() and len(inner) == walk.block_inner, "a step without a mask hides pairs"
            else:
                assert visible.any() or walk.segments or walk.documents or walk.causal, "a step shows nothing"
            np.add.at(found, (a, b), visible * times)
            done, left = done + walk.block_inner, left - walk.block_inner
    assert (seen <= 1).all(), "a row is in several tiles"
    found[seen == 0] = -1
    return found


def walk_of(
    case: Case,
    blocks: tuple[int, int],
    transposed: bool,
    deduplicate: bool = True,
    cut: slice | np.ndarray = slice(None),
) -> Walk:
    facts = {name: None if x is None else x.numpy().reshape(-1, case.seq_len) for name, x in case.facts().items()}
    pattern, rows = case.pattern, np.arange(case.seq_len)
    if case.order is not None:
        permutation = case.order.permutation(case.seq_len).numpy()
        facts = {name: None if x is None else x[:, permutation] for name, x in facts.items()}
        facts["positions"] = permutation[None] if facts["positions"] is None else facts["positions"]
    facts = {name: None if x is None else x[:, cut] for name, x in facts.items()}
    offsets = [[pattern.offset(b, g, case.kv_heads) for g in range(case.kv_heads)] for b in pattern.branches]
    return plan_rows(
        chains(pattern.branches, offsets), pattern.segment_shift, rows[cut], Facts(facts["positions"], facts["document_ids"]),
        causal=case.causal, block_outer=blocks[0], block_inner=blocks[1], transposed=transposed, deduplicate=deduplicate,
    )  # fmt: skip


def defined(case: Case) -> np.ndarray:
    """`[B or 1, Hkv, S, S]` (query, key) by the definition; rows in the order of the pattern."""
    count = rh.reference.multiplicity(case.pattern, case.seq_len, case.kv_heads)
    facts = case.facts()
    positions = facts["positions"] if facts["positions"] is not None else torch.arange(case.seq_len)
    mask = rh.reference.allowed(case.causal, positions, facts["document_ids"])
    if case.order is not None:
        permutation = case.order.permutation(case.seq_len)
        mask = mask[:, permutation][:, :, permutation]
    return (count[None] * mask[:, None]).numpy()


def check(case: Case, blocks: tuple[int, int], deduplicate: bool = True, rows: np.ndarray | None = None) -> None:
    rows = np.arange(case.seq_len) if rows is None else rows
    exact = defined(case)[:, :, rows][..., rows]
    in_some_branch = rh.reference.multiplicity(case.pattern, case.seq_len, case.kv_heads).diagonal(0, 1, 2)[:, rows] > 0
    for transposed in (False, True):
        walk = walk_of(case, blocks, transposed, deduplicate, rows)
        for entry in range(len(exact)):
            for head in range(case.kv_heads):
                found = pairs_of(walk, entry, head, len(rows), len(rows), transposed)
                expected = np.where(
                    in_some_branch[head][:, None], exact[entry, head].T if transposed else exact[entry, head], -1
                )
                np.testing.assert_array_equal(found, expected)


blocks = st.tuples(st.sampled_from([2, 4, 8]), st.sampled_from([2, 4, 8]))


@given(cases(), blocks, st.booleans())
@settings(max_examples=150)
def test_every_pair_counts_as_often_as_defined(case: Case, blocks: tuple[int, int], deduplicate: bool):
    check(case, blocks, deduplicate)


@pytest.mark.full
@given(cases(max_length=200), blocks, st.booleans())
@settings(max_examples=2000)
def test_every_pair_counts_as_often_as_defined_at_length(case: Case, blocks: tuple[int, int], deduplicate: bool):
    check(case, blocks, deduplicate)


@st.composite
def nested_patterns(draw: st.DrawFn) -> rh.DilatedPattern:
    """Patterns of one chain, most of them with something to deduplicate."""
    w, r, lengths, rates = 1, 1, [], []
    for _ in range(draw(st.integers(1, 4))):
        r *= draw(st.integers(1, 3))
        w = r * draw(st.integers(1, 4)) * (w // r if w % r == 0 else w)
        lengths.append(w)
        rates.append(r)
    if draw(st.booleans()):
        lengths[-1] = None
    return rh.DilatedPattern(tuple(lengths), tuple(rates), "modulo", draw(st.integers(-2, 4)), draw(st.integers(-9, 9)))


@given(cases(max_length=90), nested_patterns(), blocks)
@settings(max_examples=100)
def test_nested_patterns(case: Case, pattern: rh.DilatedPattern, blocks: tuple[int, int]):
    check(replace(case, pattern=pattern), blocks)


@pytest.mark.parametrize("seed", range(120))
def test_rows_with_gaps(seed: int):
    """The rows of a rank need not follow each other: two runs of the sequence, and segments that end within them."""
    dice = random.Random(seed)
    lengths = sorted(dice.randint(1, 40) for _ in range(2))
    rates = (dice.choice([1, dice.randint(1, lengths[0])]), dice.randint(1, lengths[1]))
    pattern = rh.DilatedPattern(tuple(lengths), rates, segment_shift=dice.randint(0, 9))
    facts = {"documents": dice.choice(["none", "none", "shared", "padding"]), "causal": dice.random() < 0.7}
    edges = sorted(dice.randint(0, 90) for _ in range(4))
    rows = np.r_[edges[0] : edges[1], edges[2] : edges[3]]
    check(Case(pattern, 90, seed=seed, **facts), (dice.choice([2, 4, 8]), 4), dice.random() < 0.5, rows)


@given(st.integers(0, 2**16), st.booleans(), st.booleans(), blocks)
@settings(max_examples=50)
def test_explicit_lists(seed: int, causal: bool, documents: bool, blocks: tuple[int, int]):
    """Rows that lie anywhere: a row in two visits counts twice, and rows with other facts stay hidden."""
    rng = np.random.default_rng(seed)
    outer_rows, inner_rows = 30, 50
    outer, inner = (
        Facts(
            rng.integers(-2**40, 2**40, (1, n)) if causal else None, rng.integers(-1, 3, (1, n)) * 7 if documents else None
        )._replace()
        for n in (outer_rows, inner_rows)
    )  # fmt: skip
    outer, inner = (
        x._replace(documents=None if x.documents is None else np.maximum(x.documents, -1)) for x in (outer, inner)
    )
    visits = [
        [
            [
                (rng.permutation(outer_rows)[: rng.integers(1, 20)], rng.permutation(inner_rows)[: rng.integers(0, 40)])
                for _ in range(rng.integers(0, 4))
            ]
            for _ in range(2)
        ]
        for _ in range(2)
    ]
    for transposed in (False, True):
        walk = plan_lists(visits, outer, inner, Rule(*blocks, transposed, 2 * causal, True))
        for entry in range(2):
            for head in range(2):
                exact = np.zeros((outer_rows, inner_rows), np.int64)
                reached = np.zeros(outer_rows, bool)
                for a, b in visits[entry][head]:
                    exact[np.ix_(a, b)] += 1
                    reached[a] = True
                if causal:
                    p, q = outer.positions[0][:, None], inner.positions[0][None, :]
                    exact *= (p <= q) if transposed else (q <= p)
                if documents:
                    exact *= (outer.documents[0][:, None] == inner.documents[0][None, :]) & (inner.documents[0] != -1)
                exact[~reached] = -1
                np.testing.assert_array_equal(pairs_of(walk, entry, head, outer_rows, inner_rows, transposed), exact)


# ---- how much is visited


LADDER = rh.DilatedPattern(tuple(2048 << i for i in range(5)), tuple(1 << i for i in range(5)))


def executed(
    pattern: rh.DilatedPattern, rows: int, causal: bool, block: int, transposed: bool = False, order=None
) -> float:
    """Pairs in the blocks that are visited, relative to the pairs of the branches."""
    case = Case(pattern, rows, kv_heads=4, causal=causal, order=order)
    walk = walk_of(case, (block, 128), transposed)
    pairs = sum(rows // w * (n * (n + 1) // 2 if causal else n * n) for w, r in pattern.branches for n in [w // r])
    return walk.steps * block * 128 / (pairs * case.kv_heads)


@pytest.mark.parametrize(("causal", "block", "bound"), [(False, 128, 0.77), (True, 128, 0.93), (True, 64, 0.85)])
@pytest.mark.parametrize("transposed", [False, True])
def test_executed_tiles(causal: bool, block: int, bound: float, transposed: bool):
    """N = 32768, five branches: what deduplication saves and tiles of equal coverage waste."""
    assert executed(LADDER, 32768, causal, block, transposed) <= bound


@pytest.mark.parametrize("block", [256, 2048])
def test_curve_order_executes_hardly_more(block: int):
    """Causal by token, in Hilbert order within blocks: rows are taken by position, so that masks stay as narrow as in raster."""
    order = rh.TokenOrder("hilbert", block=block)
    assert executed(LADDER, 32768, True, 128, order=order) <= 1.02 * executed(LADDER, 32768, True, 128)


def test_documents_are_not_visited_by_others():
    """32 documents of 1024 rows under one dense branch: a 32nd of the pairs, and the blocks at their edges."""
    rows = np.arange(32768)
    facts = Facts(None, rows[None] // 1024)
    chain = Chain(((None, 1),), ((0,),))
    plain, packed = (
        plan_rows([chain], 0, rows, x, causal=False, block_outer=128, block_inner=128).steps for x in (Facts(), facts)
    )
    assert packed * 32 == plain


def test_nothing_is_taken_for_nested_that_is_not():
    assert len(chains([(64, 1), (128, 2), (None, 4)], [[0, 0], [0, 1], [0, 1]])) == 1
    assert len(chains([(64, 1), (128, 2)], [[0, 0], [0, 1]])) == 1
    assert len(chains([(64, 2), (128, 4)], [[0, 1], [1, 1]])) == 2  # offsets disagree
    assert len(chains([(64, 2), (128, 3)], [[0, 1], [0, 1]])) == 2  # rates
    assert len(chains([(64, 1), (100, 2)], [[0, 0], [0, 1]])) == 2  # lengths
    assert len(chains([(30, 4), (60, 4)], [[0, 1], [0, 1]])) == 2  # 4 does not divide 30


def test_planned_in_another_process(caplog: pytest.LogCaptureFixture) -> None:
    """The same walk; its errors are raised here; a process that dies costs a warning."""
    worker = Worker()
    offsets = [[0, 0], [1, 2]]
    chain = chains([(16, 1), (64, 4)], offsets)
    options = {"causal": True, "block_outer": 16, "block_inner": 16}
    arguments = chain, 3, np.arange(100), Facts(None, np.arange(100)[None] // 40)
    here = plan_rows(*arguments, **options)
    for kill in (False, True, False):
        if kill:
            assert worker._process is not None
            worker._process.kill()
        there = worker.call(plan_rows, *arguments, **options)
        for one, other in ((here.tiles, there.tiles), (here.rows, there.rows), (here.runs, there.runs)):
            assert torch.equal(one, other)
        assert ("is gone" in caplog.text) == worker._lost
    with pytest.raises(ValueError, match="invalid literal"):
        Worker().call(int, "x")
