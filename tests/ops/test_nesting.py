# SPDX-License-Identifier: Apache-2.0
"""Chains of branches against the rows and segments of each, written out."""

from __future__ import annotations

import itertools
import math
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

import ring_hilbert as rh
from ring_hilbert.ops.nesting import Chain, chains, nested

PERIOD = 48  # rows after which all segments and rates of the patterns below start over


@st.composite
def patterns(draw: st.DrawFn) -> rh.DilatedPattern:
    """Lengths and rates of which many divide each other."""
    branches = st.tuples(st.sampled_from([4, 6, 8, 12, 24, 48, None]), st.sampled_from([1, 2, 3, 4, 6]))
    drawn = draw(st.lists(branches.filter(lambda b: b[0] is None or b[1] <= b[0]), min_size=1, max_size=4))
    lengths, rates = zip(*drawn, strict=True)
    shift, rule = draw(st.integers(-5, 5)), draw(st.sampled_from(["modulo", "block"]))
    return rh.DilatedPattern(lengths, rates, rule, draw(st.integers(0, 3)) if rule == "modulo" else 0, shift)


def segments(pattern: rh.DilatedPattern, branch: rh.Branch, head: int, heads: int) -> list[set[int]]:
    """The rows of a kv head in each segment, over two periods."""
    w, r = branch
    offset = (head + pattern.head_shift) % r if pattern.offset_rule == "modulo" else head // -(-heads // r)
    found: dict[int, set[int]] = {}
    for row in range(-pattern.segment_shift, 2 * PERIOD - pattern.segment_shift):  # segments begin with the first
        shifted = row + pattern.segment_shift
        segment, within = (0, shifted) if w is None else divmod(shifted, w)
        if within % r == offset:
            found.setdefault(segment, set()).add(row)
    return list(found.values())


def is_nested(pattern: rh.DilatedPattern, inner: rh.Branch, outer: rh.Branch, heads: int) -> bool:
    """Whether all rows of the outer branch are rows of the inner one, and no segment of the inner one has rows of two."""
    for head in range(heads):
        small, large = (segments(pattern, branch, head, heads) for branch in (inner, outer))
        if not set().union(*large) <= set().union(*small):
            return False
        if any(sum(bool(a & b) for b in large) > 1 for a in small):
            return False
    return True


@given(patterns(), st.integers(1, 5))
@settings(max_examples=400, deadline=None)
def test_the_branches_of_a_chain_lie_within_each_other(pattern: rh.DilatedPattern, heads: int):
    found = chains(pattern, heads)
    assert Counter(branch for chain in found for branch in chain.branches) == Counter(pattern.branches)
    for chain in found:
        for inner, outer in itertools.pairwise(chain.branches):
            assert is_nested(pattern, inner, outer, heads)
    if nested(pattern) is not None:
        assert len(found) == 1 and nested(pattern) == found[0].branches, "of any heads"


@given(patterns(), st.integers(1, 5))
def test_how_the_rows_of_a_depth_lie(pattern: rh.DilatedPattern, heads: int):
    for chain in chains(pattern, heads):
        unbroken, most = True, 0  # progressions of a depth
        for head in range(heads):
            rows = [sorted(set().union(*segments(pattern, branch, head, heads))) for branch in chain.branches]
            for (_, r), own in zip(chain.branches, rows, strict=True):
                unbroken &= all(b - a == r for a, b in itertools.pairwise(own))
            for own, deeper, (_, r) in zip(rows, rows[1:], chain.branches[1:], strict=False):
                most = max(most, len({row % r for row in set(own) - set(deeper)}))
        assert chain.unbroken == unbroken
        for limit in range(4):
            assert chain.progressions(limit) == (unbroken and most <= limit)


@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=4),
    st.integers(0, 5),
    st.integers(1, 5),
)
def test_a_ladder_is_one_chain(steps: list[tuple[int, int]], shift: int, heads: int):
    rates = [*itertools.accumulate((r for _, r in steps), math.lcm)]
    lengths = [*itertools.accumulate((w * r for (w, _), r in zip(steps, rates, strict=True)), math.lcm)]
    pattern = rh.DilatedPattern(tuple(lengths[::-1]), tuple(rates[::-1]), head_shift=shift)
    (chain,) = chains(pattern, heads)
    assert nested(pattern) == chain.branches == tuple(rh.Branch(w, r) for w, r in zip(lengths, rates, strict=True))
    assert chain.offsets == tuple(tuple((head + shift) % r for head in range(heads)) for r in rates)
    assert isinstance(chain, Chain)
