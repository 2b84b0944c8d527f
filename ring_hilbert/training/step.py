# SPDX-License-Identifier: Apache-2.0
"""The gradient of one step: the mean loss over all target tokens of all ranks and micro-steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ring_hilbert.training.engine import Engine
from ring_hilbert.training.loss import count_targets
from ring_hilbert.training.world import World


def accumulate(engine: Engine, micro_batches: Sequence[dict[str, Any]], world: World) -> torch.Tensor:
    """Forward and backward of this rank's micro-batches; returns the global mean loss and the global count of targets.

    They are float64 `[2]` on the device, where all has been started and nothing was waited for.

    The denominator, the sum of counts over ranks and micro-steps, is known before the first backward. So every rank divides by the
    same number, and gradients only need summing.
    """
    tokens = world.sum(torch.stack([count_targets(batch["shift_labels"]) for batch in micro_batches]).sum())
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for batch in micro_batches:
        world.whereabouts.enter("forward")
        loss_sum = engine.model(**batch).sum()
        world.whereabouts.enter("backward")
        engine.backward(loss_sum / tokens.clamp(min=1))
        total += loss_sum.detach()
    world.whereabouts.enter("sum of the loss")
    return torch.stack((world.sum(total) / tokens.clamp(min=1), tokens.double()))
