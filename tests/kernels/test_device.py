# SPDX-License-Identifier: Apache-2.0
"""What only a CUDA device shows: nothing is read back, a batch may change in a graph, kernels as they are compiled, and that
fused parts of a model compute what the model does.
"""

from __future__ import annotations

import ctypes
import math
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import ring_hilbert as rh
from ring_hilbert.training.readback import read_later
from tests.training.test_fused import model_of
from tests.training.test_invariance import train, true_gradients

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ROWS = 4096
PATTERN = rh.DilatedPattern((512, 2048, None), (1, 4, 16))
HILBERT = rh.TokenOrder("hilbert", block=512)


def tensors(rows: int = ROWS) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    options = {"generator": generator, "device": "cuda", "dtype": torch.bfloat16}
    q, dout = (torch.randn(1, rows, 8, 64, **options) for _ in range(2))
    k, v = (torch.randn(1, rows, 2, 64, **options) for _ in range(2))
    return [q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout]


def attend(x: list[Tensor], prepared: rh.Prepared) -> list[Tensor]:
    *inputs, dout = x
    out = rh.dilated_attention(*inputs, PATTERN, prepared=prepared)
    return [out, *torch.autograd.grad(out, inputs, dout)]


def batch_of(length: int, order: rh.TokenOrder | None) -> rh.Prepared:
    documents = torch.arange(ROWS)[None] // length
    return rh.shard_batch({"input_ids": documents, "document_ids": documents}, order=order, device="cuda")[
        "ring_hilbert"
    ]


def test_reading_does_not_wait_for_what_follows():
    x = torch.tensor([1.0, 2.0], device="cuda")
    read_later(x)()  # the first allocates pinned memory
    torch.cuda.synchronize()
    found = read_later(x)
    x.zero_()
    torch.cuda._sleep(10**9)  # half a second
    begun = time.perf_counter()
    assert found() == [1.0, 2.0] and time.perf_counter() - begun < 0.1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_of_another_device_than_the_current_one():
    here = tensors()
    there = [x.detach().to("cuda:1").requires_grad_(x.requires_grad) for x in here]
    for mine, other in zip(*(attend(x, rh.prepare(ROWS)) for x in (here, there)), strict=True):
        assert torch.equal(mine, other.to(mine.device))


@pytest.mark.parametrize("order", [None, HILBERT])
def test_nothing_is_read_back(order: rh.TokenOrder | None):
    """After one warm-up call of the pattern: no synchronisation from `prepare`'s return to the end of backward."""
    x = tensors()
    attend(x, batch_of(4096, order))
    prepared = batch_of(100, order)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(x, prepared)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        attend(x, batch_of(300, order))
    names = {event.key for event in trace.key_averages()}
    begins = next(i for i, e in enumerate(trace.events()) if "ring_hilbert" in e.name)
    late = [e.name for e in list(trace.events())[begins:]]
    assert names and not [
        name for name in late if "DtoH" in name or name in ("cudaStreamSynchronize", "cudaEventSynchronize")
    ]


@pytest.mark.parametrize("order", [None, HILBERT])
def test_a_captured_graph_follows_documents_in_place(order: rh.TokenOrder | None):
    """`refresh`, forward and backward replayed for other documents and positions equal a fresh call, to the bit."""
    x = tensors()
    ids, places = torch.zeros(ROWS, dtype=torch.int64, device="cuda"), torch.arange(ROWS, device="cuda")
    prepared = rh.prepare(ROWS, order=order, document_ids=ids, positions=places)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            prepared.refresh(places, ids)
            attend(x, prepared)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        prepared.refresh(places, ids)
        results = attend(x, prepared)
    for length in (ROWS, 700, 33):
        ids.copy_(torch.arange(ROWS, device="cuda") // length)
        ids[-100:] = -1
        places.copy_(torch.arange(ROWS, device="cuda") // 2)
        graph.replay()
        torch.cuda.synchronize()
        fresh = attend(x, rh.prepare(ROWS, order=order, document_ids=ids, positions=places))
        eager = attend(x, prepared)  # of what the replay wrote
        for given in (results, eager):
            assert all(torch.equal(a, b) for a, b in zip(given, fresh, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_other_devices_are_left_alone():
    """This process has a context on the device that it computes on, and on no other."""
    driver = ctypes.CDLL("libcuda.so.1")
    with torch.cuda.device(1):
        active, flags = ctypes.c_int(), ctypes.c_uint()
        driver.cuDevicePrimaryCtxGetState(0, ctypes.byref(flags), ctypes.byref(active))
        before = active.value
        x = [t.detach().to("cuda:1").requires_grad_(i < 3) for i, t in enumerate(tensors(512) if before else _on_one())]
        attend(x, rh.prepare(512))
        driver.cuDevicePrimaryCtxGetState(0, ctypes.byref(flags), ctypes.byref(active))
    assert active.value == before


def _on_one() -> list[Tensor]:
    return [torch.randn(1, 512, heads, 64, device="cuda:1", dtype=torch.bfloat16) for heads in (8, 2, 2, 8)]


@pytest.mark.parametrize(
    ("model_type", "how"),
    [("llama", "liger"), ("qwen3", "liger"), ("gemma2", "liger"), ("phi3", "liger"), ("llama", "compile")],
)
def test_fused_parts_compute_what_the_model_does(tmp_path: Path, model_type: str, how: str):
    """20 losses and the first gradients: the same in float32, and as close to the truth as unfused in bfloat16."""
    pytest.importorskip("liger_kernel")
    truth = true_gradients(model_of(model_type, tmp_path))
    for precision, losses, errors in (("fp32", 1e-4, 1e-3), ("bf16", 1e-2, 0.1)):
        plain, fused = (
            train(0, 1, model_of(model_type, tmp_path, train__fused=each, train__precision=precision), truth)
            for each in ("none", how)
        )
        assert fused["losses"] == pytest.approx(plain["losses"], rel=losses)
        assert max(fused["errors"]) < max(errors, 1.5 * max(plain["errors"]))


# ---- the kernels for compute capability 9.0, as compiled (elsewhere these tests are of the Triton kernels)

X4 = rh.DilatedPattern((256, 1024, None), (1, 4, 16), segment_shift=-37, head_shift=3)
RAGGED = torch.tensor([3, 250, 2, 1, 600, 444]).repeat_interleave(torch.tensor([3, 250, 2, 1, 600, 444]))
KINDS = {
    "dense": (rh.DilatedPattern((None,), (1,)), 8, 8, {}),
    "ladder": (X4, 8, 2, {}),
    "groups of three": (X4, 6, 2, {}),
    "hilbert": (X4, 8, 2, {"order": rh.TokenOrder("hilbert", block=256)}),
    "duplicates": (rh.DilatedPattern((256, 256, 512), (1, 1, 2)), 4, 2, {}),
    "uncovered rows": (rh.DilatedPattern((300, 600), (3, 6)), 4, 1, {}),
    "short segments": (rh.DilatedPattern((24, 96), (1, 2)), 4, 2, {}),
    "documents": (X4, 8, 2, {"document_ids": RAGGED}),
    "documents, hilbert": (X4, 8, 4, {"document_ids": RAGGED, "order": rh.TokenOrder("hilbert", block=256)}),
    "padding": (X4, 4, 2, {"document_ids": torch.where(torch.arange(1300) < 1000, 0, -1)}),
    "ties": (X4, 4, 2, {"positions": torch.arange(1300) // 3}),
    "counted once": (replace(X4, count="once"), 8, 2, {}),
    "weights": (replace(X4, weights=(1, 4, 16)), 8, 2, {"document_ids": RAGGED}),
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("dtype", "head_dim"), [*((torch.bfloat16, dim) for dim in (24, 40, 48, 64, 96, 128)), (torch.float16, 64)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_are_as_good_as_eager(kind: str, dtype: torch.dtype, head_dim: int, causal: bool):
    """Max error at most 2x, mean at most 1.5x that of eager autograd, and a bit of the dtype; rows lie within a larger tensor."""
    pattern, heads, kv_heads, facts = KINDS[kind]
    facts = {name: x.cuda() if isinstance(x, Tensor) else x for name, x in facts.items()}
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(2, h, 1310, head_dim, generator=generator, device="cuda").to(dtype).transpose(1, 2)[:, 5:1305]
        for h in (heads, kv_heads, kv_heads)
    )
    found = rh.reference.compare(rh.dilated_attention, q, k, v, pattern, backend="triton", causal=causal, **facts)
    for name, x in found.items():
        bit = torch.finfo(torch.float32 if name == "lse" else dtype).eps * (8 if name == "lse" else 1)
        assert x.same_rows_uncovered, name
        assert x.max_error <= 2 * x.eager_max_error + bit, f"{name}: {x}"
        assert x.mean_error <= 1.5 * x.eager_mean_error + bit, f"{name}: {x}"


@pytest.mark.parametrize(("head_dim", "kv_heads"), [*((dim, 2) for dim in (24, 48, 64, 128)), (128, 8)])
@pytest.mark.parametrize("order", [None, HILBERT])
def test_a_hundred_runs_are_equal_to_the_bit(order: rh.TokenOrder | None, head_dim: int, kv_heads: int):
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(1, ROWS, h, head_dim, generator=generator, device="cuda").bfloat16()
        for h in (8, kv_heads, kv_heads)
    )
    x = [q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), torch.ones_like(q)]
    prepared = batch_of(700, order)
    first = attend(x, prepared)
    for _ in range(99):
        assert all(map(torch.equal, first, attend(x, prepared)))


@pytest.mark.parametrize(("head_dim", "kv_heads"), [*((dim, 2) for dim in (24, 40, 48, 64, 96, 128)), (128, 8)])
@pytest.mark.parametrize("order", [None, HILBERT])
def test_staged_rows_continue(order: rh.TokenOrder | None, head_dim: int, kv_heads: int):
    """Rows that a launch leaves, one passes on and one finishes are those of three times the keys; the others of one pass."""
    from ring_hilbert.kernels import launch
    from ring_hilbert.ops.core import Shard
    from ring_hilbert.ops.triton_core import TritonCore
    from ring_hilbert.ops.visible import Visible
    from ring_hilbert.ops.visits import Chunk

    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, dout = (
        torch.randn(1, ROWS, h, head_dim, generator=generator, device="cuda").bfloat16()
        for h in (8, kv_heads, kv_heads, 8)
    )
    own = Visible(ROWS, True, order=order).on(q.device)
    shard, group = Shard((Chunk(0, ROWS, 0),), ROWS, order), 8 // kv_heads
    core = TritonCore(PATTERN, kv_heads, shard, own, head_dim, q.dtype, q.device, group=group)
    scale = head_dim**-0.5
    out, lse, _ = core.finish(core.begin(q, k, v, scale))
    staged = torch.arange(ROWS, device="cuda") % 3 == 0
    slots = torch.where(staged, staged.cumsum(0) - 1, -1).int().expand(1, kv_heads, ROWS).contiguous()
    tile, schedule = core.schedule("forward")
    staging = launch.Staging.allocate(q, slots, int(staged.sum()))
    output = launch.Output.allocate(q, False)
    all_staged = torch.arange(ROWS, device="cuda").int().expand(1, kv_heads, ROWS).contiguous()
    whole = launch.Staging.allocate(q, all_staged, ROWS)
    launch.forward(q, k, v, tile, schedule, scale, output, staging)
    launch.forward(q, k, v, tile, schedule, scale, output, staging, stage="finish")
    twice = torch.where(staged, lse + math.log(2), lse)
    torch.testing.assert_close(output.lse, twice, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.out[:, ~staged], out[:, ~staged], atol=0, rtol=0)
    torch.testing.assert_close(output.out.float(), out.float(), atol=1e-2, rtol=1e-2)
    launch.forward(q, k, v, tile, schedule, scale, output, whole)
    launch.forward(q, k, v, tile, schedule, scale, output, whole, stage="pass on")
    places = torch.arange(ROWS, device="cuda")
    by_head = [torch.stack((torch.full_like(places, head), places, places)) for head in range(kv_heads)]
    rows = torch.stack(by_head, 1).flatten(1)
    launch.finish_rows(output, whole, rows)
    torch.testing.assert_close(output.lse, lse + math.log(2), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.out.float(), out.float(), atol=1e-2, rtol=1e-2)

    terms = launch.row_terms(dout, out, lse, None)
    tile, schedule = core.schedule("dq")
    once, both = torch.empty_like(q), torch.empty_like(q)
    launch.dq(q, k, v, terms, once, tile, schedule, scale)
    launch.dq(q, k, v, terms, both, tile, schedule, scale, staging)
    launch.dq(q, k, v, terms, both, tile, schedule, scale, staging, stage="finish")
    torch.testing.assert_close(both[:, ~staged], once[:, ~staged], atol=0, rtol=0)
    torch.testing.assert_close(both[:, staged].float(), 2 * once[:, staged].float(), atol=1e-2, rtol=1e-2)
