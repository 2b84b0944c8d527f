# SPDX-License-Identifier: Apache-2.0
"""The numbers behind the plots: which keys a token reaches through one or more layers, and which rows a rank needs."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch

import ring_hilbert as rh
from ring_hilbert.parallel.remote import payload
from ring_hilbert.parallel.travel import Candidates


def multiplicity(
    pattern: rh.DilatedPattern, length: int, kv_heads: int, *, order: rh.TokenOrder | None = None, causal: bool = True
) -> np.ndarray:
    """How often each key token counts for each query token: int64 `[Hkv, S, S]` (query, key), 0 where masked.

    Args:
        pattern: the branches, on rows.
        length: tokens, S.
        kv_heads: Hkv.
        order: of the rows; the result is still in natural token coordinates. None: token t is row t.
        causal: mask later tokens.
    """
    count = rh.reference.multiplicity(pattern, length, kv_heads).numpy()
    if order is not None:
        row = order.inverse(length).numpy()
        count = count[:, row][:, :, row]
    return np.tril(count) if causal else count


def reach(
    layers: Sequence[rh.DilatedPattern],
    length: int,
    kv_heads: int,
    *,
    order: rh.TokenOrder | None = None,
    causal: bool = True,
) -> np.ndarray:
    """Which tokens' inputs can influence each token after `layers`, first to last: bool `[S, S]` (token, source).

    A layer passes on what any kv head sees; every token also keeps itself, by the residual connection.
    """
    steps = [
        multiplicity(pattern, length, kv_heads, order=order, causal=causal).any(0) | np.eye(length, dtype=bool)
        for pattern in layers
    ]
    # float32 path counts: exact enough to distinguish none from some, and fast
    return functools.reduce(lambda below, step: step.astype(np.float32) @ below.astype(np.float32) > 0, steps)


def possible(length: int, causal: bool) -> np.ndarray:
    """How many tokens each token could reach at most: int64 `[S]`."""
    return np.arange(1, length + 1) if causal else np.full(length, length)


def owners(plan: rh.Plan) -> np.ndarray:
    """The rank that owns each row: int64 `[S]`."""
    owner = np.empty(plan.layout.seq_len, np.int64)
    for rank in range(plan.layout.world_size):
        for chunk in plan.layout.chunks(rank):
            owner[chunk.start : chunk.stop] = rank
    return owner


def needed(plan: rh.Plan) -> np.ndarray:
    """The share of kv heads for which each rank reads each row from another rank: float64 `[P, S]` (reader, row)."""
    world = range(plan.layout.world_size)
    share = np.zeros((len(world), plan.layout.seq_len))
    for reader in world:
        candidates = Candidates(plan.crossings, {reader: plan.crossings.shipments(reader)})
        _, rows, _ = payload(candidates.blocks, plan.shapes.batch_size)
        if len(rows) and not plan.all_travel:
            rows = rows[candidates.travel(plan.visible.on(torch.device("cpu"))).numpy()]
        np.add.at(share[reader], rows, 1)
    return share / (plan.shapes.num_kv_heads * plan.shapes.batch_size)
