# SPDX-License-Identifier: Apache-2.0
"""How much memory a rank will need, found by going through a whole step of the run without computing or allocating anything.

The torch engine, the model, its checkpointing and its loss are those of the run, on fake tensors and a process group that sends
nothing; PyTorch's memory tracker adds up what lives. What the attention holds of other ranks' rows comes from its plan.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from pydantic import TypeAdapter, ValidationError
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import PretrainedConfig

from ring_hilbert.integrations.transformers_config import order_of, pattern_of
from ring_hilbert.kernels.tiles import tiles_for
from ring_hilbert.ops.core import Shard
from ring_hilbert.ops.nesting import chains
from ring_hilbert.ops.walk import plan_rows
from ring_hilbert.parallel.layout import Layout
from ring_hilbert.parallel.planning import plan
from ring_hilbert.parallel.sharding import shard_batch
from ring_hilbert.training.config import RunConfig
from ring_hilbert.training.engine_deepspeed import deepspeed_settings
from ring_hilbert.training.engine_torch import TorchEngine
from ring_hilbert.training.model import build_skeleton, check_model, model_config
from ring_hilbert.training.world import lay_world

GIB = 2**30
HOPPER = 90  # the compute capability that walks are planned for: the plan's process sees no device
PATIENCE = 300.0  # seconds; the other ranks wait meanwhile


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of the rank that needs most, at the peak of a step.

    `exchange` is what the attention of a layer has from other ranks; `temporary` what lives shorter than a layer; `walks` the
    tables of the Triton kernels, those of all layers and what one launch makes of them. `host` is no part of the peak: main memory
    for the copy that checkpoints are written from behind the steps.
    """

    model_parameters: int  # how many there are, over all ranks
    host: int
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    temporary: int
    exchange: int
    walks: int

    @property
    def total(self) -> int:
        """The peak."""
        return sum(self._parts().values())

    def __str__(self) -> str:
        named = ", ".join(f"{name} {value / GIB:.2f}" for name, value in self._parts().items())
        count = f"{self.model_parameters / 1e6:,.1f} M parameters"
        host = f"; {self.host / GIB:.2f} GiB of main memory per rank for checkpoints" if self.host else ""
        return f"{self.total / GIB:.2f} GiB per rank at the peak of a step ({named}); {count}{host}"

    def _parts(self) -> dict[str, int]:
        return {key: value for key, value in asdict(self).items() if key not in ("model_parameters", "host")}


def plan_memory(config: RunConfig) -> MemoryPlan:
    """The plan of a run, from a process without a process group (it makes one that sends nothing, and closes it).

    With `engine: deepspeed` activations are those of the torch engine, and states what its ZeRO stage keeps.

    Raises:
        ValueError: the configuration cannot be run.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    hf_config = model_config(config)
    check_model(hf_config)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=config.parallel.world_size)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _simulate(config, hf_config)
    finally:
        dist.destroy_process_group()


def _simulate(config: RunConfig, hf_config: PretrainedConfig) -> MemoryPlan:
    control = dist.group.WORLD
    assert control is not None
    world = lay_world(torch.device("cpu"), config.parallel, control)
    rows = max(Layout.even(config.data.seq_len, config.parallel.sp, config.attention.layout).lengths)
    batch = shard_batch({"input_ids": torch.zeros(config.train.micro_batch, rows, dtype=torch.int64)})
    prepared = batch.pop("ring_hilbert")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        engine = TorchEngine(build_skeleton(config, hf_config), None, config, world)
        for parameter in engine.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        engine.optimizer.step()  # makes its state
        engine.optimizer.zero_grad()
        fakes = {key: mode.from_tensor(value) for key, value in batch.items()}
        prepared.position_ids = fakes["position_ids"]
        tracker = MemTracker()
        tracker.track_external(engine.model, engine.optimizer)
        with tracker:
            engine.backward(engine.model(**fakes, ring_hilbert=prepared).sum())
        found = {
            kind.name: value
            for kind, value in tracker.get_tracker_snapshot("peak")[world.device].items()
            if kind != "Total"
        }
        count = sum(parameter.numel() for parameter in engine.model.parameters())
    activations = found["ACT"]
    if config.train.offload_activations:
        # Here the host is the same device, so that what waits there was counted: all layers' inputs but two in transit.
        text = hf_config.get_text_config(decoder=True)
        size = 2 if config.train.precision == "bf16" else 4
        activations -= max(0, text.num_hidden_layers - 2) * config.train.micro_batch * rows * text.hidden_size * size
    states = found["PARAM"], found["GRAD"], found["OPT"]
    host = found["PARAM"] + found["OPT"] if config.checkpoint.asynchronous else 0
    if config.engine == "deepspeed":
        states, host = _zero_states(config, count), 0
    rest = found["TEMP"] + found["BUFFER"] + found["OTH"]
    return MemoryPlan(
        count, host, *states, activations, rest, _from_others(config, hf_config), _walks(config, hf_config)
    )


def _zero_states(config: RunConfig, count: int) -> tuple[int, int, int]:
    """Bytes of parameters, of gradients (float32), and of AdamW with the float32 copy that ZeRO updates, on a rank's device."""
    zero, ranks = deepspeed_settings(config)["zero_optimization"], config.parallel.world_size
    stage, width = zero["stage"], 2 if config.train.precision == "bf16" else 4
    parameters = 0 if "offload_param" in zero else width * count // (ranks if stage == 3 else 1)
    gradients = 4 * count // (ranks if stage >= 2 else 1)
    optimizer = 0 if "offload_optimizer" in zero else (12 * count // ranks if stage else 8 * count)
    return parameters, gradients, optimizer


def _from_others(config: RunConfig, hf_config: PretrainedConfig) -> int:
    """The most that the attention of any layer holds on any rank beyond its own rows."""
    text, ranks = hf_config.get_text_config(decoder=True), config.parallel.sp
    heads, kv_heads, dim, dtype = _attention_sizes(config, text)
    most = 0
    for pattern in {pattern_of(text, layer) for layer in range(text.num_hidden_layers)}:
        made = plan(
            pattern, config.data.seq_len, ranks, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, dtype=dtype,
            batch_size=config.train.micro_batch, layout=config.attention.layout, order=order_of(text),
            strategy=config.attention.strategy,
        )  # fmt: skip
        most = max(most, *(made.remote_bytes(rank) for rank in range(ranks)))
    return most


def _walks(config: RunConfig, hf_config: PretrainedConfig) -> int:
    """The static walks of all layers on the first rank, and a schedule: one is made here, the others are as large."""
    text = hf_config.get_text_config(decoder=True)
    _, kv_heads, dim, dtype = _attention_sizes(config, text)
    if torch.version.cuda is None or config.attention.backend == "torch":
        return 0
    rows = Layout.even(config.data.seq_len, config.parallel.sp, config.attention.layout)
    shard = Shard(rows.chunks(0), rows.seq_len, order_of(text))
    patterns = [chains(pattern_of(text, layer), kv_heads) for layer in range(text.num_hidden_layers)]
    different = {tuple(of): of for of in patterns}
    tile = tiles_for("forward", HOPPER, dim, dtype)[0]
    on_host = (torch.from_numpy(x) for x in (shard.rows(), shard.places()))
    shift = pattern_of(text, 0).segment_shift
    walk = plan_rows(next(iter(different.values())), shift, *on_host, block_outer=tile.block_outer)
    return len(different) * walk.nbytes + walk.schedule_nbytes


def _attention_sizes(config: RunConfig, text: PretrainedConfig) -> tuple[int, int, int, torch.dtype]:
    """H, Hkv, D and the dtype of q."""
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return heads, kv_heads, dim, torch.bfloat16 if config.train.precision == "bf16" else torch.float32


class Planning:
    """The plan of a run, made by another process while this one gets ready."""

    def __init__(self, config: RunConfig) -> None:
        environment = {
            key: value for key, value in os.environ.items() if key not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")
        }
        environment["CUDA_VISIBLE_DEVICES"] = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ring_hilbert.training.memory"], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert self.process.stdin is not None
        self.process.stdin.write(config.model_dump_json())
        self.process.stdin.close()
        self.process.stdin = None

    def result(self) -> MemoryPlan | None:
        """Wait for the plan; None if it cannot be made, or takes too long."""
        try:
            answer, _ = self.process.communicate(timeout=PATIENCE)
            return TypeAdapter(MemoryPlan).validate_json(answer.splitlines()[-1]) if answer else None
        except (subprocess.TimeoutExpired, ValidationError):
            self.close()
            return None

    def close(self) -> None:
        """End the other process."""
        self.process.kill()
        self.process.wait()


if __name__ == "__main__":
    made = plan_memory(RunConfig.model_validate_json(sys.stdin.read()))
    sys.stdout.write(TypeAdapter(MemoryPlan).dump_json(made).decode())
