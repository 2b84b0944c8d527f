# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's engine: ZeRO 0 to 3 from its own JSON, sequence-parallel groups through an mpu."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from ring_hilbert.integrations.deepspeed import SequenceParallel, loss_for_backward
from ring_hilbert.training.config import RunConfig
from ring_hilbert.training.model import LossModel, for_training
from ring_hilbert.training.optimizer import adamw, as_configured, betas_of, parameter_groups
from ring_hilbert.training.storage.manifest import Manifest, sum_file
from ring_hilbert.training.storage.tensors import INDEX, Reader, not_finite
from ring_hilbert.training.storage.zero import TAG
from ring_hilbert.training.weights import Weights
from ring_hilbert.training.world import World
from ring_hilbert.training.zero_fill import Part, base_optimizer, fill

OURS = "train.micro_batch, train.global_batch_tokens, train.precision and optim"  # what the JSON must not set

REFUSED = ("fp16", "train_batch_size", "optimizer", "scheduler", "data_parallel_size", "sequence_parallel_size")
BUILT_IN = 60.0  # seconds in which an extension of DeepSpeed is usually built


class DeepSpeedEngine:
    """See `Engine`."""

    def __init__(self, skeleton: PreTrainedModel, weights: Weights, config: RunConfig, world: World) -> None:
        deepspeed = import_deepspeed(world)
        settings = deepspeed_settings(config)
        self.config, self.world = config, world
        self.stage = settings["zero_optimization"]["stage"]
        offloads = (settings["zero_optimization"].get(f"offload_{what}") or {} for what in ("optimizer", "param"))
        self.swaps = any(offload.get("device") == "nvme" for offload in offloads)
        self.clip_norm = math.inf if config.optim.clip_norm is None else config.optim.clip_norm
        if self.stage == 3:
            model = LossModel(for_training(_partitioned(deepspeed, weights, settings), config, world.device))
        else:
            skeleton.to_empty(device="cpu")
            skeleton.tie_weights()
            weights.fill(skeleton)
            model = LossModel(skeleton)
        buffers = {name: x.clone() for name, x in model.named_buffers() if x.is_floating_point()}
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=_optimizer(model, config, settings),
            config=settings,
            mpu=None if world.sp_group is None else SequenceParallel(group=world.sp_group),
            dist_init_required=False,
        )
        for (
            name,
            buffer,
        ) in model.named_buffers():  # it casts buffers too, and RoPE's frequencies would be 0.4 % off in bfloat16
            if name in buffers:
                buffer.data = buffers[name].to(buffer.device)
        self.model = self.engine
        if config.train.precision == "bf16" and not self.swaps:
            self._unround(weights)

    def _unround(self, weights: Weights) -> None:
        """Restore the float32 weights' values: DeepSpeed takes them from the model, which it has cast to bfloat16."""
        named = {name: p for name, p in self.engine.module.model.named_parameters() if p.requires_grad}
        for part in weights:
            for name, value in part.items():
                if name in named:  # otherwise a buffer
                    Part(named[name], self.engine).copy("weight", value)

    def backward(self, loss: torch.Tensor) -> None:
        """See `Engine`."""
        self._finish_micro_step()
        self.engine.backward(loss_for_backward(loss, self.engine), scale_wrt_gas=False)
        self._unfinished = True

    def step(self, learning_rate: float) -> float:
        """See `Engine`."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = math.nan
        if self.stage == 0:  # torch's own optimizer, which updates whatever has a gradient
            norm = torch.nn.utils.clip_grad_norm_(self.engine.module.parameters(), self.clip_norm).item()
            if not math.isfinite(norm):
                self.engine.zero_grad()
        self._finish_micro_step()
        return norm if self.stage == 0 else float(self.engine.get_global_grad_norm())

    def gradients(self) -> dict[str, torch.Tensor]:
        """See `Engine`."""
        from deepspeed.utils import safe_get_full_grad

        named = self.engine.module.model.named_parameters()
        return {name: gradient for name, p in named if (gradient := safe_get_full_grad(p)) is not None}

    def prepare_to_save(self) -> None:
        """See `Engine`: there is nothing to prepare, DeepSpeed saves while training waits."""

    def save(self, folder: Path, publish: Callable[[Manifest], None]) -> Future[Any]:
        """See `Engine`: DeepSpeed's own files, which only the same number of ranks and ZeRO stage can load."""
        self.engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)
        paths = self.world.from_main(lambda: sorted(path for path in folder.rglob("*") if path.is_file()))
        with self.world.together():
            mine = paths[self.world.rank :: self.world.size]
            sums = {str(path.relative_to(folder)): sum_file(path) for path in mine}
        files = {name: known for part in self.world.collect(sums) for name, known in part.items()}
        self.world.from_main(lambda: publish(files))
        done: Future[Any] = Future()
        done.set_result(None)
        return done

    def load(self, folder: Path) -> None:
        """See `Engine`."""
        if (folder / INDEX).is_file():
            if self.swaps:
                raise ValueError(
                    f"deepspeed.config: {folder} cannot be loaded with states on NVMe; use the host's memory"
                )
            fill(self.engine, Reader(folder))
        else:
            loaded, _ = self.engine.load_checkpoint(str(folder), tag=TAG)
            if loaded is None:
                raise ValueError(f"checkpoint.dir: DeepSpeed finds no checkpoint in {folder}")
        as_configured(self.engine.optimizer, self.config)

    def bytes_to_save(self) -> int:
        """See `Engine`: float32 weights, two moments, and the weights in the compute dtype."""
        parameters = list(self.engine.module.parameters())
        beside = 0 if self.stage == 0 else parameters[0].element_size()
        return sum(getattr(p, "ds_numel", p.numel()) for p in parameters) * (12 + beside)

    def not_finite(self) -> list[str]:
        """See `Engine`."""
        held = {f"weight.{n}": getattr(p, "ds_tensor", p) for n, p in self.engine.module.model.named_parameters()}
        for number, state in enumerate(base_optimizer(self.engine).state.values()):
            held |= {f"{key} of partition {number}": x for key, x in state.items() if isinstance(x, torch.Tensor)}
        return not_finite(held)

    def whole_state(self) -> dict[str, torch.Tensor]:
        """See `Engine`."""
        from deepspeed.utils import safe_get_full_fp32_param

        state = {}
        for name, parameter in self.engine.module.model.named_parameters():
            value = parameter.detach() if self.stage == 0 else safe_get_full_fp32_param(parameter)
            if self.world.is_main:
                assert value is not None
                state[name] = value.float().cpu()
        return state

    def close(self) -> None:
        """See `Engine`."""
        self.engine.destroy()

    _unfinished = False  # backward was called, but not yet the step that DeepSpeed expects after each

    def _finish_micro_step(self) -> None:
        if self._unfinished:
            self.engine.step()
            self._unfinished = False


def deepspeed_settings(config: RunConfig) -> dict[str, Any]:
    """DeepSpeed's configuration: the run's JSON, completed from the rest of the run's configuration.

    Raises:
        ValueError: if the file cannot be read, has no ZeRO stage, or sets what belongs elsewhere.
    """
    given = config.deepspeed.config
    try:
        settings = json.loads(Path(given).read_text()) if isinstance(given, str) else dict(given)
        stage = settings["zero_optimization"]["stage"]
    except OSError as error:
        raise ValueError(f"deepspeed.config: {error}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"deepspeed.config: {given} is not JSON: {error}") from error
    except (KeyError, TypeError) as error:
        raise ValueError(f"deepspeed.config: {given} has no zero_optimization.stage (0 to 3)") from error
    if config.train.precision == "bf16" and stage == 0:
        raise ValueError(
            "deepspeed.config: ZeRO-0 keeps no float32 weights beside bf16 ones; use stage 1 to 3, or fp32"
        )
    if config.train.precision == "fp64":
        raise ValueError("train.precision fp64 needs engine: torch")
    if config.parallel.dp_replicate > 1:
        raise ValueError("parallel.dp_replicate: DeepSpeed shards over all ranks; use dp_shard, or engine: torch")
    filled = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "gradient_accumulation_steps": config.sequences_per_step // (config.train.micro_batch * config.parallel.dp),
        "gradient_clipping": 0.0
        if stage == 0
        else config.optim.clip_norm or 0.0,  # of ZeRO-0, see DeepSpeedEngine.step
        "bf16": {"enabled": config.train.precision == "bf16"},
        "communication_data_type": "fp32",
        "seq_parallel_communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    wrong = [key for key in (*filled, *REFUSED) if key in settings and settings[key] != filled.get(key)]
    if wrong:
        raise ValueError(f"deepspeed.config: leave out {', '.join(wrong)}: they follow from {OURS}, parallel.sp")
    return {"zero_allow_untested_optimizer": True, "steps_per_print": None, **settings, **filled}


def import_deepspeed(world: World) -> Any:
    """DeepSpeed, set up for this run's device and communication.

    Raises:
        ValueError: if it is not installed, or cannot build its extensions.
    """
    if world.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        scripts = str(Path(sys.executable).parent)  # where ninja is installed
        if scripts not in os.environ["PATH"].split(os.pathsep):
            os.environ["PATH"] = os.pathsep.join((scripts, os.environ["PATH"]))
        if shutil.which("g++") is None and shutil.which("c++") is None:
            raise ValueError(
                "engine: deepspeed builds an extension on the CPU, but there is no g++; install a C++ compiler"
            )
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError(
            f"engine: deepspeed cannot be imported ({error}); pip install 'ring_hilbert[deepspeed]'"
        ) from error
    accelerator: Any = deepspeed.get_accelerator()
    if world.device.type != accelerator.device_name():
        raise ValueError(
            f"engine: deepspeed was told to use {accelerator.device_name()} (DS_ACCELERATOR), this rank has "
            f"{world.device}"
        )
    _warn_of_locks()
    deepspeed.init_distributed(dist_init_required=False)
    return deepspeed


def _warn_of_locks() -> None:
    """Warn of old locks on extensions: DeepSpeed waits for them without a word, for ever if who took one was killed."""
    from torch.utils.cpp_extension import get_default_build_root  # needs setuptools, as DeepSpeed does

    for lock in Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()).glob("**/lock"):
        age = time.time() - lock.stat().st_mtime
        if age > BUILT_IN:
            warnings.warn(
                f"engine: deepspeed may wait for {lock}, which is {age:.0f} s old: a process is building an extension, or was "
                "killed while it did; if so, remove that file",
                stacklevel=3,
            )


def _optimizer(model: LossModel, config: RunConfig, settings: dict[str, Any]) -> torch.optim.Optimizer:
    """AdamW; for offloaded states DeepSpeed's own, which runs on the host."""
    if "offload_optimizer" not in settings["zero_optimization"]:
        return adamw(model, config)
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(
        parameter_groups(model, config), lr=config.optim.lr, betas=betas_of(config), adamw_mode=True
    )


def _partitioned(deepspeed: Any, weights: Weights, settings: dict[str, Any]) -> PreTrainedModel:
    """The model with every parameter partitioned over all ranks from the start."""
    # Values are filled in later; Transformers' initialisation would index embedding rows that are on other ranks.
    with deepspeed.zero.Init(config_dict_or_path=settings), no_init_weights():
        made = type(weights.skeleton)(weights.skeleton.config)
    made.tie_weights()
    named = {**dict(made.named_buffers()), **dict(made.named_parameters())}
    for part in weights:
        whole = [named[name] for name in part]
        with (
            deepspeed.zero.GatheredParameters([t for t in whole if hasattr(t, "ds_id")], modifier_rank=0),
            torch.no_grad(),
        ):
            for tensor, value in zip(whole, part.values(), strict=True):
                if not hasattr(tensor, "ds_id"):  # a buffer, made in the compute dtype
                    tensor.data = value.to(tensor.device)
                elif torch.distributed.get_rank() == 0:
                    tensor.copy_(value)
    return made
