# SPDX-License-Identifier: Apache-2.0
"""Gluon in NumPy: runs the kernels for compute capability 9.0 on the CPU, one program after another, with float32 products.

Copies and products are done at once but count as in flight until they are waited for. What uses either too early, or overwrites
what a product in flight reads, is an error. Layouts mean nothing here, and all warps of a program advance together.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

MODULES = [f"ring_hilbert.kernels.hopper_{name}" for name in ("steps", "forward", "backward")]


class Values(np.ndarray):
    """A tensor or a scalar in registers."""

    type = types.SimpleNamespace(layout=types.SimpleNamespace(parent=None))

    def __array_wrap__(self, array: Any, context: Any = None, return_scalar: bool = False) -> Any:
        return values(array)

    def __iadd__(self, other: Any) -> Any:
        return self + other  # another value: other names keep theirs

    def __isub__(self, other: Any) -> Any:
        return self - other

    def to(self, dtype: Any) -> Values:
        """In another dtype."""
        return values(np.asarray(self).astype(dtype))


def values(array: Any, dtype: Any = None) -> Values:
    return np.asarray(array, dtype).view(Values)


class Pointer:
    """Addresses in the memory that holds a tensor."""

    def __init__(self, memory: np.ndarray, offset: Any) -> None:
        self.memory, self.offset = memory, offset
        self.dtype = types.SimpleNamespace(element_ty=memory.dtype.type)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, np.asarray(self.offset, np.int64) + np.asarray(offset, np.int64))

    def cells(self, mask: Any, *others: Any) -> list[np.ndarray]:
        """Offsets, mask and `others` in one shape; all offsets that count lie in the memory."""
        found = list(np.broadcast_arrays(self.offset, True if mask is None else mask, *others))
        assert ((found[0] >= 0) & (found[0] < len(self.memory)))[found[1]].all(), "outside of the tensor"
        return found


class Product:
    """The result of a product in flight."""

    def __init__(self, result: Values, reads: Sequence[np.ndarray]) -> None:
        self.result, self.reads, self.shape, self.done = result, reads, result.shape, False


class Program:
    """What a program has in flight, oldest first."""

    def __init__(self, ids: tuple[int, ...], warps: int) -> None:
        self.ids, self.warps = ids, warps
        self.copies: list[list[np.ndarray]] = [[]]  # where to, by groups; the last one is open
        self.products: list[Product] = []

    def ready(self, array: np.ndarray) -> np.ndarray:
        """`array` in shared memory, which no copy may still be writing."""
        assert not any(np.may_share_memory(array, to) for group in self.copies for to in group), "not copied yet"
        return array


class Shared:
    """A block of shared memory."""

    program: Program

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape, self.dtype = array, list(array.shape), array.dtype.type

    def index(self, i: Any) -> Shared:
        """The part at `i` of the first axis."""
        assert 0 <= i < len(self.array)
        return Shared(self.array[int(i)])

    def permute(self, order: tuple[int, ...]) -> Shared:
        """The same memory with its axes in another order."""
        return Shared(self.array.transpose(order))

    def load(self, layout: object) -> Values:
        """What lies here."""
        return values(Shared.program.ready(self.array).copy())


def load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Values:
    offset, mask = pointer.cells(mask)
    return values(np.where(mask, pointer.memory[np.where(mask, offset, 0)], np.asarray(other, pointer.memory.dtype)))


def store(pointer: Pointer, value: Any, mask: Any = None) -> None:
    offset, mask, value = pointer.cells(mask, value)
    pointer.memory[offset[mask]] = value[mask]


def send(to: Shared, pointer: Pointer, mask: Any = None) -> None:
    program = Shared.program
    reads = [array for product in program.products for array in product.reads]
    assert not any(np.may_share_memory(to.array, array) for array in reads), "still read by a product"
    to.array[...] = load(pointer, mask)
    program.copies[-1].append(to.array)


def wait_for_copies(left: int) -> None:
    """`cp.async.wait_group`: copies after the last commit are not waited for."""
    copies = Shared.program.copies
    del copies[: max(0, len(copies) - 1 - left)]


def product(a: Any, b: Shared, sums: Any, *, use_acc: bool = True, is_async: bool = False) -> Any:
    program = Shared.program
    reads = [program.ready(x.array) for x in (a, b) if isinstance(x, Shared)]
    left, right = (np.asarray(x.array if isinstance(x, Shared) else x, np.float32) for x in (a, b))
    result = values(left @ right + (np.asarray(sums.result if isinstance(sums, Product) else sums) if use_acc else 0.0))
    assert result.shape == sums.shape and result.dtype == np.float32
    program.products.append(Product(result, reads))
    return program.products[-1] if is_async else wait_for_products(0, [program.products[-1]])


def wait_for_products(left: int, deps: Sequence[Any]) -> Any:
    """Results, of products that are done once at most `left` are in flight."""
    products = Shared.program.products
    for done in products[: max(0, len(products) - left)]:
        done.done = True
    del products[: max(0, len(products) - left)]
    assert all(x.done for x in deps if isinstance(x, Product)), "used in flight"
    results = [x.result if isinstance(x, Product) else x for x in deps]
    return results if len(results) > 1 else results[0]


def in_flight(sums: Values) -> Product:
    """`warpgroup_mma_init`."""
    begun = Product(sums, [])
    begun.done = True
    return begun


class Kernel:
    """Started like Triton's: `kernel[grid](*arguments, **constants)`."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*args: Any, num_warps: int, maxnreg: int | None = None, **constants: Any) -> None:
            given = [_pointer(x) if isinstance(x, torch.Tensor) else x for x in args]
            with np.errstate(all="ignore"):
                for ids in np.ndindex(*grid):
                    Shared.program = Program(ids, num_warps)
                    self.function(*given, **constants)

        return run


def _pointer(x: torch.Tensor) -> Pointer:
    memory = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())  # pyright: ignore[reportArgumentType]
    return Pointer(memory.numpy(), x.storage_offset())


def _jit(function: Any = None, **options: Any) -> Any:
    return Kernel if function is None else function  # those with options are kernels, others their functions


def _assembly(text: str, constraints: str, args: Sequence[Any], **options: Any) -> Any:
    return values(np.log2(args[0])) if text.startswith("lg2") else args[0]


class _Layout:
    def __init__(self, *args: Any) -> None: ...

    @staticmethod
    def get_default_for(*args: Any) -> None: ...


def _allocate(dtype: Any, shape: Sequence[int], layout: object) -> Shared:
    return Shared(np.full(shape, np.nan if issubclass(dtype, np.floating) else -7, dtype))


def _language() -> types.ModuleType:
    made = types.ModuleType("gluon.language")
    vars(made).update(
        {name: getattr(np, name) for name in ("int32", "int64", "uint32", "float32")},
        **dict.fromkeys(
            ("SliceLayout", "BlockedLayout", "NVMMADistributedLayout", "NVMMASharedLayout", "SwizzledSharedLayout",
             "DotOperandLayout"), _Layout,
        ),
        **{name: _elementwise(getattr(np, name)) for name in ("where", "maximum", "minimum", "exp2", "log2")},
        **{name: _on_array(getattr(np, name)) for name in ("max", "sum", "reshape", "expand_dims")},
        load=load, store=store, allocate_shared_memory=_allocate, inline_asm_elementwise=_assembly, static_range=range,
        constexpr=lambda x: x, num_warps=lambda: Shared.program.warps,
        program_id=lambda axis: values(Shared.program.ids[axis], np.int32),
        arange=lambda start, stop, layout: values(np.arange(start, stop, dtype=np.int32)),
        full=lambda shape, value, dtype, layout: values(np.full(shape, value, dtype)),
        zeros=lambda shape, dtype, layout: values(np.zeros(shape, dtype)),
        convert_layout=lambda x, layout, assert_trivial=False: x, multiple_of=_multiple_of,
    )  # fmt: skip
    return made


def _elementwise(function: Callable[..., Any]) -> Callable[..., Values]:
    return lambda *args: values(function(*args))


def _multiple_of(x: Any, of: int) -> Any:
    assert not np.any(x % of), "not a multiple"
    return x


def _on_array(function: Callable[..., Any]) -> Callable[..., Values]:
    return lambda x, how: values(function(np.asarray(x), how))


def use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let launches take the kernels for compute capability 9.0 in NumPy."""
    hopper, gluon = types.ModuleType("hopper"), types.ModuleType("gluon")
    vars(hopper).update(
        async_copy=types.SimpleNamespace(
            async_load=send, commit_group=lambda: Shared.program.copies.append([]), wait_group=wait_for_copies
        ),
        fence_async_shared=lambda: None, warpgroup_mma=product, warpgroup_mma_wait=wait_for_products,
        warpgroup_mma_init=in_flight,
    )  # fmt: skip
    vars(gluon).update(jit=_jit, constexpr_function=lambda function: function, language=_language())
    with monkeypatch.context() as importing:
        import triton.experimental.gluon.language.nvidia.hopper  # noqa: F401  # the real one, which the interpreter needs later

        importing.setattr(sys.modules["triton.experimental"], "gluon", gluon)
        importing.setitem(sys.modules, "triton.experimental.gluon", gluon)
        importing.setitem(sys.modules, "triton.experimental.gluon.language.nvidia.hopper", hopper)
        for name in MODULES:
            spec = importlib.util.find_spec(name)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            monkeypatch.setitem(sys.modules, name, module)
            spec.loader.exec_module(module)
