# SPDX-License-Identifier: Apache-2.0
"""The run configuration: one YAML file, checked in full before anything is built or read.

The models below are the sections of the file, `load_config` is the way in. Unknown keys are refused. Nothing here
builds a model, a dataset or a process group.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError, model_validator

from ring_hilbert.ops.order import TokenOrder
from ring_hilbert.parallel.planning import order_warnings
from ring_hilbert.training.config.data import DataConfig, EvalConfig, SourceConfig
from ring_hilbert.training.config.errors import describe
from ring_hilbert.training.config.model import AttentionConfig, LayerConfig, ModelConfig, OrderConfig
from ring_hilbert.training.config.section import Section
from ring_hilbert.training.config.train import DeepSpeedConfig, OptimConfig, ParallelConfig, TrainConfig
from ring_hilbert.training.config.upkeep import CheckpointConfig, LogConfig, TimeoutsConfig
from ring_hilbert.training.config.yaml_file import read_yaml

__all__ = [
    "AttentionConfig",
    "CheckpointConfig",
    "DataConfig",
    "DeepSpeedConfig",
    "EvalConfig",
    "LayerConfig",
    "LogConfig",
    "ModelConfig",
    "OptimConfig",
    "OrderConfig",
    "ParallelConfig",
    "RunConfig",
    "SourceConfig",
    "TimeoutsConfig",
    "TrainConfig",
    "load_config",
    "load_stages",
]


class RunConfig(Section):
    """A whole run. See the sections."""

    model: ModelConfig
    attention: AttentionConfig
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    train: TrainConfig
    parallel: ParallelConfig = ParallelConfig()
    engine: Literal["torch", "deepspeed"] = "torch"
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    checkpoint: CheckpointConfig
    timeouts: TimeoutsConfig = TimeoutsConfig()
    log: LogConfig

    @property
    def sequences_per_step(self) -> int:
        """Sequences of data.seq_len tokens in one optimizer step, over all ranks and micro-steps."""
        return self.train.global_batch_tokens // self.data.seq_len

    @model_validator(mode="after")
    def _batch(self) -> RunConfig:
        tokens, length = self.train.global_batch_tokens, self.data.seq_len
        if tokens % length:
            near = max(1, round(tokens / length)) * length
            raise ValueError(
                f"train.global_batch_tokens {tokens} is not a multiple of data.seq_len {length}; the nearest is {near}"
            )
        shard, replicate, micro = self.parallel.dp_shard, self.parallel.dp_replicate, self.train.micro_batch
        together = shard * replicate * micro
        if self.sequences_per_step % together:
            near = math.ceil(self.sequences_per_step / together) * together * length
            raise ValueError(
                f"train.global_batch_tokens {tokens} is {self.sequences_per_step} sequences per step, not a multiple "
                f"of dp_shard * dp_replicate * micro_batch = {shard} * {replicate} * {micro} = {together}; "
                f"the next that is: {near} tokens{self._other_dp()}"
            )
        return self

    def _other_dp(self) -> str:
        """The nearest numbers of data-parallel groups that would do with as many tokens, for an error."""
        rounds, rest = divmod(self.sequences_per_step, self.train.micro_batch)
        fitting = [] if rest else [count for count in range(1, rounds + 1) if rounds % count == 0]
        near = [
            max((n for n in fitting if n < self.parallel.dp), default=0),
            min((n for n in fitting if n > self.parallel.dp), default=0),
        ]
        found = " or ".join(str(count) for count in near if count)
        return f"; as many tokens need dp_shard * dp_replicate of {found}" if found else ""

    @model_validator(mode="after")
    def _grid(self) -> RunConfig:
        length = self.data.seq_len
        order = self.attention.order
        if order is not None and order.grid is not None and math.prod(order.grid) != length:
            cells = math.prod(order.grid)
            raise ValueError(
                f"attention.order.grid {order.grid} has {cells} cells, data.seq_len is {length}: make them equal"
            )
        return self

    @model_validator(mode="after")
    def _order(self) -> RunConfig:
        attention = self.attention
        order = None if attention.order is None else TokenOrder(**attention.order.model_dump(exclude_none=True))
        own = {layer.segment_shift for layer in attention.layers.values() if not layer.dense}
        for shift in sorted({attention.segment_shift} | {shift for shift in own if shift is not None}):
            for fault in order_warnings(attention.pattern(shift), order, True, self.data.seq_len):
                raise ValueError(f"attention: {fault}")
        return self

    def identity(self) -> dict[str, Any]:
        """What a checkpoint and the run that resumes it must agree on: all that decides the sequence of losses.

        Left out: how the work is spread and executed (parallel, engine, micro_batch, recompute, strategy,
        backend, layout), how long it goes on (steps), how often it is evaluated, and where files are. What the data hold is for a
        checkpoint to say (`content.contents`), wherever they lie and however they are read.
        """
        train = {"global_batch_tokens", "precision", "seed"}
        data = {"sources": {"__all__": {"weight"}}, "seq_len": True, "packing": True}
        include = {"model": True, "attention": True, "data": data, "optim": True, "train": train}
        exclude = {"attention": {"strategy", "backend", "layout"}, "optim": {"max_skipped"}}
        return self.model_dump(mode="json", include=include, exclude=exclude)

    def digest(self) -> str:
        """SHA-256 of `identity()`, hexadecimal: equal on every machine and in every process."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()


def load_config(path: str | Path, overrides: list[str] | None = None, stage: str | None = None) -> RunConfig:
    """Read and validate a YAML file with `key.sub=value` overrides laid over it (`yaml_file.read_yaml` says how).

    Relative paths in the file are relative to the working directory. Of a file with stages, `stage` is one (default: the last).

    Raises:
        ValueError: the file or an override cannot be read; a key is unknown (the message names it, the valid keys and
            the nearest match), is missing or has a wrong value; values contradict each other.
    """
    stages = load_stages(path, overrides)
    if stage is None:
        return list(stages.values())[-1]
    if stage not in stages:
        raise ValueError(f"config {path} has no stage {stage!r}; it has {', '.join(stages) or 'none'}")
    return stages[stage]


def load_stages(path: str | Path, overrides: list[str] | None = None) -> dict[str, RunConfig]:
    """The stages of a file by name, as `load_config`; a file without stages is one, named "".

    Each has folders of its own below checkpoint.dir and log.dir, and starts from the weights and the optimizer's state that the
    one before it ended with.
    """
    stages: dict[str, RunConfig] = {}
    for name, raw in read_yaml(path, overrides or []).items():
        try:
            config = RunConfig.model_validate(raw)
        except ValidationError as error:
            where = f", stage {name}," if name else ""
            raise ValueError(f"config {path}{where} is not valid:\n{describe(error, RunConfig, raw)}") from None
        if name:
            before = list(stages.values())[-1].checkpoint.dir if stages else config.checkpoint.init
            folders = {"dir": str(Path(config.checkpoint.dir) / name), "init": before}
            update = {
                "checkpoint": config.checkpoint.model_copy(update=folders),
                "log": config.log.model_copy(update={"dir": str(Path(config.log.dir) / name)}),
            }
            config = config.model_copy(update=update)
        stages[name] = config
    return stages
