# SPDX-License-Identifier: Apache-2.0
"""The attention of a run's configuration at full length: errors of some rows against the definition in float64.

Every rank draws the same q, k, v and dout, keeps its rows as the trainer does, and runs forward and backward on them. Then it
computes the definition for some of its own: `out`, `lse` and `dq` of a row from all keys that it sees, `dk` and `dv` of a row, for
one head, from all queries that see it, each with all keys that it sees.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import ring_hilbert as rh
from ring_hilbert.bench.training import RandomSequences, one_sequence
from ring_hilbert.integrations.transformers_config import heads_of, order_of, pattern_of
from ring_hilbert.training.config import RunConfig, load_config
from ring_hilbert.training.model import model_config

CHUNK = 128  # queries for which the definition is computed at once
QUANTITIES = ("out", "lse", "dq", "dk", "dv")
GRADIENTS = QUANTITIES[3:]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags of `bench exactness`."""
    parser.add_argument(
        "--config", metavar="FILE",
        help="the YAML file of a run: its attention at full length, of which some rows are compared, instead of small problems",
    )  # fmt: skip
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="replaces values of the file")
    parser.add_argument(
        "--lengths", type=int, nargs="+", metavar="S", help="tokens of a sequence; default: the file's data.seq_len"
    )
    parser.add_argument("--layer", type=int, default=0, metavar="N", help="whose pattern; default: 0")
    parser.add_argument("--documents", type=int, default=1, metavar="N", help="in a sequence; default: 1")
    parser.add_argument("--samples", type=int, default=16, metavar="N", help="rows of each rank; default: 16")


@dataclass(frozen=True)
class Sequence:
    """One sequence and a layer's attention over it.

    `tokens`: the token of each row, int64 `[S]`. `documents`: by row, int64 `[S]`. `x`: `q [1, S, H, D]`, `k`, `v`, `dout`, by row.
    """

    config: RunConfig
    pattern: rh.DilatedPattern
    order: rh.TokenOrder | None
    documents: Tensor
    tokens: Tensor
    x: dict[str, Tensor]

    @staticmethod
    def of(config: RunConfig, layer: int, documents: int, device: torch.device) -> Sequence:
        """What every rank draws alike."""
        hf_config = model_config(config)
        text, length = hf_config.get_text_config(decoder=True), config.data.seq_len
        if not 0 <= layer < text.num_hidden_layers:
            raise ValueError(f"--layer must be 0 to {text.num_hidden_layers - 1}, got {layer}")
        heads, kv_heads, dim = heads_of(text)
        order = order_of(hf_config)
        tokens = (torch.arange(length) if order is None else order.permutation(length)).to(device)
        ids = torch.from_numpy(RandomSequences(config, 4, documents)[0]["document_ids"]).to(device)
        generator = torch.Generator(device).manual_seed(0)
        dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        sizes = {"q": heads, "k": kv_heads, "v": kv_heads, "dout": heads}
        x = {
            name: torch.randn(1, length, n, dim, generator=generator, device=device, dtype=dtype)
            for name, n in sizes.items()
        }
        return Sequence(config, pattern_of(text, layer), order, ids[tokens], tokens, x)


def rows(chosen: argparse.Namespace, device: torch.device, group: dist.ProcessGroup | None) -> Iterator[dict[str, Any]]:
    """One record per length and quantity, from rank 0."""
    world = 1 if group is None else dist.get_world_size(group)
    for length in chosen.lengths or [load_config(chosen.config, chosen.set).data.seq_len]:
        config = one_sequence(chosen.config, length, world, chosen.set)
        sequence = Sequence.of(config, chosen.layer, chosen.documents, device)
        mine, results = attend(sequence, group)
        errors = compared(sequence, mine, results, chosen.samples)
        found: list[Any] = [errors]
        if group is not None:
            found = [None] * world
            dist.all_gather_object(found, errors, group=group)
        if group is not None and dist.get_rank(group) != 0:
            continue
        for name in errors:
            exact, ours = (torch.cat([of[name][i] for of in found]) for i in range(2))
            seen = exact != float("-inf")
            error = (ours - exact)[seen].abs()
            rounded = (exact.to(results[name].dtype).double() - exact)[seen]
            yield {
                "backend": "none" if group is None else dist.get_backend(group), "world": world,
                "config": Path(chosen.config).stem, "settings": " ".join(chosen.set), "tokens": config.data.seq_len,
                "layer": chosen.layer, "documents": chosen.documents, "dtype": str(sequence.x["q"].dtype).removeprefix("torch."),
                "quantity": name, "rows": chosen.samples * world, "max_reference": f"{exact[seen].abs().max().item():.3e}",
                "max_error": f"{error.max().item():.3e}", "rms_error": f"{error.square().mean().sqrt().item():.3e}",
                "rms_of_rounding": f"{rounded.square().mean().sqrt().item():.3e}",
                "same_rows_uncovered": bool(torch.equal(ours == float("-inf"), ~seen)),
            }  # fmt: skip


def attend(sequence: Sequence, group: dist.ProcessGroup | None) -> tuple[Tensor, dict[str, Tensor]]:
    """The rows of this rank, int64 `[S_local]`; and out, lse and gradients of these, `[1, S_local, ...]`."""
    attention, by_token = sequence.config.attention, torch.empty_like(sequence.documents)
    by_token[sequence.tokens] = sequence.documents
    batch = rh.shard_batch(
        {"input_ids": by_token[None], "document_ids": by_token[None]}, group, order=sequence.order,
        layout=attention.layout, strategy=attention.strategy,
    )  # fmt: skip
    row_of = torch.empty_like(sequence.tokens)
    row_of[sequence.tokens] = torch.arange(len(row_of), device=row_of.device)
    mine = row_of[batch["ring_hilbert"].rows[0]]
    q, k, v = (sequence.x[name][:, mine].requires_grad_() for name in "qkv")
    out, lse = rh.dilated_attention(
        q, k, v, sequence.pattern, prepared=batch["ring_hilbert"], backend=attention.backend, return_lse=True
    )
    gradients = torch.autograd.grad(out, (q, k, v), sequence.x["dout"][:, mine])
    return mine, dict(zip(QUANTITIES, (out.detach(), lse.mT.detach(), *gradients), strict=True))


def compared(
    sequence: Sequence, mine: Tensor, results: dict[str, Tensor], samples: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Of every quantity what is exact and what was computed, of sampled rows of this rank, flat, on the CPU, in float64."""
    inner = torch.randint(len(mine), (max(0, samples - 2),), generator=torch.Generator().manual_seed(samples))
    chosen = torch.cat((torch.tensor([0, len(mine) - 1]), inner))[:samples].to(mine.device)
    kv_heads, found = sequence.x["k"].shape[2], {name: list[tuple[Tensor, Tensor]]() for name in results}

    def note(name: str, exact: Tensor, computed: Tensor) -> None:
        found[name].append((exact.flatten().cpu(), computed.flatten().double().cpu()))

    for at in chosen.split(8):
        for g in range(kv_heads):
            exact, group = definition(sequence, g, mine[at]), heads_in(sequence, g)
            for name in QUANTITIES[:3]:
                note(name, exact[name], results[name][:, at][:, :, group])
    for number, at in enumerate(chosen.tolist()):
        g = number % kv_heads
        for name, exact in zip(GRADIENTS, key_gradients(sequence, g, mine[at]), strict=True):
            note(name, exact, results[name][0, at, g])
    return {name: tuple(map(torch.cat, zip(*pairs, strict=True))) for name, pairs in found.items()}  # type: ignore[misc]


def heads_in(sequence: Sequence, g: int) -> slice:
    """The query heads of a kv head."""
    group = sequence.x["q"].shape[2] // sequence.x["k"].shape[2]
    return slice(g * group, (g + 1) * group)


def definition(sequence: Sequence, g: int, queries: Tensor) -> dict[str, Tensor]:
    """One kv head by the definition in float64: out, lse and dq of the rows `queries [Q]`, and what these add to dk and dv.

    `out`, `dq` `[1, Q, group, D]`, `lse [1, Q, group]`; `dk`, `dv` `[1, K, 1, D]` of the rows `keys [K]`, others are not seen.
    """
    x, pattern, group = sequence.x, sequence.pattern, heads_in(sequence, g)
    length, kv_heads = x["k"].shape[1:3]
    keys = held(pattern, length, g, kv_heads, queries)
    m = rh.reference.multiplicity(pattern, length, kv_heads, queries, keys)[None, g : g + 1]
    m = m * rh.reference.allowed(True, sequence.tokens, sequence.documents, queries, keys)[:, None]
    q, dout = (x[name][:, queries, group].double() for name in ("q", "dout"))
    k, v = (x[name][:, keys, g : g + 1].double().requires_grad_() for name in "kv")
    out, lse = rh.reference.weighted_softmax(q.requires_grad_(), k, v, m, q.shape[-1] ** -0.5)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    results = (out.detach(), lse.mT.detach(), *gradients)
    return dict(zip(QUANTITIES, results, strict=True)) | {"keys": keys}


def key_gradients(sequence: Sequence, g: int, row: Tensor) -> tuple[Tensor, Tensor]:
    """`dk`, `dv` `[D]` of one row and kv head by the definition, in float64."""
    length, kv_heads, dim = sequence.x["k"].shape[1:]
    sums = torch.zeros(2, dim, dtype=torch.float64, device=row.device)
    holding = held(sequence.pattern, length, g, kv_heads, row[None])  # who holds another row is held by it
    see = rh.reference.allowed(True, sequence.tokens, sequence.documents, holding, row[None])[0, :, 0]
    for queries in holding[see].split(CHUNK):
        exact = definition(sequence, g, queries)
        at = exact["keys"] == row
        sums += torch.stack([exact[name][0, at, 0].sum(0) for name in GRADIENTS])
    return sums[0], sums[1]


def held(pattern: rh.DilatedPattern, length: int, g: int, kv_heads: int, queries: Tensor) -> Tensor:
    """The rows that some branch of a head holds in the segment of one of `queries [Q]`: all that these could see, int64 `[K]`."""
    rows = torch.arange(length, device=queries.device)
    some = torch.zeros(length, dtype=torch.bool, device=queries.device)
    for branch in pattern.branches:
        offset = pattern.offset(branch, g, kv_heads)
        (segment, phase), (of, where) = (rh.reference.segments(pattern, branch, x) for x in (rows, queries))
        some |= (phase == offset) & torch.isin(segment, of[where == offset])
    return some.nonzero()[:, 0]
