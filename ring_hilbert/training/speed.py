# SPDX-License-Identifier: Apache-2.0
"""Where a step's time goes: FLOPs against the device's, seconds by part, and a trace on request."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import PretrainedConfig

from ring_hilbert.integrations.transformers_config import heads_of, order_of, pattern_of
from ring_hilbert.parallel.planning import plan
from ring_hilbert.training.breakdown import breakdown
from ring_hilbert.training.config import RunConfig
from ring_hilbert.training.world import World

# Dense bfloat16 TFLOP/s by a substring of the device's name (vendors' data sheets, SXM where there are several).
PEAK_TFLOPS = {"B200": 2250, "H200": 989, "H100": 989, "A100": 312}


def step_flops(config: RunConfig, hf_config: PretrainedConfig, parameters: int) -> float:
    """Model FLOPs of one step over all ranks: 6 per parameter and token, and `attention_flops`.

    Recomputation is not counted (the convention of PaLM, appendix B). `parameters`: those in matrix products, without embeddings.
    """
    return 6.0 * parameters * config.train.global_batch_tokens + attention_flops(config, hf_config)


def attention_flops(config: RunConfig, hf_config: PretrainedConfig) -> float:
    """FLOPs of attention's pairs in one step over all ranks and layers, backward 2.5 times forward."""
    text = hf_config.get_text_config(decoder=True)
    heads, kv_heads, dim = heads_of(text)
    patterns = [pattern_of(text, layer) for layer in range(text.num_hidden_layers)]
    forward = {
        pattern: sum(
            plan(
                pattern, config.data.seq_len, 1, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, dtype=torch.bfloat16,
                order=order_of(text),
            ).all_flops
        )
        for pattern in set(patterns)
    }  # fmt: skip
    return 3.5 * sum(forward[pattern] for pattern in patterns) * config.sequences_per_step


def multiplying_parameters(model: torch.nn.Module) -> int:
    """The model's parameters without its input embeddings, unless these are tied to the output layer and multiply there."""
    count = sum(parameter.numel() for parameter in model.parameters())
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight  # type: ignore[operator]
    return count if tied else count - model.get_input_embeddings().weight.numel()  # type: ignore[operator]


def peak_flops(config: RunConfig, world: World) -> float | None:
    """FLOP/s of all ranks together, from `log.peak_tflops` or the device's name; None if neither says."""
    per_rank = config.log.peak_tflops
    if per_rank is None and world.device.type == "cuda":
        name = torch.cuda.get_device_name(world.device)
        per_rank = next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)
    return None if per_rank is None else per_rank * 1e12 * world.size


class Watch:
    """Profiles the steps that the configuration names: `log.breakdown_every` and `log.profile`."""

    def __init__(self, config: RunConfig, world: World) -> None:
        self.config, self.world = config, world
        self.breakdown: dict[str, float] = {}

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Wraps step `number` (from 1). Afterwards `breakdown` has its seconds by part, if measured."""
        log, self.breakdown = self.config.log, {}
        traced = log.profile is not None and log.profile[0] <= number <= log.profile[1]
        if not traced and (log.breakdown_every is None or number % log.breakdown_every):
            yield
            return
        cuda = self.world.device.type == "cuda"
        if not cuda:  # where Kineto has no device that could fail, it still reports its own progress on stderr
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        else:  # wait for the update of the step before, which nobody waited for
            torch.cuda.synchronize(self.world.device)
        start = time.perf_counter()
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
            yield
            if cuda:
                torch.cuda.synchronize(self.world.device)
            seconds = time.perf_counter() - start
        self.breakdown = breakdown(profiler.events() or [], seconds, cuda=cuda)
        if traced:
            folder = Path(log.dir) / "trace"
            folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(folder / f"step_{number}_rank_{self.world.rank}.json"))
