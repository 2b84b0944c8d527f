# SPDX-License-Identifier: Apache-2.0
"""The contenders of `bench attention`: this operator, dense SDPA, published LongNet, FlexAttention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import ring_hilbert as rh
from ring_hilbert.bench import longnet
from ring_hilbert.ops.triton_core import TritonCore

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
DENSE = rh.DilatedPattern((None,), (1,))


class Unsupported(Exception):
    """Why a contender cannot run a problem."""


@dataclass(frozen=True)
class Problem:
    """One sequence on one device: `q [batch, length, heads, head_dim]`, `k, v [..., kv_heads, head_dim]`."""

    pattern: rh.DilatedPattern
    length: int
    causal: bool
    dtype: torch.dtype
    device: torch.device
    batch: int = 1
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64

    def tensors(self) -> dict[str, Tensor]:
        """q, k, v, which require gradients, and dout; the same values for every contender."""
        generator = torch.Generator(self.device).manual_seed(0)
        heads = {"q": self.heads, "k": self.kv_heads, "v": self.kv_heads, "dout": self.heads}
        return {
            name: torch.randn(
                (self.batch, self.length, h, self.head_dim), generator=generator, device=self.device, dtype=self.dtype
            ).requires_grad_(name != "dout")
            for name, h in heads.items()
        }

    @property
    def input_bytes(self) -> int:
        """q, k, v and dout."""
        return 2 * (self.heads + self.kv_heads) * self.head_dim * self.batch * self.length * self.dtype.itemsize

    @property
    def least_bytes(self) -> int:
        """q, k, v, out, their gradients, and lse: what exact attention has to hold by the end of backward."""
        lse = self.heads * self.batch * self.length * (8 if self.dtype == torch.float64 else 4)
        return 2 * self.input_bytes + lse

    def plan(self, pattern: rh.DilatedPattern, order: rh.TokenOrder | None = None) -> rh.Plan:
        """The plan of `pattern` for these shapes on one rank."""
        return rh.plan(
            pattern, self.length, 1, num_heads=self.heads, num_kv_heads=self.kv_heads, head_dim=self.head_dim,
            dtype=self.dtype, causal=self.causal, batch_size=self.batch, order=order,
        )  # fmt: skip


@dataclass(frozen=True)
class Contender:
    """An implementation of attention.

    Args:
        name: "ring_hilbert", "dense", "longnet" or "flex".
        order: the order of the rows, for `ring_hilbert`; the others only support "raster".
        backend: the kernel that it runs.
        attend: from q, k, v `[B, S, H, D]` to out.
        flops: forward FLOPs of the pairs that its definition allows.
        executed: forward FLOPs of the pairs that it visits, if known.
    """

    name: str
    order: str
    backend: str
    attend: Attention
    flops: int
    executed: int | None = None

    @property
    def label(self) -> str:
        """Its name in tables and pictures."""
        return f"{self.name} {self.order}" if self.name == "ring_hilbert" else self.name


def operator(problem: Problem, order: rh.TokenOrder | None, backend: str) -> Contender:
    """This operator on rows already in `order`, as in training: prepared once, outside the measured time."""
    positions = None if order is None else order.permutation(problem.length)
    prepared = rh.prepare(problem.length, positions=positions, causal=problem.causal)
    plan = problem.plan(problem.pattern, order)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return rh.dilated_attention(q, k, v, problem.pattern, prepared=prepared, backend=backend)

    name = "raster" if order is None else f"{order.curve}/{order.block}"
    return Contender("ring_hilbert", name, backend, attend, plan.attention_flops(0), plan.executed_flops(0))


def dense(problem: Problem, limit: int, backend: SDPBackend = SDPBackend.CUDNN_ATTENTION) -> Contender:
    """PyTorch's own dense kernel: that of `backend` on CUDA devices in half precision, else SDPA's choice."""
    if problem.length > limit:
        raise Unsupported(f"{problem.length} rows are above --dense-limit {limit}")
    chosen = problem.device.type == "cuda" and problem.dtype in (torch.float16, torch.bfloat16)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        grouped = problem.heads != problem.kv_heads
        return F.scaled_dot_product_attention(q, k, v, is_causal=problem.causal, enable_gqa=grouped).transpose(1, 2)

    def attend_by(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return attend(q, k, v)

    flops = problem.plan(DENSE).attention_flops(0)
    if not chosen:
        return Contender("dense", "raster", "sdpa", attend, flops)
    name = backend.name.removesuffix("_ATTENTION").lower()  # "cudnn", "flash"
    return Contender("dense", "raster", name, attend_by, flops)


def published(problem: Problem) -> Contender:
    """The published LongNet algorithm on the device's fused kernel."""
    try:
        longnet.check(problem.pattern, problem.length)
        kernel = longnet.kernel_for(problem.device, problem.dtype, problem.head_dim, problem.causal)
    except ValueError as error:
        raise Unsupported(str(error)) from error

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return longnet.dilated_attention(q, k, v, problem.pattern, causal=problem.causal)

    return Contender("longnet", "raster", kernel, attend, problem.plan(problem.pattern).attention_flops(0))


def programmable(problem: Problem, limit: int) -> Contender:
    """FlexAttention with the pattern as block mask and score modification."""
    if problem.device.type != "cuda":
        raise Unsupported("FlexAttention has no backward on the CPU")
    if problem.length > limit:
        raise Unsupported(f"{problem.length} rows are above --dense-limit {limit}")
    from ring_hilbert.bench import flex  # imports the compiler

    attend = flex.attention(
        problem.pattern, problem.length, problem.heads, problem.kv_heads, problem.causal, problem.device
    )
    return Contender("flex", "raster", "inductor", attend, problem.plan(problem.pattern).attention_flops(0))


def contenders(
    problem: Problem, orders: list[rh.TokenOrder | None], backend: str, dense_limit: int
) -> Iterator[Contender | str]:
    """All contenders that can run the problem; for the others a line that says why not."""
    makers: list[tuple[str, Callable[[], Contender]]] = [
        ("dense", lambda: dense(problem, dense_limit)),
        ("longnet", lambda: published(problem)),
        ("flex", lambda: programmable(problem, dense_limit)),
    ]
    for order in orders:
        yield operator(problem, order, backend)
    for name, make in makers:
        try:
            yield make()
        except (Unsupported, RuntimeError) as reason:  # RuntimeError: out of memory, or not compiled
            yield f"{name} left out: {str(reason).splitlines()[0]}"


def core_passes(
    core: TritonCore, x: dict[str, Tensor], scale: float
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Forward and backward of the kernels alone, on local rows: `x` is what `Problem.tensors` returns."""
    q, k, v = x["q"], x["k"], x["v"]

    def forward() -> tuple[Tensor, Tensor, Tensor]:
        return core.finish(core.begin(q, k, v, scale))

    result = forward()
    return forward, lambda: core.begin_backward(x["dout"], q, k, v, *result, scale, k.dtype, 1.0)


def autograd_passes(
    contender: Contender, inputs: list[Tensor], dout: Tensor
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Forward and backward of a contender: `inputs` are q, k and v, which require gradients."""

    def forward() -> object:
        with torch.no_grad():
            return contender.attend(*inputs)

    out = contender.attend(*inputs)
    return forward, lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)
