# SPDX-License-Identifier: Apache-2.0
"""A rank that is stopped, killed or stuck in the middle of training: every other rank names it, in time, and ends."""

from __future__ import annotations

import io
import json
import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tqdm import tqdm

from ring_hilbert.training import watchdog as watchdog_module
from ring_hilbert.training.config import ParallelConfig, RunConfig
from ring_hilbert.training.loop import pretrain
from ring_hilbert.training.watchdog import STATUS, RankLost
from ring_hilbert.training.world import open_world
from tests.harness.deepspeed_rank import zero
from tests.harness.launched import Launched
from tests.harness.ranks import run_ranks
from tests.harness.tiny_run import tiny_config, write_texts

WORLD, LIMIT = 4, 8.0  # ranks, and seconds of timeouts.step
PLACE = r"in (?P<collective>[^,;]+), (?P<part>(forward|backward|optimizer|reading a batch|sum of the loss|a step)[^,]*), step \d+"


def _rank(config: RunConfig, slow: int | None) -> None:
    """`slow`: the rank for which every linear layer takes 5 ms more."""
    if os.environ["RANK"] == str(slow):
        forward = torch.nn.Linear.forward
        torch.nn.Linear.forward = lambda *arguments: (time.sleep(0.005), forward(*arguments))[1]  # type: ignore[method-assign]
    try:
        pretrain(config)
    except RankLost as lost:
        print(f"ring-hilbert: {lost}; {lost.__cause__}", file=sys.stderr, flush=True)
        os._exit(1)


class Run(Launched):
    """Ranks in training."""

    def __init__(self, folder: Path, slow: int | None = None, **changes: Any) -> None:
        write_texts(folder)
        options = {
            "parallel__sp": 2,
            "parallel__dp_shard": WORLD // 2,
            "timeouts__step": LIMIT,
            "optim__decay_steps": 100,
        }
        steps = {"train__steps": 100000, "checkpoint__every": 100000, "data__eval": None}
        self.config = tiny_config(folder, **options, **steps, **changes)
        self.metrics = folder / "logs" / "metrics.jsonl"
        super().__init__(folder, WORLD, _rank, self.config, slow)

    def __enter__(self) -> Run:
        super().__enter__()
        self.wait(lambda: self.metrics.exists() and self.metrics.read_text().count("\n") >= 3, 120)
        return self

    def wait(self, what: Callable[[], bool], seconds: float) -> float:
        """How long it took."""
        began = time.monotonic()
        while not what():
            assert time.monotonic() - began < seconds, "\n".join(self.told(rank)[-2000:] for rank in range(WORLD))
            time.sleep(0.05)
        return time.monotonic() - began

    def strike(self, seed: int, number: signal.Signals) -> int:
        """Send a signal to some rank at some moment, not before it has reported on its steps; returns which."""
        dice = random.Random(seed)
        victim = dice.randrange(WORLD)
        time.sleep(watchdog_module.EVERY + dice.uniform(0, 1))
        os.kill(self.processes[victim].pid or 0, number)
        return victim


def check_stop(folder: Path, seed: int, **changes: Any) -> list[str]:
    """Stop a rank; the collectives in which the others waited."""
    with Run(folder, **changes) as run:
        victim = run.strike(seed, signal.SIGSTOP)
        survivors = [rank for rank in range(WORLD) if rank != victim]
        named = f"for rank {victim} ("
        # A rank may still do a step's work before it waits; it reports after half of its limit.
        run.wait(lambda: all(named in run.told(rank) for rank in survivors), LIMIT)
        run.wait(lambda: not any(run.processes[rank].is_alive() for rank in survivors), LIMIT + 8)
        waited = []
        for rank in survivors:
            assert run.processes[rank].exitcode == STATUS
            lines = [line for line in run.told(rank).splitlines() if named in line]
            assert len(lines) == 2 and ("the run ends" in lines[1] or "has ended the run" in lines[1]), lines
            found = re.search(
                rf"rank {rank} \(.* {PLACE}, {re.escape(named)}.*is stopped since .* when it was in .*, step \d+",
                lines[0],
            )
            assert found, lines
            waited.append(f"{found['collective']}, {found['part']}")
            assert "watchdog" in (Path(run.config.log.dir) / "hangs" / f"stacks_{rank}.txt").read_text()
        return waited


def test_a_stopped_rank_is_named(tmp_path: Path) -> None:
    check_stop(tmp_path, 0)


def fail_cut_off(rank: int, world_size: int, parallel: ParallelConfig) -> float:
    """Seconds until the other rank's own exception is out, though the store answers nothing."""
    began, link, kept = time.monotonic(), threading.Event(), watchdog_module.SILENT
    watchdog_module.SILENT = 0.5
    try:
        with open_world(parallel) as world:
            if rank == 1:
                assert world.watchdog is not None
                world.watchdog._store = SimpleNamespace(set=lambda *_: link.wait(60), multi_get=lambda _: [])
                time.sleep(2 * watchdog_module.EVERY)  # until a report is on its way
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    finally:
        link.set()
        watchdog_module.SILENT = kept
    return time.monotonic() - began


def test_an_error_is_not_held_back_where_nobody_can_be_told(tmp_path: Path) -> None:
    assert run_ranks(fail_cut_off, 2, tiny_config(tmp_path, parallel__sp=2).parallel)[1] < 20


def hear_failure(rank: int, world_size: int, parallel: ParallelConfig) -> str:
    """What rank 0 hears of rank 1."""
    with suppress(FileNotFoundError), open_world(parallel) as world:
        if rank == 1:
            raise FileNotFoundError("/data/igloo/text")  # no error of Gloo
        assert world.watchdog is not None
        deadline = time.monotonic() + 20
        while not world.watchdog.heard[1].report.failure and time.monotonic() < deadline:
            time.sleep(0.1)
        return world.watchdog.heard[1].report.failure
    return ""


def test_an_error_of_its_own_is_told(tmp_path: Path) -> None:
    found = run_ranks(hear_failure, 2, tiny_config(tmp_path, parallel__sp=2).parallel)
    assert found == ["FileNotFoundError: /data/igloo/text", ""]


def test_a_bar_that_is_just_being_made_does_not_end_the_watchdog() -> None:
    half = tqdm.__new__(tqdm)  # as another thread sees it
    assert watchdog_module._bars() == ""
    half.disable = True
    del half
    with tqdm(total=3, desc="tokenising", file=io.StringIO()):
        assert "tokenising" in watchdog_module._bars()


@pytest.mark.full
@pytest.mark.parametrize("seed", range(1, 11))
def test_a_stopped_rank_is_named_at_any_time(tmp_path: Path, seed: int) -> None:
    check_stop(tmp_path, seed)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(1, 11))
def test_a_stopped_rank_is_named_with_deepspeed(tmp_path: Path, seed: int) -> None:
    check_stop(tmp_path, seed, **zero({"stage": seed % 4}))


@pytest.mark.full
@pytest.mark.parametrize("seed", range(1, 4))
def test_a_killed_rank_is_named(tmp_path: Path, seed: int) -> None:
    with Run(tmp_path) as run:
        victim = run.strike(seed, signal.SIGKILL)
        survivors = [rank for rank in range(WORLD) if rank != victim]
        run.wait(lambda: not any(run.processes[rank].is_alive() for rank in survivors), LIMIT + 8)
        for rank in survivors:
            found = re.search(
                rf"rank {rank} \(.*, for rank (\d+) \(.* (which has ended since|which failed)", run.told(rank)
            )
            assert found and int(found[1]) == victim, run.told(rank)


@pytest.mark.full
def test_a_slow_rank_is_named(tmp_path: Path) -> None:
    """Though all ranks take as long for a step."""
    with Run(tmp_path, slow=2, log__straggler_steps=3) as run:
        run.wait(lambda: "straggler: rank 2 (" in run.told(0), 60)
        last = json.loads(run.metrics.read_text().splitlines()[-1])
        assert (last["slowest_rank"], last["stragglers"]) == (2, 1) and last["slowest_ratio"] > 1.5


@pytest.mark.full
def test_a_run_that_is_suspended_goes_on(tmp_path: Path) -> None:
    """All ranks are stopped for longer than the limit, as a scheduler may do, and continued: none has waited."""
    with Run(tmp_path) as run:
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for process in run.processes:
                os.kill(process.pid or 0, number)
            time.sleep(LIMIT + 2 if number == signal.SIGSTOP else 0)
        done = run.metrics.read_text().count("\n")
        run.wait(lambda: run.metrics.read_text().count("\n") > done + 3, 60)
        assert all(process.is_alive() for process in run.processes)
