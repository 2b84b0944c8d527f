# SPDX-License-Identifier: Apache-2.0
"""Starting kernels: Triton finds the compiled form of a kernel anew at every launch; here it is found by what decides it.

With 40 arguments and the constants of a module, all of which are examined, this takes longer than a small kernel runs.
Compiling them takes two seconds each, one after another, in which other ranks wait for this one: `compiling` does all at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

ALIGNED = 16  # bytes; Triton compiles other kernels for addresses that are not
KEPT = 4096  # launches that differ in more than addresses

_compiling = ContextVar("compiling", default=False)  # of a thread: others start kernels meanwhile
_found: dict[tuple[Any, ...], tuple[Any, list[Any]]] = {}


def on(kernel: Any, grid: tuple[int, int, int]) -> Callable[..., None]:
    """A kernel on so many programs: call it with its arguments in order, the first of them a tensor, and its constants by name."""
    return partial(_start, kernel, grid)


@contextmanager
def compiling() -> Iterator[None]:
    """Inside, kernels are not started but compiled, several at a time. One that does not compile says so when it is started."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(2, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    before = _compiling.set(True)
    try:
        with ThreadPoolExecutor(threads) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
            yield
    finally:
        _compiling.reset(before)


def _start(kernel: Any, grid: tuple[int, int, int], *args: Any, **constants: Any) -> None:
    first = args[0]
    if first.is_cuda and first.device.index != torch.cuda.current_device():  # Triton starts on the latter
        with torch.cuda.device(first.device):
            _start(kernel, grid, *args, **constants)
        return
    if _compiling.get():
        kernel.warmup(*args, grid=grid, **constants)
        return
    if not _compiles_by_address(first):
        kernel[grid](*args, **constants)
        return
    addresses, kinds = 0, []
    for x in args:
        if isinstance(x, Tensor):
            addresses |= x.data_ptr()
            x = x.dtype
        kinds.append(x)
    if addresses % ALIGNED:
        kernel[grid](*args, **constants)
        return
    # Numbers by their values, of which Triton looks at a few properties.
    key = (id(kernel), torch.cuda.current_device(), *kinds, *constants.items())
    if key in _found:
        compiled, rest = _found[key]
        compiled[grid](*args, *rest)
        return
    compiled = kernel[grid](*args, **constants)
    if compiled is not None:  # the interpreter compiles nothing
        if len(_found) >= KEPT:
            _found.clear()
        _found[key] = compiled, [constants[name] for name in kernel.arg_names[len(args) :]]


def _compiles_by_address(x: Tensor) -> bool:
    """Whether, of a tensor, only dtype and alignment decide what is compiled: for AMD's GPUs its size does too."""
    return x.is_cuda and torch.version.hip is None
