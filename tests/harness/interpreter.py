# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter, as the tests of the kernels need it where there is no GPU: import this before anything is computed.

`tests.conftest` sets TRITON_INTERPRET before Triton is imported. What Triton 3.6 gets wrong is mended here: products of
bfloat16 are taken of the bits, numbers are cut off rather than rounded to bfloat16, and loop bounds are arrays of one
element, which numpy 2.4 no longer takes for integers. Products are summed in float64: a GPU gives `q @ k.T` and `k @ q.T` the same
scores, numpy in float32 only with some builds of BLAS on some processors.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _scalars_are_integers(tensor: Any, scope: Any, patch: Any = interpreter._patch_lang_tensor) -> None:
    patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def _dot_of_numbers(
    self: Any, a: Any, b: Any, total: Any, *rest: Any, dot: Any = interpreter.InterpreterBuilder.create_dot
) -> Any:
    a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
    if a.dtype.scalar == tl.float32:
        product = (a.data.astype(np.float64) @ b.data.astype(np.float64)).astype(np.float32)
        return interpreter.TensorHandle(product + total.data, total.dtype.scalar)
    return dot(self, a, b, total, *rest)


def _rounded(self: Any, x: Any, dtype: Any, cast: Any = interpreter.InterpreterBuilder.cast_impl) -> Any:
    if x.dtype.scalar != tl.float32 or dtype.scalar != tl.bfloat16:
        return cast(self, x, dtype)
    bits = np.ascontiguousarray(x.data, np.float32).view(np.uint32).astype(np.uint64)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    data = np.where(np.isnan(x.data), 0x7FC0, nearest).astype(np.uint16)
    return interpreter.TensorHandle(data, dtype.scalar)


def _patched_once(_: Any, patch: Any = interpreter._patch_lang) -> Any:
    """Patch the language at a launch, and not once more at every function that is called in it, which takes most of the time."""
    if _running:
        return None
    scope = patch(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    _running.append(restore := scope.restore)
    scope.restore = lambda: (_running.clear(), restore())
    return scope


def _block_type(self: Any, element_ty: Any, shape: Any, make: Any = tl.block_type.__init__) -> None:
    """Equal types share their fields, which otherwise take a fifth of the time."""
    key = element_ty.name, *shape
    if key not in _types:
        make(self, element_ty, shape)
        _types[key] = vars(self)
    self.__dict__ = _types[key]


def _tensor(self: Any, handle: Any, type: Any, make: Any = tl.tensor.__init__) -> None:  # noqa: A002
    """Tensors of a type share what follows from it."""
    known = vars(type)
    if "of_tensors" not in known:
        make(self, None, type)
        known["of_tensors"] = vars(self).copy()
    vars(self).update(known["of_tensors"], handle=handle)


def _numpy_dtype(dtype: Any, find: Any = interpreter._get_np_dtype) -> np.dtype:
    known = vars(dtype)
    if "of_numpy" not in known:
        known["of_numpy"] = find(dtype)
    return known["of_numpy"]


_running: list[Any] = []  # the launch, if there is one
_types: dict[tuple[Any, ...], dict[str, Any]] = {}
interpreter._patch_lang = _patched_once
# A third of the time, and no test is that large.
interpreter.interpreter_builder.options.__dict__["sanitize_overflow"] = False
interpreter._patch_lang_tensor = _scalars_are_integers
interpreter._get_np_dtype = _numpy_dtype
tl.block_type.__init__, tl.tensor.__init__ = _block_type, _tensor
builder: Any = interpreter.InterpreterBuilder
builder.create_dot = _dot_of_numbers
builder.cast_impl = _rounded
