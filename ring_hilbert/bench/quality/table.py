# SPDX-License-Identifier: Apache-2.0
"""What `bench quality` compares, declared in a YAML file before the first run: tasks, metrics, arms, rates, seeds, comparisons."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, ValidationError, model_validator
from yaml import YAMLError

from ring_hilbert.training.config import AttentionConfig, RunConfig, Section
from ring_hilbert.training.config_errors import describe
from ring_hilbert.training.model import model_config
from ring_hilbert.training.speed import attention_flops

FAIR = 0.05  # how far the attention FLOPs of an arm that is widened may be from those that it is widened to


class Arm(Section):
    """A way to attend.

    `widened_to`: another arm, whose attention FLOPs this one is to have: its segment lengths and shifts grow by one factor.
    `reference`: at a cost of its own, so that it is shown but never ranked. `rates_of`: the arm of the same family that is tried at
    all learning rates; this one takes what is best for that. Default: itself.
    """

    attention: AttentionConfig
    widened_to: str | None = None
    rates_of: str | None = None
    reference: bool = False


class Gate(Section):
    """What must be seen before a task may decide anything: that one of the arms `far` beats `near` by `Table.smallest`.

    `at_least`: of the metric, by the best of `far`.
    """

    far: list[str] = Field(min_length=1)
    near: str
    at_least: float | None = None
    seeds: list[int] = Field(min_length=2)


class Comparison(Section):
    """That `better` is better `than` another arm: what follows if it is, and what `otherwise`, if it is shown not to be."""

    better: str
    than: str
    decides: str
    otherwise: str = "no default changes"


class Task(Section):
    """Something to learn: common to all kinds.

    `metric`, the primary one, is the mean over held-out units (packages, documents, pictures) of the loss in nats per token from
    `from_position` on, or of the share of answers that are the model's first choice. `run`: what differs from `Table.run`. `gate`:
    None where nothing about far keys is decided. `explore`: seeds of all arms, the first with all rates. `confirm`: fresh seeds
    of the arms in `comparisons`, at most six, each at the rate that was best.
    """

    metric: Literal["loss", "accuracy"]
    seq_len: int = Field(ge=16)
    from_position: int = Field(default=1, ge=1)
    seed: int = 0  # of the data
    run: dict[str, Any] = Field(default_factory=dict)
    gate: Gate | None = None
    arms: dict[str, Arm] = Field(min_length=1)
    explore: list[int]
    confirm: list[int] = Field(default_factory=list)
    comparisons: list[Comparison] = Field(default_factory=list)

    @model_validator(mode="after")
    def _names(self) -> Task:
        named = [name for arm in self.arms.values() for name in (arm.widened_to, arm.rates_of) if name]
        named += [] if self.gate is None else [*self.gate.far, self.gate.near]
        for pair in self.comparisons:
            for name in (pair.better, pair.than):
                if name in self.arms and self.arms[name].reference:
                    raise ValueError(f"comparisons: {name} is a reference at a cost of its own and cannot be ranked")
                named.append(name)
        unknown = sorted(set(named) - set(self.arms))
        if unknown:
            raise ValueError(f"there are no arms {unknown}; the arms are {', '.join(self.arms)}")
        for name, arm in self.arms.items():
            if arm.widened_to and self.arms[arm.widened_to].widened_to:
                raise ValueError(f"arms.{name}: {arm.widened_to} is widened itself; name the arm that it is widened to")
            if arm.rates_of and self.arms[arm.rates_of].rates_of:
                raise ValueError(f"arms.{name}: {arm.rates_of} is not tried at all rates itself; name the arm that is")
        if len(self.confirmed) > 6:
            raise ValueError(
                f"comparisons are of {len(self.confirmed)} arms, {self.confirmed}; six at most are confirmed"
            )
        if self.comparisons and len(self.confirm) < 2:
            raise ValueError("comparisons need at least two seeds in `confirm`")
        seen = set(self.explore) | set([] if self.gate is None else self.gate.seeds)
        if seen & set(self.confirm):
            raise ValueError(f"confirm needs fresh seeds, but {sorted(seen & set(self.confirm))} are used before")
        if self.from_position & (self.from_position - 1) or self.from_position >= self.seq_len:
            raise ValueError(f"from_position {self.from_position} must be a power of two below seq_len {self.seq_len}")
        return self

    @property
    def confirmed(self) -> list[str]:
        """The arms that are compared."""
        return list(dict.fromkeys(name for pair in self.comparisons for name in (pair.better, pair.than)))


class Text(Task):
    """Sources of installed Python packages, each joined to one long document, by bytes.

    `root`: the folder they are installed in; default this interpreter's. `held_out`: packages that are not trained on, `sequences`
    of each scored. `bytes_each`, `bytes`: at most so many of a package, and in all.
    """

    kind: Literal["text"]
    root: str | None = None
    held_out: list[str] = Field(min_length=1)
    sequences: int = Field(default=2, ge=1)
    bytes_each: int = 20_000_000
    bytes: int = 100_000_000


class Retrieval(Task):
    """Documents of which a share hold `pairs` of a key and a value, and further on the key again, with the value to be told.

    The distance is log-uniform between `nearest` and `farthest`. `filler`: what is around them, text of packages, or blanks.
    `faithful`: the share of answers that are the value that was told; of 0 nothing can be learned. `values`: how many there are.
    `documents`: to train on; `held_out`: to score, all with pairs.
    """

    kind: Literal["retrieval"]
    root: str | None = None
    documents: int = Field(ge=1)
    held_out: int = Field(ge=1)
    share: float = Field(default=0.5, gt=0, le=1)
    pairs: int = Field(ge=1)
    key_length: int = Field(default=4, ge=1)
    values: int = Field(default=16, ge=2, le=26)
    nearest: int = Field(ge=1)
    farthest: int = Field(ge=2)
    filler: Literal["text", "blank"] = "text"
    faithful: float = Field(default=1.0, ge=0, le=1)

    @model_validator(mode="after")
    def _fits(self) -> Retrieval:
        taken = 2 * self.pairs * (self.key_length + 4)
        if not self.nearest <= self.farthest <= self.seq_len - 2 * (self.key_length + 4) or 2 * taken > self.seq_len:
            raise ValueError(
                f"distances {self.nearest} to {self.farthest} and {taken} bytes of pairs must fit into half of sequences of "
                f"{self.seq_len}"
            )
        if self.nearest < self.key_length + 4:
            raise ValueError(f"nearest {self.nearest} must be at least the {self.key_length + 4} bytes of a pair")
        return self


class Pictures(Task):
    """Pictures of `height` x `width` grey pixels that code draws, row by row, one to a sequence: leaves that hide each other.

    `documents`: to train on; `held_out`: to score.
    """

    kind: Literal["pictures"]
    height: int = Field(ge=4)
    width: int = Field(ge=4)
    documents: int = Field(ge=1)
    held_out: int = Field(ge=1)

    @model_validator(mode="after")
    def _cells(self) -> Pictures:
        if self.height * self.width != self.seq_len:
            raise ValueError(f"{self.height} x {self.width} pixels are not the {self.seq_len} tokens of seq_len")
        return self


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
        """The configuration of one run, that reads what `tasks.write` put into `data`.

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
                "seq_len": declared.seq_len, "eval": held_out,
            },
            "optim": {"lr": rate}, "train": {"seed": seed},
            "checkpoint": {"dir": str(folder / "checkpoints"), "every": 10**9},
            "log": {"dir": str(folder / "logs"), "tensorboard": False, "breakdown_every": None},
        }  # fmt: skip
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
