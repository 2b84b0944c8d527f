# SPDX-License-Identifier: Apache-2.0
"""Starting kernels: Triton finds the compiled form of a kernel anew at every launch; here it is found by what decides it.

With 40 arguments and the constants of a module, all of which are examined, this takes longer than a small kernel runs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

ALIGNED = 16  # bytes; Triton compiles other kernels for addresses that are not
KEPT = 4096  # launches that differ in more than addresses

_found: dict[tuple[Any, ...], tuple[Any, list[Any]]] = {}


def on(kernel: Any, grid: tuple[int, int, int]) -> Callable[..., None]:
    """A kernel on so many programs: call it with its arguments in order, the first of them a tensor, and its constants by name."""
    return partial(_start, kernel, grid)


def _start(kernel: Any, grid: tuple[int, int, int], *args: Any, **constants: Any) -> None:
    if not _compiles_by_address(args[0]):
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
