# SPDX-License-Identifier: Apache-2.0
"""What the rows of a CSV say of a table: which runs are over, which rate is best, whether a gate is passed, who is better."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ring_hilbert.bench.quality.table import Table
from ring_hilbert.bench.quality.task import Gate

DRAWS = 10_000  # of the bootstrap
LEVEL = 0.05


class Run(NamedTuple):
    """What one process trains."""

    task: str
    arm: str
    rate: float
    seed: int


class Verdict(NamedTuple):
    """How much better the first arm of a comparison is: the mean, its 95 % interval, p, and p after Holm."""

    mean: float
    low: float
    high: float
    p: float
    adjusted: float
    seeds: int
    units: int

    def words(self, smallest: float) -> str:
        """What may be said of it."""
        if self.adjusted < LEVEL and self.low > 0 and self.mean >= smallest:
            return "better"
        if self.adjusted < LEVEL and self.high < 0:
            return "worse"
        if -smallest < self.low and self.high < smallest:
            return "no difference that matters"
        return "undecided"


@dataclass(frozen=True)
class Outcome:
    """The rows that belong to a table and its data.

    Args:
        table: the declaration.
        rows: of the CSV, in their order.
        data: the digest of every task's data, where it is known; else that of its newest row counts. Others are other experiments.
        again: runs that failed are to be tried again.
    """

    table: Table
    rows: list[Mapping[str, str]]
    data: Mapping[str, str]
    again: bool = False

    @cached_property
    def mine(self) -> list[tuple[Run, Mapping[str, str]]]:
        """The rows of this very declaration and of the same data."""
        digests = {names: self.table.declared(*names) for names in self.table.attention}
        rows = [row for row in self.rows if digests.get((row["task"], row["arm"])) == row["declared"]]
        data = {row["task"]: row["data"] for row in rows} | dict(self.data)
        return [
            (Run(row["task"], row["arm"], float(row["rate"]), int(row["seed"])), row)
            for row in rows
            if data[row["task"]] == row["data"]
        ]

    @cached_property
    def last(self) -> dict[Run, Mapping[str, str]]:
        """The newest row of every run."""
        return dict(self.mine)

    def status(self, run: Run) -> str | None:
        """started, done, failed or aborted; None if it was never started."""
        row = self.last.get(run)
        return None if row is None else row["status"]

    def over(self, run: Run) -> bool:
        """Whether it need not be run: it is done, or has failed and is not to be tried again."""
        return self.status(run) in (("done",) if self.again else ("done", "failed"))

    def value(self, run: Run) -> float | None:
        """The primary metric of a run that is done."""
        row = self.last.get(run)
        return float(row["value"]) if row is not None and row["status"] == "done" else None

    def units(self, run: Run) -> dict[str, float]:
        """The same by held-out unit."""
        return json.loads(self.last[run]["units"])

    def sign(self, task: str) -> int:
        """1 if more is better, -1 if less is."""
        return 1 if self.table.tasks[task].metric == "accuracy" else -1

    def best_rate(self, task: str, arm: str) -> float | None:
        """The best of all rates for the first seed that its family has all of; None before, or if none came to an end."""
        own = self.table.tasks[task]
        if len(self.table.rates) == 1:
            return self.table.rates[0]
        for seed in [*([] if own.gate is None else own.gate.seeds[:1]), *own.explore[:1]]:
            runs = [Run(task, own.arms[arm].rates_of or arm, rate, seed) for rate in self.table.rates]
            if all(self.over(run) for run in runs):
                values = {run.rate: self.value(run) for run in runs}
                found = {rate: value for rate, value in values.items() if value is not None}
                return max(found, key=lambda rate: self.sign(task) * found[rate]) if found else None
        return None

    def at_edge(self, rate: float) -> bool:
        """Whether a better rate may lie beyond those that were tried."""
        return len(self.table.rates) > 1 and rate in (self.table.rates[0], self.table.rates[-1])

    def wanted(self, task: str) -> list[Run]:
        """What is to run next; a stage begins when the one before is over, other seeds when a rate is best."""
        own, first = self.table.tasks[task], list[tuple[list[str], list[int], bool]]()
        if own.gate is not None:
            first.append(([*own.gate.far, own.gate.near], own.gate.seeds, True))
        for number, (arms, seeds, sweep) in enumerate(
            [*first, (list(own.arms), own.explore, True), (own.confirmed, own.confirm, False)]
        ):
            families = [arm for arm in arms if own.arms[arm].rates_of is None] if sweep else []
            swept = [Run(task, arm, rate, seed) for seed in seeds[:1] for arm in families for rate in self.table.rates]
            left = [run for run in swept if not self.over(run)]
            if not left:
                best = {arm: self.best_rate(task, arm) for arm in arms}
                fixed = [Run(task, arm, rate, seed) for seed in seeds for arm, rate in best.items() if rate is not None]
                left = [run for run in fixed if not self.over(run)]
            if left:
                return left
            if number == 0 and own.gate is not None and not self.gate(task)[0]:
                return []
        return []

    def gate(self, task: str) -> tuple[bool | None, str]:
        """Whether the task can tell, None before that is known; and why."""
        own = self.table.tasks[task]
        gate = own.gate
        if gate is None:
            return True, "it decides nothing about far keys"
        compared = [(far, self._verdicts(task, [(far, gate.near)], gate.seeds)) for far in gate.far]
        found = {far: verdicts[0] for far, verdicts in compared if verdicts[0] is not None}
        if len(found) < len(gate.far):
            return (
                None,
                f"{len(gate.far) - len(found)} of {len(gate.far)} comparisons with {gate.near} are not there yet",
            )
        smallest = getattr(self.table.smallest, own.metric)
        texts = [f"{far} is better than {gate.near} by {_said(verdict)}" for far, verdict in found.items()]
        passed = any(verdict.low > 0 and verdict.mean >= smallest for verdict in found.values())
        if gate.at_least is not None:
            reached = max(self._mean(task, far, gate) for far in gate.far)
            passed &= reached >= gate.at_least
            texts.append(f"the best reaches {reached:.3f} of {gate.at_least}")
        return passed, "; ".join(texts)

    def verdicts(self, task: str) -> list[Verdict | None]:
        """Of the declared comparisons, on the fresh seeds; None where a run is missing."""
        own = self.table.tasks[task]
        return self._verdicts(task, [(pair.better, pair.than) for pair in own.comparisons], own.confirm)

    def by_power(self, run: Run) -> dict[int, float]:
        """The primary metric by power of two of position or distance."""
        return {int(power): value for power, value in json.loads(self.last[run]["by_power"]).items()}

    def sharing(self, run: Run) -> int:
        """How many runs shared its device at most, in all the rows in which it went on."""
        return max(int(row["sharing"]) for other, row in self.mine if other == run)

    def curve(self, run: Run) -> np.ndarray:
        """Held-out loss against measured seconds of training: [2, evaluations]."""
        return np.array(json.loads(self.last[run]["curve"]), float).T

    def _mean(self, task: str, arm: str, gate: Gate) -> float:
        rate = self.best_rate(task, arm)
        assert rate is not None  # it was compared
        values = [self.value(Run(task, arm, rate, seed)) for seed in gate.seeds]
        return float(np.mean(np.array(values, float)))

    def _verdicts(self, task: str, pairs: list[tuple[str, str]], seeds: list[int]) -> list[Verdict | None]:
        tables = [self._differences(task, better, than, seeds) for better, than in pairs]
        raw = [None if table is None else bootstrap(table) for table in tables]
        adjusted = iter(holm([found[3] for found in raw if found is not None]))
        return [
            None if found is None or table is None else Verdict(*found, next(adjusted), *table.shape)
            for found, table in zip(raw, tables, strict=True)
        ]

    def _differences(self, task: str, better: str, than: str, seeds: list[int]) -> np.ndarray | None:
        """How much better the one is, by seed and unit: [seeds, units]; None unless all runs are done."""
        rates = [self.best_rate(task, arm) for arm in (better, than)]
        if None in rates:
            return None
        runs = [[Run(task, arm, rate, seed) for seed in seeds] for arm, rate in zip((better, than), rates, strict=True)]  # type: ignore[arg-type]
        if any(self.value(run) is None for each in runs for run in each):
            return None
        units = sorted(self.units(runs[0][0]))
        first, second = (np.array([[self.units(run)[unit] for unit in units] for run in each]) for each in runs)
        return self.sign(task) * (first - second)


def bootstrap(differences: np.ndarray) -> tuple[float, float, float, float]:
    """Mean of paired differences `[seeds, units]`, its 95 % interval and two-sided p; seeds and units are both drawn anew."""
    random, (seeds, units) = np.random.default_rng(0), differences.shape
    how_often = [random.multinomial(n, np.full(n, 1 / n), DRAWS) / n for n in (seeds, units)]  # each is drawn
    drawn = ((how_often[0] @ differences) * how_often[1]).sum(1)
    low, high = np.quantile(drawn, (LEVEL / 2, 1 - LEVEL / 2))
    tail = min((drawn <= 0).sum(), (drawn >= 0).sum())
    return float(differences.mean()), float(low), float(high), min(1.0, float(2 * (tail + 1) / (DRAWS + 1)))


def holm(values: Iterable[float]) -> list[float]:
    """The p of several comparisons, adjusted so that a false one among them all is as rare as said (Holm, 1979)."""
    p = np.asarray(list(values))
    order = np.argsort(p, kind="stable")
    steps = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    adjusted = np.empty_like(p)
    adjusted[order] = steps
    return adjusted.tolist()


def read_rows(path: Path) -> list[Mapping[str, str]]:
    """The rows of a CSV of runs, none if there is no file.

    Raises:
        ValueError: it has no column `sharing`, which older versions did not write.
    """
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        if rows.fieldnames and "sharing" not in rows.fieldnames:
            raise ValueError(
                f"{path} has no column 'sharing', how many runs shared a device: add it, or name another file"
            )
        return list(rows)


def _said(verdict: Verdict) -> str:
    return f"{verdict.mean:.4f} [{verdict.low:.4f}, {verdict.high:.4f}]"


def equal_seconds(outcome: Outcome, runs: Iterable[Run]) -> dict[Run, float]:
    """The held-out loss of every run at the time when the first of them was over; between evaluations, on a line.

    Only of runs that had a device to themselves: what others take depends on what they share it with.
    """
    curves = {run: outcome.curve(run) for run in runs if outcome.sharing(run) == 1}
    end = min((curve[0, -1] for curve in curves.values()), default=0.0)
    return {run: float(np.interp(end, *curve)) for run, curve in curves.items()}


def rows_by_status(outcome: Outcome) -> dict[str, Any]:
    """How many runs are done, failed, aborted or were lost, and the hours of a device that those which ended took."""
    last = outcome.last.values()
    counts = {
        status: sum(row["status"] == status for row in last) for status in ("done", "failed", "aborted", "started")
    }
    hours = sum(float(row["seconds"] or 0) / int(row["sharing"]) for _, row in outcome.mine) / 3600
    return {**counts, "hours": hours}
