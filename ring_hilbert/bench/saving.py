# SPDX-License-Identifier: Apache-2.0
"""What checkpoints cost a run: how much longer the steps affected by a save are than the others.

Steps of the trainer's own engine on random tokens, one sequence each, alone or under torchrun with all ranks in one sequence. A
save affects the step after which it starts, and those until it is published. Steps are timed by the wall clock, including saves.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ring_hilbert.bench.training import CONFIG, RandomSequences, one_sequence
from ring_hilbert.integrations.transformers_config import order_of
from ring_hilbert.training.batches import Batches
from ring_hilbert.training.checkpoint import Checkpoints, Progress
from ring_hilbert.training.config import RunConfig
from ring_hilbert.training.engine import make_engine
from ring_hilbert.training.model import model_config
from ring_hilbert.training.step import accumulate
from ring_hilbert.training.stragglers import collected_once
from ring_hilbert.training.world import open_world

WARM_UP = 3


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags of `bench saving`."""
    parser.add_argument("--config", default=CONFIG, metavar="FILE", help=f"the YAML file of a run; default: {CONFIG}")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="replaces values of the file")
    parser.add_argument("--length", type=int, default=131072, metavar="S", help="tokens of a sequence; default: 131072")
    parser.add_argument("--every", type=int, default=8, metavar="N", help="steps between saves; default: 8")
    parser.add_argument("--saves", type=int, default=2, metavar="N", help="default: 2")
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="on the disk to write to; default: the system's for temporary files"
    )


def rows(chosen: argparse.Namespace, device: torch.device, group: dist.ProcessGroup | None) -> Iterator[dict[str, Any]]:
    """One record, from rank 0."""
    ranks = 1 if group is None else dist.get_world_size(group)
    with tempfile.TemporaryDirectory(dir=chosen.folder) as name:
        names = [name]
        if group is not None:
            dist.broadcast_object_list(names, src=0)
        places = [f"checkpoint.dir={names[0]}/checkpoints", f"checkpoint.every={chosen.every}", "checkpoint.keep=1"]
        config = one_sequence(chosen.config, chosen.length, ranks, [*places, *chosen.set])
        steps, spans, size = _measure(config, device, chosen.every, chosen.saves)
        if group is not None:
            dist.barrier()
    touched = [any(first <= step <= last for first, last in spans) for step in range(len(steps))]
    others = [seconds for seconds, hit in zip(steps, touched, strict=True) if not hit]
    median = statistics.median(others or steps)
    sums = [sum(steps[first : last + 1]) - median * (last + 1 - first) for first, last in spans]
    if group is None or dist.get_rank(group) == 0:
        yield {
            "config": Path(chosen.config).stem, "settings": " ".join(chosen.set), "ranks": ranks, "tokens": chosen.length,
            "asynchronous": config.checkpoint.asynchronous, "gigabytes": f"{size / 1e9:.2f}", "median_step": f"{median:.3f}",
            "untouched_steps": len(others), "touched_steps": " ".join(str(b - a + 1) for a, b in spans),
            "seconds_per_save": " ".join(f"{seconds:.3f}" for seconds in sums), "largest": f"{max(sums):.3f}",
            "steps": " ".join(f"{seconds:.3f}" for seconds in steps),
        }  # fmt: skip


def _measure(
    config: RunConfig, device: torch.device, every: int, saves: int
) -> tuple[list[float], list[tuple[int, int]], int]:
    """Seconds of every step; the first and last step that each save affects; bytes of one save."""
    hf_config = model_config(config)
    data = RandomSequences(config, hf_config.vocab_size, 1)
    steps: list[float] = []
    begun: list[int] = []
    published: list[int] = []
    with (
        open_world(config.parallel) as world,
        closing(Checkpoints(config, world, {})) as checkpoints,
        closing(make_engine(config, hf_config, world)) as engine,
        collected_once() as settle,
    ):
        batches = Batches(data, config, order_of(hf_config), world)
        engine.prepare_to_save()
        for number in range(WARM_UP + every * (saves + 1)):
            start = time.perf_counter()
            accumulate(engine, batches.of(number, number + 1), world)
            batches.read_ahead(number + 1, number + 2)
            engine.step(config.optim.lr)
            due = number >= WARM_UP and (number - WARM_UP + 1) % every == 0 and len(begun) < saves
            if due:
                published += [len(steps)] * (len(begun) - len(published))  # a save waits for the previous one
                checkpoints.save(engine, Progress(number + 1))
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds = world.gather(time.perf_counter() - start, checkpoints.under_way)
            if number == 0:
                settle()
            if number < WARM_UP:
                continue
            steps.append(seconds[:, 0].max().item())
            if due:
                begun.append(len(steps) - 1)
            if len(published) < len(begun) and not seconds[:, 1].any():
                published.append(len(steps) - 1)
        checkpoints.wait()
        if len(published) < len(begun):
            published.append(len(steps) - 1)
        return steps, list(zip(begun, published, strict=True)), engine.bytes_to_save()


def report(records: list[dict[str, Any]], _chosen: argparse.Namespace) -> None:
    """A line per record."""
    for r in records:
        print(
            f"{r['ranks']} ranks, {r['gigabytes']} GB, asynchronous {r['asynchronous']}: median step {r['median_step']} s; the "
            f"{r['touched_steps']} steps that saves touched took {r['seconds_per_save']} s more"
        )
