# SPDX-License-Identifier: Apache-2.0
"""`ring-hilbert bench quality` without a run: what is declared, documents, which runs are wanted, statistics, the page."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from ring_hilbert.bench.quality import documents, page
from ring_hilbert.bench.quality.outcome import Outcome, Run, bootstrap, equal_seconds, holm, read_rows
from ring_hilbert.bench.quality.runs import curve
from ring_hilbert.bench.quality.table import FAIR, Table, load_table
from ring_hilbert.training.model import model_config

ROOT = Path(__file__).parents[2]
TABLES = ROOT / "configs" / "quality"
TOY = TABLES / "toy.yaml"


def declared(tmp_path: Path, **changes: Any) -> Path:
    """The toy's file with three rates, a gate and an arm of a family, and other values of its first task."""
    raw = yaml.safe_load(TOY.read_text())
    del raw["tasks"]["nothing"]
    raw["rates"] = [0.001, 0.01, 0.1]
    task = raw["tasks"]["planted"]
    task["arms"]["near_shifted"] = task["arms"]["near"] | {"rates_of": "near"}
    task["explore"] = [1]
    task["gate"] = {"far": ["far"], "near": "near", "seeds": [1, 2], "at_least": 0.9}
    raw["tasks"]["planted"] = task | changes
    path = tmp_path / "table.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_the_tables_are_valid() -> None:
    toy = load_table(TOY)
    planted, nothing = toy.tasks["planted"], toy.tasks["nothing"]
    assert planted.model_copy(update={"faithful": 0.0}) == nothing
    evidence = load_table(TABLES / "evidence.yaml")
    assert len(evidence.tasks["text"].held_out) >= 12 and evidence.tasks["text"].from_position == 8192
    assert evidence.tasks["retrieval"].gate.at_least == 0.9
    assert (evidence.smallest.loss, evidence.smallest.accuracy) == (0.01, 0.02) and evidence.limit_seconds < 540
    once, weighed = (evidence.attention["text", arm] for arm in ("x4_once", "x4_weighed"))
    assert (once.count, weighed.weights) == ("once", weighed.dilation_rates)
    fourth = model_config(evidence.config("text", "x4_every_fourth", 1e-3, 1)).ring_hilbert
    assert [number for number in range(8) if "branches" not in fourth["layers"].get(str(number), {})] == [3, 7]


def test_a_local_arm_is_as_wide_as_costs_the_same() -> None:
    table = load_table(TABLES / "evidence.yaml")
    for task in ("text", "retrieval"):
        assert abs(table.flops[task, "local_shifted_wide"] / table.flops[task, "x4_shifted"] - 1) <= FAIR
        wide = table.attention[task, "local_shifted_wide"]
        assert wide.layers[1].segment_shift == wide.segment_lengths[0] / 2 > 512


def test_an_arm_is_widened_or_refused(tmp_path: Path) -> None:
    table = load_table(TOY)
    arm = {"widened_to": "far", "attention": {"segment_lengths": [8], "dilation_rates": [1], "segment_shift": 4}}
    target = {"attention": {"segment_lengths": [12, 24], "dilation_rates": [1, 2]}}
    path = declared(tmp_path, arms={"near": arm, "far": target}, gate=None, comparisons=[])
    wide = load_table(path)
    found = wide.attention["planted", "near"]
    assert abs(wide.flops["planted", "near"] / wide.flops["planted", "far"] - 1) <= FAIR
    assert found.segment_shift == pytest.approx(found.segment_lengths[0] / 2, abs=1) and found.segment_lengths[0] > 12
    assert table.flops["planted", "far"] > wide.flops["planted", "far"]
    arm["attention"] = {"segment_lengths": [None], "dilation_rates": [1]} | {
        "segment_lengths": [120, None],
        "dilation_rates": [1, 1],
    }
    with pytest.raises(ValueError, match="no width comes within 5% of the attention FLOPs of far; the nearest"):
        load_table(declared(tmp_path, arms={"near": arm, "far": target}, gate=None, comparisons=[]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"comparisons": [{"better": "fra", "than": "near", "decides": "x"}]}, r"no arms \['fra'\]; the arms are far, near"),
        ({"confirm": [1, 11]}, r"confirm needs fresh seeds, but \[1\] are used before"),
        ({"confirm": [11]}, "at least two seeds"),
        ({"explore": []}, "needs a seed, for which the 3 rates are tried"),
        ({"from_position": 3}, "from_position 3 must be a power of two below seq_len 48"),
        ({"farthest": 47}, "distances 20 to 47 and 10 bytes of pairs must fit"),
        ({"metrik": "loss"}, "metrik"),
        ({"run": {"optim": {"lr": 3}}}, "task planted: run has optim.lr, which is for arms, rates, seeds and tasks to say"),
        ({"run": {"train": {"stepz": 3}}}, r"task planted, arm far:\n.*train.stepz: unknown key \(did you mean steps"),
    ],
)  # fmt: skip
def test_declarations_that_cannot_be(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_table(declared(tmp_path, **changes))
    reference = yaml.safe_load(declared(tmp_path).read_text())
    reference["tasks"]["planted"]["arms"]["far"]["reference"] = True
    (tmp_path / "reference.yaml").write_text(yaml.safe_dump(reference))
    with pytest.raises(ValueError, match="far is a reference at a cost of its own and cannot be ranked"):
        load_table(tmp_path / "reference.yaml")


# ---- documents


@pytest.mark.parametrize("faithful", [True, False])
def test_pairs_are_asked_for_where_it_is_said(faithful: bool) -> None:
    """Every answer, at its distance, is the value that was told; or in one of four cases by chance."""
    longer = {"seq_len": 2048, "values": 4, "pairs": 8, "key_length": 4, "farthest": 1600, "faithful": float(faithful)}
    task, random = load_table(TOY).tasks["planted"].model_copy(update=longer), np.random.default_rng(0)
    right, distances = [], []
    for _ in range(60):
        document = np.full(task.seq_len - 1, ord(" "), np.uint8)
        answers = documents._add_pairs(document, task, random)
        text = document.tobytes().decode()
        assert len(re.findall("<[A-Z]{4}=[a-d]>", text)) == len(re.findall(r"<[A-Z]{4}\?[a-d]>", text)) == 8
        for place, distance in answers:
            assert text[place - 6 : place - 1] == "<" + text[place - distance - 5 : place - distance - 1]
            assert (text[place - 1], text[place - distance - 1]) == ("?", "=")
            right.append(text[place] == text[place - distance])
            distances.append(distance)
    assert np.mean(right) == 1 if faithful else 0.15 < np.mean(right) < 0.35
    assert min(distances) >= 20 and max(distances) <= 1600
    assert np.median(distances) == pytest.approx((20 * 1600) ** 0.5, rel=0.25), "log-uniform"


def test_pictures_have_two_dimensions() -> None:
    """A pixel is as near to the one below as to the one beside; leaves are larger than a pixel."""
    random = np.random.default_rng(0)
    pictures = np.stack([documents._leaves(64, 48, random) for _ in range(8)])
    assert pictures.shape == (8, 64, 48) and pictures.min() >= 0 and pictures.max() < documents.LEVELS
    below, beside = (np.abs(np.diff(pictures, axis=axis)).mean() for axis in (1, 2))
    far = np.abs(pictures[:, 32:] - pictures[:, :32]).mean()
    assert below == pytest.approx(beside, rel=0.15) and below < far / 3


def test_documents_are_written_once_and_whole(tmp_path: Path) -> None:
    for package, size in (("large", 150_000), ("other", 120_000), ("small", 500)):
        (tmp_path / "lib" / package / "sub").mkdir(parents=True)
        (tmp_path / "lib" / package / "sub" / "code.py").write_text(f"# {package}: é\n" * (size // 10))
    text = {"kind": "text", "root": str(tmp_path / "lib"), "metric": "loss", "seq_len": 256, "held_out": ["other"]}
    raw = yaml.safe_load(TOY.read_text())
    shared = {key: raw["tasks"]["planted"][key] for key in ("arms", "explore")}
    task = Table.model_validate(raw | {"tasks": {"text": text | shared}}).tasks["text"]
    folder, content = documents.write(task, "text", tmp_path)
    assert [path.name for path in sorted(folder.glob("*/*"))] == ["other-0.txt", "other-1.txt", "large.txt.zst"]
    assert (folder / "held_out" / "other-1.txt").stat().st_size == 255
    assert documents.write(task, "text", tmp_path) == (folder, content)
    (folder / "held_out" / "other-1.txt").write_text("x")
    with pytest.raises(ValueError, match="are not those that were written there"):
        documents.write(task, "text", tmp_path)
    lacking = task.model_copy(update={"held_out": ["small", "none"], "sequences": 40})
    with pytest.raises(
        ValueError, match=r"held_out packages \['small', 'none'\] are not installed in .* or have less than 40"
    ):
        documents.write(lacking, "text", tmp_path)


# ---- what rows say


def row(table: Table, run: Run, status: str = "done", value: float = 0.5, spread: float = 0.01) -> dict[str, str]:
    """Of a run: units of about `value`, the same for all arms of a seed but for that."""
    noise = np.random.default_rng(run.seed).normal(0, spread, 20)
    units = {f"{n:02d}": value + noise[n] for n in range(20)}
    return {
        **{key: str(field) for key, field in run._asdict().items()}, "status": status, "seconds": "9",
        "declared": table.declared(run.task, run.arm), "data": "d", "table": table.digest, "sharing": "1",
        "value": str(np.mean(list(units.values()))),
        "units": json.dumps(units), "curve": json.dumps([[1.0 + run.seed, 3.0], [3.0 + run.seed, 2.0]]), "by_power": "{}",
    }  # fmt: skip


def test_what_is_wanted_next(tmp_path: Path) -> None:
    """The gate at every rate, then with its other seeds, then the other arms at their family's rate, then fresh seeds."""
    table, rows = load_table(declared(tmp_path)), list[dict[str, str]]()
    best = {"near": 0.01, "far": 0.1, "near_shifted": 0.01}

    def wanted() -> list[Run]:
        return Outcome(table, rows, {"planted": "d"}).wanted("planted")

    def do(runs: list[Run], **kind: Any) -> None:
        for run in runs:
            value = (0.95 if run.arm == "far" else 0.3) - (run.rate != best[run.arm]) * 0.2
            rows.append(row(table, run, value=value, **kind))

    sweep = wanted()
    assert {run[1:] for run in sweep} == set(itertools.product(["near", "far"], table.rates, [1]))
    do(sweep[:5])
    do(sweep[5:], status="started")
    assert wanted() == sweep[5:], "a run of which nothing came is run again"
    do(sweep[5:])
    assert wanted() == [Run("planted", arm, best[arm], 2) for arm in ("far", "near")]
    do(wanted())
    assert Outcome(table, rows, {}).gate("planted")[0]
    assert wanted() == [Run("planted", "near_shifted", 0.01, 1)]
    do(wanted())
    fresh = wanted()
    assert fresh == [Run("planted", arm, best[arm], seed) for seed in (11, 12) for arm in ("far", "near")]
    do(fresh)
    assert wanted() == []
    (verdict,) = Outcome(table, rows, {"planted": "d"}).verdicts("planted")
    assert verdict.mean == pytest.approx(0.65, abs=0.02) and verdict.words(0.02) == "better"
    said = "\n".join(page.lines(Outcome(table, rows, {})))
    assert "gate: passed: far is better than near by 0.65" in said and "so: segments as long" in said
    assert re.search(r"far .*0\.7\d+ .*0\.9\d+\*!", said), "the best rate is an edge"
    assert Outcome(table, rows, {"planted": "other"}).last == {}, "rows of other data are another experiment"
    assert Outcome(table, [*rows, rows[0] | {"data": "e"}], {}).last == {sweep[0]: rows[0] | {"data": "e"}}, (
        "nor are two mixed"
    )
    changed = load_table(declared(tmp_path, values=5))
    assert Outcome(changed, rows, {}).last == {}, "and so are those of another declaration"


@pytest.mark.parametrize(("far", "passed"), [(0.95, True), (0.85, False), (0.305, False)])
def test_a_gate_that_is_not_passed_ends_a_task(tmp_path: Path, far: float, passed: bool) -> None:
    table = load_table(declared(tmp_path))
    rows = [
        row(table, Run("planted", arm, rate, seed), value={"far": far, "near": 0.3}[arm])
        for arm, rate, seed in itertools.product(("far", "near"), table.rates, (1, 2))
    ]
    outcome = Outcome(table, rows, {})
    assert outcome.gate("planted")[0] is passed and bool(outcome.wanted("planted")) is passed
    assert ("The task is unable to tell" in "\n".join(page.lines(outcome))) is not passed


def test_failed_runs_are_no_rate_and_are_tried_again_if_asked(tmp_path: Path) -> None:
    table = load_table(declared(tmp_path))
    rows = [row(table, Run("planted", "far", rate, 1), value=rate) for rate in table.rates[:2]]
    rows.append(row(table, Run("planted", "far", 0.1, 1), status="failed"))
    assert Outcome(table, rows, {}).best_rate("planted", "far") == 0.01
    assert Run("planted", "far", 0.1, 1) not in Outcome(table, rows, {}).wanted("planted")
    assert Run("planted", "far", 0.1, 1) in Outcome(table, rows, {}, again=True).wanted("planted")


def test_the_statistics() -> None:
    """Holm by hand; an interval that covers, wider for fewer seeds; what is said of it."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    random, inside = np.random.default_rng(0), 0
    for _ in range(40):
        true = random.normal(0, 0.02, (5, 1)) + random.normal(0, 0.02, (1, 14)) + random.normal(0, 0.01, (5, 14))
        _, low, high, _ = bootstrap(0.03 + true)
        inside += low <= 0.03 <= high
    assert 32 <= inside <= 40
    mean, low, high, p = bootstrap(np.full((5, 14), 0.02))
    assert [mean, low, high] == pytest.approx([0.02] * 3) and p < 0.001


def test_rows_of_older_versions_are_refused(tmp_path: Path) -> None:
    """They do not say how many runs shared a device."""
    path = tmp_path / "quality.csv"
    path.write_text("task,seconds\ntext,9\n")
    with pytest.raises(ValueError, match=r"quality.csv has no column 'sharing'"):
        read_rows(path)


def test_equal_seconds_and_curves(tmp_path: Path) -> None:
    """The loss when the first is over; compiling steps count as long as others; only what lies far."""
    table = load_table(declared(tmp_path))
    runs = [Run("planted", "far", 0.01, 1), Run("planted", "near", 0.01, 2)]
    shared, resumed = (Run("planted", "near", 0.01, seed) for seed in (3, 4))
    others = [
        row(table, shared) | {"sharing": "3"},
        row(table, resumed, "aborted") | {"sharing": "2"},
        row(table, resumed),
    ]
    outcome = Outcome(table, [*(row(table, run) for run in runs), *others], {})
    assert equal_seconds(outcome, [*runs, shared, resumed]) == pytest.approx({runs[0]: 2.0, runs[1]: 2.5})
    lines = [{"kind": "train", "step": n, "seconds": 100.0 if n < 3 else 2.0} for n in (1, 2, 3, 4)]
    lines.insert(
        3,
        {
            "kind": "eval",
            "step": 3,
            "loss_at_1": 9.0,
            "loss_at_2": 9.0,
            **{f"loss_at_{2**k}": float(k) for k in range(2, 8)},
        },
    )
    task = table.tasks["planted"].model_copy(update={"from_position": 8})
    assert curve(lines, task) == [(6.0, pytest.approx((8 * 3 + 16 * 4 + 16 * 5) / 40, abs=1e-6))]
