# SPDX-License-Identifier: Apache-2.0
"""What holds between a host and a CUDA device: nothing is read back, a batch may change under a captured graph, and fused parts of
a model compute what the model does.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import ring_hilbert as rh
from tests.test_fused import model_of
from tests.test_training_invariance import train, true_gradients

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
        assert all(torch.equal(a, b) for a, b in zip(results, fresh, strict=True))


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
