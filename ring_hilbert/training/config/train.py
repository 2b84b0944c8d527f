# SPDX-License-Identifier: Apache-2.0
"""The sections `optim`, `train`, `parallel` and `deepspeed`: how a step is computed."""

from __future__ import annotations

import math
import os
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ring_hilbert.training.config.section import Section


class OptimConfig(Section):
    """AdamW, warm-up and schedule, which spans `decay_steps` (null: train.steps)."""

    lr: float = Field(default=3e-4, gt=0, allow_inf_nan=False)
    warmup_steps: int = Field(default=20, ge=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    decay_steps: int | None = Field(default=None, ge=1)
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)  # the schedule ends at lr * min_lr_ratio
    weight_decay: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    betas: list[float] = Field(default=[0.9, 0.95], min_length=2, max_length=2)
    clip_norm: float | None = Field(default=1.0, gt=0, allow_inf_nan=False)  # of the global gradient; null: no clipping
    max_skipped: int = Field(default=10, ge=0)  # steps in a row without an update, their gradient not being finite

    @model_validator(mode="after")
    def _betas(self) -> OptimConfig:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas need 0 <= beta < 1, got {self.betas}")
        return self


class TrainConfig(Section):
    """`global_batch_tokens` per step over all ranks; `micro_batch` sequences go through the model at once.

    `recompute`: what backward computes again of a layer instead of keeping it: all but attention; all but attention and some
    matrix products (selective, see `ring_hilbert.checkpointing`); or nothing. The first `recompute_layers` layers recompute all in
    any case. `mlp_tiles`: pieces of a rank's rows that go through a layer's MLP one after another. "auto": the fastest that the
    memory plan finds room for, on GPUs and with `log.memory_plan`; elsewhere all, and 1. `memory_gib`: what a rank may fill of its
    GPU; null: all that is free on it when the run starts.
    """

    steps: int = Field(ge=1)
    global_batch_tokens: int = Field(ge=1)
    micro_batch: int = Field(default=1, ge=1)
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"  # bf16 computes in it, on float32 weights; fp64 is for tests
    seed: int = Field(default=0, ge=0)
    # elementwise work: Liger's kernels, compiled layers, or neither; auto: of these on a GPU the first that can be
    fused: Literal["auto", "liger", "compile", "none"] = "auto"
    probe: bool = True  # compare a gradient with the true one before a run over ranks
    checkpoint_activations: bool = True  # false: the older word for recompute: none
    recompute: Literal["all", "selective", "none", "auto"] = "auto"
    recompute_layers: int = Field(default=0, ge=0)
    offload_activations: bool = False  # the inputs of checkpointed layers wait in the host's memory
    mlp_tiles: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    memory_gib: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    @property
    def recomputes(self) -> Literal["all", "selective", "none", "auto"]:
        """`recompute`, or what `checkpoint_activations` says instead."""
        return self.recompute if self.checkpoint_activations else "none"

    @model_validator(mode="after")
    def _recompute(self) -> TrainConfig:
        if not self.checkpoint_activations and self.recompute not in ("none", "auto"):
            raise ValueError(
                f"recompute: {self.recompute} with checkpoint_activations: false, which is recompute: none; leave out one of them"
            )
        if self.offload_activations and self.recomputes not in ("all", "auto"):
            raise ValueError(
                "offload_activations moves the inputs of layers that recompute all, but recompute is "
                f"{self.recomputes}{'' if self.checkpoint_activations else ' (checkpoint_activations: false)'}; use recompute: all"
            )
        if self.recompute_layers and self.recomputes not in ("selective", "none"):
            raise ValueError(
                f"recompute_layers leaves the layers after the first {self.recompute_layers} to recompute: selective or none, but "
                f"that is {self.recomputes}; leave out one of them"
            )
        if self.recomputes == "selective" and self.mlp_tiles not in (1, "auto"):
            raise ValueError(
                f"mlp_tiles: {self.mlp_tiles} computes every piece again, so that what recompute: selective keeps would be of no "
                "use; take mlp_tiles: 1, or recompute: all"
            )
        return self


class ParallelConfig(Section):
    """Ranks: a sequence over `sp`, the batch over `dp_shard` (parameters sharded) x `dp_replicate` (replicated).

    `dp_shard: auto` is what the number of ranks leaves to it, so that a run goes on with more or fewer of them; 1 in a process that
    no launcher started.
    """

    sp: int = Field(default=1, ge=1)
    dp_shard: int = Field(default=1, ge=1)  # auto is replaced before
    dp_replicate: int = Field(default=1, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _auto(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or raw.get("dp_shard") != "auto":
            return raw
        rest = [raw.get(key, 1) for key in ("sp", "dp_replicate")]
        if not all(isinstance(count, int) and count > 0 for count in rest):
            return {**raw, "dp_shard": 1}  # the others are wrong, and are told
        copies, ranks = math.prod(rest), int(os.environ.get("WORLD_SIZE", 0))
        if ranks % copies:
            raise ValueError(
                f"dp_shard: auto needs a multiple of sp * dp_replicate = {copies} ranks, but {ranks} are running; start "
                f"{ranks // copies * copies or copies} or {(ranks // copies + 1) * copies}, or change parallel.sp"
            )
        return {**raw, "dp_shard": max(1, ranks // copies)}

    @property
    def dp(self) -> int:
        """Ranks among which the sequences of a step are divided."""
        return self.dp_shard * self.dp_replicate

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.sp * self.dp


class DeepSpeedConfig(Section):
    """For `engine: deepspeed`: its JSON, a file or a mapping, without what the rest of this configuration says."""

    config: str | dict[str, Any] = {"zero_optimization": {"stage": 1}}
