# SPDX-License-Identifier: Apache-2.0
"""Training of a language model: memory against the plan, tokens per second and MFU, as sequences get longer.

Steps of the trainer's own engine on random tokens, for the model and pattern of a run's configuration: one sequence per step, of
each requested length, alone or under torchrun with all ranks in one sequence. Memory is the peak of PyTorch's allocator while the
engine is made and two warm-up steps run; the steps after those are timed, and one more is profiled for its time breakdown. Values
chosen for "auto" are in the row (`taken`). A length that does not fit gives a row without figures.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ring_hilbert.bench.timing import peak_bytes
from ring_hilbert.bench.timing import seconds as timed
from ring_hilbert.integrations.transformers_config import order_of
from ring_hilbert.training.batches import Batches
from ring_hilbert.training.breakdown import PARTS
from ring_hilbert.training.config import RunConfig, load_config
from ring_hilbert.training.engine import Engine, make_engine
from ring_hilbert.training.fitting import Fitted, planned, settled
from ring_hilbert.training.model import build_skeleton, model_config
from ring_hilbert.training.readback import read_later
from ring_hilbert.training.speed import Watch, multiplying_parameters, peak_flops, step_flops
from ring_hilbert.training.step import accumulate
from ring_hilbert.training.world import World, open_world

CONFIG = "configs/llama_1b_1m.yaml"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags of `bench training`."""
    parser.add_argument("--config", default=CONFIG, metavar="FILE", help=f"the YAML file of a run; default: {CONFIG}")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="replaces values of the file")
    parser.add_argument(
        "--lengths", type=int, nargs="+", required=True, metavar="S", help="tokens of a sequence, ascending"
    )
    parser.add_argument(
        "--vocab", type=int, nargs="+", metavar="V", help="sizes of the vocabulary; default: the file's"
    )
    parser.add_argument(
        "--steps", type=int, default=3, metavar="N", help="that are timed, after two that warm up; default: 3"
    )
    parser.add_argument(
        "--documents",
        type=int,
        nargs="+",
        default=[1],
        metavar="N",
        help="in a sequence, other ones in each; default: 1",
    )
    parser.add_argument(
        "--padding", type=float, default=0.0, metavar="SHARE", help="of a sequence, at its end; default: 0"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw memory against tokens per rank: .png or .svg")


def rows(chosen: argparse.Namespace, device: torch.device, group: dist.ProcessGroup | None) -> Iterator[dict[str, Any]]:
    """One record per vocabulary, length and number of documents, from rank 0."""
    ranks = 1 if group is None else dist.get_world_size(group)
    for vocab in chosen.vocab or [None]:
        for length in chosen.lengths:
            config = _config(chosen, length, vocab, ranks)
            with open_world(config.parallel) as world:
                with planned(config, world) as fitted:
                    fit = world.from_main(fitted)
                for documents in chosen.documents:
                    record = _measured(chosen, config, fit, documents, world, device)
                    if world.is_main:
                        yield record


def _measured(
    chosen: argparse.Namespace,
    config: RunConfig,
    fit: Fitted | None,
    documents: int,
    world: World,
    device: torch.device,
) -> dict[str, Any]:
    tokens, vocab = config.data.seq_len, model_config(config).vocab_size
    record: dict[str, Any] = {
        "config": Path(chosen.config).stem, "settings": " ".join(chosen.set), "ranks": world.size, "tokens": tokens,
        "tokens_per_rank": -(-tokens // world.size), "documents": documents, "padding": f"{chosen.padding:g}", "vocab": vocab,
        "parameters": None, "planned_gib": None, "peak_gib": None, "seconds": None, "tokens_per_second": None, "mfu": None,
        "loss": None, "taken": None, "device_gib": None, "first_seconds": None, "second_seconds": None,
        **dict.fromkeys(f"{part}_seconds" for part in PARTS),
    }  # fmt: skip
    if fit is not None:
        config = fit.settle(config)
        record |= {
            "parameters": fit.plan.model_parameters,
            "planned_gib": f"{fit.plan.allocated / 2**30:.3f}",
            "taken": " ".join(f"train.{key}={value}" for key, value in fit.train.items()),
        }
    if fit is None or not fit.refusal:
        data = RandomSequences(config, vocab, documents, chosen.padding)
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            record |= _one(settled(config), world, device, chosen.steps, data)
    gc.collect()
    torch.cuda.empty_cache()
    return record


def _config(chosen: argparse.Namespace, length: int, vocab: int | None, ranks: int) -> RunConfig:
    sized = [] if vocab is None else [f"model.config.vocab_size={vocab}"]
    return one_sequence(chosen.config, length, ranks, ["log.memory_plan=true", *sized, *chosen.set])


def one_sequence(path: str, length: int, ranks: int, overrides: list[str]) -> RunConfig:
    """A file's configuration for steps of one sequence over all ranks."""
    sizes = [f"data.seq_len={length}", f"train.global_batch_tokens={length}"]
    sizes += [f"parallel.sp={ranks}", "parallel.dp_shard=1", "parallel.dp_replicate=1", "train.micro_batch=1"]
    return load_config(path, [*sizes, *overrides])


def _one(config: RunConfig, world: World, device: torch.device, steps: int, data: RandomSequences) -> dict[str, Any]:
    hf_config = model_config(config)
    engine: Engine | None = None
    loss, warm = 0.0, list[float]()

    def step(number: int) -> None:
        nonlocal loss
        assert engine is not None
        first, stop, after = (config.sequences_per_step * (number + n) for n in range(3))
        found = read_later(accumulate(engine, batches.of(first, stop), world))
        batches.read_ahead(stop, after)
        engine.step(config.optim.lr)
        loss, _ = found()

    def warm_up() -> None:
        nonlocal engine
        engine = make_engine(config, hf_config, world)
        warm.extend(timed(lambda number=number: step(number), device) for number in range(2))

    batches = Batches(data, config, order_of(hf_config), world)
    peak = world.gather(peak_bytes(warm_up, device)).max().item()
    seconds = statistics.median(timed(lambda number=number: step(number), device) for number in range(2, 2 + steps))
    watch = Watch(config.model_copy(update={"log": config.log.model_copy(update={"breakdown_every": 1})}), world)
    with watch.step(1):
        step(2 + steps)
    return {
        "peak_gib": f"{peak / 2**30:.3f}", "seconds": f"{seconds:.3f}",
        "tokens_per_second": f"{config.data.seq_len / seconds:.0f}", "mfu": _mfu(config, hf_config, world, seconds),
        "loss": f"{loss:.4f}", "device_gib": _used(device), "first_seconds": f"{warm[0]:.3f}",
        "second_seconds": f"{warm[1]:.3f}", **{f"{part}_seconds": f"{x:.3f}" for part, x in watch.breakdown.items()},
    }  # fmt: skip


def _used(device: torch.device) -> str | None:
    """GiB of the device in use now, including contexts and the allocator's cache."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return f"{(total - free) / 2**30:.3f}"


def _mfu(config: RunConfig, hf_config: Any, world: World, seconds: float) -> str | None:
    peak = peak_flops(config, world)
    if peak is None:
        return None
    return f"{step_flops(config, hf_config, multiplying_parameters(build_skeleton(config, hf_config))) / seconds / peak:.3f}"


class RandomSequences:
    """Numbered sequences of random tokens, each of `documents` documents that end at random places, then a share of padding."""

    def __init__(self, config: RunConfig, vocab: int, documents: int, padding: float = 0.0) -> None:
        self.length, self.vocab, self.documents = config.data.seq_len, vocab, documents
        self.filled = self.length - int(padding * self.length)

    def __len__(self) -> int:
        return 2**20

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng(number)
        ids, ends = (
            random.integers(3, self.vocab, self.length),
            np.sort(random.integers(1, self.filled, self.documents - 1)),
        )
        document_ids = np.searchsorted(ends, np.arange(self.length), side="right")
        document_ids[self.filled :] = -1
        return {"input_ids": ids, "document_ids": document_ids}


def report(records: list[dict[str, Any]], _chosen: argparse.Namespace) -> None:
    """Print the table."""
    print(
        f"{'tokens per rank':>16}{'documents':>11}{'vocab':>9}{'planned GiB':>13}{'peak GiB':>10}{'tokens/s':>11}{'MFU':>8}"
    )
    for r in records:
        print(
            f"{r['tokens_per_rank']:>16,}{r['documents']:>11,}{r['vocab']:>9,}{r['planned_gib']!s:>13}{r['peak_gib'] or 'no':>10}"
            f"{r['tokens_per_second'] or '':>11}{r['mfu'] or '':>8}"
        )
        if r["seconds"]:
            parts = ", ".join(f"{part.replace('_', ' ')} {r[f'{part}_seconds']}" for part in PARTS)
            steps = f"first step {r['first_seconds']}, second {r['second_seconds']}, median {r['seconds']}"
            print(f"{'':>16} seconds: {steps}; {parts}")


def draw(path: Path, records: list[dict[str, Any]]) -> None:
    """Peak memory and its plan against the tokens of a rank, a colour per vocabulary."""
    from ring_hilbert.bench.picture import figure_of, save

    figure, panels = figure_of(1, height=4.2)
    axes = panels[0]
    kinds = dict.fromkeys((r["vocab"], r["settings"]) for r in records)
    several = len({settings for _, settings in kinds}) > 1
    for number, (vocab, settings) in enumerate(kinds):
        mine = [r for r in records if (r["vocab"], r["settings"]) == (vocab, settings)]
        for key, style, name in (("planned_gib", "--", "planned"), ("peak_gib", "o-", "measured")):
            points = sorted((int(r["tokens_per_rank"]), float(r[key])) for r in mine if r[key])
            label = f"{name}, vocabulary {int(vocab):,}" + (f", {settings or 'as it is'}" if several else "")
            axes.plot(*zip(*points, strict=True), style, color=f"C{number}", label=label)
    axes.set(
        title="memory of a rank in training", xlabel="tokens per rank", ylabel="GiB", xlim=(0, None), ylim=(0, None)
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save(figure, path)
