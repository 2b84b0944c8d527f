# SPDX-License-Identifier: Apache-2.0
"""For custom training loops: which ranks share a sequence, and a data loader that gives each its rows.

    groups = SequenceParallel(sp_size=4)
    sampler = DistributedSampler(dataset, num_replicas=groups.dp_size, rank=groups.dp_rank)
    for batch in ShardedLoader(DataLoader(dataset, sampler=sampler), groups.group, order=order, device=device):
        labels = batch.pop("shift_labels")
        logits = model(**batch).logits
        predicted = rh.gather_rows(logits.argmax(-1), batch["ring_hilbert"])  # for metrics: [B, S] in natural order, on every rank

How to scale the loss depends on what sums the gradients: see `deepspeed`, `accelerate` and `trainer` in this package.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import BatchSampler, IterableDataset, SequentialSampler

from ring_hilbert.ops.order import TokenOrder
from ring_hilbert.parallel.sharding import shard_batch


class SequenceParallel:
    """Groups of neighbouring ranks that share a sequence; also the `mpu` of `deepspeed.initialize`. Optimizer state is sharded
    over all ranks.

    Args:
        sp_size: ranks per sequence, a divisor of the number of ranks. A collective: every rank of the world must construct one.
        group: this rank's group of neighbours, if it exists already; instead of `sp_size`.

    Attributes: `group`; `dp_rank` and `dp_size`, which number the groups, whose ranks read the same data; and `peers`, the ranks
    with this rank's position in their groups, over which the results of all groups are gathered.

    Raises:
        ValueError: if the ranks cannot be divided like this.
    """

    # What DeepSpeed expects of an mpu. get_data_parallel_world_size is absent: DeepSpeed would take it for the world's.
    initialize_sequence_parallel = True

    def __init__(self, sp_size: int | None = None, *, group: dist.ProcessGroup | None = None) -> None:
        if (sp_size is None) == (group is None):
            raise ValueError("SequenceParallel takes exactly one of sp_size and group")
        world = dist.get_world_size()
        if group is None:
            if sp_size is None or sp_size < 1 or world % sp_size:
                raise ValueError(f"sp_size must divide the {world} ranks, got {sp_size}")
            made, _ = dist.new_subgroups_by_enumeration(torch.arange(world).reshape(-1, sp_size).tolist())
            assert isinstance(made, dist.ProcessGroup)  # every rank is in exactly one of them
            group = made
        members = dist.get_process_group_ranks(group)
        size = len(members)
        if world % size or members != list(range(members[0], members[0] + size)) or members[0] % size:
            raise ValueError(f"the ranks of a sequence must be neighbours that divide the {world} ranks, got {members}")
        self.group = group
        self.peers, _ = dist.new_subgroups_by_enumeration(torch.arange(world).reshape(-1, size).T.tolist())
        self._alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
        self.dp_size, self.dp_rank = world // size, members[0] // size

    def get_sequence_parallel_group(self) -> dist.ProcessGroup:
        """The ranks of this rank's sequences."""
        return self.group

    def get_sequence_parallel_world_size(self) -> int:
        """Number of ranks per sequence."""
        return dist.get_world_size(self.group)

    def get_sequence_parallel_rank(self) -> int:
        """This rank's index among them."""
        return dist.get_rank(self.group)

    def get_sequence_data_parallel_group(self) -> dist.ProcessGroup:
        """All ranks: gradients are reduced over them, and ZeRO shards over them."""
        assert dist.group.WORLD is not None
        return dist.group.WORLD

    def get_sequence_data_parallel_world_size(self) -> int:
        """Number of all ranks."""
        return dist.get_world_size()

    def get_sequence_data_parallel_rank(self) -> int:
        """This rank's index among all."""
        return dist.get_rank()

    # Nothing is tensor-parallel. If these were the sequence's ranks, DeepSpeed would omit all but the first from gradient norms in
    # BF16_Optimizer and with offloading, taking them for replicas.
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
    """Batches of a data loader, each cut to this rank's rows by `shard_batch`. Every iteration is an epoch.

    An interrupted loop resumes where it was: put `state_dict()` into the checkpoint, by `accelerator.register_for_checkpointing`
    or as DeepSpeed's `client_state`; after `load_state_dict()` the next iteration yields the rest of its epoch, re-reading and
    dropping the batches before. This requires that the order of an epoch depend on its number alone: everything in `loader` with
    a `set_epoch` is told the number, samplers and streams with a `generator` are seeded with it, and the rest (datasets, other
    kinds of loaders) must yield the same every time.

    Args:
        loader: yields mappings of integer tensors `[B, S]` as `shard_batch` takes them, the same on all ranks of `group`, for
            instance by `DistributedSampler(dataset, num_replicas=mpu.dp_size, rank=mpu.dp_rank)`.
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
        self._samplers, self._others = _parts(loader)
        random = [*self._samplers, *(part for part in self._others if isinstance(part, IterableDataset))]
        self._told = [part for part in (*self._samplers, *self._others) if hasattr(part, "set_epoch")]
        self._seeded = [part for part in random if hasattr(part, "generator") and not hasattr(part, "set_epoch")]
        generators = [part.generator for part in self._seeded if part.generator is not None]
        self._seed = generators[0].initial_seed() if generators else torch.initial_seed()
        self._epoch, self._given, self._skipped = 0, 0, 0  # of the epoch: batches yielded, and batches to skip

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.set_epoch(self.epoch)
        self._given, self._skipped = self._skipped, 0
        for batch in itertools.islice(self.loader, self._given, None):
            self._given += 1
            yield shard_batch(batch, self.group, order=self.order, device=self.device, **self.options)
        self.set_epoch(self.epoch + 1)

    @property
    def epoch(self) -> int:
        """The epoch of this iteration, or of the next if none is running; the sampler's, if somebody else set it."""
        return next((part.epoch for part in self._told if hasattr(part, "epoch")), self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        if epoch != self._epoch:
            self._given = self._skipped = 0
        self._epoch = epoch
        for part in self._told:
            part.set_epoch(epoch)
        for part in self._seeded:
            if part.generator is None:
                part.generator = torch.Generator()
            part.generator.manual_seed(self._seed + epoch)

    def state_dict(self) -> dict[str, int]:
        """The position of the loop after the last batch yielded: the same on all ranks.

        Raises:
            ValueError: for a sampler or workers whose order may differ after a restart.
        """
        for part in self._samplers:
            known = type(part) in (BatchSampler, SequentialSampler) or isinstance(part, Sequence)
            if not (known or hasattr(part, "set_epoch") or hasattr(part, "generator")):
                raise ValueError(
                    f"the loader's {type(part).__name__} has neither set_epoch nor generator, so that its order after a restart is "
                    "not known: give it a set_epoch(epoch) that alone decides its order"
                )
        if getattr(self.loader, "persistent_workers", False) and any(
            isinstance(x, IterableDataset) for x in self._others
        ):
            raise ValueError(
                "persistent_workers keep a stream in the state of their first epoch, whichever that was: leave them out"
            )
        length = len(self) if hasattr(self.loader, "__len__") and self._samplers else -1
        return {"epoch": self.epoch, "batches": self._given, "seed": self._seed, "batches_per_epoch": length}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Resume from `state` in the next iteration.

        Raises:
            ValueError: as in `state_dict`, or for an epoch with another number of batches: other data, batch size or ranks.
        """
        here, there = self.state_dict()["batches_per_epoch"], state["batches_per_epoch"]
        if here != there:
            raise ValueError(
                f"an epoch of this loader has {here} batches, but had {there} when the state was saved: its place is only known "
                "for the same data, batch size and number of groups"
            )
        self._seed = state["seed"]
        self.set_epoch(state["epoch"])
        self._given = self._skipped = state["batches"]


def _parts(loader: Any) -> tuple[list[Any], list[Any]]:
    """(samplers that decide on the order of a loader, the loader itself and its datasets)."""
    found: list[tuple[Any, bool]] = [(loader, False)]
    for part, _ in found:  # grows during the loop
        dataset = getattr(part, "dataset", None)
        names = ["dataset"] if isinstance(dataset, IterableDataset) else ["dataset", "batch_sampler", "sampler"]
        for name in names:
            inner = getattr(part, name, None)
            if inner is not None and all(inner is not other for other, _ in found):
                found.append((inner, name != "dataset"))
    return [part for part, decides in found if decides], [part for part, decides in found if not decides]
