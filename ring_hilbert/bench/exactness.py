# SPDX-License-Identifier: Apache-2.0
"""The error of the operator over these ranks, against its definition in float64 and against one rank.

    torchrun --standalone --nproc-per-node 4 -m ring_hilbert.cli bench exactness

Every rank draws the same sequence and keeps its rows; rank 0 assembles and compares the results. Gloo on the CPU, NCCL with
CUDA devices.

With --config the attention of a run at full length: out, lse and dq of sampled rows, from all keys that they see, and dk and dv of
one kv head of sampled rows, from all queries that see them. `rms_of_rounding` is the error of the exact values in the same dtype.

    torchrun --standalone --nproc-per-node 4 -m ring_hilbert.cli bench exactness --config configs/llama_1b_1m.yaml --lengths 1048576
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import ring_hilbert as rh
from ring_hilbert.bench import sampled
from ring_hilbert.bench.sampled import QUANTITIES
from ring_hilbert.parallel.layout import Layout

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Problem:
    """One sequence: its pattern, shapes and metadata."""

    name: str
    pattern: rh.DilatedPattern
    seq_len: int
    causal: bool = True
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    documents: bool = False
    order: rh.TokenOrder | None = None
    uneven: bool = False

    def lengths(self, world: int) -> tuple[int, ...]:
        """Rows per rank, in whole blocks of the order; if uneven, half of each odd rank's rows go to the rank before it."""
        unit = 1 if self.order is None or self.order.block is None else self.order.block
        lengths = [unit * count for count in Layout.even(self.seq_len // unit, world).lengths]
        for rank in range(1, world if self.uneven else 0, 2):
            moved = lengths[rank] // 2
            lengths[rank], lengths[rank - 1] = lengths[rank] - moved, lengths[rank - 1] + moved
        return tuple(lengths)


LADDER = rh.DilatedPattern((128, 256, 512, None), (1, 2, 4, 8))
RAGGED = rh.DilatedPattern((100, 333, None), (1, 3, 7), head_shift=1, segment_shift=13)
PROBLEMS = (
    Problem("ladder, causal", LADDER, 1024),
    Problem("ladder, not causal", LADDER, 1024, causal=False),
    Problem("ladder, causal, hilbert", LADDER, 1024, order=rh.TokenOrder("hilbert", block=64)),
    Problem("ragged, causal, documents, uneven", RAGGED, 997, documents=True, uneven=True),
    Problem("dense, causal", rh.DilatedPattern((None,), (1,)), 1024),
)


def draw(problem: Problem, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """q, k, v and dout of the whole sequence, the same on every rank and device."""
    generator = torch.Generator().manual_seed(0)
    heads = {"q": problem.heads, "k": problem.kv_heads, "v": problem.kv_heads, "dout": problem.heads}
    shape = {name: (1, problem.seq_len, h, problem.head_dim) for name, h in heads.items()}
    return {
        name: torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for name, s in shape.items()
    }


def documents_of(problem: Problem, device: torch.device) -> Tensor | None:
    """Four documents and some padding, if the problem has documents."""
    if not problem.documents:
        return None
    ids = torch.arange(problem.seq_len, device=device) * 4 // problem.seq_len
    ids[-problem.seq_len // 20 :] = -1
    return ids


def run(
    problem: Problem, dtype: torch.dtype, device: torch.device, group: dist.ProcessGroup | None
) -> dict[str, Tensor]:
    """Out, lse and gradients of the whole sequence, on every rank."""
    world, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    lengths = problem.lengths(world)
    x = {name: value.split(lengths, dim=1)[rank].clone() for name, value in draw(problem, dtype, device).items()}
    documents = documents_of(problem, device)
    q, k, v = (x[name].requires_grad_() for name in "qkv")
    out, lse = rh.dilated_attention(
        q, k, v, problem.pattern, causal=problem.causal, order=problem.order, group=group, return_lse=True,
        document_ids=None if documents is None else documents.split(lengths)[rank],
    )  # fmt: skip
    out.backward(x["dout"])
    local = dict(zip(QUANTITIES, (out.detach(), lse, q.grad, k.grad, v.grad), strict=True))
    return {
        name: _whole(value, lengths, 2 if name == "lse" else 1, group)
        for name, value in local.items()
        if value is not None
    }


def truth(problem: Problem, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """The reference in float64 on the inputs rounded to `dtype`."""
    x = {name: value.double() for name, value in draw(problem, dtype, device).items()}
    q, k, v = (x[name].requires_grad_() for name in "qkv")
    out, lse = rh.reference.dilated_attention(
        q, k, v, problem.pattern, causal=problem.causal, order=problem.order, document_ids=documents_of(problem, device)
    )
    out.backward(x["dout"])
    return {name: value.detach() for name, value in zip(QUANTITIES, (out, lse, q.grad, k.grad, v.grad), strict=True)}  # type: ignore[union-attr]


def measured(
    chosen: argparse.Namespace, device: torch.device, group: dist.ProcessGroup | None
) -> Iterator[dict[str, Any]]:
    """The records of small problems, or of a configuration's attention.

    Raises:
        ValueError: for flags of the latter without one.
    """
    if chosen.config is None and (chosen.lengths or chosen.set):
        raise ValueError("--lengths and --set say what becomes of a run's configuration; name one with --config")
    return rows(device, group) if chosen.config is None else sampled.rows(chosen, device, group)


def file(chosen: argparse.Namespace) -> str:
    """The name of the CSV file."""
    return "exactness" if chosen.config is None else "exactness_sampled"


def report(records: list[dict[str, Any]], _chosen: argparse.Namespace) -> None:
    """Print the errors."""
    for r in records:
        what = (
            r["problem"] if "problem" in r else f"{r['config']}, {r['tokens']:,} tokens, {r['documents']} document(s)"
        )
        uncovered = "" if r["same_rows_uncovered"] else "; OTHER ROWS SEE NOTHING"
        print(
            f"{what:<36} {r['dtype']:<9}{r['quantity']:<4} largest {r['max_error']}, rms {r['rms_error']} "
            f"of up to {r['max_reference']}{uncovered}"
        )


def rows(device: torch.device, group: dist.ProcessGroup | None) -> Iterator[dict[str, Any]]:
    """One record per problem, dtype and quantity; empty on all ranks but the first."""
    world = 1 if group is None else dist.get_world_size(group)
    backend = "none" if group is None else dist.get_backend(group)
    for problem in PROBLEMS:
        for dtype in DTYPES:
            result = run(problem, dtype, device, group)
            if group is not None and dist.get_rank(group) != 0:
                continue
            for name, exact in truth(problem, dtype, device).items():
                seen = exact != float("-inf")
                error = (result[name].double() - exact)[seen].abs()
                yield {
                    "backend": backend,
                    "world": world,
                    "problem": problem.name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "quantity": name,
                    "max_reference": f"{exact[seen].abs().max().item():.3e}",
                    "max_error": f"{error.max().item():.3e}",
                    "rms_error": f"{error.square().mean().sqrt().item():.3e}",
                    "same_rows_uncovered": bool(torch.equal(result[name] == float("-inf"), ~seen)),
                }


def _whole(local: Tensor, lengths: tuple[int, ...], dim: int, group: dist.ProcessGroup | None) -> Tensor:
    """Every rank's `local`, concatenated along `dim`."""
    if group is None:
        return local
    longest = max(lengths)
    padded = local.new_zeros((longest, *local.movedim(dim, 0).shape[1:]))
    padded[: local.shape[dim]] = local.movedim(dim, 0)
    pieces = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(pieces, padded, group=group)
    return torch.cat([piece[:length] for piece, length in zip(pieces, lengths, strict=True)]).movedim(0, dim)
