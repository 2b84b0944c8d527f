# SPDX-License-Identifier: Apache-2.0
"""Kernels are started past Triton only where Triton would start what it compiled before; they are compiled together."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import triton

import ring_hilbert as rh
from ring_hilbert.kernels import starting
from ring_hilbert.parallel.execution import Execution
from tests.harness.ranks import run_ranks

if not torch.cuda.is_available():
    import tests.harness.interpreter  # noqa: F401

on_the_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="interprets kernels")


class Kernel:
    """Triton's side: what was asked of it, and what was started without it."""

    arg_names = ("x", "rows", "strides", "SIZE")

    def __init__(self, interpreted: bool = False) -> None:
        self.interpreted = interpreted
        self.asked: list[Any] = []
        self.started: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **constants: Any) -> Any:
            self.asked.append((grid, args, constants))
            return None if self.interpreted else Compiled(self)

        return run


class Compiled:
    """What Triton returns of a launch."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.kernel.started.append((grid, args))


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(starting, "_compiles_by_address", lambda x: True)
    monkeypatch.setattr(starting, "_found", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


def aligned(dtype: torch.dtype = torch.float32, offset: int = 0) -> torch.Tensor:
    memory = torch.empty(64, dtype=dtype)
    return memory[(-memory.data_ptr() % 16) // memory.itemsize + offset :][:8]


def test_other_addresses_and_grids_are_started_at_once():
    kernel, x, y = Kernel(), aligned(), aligned()
    starting.on(kernel, (1, 2, 3))(x, 5, (8, 1), SIZE=64, num_warps=4)
    starting.on(kernel, (4, 2, 1))(y, 5, (8, 1), SIZE=64, num_warps=4)
    assert len(kernel.asked) == 1
    ((grid, args),) = kernel.started
    assert grid == (4, 2, 1) and args[0] is y and args[1:] == (5, (8, 1), 64)


def test_a_kernel_is_started_where_its_tensors_are(monkeypatch: pytest.MonkeyPatch):
    """Triton starts it on the current device, which need not be theirs."""
    current = [0]

    class There(torch.Tensor):
        is_cuda = True
        device = torch.device("cuda", 1)  # pyright: ignore[reportAssignmentType]

    @contextmanager
    def on_device(device: torch.device):
        before, current[0] = current[0], device.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", on_device)
    kernel = Kernel()
    for x in (aligned().as_subclass(There), aligned()):
        starting.on(kernel, (1, 1, 1))(x, 5, (8, 1), SIZE=64)
    devices = [key[1] for key in starting._found]
    assert devices == [1, 0] and current == [0]


def test_what_decides_the_compiled_form_asks_triton(monkeypatch: pytest.MonkeyPatch):
    kernel = Kernel()
    usual = {"x": aligned(), "rows": 16, "strides": (8, 1), "SIZE": 64, "num_warps": 4}
    others = {
        "x": [aligned(torch.int32), aligned(offset=1)], "rows": [17, 1, 2**40], "strides": [(8, 2), (0, 1)], "SIZE": [32],
        "num_warps": [8],
    }  # fmt: skip
    changed = [usual, *({**usual, name: value} for name, values in others.items() for value in values)]
    for x, rows, strides, size, warps in (call.values() for call in changed):
        starting.on(kernel, (1, 1, 1))(x, rows, strides, SIZE=size, num_warps=warps)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    starting.on(kernel, (1, 1, 1))(*list(usual.values())[:3], SIZE=64, num_warps=4)
    starting.on(Kernel(), (1, 1, 1))(*list(usual.values())[:3], SIZE=64, num_warps=4)
    assert len(kernel.asked) == len(changed) + 1 and not kernel.started


def test_addresses_that_are_not_aligned_always_ask_triton():
    kernel = Kernel()
    for offset in (0, 1, 1, 0):
        starting.on(kernel, (1, 1, 1))(aligned(offset=offset), 5, (8, 1), SIZE=64)
    assert len(kernel.asked) == 3 and len(kernel.started) == 1


def test_what_is_interpreted_or_on_another_device_asks_triton(monkeypatch: pytest.MonkeyPatch):
    interpreted, compiled = Kernel(interpreted=True), Kernel()
    for _ in range(2):
        starting.on(interpreted, (1, 1, 1))(aligned(), 5, (8, 1), SIZE=64)
    monkeypatch.undo()
    for _ in range(2):
        starting.on(compiled, (1, 1, 1))(aligned(), 5, (8, 1), SIZE=64)
    assert len(interpreted.asked) == len(compiled.asked) == 2 and not interpreted.started + compiled.started


def test_kernels_are_compiled_together(monkeypatch: pytest.MonkeyPatch):
    """Inside, all are compiled, on several threads, and nothing starts; those that fail say so when they are started."""
    threads, meeting = set(), threading.Barrier(2, timeout=20)

    class Slow(Kernel):
        def warmup(self, *args: Any, grid: tuple[int, ...], **constants: Any) -> None:
            def compile_it() -> None:
                threads.add(threading.get_ident())
                meeting.wait()  # two at a time, or never
                raise ValueError("it does not compile")

            mode = triton.runtime._async_compile.active_mode.get()
            done = [lambda _: None] * (mode.submit.__code__.co_argcount - 3)  # one in Triton 3.6, two in 3.9
            mode.submit(grid, compile_it, *done)

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    kernel, other, x = Slow(), Kernel(), aligned()
    with starting.compiling():
        for number in range(4):
            starting.on(kernel, (number, 1, 1))(x, 5, (8, 1), SIZE=64)
        thread = threading.Thread(target=starting.on(other, (1, 1, 1)), args=(x, 5, (8, 1)), kwargs={"SIZE": 64})
        thread.start()  # it does not know of this
        thread.join()
    assert len(other.asked) == 1
    assert len(threads) == 2 and threading.get_ident() not in threads and not kernel.asked
    starting.on(kernel, (1, 1, 1))(x, 5, (8, 1), SIZE=64)
    assert len(kernel.asked) == 1


@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_trained_is_compiled_ahead(monkeypatch: pytest.MonkeyPatch, compiled: bool):
    """Before its forward, and with the tensors that kernels get; what needs no gradient is not."""
    seen: list[tuple[int, ...]] = []
    monkeypatch.setattr(Execution, "compile_ahead", lambda self, q, k, v, scale: seen.append((*q.shape, k.shape[2])))
    pattern, order = rh.DilatedPattern((8, None), (1, 2)), rh.TokenOrder("hilbert", block=4)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return rh.dilated_attention(x.sin(), x[:, :, :2], x[:, :, :2], pattern, order=order, backend="torch")

    attend = torch.compile(layer, backend="aot_eager") if compiled else layer
    x = torch.randn(1, 16, 4, 8, requires_grad=True)
    attend(x).sum().backward()
    assert seen == [(1, 16, 4, 8, 2)]
    attend(x.detach())
    with torch.no_grad():
        attend(x)
    assert len(seen) == 1


def started_and_rehearsed(rank: int, world: int, way: str) -> tuple[set[Any], set[Any]]:
    """The kernels of a step of two ranks, interpreted, and those that are compiled ahead: names, constants and dtypes."""
    rehearsed, started = set[Any](), set[Any]()
    start, to = starting._start, started

    def noted(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        dtypes = (x.dtype for x in args if isinstance(x, torch.Tensor))
        to.add((kernel.fn.__name__, *sorted(constants.items()), *dtypes))
        if to is started:
            start(kernel, grid, *args, **constants)

    def rehearse(self: Execution, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> None:
        nonlocal to
        to = rehearsed
        self._rehearse(q, k, v, scale, [q.new_empty(sum(e.received.values()), 2, q.shape[3]) for e in self.exchanges])
        to = started

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Execution, "compile_ahead", rehearse)
        patch.setattr(starting, "_start", noted)
        prepared = rh.prepare(64, group=dist.group.WORLD, strategy=way)
        q, k = torch.randn(1, 64, 4, 16, requires_grad=True), torch.randn(1, 64, 2, 16, requires_grad=True)
        pattern = rh.DilatedPattern((32, None), (1, 4), segment_shift=8)
        rh.dilated_attention(q, k, k, pattern, prepared=prepared, backend="triton").sum().backward()
    return started, rehearsed


@on_the_cpu
@pytest.mark.parametrize("way", ["exchange", pytest.param("ring", marks=pytest.mark.full)])
def test_what_ranks_start_was_rehearsed(way: str):
    for started, rehearsed in run_ranks(started_and_rehearsed, 3, way):
        assert len(started) >= 8 and started <= rehearsed


COMPILED_AHEAD = """
import os, sys, torch, triton.compiler
from functools import partial
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Stub:
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_current_device = get_current_stream = lambda self, *_: 0

driver.set_active(Stub())
import ring_hilbert as rh
from ring_hilbert.kernels import launch, prune, starting, tiles
from ring_hilbert.ops.core import Shard
from ring_hilbert.ops.triton_core import TritonCore
from ring_hilbert.ops.visible import Visible
from ring_hilbert.ops.visits import Chunk

rows, dim, cpu = 512, int(sys.argv[1]), torch.device("cpu")
launch._processors = lambda device: 132
visible = Visible(rows, True, order=rh.TokenOrder("hilbert", block=256))
pattern, shard = rh.DilatedPattern((256, None), (1, 4)), Shard((Chunk(0, rows, 0),), rows, visible.order)
core = TritonCore(
    pattern, 2, shard, visible.on(cpu), dim, torch.bfloat16, cpu,
    tiles={name: tiles.tiles_for(name, 90, dim, torch.bfloat16, 4)[1] for name in tiles.PASSES}, group=4,
)
q, k = torch.zeros(1, rows, 8, dim).bfloat16(), torch.zeros(1, rows, 2, dim).bfloat16()

def step():
    out, lse, error = core.finish(core.begin(q, k, k, 0.1))
    core.rest_of_backward(core.begin_backward(q, q, k, k, out, lse, error, 0.1, torch.float32, 1.0))

with starting.compiling():
    step()

def refuse(*_, **__):
    raise AssertionError("left to compile")

def known(kernel, grid, *args, **constants):
    kernel.compile = triton.compiler.compile = refuse  # what Triton would call
    kernel.warmup(*args, grid=grid, **constants)

launch.on = prune.on = lambda kernel, grid: partial(known, kernel, grid)
step()
"""


@pytest.mark.full
@pytest.mark.parametrize("dim", [64, 128])
def test_nothing_is_left_to_compile(dim: int, tmp_path: Path):
    """With Triton's own compiler: a step finds all its kernels among those that were compiled together."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", COMPILED_AHEAD, str(dim)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
