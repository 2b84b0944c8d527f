# SPDX-License-Identifier: Apache-2.0
"""Activation checkpointing over ranks: the same gradients, and how often rows are exchanged."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ring_hilbert as rh
from tests.ranks import run_ranks
from tests.test_modules import HILBERT, ROWS, module, tokens

LAYERS = 3
WAYS: dict[str, Callable] = {
    "none": lambda block, x: block(x),
    "plain": partial(checkpoint, use_reentrant=False),
    "policy": partial(checkpoint, use_reentrant=False, context_fn=rh.checkpoint_contexts),
}


def _train(rank: int, world: int, compiled: bool) -> dict[str, tuple[int, int, list[Tensor]]]:
    """By way: exchanges in forward, exchanges in backward, and this rank's share of the gradients."""
    torch._dynamo.reset()
    layers = nn.ModuleList(module(order=HILBERT) for _ in range(LAYERS))
    batch = rh.shard_batch({"input_ids": torch.zeros(2, ROWS, dtype=torch.long)}, dist.group.WORLD, order=HILBERT)
    prepared, exchanges, real = batch["ring_hilbert"], [], dist.all_to_all_single
    rows = torch.take_along_dim(tokens(), prepared.rows.expand(2, -1)[..., None], 1)

    def counting(*args, **kwargs):
        exchanges.append(1)
        return real(*args, **kwargs)

    results = {}
    dist.all_to_all_single = counting
    try:
        for way, call in WAYS.items():

            def model(x: Tensor, call: Callable = call) -> Tensor:
                for layer in layers:
                    x = call(lambda x, layer=layer: x + layer(torch.tanh(x), prepared=prepared), x)
                return x

            run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
            layers.zero_grad()
            exchanges.clear()
            out = run(rows.clone().requires_grad_())
            forward = len(exchanges)
            out.square().sum().backward()
            gradients = [p.grad.clone() for p in layers.parameters()]
            results[way] = forward, len(exchanges) - forward, gradients
    finally:
        dist.all_to_all_single = real
    return results


@pytest.mark.parametrize("compiled", [False, True])
def test_the_policy_exchanges_nothing_in_recomputation(compiled: bool):
    for results in run_ranks(_train, 2, compiled, timeout=240):
        for way, (forward, backward, gradients) in results.items():
            # backward fetches K and V again and returns their gradients; plain recomputation fetches once more
            assert forward == LAYERS, way
            assert backward == LAYERS * (3 if way == "plain" else 2), way
            for gradient, expected in zip(gradients, results["none"][2], strict=True):
                torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12, msg=way)
