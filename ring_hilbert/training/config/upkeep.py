# SPDX-License-Identifier: Apache-2.0
"""The sections `checkpoint`, `timeouts` and `log`: what surrounds the steps."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ring_hilbert.training.config.section import Section


class CheckpointConfig(Section):
    """Where checkpoints go, after how many steps, and how many are kept.

    `trust`: load DeepSpeed's checkpoints, which are pickles and could run any code. `init`: the checkpoint.dir of another run of
    the same model, whose weights and optimizer state a run without checkpoints of its own starts with. `changed_data`: a run on
    other data than its checkpoint, more data included, is refused, or accepted: it goes on with the sequence of the same number in
    the data as they are now, and of the epoch under way documents may be read twice or never.

    `asynchronous`: steps go on while a checkpoint is written (engine torch), for which the host keeps a copy of weights and
    moments. `verify`: read every file before a checkpoint is loaded, and compare checksums; sizes are compared anyway.
    `on_damage`: a damaged newest checkpoint is refused, or the one before it is taken (previous) and the damaged one renamed.
    `resume`: go back to the checkpoint of this step; newer ones are renamed.
    """

    dir: str
    every: int = Field(default=50, ge=1)
    keep: int = Field(default=2, ge=1)
    trust: bool = False
    init: str | None = None
    changed_data: Literal["refuse", "accept"] = "refuse"
    asynchronous: bool = True
    verify: bool = True
    on_damage: Literal["refuse", "previous"] = "refuse"
    resume: int | None = Field(default=None, ge=1)  # null: the newest


class TimeoutsConfig(Section):
    """Seconds after which a rank that waits for another one says for which, and ends the run.

    `start`: until all ranks are there, and between signs of life until the first step. `step`: within a step or an evaluation; more
    than the longest step takes. `data`: without a sign of life of a rank that prepares data, which may take as long as it likes.
    `save`: while a checkpoint or the model is written.
    """

    start: float = Field(default=600, gt=0)
    step: float = Field(default=600, gt=0)
    data: float = Field(default=600, gt=0)
    save: float = Field(default=3600, gt=0)

    @property
    def longest(self) -> float:
        """What no collective may take longer than, should the watchdog itself fail."""
        return max(self.start, self.step, self.data, self.save) + 60


class LogConfig(Section):
    """Where metrics, plots and TensorBoard events go, and what is looked at.

    `wandb`: the project of Weights & Biases to log to as well, if it is installed. `breakdown_every`: how often a step is
    profiled for the seconds of its parts (`ring_hilbert.training.breakdown`). `profile`: first and last step of which a trace is
    written. `peak_tflops`: of one rank, for the MFU where the device's name does not say it. `memory_plan`: plan before the first
    step how much memory a rank will need, and refuse a run that does not fit its GPU. `straggler_factor`, `straggler_steps`: name a
    rank that computes so many times as long as the median rank in so many steps in a row.
    """

    dir: str
    tensorboard: bool = True
    wandb: str | None = None
    breakdown_every: int | None = Field(default=50, ge=1)
    profile: list[int] | None = Field(default=None, min_length=2, max_length=2)
    peak_tflops: float | None = Field(default=None, gt=0)
    memory_plan: bool = True
    straggler_factor: float = Field(default=1.5, gt=1)
    straggler_steps: int = Field(default=10, ge=1)
