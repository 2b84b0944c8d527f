# SPDX-License-Identifier: Apache-2.0
"""How much of the communication time is hidden behind attention, on an artificially slow link.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m ring_hilbert.cli bench overlap --plot trace.png

A delay is inserted below the process group: a rank's messages arrive one after the other, each no earlier than its bytes would
have over a link of a chosen rate. The rate is such that an exchange takes `--load` of the time of the local visits, and a hop of
the ring that share of a hop's visits. Communication time counts as hidden unless the rank waits for the rows (or for a late
rank); records are of the rank that hides least.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import ring_hilbert as rh
from ring_hilbert.parallel import execution

Event = tuple[str, float, float]  # what, from, to (seconds, by the clock shared by all ranks of a host)
LOCAL, REMOTE, WAIT, TRAVEL = "local", "remote", "wait", "rows travel"
EXCHANGED = rh.DilatedPattern((1024, 4096, None), (1, 2, 4))
DENSE = rh.DilatedPattern((None,), (1,))


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags of `bench overlap`."""
    parser.add_argument("--local-length", type=int, default=4096, metavar="S", help="rows of a rank; default 4096")
    parser.add_argument("--heads", type=int, default=4, metavar="H", help="default 4")
    parser.add_argument("--head-dim", type=int, default=64, metavar="D", help="default 64")
    parser.add_argument(
        "--load", type=float, default=0.8, metavar="X", help="time that rows travel / time to hide it; default 0.8"
    )
    parser.add_argument("--repeats", type=int, default=7, help="rounds that are timed; medians are kept; default 7")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a trace of all ranks: .png or .svg")


class SlowLink:
    """A link over which rows arrive at no more than `rate` bytes per second; records its events and the operator's.

    `events`: what the rank computed, waited for and received, while `recording`.
    """

    def __init__(self) -> None:
        self.rate, self.free_at = float("inf"), 0.0
        self.events: list[Event] = []

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Patch the operator's collectives and its profiler ranges."""
        real = dist.all_to_all_single, dist.batch_isend_irecv, execution.span
        link = self

        def together(buffer: torch.Tensor, *arguments: Any, **options: Any) -> _Delayed:
            return _Delayed([real[0](buffer, *arguments, **options)], link._arrival(buffer.nbytes))

        def apart(messages: list[dist.P2POp]) -> list[_Delayed]:
            size = sum(message.tensor.nbytes for message in messages if message.op is dist.irecv)
            return [_Delayed(real[1](messages), link._arrival(size))]

        @contextmanager
        def recorded(name: str) -> Iterator[None]:
            began = time.perf_counter()
            yield
            kind = next(kind for kind in (LOCAL, REMOTE, WAIT) if kind in name)
            link.events.append((kind, began, time.perf_counter()))

        dist.all_to_all_single, dist.batch_isend_irecv = together, apart
        execution.span = recorded  # type: ignore[assignment]
        try:
            yield
        finally:
            dist.all_to_all_single, dist.batch_isend_irecv, execution.span = real  # type: ignore[assignment]

    def _arrival(self, size: int) -> float:
        began = max(time.perf_counter(), self.free_at)
        self.free_at = began + size / self.rate
        if size:
            self.events.append((TRAVEL, began, self.free_at))
        return self.free_at

    def seconds(self, kind: str) -> list[float]:
        """The duration of every event of a kind."""
        return [stop - start for what, start, stop in self.events if what == kind]


class _Delayed:
    """Works that are done once all have completed and the time `due` has come."""

    def __init__(self, works: list[Any], due: float) -> None:
        self.works, self.due = works, due

    def wait(self) -> None:
        for work in self.works:
            work.wait()
        time.sleep(max(0.0, self.due - time.perf_counter()))


def rows(chosen: argparse.Namespace, device: torch.device, group: dist.ProcessGroup | None) -> Iterator[dict[str, Any]]:
    """A record per strategy and pass, on rank 0.

    Raises:
        ValueError: for one process, or devices whose transfers cannot be delayed from here.
    """
    if group is None or device.type != "cpu":
        raise ValueError("bench overlap runs on CPU ranks: torchrun --nproc-per-node 2 ... bench overlap --device cpu")
    chosen.traces = {}
    for strategy, pattern, causal, layout in (
        ("exchange", EXCHANGED, False, "contiguous"),
        ("ring", DENSE, True, "zigzag"),
    ):
        shape = (1, chosen.local_length, chosen.heads, chosen.head_dim)
        q, k, v, dout = (torch.randn(shape) for _ in range(4))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        options = {"causal": causal, "layout": layout, "strategy": strategy}
        prepared = rh.prepare(chosen.local_length, group=group, **options)
        out = rh.dilated_attention(q, k, v, pattern, prepared=prepared)

        def forward(leaves: Any = leaves, pattern: Any = pattern, prepared: Any = prepared) -> None:
            q, k, v = leaves
            with torch.no_grad():
                rh.dilated_attention(q, k, v, pattern, prepared=prepared)

        def backward(out: Any = out, leaves: Any = leaves, dout: Any = dout) -> None:
            torch.autograd.grad(out, leaves, dout, retain_graph=True)

        for pass_, step in (("forward", forward), ("backward", backward)):
            measured, trace = _measure(step, strategy, chosen, group)
            everybody: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(everybody, (measured, trace), group=group)
            chosen.traces[strategy, pass_] = [events for _, events in everybody]
            if dist.get_rank(group) == 0:
                least = min((found for found, _ in everybody), key=lambda found: found["hidden"])
                yield {
                    "ranks": dist.get_world_size(group), "strategy": strategy, "pass": pass_,
                    "local_length": chosen.local_length, "heads": chosen.heads, "head_dim": chosen.head_dim,
                } | {name: f"{value:.4g}" for name, value in least.items()}  # fmt: skip


def _measure(
    step: Callable[[], None], strategy: str, chosen: argparse.Namespace, group: dist.ProcessGroup
) -> tuple[dict[str, float], list[Event]]:
    link = SlowLink()

    def timed(rate: float) -> float:
        dist.barrier(group=group)
        link.rate, link.free_at, link.events = rate, 0.0, []
        began = time.perf_counter()
        step()
        return time.perf_counter() - began

    with link.installed():
        timed(1e12)
        timed(1e12)
        received = [seconds * 1e12 for seconds in link.seconds(TRAVEL)]
        if strategy == "exchange":
            rate = sum(received) / (chosen.load * sum(link.seconds(LOCAL)))
        else:  # a hop brings K and V, and in backward returns gradients
            hops = len(link.seconds(REMOTE))
            rate = sum(received) / (chosen.load * hops * min(link.seconds(REMOTE)))
        rates: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(rates, rate, group=group)
        times: dict[float, list[float]] = {1e12: [], max(rates): []}
        waits = []
        for _ in range(chosen.repeats):
            for speed, found in times.items():
                found.append(timed(speed))
            waits.append(sum(link.seconds(WAIT)))
        travelled, waited = sum(link.seconds(TRAVEL)), statistics.median(waits)
        longest = max(link.seconds(TRAVEL))
        fast, slow = (statistics.median(found) for found in times.values())
    return {
        "travel_ms": 1e3 * travelled, "longest_message_ms": 1e3 * longest, "local_ms": 1e3 * sum(link.seconds(LOCAL)),
        "remote_ms": 1e3 * sum(link.seconds(REMOTE)), "waited_ms": 1e3 * waited, "ms_without_delay": 1e3 * fast,
        "ms": 1e3 * slow, "hidden": 1 - waited / travelled,
    }, link.events  # fmt: skip


def report(records: list[dict[str, Any]], chosen: argparse.Namespace) -> None:
    """Print a line per record, and draw the plot if requested."""
    for r in records:
        print(
            f"{r['strategy']:9} {r['pass']:9} rows travel {r['travel_ms']} ms, the pass takes {r['ms']} ms, without delay "
            f"{r['ms_without_delay']} ms: {float(r['hidden']):.1%} hidden"
        )
    if chosen.plot is not None:
        draw(chosen.plot, chosen.traces)
        print(f"drawn: {chosen.plot}")


def draw(path: Path, traces: dict[tuple[str, str], list[list[Event]]]) -> None:
    """A panel per strategy and pass: for every rank a lane with its activity, and below it what arrives."""
    from ring_hilbert.bench.picture import check_path, figure_of, save

    check_path(path)
    colours = {LOCAL: "C0", REMOTE: "C2", WAIT: "C3", TRAVEL: "0.6"}
    figure, panels = figure_of(len(traces), height=3.6)
    for axes, ((strategy, pass_), ranks) in zip(panels, traces.items(), strict=True):
        zero = min(start for events in ranks for _, start, _ in events)
        for rank, events in enumerate(ranks):
            for kind, start, stop in events:
                lane = rank + (0.3 if kind == TRAVEL else -0.1)
                height = 0.25 if kind == TRAVEL else 0.5
                axes.barh(
                    lane,
                    1e3 * (stop - start),
                    height,
                    left=1e3 * (start - zero),
                    color=colours[kind],
                    edgecolor="white",
                )
        axes.set(title=f"{strategy}, {pass_}", xlabel="ms", yticks=range(len(ranks)), ylim=(len(ranks) - 0.4, -0.5))
    panels[0].set_ylabel("rank")
    from matplotlib.patches import Patch

    panels[0].legend(handles=[Patch(color=colour, label=kind) for kind, colour in colours.items()], fontsize=7)
    save(figure, path)
