# SPDX-License-Identifier: Apache-2.0
"""The table of `bench quality`, a YAML file from before the first run: the run of every arm, rate and seed of every task."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, ValidationError, model_validator
from yaml import YAMLError

from ring_hilbert.bench.quality.task import Pictures, Retrieval, Text
from ring_hilbert.training.config import AttentionConfig, RunConfig, Section
from ring_hilbert.training.config.errors import describe
from ring_hilbert.training.model import model_config
from ring_hilbert.training.speed import attention_flops

FAIR = 0.05  # how far the attention FLOPs of an arm that is widened may be from those that it is widened to


class Smallest(Section):
    """The smallest difference that changes a default."""

    loss: float = Field(default=0.01, gt=0)
    accuracy: float = Field(default=0.02, gt=0)


class Table(Section):
    """All that is declared.

    `run`: the sections of a run's configuration, without what tasks and arms say. `rates`: learning rates, the same for all.
    `limit_seconds`: after which a run saves and leaves, to go on another time.
    """

    smallest: Smallest = Smallest()
    rates: list[Annotated[float, Field(gt=0)]] = Field(min_length=1)
    limit_seconds: float = Field(default=540, gt=0)
    run: dict[str, Any]
    tasks: dict[str, Annotated[Text | Retrieval | Pictures, Field(discriminator="kind")]] = Field(min_length=1)

    @model_validator(mode="after")
    def _rates(self) -> Table:
        if self.rates != sorted(set(self.rates)):
            raise ValueError(f"rates must be different and ascend, got {self.rates}")
        for name, task in self.tasks.items():
            if len(self.rates) > 1 and not task.explore:
                raise ValueError(f"tasks.{name}.explore needs a seed, for which the {len(self.rates)} rates are tried")
        return self

    def config(
        self, task: str, arm: str, rate: float, seed: int, data: Path = Path("data"), folder: Path = Path("run")
    ) -> RunConfig:
        """The configuration of one run, that reads what `documents.write` put into `data`.

        Raises:
            ValueError: it is not valid; names the arm and the key.
        """
        return self._config(task, self.attention[task, arm], rate, seed, data, folder, arm)

    def _config(
        self, task: str, attention: AttentionConfig, rate: float, seed: int, data: Path, folder: Path, arm: str
    ) -> RunConfig:
        declared = self.tasks[task]
        held_out = {"path": str(data / "held_out" / "*.txt"), "format": "text"}
        raw = _merged(self.run, declared.run)
        own = {
            "attention": attention.model_dump(mode="json"),
            "data": {
                "sources": [{"path": str(data / "train" / "*"), "format": "text"}],
                "seq_len": declared.seq_len,
                "eval": held_out,
            },
            "optim": {"lr": rate},
            "train": {"seed": seed},
            "checkpoint": {"dir": str(folder / "checkpoints"), "every": 10**9},
            "log": {"dir": str(folder / "logs"), "tensorboard": False, "breakdown_every": None},
        }
        for section, key in (
            ("attention", None),
            ("checkpoint", None),
            ("optim", "lr"),
            ("train", "seed"),
            ("data", "seq_len"),
        ):
            if section in raw and (key is None or key in raw[section]):
                raise ValueError(
                    f"task {task}: run has {section}{(key and f'.{key}') or ''}, which is for arms, rates, seeds and tasks to say"
                )
        raw = _merged(raw, own)
        try:
            return RunConfig.model_validate(raw)
        except ValidationError as error:
            raise ValueError(f"task {task}, arm {arm}:\n{describe(error, RunConfig, raw)}") from None

    @cached_property
    def attention(self) -> dict[tuple[str, str], AttentionConfig]:
        """What every arm of every task comes to, widened where that is asked for."""
        return {(task, arm): self._resolved(task, arm) for task, own in self.tasks.items() for arm in own.arms}

    @cached_property
    def flops(self) -> dict[tuple[str, str], float]:
        """The attention FLOPs of a step of every arm of every task, forward and backward, by the plan."""
        return {names: self._flops(names[0], attention, names[1]) for names, attention in self.attention.items()}

    def declared(self, task: str, arm: str) -> str:
        """Of all that decides what a run gives but rate, seed and data: eight hexadecimal digits."""
        own = self.tasks[task]
        said = own.model_dump(mode="json", exclude={"gate", "arms", "explore", "confirm", "comparisons"})
        said |= {"attention": self.attention[task, arm].model_dump(mode="json"), "run": self.run}
        return digest(said)

    @property
    def digest(self) -> str:
        """Of all of it, gates, comparisons and smallest differences included."""
        return digest(self.model_dump(mode="json"))

    def _flops(self, task: str, attention: AttentionConfig, arm: str) -> float:
        config = self._config(task, attention, self.rates[0], 0, Path("data"), Path("run"), arm)
        return attention_flops(config, model_config(config))

    def _resolved(self, task: str, arm: str) -> AttentionConfig:
        own = self.tasks[task].arms[arm]
        if own.widened_to is None:
            return own.attention
        wanted = self._flops(task, self.tasks[task].arms[own.widened_to].attention, own.widened_to)
        unit, most = 32, self.tasks[task].seq_len
        first = min(w for w in own.attention.segment_lengths if w is not None)
        low, high = 1, 2 * unit * most // first  # in units: factors below and above
        while low + 1 < high:
            middle = (low + high) // 2
            below = self._flops(task, _widened(own.attention, middle / unit), arm) <= wanted
            low, high = (middle, high) if below else (low, middle)
        found = [_widened(own.attention, n / unit) for n in (low, high)]
        off = [abs(self._flops(task, attention, arm) / wanted - 1) for attention in found]
        best = min((0, 1), key=lambda n: off[n])
        if off[best] > FAIR:
            raise ValueError(
                f"task {task}, arm {arm}: no width comes within {FAIR:.0%} of the attention FLOPs of {own.widened_to}; the "
                f"nearest, segment_lengths {found[best].segment_lengths}, is off by {off[best]:.0%}"
            )
        return found[best]


def load_table(path: Path, overrides: list[str] | None = None) -> Table:
    """Read a table and check all of it, every arm's run included.

    Args:
        path: a YAML file.
        overrides: `key.sub=value` to be laid over it, which makes another declaration.

    Raises:
        ValueError: it cannot be read or is not valid; names the key.
    """
    try:
        found = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(overrides or []))
        raw = OmegaConf.to_container(found, resolve=True)
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException, ValueError) as error:
        raise ValueError(f"table {path} cannot be read: {error}") from error
    try:
        table = Table.model_validate(raw)
    except ValidationError as error:
        raise ValueError(f"table {path} is not valid:\n{describe(error, Table, raw)}") from None
    for task, arm in table.attention:
        table.config(task, arm, table.rates[0], 0)
    return table


def digest(value: Any) -> str:
    """Eight hexadecimal digits of what JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def _widened(attention: AttentionConfig, factor: float) -> AttentionConfig:
    """All segment lengths and shifts times a factor."""
    layers = {
        number: layer.model_copy(update={"segment_shift": round(layer.segment_shift * factor)})
        for number, layer in attention.layers.items()
        if layer.segment_shift is not None
    }
    return attention.model_copy(
        update={
            "segment_lengths": [None if w is None else max(1, round(w * factor)) for w in attention.segment_lengths],
            "segment_shift": round(attention.segment_shift * factor),
            "layers": attention.layers | layers,
        }
    )


def _merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Mappings in mappings, key by key; else the value of `over`."""
    both = {
        key: _merged(under[key], value)
        for key, value in over.items()
        if isinstance(value, dict) and isinstance(under.get(key), dict)
    }
    return under | over | both
