# SPDX-License-Identifier: Apache-2.0
"""The run configuration: one YAML file, checked in full before anything is built or read.

The models below are the sections of the file, `load_config` is the way in. Unknown keys are refused. Nothing here
builds a model, a dataset or a process group.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ring_hilbert.ops.order import TokenOrder
from ring_hilbert.ops.pattern import DilatedPattern
from ring_hilbert.parallel.planning import order_warnings
from ring_hilbert.training.config_errors import describe
from ring_hilbert.training.config_yaml import read_yaml


class Section(BaseModel):
    """A mapping of the YAML file: unknown keys are refused, types are not coerced, values are fixed after loading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ModelConfig(Section):
    """The Transformers model: a configuration to initialise (`config`, with a `model_type`) or a folder (`path`).

    `changes`: keys of the folder's configuration that get other values, `rope_parameters` for a longer context for instance.
    """

    config: dict[str, Any] | None = None
    path: str | None = None
    changes: dict[str, Any] = {}

    @model_validator(mode="after")
    def _one_of(self) -> ModelConfig:
        if (self.config is None) == (self.path is None):
            raise ValueError("give exactly one of `config` (a mapping with a model_type) and `path` (a model folder)")
        if self.changes and self.path is None:
            raise ValueError("`changes` are of the configuration in `path`; with `config`, write them there")
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ValueError(f"`config` needs a model_type, e.g. model_type: llama; it has {sorted(self.config)}")
        return self


class OrderConfig(Section):
    """Token order: a curve over blocks of `block` tokens, or over one `grid` of exactly seq_len cells."""

    curve: Literal["hilbert", "morton", "peano", "snake", "raster"] = "hilbert"
    block: int | None = Field(default=None, ge=1)
    grid: list[int] | None = Field(default=None, min_length=2, max_length=3)

    @model_validator(mode="after")
    def _one_of(self) -> OrderConfig:
        if (self.block is None) == (self.grid is None):
            raise ValueError("give exactly one of `block` (1-D data) and `grid` (2 or 3 sides)")
        if self.grid is not None and min(self.grid) < 1:
            raise ValueError(f"`grid` needs positive sides, got {self.grid}")
        return self


class LayerConfig(Section):
    """What one layer does differently: its own shifts, only the first so many `branches`, or plain dense attention."""

    dense: bool = False
    head_shift: int | None = None
    segment_shift: int | None = None
    branches: int | None = Field(default=None, ge=1)


class AttentionConfig(Section):
    """Pattern, order and execution of the attention: the keys of `config.ring_hilbert` in a Transformers model."""

    segment_lengths: list[int | None] = Field(min_length=1)  # null: the whole sequence
    dilation_rates: list[int] = Field(min_length=1)
    offset_rule: Literal["modulo", "block"] = "modulo"
    head_shift: int | Literal["auto"] = 0
    segment_shift: int = 0
    order: OrderConfig | None = None
    layers: dict[int, LayerConfig] = {}
    strategy: Literal["exchange", "ring", "ulysses", "auto"] = "auto"
    backend: Literal["triton", "torch", "auto"] = "auto"
    layout: Literal["contiguous", "zigzag"] = "contiguous"

    @field_validator("layers", mode="before")
    @classmethod
    def _layer_numbers(cls, layers: object) -> object:
        """Layer numbers arrive as strings from the command line and from JSON."""
        if isinstance(layers, dict):
            return {int(n) if isinstance(n, str) and n.isdecimal() else n: layer for n, layer in layers.items()}
        return layers

    @model_validator(mode="after")
    def _branches(self) -> AttentionConfig:
        lengths, rates = self.segment_lengths, self.dilation_rates
        if len(lengths) != len(rates):
            raise ValueError(
                "segment_lengths and dilation_rates are one pair per branch, "
                f"got {len(lengths)} lengths {lengths} and {len(rates)} rates {rates}"
            )
        for branch, (w, r) in enumerate(zip(lengths, rates, strict=True)):
            if r < 1 or (w is not None and not r <= w):
                raise ValueError(f"branch {branch} needs 1 <= dilation rate <= segment length, got {r} and {w}")
        for number, layer in self.layers.items():
            if layer.branches is not None and (layer.dense or layer.branches > len(lengths)):
                raise ValueError(
                    f"layers.{number} keeps {layer.branches} of {len(lengths)} branches{' and is dense' * layer.dense}; keep 1 to "
                    f"{len(lengths)} of them, or make it dense"
                )
        if self.offset_rule == "block" and self.head_shift not in (0, "auto"):
            raise ValueError(f"offset_rule: block allows only head_shift 0 or auto, got {self.head_shift}; use modulo")
        return self

    def to_mapping(self) -> dict[str, Any]:
        """The value of `config.ring_hilbert`: plain lists, dicts, scalars; layer numbers as strings, as in JSON."""
        mapping = self.model_dump(exclude={"order", "layers"})
        mapping["order"] = None if self.order is None else self.order.model_dump(exclude_none=True)
        mapping["layers"] = {str(n): layer.model_dump(exclude_unset=True) for n, layer in sorted(self.layers.items())}
        return mapping


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


class SourceConfig(Section):
    """Documents to train on: files, folders and globs (a folder means every file below it).

    `exclude` holds globs relative to the folder in `path` (for a glob: to the part before its first wildcard); a
    match on a folder leaves out all below it. `weight`: the source gives weight / sum of weights of the training
    tokens, whatever its size. `field`: where JSON values and Parquet rows hold a document's text; meta.text if it is nested.
    `format`: "auto" goes by the name: .jsonl, .ndjson, .jsonlines, .json and .parquet, .pq have rows, any other file is one
    document; all but Parquet may have .gz, .bz2, .xz or .zst behind. What then does not look like one document is refused: JSON
    lines, NUL characters, .csv and .tsv. Else `format` is what all files of the source hold, whatever their names.
    """

    path: list[str] = Field(min_length=1)  # a single string is also accepted
    exclude: list[str] = []
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    field: str = "text"
    format: Literal["auto", "text", "json", "parquet"] = "auto"

    _path = field_validator("path", mode="before")(_as_list)


class EvalConfig(Section):
    """Documents to evaluate on, every `every` steps: those in `path`, or a `share` of the documents of all sources.

    They are never trained on: neither the files matched here, nor any document of the same tokens, wherever it lies. Which
    documents a share takes is decided by hashes of their tokens, so that it is the same ones however files are moved, renamed
    and joined. `sequences` caps an evaluation at that many sequences, taken evenly from the whole set (null: all of it).
    """

    path: list[str] | None = Field(default=None, min_length=1)  # a single string is also accepted
    share: float | None = Field(default=None, gt=0, lt=1)
    exclude: list[str] = []
    field: str = "text"
    format: Literal["auto", "text", "json", "parquet"] = "auto"
    every: int = Field(default=50, ge=1)
    sequences: int | None = Field(default=None, ge=1)

    _path = field_validator("path", mode="before")(_as_list)

    @model_validator(mode="after")
    def _one_of(self) -> EvalConfig:
        if (self.path is None) == (self.share is None):
            raise ValueError(
                "give exactly one of `path` (documents of their own) and `share` (of those in the sources)"
            )
        return self


class DataConfig(Section):
    """Documents, tokenizer and packing.

    `tokenizer`: "bytes" (ByT5's ids: byte + 3), or a folder for AutoTokenizer. `bos`: a document begins with the BOS token (true),
    with nothing (false), or as the tokenizer by itself begins a text (null). `encoding_errors`: what is not UTF-8, and a lone
    surrogate in JSON, is refused (strict) or read as U+FFFD (replace).

    `packing`: "concat" joins documents and cuts the whole into sequences, without padding; "best_fit" cuts none but those longer
    than a sequence, and pads. `prepared`: a folder that `ring-hilbert prepare-data` wrote; neither files nor tokenizer are needed
    then, what is not said here is as it was prepared (sources and their weights, tokenizer, bos, eval), and what is said must be
    so, but for weights. Without it a run prepares for itself, in `$HF_HOME/ring_hilbert`. `workers`: processes that tokenise
    (null: one per core).
    """

    sources: list[SourceConfig] | None = Field(default=None, min_length=1)
    tokenizer: str = "bytes"
    bos: bool | None = None
    seq_len: int = Field(ge=2)
    packing: Literal["concat", "best_fit"] = "concat"
    encoding_errors: Literal["strict", "replace"] = "strict"
    eval: EvalConfig | None = None
    prepared: str | None = None
    workers: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _from_somewhere(self) -> DataConfig:
        if self.sources is None and self.prepared is None:
            raise ValueError("give `sources` to read, or in `prepared` a folder that `ring-hilbert prepare-data` wrote")
        return self


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


class CheckpointConfig(Section):
    """Where checkpoints go, after how many steps, and how many are kept.

    `trust`: load DeepSpeed's checkpoints, which are pickles and could run any code. `init`: the checkpoint.dir of another run of
    the same model, whose weights and optimizer state a run without checkpoints of its own starts with. `changed_data`: a run on
    other data than its checkpoint, more data included, is refused, or accepted: it goes on with the sequence of the same number in
    the data as they are now, and of the epoch under way documents may be read twice or never.

    `asynchronous`: steps go on while a checkpoint is written (engine torch), for which the host keeps a copy of weights and
    moments. `verify`: read every file before a checkpoint is loaded, and compare checksums; sizes are compared anyway.
    `on_damage`: a damaged newest checkpoint is refused, or the one before it is taken (previous) and the damaged one renamed.
    `resume`: go back to the checkpoint of this step; newer ones are renamed.
    """

    dir: str
    every: int = Field(default=50, ge=1)
    keep: int = Field(default=2, ge=1)
    trust: bool = False
    init: str | None = None
    changed_data: Literal["refuse", "accept"] = "refuse"
    asynchronous: bool = True
    verify: bool = True
    on_damage: Literal["refuse", "previous"] = "refuse"
    resume: int | None = Field(default=None, ge=1)  # null: the newest


class TimeoutsConfig(Section):
    """Seconds after which a rank that waits for another one says for which, and ends the run.

    `start`: until all ranks are there, and between signs of life until the first step. `step`: within a step or an evaluation; more
    than the longest step takes. `data`: without a sign of life of a rank that prepares data, which may take as long as it likes.
    `save`: while a checkpoint or the model is written.
    """

    start: float = Field(default=600, gt=0)
    step: float = Field(default=600, gt=0)
    data: float = Field(default=600, gt=0)
    save: float = Field(default=3600, gt=0)

    @property
    def longest(self) -> float:
        """What no collective may take longer than, should the watchdog itself fail."""
        return max(self.start, self.step, self.data, self.save) + 60


class LogConfig(Section):
    """Where metrics, plots and TensorBoard events go, and what is looked at.

    `wandb`: the project of Weights & Biases to log to as well, if it is installed. `breakdown_every`: how often a step is
    profiled for the seconds of its parts (`ring_hilbert.training.breakdown`). `profile`: first and last step of which a trace is
    written. `peak_tflops`: of one rank, for the MFU where the device's name does not say it. `memory_plan`: plan before the first
    step how much memory a rank will need, and refuse a run that does not fit its GPU. `straggler_factor`, `straggler_steps`: name a
    rank that computes so many times as long as the median rank in so many steps in a row.
    """

    dir: str
    tensorboard: bool = True
    wandb: str | None = None
    breakdown_every: int | None = Field(default=50, ge=1)
    profile: list[int] | None = Field(default=None, min_length=2, max_length=2)
    peak_tflops: float | None = Field(default=None, gt=0)
    memory_plan: bool = True
    straggler_factor: float = Field(default=1.5, gt=1)
    straggler_steps: int = Field(default=10, ge=1)


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
            pattern = DilatedPattern(
                tuple(attention.segment_lengths), tuple(attention.dilation_rates), segment_shift=shift
            )
            for fault in order_warnings(pattern, order, True, self.data.seq_len):
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
    """Read and validate a YAML file with `key.sub=value` overrides laid over it (`config_yaml.read_yaml` says how).

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
