# SPDX-License-Identifier: Apache-2.0
"""Errors of sampled rows at full length: the definition of some rows is that of all, and a wrong result is seen."""

import argparse
from unittest.mock import patch

import pytest
import torch

import ring_hilbert as rh
from ring_hilbert.bench import exactness, sampled
from ring_hilbert.bench.training import one_sequence
from tests.harness.ranks import run_ranks

CONFIG = "configs/llama_1b_1m.yaml"
SMALL = [
    "train.precision=fp32", "model.config.hidden_size=64", "model.config.num_attention_heads=4",
    "model.config.num_key_value_heads=2", "model.config.head_dim=16", "attention.segment_lengths=[32, 128, null]",
    "attention.dilation_rates=[1, 4, 16]", "attention.order.block=32",
]  # fmt: skip
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "settings", [[], ["attention.segment_shift=32", "attention.count=once"], ["attention.order=null"]]
)
def test_definition_of_some_rows_is_that_of_all(settings: list[str]) -> None:
    sequence = sampled.Sequence.of(one_sequence(CONFIG, 300, 1, [*SMALL, *settings]), 3, 5, CPU)
    q, k, v, dout = (sequence.x[name].double().requires_grad_(name != "dout") for name in ("q", "k", "v", "dout"))
    out, lse = rh.reference.dilated_attention(
        q, k, v, sequence.pattern, positions=sequence.tokens, document_ids=sequence.documents
    )
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
    queries = torch.tensor([0, 7, 100, 101, 299])
    for g in range(2):
        group = sampled.heads_in(sequence, g)
        some = sampled.definition(sequence, g, queries)
        for name, whole in (("out", out), ("lse", lse.mT), ("dq", dq)):
            torch.testing.assert_close(some[name], whole[:, queries][:, :, group], rtol=0, atol=1e-12)
        for row in queries:
            for one, whole in zip(sampled.key_gradients(sequence, g, row), (dk, dv), strict=True):
                torch.testing.assert_close(one, whole[0, row, g], rtol=0, atol=1e-12)


def chosen(**changes: object) -> argparse.Namespace:
    settings = {"config": CONFIG, "set": SMALL, "lengths": [500], "layer": 1, "documents": 3, "samples": 5}
    return argparse.Namespace(**settings | changes)


def records(rank: int, _world_size: int, wrong: str) -> list[dict[str, object]]:
    attend = sampled.attend

    def spoiled(*args: object) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        rows, results = attend(*args)  # type: ignore[arg-type]
        if rank == 1 and wrong:
            results[wrong][:, -1] += 0.01  # of the last row
        return rows, results

    with patch.object(sampled, "attend", spoiled):
        return list(exactness.measured(chosen(), CPU, torch.distributed.group.WORLD))


@pytest.mark.parametrize("wrong", ["", "lse", "dk"])
def test_a_wrong_row_on_one_rank_is_seen(wrong: str) -> None:
    first, second = run_ranks(records, 2, wrong)
    assert second == [] and [r["quantity"] for r in first] == list(exactness.QUANTITIES)
    for r in first:
        assert (float(r["max_error"]) > 1e-5) == (r["quantity"] == wrong), r
        assert r["rows"] == 10 and r["same_rows_uncovered"]


def test_flags_without_a_configuration() -> None:
    with pytest.raises(ValueError, match="name one with --config"):
        exactness.measured(chosen(config=None), CPU, None)


def test_a_layer_that_is_none() -> None:
    with pytest.raises(ValueError, match="--layer must be 0 to 15, got 16"):
        list(exactness.measured(chosen(layer=16), CPU, None))
