# SPDX-License-Identifier: Apache-2.0
"""A rank that dies or stalls, in prepare, forward or backward: a clean error on every other rank, within the timeout."""

from __future__ import annotations

import datetime
import os
import random
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection, wait
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import ring_hilbert as rh
from tests.harness.ranks import process_context, run_ranks

WORLD, ROWS, TIMEOUT = 3, 512, 5.0  # seconds that the group waits
PATTERN = rh.DilatedPattern((256, None), (1, 4))
PHASES = ("prepare", "forward", "backward")


def _train(rank: int, store: str, phase: str, number: signal.Signals, victim: int, delay: float, report: Connection):
    """Steps without end; in the phase of one of them the victim gets the signal. Reports what ended it, and when."""
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    timeout = datetime.timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", store=dist.FileStore(store, WORLD), rank=rank, world_size=WORLD, timeout=timeout)
    q, k, v = (torch.randn(1, ROWS, heads, 32, requires_grad=True) for heads in (4, 2, 2))
    ways = [("exchange", "contiguous"), ("ring", "zigzag"), ("ulysses", "contiguous")]

    def at(reached: str, step: int) -> None:
        if (rank, reached, step) == (victim, phase, 2):
            threading.Timer(delay, lambda: os.kill(os.getpid(), number)).start()

    try:
        report.send(("began", ""))
        for step in range(100000):
            strategy, layout = ways[step % len(ways)]
            at("prepare", step)
            documents = torch.zeros(ROWS, dtype=torch.int64)
            prepared = rh.prepare(
                ROWS, group=dist.group.WORLD, document_ids=documents, strategy=strategy, layout=layout
            )
            at("forward", step)
            out = rh.dilated_attention(q, k, v, PATTERN, prepared=prepared, name="layer 3")
            at("backward", step)
            out.sum().backward()
            assert torch.isfinite(out).all() and (out != 0).any(), "rows that did not arrive were taken for zeros"
    except BaseException as problem:
        report.send((type(problem).__name__, str(problem)))


def _strike(folder: Path, phase: str, number: signal.Signals, seed: int) -> list[tuple[str, str, float]]:
    """(exception, message, seconds since the strike) of every surviving rank."""
    dice = random.Random(seed)
    victim, delay = dice.randrange(WORLD), dice.uniform(0, 0.04)
    pipes, processes = [], []
    for rank in range(WORLD):
        mine, theirs = process_context().Pipe()
        arguments = (rank, str(folder / "store"), phase, number, victim, delay, theirs)
        processes.append(process_context().Process(target=_train, args=arguments, daemon=True))
        processes[-1].start()
        theirs.close()
        pipes.append(mine)
    try:
        for pipe in pipes:
            assert pipe.poll(60) and pipe.recv() == ("began", "")
        began = time.monotonic()
        running = {pipes[rank]: rank for rank in range(WORLD) if rank != victim}
        ended: list[tuple[str, str, float]] = []
        while running:
            ready = wait(list(running), 4 * TIMEOUT)
            assert ready, f"ranks {sorted(running.values())} hang after {signal.Signals(number).name} in {phase}"
            for pipe in ready:
                running.pop(pipe)
                ended.append((*pipe.recv(), time.monotonic() - began))
        return ended
    finally:
        for process in processes:
            process.kill()
            process.join()


def check_strike(folder: Path, phase: str, number: signal.Signals, seed: int) -> None:
    ended = _strike(folder, phase, number, seed)
    assert len(ended) == WORLD - 1
    for kind, message, seconds in ended:
        assert kind == "RuntimeError", (kind, message)
        assert "rank " in message and ("layer 3" in message or "agreement" in message), message
        assert "did not complete" in message or "did not start" in message or "not all ranks" in message, message
        assert seconds < 2.5 * TIMEOUT, f"{seconds:.1f} s"  # the steps before the strike, and the timeout


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_gone_is_an_error_on_all_others(tmp_path: Path, phase: str, number: signal.Signals):
    check_strike(tmp_path, phase, number, 0)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(1, 21))
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_gone_at_any_time(tmp_path: Path, number: signal.Signals, seed: int):
    check_strike(tmp_path, PHASES[seed % len(PHASES)], number, seed)


def _lost(rank: int, world_size: int) -> str:
    """What `prepare` says of a connection that is lost while documents are gathered."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_gather", _reset)
        with pytest.raises(RuntimeError) as caught:
            rh.prepare(8, group=dist.group.WORLD, document_ids=torch.zeros(1, 8, dtype=torch.int64))
    return str(caught.value)


def _reset(*_: object, **__: object) -> None:
    raise RuntimeError("connection reset by peer")


def test_a_connection_lost_while_documents_are_gathered_is_named():
    for rank, message in enumerate(run_ranks(_lost, 2)):
        assert message == f"rank {rank}: the agreement on document_ids did not complete: connection reset by peer"
