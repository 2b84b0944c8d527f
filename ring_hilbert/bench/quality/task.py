# SPDX-License-Identifier: Apache-2.0
"""The declaration of a task: what is learned and how it is measured, the arms, and what is compared."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from ring_hilbert.training.config import AttentionConfig, Section


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
