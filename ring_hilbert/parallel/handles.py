# SPDX-License-Identifier: Apache-2.0
"""Handles: Python objects as tensors, the one kind of batch data that a compiled graph takes without looking inside.

A handle is a number, int64 `[]` on the CPU, so that reading it waits for no device. The object lives as long as its handle
does; autograd saves the handle like any tensor, compiled or not, and so keeps the object until backward.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

_objects: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def new_handle(held: Any) -> Tensor:
    """A handle that keeps `held` alive. `held` should not refer to it: a cycle would have to wait for the garbage collector."""
    number = next(_numbers)
    _objects[number] = held
    with torch.inference_mode(False):  # or autograd could not save it
        handle = torch.tensor(number, dtype=torch.int64, device="cpu")
    handle.held = held  # type: ignore[attr-defined]  # attributes live as long as the tensor, also where only C++ has it
    return handle


def held_by(handle: Tensor) -> Any:
    """The object of `handle`, or of a tensor with the same value.

    Raises:
        RuntimeError: the object is gone, with its handle.
    """
    held = _objects.get(int(handle.numpy()))
    if held is None:
        raise RuntimeError(
            "the Prepared of this batch is gone before its backward: hooks on saved tensors have replaced its handle by a "
            "copy; keep the Prepared until backward"
        )
    return held
