# SPDX-License-Identifier: Apache-2.0
"""Heads for rows: which heads are whose, what they compute, and the plug for DeepSpeed's DistributedAttention."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

import ring_hilbert as rh
from ring_hilbert.parallel.heads import head_shares
from tests.harness.cases import Case, assert_close, patterns
from tests.harness.ranks import run_ranks

PATTERN = rh.DilatedPattern((16, 48, None), (1, 3, 5), head_shift=2)


@given(st.integers(1, 12), st.integers(1, 5), st.data())
@settings(max_examples=200, deadline=None)
def test_every_head_is_on_one_rank_with_its_kv_head(kv_heads: int, group: int, data: st.DataObject):
    heads = kv_heads * group
    world = data.draw(st.integers(1, heads))
    shares = head_shares(heads, kv_heads, world)
    assert [h for share in shares for h in share.heads] == list(range(heads))
    for share in shares:
        assert len(share.heads) >= 1
        assert {h // group for h in share.heads} == set(share.kv_heads)
        assert len(share.heads) % len(share.kv_heads) == 0
    if world <= kv_heads:
        assert sum(len(share.kv_heads) for share in shares) == kv_heads  # none is replicated


def test_more_ranks_than_heads():
    with pytest.raises(ValueError, match="there are 5 ranks and only 4 heads"):
        head_shares(4, 2, 5)


@given(patterns(40), st.integers(2, 6), st.data())
@settings(max_examples=60, deadline=None)
def test_a_slice_of_the_heads_is_that_slice_of_the_result(
    pattern: rh.DilatedPattern, kv_heads: int, data: st.DataObject
):
    """With the rule of both kinds, through the reference and through the operator."""
    first = data.draw(st.integers(0, kv_heads - 1))
    count = data.draw(st.integers(1, kv_heads - first))
    x = Case(pattern, 37, 1, 2 * kv_heads, kv_heads, 4).tensors()
    whole, _ = rh.reference.dilated_attention(x["q"], x["k"], x["v"], pattern)
    heads, kv = slice(2 * first, 2 * (first + count)), slice(first, first + count)
    part = x["q"][:, :, heads], x["k"][:, :, kv], x["v"][:, :, kv]
    for call in (lambda *a: rh.reference.dilated_attention(*a)[0], rh.dilated_attention):
        torch.testing.assert_close(
            call(*part, pattern.for_heads(first, kv_heads)), whole[:, :, heads], rtol=0, atol=1e-10
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PATTERN.for_heads(4, 4), "0 <= first < total"),
        (lambda: PATTERN.for_heads(0, 4).for_heads(0, 2), "already a pattern of some heads"),
        (lambda: PATTERN.for_heads(3, 4).residues(PATTERN.branches[1], 2), "2 kv heads from head 3 on"),
    ],
)
def test_heads_that_are_not_there(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()


class Exchanged(torch.autograd.Function):
    """Heads for rows, as a library does it: `[B, S_local, H, D]` as `[B, S, H / P, D]`, or back."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, to_heads: bool) -> torch.Tensor:  # noqa: D102
        ctx.to_heads, world = to_heads, dist.get_world_size()
        cut, joined = (2, 1) if to_heads else (1, 2)
        parts = torch.stack(x.chunk(world, dim=cut))
        buffer = torch.empty_like(parts)
        dist.all_to_all_single(buffer, parts)
        return torch.cat(list(buffer), dim=joined)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):  # noqa: D102
        return Exchanged.apply(gradient, not ctx.to_heads), None


def _distributed_attention(rank: int, world: int, real: bool):
    case = Case(PATTERN, 64, 1, 8, 4, 8)
    x = {name: tensor.chunk(world, dim=1)[rank].clone() for name, tensor in case.tensors().items()}
    q, k, v = (x[name].requires_grad_() for name in "qkv")
    local = rh.UlyssesAttention(PATTERN, dist.group.WORLD, 8, 4)
    if real:
        import deepspeed
        from deepspeed.sequence.layer import DistributedAttention

        deepspeed.init_distributed("gloo")
        out = DistributedAttention(local, dist.group.WORLD)(q, k, v, 0)
    else:
        out = Exchanged.apply(local(*(Exchanged.apply(t, True) for t in (q, k, v))), False)
    out.backward(x["dout"])
    return {"out": out.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}


@pytest.mark.parametrize("real", [False, pytest.param(True, id="deepspeed")])
@pytest.mark.parametrize("world", [2, 4])
def test_the_plug_for_distributed_attention(world: int, real: bool):
    if real:
        pytest.importorskip("deepspeed", reason="the deepspeed extra is not installed")
    parts = run_ranks(_distributed_attention, world, real)
    expected = Case(PATTERN, 64, 1, 8, 4, 8).expected()
    expected.pop("lse")
    assert_close({name: torch.cat([part[name] for part in parts], dim=1) for name in expected}, expected)


def test_wrong_heads_and_axes():
    layer = rh.UlyssesAttention(PATTERN, None, 4, 2, batch_dim=1)
    q, k = torch.randn(2, 16, 4, 8), torch.randn(2, 16, 2, 8)
    expected = rh.dilated_attention(q, k, k, PATTERN)
    rows_first = layer(*(x.transpose(0, 1) for x in (q, k, k)))
    torch.testing.assert_close(rows_first.transpose(0, 1), expected)
    prepared = rh.prepare(16, causal=False)
    torch.testing.assert_close(
        layer(*(x.transpose(0, 1) for x in (q, k, k)), prepared=prepared).transpose(0, 1),
        rh.dilated_attention(q, k, k, PATTERN, causal=False),
    )
    with pytest.raises(ValueError, match="this rank has 4"):
        layer(*(x.transpose(0, 1) for x in (k, k, k)))
    with pytest.raises(ValueError, match="multiple of num_kv_heads=3"):
        rh.UlyssesAttention(PATTERN, None, 4, 3)
    with pytest.raises(ValueError, match="batch_dim must be 0 or 1"):
        rh.UlyssesAttention(PATTERN, None, 4, 2, batch_dim=2)
