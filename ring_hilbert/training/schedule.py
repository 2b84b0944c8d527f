# SPDX-License-Identifier: Apache-2.0
"""The learning rate as a pure function of the step, so that resuming needs no state."""

from __future__ import annotations

import math

from ring_hilbert.training.config import RunConfig


def with_decay_steps(config: RunConfig) -> RunConfig:
    """`config` with its schedule's steps made explicit, so that its digest covers them though not train.steps."""
    steps = None if config.optim.schedule == "constant" else config.optim.decay_steps or config.train.steps
    return config.model_copy(update={"optim": config.optim.model_copy(update={"decay_steps": steps})})


def learning_rate(config: RunConfig, step: int) -> float:
    """The rate of optimizer step `step` (from 0): linear warm-up to `lr`, then constant, or half a cosine down to
    `lr * min_lr_ratio`, reached after `decay_steps` steps and kept.
    """
    optim = config.optim
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / (optim.warmup_steps + 1)
    if optim.schedule == "constant":
        return optim.lr
    span = max(1, (optim.decay_steps or config.train.steps) - optim.warmup_steps)
    done = min(1.0, (step - optim.warmup_steps) / span)
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done)))
