# SPDX-License-Identifier: Apache-2.0
"""Activation checkpointing over ranks: the same gradients, and how often rows are exchanged."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import ring_hilbert as rh
from ring_hilbert.checkpointing import selective_contexts
from ring_hilbert.training.model import for_training, make_model, model_config
from tests.harness.ranks import run_ranks
from tests.harness.tiny_run import tiny_config
from tests.parallel.test_modules import HILBERT, ROWS, module, tokens

LAYERS = 3
WAYS: dict[str, Callable] = {
    "none": lambda block, x: block(x),
    "plain": partial(checkpoint, use_reentrant=False),
    "policy": partial(checkpoint, use_reentrant=False, context_fn=rh.checkpoint_contexts),
    "selective": partial(checkpoint, use_reentrant=False, context_fn=selective_contexts),
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


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.mm.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("settings", "recomputed"),
    [
        ({"recompute": "all"}, 2 * 6),  # of two layers; none asks for the down projection again
        ({"recompute": "selective"}, 2 * 4),  # output and up projections are there
        ({"recompute": "selective", "recompute_layers": 1}, 6 + 4),
        ({"recompute": "none", "recompute_layers": 1}, 6),
        ({"recompute": "none"}, 0),
        ({"recompute": "all", "mlp_tiles": 3}, 2 * (4 + 3 * 2)),  # gate and up of every piece once
        ({"recompute": "none", "mlp_tiles": 3}, 2 * 3 * 2),
    ],
    ids=str,
)
def test_products_that_are_computed_again(tmp_path: Path, settings: dict[str, Any], recomputed: int):
    train = {f"train__{key}": value for key, value in settings.items()}
    config = tiny_config(tmp_path, **{"train__checkpoint_activations": True, **train})
    model = for_training(make_model(model_config(config)), config, None)
    batch = rh.shard_batch({"input_ids": torch.zeros(1, 256, dtype=torch.long)})
    del batch["shift_labels"]
    hidden = model.base_model(**batch, use_cache=False).last_hidden_state
    with Products() as products:
        hidden.sum().backward()
    gradients = 2 * 7 * 2 if "mlp_tiles" not in settings else 2 * (4 * 2 + 3 * 3 * 2)
    assert products.count - gradients == recomputed
