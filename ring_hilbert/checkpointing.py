# SPDX-License-Identifier: Apache-2.0
"""Activation checkpointing that neither computes attention nor exchanges rows a second time."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext, create_selective_checkpoint_contexts

import ring_hilbert.attention  # noqa: F401  # registers the operator

_ATTENTION = torch.ops.ring_hilbert.attention.default
_PRODUCTS = {getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "bmm", "baddbmm")}


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
    return create_selective_checkpoint_contexts([_ATTENTION])


def selective_contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """As `checkpoint_contexts`, for one decoder layer in each checkpoint, of which more is kept.

    Kept is what the matrix product after attention gives, the output projection, and every second one after that: in a gated MLP
    the up projection, not the gate and not the down projection, which backward has no use for. Those before attention are
    computed again: an element kept saves as many FLOPs in any of them (two per input feature), and kernels that rotate q and
    k in place, unseen by PyTorch, would spoil what is kept.
    """
    return create_selective_checkpoint_contexts(_Selective())


class _Selective:
    """The policy of one checkpoint; counts the products that came after attention, in forward and in recomputation."""

    def __init__(self) -> None:
        self.after: dict[bool, int] = {}

    def __call__(self, context: SelectiveCheckpointContext, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        if operator is _ATTENTION:
            self.after[context.is_recompute] = 0
            return CheckpointPolicy.MUST_SAVE
        keep = False
        if operator in _PRODUCTS and context.is_recompute in self.after:
            keep = self.after[context.is_recompute] % 2 == 0
            self.after[context.is_recompute] += 1
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
