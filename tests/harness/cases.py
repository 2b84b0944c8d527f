# SPDX-License-Identifier: Apache-2.0
"""Random cases of the operator, and the reference's answer to them: shared by the tests of one device and of ranks."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import Any, TypedDict, get_args

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import ring_hilbert as rh
from ring_hilbert.ops.pattern import OffsetRule


class Facts(TypedDict):
    """What the rows of a whole sequence know, `[S]` or `[B, S]`."""

    positions: Tensor | None
    document_ids: Tensor | None


@dataclass(frozen=True)
class Case:
    """One problem; `facts` is what the rows know: "plain", "ties", "per-batch", "documents", "padding" or combinations."""

    pattern: rh.DilatedPattern
    seq_len: int
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 4
    causal: bool = True
    order: rh.TokenOrder | None = None
    positions: str = "default"  # default | shuffled | ties | per-batch
    documents: str = "none"  # none | shared | per-batch | padding
    logit_scale: float = 1.0
    seed: int = 0

    def tensors(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """q, k, v and the gradient of out."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(heads: int, scale: float = 1.0) -> Tensor:
            shape = (self.batch, self.seq_len, heads, self.head_dim)
            return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

        factor = self.logit_scale**0.5
        return {
            "q": normal(self.heads, factor),
            "k": normal(self.kv_heads, factor),
            "v": normal(self.kv_heads),
            "dout": normal(self.heads),
        }

    def facts(self) -> Facts:
        """`positions` and `document_ids` of the whole sequence."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        rows, batch = self.seq_len, self.batch
        positions = {
            "default": lambda: None,
            "shuffled": lambda: torch.randperm(rows, generator=generator) * 3 - 7,
            "ties": lambda: torch.randint(0, max(2, rows // 3), (rows,), generator=generator),
            "per-batch": lambda: torch.randint(-5, rows, (batch, rows), generator=generator),
        }[self.positions]()
        documents = {
            "none": lambda: None,
            "shared": lambda: torch.randint(0, 3, (rows,), generator=generator).sort().values,
            "per-batch": lambda: torch.randint(-1, 3, (batch, rows), generator=generator),
            "padding": lambda: torch.where(torch.arange(rows) < rows - rows // 3, 0, -1),
        }[self.documents]()
        return {"positions": positions, "document_ids": documents}

    def expected(self, dtype: torch.dtype = torch.float64, inputs: torch.dtype | None = None) -> dict[str, Tensor]:
        """out, lse, dq, dk, dv of the reference, by eager autograd in `dtype` on the tensors as `inputs` holds them."""
        x = {name: value.to(dtype) for name, value in self.tensors(inputs or dtype).items()}
        q, k, v = (x[name].requires_grad_() for name in "qkv")
        out, lse = rh.reference.dilated_attention(
            q, k, v, self.pattern, causal=self.causal, order=self.order, **self.facts()
        )
        out.backward(x["dout"])
        return {"out": out.detach(), "lse": lse.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}  # type: ignore[dict-item]

    def actual(self, dtype: torch.dtype = torch.float64, backend: str = "auto") -> dict[str, Tensor]:
        """The same from the operator on one device."""
        x = self.tensors(dtype)
        q, k, v = (x[name].requires_grad_() for name in "qkv")
        out, lse = rh.dilated_attention(
            q,
            k,
            v,
            self.pattern,
            causal=self.causal,
            order=self.order,
            backend=backend,
            return_lse=True,
            **self.facts(),
        )
        out.backward(x["dout"])
        return {"out": out.detach(), "lse": lse, "dq": q.grad, "dk": k.grad, "dv": v.grad}  # type: ignore[dict-item]


def interpreted(backend: str) -> None:
    """Have the kernels of a backend take CPU tensors; skip the test where they cannot."""
    if backend == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("of CPU tensors, which only the interpreter takes")
        import tests.harness.interpreter  # noqa: F401


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float = 1e-10) -> None:
    """Every tensor within `bound * max(1, max|expected|)`, the same rows uncovered, nothing NaN."""
    for name, want in expected.items():
        got = actual[name]
        assert got.shape == want.shape and got.dtype == want.dtype, f"{name}: {got.shape} {got.dtype}"
        uncovered = want == float("-inf")
        assert torch.equal(got == float("-inf"), uncovered), f"{name}: other rows uncovered"
        got, want = got.masked_fill(uncovered, 0), want.masked_fill(uncovered, 0)
        assert torch.isfinite(got).all(), f"{name}: not finite"
        error, size = (
            (got - want).abs().max().item() if got.numel() else 0.0,
            want.abs().max().item() if want.numel() else 0.0,
        )
        assert error <= bound * max(1.0, size), f"{name}: error {error:.3e} for values up to {size:.3e}"


@st.composite
def patterns(draw: st.DrawFn, max_length: int) -> rh.DilatedPattern:
    """Patterns in which nothing needs to divide anything."""
    lengths, rates = [], []
    for _ in range(draw(st.integers(1, 3))):
        w = draw(st.one_of(st.integers(1, max_length + 5), st.none()))
        lengths.append(w)
        rates.append(draw(st.integers(1, min(w or 12, 12))))
    rule = draw(st.sampled_from(get_args(OffsetRule)))
    head_shift = draw(st.integers(-3, 5)) if rule == "modulo" else 0
    return rh.DilatedPattern(tuple(lengths), tuple(rates), rule, head_shift, draw(st.sampled_from([0, 0, 1, 5, -2])))


@st.composite
def counting_patterns(draw: st.DrawFn, max_length: int) -> rh.DilatedPattern:
    """Patterns of 2 to 4 branches with weights, and nested ones, with or without, that may count pairs once."""
    dice = random.Random(draw(st.integers(0, 2**32)))  # most that hypothesis draws by itself have a single branch
    number = dice.randint(2, 4)
    how: dict[str, Any] = {"weights": tuple(dice.randint(1, 9) for _ in range(number))}
    branches = dict[tuple[int | None, int], None]()
    if dice.random() < 0.3:
        while len(branches) < number:
            length = dice.choice([None, *range(1, max_length + 6)])
            branches[length, dice.randint(1, min(length or 12, 12))] = None
    else:
        inner, w, r = 1, dice.randint(1, 4), 1
        while len(branches) < number:
            inner, r = w, r * dice.choice([1, 2, 2, 3])
            w = math.lcm(inner * dice.choice([1, 2, 3]), r)
            w *= 1 + ((w, r) in branches)
            branches[w, r] = None
        del branches[w, r]
        last = dice.choice([None, w, inner * (r // inner + 1)])  # the last rate need not divide its length
        branches[w if (last, r) in branches else last, r] = None
        how = dice.choice([{"count": "once"}, how | {"count": "once"}, how])
    if "count" not in how and dice.random() < 0.3:
        how |= {"offset_rule": "block"}
    else:
        how |= {"head_shift": dice.randint(-2, 4)}
    lengths, rates = zip(*dice.sample(list(branches), number), strict=True)
    return rh.DilatedPattern(lengths, rates, segment_shift=dice.randint(-9, 9), **how)


@st.composite
def cases(draw: st.DrawFn, max_length: int = 48, orders: bool = True) -> Case:
    """Cases over (S, w, r, H, Hkv, rule, shifts, causal, order, positions, documents)."""
    seq_len = draw(st.integers(1, max_length))
    kv_heads = draw(st.integers(1, 5))
    order = None
    if orders and draw(st.booleans()):
        curve = draw(st.sampled_from(["hilbert", "morton", "peano", "snake", "raster"]))
        order = rh.TokenOrder(curve, block=draw(st.integers(1, max_length)))
    return Case(
        draw(patterns(seq_len)), seq_len, draw(st.integers(1, 2)), kv_heads * draw(st.integers(1, 2)), kv_heads,
        draw(st.sampled_from([1, 4, 8])), draw(st.booleans()), order,
        draw(st.sampled_from(["default", "default", "shuffled", "ties", "per-batch"])),
        draw(st.sampled_from(["none", "none", "shared", "per-batch", "padding"])),
        draw(st.sampled_from([1.0, 1.0, 30.0])), draw(st.integers(0, 2**16)),
    )  # fmt: skip


@st.composite
def counting_cases(draw: st.DrawFn, max_length: int = 48, orders: bool = True) -> Case:
    """Cases whose pairs do not all count once per branch."""
    return replace(draw(cases(max_length, orders)), pattern=draw(counting_patterns(max_length)))


__all__ = ["Case", "assert_close", "cases", "counting_cases", "counting_patterns", "patterns", "replace"]
