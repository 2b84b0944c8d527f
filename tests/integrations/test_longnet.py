# SPDX-License-Identifier: Apache-2.0
"""The slide encoder: against Prov-GigaPath's from its description, its files, slides of different lengths, ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import ring_hilbert as rh
from ring_hilbert.integrations.longnet import SlideEncoder
from ring_hilbert.integrations.longnet_layers import misplaced_attention, misplaces
from tests.harness import torchscale
from tests.harness.ranks import run_ranks, run_ranks_collect

GRIDS = 60
WHOLE: dict[str, Any] = {"zero_keys": True, "dropout": 0.0, "drop_path_rate": 0.0, "slide_ngrids": GRIDS}


def encoder(**options: Any) -> SlideEncoder:
    """A small one in float64, with weights that are not symmetric in anything."""
    sizes = {"num_heads": 4, "segment_lengths": (16, 50, 240), "dilation_rates": (1, 2, 4)}
    made = SlideEncoder(12, 16, 3, **{**sizes, **WHOLE, **options}).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.3 * drawn + (parameter.ndim == 1 and name.endswith("weight")))
    return made


def slides(*lengths: int, seed: int = 1, channels: int = 12) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = [torch.randn(n, channels, generator=generator, dtype=torch.float64) for n in lengths]
    return x, [256.0 * torch.randint(0, GRIDS, (n, 2), generator=generator) + 17 for n in lengths]


def close(actual: Tensor, expected: Tensor, bound: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=bound)


@pytest.mark.parametrize("global_pool", [False, True])
def test_equals_prov_gigapaths(global_pool: bool):
    made = encoder(global_pool=global_pool)
    x, coords = slides(90, 90)
    x, coords = torch.stack(x), torch.stack(coords)
    pattern = made.encoder.layers[0].self_attn.pattern
    assert not torchscale.touched(pattern, 91)
    options = {"heads": 4, "grids": GRIDS, "global_pool": global_pool}
    *states, last = torchscale.slide_encoder(made.state_dict(), x, coords, pattern, **options)
    for actual, expected in zip(made(x, coords, all_layer_embed=True), states, strict=True):
        close(actual, expected)
    close(made(x, coords)[0], last)


@pytest.mark.parametrize("length", [20, 21, 22, 23, 24, 47, 64, 200])
def test_misplaced_padding(length: int):
    """Output and gradients of torchscale's code, its mixture without gradient, where it is no softmax and where it is."""
    pattern = rh.DilatedPattern((8, 23, 63, 70), (1, 2, 4, 3), offset_rule="block", zero_keys=True)
    x = [torch.randn(2, length, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    actual = misplaced_attention(*x, pattern)
    expected = torchscale.dilated_attention(*x, pattern, misplaced=True, detached=True)
    close(actual, expected)
    dout = torch.randn_like(actual)
    for ours, theirs in zip(torch.autograd.grad(actual, x, dout), torch.autograd.grad(expected, x, dout), strict=True):
        close(ours, theirs)
    assert misplaces(pattern, length) == torchscale.touched(pattern, length) == (length > 23)


@pytest.mark.parametrize("misplaced", [False, True])
def test_an_encoder_misplaces_if_asked(misplaced: bool):
    made = encoder(segment_lengths=(8, 23, 64), misplaced=misplaced)
    x, coords = slides(90)
    pattern, options = made.encoder.layers[0].self_attn.pattern, {"heads": 4, "grids": GRIDS, "misplaced": misplaced}
    *_, last = torchscale.slide_encoder(made.state_dict(), x[0][None], coords[0][None], pattern, **options)
    close(made(x, coords)[0], last)


@pytest.mark.parametrize("size", [{}, {"embed_dim": 384}, {"embed_dim": 1024, "depth": 24}, {"embed_dim": 1536}])
def test_names_and_sizes_of_weights(size: dict[str, int]):
    with torch.device("meta"):
        made = SlideEncoder(zero_keys=True, **size)
    width, depth = size.get("embed_dim", 768), size.get("depth", 12)
    expected = {"cls_token": [1, 1, width], "patch_embed.proj.weight": [width, 1536], "patch_embed.proj.bias": [width]}
    norms, squares = ["norm", "encoder.layer_norm"], list[str]()
    for layer in (f"encoder.layers.{i}" for i in range(depth)):
        norms += [f"{layer}.{name}" for name in ("self_attn.inner_attn_ln", "self_attn_layer_norm", "final_layer_norm")]
        squares += [f"{layer}.self_attn.{name}_proj" for name in ("q", "k", "v", "out")]
        for name, shape in {"fc1.weight": [4 * width, width], "fc2.weight": [width, 4 * width]}.items():
            expected[f"{layer}.ffn.{name}"] = shape
        expected |= {f"{layer}.ffn.fc1.bias": [4 * width], f"{layer}.ffn.fc2.bias": [width]}
        expected |= {f"{layer}.ffn.ffn_layernorm.{name}": [4 * width] for name in ("weight", "bias")}
    expected |= {f"{norm}.{name}": [width] for norm in norms for name in ("weight", "bias")}
    for square in squares:
        expected |= {f"{square}.weight": [width, width], f"{square}.bias": [width]}
    assert {name: list(x.shape) for name, x in made.state_dict().items()} == expected


@pytest.mark.parametrize("kind", ["bare.pth", "model.pth", "weights.safetensors"])
def test_files(kind: str, tmp_path: Path):
    made, path = encoder(), tmp_path / kind
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(made.state_dict(), path)
    else:
        torch.save({"model": made.state_dict()} if kind == "model.pth" else made.state_dict(), path)
    other = SlideEncoder(12, 16, 3, num_heads=4, **WHOLE).double()
    other.load_weights(path)
    assert all(torch.equal(x, other.state_dict()[name]) for name, x in made.state_dict().items())


def test_files_that_do_not_fit(tmp_path: Path):
    made, path = encoder(), tmp_path / "slide_encoder.pth"
    state = made.state_dict()
    missing = {key: x for key, x in state.items() if key != "norm.bias"}
    for wrong, message in (
        (missing, "1 are missing: norm.bias"),
        (state | {"decoder.a": state["norm.bias"]}, r"1 are not used \(see ignore=\): decoder.a"),
        (state | {"norm.bias": torch.zeros(8)}, r"1 have another shape: norm.bias \[8\] instead of \[16\]"),
    ):
        torch.save(wrong, path)
        with pytest.raises(ValueError, match=message):
            made.load_weights(path)
    torch.save(state | {"decoder.a": state["norm.bias"]}, path)
    for ignore in (["decoder."], "decoder."):
        made.load_weights(path, ignore=ignore)
    torch.save([state], path)
    with pytest.raises(ValueError, match="holds a list, expected a state dict"):
        made.load_weights(path)
    torch.save({"model": state, "arguments": Path("x")}, path)
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        made.load_weights(path)


def gradients(made: SlideEncoder, x: list[Tensor], coords: list[Tensor], **options: Any) -> list[Tensor]:
    """Of the sum of squares of all embeddings, after those."""
    results = torch.stack(made(x, coords, **options))
    return [results.detach(), *torch.autograd.grad(results.square().sum(), list(made.parameters()), allow_unused=True)]


@pytest.mark.parametrize("options", [{}, {"global_pool": True}, {"checkpoint_activations": True}])
def test_slides_of_one_call_are_those_of_many(options: dict[str, bool]):
    made, (x, coords) = encoder(**options), slides(3, 120, 1, 49, 300)
    together = gradients(made, x, coords, all_layer_embed=True)
    alone = [gradients(made, [a], [b], all_layer_embed=True) for a, b in zip(x, coords, strict=True)]
    close(together[0], torch.cat([found[0] for found in alone], dim=1))
    for i, gradient in enumerate(together[1:], start=1):
        parts = [found[i] for found in alone]
        assert (gradient is None) == all(part is None for part in parts)
        if gradient is not None:
            close(gradient, sum(parts), 1e-8)


@pytest.mark.full
def test_ten_slides_of_500_to_30000_tiles():
    made = encoder(segment_lengths=None, dilation_rates=(1, 2, 4, 8, 16), num_heads=16)
    x, coords = slides(500, 30000, 1200, 7777, 2500, 900, 12345, 4096, 20001, 640)
    with torch.no_grad():
        together = made(x, coords)[0]
        for embedding, a, b in zip(together, x, coords, strict=True):
            close(embedding, made([a], [b])[0][0])


def test_a_curve_is_another_order_of_the_same_tiles():
    x, coords = slides(130)
    order = rh.TokenOrder.from_coordinates("hilbert", (coords[0] // 256).long()).permutation(130)
    plain, curved = encoder(), encoder(order="hilbert")
    close(curved(x, coords)[0], plain([x[0][order]], [coords[0][order]])[0])
    assert (curved(x, coords)[0] - plain(x, coords)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.float32])
def test_coordinates_of_any_dtype_that_holds_them(dtype: torch.dtype):
    x, coords = slides(40)
    small = [at % 256 if dtype is torch.uint8 else at for at in coords]
    made = encoder(tile_size=256 if dtype is torch.int16 else 32, slide_ngrids=8 * GRIDS)
    close(made(x, [at.to(dtype) for at in small])[0], made(x, small)[0])


def test_dropout_and_drop_path():
    x, coords = slides(40, 40, 40, 40)
    made = encoder(drop_path_rate=1.0).train()
    assert made.drop_path_rates[0] == 0 and made.drop_path_rates[1] == pytest.approx(0.5)
    torch.manual_seed(0)
    *_, before, after = made(x, coords, all_layer_embed=True)
    close(before, after)  # the last layer is skipped by all slides
    first, second = (made(x, coords)[0] for _ in range(2))
    assert (first - second).abs().max() > 1e-3
    assert torch.equal(made.eval()(x, coords)[0], made(x, coords)[0])
    dropped = encoder(dropout=0.5).train()
    assert (dropped(x, coords)[0] - dropped(x, coords)[0]).abs().max() > 1e-3


LENGTHS = [[30, 0, 1], [41, 50, 9]]  # tiles of every slide on every rank


def on_a_rank(rank: int, world_size: int, global_pool: bool) -> list[Tensor]:
    made = encoder(global_pool=global_pool)
    x, coords = slides(*(sum(n) for n in zip(*LENGTHS, strict=True)))
    first = [LENGTHS[0][i] if rank else 0 for i in range(3)]
    own = [slice(a, a + n) for a, n in zip(first, LENGTHS[rank], strict=True)]
    shard = [[a[s] for a, s in zip(of, own, strict=True)] for of in (x, coords)]
    found = gradients(made, *shard, all_layer_embed=True, group=dist.group.WORLD)
    return [
        found[0],
        *(torch.zeros_like(p) if g is None else g for g, p in zip(found[1:], made.parameters(), strict=True)),
    ]


@pytest.mark.parametrize("global_pool", [False, True])
def test_ranks(global_pool: bool):
    made = encoder(global_pool=global_pool)
    expected = gradients(made, *slides(*(sum(n) for n in zip(*LENGTHS, strict=True))), all_layer_embed=True)
    first, second = run_ranks(on_a_rank, 2, global_pool)
    close(first[0], expected[0])
    close(second[0], expected[0])
    for a, b, whole in zip(first[1:], second[1:], expected[1:], strict=True):
        close(a + b, 2 * (torch.zeros_like(a) if whole is None else whole), 1e-8)  # both ranks computed the loss


def a_mistake_of_one_rank(rank: int, world_size: int) -> None:
    x, coords = slides(20)
    encoder()(x, [coords[0] * (1e4 if rank else 1)], group=dist.group.WORLD)


def test_a_mistake_of_one_rank_is_an_error_on_all():
    for outcome in run_ranks_collect(a_mistake_of_one_rank, 2):
        assert isinstance(outcome, ValueError) and "rank 1: coords lie in tiles" in str(outcome)


def test_mistakes():
    made, (x, coords) = encoder(), slides(20, 30)
    for wrong, message in (
        (lambda: made(x, coords[:1]), "x and coords must be"),
        (lambda: made([a[:, :5] for a in x], coords), r"lists of one \[tiles, 12\]"),
        (lambda: made(x, [c[:-1] for c in coords]), "x and coords must be"),
        (lambda: made([], []), "x and coords must be"),
        (lambda: made(*slides(4, 0)), r"at least one tile, got \[4, 0\]"),
        (lambda: made(x, [c - 300 for c in coords]), "coords lie in tiles -1 to"),
        (lambda: made(x, [c * float("nan") for c in coords]), "coords lie in tiles nan to nan"),
        (lambda: made(x, [c / 0 for c in coords]), "coords lie in tiles nan to nan"),
        (lambda: made(x, [c.half() for c in coords]), r"float32 or float64, got torch.float16, which does not hold"),
        (lambda: made(x, [coords[0], coords[1].bfloat16()]), r"got torch.bfloat16, .*when you cast the embeddings"),
        (lambda: made(x, [c > 0 for c in coords]), r"got torch.bool"),
        (lambda: encoder(zero_keys=False, misplaced=True), "needs zero_keys=True"),
        (lambda: encoder(drop_path_rate=2.0), "drop_path_rate must be from 0 to 1"),
        (lambda: SlideEncoder(zero_keys=True, embed_dim=100), "embed_dim=100 must be a multiple of num_heads=16"),
        (lambda: SlideEncoder(zero_keys=True, order="hilbrt"), "did you mean 'hilbert'"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
    with pytest.raises(TypeError, match="zero_keys"):
        SlideEncoder()  # pyright: ignore[reportCallIssue]
