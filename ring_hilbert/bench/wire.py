# SPDX-License-Identifier: Apache-2.0
"""Bytes on the wire: what the plan sends, against ring attention or an all-gather of K and V, at a million tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

import ring_hilbert as rh

SEQ_LEN, RANKS, HEADS, HEAD_DIM = 2**20, 64, 32, 128
PATTERNS = {
    "LongNet's, w 2048..32768, r 1,2,4,6,12": rh.DilatedPattern((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12)),
    "doubling ladder to the whole sequence, r 1..512": rh.DilatedPattern(
        tuple(2048 * 2**i for i in range(10)), tuple(2**i for i in range(10))
    ),
}


def rows() -> Iterator[dict[str, Any]]:
    """MiB received per rank, layer and pass in bf16 (dK, dV in float32): one record per pattern, causality and pass."""
    item = {"forward": 2, "backward": 4}
    for name, pattern in PATTERNS.items():
        for causal in (False, True):
            plan = rh.plan(
                pattern, SEQ_LEN, RANKS, num_heads=HEADS, head_dim=HEAD_DIM, dtype=torch.bfloat16, causal=causal
            )
            for pass_ in ("forward", "backward"):
                mib = [plan.received_bytes(rank, pass_) / 2**20 for rank in range(RANKS)]
                ring = 2 * SEQ_LEN * (RANKS - 1) // RANKS * HEADS * HEAD_DIM * item[pass_] / 2**20
                yield {
                    "pattern": name,
                    "seq_len": SEQ_LEN,
                    "ranks": RANKS,
                    "heads": HEADS,
                    "head_dim": HEAD_DIM,
                    "causal": causal,
                    "pass": pass_,
                    "min_mib": f"{min(mib):.2f}",
                    "mean_mib": f"{sum(mib) / RANKS:.2f}",
                    "middle_rank_mib": f"{mib[RANKS // 2]:.2f}",
                    "max_mib": f"{max(mib):.2f}",
                    "ring_or_all_gather_mib": f"{ring:.2f}",
                }
