# SPDX-License-Identifier: Apache-2.0
"""`ring-hilbert bench geometry`: distances, rows that cross ranks and blocks of every curve, on few cells."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

import ring_hilbert as rh
from ring_hilbert.bench import geometry
from ring_hilbert.cli import main

CELLS, SIDE = 4096, 64


def test_distances_are_those_of_all_pairs() -> None:
    """A square of 32 x 32 cells along Hilbert's curve, and 16 rows of 64 in raster order, by counting."""
    random, found = np.random.default_rng(0), {}
    for curve in ("raster", "hilbert"):
        places = geometry._places(rh.TokenOrder(curve, grid=(SIDE, SIDE)), CELLS, (SIDE, SIDE))
        segment = places[random.permutation(1024)]
        apart = np.linalg.norm(segment[:, None] - segment[None], axis=2)
        found[curve] = geometry._within(places, 1024, 1)
        assert found[curve] == pytest.approx(apart.sum() / (1024 * 1023), rel=0.02)
        assert geometry._to_kept(places, 1024, 1) == 0
        kept = np.concatenate([places[start : start + 1024 : 16] for start in range(0, CELLS, 1024)])
        near = np.linalg.norm(places[:, None] - kept[None], axis=2).min(1).mean()
        assert geometry._to_kept(places, 1024, 16) == pytest.approx(near, rel=0.05)
    assert found["hilbert"] < 0.8 * found["raster"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "geometry.csv"
    assert (
        main(["bench", "geometry", "--device", "cpu", "--cells", "64", "--rates", "1", "4", "--output", str(out)]) == 0
    )
    records = list(csv.DictReader(out.read_text().splitlines()))
    assert len(records) == 3 * 2 * len(geometry.CURVES)
    assert {r["geometry"] for r in records} == {"1-D", "2-D", "3-D"} and all(r["forward_ms"] == "" for r in records)
    assert all(int(r["blocks"]) >= int(r["masked_blocks"]) > 0 <= int(r["crossing_rows"]) for r in records)
    local = [r for r in records if r["geometry"] == "1-D" and r["rate"] == "1"]
    assert len({r["distance_within"] for r in local}) == 1, (
        "a block that is a segment holds the same tokens in any order"
    )
    capsys.readouterr()
    assert main(["bench", "geometry", "--device", "cpu", "--cells", "100", "--output", str(out)]) == 2
    assert "--cells 100 is not both a square and a cube; the nearest that is: 64" in capsys.readouterr().err
