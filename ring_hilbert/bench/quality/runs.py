# SPDX-License-Identifier: Apache-2.0
"""The runs of a table: each in a process of its own, which trains with the trainer and scores what it exported.

A run that takes too long is told to stop, saves, and goes on when the same command is called again; on a machine without its
folder it begins anew. A run that raises an error has failed: it is not tried again unless that is asked for.
"""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np

from ring_hilbert.bench.quality import documents
from ring_hilbert.bench.quality.outcome import Outcome, Run
from ring_hilbert.bench.quality.table import Table
from ring_hilbert.bench.quality.task import Task
from ring_hilbert.training.config import ParallelConfig, RunConfig
from ring_hilbert.training.loop import pretrain
from ring_hilbert.training.metrics import METRICS_FILE, read_metrics
from ring_hilbert.training.score import Scorer
from ring_hilbert.training.world import open_world

Row = dict[str, Any]
PATIENCE = 60.0  # seconds to save in, for a run that was told to stop
MEASURED = ("value", "units", "by_power", "held_out_loss", "curve", "steps", "tokens", "seconds", "note")
WARM = 2  # steps that compile; they count as long as the median one


@dataclass
class Active:
    """A process, what it runs, and until when it may."""

    run: Run
    process: Any
    connection: Connection
    row: Row
    started: float
    told: bool = False
    slot: int = 0


@dataclass
class Runner:
    """Runs what an outcome wants, so many at a time.

    Args:
        table: the declaration.
        folder: where data and runs are.
        data: the folder and digest of every task's documents.
        read: the outcome of all rows there are by now.
        devices: a value of CUDA_VISIBLE_DEVICES for each process at a time; None leaves it as it is, "" is the CPU.
        seconds: start nothing that could not be over by then.
    """

    table: Table
    folder: Path
    data: dict[str, tuple[Path, str]]
    read: Callable[[], Outcome]
    devices: list[str | None]
    seconds: float = math.inf
    say: Callable[[str], None] = field(default=lambda text: print(text, flush=True))

    def __post_init__(self) -> None:
        # A fork of a process that knows CUDA cannot use it; on the CPU a clean server saves every run the imports.
        method = "forkserver" if self.devices[0] == "" else "spawn"
        self._context = multiprocessing.get_context(method)
        if method == "forkserver":
            self._context.set_forkserver_preload([__name__])
        self._begun = time.monotonic()
        self._active: list[Active] = []

    def rows(self) -> Iterator[Row]:
        """A row when a run starts, and one when it ends; over when nothing is left, or could be over in time.

        Of runs that are under way when this process is told to leave there is no second row; they save and leave, too.
        """
        before = signal.signal(signal.SIGTERM, _leave)
        try:
            tried, left = set[Run](), list[tuple[Run, float]]()
            changed = True  # rows are read, and gates judged, only when a run has ended
            while True:
                if changed:
                    known = self.read()
                    wanted = [run for task in self.data for run in known.wanted(task)]
                    left, changed = [(run, self._expected(run, known)) for run in wanted], False
                for run, expected in left:
                    late = time.monotonic() - self._begun + expected > self.seconds
                    if run not in tried and len(self._active) < len(self.devices) and not late:
                        tried.add(run)
                        yield self._start(run)
                if not self._active:
                    return
                for row in self._ended():
                    changed = True
                    yield row
        finally:
            for active in self._active:  # this process is told to leave, or an error ends it: they save and leave
                active.process.terminate()
            for active in self._active:
                active.process.join(PATIENCE)
                active.process.kill()
            signal.signal(signal.SIGTERM, before)

    def _expected(self, run: Run, known: Outcome) -> float:
        """Seconds that it takes at most, by those of its arm that are over."""
        most = max(map(self.devices.count, self.devices))
        found = [
            float(row["seconds"]) * max(1, most / int(row["sharing"]))
            for other, row in known.last.items()
            if other[:2] == run[:2] and row["seconds"]
        ]
        return min(self.table.limit_seconds, 1.5 * max(found) + 60) if found else self.table.limit_seconds

    def _start(self, run: Run) -> Row:
        declared, (data, content) = self.table.declared(run.task, run.arm), self.data[run.task]
        folder = self.folder / "runs" / f"{run.task}-{run.arm}-{run.rate:g}-{run.seed}-{declared}-{content}"
        folder.mkdir(parents=True, exist_ok=True)
        config = self.table.config(run.task, run.arm, run.rate, run.seed, data, folder)
        used = {active.slot for active in self._active}
        slot = next(number for number in range(len(self.devices)) if number not in used)
        mine, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(  # type: ignore[attr-defined]
            target=execute, args=(config, self.table.tasks[run.task], data, folder, self.devices[slot], theirs)
        )
        process.start()
        theirs.close()
        row = {
            **run._asdict(), "metric": self.table.tasks[run.task].metric, "status": "started", **dict.fromkeys(MEASURED),
            "attention_flops": self.table.flops[run.task, run.arm], "declared": declared, "data": content,
            "table": self.table.digest, "sharing": self.devices.count(self.devices[slot]),
        }  # fmt: skip
        self._active.append(Active(run, process, mine, row, time.monotonic(), slot=slot))
        self.say(
            f"started: {run.task}, {run.arm}, rate {run.rate:g}, seed {run.seed}; its output: {folder / 'output.txt'}"
        )
        return dict(row)

    def _ended(self) -> Iterator[Row]:
        """Of the processes that are over, after a while."""
        wait([active.process.sentinel for active in self._active], timeout=1.0)
        for active in list(self._active):
            took = time.monotonic() - active.started
            late = max(took - self.table.limit_seconds, time.monotonic() - self._begun - self.seconds)
            if late > 0 and not active.told:
                active.told = True
                active.process.terminate()
            if late > PATIENCE:
                active.process.kill()
            found, over = None, not active.process.is_alive()
            if active.connection.poll():
                over = True
                with contextlib.suppress(EOFError):  # it died
                    found = active.connection.recv()
            if not over:
                continue
            active.process.join()
            self._active.remove(active)
            if found is None:
                code = active.process.exitcode
                how = "took too long and could not save" if active.told else f"its process ended with status {code}"
                found = {"status": "aborted" if active.told or code < 0 else "failed", "note": how}
            row = active.row | {"seconds": f"{took:.1f}"} | found
            self.say(
                f"{row['status']} after {took:.0f} s: {', '.join(map(str, active.run))}: {row['value'] or row['note']}"
            )
            yield row


def _leave(number: int, _frame: object) -> None:
    sys.exit(128 + number)


def execute(
    config: RunConfig, task: Task, data: Path, folder: Path, devices: str | None, connection: Connection
) -> None:
    """The process of a run: sends what its row lacks."""
    if devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices
    with (folder / "output.txt").open("a") as output:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        try:
            found = measured(config, task, data)
        except Exception as error:
            traceback.print_exc()
            found = {"status": "failed", "note": f"{type(error).__name__}: {error}".replace("\n", " ")[:300]}
    connection.send(found)
    if found["status"] == "done":
        shutil.rmtree(config.checkpoint.dir, ignore_errors=True)


def measured(config: RunConfig, task: Task, data: Path) -> Row:
    """Train, score, and say what came of it."""
    began = time.monotonic()
    summary = pretrain(config)
    if summary.model is None:
        return {"status": "aborted", "note": f"told to stop after step {summary.progress.step}; it goes on from there"}
    with open_world(ParallelConfig()) as world, contextlib.redirect_stdout(sys.stderr):
        found = documents.scores(task, Scorer(summary.model, world), data)
    value = float(np.mean(list(found.units.values())))
    if not math.isfinite(value):
        return {"status": "failed", "note": f"the {task.metric} is {value}"}
    lines = read_metrics(Path(config.log.dir) / METRICS_FILE)
    return {
        "status": "done", "value": f"{value:.6f}", "units": json.dumps({k: round(x, 6) for k, x in found.units.items()}),
        "by_power": json.dumps({k: round(x, 6) for k, x in found.by_power.items()}),
        "held_out_loss": f"{summary.eval_loss:.6f}", "curve": json.dumps(curve(lines, task)), "steps": summary.progress.step,
        "tokens": summary.progress.tokens, "seconds": f"{time.monotonic() - began:.1f}",
    }  # fmt: skip


def curve(lines: list[dict[str, Any]], task: Task) -> list[tuple[float, float]]:
    """Seconds of training, and the held-out loss from `from_position` on, at every evaluation."""
    times = [line["seconds"] for line in lines if line["kind"] == "train"]
    times[:WARM] = [float(np.median(times[WARM:] or times))] * len(times[:WARM])
    found = []
    for line in lines:
        if line["kind"] == "eval":
            first = [2**k for k in range(task.seq_len.bit_length()) if task.from_position <= 2**k]
            counted = {n: min(2 * n, task.seq_len) - n for n in first if f"loss_at_{n}" in line}
            loss = sum(line[f"loss_at_{n}"] * count for n, count in counted.items()) / sum(counted.values())
            found.append((round(sum(times[: line["step"]]), 3), round(loss, 6)))
    return found
