# SPDX-License-Identifier: Apache-2.0
"""What `bench quality` prints of a table's rows: gates, rates, costs, comparisons with intervals, and what follows from them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ring_hilbert.bench.quality.outcome import Outcome, Run, equal_seconds, rows_by_status


def lines(outcome: Outcome) -> Iterator[str]:
    """The page."""
    counts = rows_by_status(outcome)
    others = len(outcome.rows) - len(outcome.mine)
    yield (
        f"runs: {counts['done']} done, {counts['failed']} failed, {counts['aborted']} aborted, {counts['started']} under way or "
        f"lost; {counts['hours']:.2f} hours; {others} rows are of other declarations or data"
    )
    before = sum(row["table"] != outcome.table.digest for _, row in outcome.mine)
    if before:
        yield (
            f"{before} of these rows were written under another version of the table, which may have said otherwise of gates, "
            "comparisons or the smallest difference"
        )
    for task in outcome.table.tasks:
        yield from ("", *_task(outcome, task))


def _task(outcome: Outcome, task: str) -> Iterator[str]:
    own = outcome.table.tasks[task]
    far = f" from position {own.from_position:,} on" if own.from_position > 1 else ""
    yield f"task {task}: {own.metric}{far}, sequences of {own.seq_len:,}; {'less' if outcome.sign(task) < 0 else 'more'} is better"
    passed, why = outcome.gate(task)
    known = {None: "not known yet", True: "passed", False: "NOT PASSED"}[passed]
    yield f"gate: {'none' if own.gate is None else known}: {why}"
    if passed is False:
        yield "The task is unable to tell: it decides nothing, and its arms are not run."
    yield from _rates(outcome, task)
    if own.comparisons:
        yield from ("", *_comparisons(outcome, task, bool(passed)))


def _rates(outcome: Outcome, task: str) -> Iterator[str]:
    """Every arm by rate, for the seed that has them all, the best marked; exploratory."""
    own, rates = outcome.table.tasks[task], outcome.table.rates
    seeds = [*([] if own.gate is None else own.gate.seeds[:1]), *own.explore[:1]]
    values = {
        (arm, rate): next((x for seed in seeds if (x := outcome.value(Run(task, arm, rate, seed))) is not None), None)
        for arm in own.arms
        for rate in rates
    }
    if not any(value is not None for value in values.values()):
        return
    best = {arm: outcome.best_rate(task, arm) for arm in own.arms}
    ended = [Run(task, arm, rate, seed) for arm, rate in best.items() if rate for seed in seeds]
    seconds = equal_seconds(outcome, [run for run in dict.fromkeys(ended) if outcome.value(run) is not None])
    yield f"one seed, exploratory; the rate taken is marked *, ! where it is the lowest or highest of those tried{'':>4}at equal"
    yield f"{'arm':28}" + "".join(f"{f'{rate:g}':>12}" for rate in rates) + f"{'attention TFLOP':>18}{'seconds':>12}"
    for arm, declared in own.arms.items():
        cells = ""
        for rate in rates:
            value, mark = values[arm, rate], ""
            if rate == best[arm]:
                mark = "*!" if outcome.at_edge(rate) else "*"
            cells += f"{'-' if value is None else f'{value:.4f}':>10}{mark:2}"
        mine = [loss for run, loss in seconds.items() if run.arm == arm]
        yield (
            f"{arm + (' (reference)' if declared.reference else ''):28}{cells}"
            f"{outcome.table.flops[task, arm] / 1e12:>18.4g}{f'{mine[0]:.4f}' if mine else '-':>12}"
        )


def _comparisons(outcome: Outcome, task: str, passed: bool) -> Iterator[str]:
    """The declared ones, on fresh seeds."""
    own = outcome.table.tasks[task]
    smallest = getattr(outcome.table.smallest, own.metric)
    yield f"{len(own.confirm)} fresh seeds, paired by seed and unit, bootstrap over both; Holm; smallest that counts: {smallest}"
    yield f"{'better':>24} {'than':24}{'by':>10}{'95 % interval':>24}{'p':>9}{'Holm':>9}  verdict"
    for pair, found in zip(own.comparisons, outcome.verdicts(task), strict=True):
        names = f"{pair.better:>24} {pair.than:24}"
        if found is None:
            yield f"{names}  not all runs are there"
            continue
        words = found.words(smallest)
        yield (
            f"{names}{found.mean:>10.4f}{f'[{found.low:.4f}, {found.high:.4f}]':>24}{found.p:>9.4f}{found.adjusted:>9.4f}  {words}"
            f" ({found.seeds} seeds x {found.units} units)"
        )
        shown = {"better": pair.decides, "undecided": "no default changes"} if passed else {}
        follows = shown.get(words, pair.otherwise if passed else "no default changes")
        yield f"{'':25}so: {follows}"


def draw(path: Path, outcome: Outcome) -> None:
    """For each task the comparisons with their intervals, and the metric of every arm by position or distance."""
    from ring_hilbert.bench.picture import check_path, figure_of, save

    check_path(path)
    names = list(outcome.table.tasks)
    figure, panels = figure_of(2 * len(names), height=4.2)
    for number, task in enumerate(names):
        own, (left, right) = outcome.table.tasks[task], panels[2 * number : 2 * number + 2]
        for row, (pair, found) in enumerate(zip(own.comparisons, outcome.verdicts(task), strict=True)):
            if found is not None:
                left.errorbar(
                    found.mean, row, xerr=[[found.mean - found.low], [found.high - found.mean]], fmt="o", color="C0"
                )
            left.text(
                0.02, row + 0.15, f"{pair.better} over {pair.than}", transform=left.get_yaxis_transform(), fontsize=7
            )
        smallest = getattr(outcome.table.smallest, own.metric)
        left.axvspan(-smallest, smallest, alpha=0.15, color="grey")
        left.set(title=f"{task}: better by ({own.metric})", yticks=[], ylim=(-0.5, max(1, len(own.comparisons))))
        for arm in own.arms:
            rate, seeds = outcome.best_rate(task, arm), dict.fromkeys([*own.confirm, *own.explore])
            runs = [Run(task, arm, rate, seed) for seed in seeds] if rate else []
            curves = [outcome.by_power(run) for run in runs if outcome.value(run) is not None]
            if curves:
                powers = sorted(curves[0])
                right.semilogx(powers, [np.mean([each[p] for each in curves]) for p in powers], label=arm, base=2)
        right.set(title=f"{task}: {own.metric}", xlabel="distance" if own.metric == "accuracy" else "position")
        if right.lines:
            right.legend(fontsize=6)
    save(figure, path)
