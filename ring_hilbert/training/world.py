# SPDX-License-Identifier: Apache-2.0
"""The ranks of a run: process group, device, device mesh, and the few collectives that the trainer needs.

Ranks of one sequence are neighbours, so that the exchange stays within a host if possible, as are those that share parameters:
`rank = (replicate_index * dp_shard + shard_index) * sp + sp_index`.
"""

from __future__ import annotations

import gc
import itertools
import os
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ring_hilbert.training.config import ParallelConfig, TimeoutsConfig
from ring_hilbert.training.hosts import answered, join, rank_device
from ring_hilbert.training.verdict import Report
from ring_hilbert.training.watchdog import RankLost, Watchdog, first_reports
from ring_hilbert.training.whereabouts import Phase, Whereabouts

HANGS = Path(tempfile.gettempdir()) / "ring_hilbert_hangs"
T = TypeVar("T")
# Numbers the worlds of a process group.
_worlds: weakref.WeakKeyDictionary[dist.ProcessGroup, Iterator[int]] = weakref.WeakKeyDictionary()


class RankError(ValueError):
    """A user's mistake that is known to and raised on every rank; it is enough for one to print it."""


@dataclass(frozen=True)
class World:
    """This process among the others.

    Args:
        mesh: how parameters are distributed, with axes replicate and shard. None without a process group.
        sp_group: the ranks that share this rank's sequences; None if there are no others.
        dp_index: the index of this rank's group among those that read different sequences.
        control: all ranks, on the CPU. None without a process group.
        reports: every rank's first report on itself, including its host.
        whereabouts: what this rank is doing.
        watchdog: ends a hang; None without other ranks.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None = None
    sp_group: dist.ProcessGroup | None = None
    dp_index: int = 0
    control: dist.ProcessGroup | None = None
    reports: tuple[Report, ...] = ()
    whereabouts: Whereabouts = field(default_factory=Whereabouts)
    watchdog: Watchdog | None = None

    @property
    def is_main(self) -> bool:
        """Whether this rank prints and writes the files that exist once."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` in place over all ranks, bitwise equal on each; returns it."""
        if self.mesh is not None:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, *values: float) -> torch.Tensor:
        """The values of every rank, `[ranks, values]` float64 on the CPU."""
        mine = torch.tensor(values, dtype=torch.float64)
        if self.control is None:
            return mine[None]
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(rows, mine, group=self.control)
        return torch.stack(rows)

    def collect(self, value: T) -> list[T]:
        """The value of every rank, on every rank."""
        values: list[Any] = [value]
        if self.control is not None:
            values = [None] * self.size
            dist.all_gather_object(values, value, group=self.control)
        return values

    @contextmanager
    def phase(self, name: Phase, part: str) -> Iterator[None]:
        """Set what this rank does in the block, and which of `timeouts` applies."""
        whereabouts = self.whereabouts
        before = whereabouts.phase, whereabouts.part
        whereabouts.phase = name
        whereabouts.enter(part)
        yield
        whereabouts.phase = before[0]
        whereabouts.enter(before[1])

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that every rank runs and in which any may fail: an error on one is raised on all. Waits for all ranks.

        Raises:
            RankError: for a ValueError or OSError on some rank; names the first such rank if there are several ranks.
            Exception: any other that was raised in the block, on its rank; the others raise RankError.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        users = isinstance(error, (ValueError, OSError))
        mine = None if error is None else str(error) if users else f"{type(error).__name__}: {error}"
        messages = self.collect(mine)
        if error is not None and not users:
            raise error
        for rank, message in enumerate(messages):
            if message is not None:
                raise RankError(message if self.size == 1 else f"rank {rank}: {message}") from error

    def from_main(self, function: Callable[[], T]) -> T:
        """Call `function` on rank 0 and return its value on every rank; an error there is raised on all, as in `together`."""
        values: list[Any] = [None]
        with self.together():
            if self.is_main:
                values[0] = function()
        if self.control is not None:
            dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]


@contextmanager
def process_group(device: torch.device, timeouts: TimeoutsConfig) -> Iterator[None]:
    """Join the process group that a launcher describes, or make one of this process alone, and leave it; no-op if one is open.

    Gloo on the CPU; with CUDA devices, NCCL for tensors on them and Gloo for the rest. Under a launcher only once per process: a
    second group would find the addresses of the first.
    """
    if dist.is_initialized():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # Given a device, NCCL connects now and splits later groups off this one, instead of connecting each in the first step.
    bound = device if device.type == "cuda" else None
    if "WORLD_SIZE" in os.environ:
        join(backend, timeouts.start, timeouts.longest, bound)
    else:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]  # documented, but not in __all__
        dist.init_process_group(backend, store=store, rank=0, world_size=1, device_id=bound)
    leave = True
    try:
        yield
    except BaseException:
        # Others may be waiting in a collective, which the end of this process aborts.
        leave = dist.get_world_size() == 1
        raise
    finally:
        if leave:
            dist.destroy_process_group()
            # Let Gloo's threads free their last tensors: torch 2.13 aborts if they do so while Python shuts down.
            time.sleep(0.1)


@contextmanager
def open_world(
    parallel: ParallelConfig, timeouts: TimeoutsConfig | None = None, hangs: Path = HANGS
) -> Iterator[World]:
    """Join the `process_group`, make the mesh over it, and watch that no rank waits for ever.

    Args:
        parallel: the axes.
        timeouts: default: those of a configuration that sets none.
        hangs: the folder for the traces of a hang.

    Raises:
        ValueError: if the number of ranks is not dp_shard * dp_replicate * sp, or this rank has no CUDA device.
        RankLost: from within, in place of the error of a collective that another rank did not join.
    """
    device, timeouts = rank_device(), timeouts or TimeoutsConfig()
    size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    if size != parallel.world_size:
        raise ValueError(
            f"parallel: dp_shard {parallel.dp_shard} * dp_replicate {parallel.dp_replicate} * sp {parallel.sp} = "
            f"{parallel.world_size} ranks, but {size} {'is' if size == 1 else 'are'} running; start "
            f"`torchrun --nproc-per-node {parallel.world_size} -m ring_hilbert.cli pretrain ...`, or give "
            f"parallel.sp={size} parallel.dp_shard=1 parallel.dp_replicate=1"
        )
    with process_group(device, timeouts):
        group = dist.group.WORLD
        assert group is not None
        whereabouts, prefix = Whereabouts(), f"ring_hilbert/world {next(_worlds.setdefault(group, itertools.count()))}"
        with answered(timeouts.start):
            reports = first_reports(prefix)
        timeout = timedelta(seconds=timeouts.longest)
        with Watchdog(whereabouts, timeouts, reports, hangs, prefix) if size > 1 else nullcontext() as watchdog:
            try:
                control = dist.new_group(backend="gloo", timeout=timeout)
                assert isinstance(control, dist.ProcessGroup)
                world = lay_world(device, parallel, control, timeout)
                yield replace(world, reports=reports, whereabouts=whereabouts, watchdog=watchdog)
            except RankError:
                raise
            except Exception as error:
                lost = None if watchdog is None else watchdog.explain(error)
                if lost is None:
                    raise
                raise RankLost(lost) from error


def lay_world(
    device: torch.device, parallel: ParallelConfig, control: dist.ProcessGroup, timeout: timedelta | None = None
) -> World:
    """This rank's place in the open process group, with a group per axis of the mesh and per sequence."""
    ranks = torch.arange(parallel.world_size)
    sp_group = _subgroup(ranks.reshape(-1, parallel.sp), timeout) if parallel.sp > 1 else None
    mesh = ranks.reshape(parallel.dp_replicate, -1)
    groups = [_subgroup(mesh.T, timeout), _subgroup(mesh, timeout)]
    return World(
        dist.get_rank(),
        parallel.world_size,
        device,
        DeviceMesh.from_group(groups, device.type, mesh=mesh, mesh_dim_names=("replicate", "shard")),
        sp_group,
        dist.get_rank() // parallel.sp,
        control,
    )


def _subgroup(members: torch.Tensor, timeout: timedelta | None) -> dist.ProcessGroup:
    """This rank's group among those in the rows of `members`."""
    group, _ = dist.new_subgroups_by_enumeration(members.tolist(), timeout=timeout)
    assert isinstance(group, dist.ProcessGroup)  # every rank is in exactly one of them
    return group


def release_memory(device: torch.device) -> None:
    """Free what only reference cycles hold, such as FSDP's modules, and reset peak statistics."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
