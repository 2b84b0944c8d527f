# SPDX-License-Identifier: Apache-2.0
"""The kernels for compute capability 9.0 against the definition, in NumPy; what only a GPU shows of them is in test_device.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ring_hilbert as rh
from ring_hilbert.kernels import tiles
from ring_hilbert.kernels.tiles import PASSES, Tile, tiles_for
from ring_hilbert.ops.core import Shard
from ring_hilbert.ops.triton_core import TritonCore
from ring_hilbert.ops.visible import Visible
from ring_hilbert.ops.visits import Chunk
from tests.harness.cases import Case

pytest.importorskip("triton.experimental.gluon")
import tests.harness.gluon as in_numpy
from tests.kernels.test_kernels import _nothing_is_zero_by_chance, answer, check  # noqa: F401

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="of CPU tensors, which only interpreters take")
TILE = Tile(64, 64, 4, 4, gluon=True)
WIDE = Tile(128, 64, 8, 4, gluon=True)
SPECIALIZED = Tile(64, 128, 4, 2, gluon=True, specialized=True)
LADDER = rh.DilatedPattern((128, 256, None), (1, 2, 4), head_shift=1)
SHORT = rh.DilatedPattern((64, None), (1, 2))
CASES = {
    "ladder": Case(LADDER, 256, heads=4, kv_heads=2, head_dim=16),
    "ragged documents in curve order": Case(
        rh.DilatedPattern((128, None), (1, 4)), 300, heads=3, kv_heads=1, head_dim=48, documents="shared",
        order=rh.TokenOrder("hilbert", block=128),
    ),
    "padding of two sequences": Case(LADDER, 256, batch=2, head_dim=32, positions="per-batch", documents="padding"),
    "three heads of 24": Case(SHORT, 128, heads=3, kv_heads=3, head_dim=24, documents="shared"),
    "heads of 40": Case(SHORT, 128, heads=2, kv_heads=1, head_dim=40, documents="padding"),
    "heads of 96": Case(SHORT, 128, heads=2, head_dim=96, order=rh.TokenOrder("hilbert", block=64)),
    "heads of 104": Case(rh.DilatedPattern((None,), (2,)), 130, heads=2, head_dim=104),
    "not causal": Case(rh.DilatedPattern((None,), (1,)), 150, heads=2, kv_heads=1, head_dim=64, causal=False),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "tile", "few_tiles"),
    [
        *((name, TILE, 512) for name in CASES),
        ("not causal", TILE, 0),
        ("ragged documents in curve order", WIDE, 512),
    ],
)
def test_kernels_for_hopper(name: str, tile: Tile, few_tiles: int, monkeypatch: pytest.MonkeyPatch):
    from ring_hilbert.kernels import launch

    monkeypatch.setattr(launch, "FEW_TILES", few_tiles)
    in_numpy.use(monkeypatch)
    check(answer(CASES[name], torch.float16, tile), CASES[name], torch.float16)


@pytest.mark.parametrize("name", CASES)
def test_warps_that_copy_and_warps_that_compute(name: str, monkeypatch: pytest.MonkeyPatch):
    in_numpy.use(monkeypatch)
    case = replace(CASES[name], heads=2 * CASES[name].kv_heads)
    check(answer(case, torch.float16, SPECIALIZED), case, torch.float16)


@pytest.mark.parametrize(
    ("tile", "group"), [(None, 1), (TILE, 1), (SPECIALIZED, 2)], ids=["triton", "hopper", "specialized"]
)
def test_heads_that_are_far_apart(tile: Tile | None, group: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of a million rows `[B, H, S, D]`, heads may begin farther behind the first than kernels count; the file here is sparse."""
    if tile is not None:
        in_numpy.use(monkeypatch)
        monkeypatch.setattr(tiles, "INTERPRETER", tile)
    case = Case(SHORT, 128, heads=3 * group, kv_heads=3, head_dim=16)
    memory = torch.from_file(str(tmp_path / "heads"), shared=True, size=2**32 + 2**16, dtype=torch.float16)
    at = 2**31  # as far before it as behind it: a number that overflows is another place in the file

    def far_apart(x: Tensor) -> Tensor:
        nonlocal at
        _, rows, heads, dim = x.shape
        if heads > 3:
            return x
        view = memory.as_strided(x.shape, (0, dim, 2**30, 1), at)
        at += rows * dim
        return view.copy_(x)

    def results(lay_out: Callable[[Tensor], Tensor]) -> list[Tensor]:
        x = {name: lay_out(value) for name, value in case.tensors(torch.float16).items()}
        q, k, v = (x[name].detach().requires_grad_() for name in "qkv")
        out = rh.dilated_attention(q, k, v, case.pattern, backend="triton")
        return [out, *torch.autograd.grad(out, (q, k, v), x["dout"])]

    for near, far in zip(results(lambda x: x), results(far_apart), strict=True):
        assert torch.equal(near, far)


def test_more_than_can_be_addressed_is_an_error():
    from ring_hilbert.kernels import launch

    with pytest.raises(
        ValueError, match=r"up to 2\*\*35 numbers per batch entry and rank, got \[1, 2097152, 128, 128\]"
    ):
        launch._rows_of(torch.empty(1, 2**21, 128, 128, device="meta"))


@pytest.mark.parametrize("strides", ["of one row", "from an odd address"])
def test_operands_that_are_contiguous_but_not_aligned(strides: str):
    """They are copied, as 16 bytes at a time are; `contiguous()` returns them as they are."""
    from ring_hilbert.kernels import launch

    x = torch.randn(1, 1, 2, 32).bfloat16()
    if strides == "of one row":
        y = x.as_strided(x.shape, (64, 1, 32, 1))
    else:
        y = torch.cat((x.flatten()[:1], x.flatten()))[1:].view(x.shape)
    assert y.is_contiguous()
    copied = launch._rows_of(y, TILE)
    assert (
        torch.equal(copied, x) and not copied.data_ptr() % 16 and not any(stride % 8 for stride in copied.stride()[:3])
    )


@pytest.mark.parametrize(
    ("tile", "head_dim"),
    [(TILE, 16), (TILE, 40), (WIDE, 16), (SPECIALIZED, 16)],
    ids=["16", "40", "wide", "specialized"],
)
def test_rows_that_launches_share(tile: Tile, head_dim: int, monkeypatch: pytest.MonkeyPatch):
    """Left, passed on and finished as the Triton kernels do."""
    from ring_hilbert.kernels import launch

    in_numpy.use(monkeypatch)
    case = Case(SHORT, 128, heads=2, kv_heads=1, head_dim=head_dim)
    cpu = torch.device("cpu")
    x = case.tensors(torch.float16)
    q, k, v, rows = x["q"], x["k"], x["v"], case.seq_len
    own = Visible(rows, True).on(cpu)

    def results(tile: Tile) -> list[Tensor]:
        tiles = {"forward": tile, "dq": tile, "dkdv": tile}
        core = TritonCore(case.pattern, 1, Shard((Chunk(0, rows, 0),), rows), own, head_dim, q.dtype, cpu, tiles=tiles)
        shared = torch.arange(rows) % 3 == 0
        places = torch.where(shared, shared.cumsum(0) - 1, -1).int().expand(1, 1, rows).contiguous()
        found = list[Tensor]()
        for slots in (places, torch.arange(rows, dtype=torch.int32).expand(1, 1, rows).contiguous()):
            last = "finish" if slots is places else "pass on"
            staging = launch.Staging.allocate(q, slots, int(slots.max()) + 1)
            output = launch.Output.allocate(q, False, clear=True)
            for stage in ("leave", last):
                launch.forward(q, k, v, *core.schedule("forward"), 0.25, output, staging, stage=stage)
            found += [output.out, output.lse, *(staging[1:] if last == "pass on" else ())]
            terms, gradient = launch.row_terms(x["dout"], output.out, output.lse, None), torch.zeros_like(q)
            for stage in ("leave", last):
                launch.dq(q, k, v, terms, gradient, *core.schedule("dq"), 0.25, staging, stage=stage)
            found += [gradient, *(staging[3:] if last == "pass on" else ())]
        return found

    for ours, theirs in zip(results(tile), results(Tile(64, 64, 4, 1)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("group", [1, 2, 3, 4])
def test_head_dims_that_have_tiles(group: int):
    """All multiples of 8 above 16, for walks whose masks do not compare segments; others keep Triton's."""
    for head_dim in range(8, 257, 8):
        for pass_ in PASSES:
            gluon = [tile.gluon for tile in tiles_for(pass_, 90, head_dim, torch.bfloat16, group)]
            assert gluon[:2] == [16 < head_dim <= 128] * len(gluon[:2]) and not any(gluon[2:])


def test_tiles_in_several_segments_are_refused():
    """Their masks would have to compare segments."""
    rows, cpu = 1000, torch.device("cpu")
    own, shard = Visible(rows, True).on(cpu), Shard((Chunk(0, rows, 0),), rows)
    tiles = dict.fromkeys(PASSES, TILE)
    core = TritonCore(rh.DilatedPattern((24, 96), (1, 2)), 1, shard, own, 16, torch.float16, cpu, tiles=tiles)
    with pytest.raises(ValueError, match=r"block_outer=64.* lie in several segments.*use fewer rows"):
        core.schedule("forward")


def test_what_is_in_flight_is_not_used(monkeypatch: pytest.MonkeyPatch):
    """A wait too few is an error, not a result."""
    for wrong, where in (("wait_for_copies", "not copied yet"), ("wait_for_products", "used in flight")):
        with monkeypatch.context() as broken:
            wait = getattr(in_numpy, wrong)
            broken.setattr(in_numpy, wrong, lambda left, *deps, wait=wait: wait(left + 1, *deps))
            in_numpy.use(broken)
            with pytest.raises(AssertionError, match=where):
                answer(CASES["not causal"], torch.float16, TILE)
