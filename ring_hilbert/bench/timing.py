# SPDX-License-Identifier: Apache-2.0
"""Seconds and peak bytes of a call, on the CPU and on CUDA devices."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], object]


class Times(NamedTuple):
    """Median, smallest and largest of repeated measurements, in milliseconds."""

    median: float
    least: float
    most: float


def seconds(call: Call, device: torch.device) -> float:
    """Duration of one call: by stream events on CUDA devices, by the clock elsewhere."""
    if device.type != "cuda":
        start = time.perf_counter()
        result = call()
        elapsed = time.perf_counter() - start
        del result  # freed outside the measured time
        return elapsed
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    with torch.cuda.device(device):
        begin.record()
        call()
        end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def interleaved(
    calls: Mapping[str, Call], repeats: int, device: torch.device, tick: Callable[[str], object], pause: float = 0.0
) -> dict[str, Times]:
    """Time every call `repeats` times, in rounds, so that a slow period of the machine affects all of them.

    Args:
        calls: to time, already warmed up.
        repeats: rounds.
        device: where the calls run.
        tick: called with the name before each measurement.
        pause: seconds of rest before each measurement.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            tick(name)
            time.sleep(pause)
            taken[name].append(1e3 * seconds(call, device))
    return {name: Times(statistics.median(ms), min(ms), max(ms)) for name, ms in taken.items()}


def peak_bytes(call: Call, device: torch.device) -> int:
    """The peak of PyTorch's allocator during `call` beyond what it held before.

    CUDA: `max_memory_allocated`. CPU: the running sum of allocations and releases in a profiler trace: repeatable to the
    byte, including scratch buffers inside kernels, but not memory that libraries take from the system themselves or that
    malloc wastes. With `MALLOC_MMAP_THRESHOLD_=65536`, which keeps glibc from fragmenting, it equals the peak resident
    memory of a process within a few per cent, or exceeds it where pages are reserved and never written.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports to stderr when it starts and stops
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        result = call()
    del result
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        most = max(most, held)
    return most
