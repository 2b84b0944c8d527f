# SPDX-License-Identifier: Apache-2.0
"""Hang detection: every rank reports where it is, and one that waits too long says for which rank, and ends its process.

A collective that never completes blocks in C++ on all ranks but the culprit. So two threads watch for it. One exchanges reports
with the other ranks every second, through the rendezvous store; the other compares them with the configured limits, and never
waits for anything. Neither slows down a step, and both are daemon threads, which end with the process. Time in which this process
itself was stopped does not count.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store
from tqdm import tqdm

from ring_hilbert.parallel.wire import waiting_for
from ring_hilbert.training.config import TimeoutsConfig
from ring_hilbert.training.hosts import STATUS
from ring_hilbert.training.signals import StopSignals
from ring_hilbert.training.verdict import SILENT, Heard, Report, verdict
from ring_hilbert.training.whereabouts import (
    FLIGHT_RECORDER,
    Whereabouts,
    collective_of,
    collective_that_failed,
    innermost,
    on_device,
    on_host,
)

EVERY = 1.0  # seconds between two reports of a rank
LOOK = 0.25  # seconds between two checks of the limits
ASK = 2.0  # seconds between two questions to the flight recorder, while nothing moves
READ = 64  # most reports of others that a rank reads per second


class RankLost(RuntimeError):
    """Another rank is gone, stopped or stuck; names it, and where it was."""


def first_reports(prefix: str) -> tuple[Report, ...]:
    """Every rank's first report; all ranks call it. `prefix`: see `Watchdog`."""
    store, rank, size = _get_default_store(), dist.get_rank(), dist.get_world_size()
    store.set(f"{prefix}/{rank}", Report(rank).as_json())
    return tuple(map(Report.from_json, store.multi_get([f"{prefix}/{other}" for other in range(size)])))


class Watchdog:
    """A context manager around everything that ranks do together.

    Args:
        whereabouts: where this rank is.
        timeouts: the limits.
        reports: the first report of every rank.
        folder: for the traces of a hang.
        prefix: of the keys in the store; the same on all ranks, and different for every watchdog of a process group.
    """

    def __init__(
        self, whereabouts: Whereabouts, timeouts: TimeoutsConfig, reports: Sequence[Report], folder: Path, prefix: str
    ) -> None:
        self.whereabouts, self.timeouts, self.folder, self.prefix = whereabouts, timeouts, folder, prefix
        self.report = reports[dist.get_rank()]  # only `_look` changes it
        self._turns = -(-len(reports) // READ)
        patience = SILENT + 3 * EVERY * (self._turns - 1)
        self.heard = {r.rank: Heard(r, patience) for r in reports if r.rank != self.report.rank}
        self._number, self._told, self._telling = 0, False, threading.Lock()
        shared: Any = _get_default_store()  # the stub lacks `clone`
        self._store = shared.clone()  # a separate connection: the run blocks on the other one
        self._store.set_timeout(timedelta(seconds=SILENT))
        self._thread = threading.get_ident()  # the one that trains
        self._seen: object = None
        self._recorded: str | None = None
        self._stop, self._hurry = threading.Event(), threading.Event()

    def __enter__(self) -> Watchdog:
        for target in (self._exchange, self._look):
            threading.Thread(target=target, name=f"watchdog{target.__name__}", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._hurry.set()

    def verdict(self, collective: str | None = None) -> str:
        """For which rank this one waits, in `collective` or the one that its stack shows."""
        me = self.report if collective is None else replace(self.report, collective=collective)
        keeper = None if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else 0
        place = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        return verdict(me, list(self.heard.values()), place, keeper)

    def explain(self, error: BaseException) -> str | None:
        """The verdict, if `error` is a collective's that another rank caused; otherwise tell the others of `error`."""
        if self.report.leaving:  # the verdict was given, and others leaving too is no news
            time.sleep(3 * SILENT)
        collective = collective_that_failed(error.__traceback__)
        of_backend = isinstance(error, RuntimeError) and ("gloo" in str(error) or "NCCL" in str(error))
        if collective is None and not of_backend:
            _within(SILENT, partial(self._tell, failure=f"{type(error).__name__}: {error}"[:1000]))
            return None
        machine, until = self.report.machine, time.monotonic() + SILENT + 2 * EVERY
        with StopSignals():  # a launcher ends all ranks as soon as it sees the first one exit
            while time.monotonic() < until:
                others = [h for h in self.heard.values() if not h.report.leaving]
                if any(heard.absent(machine) or heard.report.failure for heard in others):
                    _within(SILENT, partial(self._tell, leaving=True))
                    time.sleep(EVERY + LOOK)  # until it is known which ranks have left for the same reason
                    return self.verdict(collective)
                time.sleep(LOOK)
        return None

    # ---- one thread communicates with the other ranks

    def _exchange(self) -> None:
        others = list(self.heard)
        while not self._stop.is_set():
            self._tell()
            with suppress(RuntimeError):  # the store does not answer, which shows in the ranks' silence
                self._hear(others[self._number % self._turns :: self._turns])
            self._hurry.wait(EVERY)
            self._hurry.clear()

    def _tell(self, **last: Any) -> None:
        """Send a report; `last`: fields of the final one. Cut off from the store it takes as long as TCP tries."""
        with self._telling:
            if not self._told:
                self._told, self._number = bool(last), self._number + 1
                report = replace(self.report, number=self._number, **last)
                with suppress(RuntimeError):
                    self._store.set(f"{self.prefix}/{report.rank}", report.as_json())

    def _hear(self, ranks: Sequence[int]) -> None:
        for report in map(Report.from_json, self._store.multi_get([f"{self.prefix}/{rank}" for rank in ranks])):
            known = self.heard[report.rank]
            if report.number != known.report.number:
                self.heard[report.rank] = Heard(report, known.patience)

    # ---- the other one watches

    def _look(self) -> None:
        last, warned = time.monotonic(), False
        while not self._stop.wait(LOOK):
            now = time.monotonic()
            passed, last = min(now - last, 2 * LOOK), now
            self._count(passed)
            phase = self.whereabouts.phase
            limit = getattr(self.timeouts, phase)
            # A rank that prepares data may take any time as long as it is alive; waiting for it is not idle.
            waited = max(h.silence for h in self.heard.values()) if phase == "data" else self.report.idle
            if waited + 2 * LOOK >= limit:
                self._end(f"timeouts.{phase} is {limit:g} s, the run ends")
            elif self.report.idle > SILENT and any(heard.report.leaving for heard in self.heard.values()):
                self._end("another rank has ended the run")
            elif waited < limit / 2:
                warned = False
            elif not warned:
                warned = True
                _say(f"{self.verdict()}; timeouts.{phase} is {limit:g} s")

    def _count(self, passed: float) -> None:
        """Check whether anything has moved in the training thread, and count the others' silence."""
        call = innermost(self._thread)
        seen = (self.whereabouts.moves, call)
        idle = self.report.idle + passed if seen == self._seen else 0.0
        self._seen = seen
        collective = next(iter(waiting_for), None) or (collective_of(call[:1]) if call else None)
        if idle // ASK != self.report.idle // ASK:  # not at every check: it takes time
            self._recorded = on_device() or collective or on_host() if idle else None
        collective = self._recorded or collective
        progress = _bars() if self.whereabouts.phase == "data" else ""
        self.report = replace(
            self.report, whereabouts=str(self.whereabouts), collective=collective, idle=idle, progress=progress
        )
        for heard in self.heard.values():
            heard.silence += passed

    def _end(self, why: str) -> None:
        _say(f"{self.verdict()}; {why}")
        self.report = replace(self.report, leaving=True)
        self._hurry.set()
        _within(SILENT, self._leave_behind)
        until = time.monotonic() + SILENT
        while time.monotonic() < until and not self._all_leave():
            time.sleep(LOOK)
            self._count(LOOK)
        os._exit(STATUS)

    def _all_leave(self) -> bool:
        return all(h.report.leaving or h.absent(self.report.machine) for h in self.heard.values())

    def _leave_behind(self) -> None:
        """Write stacks and the flight recorder's last collectives to files, and report where."""
        sys.stdout.flush()
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"stacks_{self.report.rank}.txt").open("w") as file:
            faulthandler.dump_traceback(file)
        dump = getattr(FLIGHT_RECORDER, "_dump_nccl_trace", None) or FLIGHT_RECORDER._dump_fr_trace
        (self.folder / f"flight_{self.report.rank}").write_bytes(dump())
        _say(f"rank {self.report.rank}: stacks and the flight recorder's trace are in {self.folder.absolute()}")


def _bars() -> str:
    """The progress bars of this process; empty at a moment at which another thread makes or ends one."""
    with suppress(AttributeError, RuntimeError):
        return " ".join(map(str, list(tqdm._instances)))  # type: ignore[attr-defined]
    return ""


def _say(text: str) -> None:
    """Write to stderr in one piece, even if others write there."""
    os.write(2, f"ring-hilbert: {text}\n".encode())


def _within(seconds: float, function: Callable[[], None]) -> None:
    """Call a function that may itself hang, and wait for it at most `seconds`."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(seconds)
