# SPDX-License-Identifier: Apache-2.0
"""Whole slides: dilated attention and Prov-GigaPath's slide encoder against the published algorithm, and what planning costs.

A slide has --tiles tiles and a class token, 16 heads, torchscale's segment lengths for it and its padding (`zero_keys`), and is
not causal. The published algorithm runs on PyTorch's fastest fused kernel, alternating with ours. Parts:

- attention: forward without gradients, and forward + backward, for every head dim. `extra_mib` is the peak of both beyond
  q, k, v, dout and the gradients. Heads of 24 and 48 are computed as if they had 32 and 64 columns: compare those rows.
- encoder: forward + backward of all layers in bfloat16, with and without recomputed layers. `extra_mib` is beyond the weights.
- planning: attention of a slide whose length is new to the process, `first_ms`, and of another of that length, medians over as many
  lengths as rounds, each a tile less.

Under torchrun all ranks share one slide, and only ours runs: times are of the slowest rank, memory is the maximum over ranks.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import ring_hilbert as rh
from ring_hilbert.bench import longnet
from ring_hilbert.bench.timing import interleaved, peak_bytes
from ring_hilbert.integrations.longnet import SlideEncoder, segment_lengths_for
from ring_hilbert.parallel.wire import from_all

PARTS = ("attention", "encoder", "planning")
RATES = (1, 2, 4, 8, 16)
OURS, PUBLISHED = "ring_hilbert", "longnet"
Record = dict[str, Any]
Passes = Mapping[str, Callable[[], object]]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags of `ring-hilbert bench slides`."""
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=f"some of {', '.join(PARTS)}")
    add("--tiles", type=int, default=100_000, metavar="N", help="of the slide; default 100000")
    add("--head-dims", type=int, nargs="+", default=[48, 64, 24, 32], metavar="D", help="default 48 64 24 32")
    add("--heads", type=int, default=16, metavar="H", help="default 16")
    add("--embed-dim", type=int, default=768, help="of the encoder; default 768")
    add("--depth", type=int, default=12, help="layers of the encoder; default 12")
    add("--max-wsi-size", type=int, default=262144, metavar="PIXELS", help="makes the segment lengths; default 262144")
    add(
        "--lengths", type=int, nargs="+", default=[500, 3000, 10_000, 30_000, 100_000], metavar="N",
        help="tiles of the slides that are planned; default 500 3000 10000 30000 100000",
    )  # fmt: skip
    add("--repeats", type=int, default=7, help="rounds that are timed; medians are kept; default 7")
    add("--without", action="store_true", help="leave the published algorithm out")


def rows(chosen: argparse.Namespace, device: torch.device, group: dist.ProcessGroup | None) -> Iterator[Record]:
    """A record per contender and problem, from rank 0."""
    pattern = rh.DilatedPattern(segment_lengths_for(chosen.max_wsi_size), RATES, offset_rule="block", zero_keys=True)
    parts: dict[str, Callable[[], Iterator[Record]]] = {
        "attention": lambda: _attention(chosen, pattern, device, group),
        "encoder": lambda: _encoder(chosen, device, group),
        "planning": lambda: _planning(chosen, pattern, device, group),
    }
    for part in chosen.parts:
        for record in parts[part]():
            if group is None or dist.get_rank(group) == 0:
                yield {"part": part} | record


def _shares(total: int, group: dist.ProcessGroup | None) -> int:
    """This rank's share of `total`."""
    ranks, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    return total // ranks + (rank < total % ranks)


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _tensors(
    length: int, heads: int, head_dim: int, device: torch.device
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """q, k, v, which require gradients, and dout."""
    shape, dtype = (1, length, heads, head_dim), _dtype(device)
    q, k, v, dout = (torch.randn(shape, device=device, dtype=dtype) for _ in range(4))
    return (q.requires_grad_(), k.requires_grad_(), v.requires_grad_()), dout


def _attention(
    chosen: argparse.Namespace, pattern: rh.DilatedPattern, device: torch.device, group: dist.ProcessGroup | None
) -> Iterator[Record]:
    for head_dim in chosen.head_dims:
        x, dout = _tensors(_shares(chosen.tiles + 1, group), chosen.heads, head_dim, device)
        prepared = rh.prepare(x[0].shape[1], group=group, causal=False)
        calls: dict[str, Callable[..., Tensor]] = {
            OURS: partial(rh.dilated_attention, pattern=pattern, prepared=prepared)
        }
        if group is None and not chosen.without:
            calls[PUBLISHED] = partial(longnet.dilated_attention, pattern=pattern, causal=False)
        passes = {name: _passes(call, x, dout) for name, call in calls.items()}
        facts = {"heads": chosen.heads, "head_dim": head_dim, "layers": 0, "recomputed": ""}
        yield from _measured(chosen, facts, passes, sum(t.nbytes for t in x), device, group)


def _passes(call: Callable[..., Tensor], x: tuple[Tensor, Tensor, Tensor], dout: Tensor) -> Passes:
    def forward() -> object:
        with torch.no_grad():
            return call(*x)

    return {"forward": forward, "both": lambda: torch.autograd.grad(call(*x), x, dout)}


def _encoder(chosen: argparse.Namespace, device: torch.device, group: dist.ProcessGroup | None) -> Iterator[Record]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    side = 1 + int(chosen.tiles**0.5)
    tiles = _shares(chosen.tiles, group)
    before = 0 if group is None else dist.get_rank(group) * tiles
    at = torch.arange(before, before + tiles)
    coords = 256 * torch.stack((at // side, at % side), dim=1)
    x = torch.randn((tiles, 1536), device=device, dtype=dtype)
    for recomputed in (
        (True, False) if group is None else (True,)
    ):  # one rank out of memory would keep all others waiting
        encoder = SlideEncoder(
            1536, chosen.embed_dim, chosen.depth, zero_keys=True, num_heads=chosen.heads, max_wsi_size=chosen.max_wsi_size,
            slide_ngrids=side + 1, dropout=0.0, drop_path_rate=0.0, checkpoint_activations=recomputed,
        ).to(device, dtype)  # fmt: skip

        def both(published: bool, encoder: SlideEncoder = encoder) -> object:
            for layer in encoder.encoder.layers:
                attention: Any = layer.self_attn
                vars(attention).pop("attend", None)
                if published:
                    attention.attend = partial(_attend, attention.pattern)
            (embedding,) = encoder([x], [coords], group=group)
            return torch.autograd.grad(embedding.float().square().sum(), list(encoder.parameters()), allow_unused=True)

        passes: dict[str, Passes] = {OURS: {"both": partial(both, False)}}
        if group is None and not chosen.without:
            passes[PUBLISHED] = {"both": partial(both, True)}
        facts = {
            "heads": chosen.heads,
            "head_dim": chosen.embed_dim // chosen.heads,
            "layers": chosen.depth,
            "recomputed": recomputed,
        }
        yield from _measured(chosen, facts, passes, 0, device, group)


def _attend(pattern: rh.DilatedPattern, q: Tensor, k: Tensor, v: Tensor, _prepared: rh.Prepared) -> Tensor:
    return longnet.dilated_attention(q, k, v, pattern, causal=False)


def _planning(
    chosen: argparse.Namespace, pattern: rh.DilatedPattern, device: torch.device, group: dist.ProcessGroup | None
) -> Iterator[Record]:
    for tiles in (11, 2500, *chosen.lengths):  # the first two compile the kernels
        rounds = chosen.repeats if tiles in chosen.lengths else 1
        new, known = list[float](), list[float]()
        for fewer in range(rounds):  # a length of its own each
            length = max(1, tiles - fewer) + 1
            x, dout = _tensors(_shares(length, group), chosen.heads, chosen.embed_dim // chosen.heads, device)

            def both(x: tuple[Tensor, Tensor, Tensor] = x, dout: Tensor = dout) -> object:
                prepared = rh.prepare(x[0].shape[1], group=group, causal=False)
                return torch.autograd.grad(rh.dilated_attention(*x, pattern, prepared=prepared), x, dout)

            for taken in (new, known):
                taken.append(1e3 * _until_done(both, device))
        first, again = _largest([statistics.median(new), statistics.median(known)], device, group)
        if tiles in chosen.lengths:
            head_dim = chosen.embed_dim // chosen.heads
            facts = {"heads": chosen.heads, "head_dim": head_dim, "layers": 0, "recomputed": ""}
            yield _record(tiles, facts, OURS, group, rounds, _dtype(device)) | {
                "first_ms": f"{first:.3f}",
                "forward_backward_ms": f"{again:.3f}",
            }


def _until_done(call: Callable[[], object], device: torch.device) -> float:
    """Seconds by the clock, what the host does before the device begins included."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


# ---- figures


def _measured(
    chosen: argparse.Namespace, facts: Record, passes: Mapping[str, Passes], known: int, device: torch.device,
    group: dist.ProcessGroup | None,
) -> Iterator[Record]:  # fmt: skip
    """The record of every contender; without figures for one that does not fit. `known`: bytes of the gradients."""
    fitting, extra = dict[str, Passes](), dict[str, int]()
    for name, of in passes.items():
        try:
            for call in of.values():
                call()  # compiles, plans
            extra[name] = peak_bytes(of["both"], device) - known
            fitting[name] = of
        except torch.cuda.OutOfMemoryError:
            pass
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    calls = {f"{name} {pass_}": call for name, of in fitting.items() for pass_, call in of.items()}
    times = interleaved(calls, chosen.repeats, device, lambda _: None)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for name, of in passes.items():
        record = _record(chosen.tiles, facts, name, group, chosen.repeats, dtype)
        if name in fitting:
            medians = [times[f"{name} {pass_}"].median for pass_ in of]
            *medians, held = _largest([*medians, extra[name]], device, group)
            record |= {"forward_ms": f"{medians[0]:.3f}"} if "forward" in of else {}
            record |= {"forward_backward_ms": f"{medians[-1]:.3f}", "extra_mib": f"{held / 2**20:.1f}"}
            if name == OURS and PUBLISHED in fitting:
                theirs = times[f"{PUBLISHED} both"].median
                record |= {
                    "time_vs_longnet": f"{medians[-1] / theirs:.3f}",
                    "extra_vs_longnet": f"{held / extra[PUBLISHED]:.3f}",
                }
        yield record


def _record(
    tiles: int, facts: Record, name: str, group: dist.ProcessGroup | None, repeats: int, dtype: torch.dtype
) -> Record:
    ranks = 1 if group is None else dist.get_world_size(group)
    return {
        "tiles": tiles, "ranks": ranks, **facts, "dtype": str(dtype)[6:], "contender": name, "repeats": repeats,
        "first_ms": "", "forward_ms": "", "forward_backward_ms": "", "extra_mib": "", "time_vs_longnet": "",
        "extra_vs_longnet": "",
    }  # fmt: skip


def _largest(values: list[float], device: torch.device, group: dist.ProcessGroup | None) -> list[float]:
    """The maximum of each value over all ranks."""
    if group is None:
        return values
    return torch.stack(from_all(torch.tensor(values, dtype=torch.float64, device=device), group)).amax(0).tolist()
