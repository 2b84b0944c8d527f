# SPDX-License-Identifier: Apache-2.0
"""The inside of a rank process of `tests.harness.ranks`: it answers one call after another, each in a fresh process group."""

from __future__ import annotations

import dataclasses
import datetime
import faulthandler
import functools
import gc
import importlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


@dataclasses.dataclass(frozen=True)
class Task:
    """One call for one rank; `call` is the pickled (function, args), the group timeout is in seconds."""

    call: bytes
    rank: int
    world_size: int
    store: str
    group_timeout: float


@dataclasses.dataclass(frozen=True)
class Report:
    """How a call ended: a pickled value, or a pickled exception, its traceback and the moment (monotonic clock).

    A rank without a group at the end is not `reusable`: torch may have numbered a group that it failed to join, and would
    look for the next one under another name than the other ranks.
    """

    value: bytes = b""
    error: bytes = b""
    traceback: str = ""
    failed_at: float = 0.0
    reusable: bool = True


def serve(connection: Connection, stack_file: str) -> None:
    """Answer calls until the test process closes the connection; SIGUSR1 writes every thread's stack to a file."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the test process, which kills this one
    warnings.filterwarnings("error", module=r"ring_hilbert(\..*)?")
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # independent of how the host name resolves
    # or a call that ends at once closes sockets to which other ranks are still connecting
    os.environ["TORCH_DIST_INIT_BARRIER"] = "1"
    with Path(stack_file).open("w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
        _CACHES.look()
        gc.freeze()  # what is imported is here to stay: a collection would look at it for a quarter of a second
        connection.send_bytes(b"ready")
        while True:
            try:
                message = connection.recv_bytes()
            except EOFError:
                return
            connection.send_bytes(pickle.dumps(_answer(pickle.loads(message))))


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _answer(task: Task) -> Report:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    report = _call(task)
    if report.error:
        gc.collect()  # groups held by the traceback: their sockets must close for the other ranks to notice
    else:
        _wait_for_others()
    if not dist.is_initialized():
        return dataclasses.replace(report, reusable=False)
    dist.destroy_process_group()
    _CACHES.clear()
    return report


class _Caches:
    """Those of DTensor and FSDP, in which a mesh is equal to one of an earlier call, whose groups are gone."""

    def __init__(self) -> None:
        self.modules = 0  # imported when they were looked for, which takes a quarter of a second
        self.found: dict[int, Any] = {}

    def look(self) -> None:
        """Find those of modules imported since."""
        if self.modules != len(sys.modules):
            self.modules = len(sys.modules)
            for thing in gc.get_objects():
                if type(thing) is functools._lru_cache_wrapper and f"{thing.__module__}".startswith(
                    "torch.distributed"
                ):
                    self.found[id(thing)] = thing

    def clear(self) -> None:
        """Empty them."""
        self.look()
        for cache in self.found.values():
            cache.cache_clear()
        if "torch.distributed.tensor" in sys.modules:
            for name, clear in vars(importlib.import_module("torch.distributed.tensor.debug")).items():
                if name.startswith("_clear") and name.endswith("_cache"):
                    clear()


_CACHES = _Caches()


def _call(task: Task) -> Report:
    try:
        function, args = pickle.loads(task.call)
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(task.store, task.world_size),  # pyright: ignore[reportPrivateImportUsage]  # documented
            rank=task.rank,
            world_size=task.world_size,
            timeout=datetime.timedelta(seconds=task.group_timeout),
        )
        return Report(value=pickle.dumps(function(task.rank, task.world_size, *args)))
    except BaseException as exception:
        return Report(error=_pickled(exception), traceback=traceback.format_exc(), failed_at=time.monotonic())


def _wait_for_others() -> None:
    """Keep the group until every rank is done with it; a rank that failed has closed it, and reports that itself."""
    if dist.is_initialized():
        try:
            dist.barrier()
        except RuntimeError:
            return


def _pickled(exception: BaseException) -> bytes:
    try:
        data = pickle.dumps(exception)
        pickle.loads(data)
    except Exception:
        return pickle.dumps(RuntimeError(f"{type(exception).__name__}: {exception}"))
    return data
