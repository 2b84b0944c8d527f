# SPDX-License-Identifier: Apache-2.0
"""Activation checkpointing whose recomputation neither repeats attention nor exchanges rows again."""

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

    Inside the checkpoint only the results of `dilated_attention` are kept, `out [B, S, H, D]` and `lse` with its rounding
    error `[B, H, S]`; everything else is recomputed in backward. Rows are thus exchanged once per layer in forward and not at
    all in recomputation. (Backward itself fetches the K and V rows again and returns their gradients, checkpointed or not.)
    Without the policy, checkpointing is just as correct, but recomputation communicates again. Works in compiled code too; a
    Transformers model takes it as `model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn":
    rh.checkpoint_contexts})`.

    Returns:
        The context of forward and the context of recomputation. Each pair serves one checkpoint and one backward.
        Source: selective activation checkpointing, `torch.utils.checkpoint.create_selective_checkpoint_contexts`.
    """
    return create_selective_checkpoint_contexts([_ATTENTION])


def selective_contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """Like `checkpoint_contexts`, but keeping more, for checkpoints of one decoder layer each.

    It also keeps the result of the first matrix product after attention, the output projection, and of every second one after
    that: in a gated MLP the up projection, but not the gate, nor the down projection, whose result backward does not need. The
    products before attention are recomputed: a kept element saves the same FLOPs in any product (two per input feature), and
    kernels that rotate q and k in place, unseen by PyTorch, would corrupt what is kept.
    """
    return create_selective_checkpoint_contexts(_Selective())


class _Selective:
    """The policy of one checkpoint; counts the products after attention, in forward and in recomputation."""

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
