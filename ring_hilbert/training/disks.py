# SPDX-License-Identifier: Apache-2.0
"""Work that fills a folder, done once for all ranks that share a disk."""

from __future__ import annotations

import shutil
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from torch.distributed.distributed_c10d import _get_default_store

from ring_hilbert.training.world import World

TELL = 10.0  # seconds between two lines about the wait


def once_per_disk(world: World, folder: Path, function: Callable[[], object]) -> None:
    """Call `function`, which fills `folder`, on one of the ranks that share it, while the others wait, however long it takes.

    Rank 0 reports for whom it waits and their progress. An error is raised on all ranks, as in `World.together`.
    """
    if world.watchdog is None:
        function()
        return
    store, leaders = _get_default_store(), _leaders(world, folder)
    done = world.from_main(lambda: f"ring_hilbert/done {uuid.uuid4().hex}")
    with world.together():
        try:
            if world.rank in leaders:
                function()
        finally:
            store.set(f"{done}/{world.rank}", "")
        began, tell = time.monotonic(), TELL
        # Not in a collective, which has a timeout; the watchdog checks that the others are alive.
        while waiting := [leader for leader in leaders if not store.check([f"{done}/{leader}"])]:
            if world.is_main and time.monotonic() - began > tell:
                tell += TELL
                for leader in waiting[:4]:
                    report = world.watchdog.heard[leader].report
                    print(f"waiting for {report}: {report.whereabouts} {report.progress}", file=sys.stderr, flush=True)  # noqa: T201
            time.sleep(0.1)


def _leaders(world: World, folder: Path) -> list[int]:
    """The first rank of those that see each other's files in `folder`."""
    first = {report.machine: report.rank for report in reversed(world.reports)}
    name = world.from_main(lambda: f".ranks {uuid.uuid4().hex}")
    marks = folder / name  # a new folder, of which no host has a cached listing
    with world.together():
        if world.rank in first.values():
            marks.mkdir(parents=True, exist_ok=True)
            (marks / str(world.rank)).touch()
    with world.together():
        seen = min(int(mark.name) for mark in marks.iterdir())
    leaders = sorted({int(rank) for rank in world.gather(seen)[:, 0]})
    if world.rank in leaders:
        shutil.rmtree(marks, ignore_errors=True)
    return leaders
