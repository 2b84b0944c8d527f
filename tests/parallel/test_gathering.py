# SPDX-License-Identifier: Apache-2.0
"""`gather_rows`: rows of any order, layout and length come back in natural token order, on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

import ring_hilbert as rh
from tests.harness.ranks import run_ranks, run_ranks_collect

IDS = torch.arange(2 * 24).view(2, 24)
MASK = torch.ones_like(IDS)
MASK[0, :5], MASK[1, 17:] = 0, 0
HILBERT = rh.TokenOrder("hilbert", block=4)
GRID = rh.TokenOrder("peano", grid=(4, 6))
CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"attention_mask": MASK}, {"order": HILBERT}),
    ({"attention_mask": MASK}, {"order": HILBERT, "local_lengths": "uneven"}),
    ({}, {"order": GRID, "layout": "zigzag"}),
    ({"document_ids": IDS % 3}, {"order": rh.TokenOrder("morton", grid=(2, 3, 4)), "causal": False}),
]
DTYPES = (torch.int64, torch.float32, torch.bfloat16, torch.bool, torch.uint8)


def values(ids: torch.Tensor) -> list[torch.Tensor]:
    """Something per token, with and without further dimensions, of every dtype."""
    return [ids, *((ids[..., None, None] * torch.arange(1, 7).view(3, 2)).to(dtype) for dtype in DTYPES)]


def gathered(rank: int, world: int, lengths: tuple[int, ...]) -> list[list[torch.Tensor]]:
    found = []
    for batch, options in CASES:
        own = {name: lengths if value == "uneven" else value for name, value in options.items()}
        batch = rh.shard_batch({"input_ids": IDS, **batch}, dist.group.WORLD if world > 1 else None, **own)
        found.append([rh.gather_rows(x, batch["ring_hilbert"]) for x in values(batch["input_ids"])])
    return found


@pytest.mark.parametrize("lengths", [(24,), (24, 0), (5, 17, 2)])
def test_every_rank_has_the_tokens_in_their_order(lengths: tuple[int, ...]):
    ranks = [gathered(0, 1, lengths)] if len(lengths) == 1 else run_ranks(gathered, len(lengths), lengths)
    for rank in ranks:
        for case in rank:
            for found, expected in zip(case, values(IDS), strict=True):
                assert found.dtype == expected.dtype and torch.equal(found, expected)


def whole(rank: int, world: int, layout: str) -> tuple[torch.Tensor, bool]:
    """Of rows that `prepare` knows, with gradients: without one."""
    prepared = rh.prepare(4, group=dist.group.WORLD, layout=layout)
    rows = prepared.rows.double().requires_grad_()
    found = rh.gather_rows(rows, prepared)
    return found.detach(), found.requires_grad


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_rows_of_prepare(layout: str):
    for found, requires_grad in run_ranks(whole, 2, layout):
        assert found.tolist() == [list(range(8))] and not requires_grad


def wrong_on_one(rank: int, world: int, what: str) -> None:
    prepared = rh.shard_batch({"input_ids": IDS}, dist.group.WORLD)["ring_hilbert"]
    x = torch.zeros(2, 12, 3)
    if rank == 1:
        x = {"rows": x[:, :-1], "dtype": x.half(), "batch": x[:1], "flat": x[0, 0, 0], "more": x[..., :1]}[what]
    rh.gather_rows(x, prepared)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("rows", ["rank 1: x must be [B, S_local=12, ...]", "got [2, 11, 3]"]),
        ("flat", ["rank 1: x must be [B, S_local=12, ...]", "got []"]),
        ("dtype", ["dtype of x must be the same", "torch.float16"]),
        ("batch", ["shape of x but for its rows must be the same", "rank 1 has (1, 3)"]),
        ("more", ["shape of x but for its rows must be the same", "rank 1 has (2, 1)"]),
    ],
)
def test_a_mistake_of_one_rank_is_an_error_on_all(what: str, words: list[str]):
    for outcome in run_ranks_collect(wrong_on_one, 2, what, timeout=30):
        assert isinstance(outcome, ValueError) and all(word in str(outcome) for word in words), outcome


def test_another_batch():
    """Where every entry has an order of its own, `x` must have as many entries as the batch."""
    prepared = rh.shard_batch({"input_ids": IDS, "attention_mask": MASK}, order=HILBERT)["ring_hilbert"]
    with pytest.raises(ValueError, match=r"x must be \[2, S_local=24, \.\.\.\]"):
        rh.gather_rows(IDS[:1], prepared)
