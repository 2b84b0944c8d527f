# SPDX-License-Identifier: Apache-2.0
"""Background saving: tensors are copied to the host while the next step computes, and written by a thread."""

from __future__ import annotations

from concurrent.futures import Future
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint._state_dict_stager import StateDictStager
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse, async_save, save

from ring_hilbert.training.storage.tensors import Rehearsal, Writer

State = dict[str, dict[str, Tensor]]  # by kind and parameter; saved as `<kind>.<parameter>`. An outer key costs 0.1 ms


class _HostCopies(StateDictStager):
    """Keeps its memory from save to save: in PyTorch 2.11 a `DefaultStager` closes its own after every copy."""

    def close(self) -> None:
        """Do nothing; see `free`."""

    def free(self) -> None:
        """Free the memory; no copy may follow."""
        super().close()


class Saver:
    """Saves one engine, one save at a time. Every rank calls every method, in the same order.

    Args:
        asynchronous: write in the background; otherwise a save is done when `save` returns.
        timeout: seconds that ranks wait for each other in a save.

    With `asynchronous` the host keeps a copy of all that is saved, in page-locked memory where there is a CUDA device.
    """

    def __init__(self, device: torch.device, asynchronous: bool, timeout: float) -> None:
        self._on_cuda = device.type == "cuda"
        # The thread's collectives must not share a group with the loop's.
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        assert isinstance(group, dist.ProcessGroup)  # every rank is in it
        self._group = group
        self._host_copies = _HostCopies(pin_memory=self._on_cuda)
        self._stager = self._make_stager() if asynchronous else None
        self._copied: Future[None] | None = None

    def prepare(self, tensors: State) -> None:
        """Save without writing, so that what only the first save does is done before the first step.

        It locks the pages of the host memory, which takes seconds, connects the ranks and makes PyTorch's first plan, which would
        keep the interpreter from starting kernels.
        """
        if self._stager is not None:
            self.save(tensors, Rehearsal()).result()
            self.fence()

    def save(self, tensors: State, writer: Writer) -> Future[Any]:
        """Start writing `tensors`, which must not change before `fence`; returns a future done once published or failed."""
        if self._stager is None:
            done: Future[Any] = Future()
            try:
                done.set_result(save(tensors, storage_writer=writer, process_group=self._group))
            except CheckpointException as error:
                done.set_exception(error)
            return done
        self._wait_for_device()
        begun = async_save(tensors, storage_writer=writer, async_stager=self._stager, process_group=self._group)
        assert isinstance(begun, AsyncSaveResponse)
        self._copied = begun.staging_completion
        return begun.upload_completion

    def fence(self) -> None:
        """Wait until the tensors have been copied and may change."""
        if self._copied is not None:
            self._copied.result()
            self._copied = None

    def close(self) -> None:
        """Free the host memory."""
        self.fence()
        if self._stager is not None:
            self._stager.close()
            self._host_copies.free()

    def _make_stager(self) -> DefaultStager:
        stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=self._on_cuda,
                use_shared_memory=False,
                use_async_staging=True,
                use_non_blocking_copy=self._on_cuda,
            )
        )
        stager._state_dict_stager = self._host_copies
        return stager

    def _wait_for_device(self) -> None:
        """Synchronise: the copies are made on a separate stream, which waits for no other."""
        if self._on_cuda:
            torch.cuda.current_stream().synchronize()


def first_failure(error: CheckpointException) -> tuple[int, BaseException]:
    """The first rank that failed, and its error."""
    rank, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
    return rank, cause
