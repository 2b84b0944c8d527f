# SPDX-License-Identifier: Apache-2.0
"""Interrupted loops of Transformers, Accelerate and DeepSpeed go on as if they had not been: the same documents and losses."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.harness.loops import DOCUMENTS, EPOCHS, MICRO_STEPS, Log, accelerate_loop, deepspeed_loop, trainer_loop
from tests.harness.ranks import run_ranks

LOOPS = {"trainer": trainer_loop, "accelerate": accelerate_loop, "deepspeed": deepspeed_loop}


def middles(loop: str, groups: int) -> tuple[int, ...]:
    """Steps that end in the middle of the first, the second and the third epoch; the Trainer also does the last, smaller one."""
    batches = -(-DOCUMENTS // groups)
    steps = -(-batches // MICRO_STEPS) if loop == "trainer" else batches // MICRO_STEPS
    return tuple(epoch * steps + steps // 2 for epoch in range(3))


def interrupted_and_not(
    rank: int, world_size: int, loop: str, folder: Path, stops: tuple[int, ...], options: dict[str, Any]
) -> list[tuple[Log, Log, Log]]:
    """For each number of steps: the uninterrupted run, one that ended after them, and what the latter did afterwards."""
    whole = LOOPS[loop](rank, world_size, folder / "whole", -1, **options)
    found = []
    for stop in stops:
        place = folder / f"stop-{stop}"
        before, after = (LOOPS[loop](rank, world_size, place, at, **options) for at in (stop, -1))
        found.append((whole, before, after))
    return found


def check(world_size: int, loop: str, folder: Path, stops: tuple[int, ...], **options: Any) -> None:
    if loop == "deepspeed":
        pytest.importorskip("deepspeed")
        if shutil.which("g++") is None:
            pytest.skip("DeepSpeed builds its CPU extension with g++")
    options = {"sp_size": world_size, **options}
    for rank in run_ranks(interrupted_and_not, world_size, loop, folder, stops, options, timeout=280):
        for whole, before, after in rank:
            assert 0 < len(before.documents) < len(whole.documents)
            assert before.documents + after.documents == whole.documents
            assert before.losses + after.losses == pytest.approx(whole.losses, rel=1e-6)
            epochs = [whole.documents[at : at + DOCUMENTS] for at in range(0, 2 * DOCUMENTS, DOCUMENTS)]
            assert epochs[0] != epochs[1]  # or it would say little


@pytest.mark.parametrize("loop", LOOPS)
def test_resumed_in_the_second_epoch(loop: str, tmp_path: Path) -> None:
    check(2, loop, tmp_path, middles(loop, 1)[1:2])


UNSIZED = {"max_steps": EPOCHS * DOCUMENTS // MICRO_STEPS}
VARIANTS: list[tuple[int, str, dict[str, Any]]] = [
    *((ranks, loop, {}) for ranks in (1, 2) for loop in LOOPS),
    *((2, loop, {"sp_size": 1}) for loop in LOOPS),
    *((2, "deepspeed", {"stage": stage}) for stage in (0, 1, 3)),
    *((ranks, "trainer", {"data": data, **UNSIZED}) for ranks in (1, 2) for data in ("stream", "seeded")),
    *((2, "trainer", {"data": data, "sp_size": 1, **UNSIZED}) for data in ("stream", "seeded")),
    *((2, "trainer", {"data": "sized", "sp_size": sp_size}) for sp_size in (1, 2)),
    *((2, loop, {"data": data}) for loop in ("accelerate", "deepspeed") for data in ("shuffled", "stream", "seeded")),
]


@pytest.mark.full
@pytest.mark.parametrize(("ranks", "loop", "options"), VARIANTS)
def test_resumed_in_any_epoch(ranks: int, loop: str, options: dict[str, Any], tmp_path: Path) -> None:
    """In the middle of the first, the second and the third; one group of ranks or two, samplers and streams of every kind."""
    check(ranks, loop, tmp_path, middles(loop, ranks // options.get("sp_size", ranks)), **options)


def moved(rank: int, world_size: int, loop: str, folder: Path) -> str:
    """One group read half an epoch; two would go on elsewhere."""
    folder = folder / "run"
    LOOPS[loop](rank, world_size, folder, middles(loop, 1)[1], sp_size=2)
    with pytest.raises(ValueError) as error:
        LOOPS[loop](rank, world_size, folder, -1, sp_size=1)
    return str(error.value)


@pytest.mark.parametrize(
    ("loop", "message"),
    [
        ("trainer", "step 10 was epoch 1.4615 of its run, but is epoch 2.5714"),
        ("accelerate", "has 7 batches, but had 13"),
    ],
)
def test_another_number_of_groups_is_refused(loop: str, message: str, tmp_path: Path) -> None:
    assert all(message in found for found in run_ranks(moved, 2, loop, tmp_path))
