# SPDX-License-Identifier: Apache-2.0
"""`ring-hilbert plot`: the numbers behind the pictures by brute force, the files, and the mistakes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import ring_hilbert as rh
from ring_hilbert.bench import coverage, picture
from ring_hilbert.cli import main

LENGTH, KV_HEADS = 40, 2
LAYERS = (rh.DilatedPattern((8, None), (3, 4)), rh.DilatedPattern((8, None), (3, 4), head_shift=2, segment_shift=3))
ORDERS = (None, rh.TokenOrder("hilbert", block=16), rh.TokenOrder("snake", grid=(5, 8)))


def seen(pattern: rh.DilatedPattern, order: rh.TokenOrder | None, causal: bool) -> list[set[int]]:
    """The tokens that each token attends to in some head, one pair at a time."""
    count = rh.reference.multiplicity(pattern, LENGTH, KV_HEADS)
    row = list(range(LENGTH)) if order is None else order.inverse(LENGTH).tolist()
    return [
        {b for b in range(LENGTH) if count[:, row[a], row[b]].any() and (b <= a or not causal)} for a in range(LENGTH)
    ]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("causal", [True, False])
def test_reach(order: rh.TokenOrder | None, causal: bool) -> None:
    """One layer: what a token attends to, and itself. Two: what those reached below."""
    below, above = (seen(pattern, order, causal) for pattern in LAYERS)
    one = [keys | {a} for a, keys in enumerate(below)]
    two = [set().union(*(one[b] for b in keys | {a})) for a, keys in enumerate(above)]
    for layers, expected in ((LAYERS[:1], one), (LAYERS, two)):
        reached = coverage.reach(layers, LENGTH, KV_HEADS, order=order, causal=causal)
        assert [set(np.flatnonzero(line)) for line in reached] == expected
        assert (reached.sum(1) <= coverage.possible(LENGTH, causal)).all()
    assert one != two


@pytest.mark.parametrize("order", ORDERS)
def test_multiplicity_in_tokens(order: rh.TokenOrder | None) -> None:
    """A query whose key has weight m: the reference's out moves exactly with the keys that the picture shows."""
    pattern = LAYERS[0]
    count = coverage.multiplicity(pattern, LENGTH, 1, order=order)[0]
    q = torch.zeros(1, LENGTH, 1, LENGTH, dtype=torch.float64)
    v = torch.eye(LENGTH, dtype=torch.float64)[None, :, None]
    out, _ = rh.reference.dilated_attention(q, q, v, pattern, order=order)
    expected = count / np.maximum(count.sum(1, keepdims=True), 1)
    assert np.allclose(out[0, :, 0].numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("order", ORDERS[:2])
@pytest.mark.parametrize("causal", [True, False])
def test_needed(order: rh.TokenOrder | None, causal: bool) -> None:
    """Per rank and row: the share of kv heads in which a row of the rank attends to that row of another rank."""
    plan = rh.plan(
        LAYERS[0], LENGTH, 3, num_heads=KV_HEADS, head_dim=1, dtype=torch.float32, causal=causal, order=order
    )
    owner, needed = coverage.owners(plan), coverage.needed(plan)
    assert [np.count_nonzero(owner == p) for p in range(3)] == [14, 13, 13] and (np.diff(owner) >= 0).all()
    token = np.arange(LENGTH) if order is None else order.permutation(LENGTH).numpy()
    count = rh.reference.multiplicity(LAYERS[0], LENGTH, KV_HEADS).numpy()
    if causal:
        count = count * (token[None, :] <= token[:, None])
    for reader in range(3):
        reads = (count[:, owner == reader] > 0).any(1).mean(0)
        assert np.array_equal(needed[reader], np.where(owner == reader, 0, reads))


def test_cells_do_not_collide() -> None:
    """Every token has its own place, neighbours of a Hilbert run are neighbours, runs are apart."""
    for order, length in ((rh.TokenOrder("hilbert", block=16), 100), (rh.TokenOrder("hilbert", grid=(6, 8)), 48)):
        x, y = picture.cells(order, order.permutation(length).numpy())
        assert len(set(zip(x, y, strict=True))) == length
        step = np.abs(np.diff(x)) + np.abs(np.diff(y))
        run = 16 if order.block else length
        assert (np.delete(step, np.arange(run - 1, length - 1, run)) == 1).all()


@pytest.mark.parametrize("what", picture.PICTURES)
@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_files(tmp_path: Path, what: str, suffix: str) -> None:
    path = tmp_path / "new" / f"{what}{suffix}"
    arguments = ["--what", what, "--length", "100", "--ranks", "3", "--block", "64", "--head-shift", "0", "1"]
    assert main(["plot", str(path), *arguments]) == 0
    start = path.read_bytes()[:5]
    assert start == (b"\x89PNG\r" if suffix == ".png" else b"<?xml")


def test_grid(tmp_path: Path) -> None:
    path = tmp_path / "grid.png"
    arguments = ["--what", "shards", "--grid", "10", "12", "--length", "120", "--full"]
    assert main(["plot", str(path), *arguments]) == 0
    assert path.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["x.gif"], ["x.gif", ".png or .svg"]),
        (["x"], [".png or .svg"]),
        (["x.png", "--what", "spam"], ["spam", "overview, mask, order, coverage, shards"]),
        (["x.png", "--length", "2049"], ["2049 rows", "the limit is 2048"]),
        (["x.png", "--what", "shards", "--length", "65537"], ["the limit is 65536"]),
        (["x.png", "--length", "0"], ["length=0"]),
        (["x.png", "--head", "8"], ["head=8", "0 to 7"]),
        (["x.png", "--curve", "hilbrt"], ["hilbert"]),
        (["x.png", "--grid", "4", "4"], ["length=256"]),
        (["x.png", "--grid", "4", "8", "8", "--what", "order"], ["two sides"]),
        (["x.png", "--grid", "16", "16", "--block", "64"], ["exactly one of block and grid"]),
        (["x.png", "--dilation-rates", "1"], ["dilation_rates"]),
        (["x.png", "--head-shift", "1", "2", "3"], ["--head-shift"]),
    ],
)
def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]) -> None:
    """Status 2 and what would work; no file."""
    assert main(["plot", str(tmp_path / arguments[0]), *arguments[1:]]) == 2
    message = capsys.readouterr().err
    assert message.startswith("ring-hilbert plot: error: ")
    assert all(word in message for word in words), message
    assert not any(tmp_path.iterdir())
