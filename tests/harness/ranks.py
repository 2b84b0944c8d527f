# SPDX-License-Identifier: Apache-2.0
"""Run a function on several Gloo ranks of this machine, and fail rather than hang.

The rank processes are started once and kept over tests, because importing torch takes seconds. Every call gives them a
fresh process group over a fresh file store: no ports, nothing shared with another pytest-xdist worker.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from tests.harness.rank_process import Task, serve

START_TIMEOUT = 180.0  # seconds for the first process to import torch, on a busy machine
GRACE = 10.0  # seconds, after a first failure, for the other ranks to end by themselves


class RemoteTraceback(Exception):
    """The traceback of a rank, as text: the cause of the exception that the test sees."""


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Call `function(rank, world_size, *args)` on every rank of a fresh Gloo group; return the values by rank.

    `function` is at the top level of an importable module; arguments and values pickle (CPU tensors do). A rank starts
    with one torch thread, seed 0 and warnings from `ring_hilbert` as errors. Its process serves other tests before and
    after, so a function that changes global state changes it back. The group times out after half of `timeout`.

    Raises:
        Exception: the earliest exception of any rank, with the rank and its traceback as the cause.
        ChildProcessError: a rank died.
        TimeoutError: a rank did not finish within `timeout` seconds; all were killed, and the message has their stacks.
    """
    outcomes = _POOL.call(function, world_size, args, timeout, stop_at_failure=True)
    failures = [outcome for outcome in outcomes if isinstance(outcome, _Failure)]
    if failures:
        raise _earliest(failures).exception
    return outcomes


def run_ranks_collect(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120
) -> list[Any | BaseException]:
    """Like `run_ranks`, but a rank's exception stands in its place of the list; a timeout still raises."""
    outcomes = _POOL.call(function, world_size, args, timeout, stop_at_failure=False)
    return [outcome.exception if isinstance(outcome, _Failure) else outcome for outcome in outcomes]


@dataclass(frozen=True)
class _Failure:
    """An exception on a rank and the moment it was raised (the monotonic clock is one for all processes)."""

    exception: BaseException
    failed_at: float


def _earliest(failures: list[_Failure]) -> _Failure:
    return min(failures, key=lambda failure: failure.failed_at)


@functools.cache
def process_context() -> Any:
    """Where ranks come from: forked by a process that imports once, for all of them, what this one has imported by now."""
    if torch.cuda.is_available():  # which imports may touch, and which does not survive a fork
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    ours = [name for name in sys.modules if name.startswith("ring_hilbert")]
    context.set_forkserver_preload(["torch._dynamo", *ours])  # the former is what calls of custom operators import
    return context


class _Rank:
    """One rank's process, seen from the test."""

    def __init__(self, stack_file: Path) -> None:
        context = process_context()
        self.connection, theirs = context.Pipe()
        self.stack_file = stack_file
        # daemon: it ends with pytest, and may have no children of its own to leave behind
        self.process = context.Process(target=serve, args=(theirs, str(stack_file)), daemon=True)
        self.process.start()
        theirs.close()

    def wait_ready(self) -> None:
        """Wait until the process has imported what it needs, or raise TimeoutError."""
        if not self.connection.poll(START_TIMEOUT):
            raise TimeoutError(f"a rank process did not start within {START_TIMEOUT} s")
        self.connection.recv_bytes()

    def receive(self, name: str) -> Any:
        """Return the value, or the `_Failure`, of the call that the process was given."""
        try:
            report = pickle.loads(self.connection.recv_bytes())
        except (EOFError, ConnectionError):
            self.process.join(GRACE)
            return _Failure(ChildProcessError(f"{name} died with exit code {self.process.exitcode}"), time.monotonic())
        if not report.reusable:
            self.kill()
        if not report.error:
            return pickle.loads(report.value)
        exception = pickle.loads(report.error)
        exception.__cause__ = RemoteTraceback(f"{name} raised:\n{report.traceback}")
        return _Failure(exception, report.failed_at)

    def stack(self) -> str:
        """Ask the process where it is; works while it is blocked in C code too."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGUSR1)
        time.sleep(0.3)
        return self.stack_file.read_text()

    def kill(self) -> None:
        """End the process now."""
        self.process.kill()
        self.process.join()
        self.connection.close()


class _RankPool:
    """Rank processes kept over calls: a call uses the first `world_size` of them, and more are made when needed."""

    def __init__(self) -> None:
        self._ranks: list[_Rank] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._numbers = itertools.count()

    def call(
        self,
        function: Callable[..., Any],
        world_size: int,
        args: tuple[Any, ...],
        timeout: float,
        stop_at_failure: bool,
    ) -> list[Any]:
        """Return each rank's value or `_Failure`. However it ends, no process is left in the middle of the call."""
        if world_size < 1:
            raise ValueError(f"world_size must be at least 1, got {world_size}")
        if "<" in function.__qualname__:  # <lambda>, <locals>
            raise ValueError(f"function must be at the top level of its module, got {function.__qualname__}")
        call = pickle.dumps((function, args))
        try:
            self._grow(world_size)
            store = str(self._path("store"))
            for number, rank in enumerate(self._ranks[:world_size]):
                rank.connection.send_bytes(pickle.dumps(Task(call, number, world_size, store, timeout / 2)))
            return self._collect(world_size, timeout, stop_at_failure)
        except BaseException:  # KeyboardInterrupt and pytest-timeout's included
            self.kill()
            raise

    def kill(self) -> None:
        """Kill every process of the pool and remove its files; the next call starts afresh."""
        while self._ranks:
            self._ranks.pop().kill()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _path(self, name: str) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        return Path(self._folder.name) / f"{name}-{next(self._numbers)}"

    def _grow(self, world_size: int) -> None:
        self._ranks = [rank for rank in self._ranks if rank.process.is_alive()]
        new = [_Rank(self._path("stack")) for _ in range(world_size - len(self._ranks))]
        self._ranks += new
        for rank in new:
            rank.wait_ready()

    def _collect(self, world_size: int, timeout: float, stop_at_failure: bool) -> list[Any]:
        outcomes: dict[int, Any] = {}
        failures: list[_Failure] = []
        running: dict[Any, int] = {rank.connection: number for number, rank in enumerate(self._ranks[:world_size])}
        deadline = time.monotonic() + timeout
        while running and (ready := wait(list(running), max(0.0, deadline - time.monotonic()))):
            for connection in ready:
                number = running.pop(connection)
                outcomes[number] = self._ranks[number].receive(f"rank {number} of {world_size}")
                if isinstance(outcomes[number], _Failure):
                    failures.append(outcomes[number])
                    if stop_at_failure:
                        deadline = min(deadline, time.monotonic() + GRACE)
        if running:
            raise self._unfinished(sorted(running.values()), world_size, timeout, failures, stop_at_failure)
        return [outcomes[number] for number in range(world_size)]

    def _unfinished(
        self, numbers: list[int], world_size: int, timeout: float, failures: list[_Failure], stop_at_failure: bool
    ) -> BaseException:
        """Return what to raise for ranks that did not finish: the failure that stopped them, or a TimeoutError."""
        message = f"ranks {numbers} of {world_size} did not finish"
        known = [str(failure.exception.__cause__) for failure in failures]
        stacks = [f"rank {number} of {world_size} was at:\n{self._ranks[number].stack()}" for number in numbers]
        if stop_at_failure and failures:
            exception = _earliest(failures).exception
            exception.__cause__ = RemoteTraceback("\n".join([*known, message, *stacks]))
            return exception
        return TimeoutError("\n".join([f"{message} within {timeout} s and all were killed", *known, *stacks]))


_POOL = _RankPool()
atexit.register(_POOL.kill)
