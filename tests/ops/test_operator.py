# SPDX-License-Identifier: Apache-2.0
"""The operator on one device against its definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import SearchStrategy

import ring_hilbert as rh
from tests.harness.cases import Case, assert_close, cases, counting_cases, interpreted, replace

LONGNET = rh.DilatedPattern((16, 32, None), (1, 2, 5))


@pytest.mark.parametrize(
    ("kind", "examples"),
    [
        (cases(), 150),
        (counting_cases(), 40),
        pytest.param(cases(max_length=160), 3000, marks=pytest.mark.full),
        pytest.param(counting_cases(max_length=160), 1500, marks=pytest.mark.full),
    ],
    ids=["any", "counting", "any-long", "counting-long"],
)
def test_float64_equals_the_reference(kind: SearchStrategy[Case], examples: int):
    @given(kind)
    @settings(max_examples=examples, deadline=None)
    def equals(case: Case):
        assert_close(case.actual(), case.expected())

    equals()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("seq_len", [1, 63, 113, 1023])
def test_tiles_are_cut_anywhere(causal: bool, seq_len: int):
    """Lengths around the tile sizes, more rows than one tile, GQA."""
    pattern = rh.DilatedPattern((300, 512, None), (1, 3, 2), segment_shift=17)
    case = Case(pattern, seq_len, 1, 4, 2, 8, causal, documents="shared" if seq_len == 113 else "none")
    assert_close(case.actual(), case.expected())


def test_logits_of_ten_thousand():
    case = Case(LONGNET, 70, 2, 4, 2, 8, logit_scale=1e4)
    tensors = case.tensors()
    largest = (tensors["q"][:, :, 0] @ tensors["k"][:, :, 0].mT).abs().max() * 8**-0.5
    assert largest > 1e4
    assert_close(case.actual(), case.expected())


def test_rows_without_a_key_are_zero():
    """Head 1 of a pattern with r = 2 owns odd rows only; padding rows see nothing."""
    case = Case(rh.DilatedPattern((8,), (2,)), 16, documents="padding")
    x = case.tensors()
    q, k, v = (x[name].requires_grad_() for name in "qkv")
    out, lse = rh.dilated_attention(q, k, v, case.pattern, return_lse=True, **case.facts())
    out.sum().backward()
    blind = torch.tensor([[row % 2 != head or row >= 11 for row in range(16)] for head in range(2)])
    assert torch.equal(lse[0] == float("-inf"), blind)
    assert (out[0].transpose(0, 1)[blind] == 0).all() and (q.grad[0].transpose(0, 1)[blind] == 0).all()


def test_a_dense_branch_is_ordinary_attention():
    x = Case(rh.DilatedPattern((None,), (1,)), 50, 2, 4, 4, 8).tensors()
    heads_first = (x[name].transpose(1, 2) for name in "qkv")
    expected = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(rh.dilated_attention(x["q"], x["k"], x["v"], rh.DilatedPattern((None,), (1,))), expected)


def test_a_duplicate_branch_changes_nothing_alone_but_weighs_twice_beside_another():
    once, twice = Case(rh.DilatedPattern((8,), (1,)), 24), Case(rh.DilatedPattern((8, 8), (1, 1)), 24)
    beside = Case(rh.DilatedPattern((8, 8, 24), (1, 1, 1)), 24)
    assert_close({"out": twice.actual()["out"]}, {"out": once.actual()["out"]})
    assert (beside.actual()["out"] - Case(rh.DilatedPattern((8, 24), (1, 1)), 24).actual()["out"]).abs().max() > 1e-3
    assert_close(beside.actual(), beside.expected())


def test_reference_passes_gradcheck():
    case = Case(rh.DilatedPattern((6, 10), (1, 2), segment_shift=1), 11, 1, 2, 1, 3, documents="padding")
    x = case.tensors()
    inputs = tuple(x[name].requires_grad_() for name in "qkv")

    def attention(q, k, v):
        out, lse = rh.reference.dilated_attention(q, k, v, case.pattern, **case.facts())
        return out, torch.where(lse == float("-inf"), 0.0, lse)

    assert torch.autograd.gradcheck(attention, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sigma", [1.0, 16.0])
@pytest.mark.parametrize("causal", [True, False])
def test_low_precision_is_as_good_as_eager(dtype: torch.dtype, sigma: float, causal: bool):
    """Against float64 on the same inputs: max error at most 2x, mean at most 1.5x that of eager autograd in that dtype."""
    case = Case(rh.DilatedPattern((128, 256, 600), (1, 2, 4)), 600, 1, 4, 2, 32, causal, logit_scale=sigma)
    exact = case.expected(torch.float64, inputs=dtype)
    ours, eager = case.actual(dtype), case.expected(dtype)
    for name, truth in exact.items():
        covered = truth != float("-inf")
        error, allowed = ((run[name].double() - truth)[covered].abs() for run in (ours, eager))
        assert error.max() <= 2 * allowed.max(), name
        assert error.mean() <= 1.5 * allowed.mean(), name


def test_memory_is_linear():
    """Four times the rows of the longest branch must not take sixteen times the largest intermediate."""

    def largest(seq_len: int) -> int:
        x = Case(rh.DilatedPattern((None,), (1,)), seq_len, 1, 1, 1, 4).tensors(torch.float32)
        with LargestTensor() as seen:
            q = x["q"].requires_grad_()
            rh.dilated_attention(q, x["k"], x["v"], rh.DilatedPattern((None,), (1,))).sum().backward()
        return seen.elements

    assert largest(8192) <= 4 * largest(2048)


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the size of the largest tensor any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes())
        return result


class Operators(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the names of the operators that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.names = list[str]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


# ---- interface


def test_modes_see_one_operator():
    """And the results are those of a call that nothing but autograd sees."""
    case = Case(LONGNET, 70, heads=4)
    direct = case.actual()
    with Operators() as seen:
        assert_close(case.actual(), direct, 0.0)
    ours = [name for name in seen.names if name.startswith("ring_hilbert")]
    assert ours == ["ring_hilbert.attention.default", "ring_hilbert.attention_backward.default"]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_tensors_that_are_not_what_lies_in_memory(backend: str):
    """Lazily negated ones, as input and as gradient; a gradient that is lazily zero or missing."""
    interpreted(backend)
    case = Case(LONGNET, 40, heads=2, head_dim=8)
    q, k, v, dout = (case.tensors(torch.float32)[name] for name in ("q", "k", "v", "dout"))

    def results(*lazy: torch.Tensor) -> list[torch.Tensor]:
        inputs = [x.detach().requires_grad_() for x in lazy[:3]]
        out = rh.dilated_attention(*inputs, LONGNET, backend=backend)
        return [out, *torch.autograd.grad(out, inputs, lazy[3])]

    negated = [torch._neg_view(x.neg()) for x in (q, k, v, dout)]
    assert all(x.is_neg() for x in negated)
    expected = results(q, k, v, dout)
    for at in range(4):
        mixed = [negated[i] if i == at else x for i, x in enumerate((q, k, v, dout))]
        assert all(map(torch.equal, results(*mixed), expected)), at
    assert all((x == 0).all() for x in results(q, k, v, torch._efficientzerotensor(q.shape))[1:])

    class NoGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dout):
            return None

    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    NoGradient.apply(rh.dilated_attention(*inputs, LONGNET, backend=backend)).sum().backward()
    assert all(x.grad is not None and (x.grad == 0).all() for x in inputs)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast(backend: str, compiled: bool):
    """float32 under autocast is the same as bfloat16 without it, to the bit, with gradients in float32; float64 stays."""
    interpreted(backend)
    case = Case(rh.DilatedPattern((16, 64), (1, 4)), 70, heads=4, head_dim=16)
    x = case.tensors(torch.float32)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return rh.dilated_attention(q, k, v, case.pattern, backend=backend)

    function = torch.compile(attend, fullgraph=True, backend="aot_eager") if compiled else attend
    mine = [x[name].clone().requires_grad_() for name in "qkv"]
    with torch.autocast("cpu", torch.bfloat16):
        out = function(*mine)
        assert out.dtype == torch.bfloat16
        out.backward(x["dout"].bfloat16())
        if backend == "torch":
            wide = [x[name].double() for name in "qkv"]
            assert torch.equal(attend(*wide), rh.dilated_attention(*wide, case.pattern, backend=backend))
            assert attend(*wide).dtype == torch.float64
    lower = [x[name].bfloat16().requires_grad_() for name in "qkv"]
    expected = attend(*lower)
    expected.backward(x["dout"].bfloat16())
    assert torch.equal(out, expected)
    for one, other in zip(mine, lower, strict=True):
        assert one.grad is not None and other.grad is not None
        assert one.grad.dtype == torch.float32 and torch.equal(one.grad, other.grad.float())


def test_lse_is_returned_but_carries_no_gradient():
    x = Case(LONGNET, 20).tensors()
    out, lse = rh.dilated_attention(x["q"].requires_grad_(), x["k"], x["v"], LONGNET, return_lse=True)
    assert out.requires_grad and not lse.requires_grad


def test_double_backward_says_so():
    x = Case(LONGNET, 20).tensors()
    q = x["q"].requires_grad_()
    (dq,) = torch.autograd.grad(rh.dilated_attention(q, x["k"], x["v"], LONGNET).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        dq.sum().backward()


def test_strided_inputs():
    """[B, H, S, D] tensors seen through transpose(1, 2), as Transformers passes them."""
    case = Case(LONGNET, 40, 2, 4, 2, 8)
    x = case.tensors()
    strided = [x[name].transpose(1, 2).contiguous().transpose(1, 2) for name in "qkv"]
    torch.testing.assert_close(
        rh.dilated_attention(*strided, LONGNET),
        rh.dilated_attention(x["q"], x["k"], x["v"], LONGNET),
        rtol=0,
        atol=1e-13,
    )


def _call(**changes):
    case = Case(LONGNET, 24, 2, 4, 2, 8)
    x = case.tensors(torch.float32)
    arguments = {"q": x["q"], "k": x["k"], "v": x["v"], "pattern": LONGNET} | changes
    return rh.dilated_attention(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(2, 24, 4)}, r"q must be \[B, S, H, D\], got \[2, 24, 4\]"),
        ({"k": torch.zeros(2, 23, 2, 8)}, r"k must be \[B=2, S=24, Hkv, D=8\] to fit q, got \[2, 23, 2, 8\]"),
        ({"v": torch.zeros(2, 2, 24, 8)}, r"transpose\(1, 2\)"),
        ({"k": torch.zeros(2, 24, 2, 8).double()}, "dtype of q"),
        ({"k": torch.zeros(2, 24, 3, 8), "v": torch.zeros(2, 24, 3, 8)}, "Hkv=3; the nearest that fits is 2"),
        ({"v": torch.zeros(2, 24, 4, 8)}, "same number of heads"),
        ({"pattern": (16, 1)}, "must be a DilatedPattern"),
        ({"positions": torch.arange(23)}, r"positions must be \[24\] or \[2, 24\]"),
        ({"positions": torch.tensor(3)}, r"positions must be \[24\] or \[2, 24\]"),
        ({"positions": torch.arange(24.0)}, "integers"),
        ({"positions": torch.zeros(3, 24, dtype=torch.long)}, r"\[24\] or \[2, 24\]"),
        ({"document_ids": torch.full((24,), -2)}, "-1 for padding"),
        ({"order": "hilbert"}, "order must be a TokenOrder or None, got str"),
        ({"strategy": "rings"}, "strategy='rings' is not supported"),
        ({"layout": "stripes"}, "layout='stripes' is not supported"),
        ({"backend": "cuda"}, "backend='cuda' is not supported"),
        ({"scale": float("nan")}, "finite"),
    ],
)
def test_mistakes_are_named(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        _call(**changes)


def test_prepared_stands_for_its_facts():
    documents = torch.tensor([0] * 10 + [1] * 14)
    prepared = rh.prepare(24, document_ids=documents, causal=False)
    torch.testing.assert_close(_call(prepared=prepared), _call(document_ids=documents, causal=False))
    with pytest.raises(ValueError, match="causal=True disagrees with prepared"):
        _call(prepared=prepared, causal=True)
    with pytest.raises(ValueError, match="belong in prepare"):
        _call(prepared=prepared, document_ids=documents)
    with pytest.raises(ValueError, match="22 rows that prepared says"):
        _call(prepared=rh.prepare(22))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((), ()), "empty"),
        (((4, 8), (1,)), "one dilation rate per segment length"),
        (((4,), (5,)), "1 <= r <= segment length 4"),
        (((4,), (0,)), "dilation_rates"),
        (((4.0,), (1,)), "positive integer or None"),
        (((4,), (1,), "other"), "'modulo' or 'block'"),
        (((4,), (2,), "block", 1), "head_shift=1 needs"),
        (((4,), (2,), "modulo", 0, 1.5), "segment_shift must be an integer"),
    ],
)
def test_impossible_patterns_are_named(arguments: tuple, message: str):
    with pytest.raises(ValueError, match=message):
        rh.DilatedPattern(*arguments)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_nothing_may_see_reaches_nothing(backend: str, value: float):
    """NaN and Inf in K and V of padding rows, wherever these are: out and gradients of real rows are as with zeros there."""
    interpreted(backend)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 48, 2, 16, generator=generator) for _ in range(3))
    documents = torch.zeros(2, 48, dtype=torch.int64)
    documents[0, 40:], documents[1, 20:30] = -1, -1
    results = []
    for fill in (0.0, value):
        x = [q, *(t.masked_fill((documents == -1)[..., None, None], fill) for t in (k, v))]
        x = [t.clone().requires_grad_() for t in x]
        out = rh.dilated_attention(*x, LONGNET, document_ids=documents, backend=backend)
        results.append([out, *torch.autograd.grad(out, x, torch.ones_like(out))])
    for zero, filled in zip(*results, strict=True):
        assert torch.equal(zero, filled) and torch.isfinite(filled).all()


def test_forward_mode_is_an_error_and_not_zero():
    q, k, v, t = (torch.randn(1, 24, 2, 8) for _ in range(4))
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: rh.dilated_attention(q, x, v, LONGNET), (k,), (t,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
        rh.dilated_attention(torch.autograd.forward_ad.make_dual(q, t), k, v, LONGNET)


@pytest.mark.parametrize("causal", [True, False])
def test_an_order_of_coordinates(causal: bool):
    """With a token before the tiles, and some tiles in one place."""
    at = torch.randint(0, 9, (40, 2), generator=torch.Generator().manual_seed(0))
    order = rh.TokenOrder.from_coordinates("hilbert", at, leading=1)
    case = Case(rh.DilatedPattern((8, None), (1, 3)), 41, 2, causal=causal, order=order)
    assert_close(case.actual(), case.expected())
    with pytest.raises(ValueError, match="length=40 but this order from coordinates has 41 tokens"):
        replace(case, seq_len=40).actual()
    batch = rh.shard_batch({"input_ids": torch.arange(41)[None]}, order=order, causal=causal)
    assert torch.equal(batch["input_ids"][0], order.permutation(41))
