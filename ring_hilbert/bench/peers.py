# SPDX-License-Identifier: Apache-2.0
"""This operator over ranks against `ring-attention-pytorch`, which must be installed: time, and bytes on the wire.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 4 -m ring_hilbert.cli bench peers

With --train, training of a whole model instead, against PyTorch's own `context_parallel`, on GPUs (see `peers_training.py`):

    torchrun --nproc-per-node 4 -m ring_hilbert.cli bench peers --train configs/llama_1b_1m.yaml --train-lengths 131072 262144

The same rows, dense and causal, on both; and a dilated pattern here against dense attention there, which has no dilation.
Contenders alternate; medians of the slowest rank are kept. Bytes are those that a rank receives in forward and backward, counted
at the collectives, on the rank that receives most.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import ring_hilbert as rh
from ring_hilbert.bench import peers_training
from ring_hilbert.training.config import load_config
from ring_hilbert.training.model import model_config

DILATED = rh.DilatedPattern((1024, 4096, 16384, None), (1, 4, 16, 64))
DENSE = rh.DilatedPattern((None,), (1,))
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags of `bench peers`."""
    parser.add_argument("--dense-length", type=int, default=8192, metavar="S", help="rows; default 8192")
    parser.add_argument("--dilated-length", type=int, default=32768, metavar="S", help="rows; default 32768")
    parser.add_argument("--heads", type=int, default=4, metavar="H", help="default 4")
    parser.add_argument("--head-dim", type=int, default=64, metavar="D", help="default 64")
    parser.add_argument("--buckets", type=int, nargs="+", default=[512, 1024], metavar="N", help="of the peer")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that are timed; medians are kept; default 5")
    training = parser.add_argument_group("a model in training")
    training.add_argument("--train", metavar="FILE", help="the YAML file of a run")
    training.add_argument("--train-lengths", type=int, nargs="+", default=[131072], metavar="S", help="default: 131072")
    training.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="replaces values of the file")
    training.add_argument("--eager", action="store_true", help="do not compile the peer's layers")


def rows(chosen: argparse.Namespace, device: torch.device, group: dist.ProcessGroup | None) -> Iterator[dict[str, Any]]:
    """A record per problem and contender, on rank 0.

    Raises:
        ValueError: without torchrun, without the peer, or if the contenders' dense attention differs.
    """
    if chosen.train is not None:
        yield from _training(chosen, device, 1 if group is None else dist.get_world_size(group))
        return
    if group is None:
        raise ValueError("bench peers compares ranks: torchrun --nproc-per-node 4 -m ring_hilbert.cli bench peers")
    try:
        from ring_attention_pytorch import ring_flash_attn  # pyright: ignore[reportMissingImports]  # a peer
    except ImportError as error:
        raise ValueError("the peer is not installed: pip install ring-attention-pytorch") from error

    world, rank = dist.get_world_size(group), dist.get_rank(group)

    def ours(pattern: rh.DilatedPattern, length: int, **options: Any) -> Attend:
        prepared = rh.prepare(length // world, group=group, **options)
        return lambda q, k, v: rh.dilated_attention(q, k, v, pattern, prepared=prepared)

    def theirs(bucket: int) -> Attend:
        return lambda q, k, v: ring_flash_attn(q, k, v, None, True, bucket, True)

    for name, length, pattern in (("dense", chosen.dense_length, DENSE), ("dilated", chosen.dilated_length, DILATED)):
        generator = torch.Generator().manual_seed(rank)
        shape = (1, length // world, chosen.heads, chosen.head_dim)
        q, k, v, dout = (torch.randn(shape, generator=generator).to(device) for _ in range(4))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        contenders = {f"ring-attention-pytorch, dense, bucket {n}": theirs(n) for n in chosen.buckets}
        if pattern is DENSE:
            _same(ours(pattern, length, strategy="ring"), *contenders.values(), leaves=leaves)
            contenders["ring_hilbert, ring, zigzag"] = ours(pattern, length, strategy="ring", layout="zigzag")
        contenders[f"ring_hilbert, {name}, auto"] = ours(pattern, length)
        for contender, found in _turns(contenders, leaves, dout, chosen.repeats, group).items():
            if rank == 0:
                yield {
                    "problem": name, "contender": contender, "ranks": world, "length": length, "heads": chosen.heads,
                    "head_dim": chosen.head_dim, "dtype": "float32", "causal": True,
                } | found  # fmt: skip


def _training(chosen: argparse.Namespace, device: torch.device, ranks: int) -> Iterator[dict[str, Any]]:
    if device.type == "cpu" and ranks > 1:
        raise ValueError(
            "bench peers --train: PyTorch's context_parallel has no attention for the CPU; run it on GPUs, or on one rank"
        )
    for length in chosen.train_lengths:
        overrides = [f"data.seq_len={length}", f"train.global_batch_tokens={length}", f"parallel.sp={ranks}"]
        overrides += ["parallel.dp_shard=1", "parallel.dp_replicate=1", "train.micro_batch=1"]
        config = load_config(chosen.train, overrides + chosen.set)
        text = model_config(config).get_text_config(decoder=True)
        for found in peers_training.rows(config, device, chosen.repeats, not chosen.eager):
            took, peak = found["seconds"], found["peak_gib"]
            told = "out of memory"
            if took is not None:
                told = f"{length / took:,.0f} tokens/s, {peak:.2f} GiB, first loss {found['loss']:.6f}"
            print(f"{found['contender']}: {length:,} tokens, {told}")
            yield {
                "problem": f"training {Path(chosen.train).stem}", "contender": found["contender"], "ranks": ranks, "length": length,
                "heads": text.num_attention_heads, "head_dim": text.hidden_size // text.num_attention_heads,
                "dtype": config.train.precision, "causal": True, "forward_ms": "",
                "forward_backward_ms": "" if took is None else f"{1e3 * took:.1f}", "received_mib": "",
            }  # fmt: skip


def _same(*contenders: Attend, leaves: list[Tensor]) -> None:
    """Raise ValueError unless all compute the same."""
    with torch.no_grad():
        first, *others = (attend(*leaves) for attend in contenders)
    for other in others:
        difference = float((first - other).abs().max())
        if not difference < 1e-4:
            raise ValueError(f"the contenders do not compute the same: they differ by {difference:.1e}")


def _turns(
    contenders: dict[str, Attend], leaves: list[Tensor], dout: Tensor, repeats: int, group: dist.ProcessGroup
) -> dict[str, dict[str, str]]:
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    received = {}
    for _ in range(repeats + 1):
        for name, attend in contenders.items():
            with _counted() as seen:
                dist.barrier(group=group)
                began = time.perf_counter()
                out = attend(*leaves)
                between = time.perf_counter()
                torch.autograd.grad(out, leaves, dout)
                times[name].append((between - began, time.perf_counter() - began))
            received[name] = sum(seen)
    results = {}
    for name, found in times.items():
        forward, both = (statistics.median(x) for x in zip(*found[1:], strict=True))
        everybody: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everybody, (forward, both, received[name]), group=group)
        forward, both, size = (max(x) for x in zip(*everybody, strict=True))
        results[name] = {
            "forward_ms": f"{1e3 * forward:.1f}",
            "forward_backward_ms": f"{1e3 * both:.1f}",
            "received_mib": f"{size / 2**20:.2f}",
        }
    return results


@contextmanager
def _counted() -> Iterator[list[int]]:
    """Bytes received through the collectives of either contender."""
    seen: list[int] = []
    real = dist.all_to_all_single, dist.batch_isend_irecv

    def together(buffer: Tensor, *arguments: Any, **options: Any) -> Any:
        seen.append(buffer.nbytes)
        return real[0](buffer, *arguments, **options)

    def apart(messages: list[dist.P2POp]) -> Any:
        seen.extend(message.tensor.nbytes for message in messages if message.op is dist.irecv)
        return real[1](messages)

    dist.all_to_all_single, dist.batch_isend_irecv = together, apart
    try:
        yield seen
    finally:
        dist.all_to_all_single, dist.batch_isend_irecv = real


def report(records: list[dict[str, Any]], _chosen: argparse.Namespace) -> None:
    """A line per record."""
    for r in records:
        print(
            f"{r['problem']:8} {r['contender']:44} forward {r['forward_ms']:>9} ms, with backward "
            f"{r['forward_backward_ms']:>9} ms, received {r['received_mib']:>8} MiB"
        )
