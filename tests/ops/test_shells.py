# SPDX-License-Identifier: Apache-2.0
"""Visits of a rank against the definition, pair by pair; deduplicated visits against branch by branch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import ring_hilbert as rh
from ring_hilbert.ops.nesting import nested
from ring_hilbert.ops.shells import shell_visits, shells_pay
from ring_hilbert.ops.visible import Visible
from ring_hilbert.ops.visits import Chunk, Visit, branch_visits
from ring_hilbert.parallel.execution import Execution
from ring_hilbert.parallel.layout import Layout
from ring_hilbert.parallel.plan import Plan, Shapes
from tests.harness.cases import assert_close, patterns

CPU = torch.device("cpu")


@st.composite
def nested_patterns(draw: st.DrawFn) -> rh.DilatedPattern:
    """Patterns that meet the conditions, duplicates and `None` included; the last rate need not divide its length."""
    rates = [draw(st.integers(1, 3))]
    lengths: list[int | None] = [rates[0] * draw(st.integers(1, 4))]
    for _ in range(draw(st.integers(0, 3))):
        last = lengths[-1]
        assert last is not None
        rate, length = rates[-1] * draw(st.integers(1, 3)), last * draw(st.integers(1, 4))
        rates.append(rate)
        lengths.append(math.lcm(length, rate))
    if draw(st.booleans()):
        lengths[-1] = None
    elif draw(st.booleans()) and len(rates) > 1:
        last, inner = lengths[-1], lengths[-2]
        assert last is not None and inner is not None
        lengths[-1] = max(inner, inner * (rates[-1] // inner + 1))
    return rh.DilatedPattern(
        tuple(lengths), tuple(rates), head_shift=draw(st.integers(0, 4)), segment_shift=draw(st.integers(-9, 9))
    )


def counted(visits: list[Visit], length: int, heads: int) -> np.ndarray:
    """How often every pair is visited, `[heads, length, length]`."""
    count = np.zeros((heads, length, length), np.int64)
    for visit in visits:
        queries, keys = visit.rows(visit.queries), visit.rows(visit.keys)
        for segment, residue in np.ndindex(queries.shape[:2]):
            a, b = queries[segment, residue], keys[segment, residue]
            weights = visit.times[np.minimum.outer(*visit.depths())]
            weights = np.where(b[None] > a[:, None], 0, weights) if visit.causal else weights
            for head in visit.heads.indices:
                count[head + residue * visit.head_step][np.ix_(a, b)] += weights
    return count


@given(nested_patterns(), st.data(), st.booleans())
@settings(max_examples=200, deadline=None)
def test_every_pair_is_visited_as_often_as_it_counts(pattern: rh.DilatedPattern, data: st.DataObject, causal: bool):
    assert nested(pattern) is not None
    length, heads = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 5))
    start = data.draw(st.integers(0, length - 1))
    chunk = Chunk(start, data.draw(st.integers(start + 1, length)), 0)
    expected = rh.reference.multiplicity(pattern, length, heads).numpy()[:, start : chunk.stop, start : chunk.stop]
    expected = np.tril(expected) if causal else expected
    for make in (shell_visits, branch_visits):
        visits = make(pattern, heads, chunk, causal)
        np.testing.assert_array_equal(counted(visits, chunk.stop - start, heads), expected, err_msg=make.__name__)
    rings = shell_visits(pattern, heads, chunk, causal)
    pairs = counted([Visit(**{**vars(v), "repeats": ()}) for v in rings], chunk.stop - start, heads)
    assert pairs.max(initial=0) <= 1, "a pair is computed twice"


def attend(
    pattern: rh.DilatedPattern, visible: Visible, heads: tuple[int, int], deduplicate: bool
) -> dict[str, Tensor]:
    """Out, lse and gradients of one device, every pair once or once per branch."""
    generator = torch.Generator().manual_seed(0)
    shapes = Shapes(2, *heads, 4, torch.float64)
    plan = Plan(pattern, Layout((visible.seq_len,)), visible, shapes, deduplicate=deduplicate)
    assert plan.deduplicates(plan.layout.chunks(0)[0]) == deduplicate
    execution = Execution(plan, 0, None, CPU)
    q, k, v, dout = (
        torch.randn(2, visible.seq_len, h, 4, generator=generator, dtype=torch.float64)
        for h in (heads[0], heads[1], heads[1], heads[0])
    )
    out, lse, residue, _ = execution.forward(q, k, v, 0.5)
    dq, dk, dv = execution.backward(dout, [q, k, v, out, lse, residue], 0.5)
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


@given(nested_patterns(), st.data(), st.booleans(), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_both_ways_agree(pattern: rh.DilatedPattern, data: st.DataObject, causal: bool, curve: bool, packed: bool):
    length, kv_heads = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 4))
    documents = np.sort(np.array(data.draw(st.lists(st.integers(-1, 2), min_size=length, max_size=length))))[None]
    order = rh.TokenOrder("hilbert", block=16) if curve else None
    visible = Visible(
        length, causal, documents=torch.from_numpy(documents) if packed else None, order=order if causal else None
    )
    heads = (kv_heads * data.draw(st.integers(1, 2)), kv_heads)
    assert_close(attend(pattern, visible, heads, True), attend(pattern, visible, heads, False))


@given(patterns(40))
@settings(max_examples=60, deadline=None)
def test_patterns_that_miss_a_condition_take_the_branches(pattern: rh.DilatedPattern):
    assume(nested(pattern) is None)
    chunk = Chunk(0, 40, 0)
    assert not any(shells_pay(pattern, 4, chunk, causal) for causal in (False, True))
    with pytest.raises(ValueError, match="not nested"):
        shell_visits(pattern, 4, chunk, False)


@pytest.mark.parametrize(
    ("lengths", "rates", "rule"),
    [((8, 16), (2, 3), "modulo"), ((8, 12), (1, 2), "modulo"), ((9, 18), (2, 4), "modulo"), ((8, 16), (1, 2), "block")],
)
def test_the_conditions(lengths: tuple, rates: tuple, rule: str):
    assert nested(rh.DilatedPattern(lengths, rates, rule)) is None


@pytest.mark.filterwarnings("ignore:order.block=768 does not divide")
@pytest.mark.parametrize(("causal", "block"), [(False, None), (True, None), (True, 512), (True, 2048), (True, 768)])
def test_a_doubling_ladder_is_deduplicated_where_it_is_faster(causal: bool, block: int | None):
    ladder, order = rh.DilatedPattern((2048, 4096, 8192), (1, 2, 4)), rh.TokenOrder("hilbert", block=block or 1)
    plan = rh.plan(
        ladder, 8192, 1, num_heads=8, head_dim=64, dtype=torch.float32, causal=causal, order=order if block else None
    )
    whole_blocks = block is None or 2048 % block == 0
    assert plan.deduplicates(plan.layout.chunks(0)[0]) == whole_blocks
    if not causal or block is None:
        assert plan.executed_flops(0) / plan.attention_flops(0) == pytest.approx(0.7857, abs=1e-3)
