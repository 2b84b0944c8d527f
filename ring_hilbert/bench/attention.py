# SPDX-License-Identifier: Apache-2.0
"""Time and memory of attention on one device: this operator, dense SDPA, the published LongNet algorithm, FlexAttention.

All contenders of a problem (length, mask, dtype) run alternately in one process, forward (without gradients) and forward +
backward, and medians are kept. The operator's batch is prepared once, outside the measured time; in curve order its rows are
already permuted, as in training.

Efficiency is floor / measured. The floor is the FLOPs of the allowed pairs, summed over branches, at the rate of dense
attention in the same run with the same mask and length; above --dense-limit at its rate for the longest length measured, which
the row names (floor_length). Deduplicated visits can take it past 1.

Memory is the peak of PyTorch's allocator in forward + backward, with q, k, v and dout, and is given relative to q, k, v, out,
their gradients and lse.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import ring_hilbert as rh
from ring_hilbert.bench.contenders import Contender, Problem, contenders
from ring_hilbert.bench.timing import Times, interleaved, peak_bytes
from ring_hilbert.ops.curves import CURVES

DTYPES = ("float16", "bfloat16", "float32", "float64")
FORWARD, BOTH = "forward", "forward_backward"
Record = dict[str, Any]


def rows_or_all(text: str) -> int | None:
    """A number of rows, or None for "all" of the sequence."""
    return None if text == "all" else int(text)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags of `ring-hilbert bench attention`."""
    what = parser.add_argument_group("what is computed")
    what.add_argument(
        "--lengths", type=int, nargs="+", default=[2048, 4096, 8192], metavar="S", help="rows; default 2048 4096 8192"
    )
    what.add_argument(
        "--segment-lengths", type=rows_or_all, nargs="+", default=[1024, 2048, 4096, 8192], metavar="W",
        help="or 'all', cut to the length of the sequence; default 1024 2048 4096 8192",
    )  # fmt: skip
    what.add_argument(
        "--dilation-rates", type=int, nargs="+", default=[1, 2, 4, 8], metavar="R", help="default 1 2 4 8"
    )
    what.add_argument("--batch", type=int, default=1, metavar="B", help="default 1")
    what.add_argument("--heads", type=int, default=8, metavar="H", help="default 8")
    what.add_argument("--kv-heads", type=int, metavar="HKV", help="default: as many as --heads")
    what.add_argument("--head-dim", type=int, default=64, metavar="D", help="default 64")
    what.add_argument(
        "--dtype",
        choices=DTYPES,
        nargs="+",
        metavar="T",
        help=f"some of {', '.join(DTYPES)}; default float32, on CUDA devices bfloat16",
    )
    what.add_argument("--causal", action=argparse.BooleanOptionalAction, help="default: both")
    what.add_argument(
        "--order", choices=CURVES, nargs="+", default=["raster", "hilbert"], metavar="CURVE",
        help=f"orders of the rows for this operator: some of {', '.join(CURVES)}; default raster hilbert",
    )  # fmt: skip
    what.add_argument(
        "--block",
        type=rows_or_all,
        default=0,
        metavar="N",
        help="tokens that a curve orders at a time, or 'all'; default: the shortest segment length",
    )
    how = parser.add_argument_group("how")
    how.add_argument("--backend", default="auto", help="of this operator, as in dilated_attention")
    how.add_argument("--threads", type=int, help="CPU threads of PyTorch")
    how.add_argument("--repeats", type=int, default=7, help="rounds that are timed; medians are kept; default 7")
    how.add_argument(
        "--dense-limit",
        type=int,
        metavar="S",
        help="no dense attention and no FlexAttention above this length; default 16384, on CUDA devices 131072",
    )
    how.add_argument("--plot", type=Path, metavar="FILE", help="draw time and memory against length: .png or .svg")


def rows(chosen: argparse.Namespace, device: torch.device) -> Iterator[Record]:
    """One record per contender and problem, as the flags say; lengths ascend within a dtype.

    Raises:
        ValueError: for an invalid pattern, shape or backend.
    """
    for name, least in (("repeats", chosen.repeats), ("threads", chosen.threads), ("lengths", min(chosen.lengths))):
        if least is not None and least < 1:
            raise ValueError(f"--{name} must be at least 1, got {least}")
    if chosen.plot is not None:
        from ring_hilbert.bench.picture import check_path  # Matplotlib and tqdm are in an extra

        check_path(chosen.plot)
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    for dtype in chosen.dtype or ["bfloat16" if device.type == "cuda" else "float32"]:
        past: dict[bool, Past] = {}
        for length in sorted(set(chosen.lengths)):
            for causal in [True, False] if chosen.causal is None else [chosen.causal]:
                problem = _problem(chosen, length, causal, getattr(torch, dtype), device)
                measured = list(_measure(problem, chosen))
                yield from past.setdefault(causal, Past()).records(problem, measured, chosen.repeats)


def _problem(
    chosen: argparse.Namespace, length: int, causal: bool, dtype: torch.dtype, device: torch.device
) -> Problem:
    clipped = tuple(length if w is None else min(w, length) for w in chosen.segment_lengths)
    pattern = rh.DilatedPattern(clipped, tuple(chosen.dilation_rates))
    kv_heads = chosen.heads if chosen.kv_heads is None else chosen.kv_heads
    return Problem(pattern, length, causal, dtype, device, chosen.batch, chosen.heads, kv_heads, chosen.head_dim)


def _order(curve: str, block: int | None, problem: Problem) -> rh.TokenOrder | None:
    """The order of the rows; `block` 0 is the shortest segment length, None the whole sequence."""
    shortest = min(w or problem.length for w in problem.pattern.segment_lengths)
    tokens = problem.length if block is None else block or shortest
    return None if curve == "raster" else rh.TokenOrder(curve, block=min(tokens, problem.length))


# ---- measuring


@dataclass(frozen=True)
class Measured:
    """A contender's times by pass, and the bytes that it holds in forward + backward beyond its inputs."""

    contender: Contender
    times: dict[str, Times]
    bytes: int


def _measure(problem: Problem, chosen: argparse.Namespace) -> Iterator[Measured]:
    """Warm up all contenders, then time them alternately."""
    from tqdm import tqdm

    if problem.device.type == "cuda":
        torch.compiler.reset()  # otherwise graphs of earlier problems count towards FlexAttention's recompilation limit
    limit = chosen.dense_limit
    limit = (131072 if problem.device.type == "cuda" else 16384) if limit is None else limit
    orders = [_order(curve, chosen.block, problem) for curve in chosen.order]
    name = f"{problem.length} rows, {'causal' if problem.causal else 'full'}, {str(problem.dtype)[6:]}"
    x = problem.tensors()
    ready: list[tuple[Contender, int]] = []
    calls: dict[str, Callable[[], object]] = {}
    for contender in contenders(problem, orders, chosen.backend, limit):
        if isinstance(contender, str):
            tqdm.write(f"{name}: {contender}")
            continue
        passes = _passes(contender, x)
        try:
            for call in passes.values():
                call()  # compiles, plans, tunes
            ready.append((contender, peak_bytes(passes[BOTH], problem.device)))
        except RuntimeError as failure:  # out of memory, or a baseline that does not compile: the others continue
            if contender.name == "ring_hilbert" and not isinstance(failure, torch.OutOfMemoryError):
                raise
            tqdm.write(f"{name}: {contender.label} left out: {type(failure).__name__}: {str(failure).splitlines()[0]}")
            continue
        calls |= {f"{contender.label}, {pass_}": call for pass_, call in passes.items()}
    with tqdm(total=chosen.repeats * len(calls), desc=name, leave=False, disable=None) as bar:

        def tick(call: str) -> None:
            bar.set_postfix_str(call, refresh=False)
            bar.update()

        times = interleaved(calls, chosen.repeats, problem.device, tick)
    for contender, held in ready:
        yield Measured(contender, {pass_: times[f"{contender.label}, {pass_}"] for pass_ in (FORWARD, BOTH)}, held)


def _passes(contender: Contender, x: dict[str, torch.Tensor]) -> dict[str, Callable[[], object]]:
    """Forward without gradients, and forward + backward, of one contender."""
    inputs = (x["q"], x["k"], x["v"])

    def forward() -> object:
        with torch.no_grad():
            return contender.attend(*inputs)

    def both() -> object:
        return torch.autograd.grad(contender.attend(*inputs), inputs, x["dout"])

    return {FORWARD: forward, BOTH: both}


# ---- figures


@dataclass
class Past:
    """Measurements at shorter lengths with the same mask and dtype."""

    dense: tuple[int, Measured] | None = None
    medians: dict[tuple[str, int], float] = field(default_factory=dict)

    def records(self, problem: Problem, measured: Sequence[Measured], repeats: int) -> Iterator[Record]:
        """A record for each contender, with its ratios to the others and to half the length."""
        present = {m.contender.name: m for m in measured if m.contender.order == "raster"}
        if "dense" in present:
            self.dense = problem.length, present["dense"]
        for m in measured:
            self.medians[m.contender.label, problem.length] = m.times[BOTH].median
            yield _facts(problem, m, repeats) | self._ratios(problem, m, present)

    def _ratios(self, problem: Problem, m: Measured, present: dict[str, Measured]) -> Record:
        median = m.times[BOTH].median
        longnet = present.get("longnet")
        raster = None if m.contender.order == "raster" else present.get(m.contender.name)
        half = self.medians.get((m.contender.label, problem.length // 2)) if problem.length % 2 == 0 else None
        return {
            "floor_length": self.dense[0] if self.dense else "",
            "efficiency_forward": self._efficiency(m, FORWARD),
            "efficiency_forward_backward": self._efficiency(m, BOTH),
            "speed_vs_longnet": _ratio(longnet and longnet.times[BOTH].median, median),
            "time_vs_raster": _ratio(median, raster and raster.times[BOTH].median),
            "time_vs_half_length": _ratio(median, half),
        }

    def _efficiency(self, m: Measured, pass_: str) -> str:
        """Backward has 2.5 times the FLOPs of forward for all contenders, so the factor cancels."""
        if self.dense is None:
            return ""
        yardstick = self.dense[1]
        floor = yardstick.times[pass_].median * m.contender.flops / yardstick.contender.flops
        return _ratio(floor, m.times[pass_].median)


def _facts(problem: Problem, m: Measured, repeats: int) -> Record:
    """The columns that depend on this measurement alone."""
    peak = problem.input_bytes + m.bytes
    record: Record = {
        "length": problem.length,
        "causal": problem.causal,
        "dtype": str(problem.dtype).removeprefix("torch."),
        "batch": problem.batch,
        "heads": problem.heads,
        "kv_heads": problem.kv_heads,
        "head_dim": problem.head_dim,
        "segment_lengths": " ".join(map(str, problem.pattern.segment_lengths)),
        "dilation_rates": " ".join(map(str, problem.pattern.dilation_rates)),
        "contender": m.contender.name,
        "order": m.contender.order,
        "backend": m.contender.backend,
        "threads": torch.get_num_threads() if problem.device.type == "cpu" else "",
        "malloc_tunables": "GLIBC_TUNABLES" in os.environ,
        "repeats": repeats,
    }
    for pass_, times in m.times.items():
        record |= {f"{pass_}_ms{suffix}": f"{ms:.3f}" for suffix, ms in zip(("", "_min", "_max"), times, strict=True)}
    return record | {
        "peak_mib": f"{peak / 2**20:.2f}",
        "peak_vs_least": _ratio(peak, problem.least_bytes),
        "gflops": f"{m.contender.flops / 1e9:.3f}",
        "executed_share": "" if m.contender.executed is None else _ratio(m.contender.executed, m.contender.flops),
    }


def _ratio(above: float | None, below: float | None) -> str:
    return "" if above is None or not below else f"{above / below:.3f}"
