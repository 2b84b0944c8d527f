# SPDX-License-Identifier: Apache-2.0
"""`ring-hilbert check`: whether the operator is correct over these ranks, how fast their links are, and what they run on.

    torchrun --nproc-per-node 8 -m ring_hilbert.cli check

Every rank computes small problems in full, by the definition in float64, and its part of them together with the others, for
every strategy and layout; the two must agree. Prints one page that ends in OK, or in what is wrong and what to do.
"""

from __future__ import annotations

import os
import platform
import socket
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.cuda import nccl

import ring_hilbert as rh
from ring_hilbert.ops.backends import unsupported
from ring_hilbert.parallel.layout import Layout
from ring_hilbert.parallel.wire import collective, communicator
from ring_hilbert.training.hosts import groups_across, identity, join, local_address, rank_device

PATTERN = rh.DilatedPattern((96, 333, None), (1, 3, 7), head_shift=1, segment_shift=13)
LADDER = rh.DilatedPattern((128, 256, None), (1, 2, 4))
WAYS = [
    ("exchange", "contiguous"), ("exchange", "zigzag"), ("ring", "contiguous"), ("ring", "zigzag"), ("ulysses", "contiguous"),
]  # fmt: skip
BOUNDS = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 0.15}  # of the difference
MESSAGE = 32 * 2**20  # total bytes that a rank sends
REPEATS = 7


@dataclass
class Page:
    """The page to print, and the faults found."""

    lines: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.faults:
            return "\n".join([*self.lines, "", "OK"])
        return "\n".join([*self.lines, "", "NOT OK", *(f"- {fault}" for fault in self.faults)])


def check(timeout: float) -> tuple[Page, bool]:
    """Run all checks on the ranks that torchrun started, or alone; returns the page, and whether this rank prints it.

    `timeout`: seconds to wait for another rank.

    Raises:
        ValueError: if this rank has no device of its own, or the ranks do not find each other.
        RuntimeError: if a rank died or stalled, or a collective failed; names it.
    """
    device = rank_device()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    page = Page()
    if world > 1:
        join("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout, timeout)
    group = dist.group.WORLD if world > 1 else None
    try:
        _versions(page, device, group)
        _equality(page, device, group)
        if group is None:
            page.lines += ["", "one process: start it under torchrun to check ranks and links"]
        else:
            _links(page, device, group)
        return page, group is None or dist.get_rank() == 0
    finally:
        if group is not None:
            dist.destroy_process_group()


def _everybody(mine: Any, group: dist.ProcessGroup | None) -> list[Any]:
    if group is None:
        return [mine]
    values: list[Any] = [None] * dist.get_world_size(group)
    try:
        dist.all_gather_object(values, mine, group=group)
    except RuntimeError as error:
        raise RuntimeError(
            f"rank {dist.get_rank(group)}: not all ranks arrived at a step of the check; see the first error of another rank, "
            f"and that every host can reach every other on all ports: {error}"
        ) from error
    return values


# ---- versions


def _versions(page: Page, device: torch.device, group: dist.ProcessGroup | None) -> None:
    cuda = device.type == "cuda"
    triton = unsupported(device, torch.bfloat16, 128) if cuda else None
    mine = {
        "ring_hilbert": _version("ring_hilbert"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "triton": _version("triton"),
        "device": torch.cuda.get_device_name(device) if cuda else f"{platform.machine()} CPU",
        "nccl": ".".join(map(str, nccl.version())) if cuda else "not used",
    }
    address = local_address(os.environ.get("MASTER_ADDR", "localhost"))
    machines = _everybody((identity(), f"{socket.gethostname()} ({address})"), group)
    ranks = [(name, *rest) for (_, name), rest in zip(machines, _everybody((mine, triton), group), strict=True)]
    hosts = Counter(machines)
    page.lines.append(
        f"{len(ranks)} rank(s) on {len(hosts)} host(s): " + ", ".join(f"{name} {n}" for (_, name), n in hosts.items())
    )
    if len(hosts) > 1:
        page.lines += _across([machine for machine, _ in machines])
    for key in mine:
        values = Counter(found[key] for _, found, _ in ranks)
        page.lines.append(
            f"  {key:13}" + ", ".join(v if len(values) == 1 else f"{v} ({n} ranks)" for v, n in values.items())
        )
        if len(values) > 1:
            odd = min(values, key=lambda value: values[value])
            where = next(i for i, (_, found, _) in enumerate(ranks) if found[key] == odd)
            what = "use equal devices" if key == "device" else f"install one version of {key} on all hosts"
            page.faults.append(f"{key} differs: rank {where} on {ranks[where][0]} has {odd}; {what}")
    if triton:
        page.faults.append(f"the kernels cannot run, and the slower PyTorch core would: {triton}; pip install triton")


def _across(machines: list[str]) -> list[str]:
    """For which sizes some sp groups (neighbouring ranks) span several hosts."""
    lines = []
    for sp in (size for size in range(2, len(machines) + 1) if len(machines) % size == 0):
        across, groups = groups_across(machines, sp), len(machines) // sp
        where = (
            f"{len(across)} of {groups} groups cross hosts, of ranks {across[0] * sp} to {across[0] * sp + sp - 1} first"
            if across
            else ""
        )
        lines.append(f"  sp={sp:<10}{where or 'every group is within a host'}")
    counts = set(Counter(machines).values())
    if len(counts) > 1:
        lines.append(
            f"  hosts have {min(counts)} to {max(counts)} ranks: an sp that divides all of these stays within them"
        )
    return lines


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


# ---- equality


def _equality(page: Page, device: torch.device, group: dist.ProcessGroup | None) -> None:
    world = 1 if group is None else dist.get_world_size(group)
    page.lines += ["", "largest difference from the definition in float64 on one rank, over out, dq, dk and dv:"]
    for strategy, layout in WAYS if group is not None else WAYS[:1]:
        for dtype in (torch.float64, torch.bfloat16 if device.type == "cuda" else torch.float32):
            heads = 4 if strategy != "ulysses" else 2 * world
            errors = _everybody(max(_differences(strategy, layout, dtype, heads, device, group)), group)
            error, name = max(errors), str(dtype).removeprefix("torch.")
            page.lines.append(f"  {strategy:10}{layout:12}{name:10}{error:.1e}")
            if not error <= BOUNDS[dtype]:  # NaN is an error too
                page.faults.append(
                    f"{strategy}, {layout}, {name}: rank {errors.index(error)} is off by {error:.1e} (bound "
                    f"{BOUNDS[dtype]:.0e}): do not train with it; report this page, and use another strategy meanwhile"
                )


def _differences(
    strategy: str, layout: str, dtype: torch.dtype, heads: int, device: torch.device, group: dist.ProcessGroup | None
) -> Iterator[float]:
    world, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    seq_len = 2 * world * (-(-500 // (2 * world)))
    rows = Layout.even(seq_len, world, layout)
    mine = torch.from_numpy(rows.rows(rank)).to(device)
    generator = torch.Generator().manual_seed(0)
    for pattern, documents in ((PATTERN, True), (LADDER, False)):
        q, k, v, dout = (
            torch.randn(1, seq_len, n, 32, generator=generator, dtype=torch.float64).to(device, dtype)
            for n in (heads, 2, 2, heads)
        )
        ids = torch.arange(seq_len, device=device) * 3 // seq_len if documents else None
        whole = [x.double() for x in (q, k, v, dout)]
        expected = _attend(rh.reference.dilated_attention, whole, pattern, document_ids=ids)
        shards = [x.index_select(1, mine) for x in (q, k, v, dout)]
        local = None if ids is None else ids[mine]
        facts = {} if group is None else {"group": group, "layout": layout, "strategy": strategy}
        results = _attend(rh.dilated_attention, shards, pattern, document_ids=local, return_lse=True, **facts)
        for got, want in zip(results, expected, strict=True):
            difference = (got.double() - want.index_select(1, mine)).abs().max().item()
            yield difference if difference == difference else float("inf")


def _attend(call: Callable[..., Any], tensors: list[Tensor], pattern: rh.DilatedPattern, **facts: Any) -> list[Tensor]:
    *inputs, dout = tensors
    leaves = [x.clone().requires_grad_() for x in inputs]
    out, _ = call(*leaves, pattern, **facts)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


# ---- links


def _links(page: Page, device: torch.device, group: dist.ProcessGroup) -> None:
    world = dist.get_world_size(group)
    page.lines += ["", "links, the slowest rank of the median of several:"]
    seconds = _exchange_seconds(MESSAGE, device, group)
    page.lines.append(
        f"  all to all, {MESSAGE >> 20} MiB a rank: {MESSAGE * (world - 1) / world / seconds / 1e9:.2f} GB/s received"
    )
    page.lines.append(f"  all to all, 1 KiB a rank: {_exchange_seconds(1024, device, group) * 1e6:.0f} us")
    page.lines.append("  (ring-hilbert plan --link-gbps takes the first)")


def _exchange_seconds(size: int, device: torch.device, group: dist.ProcessGroup) -> float:
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    payload = torch.zeros(size // world * (world - 1), dtype=torch.uint8, device=device)
    counts = {other: size // world for other in range(world) if other != rank}
    times = []
    for _ in range(REPEATS + 2):
        dist.barrier(group=group)
        began = time.perf_counter()
        collective(payload, counts, counts, communicator(group), "a measured exchange").wait()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return max(_everybody(statistics.median(times[2:]), group))
