# SPDX-License-Identifier: Apache-2.0
"""Activation checkpointing that neither computes attention nor exchanges rows a second time."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts

import ring_hilbert.attention  # noqa: F401  # registers the operator


def checkpoint_contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """The policy for `torch.utils.checkpoint.checkpoint(..., use_reentrant=False, context_fn=rh.checkpoint_contexts)`.

    Of what runs inside the checkpoint, `dilated_attention` keeps its results, `out [B, S, H, D]` and `lse` and its rounding
    `[B, H, S]`, and all else is recomputed in backward: rows are exchanged once per layer in forward, and in recomputation not
    at all. (Backward itself fetches the K and V rows again and returns their gradients, checkpointed or not.) Without
    the policy, checkpointing is as correct and recomputation communicates again. Works in compiled code too; a
    Transformers model takes it as `model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn":
    rh.checkpoint_contexts})`.

    Returns:
        The context of forward and the context of recomputation. Each pair is good for one checkpoint and one backward.
        Source: selective activation checkpointing, `torch.utils.checkpoint.create_selective_checkpoint_contexts`.
    """
    return create_selective_checkpoint_contexts([torch.ops.ring_hilbert.attention.default])
