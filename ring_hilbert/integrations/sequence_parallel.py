# SPDX-License-Identifier: Apache-2.0
"""For a training loop of one's own: which ranks share a sequence, and a data loader that gives each its rows.

    groups = SequenceParallel(sp_size=4)
    sampler = DistributedSampler(dataset, num_replicas=groups.dp_size, rank=groups.dp_rank)
    for batch in ShardedLoader(DataLoader(dataset, sampler=sampler), groups.group, order=order, device=device):
        labels = batch.pop("shift_labels")
        logits = model(**batch).logits

How the loss is to be scaled depends on what sums the gradients: see `deepspeed`, `accelerate` and `trainer` beside this module.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ring_hilbert.ops.order import TokenOrder
from ring_hilbert.parallel.sharding import shard_batch


class SequenceParallel:
    """Which ranks share a sequence: neighbours. All of them share the optimizer's state. Also the `mpu` of `deepspeed.initialize`.

    Args:
        sp_size: ranks of a sequence; it divides the number of ranks. A collective: every rank of the world makes one.
        group: this rank's group of neighbours, if there is one already; instead of `sp_size`.

    Attributes: `group`, and `dp_rank` and `dp_size`, which number the groups: ranks of a group read the same data.

    Raises:
        ValueError: for ranks that cannot be divided so.
    """

    # What DeepSpeed looks for in an mpu. There is no get_data_parallel_world_size, which it would take for the world's.
    initialize_sequence_parallel = True

    def __init__(self, sp_size: int | None = None, *, group: dist.ProcessGroup | None = None) -> None:
        if (sp_size is None) == (group is None):
            raise ValueError("SequenceParallel takes exactly one of sp_size and group")
        world = dist.get_world_size()
        if group is None:
            if sp_size is None or sp_size < 1 or world % sp_size:
                raise ValueError(f"sp_size must divide the {world} ranks, got {sp_size}")
            ranks = torch.arange(world).reshape(-1, sp_size).tolist()
            group, _ = dist.new_subgroups_by_enumeration(ranks)
        assert group is not None
        members = dist.get_process_group_ranks(group)
        size = len(members)
        if world % size or members != list(range(members[0], members[0] + size)) or members[0] % size:
            raise ValueError(f"the ranks of a sequence must be neighbours that divide the {world} ranks, got {members}")
        self.group = group
        self._alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
        self.dp_size, self.dp_rank = world // size, members[0] // size

    def get_sequence_parallel_group(self) -> dist.ProcessGroup:
        """The ranks of this rank's sequences."""
        return self.group

    def get_sequence_parallel_world_size(self) -> int:
        """How many they are."""
        return dist.get_world_size(self.group)

    def get_sequence_parallel_rank(self) -> int:
        """Which of them this is."""
        return dist.get_rank(self.group)

    def get_sequence_data_parallel_group(self) -> dist.ProcessGroup:
        """All ranks: gradients are reduced over them, ZeRO divides among them."""
        assert dist.group.WORLD is not None
        return dist.group.WORLD

    def get_sequence_data_parallel_world_size(self) -> int:
        """How many ranks there are."""
        return dist.get_world_size()

    def get_sequence_data_parallel_rank(self) -> int:
        """Which of them this is."""
        return dist.get_rank()

    # Nothing is tensor-parallel. With the sequence's ranks here, DeepSpeed would leave all but the first of them out of gradient
    # norms in BF16_Optimizer and with offloading: it takes them for copies.
    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """This rank alone."""
        assert isinstance(self._alone, dist.ProcessGroup)
        return self._alone

    def get_model_parallel_world_size(self) -> int:
        """1."""
        return 1

    def get_model_parallel_rank(self) -> int:
        """0."""
        return 0


class ShardedLoader:
    """Batches of a data loader, each cut to this rank's rows by `shard_batch`.

    Args:
        loader: gives mappings of integer tensors `[B, S]` as `shard_batch` takes them, the same on all ranks of `group`; with
            `DistributedSampler(dataset, num_replicas=mpu.dp_size, rank=mpu.dp_rank)`, for instance.
        group: the ranks of a sequence, or None for one device.
        order: order of the rows.
        device: where the tensors go.
        options: further arguments of `shard_batch`.
    """

    def __init__(
        self,
        loader: Iterable[Mapping[str, Tensor]],
        group: dist.ProcessGroup | None,
        *,
        order: TokenOrder | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> None:
        self.loader, self.group, self.order, self.device, self.options = loader, group, order, device, options

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.loader:
            yield shard_batch(batch, self.group, order=self.order, device=self.device, **self.options)
