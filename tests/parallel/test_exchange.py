# SPDX-License-Identifier: Apache-2.0
"""Ranks against one device: outputs, gradients, bytes, errors."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

import ring_hilbert as rh
from ring_hilbert.parallel.layout import Layout
from tests.harness.cases import Case, assert_close, cases
from tests.harness.ranks import run_ranks, run_ranks_collect

ALIGNED = rh.DilatedPattern((16, 32, 64), (1, 2, 4))
RAGGED = rh.DilatedPattern((7, 19, 50, None), (2, 3, 5, 4), "modulo", 1, segment_shift=3)


class Way(NamedTuple):
    """How rows reach other ranks."""

    strategy: str = "exchange"
    layout: str = "contiguous"
    save_remote: bool = False


EXCHANGE = Way()


def shard(tensor: torch.Tensor, layout: Layout, rank: int) -> torch.Tensor:
    """The rows (axis 1, or the last of a 1-D or 2-D fact) of one rank."""
    return tensor.index_select(1 if tensor.ndim > 2 else tensor.ndim - 1, torch.from_numpy(layout.rows(rank)))


def attend(
    case: Case,
    lengths: tuple[int, ...],
    rank: int,
    group,
    dtype: torch.dtype,
    shared_prepared: bool = False,
    backend: str = "auto",
    way: Way = EXCHANGE,
):
    """One rank's out, lse, dq, dk, dv, and the plan it ran."""
    layout = Layout(lengths, way.layout)
    x = {name: shard(value, layout, rank).clone() for name, value in case.tensors(dtype).items()}
    facts = {name: None if value is None else shard(value, layout, rank) for name, value in case.facts().items()}
    q, k, v = (x[name].requires_grad_() for name in "qkv")
    options = {"causal": case.causal, "order": case.order, "group": group, **facts, **way._asdict()}
    prepared = rh.prepare(lengths[rank], **options)
    call = {"prepared": prepared} if shared_prepared else options
    out, lse = rh.dilated_attention(q, k, v, case.pattern, return_lse=True, backend=backend, **call)
    out.backward(x["dout"])
    shapes = next(iter(prepared._executions))[1] if prepared._executions else None
    result = {"out": out.detach(), "lse": lse, "dq": q.grad, "dk": k.grad, "dv": v.grad}
    return result, prepared.plan(case.pattern, shapes) if shapes else None


def whole(parts: list[dict[str, torch.Tensor]], layout: Layout | None = None) -> dict[str, torch.Tensor]:
    """The ranks' results as those of one device."""
    merged = {name: torch.cat([part[name] for part in parts], dim=2 if name == "lse" else 1) for name in parts[0]}
    if layout is None or layout.kind == "contiguous":
        return merged
    places = torch.from_numpy(np.concatenate([layout.rows(rank) for rank in range(layout.world_size)])).argsort()
    return {name: x.index_select(2 if name == "lse" else 1, places) for name, x in merged.items()}


# ---- equality with one device


def _run_cases(rank: int, world: int, problems: list[tuple[Case, tuple[int, ...], Way]], dtype: torch.dtype):
    return [attend(case, lengths, rank, dist.group.WORLD, dtype, way=way)[0] for case, lengths, way in problems]


def run_cases(world: int, problems: list[tuple], dtype: torch.dtype = torch.float64):
    """For every problem, (case, lengths) or (case, lengths, way), the results of all ranks put together."""
    problems = [(*problem, EXCHANGE)[:3] for problem in problems]
    ranks = run_ranks(_run_cases, world, problems, dtype, timeout=300)
    layouts = [Layout(lengths, way.layout) for _, lengths, way in problems]
    return [whole([rank[i] for rank in ranks], layout) for i, layout in enumerate(layouts)]


def splits(seq_len: int, world: int, kind: str, seed: int = 0) -> tuple[int, ...]:
    if kind == "even":
        return Layout.even(seq_len, world).lengths
    cuts = sorted(random.Random(seed).choices(range(seq_len + 1), k=world - 1))
    lengths = [b - a for a, b in zip([0, *cuts], [*cuts, seq_len], strict=True)]
    if kind == "one empty":
        lengths[world // 2 - 1] += lengths[world // 2]
        lengths[world // 2] = 0
    return tuple(lengths)


def problems_for(world: int) -> list[tuple[Case, tuple[int, ...]]]:
    base = Case(ALIGNED, 64, 2, 4, 2, 4)
    variants = [
        base,
        replace(base, causal=False),
        replace(base, pattern=RAGGED, seq_len=93, heads=3, kv_heads=3),
        replace(base, pattern=RAGGED, seq_len=93, causal=False, batch=1),
        replace(base, pattern=RAGGED, seq_len=71, documents="per-batch"),
        replace(base, pattern=RAGGED, seq_len=71, documents="per-batch", causal=False),
        replace(base, pattern=RAGGED, seq_len=71, documents="padding", positions="ties"),
        replace(base, pattern=RAGGED, seq_len=64, positions="per-batch", documents="shared"),
        replace(base, positions="shuffled", heads=5, kv_heads=5, batch=1),
        replace(base, pattern=rh.DilatedPattern((None,), (1,)), seq_len=40),
        replace(base, pattern=rh.DilatedPattern((24, 48), (3, 8), "block"), seq_len=67, kv_heads=4),
    ]
    kinds = ["even", "uneven", "one empty"] if world > 1 else ["even"]
    return [(case, splits(case.seq_len, world, kind, i)) for i, case in enumerate(variants) for kind in kinds]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_ranks_equal_the_reference(world: int):
    problems = problems_for(world)
    for (case, lengths), result in zip(problems, run_cases(world, problems), strict=True):
        try:
            assert_close(result, case.expected())
        except AssertionError as error:
            raise AssertionError(f"{case} over {lengths}") from error


WAYS = [
    Way("ring"), Way("ring", "zigzag"), Way("exchange", "zigzag"), Way("ulysses"), Way("ulysses", "zigzag"),
    Way("exchange", save_remote=True), Way("ring", "zigzag", save_remote=True),
]  # fmt: skip


def possible(case: Case, world: int, way: Way) -> bool:
    """Whether there are heads enough for the strategy and rows that divide for the layout."""
    rows = way.layout == "contiguous" or case.seq_len % (2 * world) == 0
    return rows and (way.strategy != "ulysses" or case.heads >= world)


def problems_in_every_way(world: int, every: int = 1) -> list[tuple[Case, tuple[int, ...], Way]]:
    found = []
    for i, (case, lengths) in enumerate(problems_for(world)):
        for j, way in enumerate(WAYS):
            if way.layout == "zigzag":
                case = replace(case, seq_len=-(-case.seq_len // (2 * world)) * 2 * world)
                lengths = Layout.even(case.seq_len, world, "zigzag").lengths
            if way.strategy == "ulysses":
                case = replace(case, heads=-(-max(case.heads, world) // case.kv_heads) * case.kv_heads)
            if (i + j) % every == 0:
                found.append((case, lengths, way))
    return found


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 8])
def test_every_way_equals_the_reference(world: int):
    check_problems(world, problems_in_every_way(world, every=3))


@pytest.mark.full
@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 8])
def test_every_way_equals_the_reference_in_all_combinations(world: int):
    check_problems(world, problems_in_every_way(world))


def check_problems(world: int, problems: list[tuple[Case, tuple[int, ...], Way]]):
    for problem, result in zip(problems, run_cases(world, problems), strict=True):
        try:
            assert_close(result, problem[0].expected())
        except AssertionError as error:
            raise AssertionError(f"{problem}") from error


@pytest.mark.parametrize("world", [2, 4])
def test_order_inside_the_call(world: int):
    hilbert, morton, snake = (rh.TokenOrder(c, block=n) for c, n in (("hilbert", 16), ("morton", 5), ("snake", 5)))
    problems = [
        (Case(ALIGNED, 64, 2, 4, 2, 4, order=hilbert), splits(64, world, "even")),
        (Case(RAGGED, 59, order=morton, documents="shared"), (20, 39) if world == 2 else (15, 15, 20, 9)),
        (Case(RAGGED, 59, causal=False, order=snake), (25, 34) if world == 2 else (5, 15, 0, 39)),
    ]
    for (case, _), result in zip(problems, run_cases(world, problems), strict=True):
        assert_close(result, case.expected())


def check_any(case: Case, world: int, kind: str, way: Way):
    if way.layout == "zigzag":
        case, kind = replace(case, seq_len=-(-case.seq_len // (2 * world)) * 2 * world), "even"
    if way.strategy == "ulysses":
        case = replace(case, heads=-(-max(case.heads, world) // case.kv_heads) * case.kv_heads)
    lengths = splits(case.seq_len, world, kind if world > 1 else "even", case.seed)
    check_problems(world, [(case, lengths, way)])


ANY_WAY = st.builds(
    Way, st.sampled_from(["exchange", "ring", "ulysses"]), st.sampled_from(["contiguous", "zigzag"]), st.booleans()
)
KINDS = st.sampled_from(["even", "uneven", "one empty"])


@given(cases(orders=False), st.integers(1, 4), KINDS, ANY_WAY)
@settings(max_examples=100, deadline=None)
def test_any_case_on_any_ranks(case: Case, world: int, kind: str, way: Way):
    check_any(case, world, kind, way)


@pytest.mark.full
@given(cases(max_length=120, orders=False), st.integers(1, 8), KINDS, ANY_WAY)
@settings(max_examples=1500, deadline=None)
def test_any_case_on_any_ranks_at_length(case: Case, world: int, kind: str, way: Way):
    check_any(case, world, kind, way)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_does_not_grow_with_the_ranks(dtype: torch.dtype):
    """Against float64 on the same inputs: RMS error at P = 8 at most 1.1x, max at most 2.5x that at P = 1."""
    case = Case(rh.DilatedPattern((64, 256, 512), (1, 2, 4)), 512, 1, 4, 2, 32, logit_scale=4.0)
    exact = case.expected(torch.float64, inputs=dtype)
    errors = {}
    for world in (1, 8):
        (result,) = run_cases(world, [(case, splits(512, world, "even"))], dtype)
        errors[world] = {name: (result[name].double() - exact[name]).abs() for name in exact}
    for name in exact:
        one, eight = errors[1][name], errors[8][name]
        covered = exact[name] != float("-inf")
        one, eight = one[covered], eight[covered]
        assert eight.square().mean().sqrt() <= 1.1 * one.square().mean().sqrt(), name
        assert eight.max() <= 2.5 * one.max(), name


# ---- groups


def _two_groups(rank: int, world: int):
    """DP 2 x SP 2: every pair of neighbours works on a sequence of its own; a reduction over the world runs between."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "sp"))
    case = Case(RAGGED, 61, 1, 2, 2, 4, seed=rank // 2)
    lengths = (40, 21)
    results = []
    for group in (mesh["sp"], mesh["sp"].get_group()):
        results.append(attend(case, lengths, rank % 2, group, torch.float64)[0])
        dist.all_reduce(results[-1]["out"].sum())
    return results


def test_subgroups_with_and_without_a_mesh():
    ranks = run_ranks(_two_groups, 4)
    for first in (0, 2):
        expected = Case(RAGGED, 61, 1, 2, 2, 4, seed=first // 2).expected()
        for call in range(2):
            assert_close(whole([ranks[first][call], ranks[first + 1][call]]), expected)


# ---- bytes


def _count_bytes(rank: int, world: int, problems: list[tuple[Case, tuple[int, ...], Way]], dtype: torch.dtype):
    """Per problem what arrived by each message of forward, and of backward; what the plan says of both and of refetching."""
    counts = []
    together, apart = dist.all_to_all_single, dist.batch_isend_irecv
    for case, lengths, way in problems:
        received: list[int] = []

        def counting(output, sending, output_splits, input_splits, seen=received, **kwargs):
            assert output_splits[rank] == 0 and sum(output_splits) == len(output)
            seen.append(output.nbytes)
            return together(output, sending, output_splits, input_splits, **kwargs)

        def counting_messages(messages, seen=received):
            seen.append(sum(message.tensor.nbytes for message in messages if message.op is dist.irecv))
            return apart(messages)

        x = {n: shard(t, Layout(lengths, way.layout), rank).clone() for n, t in case.tensors(dtype).items()}
        facts = {n: None if t is None else shard(t, Layout(lengths, way.layout), rank) for n, t in case.facts().items()}
        q, k, v = (x[n].requires_grad_() for n in "qkv")
        prepared = rh.prepare(lengths[rank], causal=case.causal, group=dist.group.WORLD, **facts, **way._asdict())
        dist.all_to_all_single, dist.batch_isend_irecv = counting, counting_messages
        try:
            out = rh.dilated_attention(q, k, v, case.pattern, prepared=prepared)
            forward = sum(received)
            received.clear()
            out.backward(x["dout"])
        finally:
            dist.all_to_all_single, dist.batch_isend_irecv = together, apart
        plan = prepared.plan(case.pattern, next(iter(prepared._executions))[1])
        planned = plan.received_bytes(rank), plan.received_bytes(rank, "backward"), plan.refetched_bytes(rank)
        counts.append((forward, sum(received), planned))
    return counts


@pytest.mark.parametrize(("world", "dtype"), [(4, torch.float64), (4, torch.bfloat16), (3, torch.float32)])
def test_bytes_on_the_wire_are_the_plans(world: int, dtype: torch.dtype):
    problems = [(*problem, EXCHANGE) for problem in problems_for(world)] + problems_in_every_way(world, every=4)
    check_bytes(world, problems, dtype)


@pytest.mark.full
@pytest.mark.parametrize("world", [2, 3, 6, 8])
def test_bytes_on_the_wire_are_the_plans_in_all_combinations(world: int):
    check_bytes(world, problems_in_every_way(world), torch.float32)


def check_bytes(world: int, problems: list[tuple[Case, tuple[int, ...], Way]], dtype: torch.dtype):
    ranks = run_ranks(_count_bytes, world, problems, dtype, timeout=240)
    for i, (case, lengths, way) in enumerate(problems):
        for rank in range(world):
            forward, backward, (planned, returned, refetched) = ranks[rank][i]
            assert forward == planned, (case, lengths, way, rank)
            assert backward == returned + (0 if way.save_remote else refetched), (case, lengths, way, rank)
            if way.strategy != "ulysses":
                rows = crossing_rows(case, Layout(lengths, way.layout), rank)
                assert planned == rows * 2 * case.head_dim * dtype.itemsize


def crossing_rows(case: Case, layout: Layout, rank: int) -> int:
    """By definition: (entry, kv head, row) of other ranks for which a query row of `rank` has multiplicity > 0."""
    facts = case.facts()
    positions = facts["positions"] if facts["positions"] is not None else torch.arange(case.seq_len)
    seen = rh.reference.allowed(case.causal, positions, facts["document_ids"])
    count = rh.reference.multiplicity(case.pattern, case.seq_len, case.kv_heads)
    m = (seen[:, None] & (count > 0)).expand(case.batch, -1, -1, -1)  # [B, Hkv, query, key]
    mine = torch.zeros(case.seq_len, dtype=torch.bool)
    mine[torch.from_numpy(layout.rows(rank))] = True
    return int(m[:, :, mine][..., ~mine].any(2).sum())


# ---- the choice of a strategy


def _auto(rank: int, world: int):
    """What "auto" takes for a dilated and for a dense pattern, and once more for a shorter batch; results as of exchange."""
    taken, differences = [], []
    for pattern in (ALIGNED, rh.DilatedPattern((None,), (1,))):
        for rows in (48, 24):
            case = Case(pattern, rows * world, 1, 4, 4, 8, causal=False)
            layout = Layout.even(case.seq_len, world)
            x = {name: shard(value, layout, rank) for name, value in case.tensors().items()}
            results = []
            for strategy in ("auto", "exchange"):
                prepared = rh.prepare(rows, group=dist.group.WORLD, causal=False, strategy=strategy)
                results.append(rh.dilated_attention(x["q"], x["k"], x["v"], pattern, prepared=prepared))
                taken += [key[-1] for key in prepared._executions] if strategy == "auto" else []
            differences.append(float((results[0] - results[1]).abs().max()))
    return taken, max(differences)


def test_auto_is_one_choice_on_all_ranks():
    ranks = run_ranks(_auto, 4)
    assert all(taken == ["exchange", "exchange", "ulysses", "ulysses"] for taken, _ in ranks), ranks
    assert all(difference < 1e-12 for _, difference in ranks)


# ---- mistakes of one rank


def _mistake(rank: int, world: int, what: str, prepared_first: bool):
    case = Case(ALIGNED, 64, 2, 4, 2, 4)
    lengths = (22, 21, 21)
    x = {name: shard(value, Layout(lengths), rank) for name, value in case.tensors().items()}
    arguments = {"q": x["q"], "k": x["k"], "v": x["v"], "pattern": ALIGNED}
    facts = {}
    if rank == 1:
        changes = {
            "shape": {"k": x["k"][:, 1:]},
            "batch": {name: x[name][:1] for name in "qkv"},
            "pattern": {"pattern": rh.DilatedPattern((16, 32, 64), (1, 2, 5))},
            "dtype": {name: x[name].float() for name in "qkv"},
            "scale": {"scale": 0.1},
        }
        arguments |= changes.get(what, {})
        facts = {
            "positions of floats": {"positions": torch.zeros(21)},
            "positions too long": {"positions": torch.arange(22)},
            "positions alone": {"positions": torch.arange(21)},
            "causal": {"causal": False},
        }.get(what, {})
    if prepared_first:
        facts = {"prepared": rh.prepare(lengths[rank], group=dist.group.WORLD, **facts)}
    else:
        facts |= {"group": dist.group.WORLD}
    return rh.dilated_attention(**arguments, **facts)


@pytest.mark.parametrize("prepared_first", [False, True])
@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("shape", ["rank 1", "k must be [B=2, S=21"]),
        ("batch", ["rank 1 has 1", "batch size of q"]),
        ("pattern", ["rank 1 has", "pattern must be the same"]),
        ("dtype", ["rank 1 has torch.float32", "dtype"]),
        ("scale", ["rank 1 has 0.1", "scale"]),
        ("positions of floats", ["rank 1", "positions must be a tensor of integers"]),
        ("positions too long", ["rank 1", "positions must be [21]"]),
        ("positions alone", ["rank 1 has True", "positions is given"]),
        ("causal", ["rank 1 has False", "causal"]),
    ],
)
def test_a_mistake_on_one_rank_is_an_error_on_all(what: str, words: list[str], prepared_first: bool):
    outcomes = run_ranks_collect(_mistake, 3, what, prepared_first, timeout=30)
    for outcome in outcomes:
        assert isinstance(outcome, ValueError), outcome
        assert all(word in str(outcome) for word in words), str(outcome)


def _orders_that_cannot_be(rank: int, world: int, order: rh.TokenOrder):
    return rh.prepare(32, group=dist.group.WORLD, order=order)


@pytest.mark.parametrize(
    ("order", "words"),
    [
        (rh.TokenOrder("hilbert", block=24), "must divide the first row of every rank"),
        (rh.TokenOrder("hilbert", grid=(8, 8)), "use shard_batch"),
    ],
)
def test_orders_that_would_move_rows_between_ranks(order: rh.TokenOrder, words: str):
    for outcome in run_ranks_collect(_orders_that_cannot_be, 2, order, timeout=30):
        assert isinstance(outcome, ValueError) and words in str(outcome)


def _peer_goes_missing(rank: int, world: int, phase: str):
    case, lengths = Case(ALIGNED, 64), (32, 32)
    x = {name: shard(value, Layout(lengths), rank).clone() for name, value in case.tensors().items()}
    q, k, v = (x[name].requires_grad_() for name in "qkv")
    prepared = rh.prepare(32, group=dist.group.WORLD)
    rh.dilated_attention(q, k, v, ALIGNED, prepared=prepared, name="layer 7").sum().backward()
    if rank == 1 and phase == "forward":
        return
    out = rh.dilated_attention(q, k, v, ALIGNED, prepared=prepared, name="layer 7")
    if rank == 1 and phase == "backward":
        return
    out.sum().backward()


@pytest.mark.parametrize(
    ("phase", "collective"), [("forward", "exchange of K and V rows"), ("backward", "K and V rows")]
)
def test_a_peer_that_goes_missing_is_an_error_that_names_the_layer(phase: str, collective: str):
    outcome = run_ranks_collect(_peer_goes_missing, 2, phase, timeout=10)[0]
    assert isinstance(outcome, RuntimeError)
    assert all(words in str(outcome) for words in ("rank 0", collective, "layer 7", "did not complete")), outcome
