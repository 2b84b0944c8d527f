# SPDX-License-Identifier: Apache-2.0
"""What a run reports: a progress bar, one JSON line per step and evaluation, TensorBoard, Weights & Biases."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import resource
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.utils.tensorboard.writer import SummaryWriter
from tqdm import tqdm

from ring_hilbert.training.config import RunConfig
from ring_hilbert.training.world import World

METRICS_FILE = "metrics.jsonl"


class Metrics:
    """Writes on rank 0, does nothing elsewhere. A context manager that opens its files on entry, in log.dir, which must exist.

    A resumed run continues `metrics.jsonl` after the step from which it resumes, without duplicates; a fresh run moves an
    older file aside.
    """

    def __init__(self, config: RunConfig, world: World, resumed_from: int | None) -> None:
        self.config = config
        self.world = world
        self.resumed_from = resumed_from
        self.path = Path(config.log.dir) / METRICS_FILE
        self._tensorboard: SummaryWriter | None = None
        self._wandb: Any = None
        self._bar: tqdm[Any] | None = None

    def __enter__(self) -> Metrics:
        if self.world.is_main:
            start = self.resumed_from or 0
            self._seen = _continue_file(self.path, self.resumed_from)
            self._file = self.path.open("a", buffering=1)
            if self.config.log.tensorboard:
                self._tensorboard = SummaryWriter(str(self.path.parent), purge_step=start + 1)
            self._wandb = _open_wandb(self.config)
            self._bar = tqdm(
                total=self.config.train.steps,
                initial=start,
                unit="step",
                dynamic_ncols=True,
                mininterval=0.5 if sys.stderr.isatty() else 10,  # seconds between redraws, each a line in a log file
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.world.is_main:
            self.close_bar()
            self._file.close()
            if self._tensorboard is not None:
                self._tensorboard.close()
            if self._wandb is not None:
                self._wandb.finish()

    def write(self, kind: str, step: int, **values: float) -> None:
        """Record `values` of `kind` ("train" or "eval") after `step` steps, once; non-finite values are null in JSON."""
        if not self.world.is_main or (kind, step) in self._seen:
            return
        self._seen.add((kind, step))
        line = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"kind": kind, "step": step, **line}, allow_nan=False) + "\n")
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(f"{kind}/{name}", value, step)
        if self._wandb is not None:
            self._wandb.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def advance(self, loss: float, tokens_per_second: float) -> None:
        """Advance the progress bar by a step."""
        if self._bar is not None:
            memory = f"{peak_memory(self.world.device) / 2**30:.2f} GiB"
            self._bar.set_postfix(
                loss=f"{loss:.4f}", tokens_per_s=f"{tokens_per_second:,.0f}", memory=memory, refresh=False
            )
            self._bar.update()

    def close_bar(self) -> None:
        """Close the progress bar: there are no more steps."""
        if self._bar is not None:
            self._bar.close()

    def say(self, text: str) -> None:
        """Print a line without disturbing the progress bar."""
        if self.world.is_main:
            tqdm.write(text)


def check_log(config: RunConfig) -> None:
    """Check that all that is to be logged to is available.

    Raises:
        ValueError: if Matplotlib, which draws at the end, is not installed, or log.wandb is set and that is not.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            "log: the plots of a run need Matplotlib, which is not installed: pip install 'ring_hilbert[train]'"
        )
    if config.log.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise ValueError("log.wandb: Weights & Biases is not installed; pip install wandb, or log.wandb=null")


def _open_wandb(config: RunConfig) -> Any:
    """The Weights & Biases run, or None if not configured."""
    if config.log.wandb is None:
        return None
    import wandb  # pyright: ignore[reportMissingImports]  # of those who want it

    return wandb.init(
        project=config.log.wandb, dir=config.log.dir, config=config.model_dump(mode="json"), resume="allow"
    )


def peak_memory(device: torch.device) -> int:
    """The peak bytes of this process: of the device's allocator, or resident in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that a crash cut short is left out."""
    lines = path.read_text().splitlines(keepends=True)
    # Lines from earlier versions may hold NaN.
    return [json.loads(line, parse_constant=lambda _: None) for line in lines if line.endswith("\n")]


def _continue_file(path: Path, resumed_from: int | None) -> set[tuple[str, int]]:
    """Truncate `path` at the step resumed from, or move it aside; returns the (kind, step) pairs that it holds."""
    if not path.exists():
        return set()
    if resumed_from is None:
        names = (path.with_name(f"metrics.{number}.jsonl") for number in itertools.count())
        path.rename(next(name for name in names if not name.exists()))
        return set()
    kept = [line for line in read_metrics(path) if line["step"] <= resumed_from]
    shorter = path.with_suffix(".tmp")
    shorter.write_text("".join(json.dumps(line) + "\n" for line in kept))
    shorter.replace(path)
    return {(line["kind"], line["step"]) for line in kept}
