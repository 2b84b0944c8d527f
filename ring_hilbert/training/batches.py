# SPDX-License-Identifier: Apache-2.0
"""The sequences that a rank reads, and its shard of them: the same global batch at any number of ranks and micro-steps."""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ring_hilbert.ops.order import TokenOrder
from ring_hilbert.parallel.sharding import shard_batch
from ring_hilbert.training.config import RunConfig
from ring_hilbert.training.world import World

if TYPE_CHECKING:
    from ring_hilbert.training.data import Sequences


class Batches:
    """Micro-batches of one dataset for this rank, sharded over its sp group.

    The sequences of a step are numbers `first .. first + count`; each round gives every dp rank in turn `micro_batch` consecutive
    ones. All sp ranks of a dp rank read the same sequences and keep their rows.
    """

    def __init__(self, dataset: Sequences, config: RunConfig, order: TokenOrder | None, world: World) -> None:
        self.dataset = dataset
        self.world = world
        self.micro_batch = config.train.micro_batch
        self.dp = config.parallel.dp
        self.seq_len = config.data.seq_len
        self.layout = config.attention.layout
        self.strategy = config.attention.strategy
        self.order = order
        self._ahead: tuple[tuple[int, int], Future[list[dict[str, Any]]]] | None = None

    def rounds(self, count: int) -> int:
        """Micro-batches per rank that cover `count` sequences."""
        return -(-count // (self.micro_batch * self.dp))

    def load(self, first: int, stop: int, number: int) -> dict[str, Any]:
        """Micro-batch `number` of this rank among sequences `first .. stop`, on its device, as keywords for the model.

        Sequences at `stop` and beyond are padding, so that all ranks run the same number of rounds; all call it together.

        Raises:
            RankError: on every rank, if one of them could not read.
        """
        start = first + (number * self.dp + self.world.dp_index) * self.micro_batch
        numbers = range(start, start + self.micro_batch)
        with self.world.together():
            samples = [self.dataset[index] if index < stop else self._padding() for index in numbers]
            keys = ("input_ids", "document_ids")
            full = {key: torch.from_numpy(np.stack([sample[key] for sample in samples])) for key in keys}
        return self.shard(full)

    def of(self, first: int, stop: int) -> list[dict[str, Any]]:
        """All micro-batches of this rank among sequences `first .. stop`."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == (first, stop):
            return ahead[1].result()
        return [self.load(first, stop, number) for number in range(self.rounds(stop - first))]

    def read_ahead(self, first: int, stop: int) -> None:
        """Load what `of(first, stop)` returns, if that is the next call; what fails here is raised there.

        The device may be busy meanwhile; the host waits for it where ranks tell each other what to send.
        """
        loaded: Future[list[dict[str, Any]]] = Future()
        try:
            loaded.set_result(self.of(first, stop))
        except Exception as error:  # the step under way is not to fail for it
            loaded.set_exception(error)
        self._ahead = (first, stop), loaded

    def shard(self, full: dict[str, torch.Tensor]) -> dict[str, Any]:
        """This rank's rows of whole sequences: `input_ids`, `document_ids`, both `[B, S]` int64."""
        group, device = self.world.sp_group, self.world.device
        return shard_batch(full, group, order=self.order, layout=self.layout, strategy=self.strategy, device=device)

    def _padding(self) -> dict[str, np.ndarray]:
        return {
            "input_ids": np.zeros(self.seq_len, np.int64),
            "document_ids": np.full(self.seq_len, -1, np.int64),
        }
