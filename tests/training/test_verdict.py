# SPDX-License-Identifier: Apache-2.0
"""For whom a rank waits: the sentence that a hang ends in, and where it comes from."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ring_hilbert.training.config import LogConfig
from ring_hilbert.training.stragglers import Stopwatch, Stragglers, collected_once
from ring_hilbert.training.verdict import SILENT, Heard, Report, verdict
from ring_hilbert.training.whereabouts import Call, Whereabouts, collective_of, innermost

ME = Report(0, host="a", machine="here", whereabouts="forward of layer 3, step 7", collective="all_reduce", idle=20)


def heard(rank: int, silence: float = 0.0, **changes: Any) -> Heard:
    report = replace(ME, rank=rank, machine="there", host="b", pid=99)
    return Heard(replace(report, **changes), silence=silence)


def told(*others: Heard, keeper: int | None = None, me: Report = ME) -> str:
    return verdict(me, others, "10.0.0.1:29400", keeper)


def test_a_silent_rank_is_named_with_its_last_place() -> None:
    text = told(heard(1), heard(2, SILENT + 2, whereabouts="backward of layer 1, step 7", collective="reduce_scatter"))
    assert "rank 0 (a, " in text and "20 s" in text and "in all_reduce, forward of layer 3, step 7, for rank 2" in text
    assert "rank 2 (b, pid 99), which has not been heard of since" in text
    assert "when it was in reduce_scatter, backward of layer 1, step 7" in text and "rank 1" not in text


def test_a_failure_is_the_cause_of_other_silences() -> None:
    text = told(heard(1, 9.0), heard(2, 9.0, failure="OutOfMemoryError: 3 GiB"))
    assert text.endswith("for rank 2 (b, pid 99), which failed: OutOfMemoryError: 3 GiB")


def test_ranks_that_leave_are_not_to_blame() -> None:
    text = told(heard(1, 9.0, leaving=True), heard(2, 9.0))
    assert "for rank 2" in text and "rank 1" not in text


def test_nobody_is_heard() -> None:
    """Of a rank the store's silence says that it is gone; of a launcher's store, that this host may be cut off."""
    everyone = [heard(1, 9.0), heard(2, 9.0), heard(3, 9.0)]
    text = told(*everyone, heard(4, 9.0, machine=ME.machine, pid=os.getpid()))
    assert "rank 1 (b, " in text and "cut off from 10.0.0.1:29400" in text
    assert "rank 4" not in text  # it is on this host, and runs
    text = told(*everyone, me=replace(ME, rank=5), keeper=1)
    assert "for rank 1 (b, pid 99)" in text and "rank 2" not in text and "hosts the store at 10.0.0.1:29400" in text


def test_a_rank_that_lives_and_does_not_come() -> None:
    text = told(heard(1, collective=None, whereabouts="reading a batch, step 7", idle=21), heard(2))
    assert "rank 1 (b, pid 99) is in reading a batch, step 7, for 21 s" in text and "rank 2" not in text
    assert told(heard(1), me=replace(ME, collective=None)).endswith("the others wait for it")


def test_states_of_processes_of_this_machine() -> None:
    gone = heard(1, machine="here", pid=2**22 + 1)
    assert gone.absent("here") == ("has ended" if sys.platform == "linux" else "")
    assert gone.absent("elsewhere") == ""


@pytest.mark.full
def test_processes_of_another_container_are_not_looked_for() -> None:
    """It may have this host's network and not its numbers of processes."""
    command = "from ring_hilbert.training.verdict import Report; print(Report(0).machine)"
    inside = subprocess.run(
        ["unshare", "--pid", "--fork", sys.executable, "-c", command], capture_output=True, text=True, check=False
    )
    if inside.returncode:
        pytest.skip(f"namespaces are not permitted here: {inside.stderr}")
    assert inside.stdout.strip() != Report(0).machine


def test_reports_survive_the_store() -> None:
    assert Report.from_json(ME.as_json()) == ME


def test_the_collective_is_the_innermost_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a thread that waits in it, as others see it."""
    arrived = threading.Lock()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_group", arrived.acquire)
    arrived.acquire()

    def wait() -> None:
        with pytest.raises(AttributeError):
            dist.barrier()

    thread = threading.Thread(target=wait)
    thread.start()
    assert thread.ident is not None
    deadline = time.monotonic() + 20
    while (found := innermost(thread.ident)) is None or collective_of(found[:1]) != "barrier":
        assert time.monotonic() < deadline, found
    arrived.release()
    thread.join()
    assert innermost(thread.ident) is None
    found = innermost(threading.get_ident())
    assert found is not None and found[0].name == "innermost" and collective_of(found[:1]) is None


@pytest.mark.slow
def test_a_thread_is_looked_at_while_others_come_and_go() -> None:
    """Threads that Python has not started are made without its lock, which `faulthandler` and the interpreter do not survive."""
    system, main, looks = ctypes.CDLL(None), threading.get_ident(), list[Call]()
    body = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(lambda _: None)
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            found = innermost(main)
            assert found is not None
            looks.append(found[0])

    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look)
        for _ in range(100):
            threads = [ctypes.c_ulong() for _ in range(16)]
            for thread in threads:
                system.pthread_create(ctypes.byref(thread), None, body, None)
            for thread in threads:
                system.pthread_join(thread, None)
        stop.set()
        looking.result()
    assert {call.name for call in looks} >= {"test_a_thread_is_looked_at_while_others_come_and_go"}


def test_whereabouts_follow_layers() -> None:
    """Forward, backward, and again in what backward recomputes."""
    whereabouts, seen = Whereabouts(), []
    layers = torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in range(2)))
    whereabouts.follow(layers)
    for layer in layers:
        layer.register_forward_hook(lambda *_: seen.append(str(whereabouts)))
    whereabouts.step = 4
    whereabouts.enter("forward")
    x = torch.randn(2, 3, requires_grad=True)
    out = layers(x)
    x.register_hook(lambda _: seen.append(str(whereabouts)))
    whereabouts.enter("backward")
    out.sum().backward()
    assert seen == ["forward of layer 0, step 4", "forward of layer 1, step 4", "backward of layer 0, step 4"]


def test_stopwatch_takes_one_linear_per_layer() -> None:
    layers = [torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 64), torch.nn.ReLU()) for _ in range(3)]
    watch = Stopwatch([*layers, torch.nn.ReLU()])
    for layer in layers:
        layer(torch.randn(2, 4))
    assert len(watch._spans) == 3
    assert watch.read() > 0 and watch.read() == 0


def test_garbage_is_looked_for_once_and_again_after_a_run() -> None:
    class Loop:
        def __init__(self) -> None:
            self.me = self

    with suppress(KeyError), collected_once() as settle:
        before = weakref.ref(Loop())
        settle()
        assert gc.get_freeze_count() > 10_000 and before() is None
        inside = weakref.ref(Loop())
        gc.collect()
        assert inside() is None, "what came later is still looked at"
        raise KeyError
    assert not gc.get_freeze_count()


def test_stragglers_are_named_after_steps_in_a_row() -> None:
    stragglers = Stragglers(LogConfig(dir="", straggler_factor=1.5, straggler_steps=3))
    named = []
    for step in range(1, 8):
        slow = 1.4 if step == 3 else 2.0
        metrics, ranks = stragglers.step(torch.tensor([1.0, 1.1, slow, 1.0], dtype=torch.float64))
        assert metrics["slowest_rank"] == 2 and metrics["slowest_ratio"] == pytest.approx(slow)
        assert ("stragglers" in metrics) == (step >= 6)
        named += [(step, rank) for rank in ranks]
    assert named == [(6, 2)]
    assert stragglers.step(torch.zeros(4))[1] == []
