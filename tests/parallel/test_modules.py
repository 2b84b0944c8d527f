# SPDX-License-Identifier: Apache-2.0
"""`MultiheadDilatedAttention`: what it computes, and what it makes of a `Prepared`."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ring_hilbert as rh
from tests.harness.ranks import run_ranks

PATTERN = rh.DilatedPattern((16, 32, None), (1, 2, 5))
HILBERT = rh.TokenOrder("hilbert", block=16)
ROWS = 61


def module(**changes) -> rh.MultiheadDilatedAttention:
    torch.manual_seed(0)
    arguments = {
        "embed_dim": 24,
        "num_heads": 4,
        "pattern": PATTERN,
        "num_kv_heads": 2,
        "dtype": torch.float64,
    } | changes
    return rh.MultiheadDilatedAttention(**arguments)


def tokens(batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, ROWS, 24, dtype=torch.float64, generator=generator)


def results(layer: nn.Module, x: Tensor, weights: Tensor, **options) -> dict[str, Tensor]:
    """The output for `x` and the gradients of its weighted sum with respect to `x` and the parameters."""
    x = x.clone().requires_grad_()
    out = layer(x, **options)
    layer.zero_grad()
    (out * weights).sum().backward()
    return {"out": out.detach(), "x": x.grad} | {name: p.grad for name, p in layer.named_parameters()}  # type: ignore[dict-item]


def by_definition(layer: rh.MultiheadDilatedAttention, x: Tensor, **facts) -> Tensor:
    q, k, v = (proj(x).unflatten(-1, (-1, layer.head_dim)) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    out, _ = rh.reference.dilated_attention(q, k, v, layer.pattern, causal=layer.causal, order=layer.order, **facts)
    return layer.out_proj(out.flatten(2))


class _Definition(nn.Module):
    """The module of the same parameters, by the reference."""

    def __init__(self, layer: rh.MultiheadDilatedAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, **facts) -> Tensor:
        return by_definition(self.layer, x, **facts)


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == {name.removeprefix("layer.") for name in want}
    for name, value in want.items():
        torch.testing.assert_close(got[name.removeprefix("layer.")], value, rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize(
    "changes",
    [{}, {"order": HILBERT}, {"causal": False, "order": HILBERT}, {"bias": True, "head_dim": 5, "num_kv_heads": None}],
)
def test_equals_projections_around_the_reference(changes: dict):
    layer, x = module(**changes), tokens()
    weights = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view_as(x)
    assert_same(results(layer, x, weights), results(_Definition(layer), x, weights))


def test_prepared_with_an_order_means_natural_rows():
    """`prepare(order=...)`: rows go in and come out as tokens stand, with documents, which the bare module cannot have."""
    layer, x, documents = module(order=HILBERT), tokens(), torch.arange(ROWS) // 25
    weights = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view_as(x)
    prepared = rh.prepare(ROWS, order=HILBERT, document_ids=documents)
    want = results(_Definition(layer), x, weights, document_ids=documents)
    assert_same(results(layer, x, weights, prepared=prepared), want)
    assert_same(results(module(order=None), x, weights, prepared=prepared), want)


def test_rows_of_shard_batch_are_not_permuted_twice():
    layer, x = module(order=HILBERT), tokens()
    prepared = rh.shard_batch({"input_ids": torch.zeros(2, ROWS, dtype=torch.long)}, order=HILBERT)["ring_hilbert"]
    rows = prepared.rows[0]
    assert (rows != torch.arange(ROWS)).any()
    torch.testing.assert_close(layer(x[:, rows], prepared=prepared), layer(x)[:, rows], rtol=0, atol=1e-12)


def _sharded(rank: int, world: int, natural: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Rows of this rank and the results there; with `natural`, tokens stay where they are and the call orders them."""
    layer, x, weights = module(order=HILBERT), tokens(), tokens().flip(1)
    if natural:
        local = 32 if rank == 0 else ROWS - 32
        rows = torch.arange(local) + 32 * rank
        prepared = rh.prepare(local, group=dist.group.WORLD, order=HILBERT)
    else:
        batch = {"input_ids": torch.zeros(2, ROWS, dtype=torch.long)}
        prepared = rh.shard_batch(batch, dist.group.WORLD, order=HILBERT)["ring_hilbert"]
        rows = prepared.rows[0]
    return rows, results(layer, x[:, rows], weights[:, rows], prepared=prepared)


@pytest.mark.parametrize("natural", [True, False])
def test_sharded_equals_one_device(natural: bool):
    want = results(module(order=HILBERT), tokens(), tokens().flip(1))
    ranks = run_ranks(_sharded, 2, natural)
    rows = torch.cat([rows for rows, _ in ranks])
    assert torch.equal(rows.sort().values, torch.arange(ROWS))
    for name, value in want.items():
        if name in ("out", "x"):
            got = torch.cat([result[name] for _, result in ranks], dim=1)[:, rows.argsort()]
        else:
            got = sum(result[name] for _, result in ranks)
        torch.testing.assert_close(got, value, rtol=0, atol=1e-10, msg=name)


def test_parameters_are_those_of_four_linear_layers():
    layer = module(bias=True, head_dim=5)
    torch.manual_seed(0)
    names = {"q_proj": (24, 20), "k_proj": (24, 10), "v_proj": (24, 10), "out_proj": (20, 24)}
    linear = nn.ModuleDict({name: nn.Linear(*sizes, dtype=torch.float64) for name, sizes in names.items()})
    state = layer.state_dict()
    assert list(state) == [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]
    for name, value in linear.state_dict().items():
        assert torch.equal(state[name], value), name
    assert list(module().state_dict()) == [f"{name}.weight" for name in names]
    assert module(device="meta").q_proj.weight.is_meta


def test_prints_what_it_is():
    text = repr(module(order=HILBERT, head_dim=5, causal=False))
    for words in (
        "embed_dim=24",
        "num_heads=4",
        "num_kv_heads=2",
        "head_dim=5",
        "causal=False",
        "(16, 32, None)",
        "hilbert",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dim": 26}, "embed_dim=26 must be a multiple of num_heads=4, or head_dim"),
        ({"num_kv_heads": 3}, "num_heads=4 must be a multiple of num_kv_heads=3"),
        ({"num_heads": 0}, "num_heads must be a positive integer, got 0"),
        ({"head_dim": 2.0}, "head_dim must be a positive integer"),
        ({"pattern": (16, 1)}, "pattern must be a DilatedPattern, got tuple"),
        ({"order": "hilbert"}, "order must be a TokenOrder or None, got str"),
    ],
)
def test_impossible_modules_are_named(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        module(**changes)


@pytest.mark.parametrize(
    ("x", "prepared", "message"),
    [
        (torch.zeros(ROWS, 24), None, r"x must be \[B, S, embed_dim=24\], got \[61, 24\]"),
        (torch.zeros(2, ROWS, 23), None, r"x must be \[B, S, embed_dim=24\], got \[2, 61, 23\]"),
        (tokens(), {"local_len": 60}, "60 rows that prepared says"),
        (tokens(), {"causal": False}, "causal=True disagrees with prepared"),
        (tokens(), {"order": rh.TokenOrder("morton", block=16)}, "order=.*hilbert.* disagrees with prepared.*morton"),
        (tokens(), {"document_ids": torch.zeros(3, ROWS, dtype=torch.long)}, "batch size 3 of prepared"),
    ],
)
def test_calls_that_do_not_fit_are_named(x: Tensor, prepared: dict | None, message: str):
    facts = None if prepared is None else rh.prepare(**({"local_len": ROWS} | prepared))
    with pytest.raises(ValueError, match=message):
        module(order=HILBERT)(x, prepared=facts)
