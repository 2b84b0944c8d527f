# SPDX-License-Identifier: Apache-2.0
"""The compiled kernels, without a GPU: registers, spills, shared memory and instructions of every variant."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ring_hilbert.kernels.tables import RUN_WIDTH, Schedule, Walk
from ring_hilbert.kernels.tiles import PASSES, Pass, Tile, plan_tile, tiles_for
from ring_hilbert.ops.nesting import chains
from ring_hilbert.ops.pattern import DilatedPattern
from ring_hilbert.ops.remote_walk import plan_lists
from ring_hilbert.ops.walk import plan_rows

CAPABILITIES = (80, 90, 100)
# Most shared memory of a thread block, in bytes (CUDA C++ Programming Guide, technical specifications).
SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
ROWS, KV_HEADS = 2048, 4


@dataclass(frozen=True)
class Variant:
    """A kind of walk: whether masks compare segments, and how rows are found; and the query heads per kv head."""

    segments: bool = False
    indexed: bool = False
    remote: bool = False
    passed_on: bool = False
    group: int = 2

    def walk(self, tile: Tile) -> Walk:
        """A small walk of this kind."""
        rows, cpu, chunk = np.arange(ROWS), torch.device("cpu"), tile.chunk
        if self.remote:
            visits = [[[(rows, rows, 1)]] * KV_HEADS]
            return plan_lists(visits, rows, rows, block_outer=tile.block_outer, device=cpu, chunk=chunk)
        pattern = DilatedPattern((8 if self.segments else 512, 1024), (1, 2))
        places = torch.arange(ROWS).flip(0) if self.indexed else None
        return plan_rows(
            chains(pattern, KV_HEADS), 0, torch.arange(ROWS), places, block_outer=tile.block_outer, chunk=chunk
        )


VARIANTS = {
    "rows at equal steps": Variant(),
    "rows at equal steps, short segments": Variant(segments=True),
    "rows in a list": Variant(indexed=True),
    "rows in a list, short segments": Variant(segments=True, indexed=True),
    "received rows": Variant(indexed=True, remote=True),
    "rows of a hop": Variant(indexed=True, remote=True, passed_on=True),
    "rows in a list, one head": Variant(indexed=True, group=1),
    "rows of a hop, one head": Variant(indexed=True, remote=True, passed_on=True, group=1),
}


def rows(
    capabilities: tuple[int, ...],
    head_dims: tuple[int, ...],
    dtype: torch.dtype,
    passes: tuple[Pass, ...] = PASSES,
    variants: tuple[str, ...] = tuple(VARIANTS),
) -> Iterator[dict[str, Any]]:
    """A record for every variant, pass, head dim and capability, with the shipped tiles."""
    import triton

    for capability in capabilities:
        for head_dim in head_dims:
            for pass_ in passes:
                for name in variants:
                    facts = compiled(
                        VARIANTS[name],
                        pass_,
                        tiles_for(pass_, capability, head_dim, dtype, VARIANTS[name].group),
                        head_dim,
                        dtype,
                        capability,
                    )
                    yield {
                        "triton": triton.__version__, "capability": capability, "head_dim": head_dim, "dtype": str(dtype)[6:],
                        "pass": pass_, "variant": name, **facts,
                    }  # fmt: skip


def compiled(
    variant: Variant, pass_: Pass, tiles: tuple[Tile, ...], head_dim: int, dtype: torch.dtype, capability: int
) -> dict[str, Any]:
    """The compiled form of one kernel, as launched by `launch`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    tile, walk = plan_tile(tiles, variant.walk)
    Source = ASTSource
    if tile.gluon:
        from triton.experimental.gluon._runtime import GluonASTSource as Source
    assert walk.segments == variant.segments and walk.indexed == variant.indexed
    kernel, arguments, options = _arguments(variant, pass_, tile, walk, head_dim, dtype)
    options = {name: value for name, value in options.items() if name not in ("grid", "warmup")}
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    bound, specialization, _ = create_function_from_signature(kernel.signature, kernel.params, backend)(
        *arguments, debug=False, **options
    )
    options = {"debug": False, **options}
    parsed, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, None)
    result = triton.compile(Source(kernel, signature, constants, attributes), target=target, options=parsed.__dict__)
    registers, stack, wgmma_waits = _resources(result.asm["cubin"])
    ptx = result.asm["ptx"]
    waits = [int(n) for n in re.findall(r"cp\.async\.wait_group\s+(\d+)", ptx)]
    return {
        **tile._asdict(),
        "registers": registers,
        "spilled_bytes": stack,
        "shared_bytes": result.metadata.shared,
        "shared_limit": SHARED_LIMITS[capability],
        "wgmma": ptx.count("wgmma.mma_async"),
        "wgmma_waits_added": wgmma_waits - ptx.count("wgmma.wait_group"),
        "tcgen05": ptx.count("tcgen05.mma"),
        "mma": len(re.findall(r"\bmma\.sync", ptx)),
        "most_copies_in_flight": max(waits, default=0),
    }


def _arguments(
    variant: Variant, pass_: Pass, tile: Tile, walk: Walk, head_dim: int, dtype: torch.dtype
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The kernel and the arguments that `launch` passes to it."""
    from ring_hilbert.kernels import backward, forward, launch

    if tile.gluon:
        from ring_hilbert.kernels import hopper_backward as backward
        from ring_hilbert.kernels import hopper_forward as forward
    if tile.specialized:
        from ring_hilbert.kernels import hopper_specialized_forward as forward
    kernel = {"forward": forward.forward_kernel, "dq": backward.dq_kernel, "dkdv": backward.dkdv_kernel}[pass_]
    if not hasattr(kernel, "_pack_args"):
        raise ValueError("kernels are interpreted in this process; unset TRITON_INTERPRET")
    q = torch.empty(2, ROWS, variant.group * KV_HEADS, head_dim, dtype=dtype)
    k = v = torch.empty(2, ROWS, KV_HEADS, head_dim, dtype=dtype)
    output = launch.Output.allocate(q, dtype == torch.float32)
    staging = None
    if variant.remote:
        staging = launch.Staging.allocate(q, torch.zeros(1, KV_HEADS, ROWS, dtype=torch.int32), ROWS)
    stage = "pass on" if variant.passed_on else "finish" if variant.remote else "leave"
    terms = launch.RowTerms(q, output.lse, output.lse)
    seen = torch.zeros(1, ROWS, dtype=torch.int32)
    order = torch.zeros(walk.tiles.shape[:2], dtype=torch.int32)
    runs = torch.zeros((len(order), walk.runs, RUN_WIDTH), dtype=torch.int32)
    schedule = Schedule(
        walk, walk.outer, walk.inner, order, torch.stack((order, order), 2), runs, seen, seen, seen, pass_ == "dkdv",
        tile.block_inner,
    )  # fmt: skip
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    run, kernel.run = kernel.run, lambda *args, **options: found.append((args, options))
    try:
        if pass_ == "forward":
            launch.forward(q, k, v, tile, schedule, 1.0, output, staging, stage=stage)
        elif pass_ == "dq":
            launch.dq(q, k, v, terms, q, tile, schedule, 1.0, staging, stage=stage)
        else:
            launch.dkdv(q, k, v, terms, (k, v), tile, schedule, 1.0)
    finally:
        kernel.run = run
    return kernel, *found[0]


def _resources(cubin: bytes) -> tuple[int, int, int]:
    """Registers per thread; bytes of stack, which is where spilled registers go; waits for matrix products in flight.

    Where registers are too few, ptxas adds a wait after every such product.
    """
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage, code = (
            subprocess.run([str(tools / tool), option, str(file)], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return int(found[1]), int(found[2]), code.count("WARPGROUP.DEPBAR")


__all__ = ["CAPABILITIES", "VARIANTS", "Variant", "compiled", "rows"]
