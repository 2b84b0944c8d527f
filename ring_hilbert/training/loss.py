# SPDX-License-Identifier: Apache-2.0
"""Next-token loss per token in float32, from local logits and already shifted labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ring_hilbert.parallel.sharding import IGNORED

CHUNK_ELEMENTS = 2**24  # float32 logits held at once (64 MiB), in forward and in backward


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy (nats) of every row: `logits [B, S, V]`, `labels [B, S]` int64 -> `[B, S]` float32, 0 where IGNORED.

    Chunks are recomputed in backward, so that next to the logits no more than a chunk of them exists in float32.
    """
    rows, targets = logits.flatten(0, -2), labels.flatten()
    chunk = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    losses = [
        checkpoint(_chunk_losses, some, wanted, use_reentrant=False, preserve_rng_state=False)
        for some, wanted in zip(rows.split(chunk), targets.split(chunk), strict=True)
    ]
    return torch.cat(losses).view(labels.shape)


def count_targets(labels: torch.Tensor) -> torch.Tensor:
    """How many rows of `labels` have a target: int64 scalar on the device of `labels`."""
    return (labels != IGNORED).sum()


def _chunk_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="none")
