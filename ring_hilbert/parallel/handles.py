# SPDX-License-Identifier: Apache-2.0
"""Handles: tensors that stand for Python objects, so that a compiled graph can pass batch data on without looking inside.

A handle is a number, int64 `[]` on the CPU, so that reading it does not synchronise. The object lives as long as its handle;
autograd saves the handle like any tensor, compiled or not, and so keeps the object until backward.
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
    """A handle that keeps `held` alive. `held` should not refer to it: a cycle would wait for the garbage collector."""
    number = next(_numbers)
    _objects[number] = held
    with torch.inference_mode(False):  # otherwise autograd could not save it
        handle = torch.tensor(number, dtype=torch.int64, device="cpu")
    handle.held = held  # type: ignore[attr-defined]  # attributes live as long as the tensor, even if only C++ holds it
    return handle


def held_by(handle: Tensor) -> Any:
    """The object of `handle`, or of a tensor with the same value.

    Raises:
        RuntimeError: if the object was freed with its handle.
    """
    held = _objects.get(int(handle.numpy()))
    if held is None:
        raise RuntimeError(
            "the Prepared of this batch was freed before its backward: hooks on saved tensors have replaced its handle by a "
            "copy; keep the Prepared until backward"
        )
    return held
