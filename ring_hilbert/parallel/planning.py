# SPDX-License-Identifier: Apache-2.0
"""`rh.plan`: a plan for ranks that need not exist."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
import torch

from ring_hilbert.ops.order import TokenOrder
from ring_hilbert.ops.pattern import DilatedPattern
from ring_hilbert.ops.visible import Visible
from ring_hilbert.parallel.arguments import check_choices, kv_heads_of, metadata
from ring_hilbert.parallel.choice import choose
from ring_hilbert.parallel.layout import Layout
from ring_hilbert.parallel.plan import Plan, Shapes


def order_warnings(pattern: DilatedPattern, order: TokenOrder | None, causal: bool, seq_len: int) -> list[str]:
    """Warnings about causal text in this order (docs/design.md, section 2: the local branch keeps its nearest tokens).

    In curve order `order.block` must divide the segment length of every undilated branch, and the shift of its segments: else
    their boundaries cut the patches that blocks are. Where one segment holds all rows there is no boundary.
    """
    if order is None or not causal or order.block is None or order.curve == "raster":
        return []
    block, shift = order.block, pattern.segment_shift
    local = sorted({w for w, r in pattern.branches if r == 1 and w is not None and shift % w + seq_len > w})
    if not local:
        return []
    common = math.gcd(shift, *local)
    fits = next(n for n in range(min(block, common), 0, -1) if common % n == 0)
    cut = [("segment length", w, " of an undilated branch") for w in local] + [("segment_shift", shift, "")]
    return [
        f"order.block={block} does not divide {name} {value}{where}: its segments then differ from those of raster order "
        "in their tokens, and a token loses some of its nearest predecessors; nearest: "
        f"{name} {_multiples(value, block, where == '')}, or order.block={fits}"
        for name, value, where in cut
        if value % block
    ]


def _multiples(value: int, block: int, zero: bool) -> str:
    """Those of `block` on both sides of `value`; 0 is one of them if `zero`."""
    below = value // block * block
    return f"{below} or {below + block}" if below or zero else f"{block}"


def plan(
    pattern: DilatedPattern,
    seq_len: int,
    world_size: int,
    *,
    num_heads: int,
    num_kv_heads: int | None = None,
    head_dim: int,
    dtype: torch.dtype,
    causal: bool = True,
    batch_size: int = 1,
    layout: str = "contiguous",
    local_lengths: Sequence[int] | None = None,
    order: TokenOrder | None = None,
    document_ids: np.ndarray | torch.Tensor | None = None,
    strategy: str = "auto",
) -> Plan:
    """Plan dilated attention of `seq_len` rows over `world_size` ranks, none of which needs to exist.

    Args:
        pattern: the branches.
        seq_len: rows of the whole sequence, `S`.
        world_size: ranks, `P`.
        num_heads, num_kv_heads, head_dim, dtype, batch_size: of `q [B, S, H, D]` and `k, v [B, S, Hkv, D]`.
        causal, layout, strategy: as in `prepare`; positions are token indices.
        local_lengths, order: as in `shard_batch`, all of whose tokens are real.
        document_ids: integers `[S]` or `[B, S]` in natural token order, as in `prepare`.

    Returns:
        A `Plan`: `received_bytes(rank, pass_)`, `attention_flops(rank)`, `imbalance`, `summary()`.

    Raises:
        ValueError: for inconsistent sizes.
    """
    check_choices(order=order, layout=layout, strategy=strategy)
    num_kv_heads = kv_heads_of(num_heads, num_kv_heads)
    rows = Layout.of(seq_len, world_size, layout, local_lengths)
    documents = None
    if document_ids is not None:
        given = torch.as_tensor(document_ids).cpu()
        documents = metadata("document_ids", given, seq_len, batch_size, whose="the rows of the sequence")
        if order is not None:
            documents = documents[:, order.permutation(seq_len)]
    for message in order_warnings(pattern, order, causal, seq_len):
        warnings.warn(message, UserWarning, stacklevel=2)
    visible = Visible(seq_len, causal, documents=documents, order=order)
    shapes = Shapes(batch_size, num_heads, num_kv_heads, head_dim, dtype)
    if strategy == "auto":
        choice = choose(pattern, rows, visible, shapes)
        if documents is None:
            return choice.costs[choice.strategy].plan
        strategy = choice.strategy
    return Plan(pattern, rows, visible, shapes, strategy)
