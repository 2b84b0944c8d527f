# SPDX-License-Identifier: Apache-2.0
"""Resuming a Trainer at the same place in its data: a check of that place, and streams, which the Trainer takes for one epoch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length


class SamePlace(TrainerCallback):
    """Refuses to resume if a checkpoint's step is no longer the same place in the data: the Trainer skips by steps alone."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, *_: Any, train_dataloader: Any = None, **__: Any
    ) -> None:
        """Check, once the state is loaded."""
        loader, micro_steps = train_dataloader, args.gradient_accumulation_steps
        if args.ignore_data_skip or not state.global_step or not has_length(loader):
            return
        epochs, steps = divmod(state.global_step, -(-len(loader) // micro_steps))
        here, there = epochs + steps * micro_steps / len(loader), state.epoch or 0.0
        if abs(here - there) > 1e-6:
            raise ValueError(
                f"the checkpoint's step {state.global_step} was epoch {there:.4f} of its run, but is epoch {here:.4f} of this one: "
                "with another number of groups, batch size, gradient_accumulation_steps or dataset, the data already read is not "
                "what would be skipped; resume with the original ones, or start a new epoch by ignore_data_skip=True"
            )


class Passes(IterableDataset[Any]):
    """A stream that starts at the pass given by the epoch; without a length, pass after pass.

    The Trainer takes a stream without a length for one epoch: a resumed run skips the batches already read over all passes.
    """

    def __init__(self, stream: IterableDataset[Any]) -> None:
        self.stream, self.epoch = stream, 0

    def __len__(self) -> int:
        return len(self.stream)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        """The pass to begin with."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        stream: Any = self.stream
        for epoch in itertools.count(self.epoch):
            generator, rows = getattr(stream, "generator", None), 0
            if hasattr(stream, "set_epoch"):
                stream.set_epoch(epoch)
            elif isinstance(generator, torch.Generator):
                generator.manual_seed(epoch)
            for row in stream:
                rows += 1
                yield row
            if has_length(self.stream) and rows != len(self):
                raise ValueError(
                    f"train_dataset has a length of {len(self)} but gave {rows} rows in epoch {epoch}: a resumed run would not "
                    "read the same data; leave out its __len__ and set max_steps"
                )
            if has_length(self.stream) or not rows:
                return
