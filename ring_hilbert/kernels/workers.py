# SPDX-License-Identifier: Apache-2.0
"""Walks planned in other processes: planning is Python on the host, where threads would take turns with the one that launches."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
log = logging.getLogger(__name__)


def count() -> int:
    """How many workers a rank should have: its share of the host's cores but two, from 1 to 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 2))


class Worker:
    """A process that computes functions of this package, one at a time; it starts with the first, and ends with this one."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lost = False

    def call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """`function(*args, **kwargs)`; computed here if the process is gone."""
        if not self._lost:
            try:
                value, error = self._ask((function, args, kwargs))
            except (OSError, EOFError, pickle.UnpicklingError) as problem:
                self._lost = True
                log.warning("a process that plans walks is gone (%r); planning goes on without it", problem)
            else:
                if error is not None:
                    raise error
                return value
        return function(*args, **kwargs)

    def _ask(self, question: Any) -> Any:
        if self._process is None:
            path = os.pathsep.join(folder for folder in sys.path if folder)
            own = {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-c", f"import {__name__} as workers; workers.serve()"]
            self._process = subprocess.Popen(
                command, env=os.environ | own, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        to, back = self._process.stdin, self._process.stdout
        assert to is not None and back is not None
        pickle.dump(question, to, pickle.HIGHEST_PROTOCOL)
        to.flush()
        return pickle.load(back)


def serve() -> None:
    """What a worker's process does: answer pickled calls on its standard input until that is closed."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):  # they are for the process that asks
        signal.signal(number, signal.SIG_IGN)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    while True:
        try:
            function, args, kwargs = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = function(*args, **kwargs), None
        except Exception as error:
            answer = None, error
        pickle.dump(answer, answers, pickle.HIGHEST_PROTOCOL)
        answers.flush()
