# SPDX-License-Identifier: Apache-2.0
"""Static walks and what pruning leaves of them, against the definition pair by pair: no attention is computed here."""

from __future__ import annotations

import random
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ring_hilbert as rh
from ring_hilbert.kernels import tables
from ring_hilbert.kernels.tables import Schedule
from ring_hilbert.ops import triton_core
from ring_hilbert.ops.core import Shard
from ring_hilbert.ops.nesting import chains
from ring_hilbert.ops.pattern import Branch, DilatedPattern
from ring_hilbert.ops.remote_walk import plan_lists
from ring_hilbert.ops.visible import HIDDEN, Intervals, Visible
from ring_hilbert.ops.visits import Chunk
from ring_hilbert.ops.walk import plan_rows
from tests.harness.cases import Case, cases

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    import tests.harness.interpreter  # noqa: F401
from ring_hilbert.kernels import prune as prune_module  # noqa: E402  # the interpreter comes first


def pairs_of(schedule: Schedule, entry: int, head: int, outer_rows: int, inner_rows: int) -> np.ndarray:
    """How often the kernels count each pair of an outer and an inner row: int64 `[outer_rows, inner_rows]`.

    Rows in no tile have -1. Also checks that no row is in two, that steps without a mask hide nothing and that others show
    something, as far as there are runs for that.
    """
    walk = schedule.walk
    table = int(walk.tables[min(entry, len(walk.tables) - 1), head])
    number = table + (entry * len(walk.tiles) if len(schedule.order) > len(walk.tiles) else 0)
    length = schedule.steps[number].sum(1)
    if length.numel() > prune_module.FEW_TILES:
        mantissa, exponent = length.float().frexp()
        length = (mantissa * 8).floor().ldexp(exponent)  # what is left of three bits
    assert torch.equal(schedule.order[number].long(), length.argsort(descending=True, stable=True))
    low, high, key = (x[min(entry, len(x) - 1)].cpu().numpy() for x in (schedule.low, schedule.high, schedule.key))
    outer_of, inner_of, tiles, steps, runs = (
        x.cpu().numpy()
        for x in (schedule.outer, schedule.inner, walk.tiles[table], schedule.steps[number], schedule.runs[number])
    )
    found, seen = np.zeros((outer_rows, inner_rows), np.int64), np.zeros(outer_rows, np.int64)
    for tile, blocks in zip(tiles, steps, strict=True):
        count, place = tile[tables.TILE_COUNT], tile[tables.TILE_PLACE]
        outer = outer_of[place : place + count]
        outer = outer[outer >= 0]
        seen[outer] += 1
        run, done, left = tile[tables.TILE_RUN], 0, 0
        for masked in (False, True):
            begin, idle = run, 0
            for _ in range(blocks[int(masked)] if count else 0):
                if left <= 0:
                    first, step, left, times, length, ahead, hole, hole_ahead = runs[run].tolist()
                    run, done = run + 1, 0
                at = first + step * (done + np.arange(min(left, schedule.block_inner)))
                inner = inner_of[at] if walk.indexed else at
                inner = inner[inner >= 0] if masked else inner
                a, b = outer[:, None], inner[None, :]
                query, of = (b, a) if schedule.transposed else (a, b)
                visible = (low[query] <= key[of]) & (key[of] <= high[query])
                if walk.segments:
                    visible &= (a + ahead) // length == (b + ahead) // length
                    if hole:
                        visible &= (a + hole_ahead) // hole != (b + hole_ahead) // hole
                if not masked:
                    assert visible.all() and len(inner) == schedule.block_inner, "a step without a mask hides pairs"
                idle += not visible.any()
                np.add.at(found, (a, b), visible * times)
                done, left = done + schedule.block_inner, left - schedule.block_inner
            assert not idle or run - begin > tables.GAPS, "a block without a visible pair"
        if count:
            assert runs[run, tables.RUN_COUNT] == tables.ENDLESS, "a loop looks one run ahead"
    assert (seen <= 1).all(), "a row is in several tiles"
    found[seen == 0] = -1
    return found


def schedule_of(case: Case, blocks: tuple[int, int], transposed: bool, cut: np.ndarray | None = None) -> Schedule:
    facts = {name: None if x is None else torch.atleast_2d(x) for name, x in case.facts().items()}
    pattern, rows = case.pattern, torch.arange(case.seq_len) if cut is None else torch.from_numpy(cut)
    if case.order is not None:
        permutation = case.order.permutation(case.seq_len)
        facts = {name: None if x is None else x[:, permutation] for name, x in facts.items()}
    visible = Visible(
        case.seq_len, case.causal, order=case.order, positions=facts["positions"], documents=facts["document_ids"]
    )
    walk = plan_rows(
        chains(pattern, case.kv_heads), pattern.segment_shift, rows.to(DEVICE), visible.places(DEVICE)[0][rows.to(DEVICE)],
        block_outer=blocks[0], chunk=min(tables.CHUNK, blocks[1]),
    )  # fmt: skip
    key, low, high = (x[:, rows.to(DEVICE)] for x in visible.on(DEVICE))
    return prune_module.prune(walk, low, high, key, block_inner=blocks[1], transposed=transposed, entries=len(key))


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


def check(case: Case, blocks: tuple[int, int], rows: np.ndarray | None = None) -> None:
    cut = np.arange(case.seq_len) if rows is None else rows
    exact = defined(case)[:, :, cut][..., cut]
    in_some_branch = rh.reference.multiplicity(case.pattern, case.seq_len, case.kv_heads).diagonal(0, 1, 2)[:, cut] > 0
    for transposed in (False, True):
        schedule = schedule_of(case, blocks, transposed, rows)
        for entry in range(len(exact)):
            for head in range(case.kv_heads):
                found = pairs_of(schedule, entry, head, len(cut), len(cut))
                expected = np.where(
                    in_some_branch[head][:, None], exact[entry, head].T if transposed else exact[entry, head], -1
                )
                np.testing.assert_array_equal(found, expected)


blocks = st.tuples(st.sampled_from([2, 4, 8]), st.sampled_from([2, 4, 8]))


@given(cases(), blocks)
@settings(max_examples=25, deadline=None)
def test_every_pair_counts_as_often_as_defined(case: Case, blocks: tuple[int, int]):
    check(case, blocks)


@pytest.mark.full
@pytest.mark.timeout(1800)  # the interpreter takes seconds for an example
@given(cases(max_length=200), blocks)
@settings(max_examples=600, deadline=None)
def test_every_pair_counts_as_often_as_defined_at_length(case: Case, blocks: tuple[int, int]):
    check(case, blocks)


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


@given(cases(max_length=60), nested_patterns(), blocks)
@settings(max_examples=20, deadline=None)
def test_nested_patterns(case: Case, pattern: rh.DilatedPattern, blocks: tuple[int, int]):
    check(replace(case, pattern=pattern), blocks)


@pytest.mark.parametrize("seed", [*range(16), *(pytest.param(i, marks=pytest.mark.full) for i in range(16, 120))])
def test_rows_with_gaps(seed: int, monkeypatch: pytest.MonkeyPatch):
    """The rows of a rank need not follow each other: two runs of the sequence, and segments that end within them."""
    dice = random.Random(seed)
    lengths = sorted(dice.randint(1, 40) for _ in range(2))
    rates = (dice.choice([1, dice.randint(1, lengths[0])]), dice.randint(1, lengths[1]))
    pattern = rh.DilatedPattern(tuple(lengths), rates, segment_shift=dice.randint(0, 9))
    facts = {"documents": dice.choice(["none", "none", "shared", "padding"]), "causal": dice.random() < 0.7}
    edges = sorted(dice.randint(0, 90) for _ in range(4))
    rows = np.r_[edges[0] : edges[1], edges[2] : edges[3]]
    monkeypatch.setattr(prune_module, "FEW_TILES", dice.choice([0, tables.FEW_TILES]))
    check(Case(pattern, 90, seed=seed, **facts), (dice.choice([2, 4, 8]), 4), rows)


@given(st.integers(0, 2**16), blocks)
@settings(max_examples=15, deadline=None)
def test_explicit_lists(seed: int, blocks: tuple[int, int]):
    """Rows that lie anywhere, some of which do not travel: a row counts as often as its visits say, hidden ones stay hidden."""
    rng = np.random.default_rng(seed)
    outer_rows, inner_rows, batch = 30, 50, 2
    key, low = rng.integers(1, 9, inner_rows), rng.integers(1, 9, (batch, outer_rows))
    high = low + rng.integers(-3, 5, (batch, outer_rows))
    travels = rng.random(inner_rows) < 0.8
    place = np.where(travels, np.cumsum(travels) - 1, -1)
    visits = [
        [
            [
                (
                    rng.permutation(outer_rows)[: rng.integers(1, 20)],
                    rng.permutation(inner_rows)[: rng.integers(0, 40)],
                    int(rng.integers(1, 4)),
                )
                for _ in range(rng.integers(0, 4))
            ]
            for _ in range(2)
        ]
        for _ in range(batch)
    ]
    sent = [
        torch.from_numpy(x.astype(np.int32)).to(DEVICE)
        for x in (low, high, np.where(travels, key, HIDDEN)[None], place)
    ]
    packed = torch.from_numpy(key[travels].astype(np.int32)).to(DEVICE)[None]
    for transposed in (False, True):
        turned = [
            [[(b, a, n) if transposed else (a, b, n) for a, b, n in pairs] for pairs in heads] for heads in visits
        ]
        sides = (np.arange(inner_rows), np.arange(outer_rows))[:: 1 if transposed else -1]
        walk = plan_lists(turned, *sides, block_outer=blocks[0], device=DEVICE, chunk=min(16, blocks[1]))
        rows = (sent[3][walk.outer], walk.inner) if transposed else (walk.outer, sent[3][walk.inner])
        schedule = prune_module.prune(
            walk, *sent[:3], block_inner=blocks[1], transposed=transposed, rows=rows, places=packed
        )
        for entry in range(batch):
            for head in range(2):
                exact, reached = np.zeros((outer_rows, inner_rows), np.int64), np.zeros((outer_rows, inner_rows), bool)
                for a, b, times in visits[entry][head]:
                    exact[np.ix_(a, b)] += times
                    reached[slice(None) if transposed else a] |= True
                    if transposed:
                        reached[:, b] |= True
                seen = (low[entry][:, None] <= key[None, :]) & (key[None, :] <= high[entry][:, None])
                exact = (exact * seen)[:, travels]
                named = np.zeros(inner_rows if transposed else outer_rows, bool)
                for a, b, _ in visits[entry][head]:
                    named[b if transposed else a] = True
                if transposed:
                    exact = np.where(named[travels][:, None], exact.T, -1)
                else:
                    exact = np.where(named[:, None], exact, -1)
                np.testing.assert_array_equal(pairs_of(schedule, entry, head, *exact.shape), exact)


# ---- how much is visited


SCALE = 8  # everything an eighth of what it is on a device, tiles too: the same shares, and minutes less
LADDER = rh.DilatedPattern(tuple(2048 // SCALE << i for i in range(5)), tuple(1 << i for i in range(5)))


def executed(
    pattern: rh.DilatedPattern, rows: int, causal: bool, block: int, transposed: bool = False, order=None
) -> float:
    """Pairs in the blocks that are visited, relative to the pairs of the branches."""
    inner = 128 // SCALE
    schedule = schedule_of(Case(pattern, rows, kv_heads=1, causal=causal, order=order), (block, inner), transposed)
    pairs = sum(rows // w * (n * (n + 1) // 2 if causal else n * n) for w, r in pattern.branches for n in [w // r])
    return int(schedule.steps.sum()) * block * inner / pairs


@pytest.mark.parametrize(
    ("causal", "block", "bound"),
    [(False, 16, 0.77), (True, 16, 0.93), pytest.param(True, 8, 0.85, marks=pytest.mark.full)],
)
@pytest.mark.parametrize("transposed", [False, pytest.param(True, marks=pytest.mark.full)])
def test_executed_tiles(causal: bool, block: int, bound: float, transposed: bool):
    """Five branches over 32768 rows, tiles of 128 and 64: what deduplication saves and tiles of equal coverage waste."""
    assert executed(LADDER, 32768 // SCALE, causal, block, transposed) <= bound


@pytest.mark.parametrize("block", [32, pytest.param(256, marks=pytest.mark.full)])
def test_curve_order_executes_hardly_more(block: int):
    """Causal by token, in Hilbert order within blocks: rows are taken by place, so that masks stay as narrow as in raster."""
    order = rh.TokenOrder("hilbert", block=block)
    rows = 8192 // SCALE
    assert executed(LADDER, rows, True, 16, order=order) <= 1.02 * executed(LADDER, rows, True, 16)


def packed(documents: torch.Tensor, order: rh.TokenOrder | None = None) -> tuple[Schedule, Intervals]:
    """Of documents `[S]` in natural order, in tiles of 16 rows, a steep ladder over them."""
    size = len(documents)
    pattern = DilatedPattern((128, 512, None), (1, 4, 16))
    prepared = rh.shard_batch({"input_ids": documents[None], "document_ids": documents[None]}, order=order)[
        "ring_hilbert"
    ]
    visible = prepared.visible
    walk = plan_rows(
        chains(pattern, 1), 0, torch.arange(size, device=DEVICE), visible.places(DEVICE)[0], block_outer=16
    )
    seen = visible.on(DEVICE)
    return prune_module.prune(walk, seen.low, seen.high, seen.key, block_inner=16, transposed=False), seen


@pytest.mark.parametrize("order", [pytest.param(None, marks=pytest.mark.full), rh.TokenOrder("hilbert", block=128)])
def test_documents_cost_what_they_see(order: rh.TokenOrder | None):
    """Many documents visit few blocks; ids that are hashes are as good as any; more padding changes no walk."""
    documents = torch.arange(1024) // 50
    many, one = packed(documents, order)[0], packed(torch.zeros(1024, dtype=torch.int64), order)[0]
    assert many.steps.sum() < 0.7 * one.steps.sum()
    hashes = torch.randint(0, 2**62, (21,), generator=torch.Generator().manual_seed(0))
    hashed = packed(hashes[documents], order)[0]
    assert torch.equal(hashed.steps, many.steps)
    padded = packed(torch.where(torch.arange(1024) < 768, documents, -1), order)[0]
    assert all(
        torch.equal(a, b) for a, b in ((padded.walk.tiles, many.walk.tiles), (padded.walk.outer, many.walk.outer))
    )
    assert padded.steps.sum() <= 0.8 * many.steps.sum()


def test_documents_are_not_visited_by_others():
    """32 documents of 64 rows under one dense branch: a 32nd of the pairs."""
    rows, pattern = torch.arange(2048, device=DEVICE), DilatedPattern((None,), (1,))
    walk = plan_rows(chains(pattern, 1), 0, rows, block_outer=16)
    steps = []
    for documents in (None, rows[None] // 64):
        key, low, high = Visible(2048, False, documents=documents).on(DEVICE)
        steps.append(int(prune_module.prune(walk, low, high, key, block_inner=16, transposed=False).steps.sum()))
    assert steps[1] * 32 == steps[0]


@pytest.mark.parametrize(("length", "segments"), [(4096, False), (16, True)])
def test_tiles_lie_in_one_segment_where_that_is_cheap(length: int, segments: bool):
    """The outermost branches of a steep ladder have few rows, of which tiles are left part empty rather than masked."""
    pattern = DilatedPattern((length, 4 * length, None), (1, 4, 16))
    assert plan_rows(chains(pattern, 1), 0, torch.arange(16 * 1024), block_outer=64).segments == segments


@pytest.mark.parametrize("length", [2**20, 2**31, 2**32 + 5])
def test_segments_longer_than_32_bits(length: int):
    """Of which one ends within the rows at hand."""
    check(Case(DilatedPattern((length, None), (1, 1), segment_shift=-10), 20, kv_heads=1), (8, 4))


def test_walks_of_lengths_that_are_not_in_use_leave(monkeypatch: pytest.MonkeyPatch):
    """A length keeps all of its walks, however large; those of other lengths are evicted when together they are too large."""
    monkeypatch.setattr(triton_core, "_walks", OrderedDict())
    monkeypatch.setattr(triton_core, "KEPT_BYTES", 1)
    of = tuple(chains(DilatedPattern((8, None), (1, 2)), 2))

    def walk(length: int, block: int):
        shard = Shard((Chunk(0, length, 0),), length)
        return triton_core._local_walk(of, 0, shard, block, 16, torch.device("cpu"))

    first, second = walk(40, 32), walk(40, 16)
    assert walk(40, 32) is first and walk(40, 16) is second
    other = walk(50, 32)
    assert walk(50, 32) is other and walk(40, 32) is not first


def test_nothing_is_taken_for_nested_that_is_not():
    def number(branches: list[tuple[int | None, int]], **options: int | str) -> int:
        return len(chains(DilatedPattern(*zip(*branches, strict=True), **options), 2))

    assert number([(64, 1), (128, 2), (None, 4)]) == 1
    assert number([(64, 2), (128, 4)]) == 1
    assert number([(64, 2), (128, 4)], offset_rule="block") == 1
    assert number([(64, 2), (128, 3)]) == 2  # rates
    assert number([(64, 1), (100, 2)]) == 2  # lengths
    assert number([(30, 4), (60, 4)]) == 2  # 4 does not divide 30
    chain = chains(DilatedPattern((64,), (2,)), 2)[0]
    assert chain.holds(Branch(128, 4), [0, 1]) and not chain.holds(Branch(128, 4), [1, 1])  # offsets disagree
