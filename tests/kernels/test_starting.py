# SPDX-License-Identifier: Apache-2.0
"""Kernels are started past Triton only where Triton would start what it compiled for an earlier launch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ring_hilbert.kernels import starting


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
