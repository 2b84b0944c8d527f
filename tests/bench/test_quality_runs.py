# SPDX-License-Identifier: Apache-2.0
"""`ring-hilbert bench quality` with its runs: a planted effect is found, and no other; a stopped run resumes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from ring_hilbert.bench.quality.outcome import read_rows
from ring_hilbert.cli import main

ROOT = Path(__file__).parents[2]
TOY = ROOT / "configs" / "quality" / "toy.yaml"


def toy(tmp_path: Path, *flags: str) -> list[dict[str, str]]:
    """Run the toy here and return its rows."""
    out = tmp_path / "quality.csv"
    places = ["--folder", str(tmp_path), "--output", str(out), "--device", "cpu", "--table", str(TOY)]
    assert main(["bench", "quality", *places, *flags]) == 0
    return read_rows(out)


def test_a_planted_effect_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The default changes; every run has a row at its start and at its end, and the same command runs nothing more."""
    rows = toy(tmp_path, "--tasks", "planted")
    said = capsys.readouterr().out
    assert [row["status"] for row in rows] == ["started", "done"] * 4
    assert "so: segments as long as what is asked for is far" in said and "4 done, 0 failed" in said
    accuracy = {
        arm: [float(row["value"]) for row in rows if row["arm"] == arm and row["value"]] for arm in ("near", "far")
    }
    assert min(accuracy["far"]) > 0.6 > 0.4 > max(accuracy["near"])
    assert all(len(json.loads(row["units"])) == 64 for row in rows[1::2])
    assert not list(tmp_path.glob("runs/*/checkpoints")), "what is scored is not kept"
    assert len(toy(tmp_path, "--tasks", "planted", "--plot", str(tmp_path / "quality.png"))) == 8
    assert (tmp_path / "quality.png").stat().st_size > 1000


@pytest.mark.full
def test_no_effect_is_found_where_there_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same task but for its answers."""
    rows = toy(tmp_path, "--tasks", "nothing")
    said = capsys.readouterr().out
    assert [row["status"] for row in rows] == ["started", "done"] * 4
    assert "so: no default changes" in said and "segments as long" not in said
    assert all(float(row["value"]) < 0.4 for row in rows[1::2])


@pytest.mark.full
def test_a_run_that_is_told_to_stop_goes_on(tmp_path: Path) -> None:
    """Its rows say so; called again, the same command resumes from its checkpoint and finishes."""
    raw = yaml.safe_load(TOY.read_text())
    task = raw["tasks"]["planted"] | {"explore": [5], "confirm": [], "comparisons": []}
    task["arms"] = {"far": task["arms"]["far"]}
    raw["run"]["train"]["steps"] = 800
    path = tmp_path / "table.yaml"
    path.write_text(yaml.safe_dump(raw | {"tasks": {"planted": task}}))
    first = toy(tmp_path, "--table", str(path), "--set", "limit_seconds=8")
    assert [row["status"] for row in first] == ["started", "aborted"]
    stopped = re.fullmatch("told to stop after step ([0-9]+); it goes on from there", first[-1]["note"])
    assert stopped and 0 < int(stopped[1]) < 800
    last = toy(tmp_path, "--table", str(path))[-1]
    assert (last["status"], last["steps"]) == ("done", "800")
    (output,) = tmp_path.glob("runs/*/output.txt")
    assert f"resumed from step {stopped[1]}" in output.read_text()
