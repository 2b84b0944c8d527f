# SPDX-License-Identifier: Apache-2.0
"""The older interface: every name equals the definition, and no defect of the older classes comes back."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from itertools import product
from math import isqrt, prod

import numpy as np
import pytest
import torch
import torch._dynamo
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import ring_hilbert as rh
from ring_hilbert import compat
from ring_hilbert.ops import order as order_module
from ring_hilbert.ops.curves import CURVES
from tests.harness.cases import assert_close
from tests.harness.ranks import run_ranks, run_ranks_collect
from tests.ops.test_order import BOXES, RECTANGLES, step_lengths

ROWS, HIDDEN, HEADS = 45, 12, 3
LENGTHS, RATES = (8, 16, None), (1, 2, 3)
PATTERN = rh.DilatedPattern(LENGTHS, RATES)
ONE_BRANCH = rh.DilatedPattern((16,), (2,))
CORES = [name for name in compat.ALIASES if name != "HilbertAttentionTritonFixed"]


def alias(name: str) -> Callable[..., nn.Module]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return getattr(compat, name)


def core(name: str = "HilbertAttentionCore", **changes) -> nn.Module:
    make = compat.HilbertAttentionCore if name == "HilbertAttentionCore" else alias(name)
    arguments = {"hidden_dim": HIDDEN, "num_heads": HEADS, "segment_size": 16, "dilation_rate": 2} | changes
    return make(**arguments).double()


def wrapper(name: str = "HilbertAttentionTritonWrapper", **changes) -> nn.Module:
    make = compat.HilbertAttentionTritonWrapper if name == "HilbertAttentionTritonWrapper" else alias(name)
    arguments = {"segment_lengths": LENGTHS, "dilation_rates": RATES, "num_heads": HEADS, "head_dim": HIDDEN // HEADS}
    return make(**(arguments | changes)).double()


def created(kind: str, **changes) -> nn.Module:
    return compat.create_multihead_dilated_attention(
        kind, HIDDEN, HEADS, LENGTHS, RATES, dtype=torch.float64, **changes
    )


CORE_NAMES = ["HilbertAttentionCore", "HilbertAttentionTritonFixed", *CORES]
WRAPPER_NAMES = ["HilbertAttentionTritonWrapper", "HilbertAttentionTritonFixed"]
KINDS = {"standard": {}, "hilbert": {}, "auto": {}, "ring": {"group": None}}
NAMES = (
    [("core", name) for name in CORE_NAMES]
    + [("wrapper", name) for name in WRAPPER_NAMES]
    + [("created", kind) for kind in KINDS]
)


def build(family: str, name: str, hilbert: bool = True) -> nn.Module:
    torch.manual_seed(0)
    if family != "created":
        return core(name) if family == "core" else wrapper(name)
    order = (
        {"order": rh.TokenOrder("hilbert" if hilbert else "raster", block=ROWS)} if name in ("hilbert", "ring") else {}
    )
    if name == "hilbert" and hilbert:
        order = {}
    return created(name, **KINDS[name], **order)


def inputs(family: str, rows: int = ROWS, seed: int = 1) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, rows, HEADS, HIDDEN // HEADS) if family == "wrapper" else (2, rows, HIDDEN)
    return tuple(
        torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(1 if family == "core" else 3)
    )


def by_definition(module, family: str, x: tuple[Tensor, ...], causal: bool, order: rh.TokenOrder | None) -> Tensor:
    """What `module` is to compute, in the plainest words: its projections around the reference."""
    heads = (HEADS, HIDDEN // HEADS)
    if family == "core":
        q, k, v = (y.unflatten(-1, heads) for y in F.linear(x[0], module.qkv_proj.weight).split(HIDDEN, -1))
        out, _ = rh.reference.dilated_attention(q, k, v, ONE_BRANCH, causal=causal, order=order)
        return module.out_proj(out.flatten(2))
    projected = [p(y.flatten(2)) for p, y in zip((module.q_proj, module.k_proj, module.v_proj), x, strict=True)]
    if family == "wrapper":
        inner = module.attention.qkv_proj.weight.split(HIDDEN)
        projected = [F.linear(y, weight) for y, weight in zip(projected, inner, strict=True)]
    q, k, v = (y.unflatten(-1, heads) for y in projected)
    out, _ = rh.reference.dilated_attention(q, k, v, PATTERN, causal=causal, order=order)
    if family == "wrapper":
        return module.out_proj(module.attention.out_proj(out.flatten(2))).unflatten(-1, heads)
    return module.out_proj(out.flatten(2))


def results(module: nn.Module, call: Callable[..., Tensor], x: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The output and the gradients of its weighted sum with respect to the inputs and the parameters."""
    x = tuple(y.clone().requires_grad_() for y in x)
    module.zero_grad()
    out = call(*x)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    gradients = {f"x{i}": y.grad for i, y in enumerate(x)} | {n: p.grad for n, p in module.named_parameters()}
    return {"out": out.detach()} | {name: g.clone() for name, g in gradients.items() if g is not None}


def options(family: str, hilbert: bool, causal: bool) -> dict[str, bool]:
    return {"core": {"use_hilbert": hilbert}, "created": {"is_causal": causal}}.get(
        family, {"use_hilbert": hilbert, "is_causal": causal}
    )


# ---- every name


@pytest.mark.parametrize("hilbert", [True, False])
@pytest.mark.parametrize(("family", "name"), NAMES)
def test_every_name_equals_the_definition(family: str, name: str, hilbert: bool):
    module, x = build(family, name, hilbert), inputs(family)
    curved = hilbert and (family, name) not in (("created", "standard"), ("created", "auto"))
    order = rh.TokenOrder("hilbert", block=ROWS) if curved else None
    for causal in (False,) if family == "core" else (False, True):
        given = options(family, hilbert, causal)
        got = results(module, lambda *y, given=given: module(*y, **given), x)
        want = results(module, lambda *y, causal=causal: by_definition(module, family, y, causal, order), x)
        assert got.keys() == want.keys() and len(got) == 1 + len(x) + len(list(module.parameters()))
        assert_close(got, want)


@pytest.mark.parametrize("hilbert", [True, False])
@pytest.mark.parametrize("make", [core, wrapper])
def test_the_debug_switch_is_the_same_function(make: Callable, hilbert: bool):
    fast, slow = make(), make(use_custom_backward=False)
    slow.load_state_dict(fast.state_dict())
    x = inputs(make.__name__)
    got, want = (results(m, lambda *y, m=m: m(*y, use_hilbert=hilbert), x) for m in (fast, slow))
    assert_close(got, want)


@pytest.mark.parametrize(("family", "name"), NAMES)
def test_every_name_learns(family: str, name: str):
    module, x = build(family, name), inputs(family)
    target = torch.randn(x[0].shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64) / 4
    optimizer = torch.optim.Adam(module.parameters(), lr=0.03)
    losses = []
    for _ in range(12):
        loss = (module(*x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(("family", "name"), NAMES)
def test_every_name_keeps_its_state(family: str, name: str):
    module, other, x = build(family, name), build(family, name), inputs(family)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    assert not torch.equal(module(*x), other(*x))
    other.load_state_dict(module.state_dict())
    assert torch.equal(module(*x), other(*x))


@pytest.fixture
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_nothing_compiled")
@pytest.mark.parametrize(
    ("family", "name"),
    [("core", "HilbertAttentionCore"), *[("wrapper", n) for n in WRAPPER_NAMES], *[("created", k) for k in KINDS]],
)
def test_compiled_is_eager(family: str, name: str):
    module = build(family, name)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for rows in (ROWS, 30, 22):
        x = inputs(family, rows)
        assert_close(results(module, compiled, x), results(module, module, x), 1e-13)


@pytest.mark.usefixtures("_nothing_compiled")
def test_mappings_are_constants_of_compiled_code():
    compiled = torch.compile(lambda x: x[compat.create_hilbert_mapping(16)], fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.arange(16)), compat.create_hilbert_mapping(16))


def test_dropout_acts_on_the_output():
    module = core(dropout=0.5)
    x = inputs("core")
    expected = module.eval()(*x)
    out = module.train()(*x)
    dropped = out == 0
    assert 0.3 < dropped.double().mean() < 0.7
    torch.testing.assert_close(out[~dropped], 2 * expected[~dropped], rtol=0, atol=1e-12)
    plain, dropping = created("standard").eval(), created("standard", dropout=1.0)
    dropping.load_state_dict(plain.state_dict())
    assert torch.equal(dropping.eval()(*x), plain(*x)) and not dropping.train()(*x).any()
    assert not wrapper(dropout=1.0)(*inputs("wrapper")).any()


# ---- ranks


def _shares(world: int, block: int) -> list[int]:
    """Rows of every rank: uneven, each boundary a multiple of `block`."""
    ends = [block * (ROWS // block * (rank + 1) // world) for rank in range(world - 1)] + [ROWS]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _ring(rank: int, world: int, curve: str | None, causal: bool, compiled: bool) -> tuple[Tensor, dict[str, Tensor]]:
    order = rh.TokenOrder(curve, block=8) if curve else None
    torch.manual_seed(0)
    module = created("ring", group=dist.group.WORLD, order=order)
    lengths = _shares(world, 8)
    rows = slice(sum(lengths[:rank]), sum(lengths[: rank + 1]))
    weights = torch.linspace(-1, 1, 2 * ROWS * HIDDEN, dtype=torch.float64).view(2, ROWS, HIDDEN)[:, rows]
    x = tuple(y[:, rows].clone().requires_grad_() for y in inputs("created"))
    mask = (torch.arange(ROWS) > 40).expand(2, -1)[:, rows]
    facts = {"key_padding_mask": mask}
    call: Callable[..., Tensor] = module
    if compiled:
        documents = -mask.long()
        prepared = rh.prepare(lengths[rank], group=dist.group.WORLD, order=order, causal=causal, document_ids=documents)
        facts, call = {"prepared": prepared}, torch.compile(module, fullgraph=True, backend="aot_eager")
    out = call(*x, is_causal=causal, **facts)
    (out * weights).sum().backward()
    gradients = {name: p.grad for name, p in module.named_parameters()}
    return out.detach(), {f"x{i}": y.grad for i, y in enumerate(x)} | gradients  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("curve", "causal", "compiled"),
    [("hilbert", False, False), ("hilbert", True, False), (None, True, False), ("hilbert", True, True)],
)
def test_ring_on_ranks_is_one_rank(curve: str | None, causal: bool, compiled: bool):
    torch.manual_seed(0)
    module = created("ring", group=None, order=rh.TokenOrder(curve, block=8) if curve else None)
    mask = (torch.arange(ROWS) > 40).expand(2, -1)
    want = results(module, lambda *y: module(*y, key_padding_mask=mask, is_causal=causal), inputs("created"))
    for world in (2, 3):
        ranks = run_ranks(_ring, world, curve, causal, compiled)
        got = {"out": torch.cat([out for out, _ in ranks], 1)}
        for name in want.keys() - {"out"}:
            parts = [gradients[name] for _, gradients in ranks]
            got[name] = torch.cat(parts, 1) if name.startswith("x") else torch.stack(parts).sum(0)
        assert_close(got, want)


def _misaligned(rank: int, world: int, order: rh.TokenOrder) -> None:
    created("ring", group=dist.group.WORLD, order=order)(torch.zeros(1, 20 + rank, HIDDEN, dtype=torch.float64))


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (rh.TokenOrder(block=8), "order.block=8 must divide the first row of every rank"),
        (rh.TokenOrder(grid=(1, 41)), "shard_batch"),
    ],
)
def test_an_order_that_ranks_cannot_have_is_an_error_on_all(order: rh.TokenOrder, message: str):
    errors = run_ranks_collect(_misaligned, 2, order)
    assert all(isinstance(error, ValueError) and message in str(error) for error in errors)


# ---- defects of the older classes, each against what can be said without the definition


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of `[B, S, H, D]` among all rows, by torch."""
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def heads_of(module: nn.Module, x: Tensor, segment: int) -> Tensor:
    """The core's output in raster with rate 1, segment by segment, by torch."""
    q, k, v = module.qkv_proj(x).unflatten(-1, (3, module.num_heads, module.head_dim)).unbind(2)
    rows = [slice(i, i + segment) for i in range(0, x.shape[1], segment)]
    return module.out_proj(torch.cat([dense(q[:, s], k[:, s], v[:, s]) for s in rows], 1).flatten(2))


def influence(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Which input row reaches which output row: bool `[row out, row in]`."""
    jacobian = torch.autograd.functional.jacobian(lambda y: call(y).square().sum((0, 2)), x)  # [S, 1, S, C]
    assert isinstance(jacobian, Tensor)
    return jacobian.abs().sum((1, 3)) > 1e-14


@pytest.mark.parametrize("logits", [1.0, 30.0])
def test_softmax_is_over_the_keys(logits: float):
    module, (x,) = core(dilation_rate=1), inputs("core", 48)
    module.qkv_proj.weight.data[:HIDDEN] *= logits
    torch.testing.assert_close(module(x, False), heads_of(module, x, 16), rtol=0, atol=1e-10)


def test_outputs_stand_where_their_tokens_do():
    """One segment over all tokens: the order cannot matter, unless rows are left permuted."""
    module, (x,) = core(segment_size=200, dilation_rate=1), inputs("core", 150)
    torch.testing.assert_close(module(x), module(x, False), rtol=0, atol=1e-12)
    assert (compat.create_hilbert_mapping(150) != torch.arange(150)).any()


@pytest.mark.parametrize("rows", [17, 37, 47])
@pytest.mark.parametrize("hilbert", [True, False])
def test_no_token_is_lost_where_segments_do_not_divide_the_length(rows: int, hilbert: bool):
    module, (x,) = core(dilation_rate=1), inputs("core", rows)
    reached = influence(lambda y: module(y, hilbert), x[:1])
    assert reached.diagonal().all()
    segments = sorted(torch.unique(reached.sum(1)).tolist())
    assert segments == sorted({16, rows % 16}) and (reached == reached.T).all()
    assert torch.unique(reached, dim=0).sum(0).eq(1).all()  # every token in exactly one segment


def test_padding_is_not_attended():
    module, (x,) = core(dilation_rate=1), inputs("core", 37)
    torch.testing.assert_close(module(x, False)[:, 32:], heads_of(module, x[:, 32:], 16), rtol=0, atol=1e-12)
    short = core(segment_size=64, dilation_rate=1)
    torch.testing.assert_close(short(x), heads_of(short, x, 64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["standard", "ring"])
def test_masked_keys_are_not_attended(kind: str):
    module, x = created(kind, **KINDS[kind]), inputs("created")
    lengths = torch.tensor([ROWS - 11, ROWS - 4])
    mask = torch.arange(ROWS) >= lengths[:, None]
    out = module(*x, key_padding_mask=mask)
    other = module(*(y.masked_fill(mask[..., None], 7.0) for y in x), key_padding_mask=mask)
    for b, length in enumerate(lengths.tolist()):
        alone = module(*(y[b : b + 1, :length] for y in x))[0]
        torch.testing.assert_close(out[b, :length], alone, rtol=0, atol=1e-12)
        torch.testing.assert_close(other[b, :length], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("custom", [True, False])
@pytest.mark.parametrize("hilbert", [True, False])
def test_backward_is_of_the_function_that_forward_computes(custom: bool, hilbert: bool):
    module, (x,) = core(use_custom_backward=custom, segment_size=5), inputs("core", 13)

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        names = [name for name, _ in module.named_parameters()]
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x, hilbert)).square()

    given = [x[:1].clone().requires_grad_(), *[p.detach().clone().requires_grad_() for p in module.parameters()]]
    assert torch.autograd.gradcheck(function, given, fast_mode=True)


@pytest.mark.parametrize(("head_dim", "dtype"), [(1, 64), (3, 64), (16, 64), (80, 64), (128, 64), (128, 32)])
def test_head_dims_of_any_size(head_dim: int, dtype: int):
    module = core(hidden_dim=2 * head_dim, num_heads=2, dilation_rate=1)
    x = torch.randn(1, 21, 2 * head_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    want = heads_of(module, x, 16)
    got = module(x, False) if dtype == 64 else module.float()(x.float(), False)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-12 if dtype == 64 else 2e-6)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("custom", [True, False])
@pytest.mark.parametrize("hilbert", [True, False])
@pytest.mark.parametrize("make", [core, wrapper])
def test_every_projection_has_a_gradient(make: Callable, hilbert: bool, custom: bool, training: bool):
    module = make(use_custom_backward=custom).train(training)
    got = results(module, lambda *y: module(*y, use_hilbert=hilbert), inputs(make.__name__))
    for name, _ in module.named_parameters():
        for part in got[name].chunk(3 if "qkv" in name else 1):
            assert (part != 0).all(), name


@pytest.mark.parametrize("hilbert", [True, False])
def test_nothing_comes_from_later_tokens(hilbert: bool):
    module = wrapper()

    def call(x: Tensor, causal: bool) -> Tensor:
        x = x.unflatten(-1, (HEADS, -1))
        return module(x, x, x, is_causal=causal, use_hilbert=hilbert).flatten(2)

    (x,) = inputs("core")
    past, both = (influence(lambda y, c=c: call(y, c), x[:1]) for c in (True, False))
    assert torch.equal(past, both.tril())
    assert both.triu(1).any() and both.tril(-1).any()


@pytest.mark.parametrize("hilbert", [True, False])
def test_segments_are_kept_apart(hilbert: bool):
    module, (x,) = core(dilation_rate=1), inputs("core")
    order = compat.create_hilbert_mapping(ROWS) if hilbert else torch.arange(ROWS)
    segment = torch.empty(ROWS, dtype=torch.long).index_copy(0, order, torch.arange(ROWS) // 16)
    assert torch.equal(influence(lambda y: module(y, hilbert), x[:1]), segment[:, None] == segment[None])


def test_every_segment_length_is_used():
    (x,) = inputs("core", 33)
    reached = []
    for lengths in ((4,), (4, 8), (4, 8, None)):
        module = wrapper(segment_lengths=lengths, dilation_rates=(1,) * len(lengths))

        def call(y: Tensor, module: nn.Module = module) -> Tensor:
            y = y.unflatten(-1, (HEADS, -1))
            return module(y, y, y, use_hilbert=False).flatten(2)

        reached.append(influence(call, x[:1]).sum(1)[0].item())
    assert reached == [4, 8, 33]


@pytest.mark.parametrize("hilbert", [True, False])
def test_heads_are_dilated_at_their_own_offsets(hilbert: bool):
    """Head h sees and answers exactly the rows at offset h mod r of each segment."""
    module, (x,) = core(segment_size=10, dilation_rate=3, hidden_dim=20, num_heads=5), torch.randn(1, ROWS, 20)[None]
    module.out_proj.weight.data.copy_(torch.eye(20))
    order = compat.create_hilbert_mapping(ROWS) if hilbert else torch.arange(ROWS)
    row = torch.empty(ROWS, dtype=torch.long).index_copy(0, order, torch.arange(ROWS))
    for head in range(5):
        member = row % 10 % 3 == head % 3
        want = (row[:, None] // 10 == row[None] // 10) & member[:, None] & member[None]
        got = influence(lambda y, h=head: module(y, hilbert)[..., 4 * h : 4 * h + 4], x.double())
        assert torch.equal(got, want)


def test_q_k_and_v_are_separate():
    """The older wrapper attended within the mean of q, k and v."""
    module, (q, k, v) = wrapper(), inputs("wrapper")
    out = module(q, k, v)
    torch.testing.assert_close(module(q, k, 2 * v), 2 * out, rtol=0, atol=1e-12)
    assert (module(q, 2 * k, v) - out).abs().max() > 1e-4
    torch.testing.assert_close(module(2 * q, k, v), module(q, 2 * k, v), rtol=0, atol=1e-12)


# ---- aliases, factory, state dicts


@pytest.mark.parametrize("name", compat.ALIASES)
def test_aliases_warn_once_and_name_their_replacement(name: str):
    vars(compat).pop(name, None)
    replacement = "HilbertAttentionTritonWrapper" if name == "HilbertAttentionTritonFixed" else "HilbertAttentionCore"
    with pytest.warns(DeprecationWarning, match=f"{name} is deprecated, use {replacement}") as caught:
        assert getattr(compat, name) is getattr(compat, name)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert name in dir(compat)


def test_aliases_are_their_replacements():
    assert {alias(name) for name in CORES} == {compat.HilbertAttentionCore}
    fixed = alias("HilbertAttentionTritonFixed")
    assert isinstance(fixed(8, 2, 16, 1), compat.HilbertAttentionCore)
    assert isinstance(fixed((8,), (1,), 0.0), compat.HilbertAttentionTritonWrapper)
    with pytest.raises(AttributeError, match="no attribute 'HilbertAttentionTriton'"):
        compat.HilbertAttentionTriton  # noqa: B018


def test_the_factory_makes_what_it_says():
    module = compat.create_multihead_dilated_attention()
    assert (module.embed_dim, module.num_heads) == (768, 12)
    assert module.pattern == rh.DilatedPattern((2048, 4096, 8192), (1, 2, 4))
    assert module.q_proj.bias is not None and module.order is None and not module.whole
    assert created("hilbert").whole and created("ring", group=None, strategy="exchange").strategy == "exchange"
    x = inputs("created")
    out, nothing = module.to(torch.float64)(torch.zeros(1, 3, 768, dtype=torch.float64), need_weights=True)
    assert out.shape == (1, 3, 768) and nothing is None
    module = created("hilbert")
    assert torch.equal(module(x[0]), module(x[0], x[0], x[0]))
    prepared = rh.prepare(ROWS, causal=True, order=rh.TokenOrder(block=ROWS))
    assert torch.equal(module(*x, is_causal=True, prepared=prepared), module(*x, is_causal=True))
    rows = compat.create_hilbert_mapping(ROWS)
    permuted = module(*(y[:, rows] for y in x), prepared=rh.prepare(ROWS, causal=False))
    torch.testing.assert_close(permuted, module(*x)[:, rows], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: created("improved"),
            "attention_type='improved' is unknown, expected one of hilbert, ring, standard, auto",
        ),
        (lambda: created("standard", group=None), "'standard' attention does not take group; it takes dropout, bias"),
        (lambda: created("hilbert", layer_norm=True), "does not take layer_norm"),
        (lambda: created("ring"), "'ring' attention needs group="),
        (lambda: core(num_heads=5), "hidden_dim=12 must be a positive multiple of num_heads=5"),
        (lambda: core(dilation_rate=17), r"dilation_rates\[0\] must be an integer with 1 <= r <= segment length 16"),
        (lambda: wrapper(dilation_rates=(1,)), "segment_lengths has 3 entries and dilation_rates 1"),
        (lambda: core()(torch.zeros(2, ROWS, 13)), r"x must be \[B, N, hidden_dim=12\]"),
        (lambda: wrapper()(*[torch.zeros(2, 5, 12)] * 3), r"q must be \[B, N, num_heads=3, head_dim=4\]"),
        (lambda: created("standard")(torch.zeros(2, 12)), r"query must be \[B, S, embed_dim=12\]"),
        (lambda: created("standard")(*inputs("created"), attn_mask=torch.zeros(2)), "attn_mask is not supported"),
        (
            lambda: created("standard")(*inputs("created"), key_padding_mask=torch.zeros(2, ROWS)),
            "key_padding_mask must be bool, True for padding, got torch.float32",
        ),
        (
            lambda: created("hilbert")(
                *inputs("created"), prepared=rh.prepare(ROWS, causal=False, order=rh.TokenOrder(block=9))
            ),
            "order=.*block=45.* disagrees with prepared.*block=9",
        ),
        (lambda: created("ring", group=None, strategy="rings")(*inputs("created")), "strategy"),
        (lambda: compat.generate_hilbert_indices(-1), "n must be at least 0"),
        (lambda: compat.curve_mapping((2, 2), "hilbrt"), "did you mean 'hilbert'"),
    ],
)
def test_what_cannot_be_is_named(call: Callable[[], object], message: str):
    with pytest.raises(ValueError, match=message):
        call()


def test_state_dicts_of_the_older_classes_load():
    """Keys and shapes as the older classes made them; rows of the fused projections are those of q, then k, then v."""

    def weights(names: dict[str, int]) -> dict[str, Tensor]:
        shapes = {key: (size * HIDDEN, HIDDEN)[: 1 if key.endswith("bias") else 2] for key, size in names.items()}
        return {key: torch.randn(shape, dtype=torch.float64) for key, shape in shapes.items()}

    of_core = {"qkv_proj.weight": 3, "out_proj.weight": 1}
    core().load_state_dict(weights(of_core))
    inner = {f"attention.{key}": size for key, size in of_core.items()}
    outer = {f"{name}_proj.weight": 1 for name in ("q", "k", "v", "out")}
    wrapper().load_state_dict(weights(inner | outer))
    separate = {f"{name}_proj.{kind}": 1 for name in ("q", "k", "v", "out") for kind in ("weight", "bias")}
    created("standard").load_state_dict(weights(separate))
    fused = weights(
        {f"{name}_proj.{kind}": size for name, size in (("qkv", 3), ("out", 1)) for kind in ("weight", "bias")}
    )
    stack, x = nn.Sequential(created("auto")), inputs("created")[0]
    stack.load_state_dict({f"0.{key}": value for key, value in fused.items()})
    q, k, v = F.linear(x, fused["qkv_proj.weight"], fused["qkv_proj.bias"]).unflatten(-1, (3, HEADS, -1)).unbind(2)
    out, _ = rh.reference.dilated_attention(q, k, v, PATTERN, causal=False)
    want = F.linear(out.flatten(2), fused["out_proj.weight"], fused["out_proj.bias"])
    torch.testing.assert_close(stack(x), want, rtol=0, atol=1e-10)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*q_ln.weight"):
        created("standard").load_state_dict(weights(separate) | {"q_ln.weight": torch.ones(HIDDEN)})


# ---- curve mappings


@pytest.fixture
def _empty_cache() -> Iterator[None]:
    compat.clear_cache()
    yield
    compat.clear_cache()


def test_mappings_are_permutations_at_every_length_and_on_every_grid():
    for shape in [*range(300), *RECTANGLES[::13], *BOXES[::17]]:
        rows = compat.curve_mapping(shape)
        size = shape if isinstance(shape, int) else prod(shape)
        assert rows.dtype == torch.int64 and torch.equal(rows.sort().values, torch.arange(size))
        assert torch.equal(rows[compat.curve_mapping(shape, inverse=True)], torch.arange(size))
    assert compat.generate_hilbert_indices_rectangular(3, 2) == CURVES["hilbert"]((2, 3)).tolist()
    assert sorted(compat.generate_hilbert_indices(3)) == list(range(64))
    assert (step_lengths(np.array(compat.generate_hilbert_indices(3)), (8, 8)) == 1).all()
    assert torch.equal(core().get_hilbert_mapping(70), compat.create_hilbert_mapping(70))


def test_steps_of_a_sequence_are_longer_only_past_the_cells_it_leaves_empty():
    """Grids are covered by tests/ops/test_order.py; here a sequence that fills its grid, and one that does not."""
    for length in range(1, 700):
        rows = isqrt(length)
        grid = (rows, -(-length // rows))
        steps = step_lengths(compat.create_hilbert_mapping(length).numpy(), grid)
        empty = prod(grid) - length
        assert (steps > 1).sum() <= empty, length
        assert steps.max(initial=1) <= 1 + 2 * empty
    assert all(isqrt(n) * -(-n // isqrt(n)) == n for k in range(1, 20) for n in (k * k, k * (k + 1), k * (k + 2)))


@pytest.mark.usefixtures("_empty_cache")
@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("shape", [2**20, (1000, 1048), (101, 100, 104)])
def test_a_million_tokens_in_time(curve: str, shape: int | tuple[int, ...]):
    for cached in (order_module._cells, order_module._permutation):
        cached.cache_clear()
    times = []
    for _ in range(4):
        start = time.perf_counter()
        compat.curve_mapping(shape, curve)
        times.append(time.perf_counter() - start)
    assert times[0] < 1 and min(times[1:]) < 1e-3


@pytest.mark.usefixtures("_empty_cache")
def test_mappings_are_kept_per_shape_curve_direction_and_device():
    for _ in range(2):
        for shape, curve, device in product((64, 65, (8, 8), (4, 4, 4)), ("hilbert", "snake"), ("cpu", "meta")):
            assert compat.curve_mapping(shape, curve, device).device.type == device
            compat.curve_mapping(shape, curve, device, inverse=True)
    stats = compat.cache_stats()
    assert (stats["hits"], stats["misses"], stats["entries"]) == (32, 32, 32)
    assert stats["bytes"] == 16 * sum((64, 65, 64, 64)) * 4
    compat.clear_cache()
    assert compat.cache_stats() | {"max_entries": 0, "max_bytes": 0} == dict.fromkeys(stats, 0)


def test_the_cache_is_bounded_in_entries_and_bytes():
    small = compat._CurveCache(max_entries=3, max_bytes=800)
    orders = [rh.TokenOrder(block=10 + n) for n in range(6)]
    for order in orders[:4]:
        small.get(order, 10, False, torch.device("cpu"))
    small.get(orders[1], 10, False, torch.device("cpu"))
    assert (len(small.entries), small.hits, small.misses, small.bytes) == (3, 1, 4, 240)
    small.get(orders[5], 10, False, torch.device("cpu"))
    assert [key[0] for key in small.entries] == [orders[3], orders[1], orders[5]]
    small.get(orders[0], 90, False, torch.device("cpu"))
    assert (len(small.entries), small.bytes) == (2, 800)
    small.get(orders[0], 200, False, torch.device("cpu"))
    assert (len(small.entries), small.bytes) == (0, 0)


def test_callers_cannot_reach_the_cache():
    expected = compat.create_hilbert_mapping(64).tolist()
    compat.create_hilbert_mapping(64).zero_()
    assert compat.create_hilbert_mapping(64).tolist() == expected
