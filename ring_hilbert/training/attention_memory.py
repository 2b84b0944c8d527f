# SPDX-License-Identifier: Apache-2.0
"""How much memory the attention holds internally, of other ranks' rows and for its kernels: counted from its plan and walks."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from ring_hilbert.integrations.transformers_config import heads_of, order_of, pattern_of
from ring_hilbert.kernels.tables import Walk
from ring_hilbert.kernels.tiles import PASSES, Tile, plan_tile, tiles_for
from ring_hilbert.ops.backends import unsupported
from ring_hilbert.ops.core import Shard
from ring_hilbert.ops.nesting import chains
from ring_hilbert.ops.triton_core import KEPT_SCHEDULES
from ring_hilbert.ops.walk import plan_rows
from ring_hilbert.parallel.execution import remote_walks
from ring_hilbert.parallel.plan import Plan
from ring_hilbert.parallel.planning import plan
from ring_hilbert.training.config import RunConfig
from ring_hilbert.training.model import model_config

HOPPER = 90  # the compute capability for which walks are planned: the planning process sees no device
SAMPLE = 2**16  # most rows for which walks are made; larger ones are extrapolated


@lru_cache(maxsize=16)
def held_by_attention(config_json: str, cuda: bool) -> tuple[int, tuple[int, int]]:
    """Bytes of all layers' walks and schedules, and the most that a layer's attention holds internally, forward and backward.

    For the rank that receives most; `config_json` is the run's configuration, hashable. On CPUs there are no walks, and only what
    other ranks send is held.
    """
    config = RunConfig.model_validate_json(config_json)
    text, ranks = model_config(config).get_text_config(decoder=True), config.parallel.sp
    heads, kv_heads, dim = heads_of(text)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    triton = cuda and config.attention.backend != "torch" and unsupported(torch.device("cuda"), dtype, dim) is None
    walks, forward, backward, alike = 0, 0, 0, dict[Any, tuple[int, int, int]]()
    schedules: list[int] = []
    for pattern in {pattern_of(text, layer) for layer in range(text.num_hidden_layers)}:
        made = plan(
            pattern, config.data.seq_len, ranks, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, dtype=dtype,
            batch_size=config.train.micro_batch, layout=config.attention.layout, order=order_of(text),
            strategy=config.attention.strategy,
        )  # fmt: skip
        rank = max(range(ranks), key=made.remote_bytes)
        remote, shared, sums = made.remote_bytes(rank), 0, 0
        if triton and made.strategy != "ulysses":
            # Another head_shift or other weights give tables of the same size.
            key = pattern.branches, pattern.segment_shift, pattern.count
            if key not in alike:
                alike[key] = _tables(made, rank)
            walks += alike[key][0]
            schedules.append(alike[key][1])
            shared, sums = alike[key][2], _sums(made, rank)
        forward, backward = max(forward, remote + shared), max(backward, remote + shared + sums)
    kept = min(sum(schedules), max(KEPT_SCHEDULES, *schedules, 0))
    return walks + kept, (forward, backward)


def _tables(made: Plan, rank: int) -> tuple[int, int, int]:
    """Bytes of a layer's walks, of the schedules made of them, and of rows shared between launches."""
    shapes, order, cpu = made.shapes, made.visible.order, torch.device("cpu")
    chunks = made.layout.chunks(rank)
    shard = Shard(chunks, made.layout.seq_len, order)
    rows, places = (torch.from_numpy(x[:SAMPLE]) for x in (shard.rows(), shard.places()))
    parts = chains(made.pattern, shapes.num_kv_heads)
    local, remote = dict[tuple[int, int], Walk](), dict[tuple[int, int, bool, int], Walk]()
    schedules: dict[tuple[int, int, bool], int] = {}
    scale = max(1, shard.size / SAMPLE)  # tables grow with rows
    received = remote_walks(made.crossings, rank, made.strategy == "ring", shard, cpu) if made.hops(rank) else None
    for pass_ in PASSES:
        tiles = tiles_for(pass_, HOPPER, shapes.head_dim, shapes.dtype, shapes.num_heads // shapes.num_kv_heads)

        def plan_local(tile: Tile) -> Walk:
            key = tile.block_outer, tile.chunk
            if key not in local:
                local[key] = plan_rows(
                    parts, made.pattern.segment_shift, rows, places, block_outer=key[0], chunk=key[1]
                )
            return local[key]

        tile, walk = plan_tile(tiles, plan_local)
        schedules[id(walk), tile.block_inner, pass_ == "dkdv"] = int(scale * walk.schedule_nbytes)
        for hop, visits in enumerate(received.hops if received is not None else ()):
            if received is not None and visits:
                key = tiles[0].block_outer, tiles[0].chunk, pass_ == "dkdv", hop
                remote[key] = received.walk(hop, tiles[0], key[2])
                schedules[id(remote[key]), tiles[0].block_inner, key[2]] = remote[key].schedule_nbytes
    walks = int(scale * sum(walk.nbytes for walk in local.values())) + sum(walk.nbytes for walk in remote.values())
    kept = sum(schedules.values())
    if received is None:
        return walks, kept, 0
    walks += received.slots.nbytes + (0 if received.staged is None else received.staged.nbytes)
    staging = 4 * shapes.batch_size * received.number * shapes.num_heads * (shapes.head_dim + 2)
    return walks, kept, staging


def _sums(made: Plan, rank: int) -> int:
    """Bytes of backward's sums: lse and delta of every row and head, dK and dV in float32 if other ranks add to them."""
    batch, heads, kv_heads, dim, _ = made.shapes
    wide = 2 * kv_heads * dim if made.layout.world_size > 1 else 0
    return 4 * batch * made.layout.lengths[rank] * (2 * heads + wide)
