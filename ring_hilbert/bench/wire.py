# SPDX-License-Identifier: Apache-2.0
"""Bytes on the wire at a million tokens over 64 ranks, from the plans of exchange, ring and Ulysses.

`undeduplicated_mib` is what an exchange would receive if every branch sent its rows separately.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

import ring_hilbert as rh
from ring_hilbert.parallel.plan import PASSES

SEQ_LEN, RANKS, HEADS, HEAD_DIM = 2**20, 64, 64, 64
LONGNET = rh.DilatedPattern((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12))
LADDER = rh.DilatedPattern(tuple(2048 * 2**i for i in range(10)), tuple(2**i for i in range(10)))
DENSE = rh.DilatedPattern((None,), (1,))
PATTERNS = {
    "LongNet's, w 2048..32768, r 1,2,4,6,12": (LONGNET, ("exchange", "ulysses")),
    "doubling ladder to the whole sequence, r 1..512": (LADDER, ("exchange", "ulysses")),
    "dense": (DENSE, ("ring", "ulysses")),
}


def rows() -> Iterator[dict[str, Any]]:
    """MiB received per rank and layer in bf16: one record per pattern, causality, strategy and pass."""
    for name, (pattern, strategies) in PATTERNS.items():
        for causal in (False, True):
            alone = [
                _plan(rh.DilatedPattern((w,), (r,)), causal, strategies[0]).traffic
                for w, r in zip(pattern.segment_lengths, pattern.dilation_rates, strict=True)
            ]
            for strategy in strategies:
                plan = _plan(pattern, causal, strategy)
                for pass_ in PASSES:
                    mib = [received / 2**20 for received in plan.traffic[pass_]]
                    apart = max(map(sum, zip(*(traffic[pass_] for traffic in alone), strict=True))) / 2**20
                    yield {
                        "pattern": name, "seq_len": SEQ_LEN, "ranks": RANKS, "heads": HEADS, "head_dim": HEAD_DIM,
                        "causal": causal, "strategy": strategy, "pass": pass_, "min_mib": f"{min(mib):.2f}",
                        "mean_mib": f"{sum(mib) / RANKS:.2f}", "max_mib": f"{max(mib):.2f}",
                        "undeduplicated_mib": f"{apart:.2f}" if strategy == "exchange" else "",
                    }  # fmt: skip


def _plan(pattern: rh.DilatedPattern, causal: bool, strategy: str) -> rh.Plan:
    return rh.plan(
        pattern,
        SEQ_LEN,
        RANKS,
        num_heads=HEADS,
        head_dim=HEAD_DIM,
        dtype=torch.bfloat16,
        causal=causal,
        strategy=strategy,
    )
