# SPDX-License-Identifier: Apache-2.0
"""The shipped configurations' patterns, orders and heads, and parts of them, against dense cuDNN attention in the same run."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

import ring_hilbert as rh
from ring_hilbert.bench.contenders import DENSE, Contender, Problem, autograd_passes, core_passes, dense, published
from ring_hilbert.bench.timing import Times, interleaved
from ring_hilbert.kernels.tables import Schedule
from ring_hilbert.kernels.tiles import PASSES, Pass, Tile
from ring_hilbert.ops.core import Shard
from ring_hilbert.ops.triton_core import TritonCore
from ring_hilbert.ops.visible import Visible
from ring_hilbert.ops.visits import Chunk

FLOPS = {"forward": 4, "backward": 10}  # per pair and column of the head
ROWS, DENSE_ROWS = 131072, 16384
FLOOR = "cudnn, 16384 rows"
KEPT = "ring_hilbert, schedules kept"
OPERATOR = "rh.dilated_attention"
TAIL, CUT = 0.05, "ring_hilbert, schedules kept, without the last 5 % of tiles"
# TFLOP/s of cuDNN, forward and backward, on a healthy H100, by head dim: a lower rate is not used as a denominator.
HEALTHY = {64: (440.0, 400.0), 128: (560.0, 500.0)}
STEEP = rh.DilatedPattern((4096, 16384, 65536, 262144, None), (1, 4, 16, 64, 256))
DOUBLING = rh.DilatedPattern(tuple(2048 << i for i in range(5)), tuple(1 << i for i in range(5)))
BY_4096 = rh.TokenOrder("hilbert", block=4096)
DOCUMENTS, SIGMA, SEED = 200, 1.2, 0


@dataclass(frozen=True)
class Shape:
    """A timed problem. `name`: a configuration, or the part of one.

    `longnet`: also time the published algorithm; `tail`: also leave out the last tiles of every launch.
    """

    name: str
    pattern: rh.DilatedPattern
    order: rh.TokenOrder | None
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    documents: int = 1
    longnet: bool = False
    tail: bool = False

    def problem(self, device: torch.device) -> Problem:
        """In bf16, causal."""
        shape = self.length, True, torch.bfloat16, device, 1, self.heads, self.kv_heads, self.head_dim
        return Problem(self.pattern, *shape)


SHAPES = (
    Shape("llama_1b_1m", STEEP, BY_4096, ROWS, 32, 8, 64, longnet=True, tail=True),
    Shape("llama_1b_1m", STEEP, None, ROWS, 32, 8, 64),
    Shape("llama_1b_1m", STEEP, BY_4096, ROWS, 32, 8, 64, documents=DOCUMENTS, tail=True),
    Shape("llama_8b_1m", STEEP, BY_4096, ROWS, 32, 8, 128),
    Shape(
        "continue_1m", rh.DilatedPattern((4096, 16384, 65536, None), (1, 4, 16, 64), segment_shift=2048),
        rh.TokenOrder("hilbert", block=2048), ROWS, 32, 8, 64,
    ),
    Shape("llama_1b_1m, half the heads of 128", STEEP, BY_4096, ROWS, 16, 4, 128),
    Shape("llama_1b_1m, half the heads of 128", STEEP, None, ROWS, 16, 4, 128),
    Shape("doubling", DOUBLING, None, ROWS, 16, 4, 128, longnet=True),
    Shape("doubling", DOUBLING, None, DENSE_ROWS, 16, 4, 128),
    Shape("doubling", DOUBLING, None, ROWS, 8, 8, 128),
    Shape("dense", DENSE, None, DENSE_ROWS, 16, 4, 128),
    Shape("local branch", rh.DilatedPattern((4096,), (1,)), None, ROWS, 32, 8, 64),
)  # fmt: skip


def document_ids(length: int, number: int, order: rh.TokenOrder | None) -> Tensor:
    """`number` documents of lognormal lengths, one after another in the text; ids by row of `order`, int64 `[1, length]`."""
    sizes = torch.randn(number, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64).mul(SIGMA).exp()
    ends = (sizes.cumsum(0) / sizes.sum() * length).round().long()
    tokens = torch.arange(length) if order is None else order.permutation(length)
    return torch.searchsorted(ends, tokens, right=True)[None]


def pairs_of(shape: Shape, seen: Visible, device: torch.device) -> int:
    """Pairs of a head, summed over branches, counted on every branch's rows by their intervals."""
    key, low, high = (x[0] for x in seen.on(device))
    total = 0
    for w, r in shape.pattern.branches:
        assert shape.pattern.head_shift == 0 and shape.pattern.offset_rule == "modulo"
        size = w or shape.length + r  # of a segment
        begin = -(shape.pattern.segment_shift % (w or r))
        for start in range(begin, shape.length, size):
            rows = torch.arange(start, start + size, r, device=device)
            rows = rows[(rows >= 0) & (rows < shape.length)]
            keys = key[rows].sort().values.contiguous()
            first = torch.searchsorted(keys, low[rows].contiguous())
            total += int((torch.searchsorted(keys, high[rows].contiguous(), right=True) - first).clamp(min=0).sum())
    return total


@lru_cache(maxsize=len(PASSES))  # of the launches that are timed
def without_tail(whole: Schedule) -> Schedule:
    """A schedule that visits nothing in the TAIL of its tiles that comes last, the shortest."""
    tiles = whole.order.shape[1]
    last = whole.order[:, tiles - round(TAIL * tiles) :, None].long()
    return replace(whole, steps=whole.steps.scatter(1, last.expand(-1, -1, 2), 0))


class WithoutTail(TritonCore):
    """A core whose launches leave out their last tiles: what these take is the difference of two times."""

    def schedule(self, pass_: Pass) -> tuple[Tile, Schedule]:
        """As in TritonCore."""
        tile, whole = super().schedule(pass_)
        return tile, without_tail(whole)


def rows(chosen: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """A record for every shape, contender and pass, of `chosen.repeats` rounds.

    "ring_hilbert" makes the schedules of every launch, as the first layer of a batch does; KEPT finds them, as further layers of
    the same pattern do; CUT does not process the last tiles of any launch (its pairs are by the blocks left, mean of launches).
    These are the kernels alone; OPERATOR is a call of the whole operator on a batch prepared before, differentiated by autograd.

    `of_cudnn`: TFLOP/s of branch pairs over those of dense cuDNN attention with the same heads; `of_one_document`: time per pair
    over that of the same shape with one document.
    """
    one: dict[tuple[object, ...], float] = {}  # milliseconds per pair with one document
    for shape in SHAPES:
        for record in _measure(shape, chosen, device):
            if record["contender"] in ("ring_hilbert", KEPT, OPERATOR):
                each = float(record["ms"]) / record["pairs"]
                least = one.setdefault((shape.name, shape.order, record["contender"], record["pass"]), each)
                record["of_one_document"] = f"{each / least:.3f}" if shape.documents > 1 else ""
            yield record


def _operator(shape: Shape, device: torch.device, flops: int) -> Contender:
    batch = {"input_ids": torch.zeros((1, shape.length), dtype=torch.int64)}
    if shape.documents > 1:
        batch["document_ids"] = document_ids(shape.length, shape.documents, None)
    prepared = rh.shard_batch(batch, order=shape.order, device=device)["ring_hilbert"]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return rh.dilated_attention(q, k, v, shape.pattern, prepared=prepared)

    return Contender("ring_hilbert", "", "triton", attend, flops)


def _measure(shape: Shape, chosen: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    problem = shape.problem(device)
    x = {name: value.detach() for name, value in problem.tensors().items()}
    ids = None if shape.documents == 1 else document_ids(shape.length, shape.documents, shape.order).to(device)
    seen = Visible(shape.length, True, order=shape.order, documents=ids)
    shard = Shard((Chunk(0, shape.length, 0),), shape.length, shape.order)
    facts = shape.pattern, shape.kv_heads, shard, seen.on(device), shape.head_dim, problem.dtype, device
    count, group = pairs_of(shape, seen, device) * shape.heads, shape.heads // shape.kv_heads
    contenders: dict[str, tuple[tuple[Callable[[], object], Callable[[], object]], float]] = {
        name: (core_passes(TritonCore(*facts, visible=visible, group=group), x, shape.head_dim**-0.5), count)
        for name, visible in (("ring_hilbert", None), (KEPT, seen))
    }

    if shape.tail:
        core = WithoutTail(*facts, visible=seen, group=group)
        whole = [TritonCore.schedule(core, pass_)[1] for pass_ in PASSES]
        left = sum(without_tail(each).blocks() / each.blocks() for each in whole) / len(whole)
        contenders[CUT] = core_passes(core, x, shape.head_dim**-0.5), count * left

    def add(name: str, contender: Contender, length: int) -> None:
        inputs = [x[key][:, :length].clone().requires_grad_() for key in "qkv"]
        pairs = contender.flops / (4 * shape.head_dim)
        contenders[name] = autograd_passes(contender, inputs, x["dout"][:, :length]), pairs

    add(OPERATOR, _operator(shape, device, 4 * shape.head_dim * count), shape.length)
    add(FLOOR, dense(replace(problem, length=DENSE_ROWS), DENSE_ROWS), DENSE_ROWS)
    if shape.longnet:  # segments longer than the sequence are the sequence
        lengths = tuple(min(w or shape.length, shape.length) for w, _ in shape.pattern.branches)
        clipped = replace(shape.pattern, segment_lengths=lengths)
        add("longnet", published(replace(problem, pattern=clipped)), shape.length)
    calls = {
        f"{name}, {pass_}": call
        for name, (passes, _) in contenders.items()
        for pass_, call in zip(FLOPS, passes, strict=True)
    }
    for call in calls.values():
        for _ in range(3):
            call()
    times: dict[str, Times] = interleaved(calls, chosen.repeats, device, lambda _: None, chosen.pause)

    def rate(name: str, pass_: str) -> float:
        return contenders[name][1] * FLOPS[pass_] * shape.head_dim / times[f"{name}, {pass_}"].median / 1e9

    dense_rates = {pass_: rate(FLOOR, pass_) for pass_ in FLOPS}
    healthy = all(r >= least for r, least in zip(dense_rates.values(), HEALTHY[shape.head_dim], strict=True))
    for name, (_, pairs) in contenders.items():
        for pass_ in FLOPS:
            t = times[f"{name}, {pass_}"]
            yield {
                "shape": shape.name, "order": "raster" if shape.order is None else f"{shape.order.curve}/{shape.order.block}",
                "length": shape.length, "heads": shape.heads, "kv_heads": shape.kv_heads, "head_dim": shape.head_dim,
                "documents": shape.documents, "sigma": SIGMA if shape.documents > 1 else "",
                "seed": SEED if shape.documents > 1 else "", "contender": name, "pass": pass_, "pairs": int(pairs),
                "ms": f"{t.median:.4f}", "ms_min": f"{t.least:.4f}", "ms_max": f"{t.most:.4f}",
                "tflops": f"{rate(name, pass_):.4g}", "of_cudnn": f"{rate(name, pass_) / dense_rates[pass_]:.3f}",
                "cudnn_healthy": healthy, "of_one_document": "",
            }  # fmt: skip
