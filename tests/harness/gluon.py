# SPDX-License-Identifier: Apache-2.0
"""Gluon in NumPy: runs the kernels for compute capability 9.0 on the CPU, one program after another, with float32 products.

Products are done at once but count as in flight until they are waited for, and copies are done then. What uses either too early,
or overwrites what a product in flight reads, is an error. Layouts mean nothing here, and all warps of a program advance together;
the functions of a `warp_specialize` are threads, and their barriers are real.
"""

from __future__ import annotations

import importlib.util
import sys
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

MODULES = [
    f"ring_hilbert.kernels.hopper_{name}" for name in ("walk", "steps", "forward", "specialized_forward", "backward")
]
PATIENCE = 60.0  # seconds at a barrier, then it is a deadlock


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


class Program(threading.local):
    """The program that a thread runs, or its part of one, and what that has in flight, oldest first."""

    def begin(self, ids: tuple[int, ...], grid: tuple[int, ...], warps: int) -> None:
        """Nothing is in flight."""
        self.ids, self.grid, self.warps = ids, grid, warps
        self.copies: list[list[tuple[np.ndarray, Any]]] = [[]]  # where to and what, by groups; the last one is open
        self.products: list[Product] = []

    def ready(self, array: np.ndarray) -> np.ndarray:
        """`array` in shared memory, which no copy may still be writing."""
        assert not any(np.may_share_memory(array, to) for group in self.copies for to, _ in group), "not copied yet"
        return array


class Barrier:
    """An mbarrier: phases that end with a number of arrivals."""

    changed = threading.Condition()

    def __init__(self, count: int) -> None:
        self.count, self.left, self.phase = count, count, 0

    def arrive(self, count: int) -> None:
        """So many arrive."""
        with self.changed:
            self.left -= count
            assert self.left >= 0, "too many arrivals"
            if self.left == 0:
                self.left, self.phase = self.count, self.phase + 1
                self.changed.notify_all()

    def wait(self, parity: Any) -> None:
        """Until the last phase that ended had this parity; before the first, one of parity 1 is taken to have ended."""
        with self.changed:
            assert self.changed.wait_for(lambda: (self.phase + 1) % 2 == parity, PATIENCE), "deadlock"


class Shared:
    """A block of shared memory."""

    program = Program()
    barriers: ClassVar[dict[int, Barrier]] = {}  # by their address

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

    def store(self, x: Values) -> None:
        """Write here."""
        self.array[...] = x

    @property
    def barrier(self) -> Barrier:
        """The mbarrier here."""
        return Shared.barriers[self.array.ctypes.data]


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
    program.copies[-1].append((to.array, load(pointer, mask)))
    to.array[...] = np.nan if np.issubdtype(to.dtype, np.floating) else -7


def wait_for_copies(left: int) -> None:
    """`cp.async.wait_group`: copies after the last commit are not waited for."""
    copies = Shared.program.copies
    done = max(0, len(copies) - 1 - left)
    _arrived(copies[:done])
    del copies[:done]


def _arrived(groups: Sequence[Sequence[tuple[np.ndarray, Any]]]) -> None:
    for to, what in (copy for group in groups for copy in group):
        to[...] = what


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


def copies_arrive(to: Shared, increment_count: bool) -> None:
    """`cp.async.mbarrier.arrive.noinc` of all threads: they arrive when their copies so far are done, which here is now."""
    assert not increment_count
    program = Shared.program
    _arrived(program.copies)
    program.copies = [[]]
    to.barrier.arrive(32 * program.warps)


def new_barrier(at: Shared, count: int) -> None:
    Shared.barriers[at.array.ctypes.data] = Barrier(count)


def arrive(at: Shared, count: int) -> None:
    at.barrier.arrive(count)


def specialize(functions: Sequence[tuple[Any, Any]], warps: Sequence[int], registers: Sequence[int]) -> None:
    """`warp_specialize`: each function in a thread."""
    program, failures = Shared.program, list[BaseException]()
    ids, grid = program.ids, program.grid

    def run(function: Any, args: Any, number: int) -> None:
        Shared.program.begin(ids, grid, number)
        try:
            with np.errstate(all="ignore"):
                function(*args)
        except BaseException as error:
            failures.append(error)

    threads = [
        threading.Thread(target=run, args=(function, args, number))
        for (function, args), number in zip(functions, (program.warps, *warps), strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def atomic_add(pointer: Pointer, value: int) -> Values:
    with Barrier.changed:
        before = pointer.memory[int(pointer.offset)]
        pointer.memory[int(pointer.offset)] += value
    return values(before)


class Kernel:
    """Started like Triton's: `kernel[grid](*arguments, **constants)`."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*args: Any, num_warps: int, maxnreg: int | None = None, **constants: Any) -> None:
            given = [_argument(x) for x in args]
            with np.errstate(all="ignore"):
                for ids in np.ndindex(*grid):
                    Shared.program.begin(ids, grid, num_warps)
                    self.function(*given, **constants)

        return run


def _argument(x: Any) -> Any:
    if isinstance(x, tuple):
        return tuple(_argument(part) for part in x)
    if isinstance(x, int):
        return values(x, np.int32 if abs(x) < 2**31 else np.int64)
    return _pointer(x) if isinstance(x, torch.Tensor) else x


def _pointer(x: torch.Tensor) -> Pointer:
    memory = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())  # pyright: ignore[reportArgumentType]
    return Pointer(memory.numpy(), x.storage_offset())


def _jit(function: Any = None, **options: Any) -> Any:
    return Kernel if function is None else function  # those with options are kernels, others their functions


def _assembly(text: str, constraints: str, args: Sequence[Any], **options: Any) -> Any:
    if "selp" in text:
        x, key, low, high, otherwise = args
        return values(np.where((key >= low) & (key <= high), x, otherwise))
    return values(np.log2(args[0])) if text.startswith("lg2") else args[0]


class _Layout:
    threads_per_warp, warps_per_cta = (16, 2), (8, 1)  # with as many rows at once as any

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
        num_programs=lambda axis: values(Shared.program.grid[axis], np.int32),
        warp_specialize=specialize, barrier=lambda: None, atomic_add=atomic_add,
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
            async_load=send, commit_group=lambda: Shared.program.copies.append([]), wait_group=wait_for_copies,
            mbarrier_arrive=copies_arrive,
        ),
        mbarrier=types.SimpleNamespace(
            MBarrierLayout=_Layout, init=new_barrier, arrive=arrive, wait=lambda at, phase: at.barrier.wait(phase)
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
