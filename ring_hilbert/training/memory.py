# SPDX-License-Identifier: Apache-2.0
"""How much memory a rank will need, found by running a whole step on fake tensors, without computing or allocating anything.

The torch engine, the model, its checkpointing and its loss are those of the run, with a fake process group; a dispatch mode adds
up live storage. What the attention holds internally comes from `attention_memory`; the share of driver and NCCL from measurements.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.common_utils import get_untyped_storages
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils._triton import has_triton_package
from transformers import PretrainedConfig

from ring_hilbert.parallel.layout import Layout
from ring_hilbert.parallel.sharding import shard_batch
from ring_hilbert.training.attention_memory import held_by_attention
from ring_hilbert.training.config import ParallelConfig, RunConfig
from ring_hilbert.training.engine_deepspeed import deepspeed_settings
from ring_hilbert.training.engine_torch import TorchEngine
from ring_hilbert.training.model import build_skeleton, check_model, model_config
from ring_hilbert.training.weights import decoder_layers
from ring_hilbert.training.world import lay_world

GIB = 2**30
STARTED = GIB * 6 // 10  # GPU memory of a process outside PyTorch's allocator, measured on an H100: before any kernel
CONTEXT = GIB * 13 // 10  # the same in training
COMMUNICATOR = GIB // 2  # per NCCL communicator; a conservative guess
SLACK = 0.02  # fraction of allocated memory lost to fragmentation
ALIKE = {  # for what attention holds
    "checkpoint_activations": True, "recompute": "all", "recompute_layers": 0, "offload_activations": False, "mlp_tiles": 1,
}  # fmt: skip
OUTSIDE = "model_parameters", "host", "offloaded"  # fields of a plan that are not bytes of the device
_ATTENTION = torch.ops.ring_hilbert.attention.default, torch.ops.ring_hilbert.attention_backward.default


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the rank that needs most, at the peak of a step.

    `gradients` are those of earlier micro-steps; `activations` what forward saves for backward; `temporary` all else alive at the
    peak, including new gradients; `exchange` what the attention then holds internally, of other ranks' rows and for its kernels;
    `walks` the kernels' tables; `contexts` driver and NCCL; `slack` what the allocator cannot use. `host` and `offloaded`
    are not part of the peak but in main memory: the copy from which checkpoints are written in the background, and the inputs of
    layers and ZeRO's states that are offloaded.
    """

    model_parameters: int  # their number, over all ranks
    host: int
    offloaded: int
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    temporary: int
    exchange: int
    walks: int
    contexts: int
    slack: int

    @property
    def allocated(self) -> int:
        """The peak of PyTorch's allocator."""
        return self.total - self.contexts - self.slack

    @property
    def total(self) -> int:
        """The peak on the device."""
        return sum(self._parts().values())

    def __str__(self) -> str:
        named = ", ".join(f"{name} {value / GIB:.2f}" for name, value in self._parts().items())
        count = f"{self.model_parameters / 1e6:,.1f} M parameters"
        wanted = {"checkpoints": self.host, "what is offloaded": self.offloaded}
        host = " and ".join(f"{value / GIB:.2f} GiB for {what}" for what, value in wanted.items() if value)
        host = f"; main memory per rank: {host}" if host else ""
        return f"{self.total / GIB:.2f} GiB per rank at the peak of a step ({named}); {count}{host}"

    def _parts(self) -> dict[str, int]:
        return {key: value for key, value in asdict(self).items() if key not in OUTSIDE}


def plan_memory(config: RunConfig, *, cuda: bool) -> MemoryPlan:
    """The plan of a run on GPUs or CPUs, from a process without a process group (it makes a fake one, and closes it).

    With `engine: deepspeed` activations are those of the torch engine, and states those of its ZeRO stage.

    Raises:
        ValueError: if the configuration cannot be run.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    hf_config = model_config(config)
    check_model(hf_config)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=config.parallel.world_size)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _simulate(config, hf_config, cuda)
    finally:
        dist.destroy_process_group()


def _simulate(config: RunConfig, hf_config: PretrainedConfig, cuda: bool) -> MemoryPlan:
    control = dist.group.WORLD
    assert control is not None
    world = lay_world(torch.device("cpu"), config.parallel, control)
    rows = max(Layout.even(config.data.seq_len, config.parallel.sp, config.attention.layout).lengths)
    batch = shard_batch({"input_ids": torch.zeros(config.train.micro_batch, rows, dtype=torch.int64)})
    prepared = batch.pop("ring_hilbert")
    alike = config.train.model_copy(update=ALIKE)
    walks, inside = held_by_attention(config.model_copy(update={"train": alike}).model_dump_json(), cuda)
    # Compiled layers count as uncompiled ones, which hold more.
    skeleton = build_skeleton(config, hf_config, torch.device("cuda") if cuda else None, kinds=("liger",))
    skeleton.fused = None  # pyright: ignore[reportArgumentType]  # the loss by its own passes: nothing is compiled
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, _nothing_launched():
        engine = TorchEngine(skeleton, None, config, world)
        parameters = list(engine.model.parameters())
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        engine.optimizer.step()  # makes its state
        if config.sequences_per_step == config.train.micro_batch * config.parallel.dp:
            engine.optimizer.zero_grad()
        fakes = {key: mode.from_tensor(value) for key, value in batch.items()}
        prepared.position_ids = fakes["position_ids"]
        held = _Held(dict(zip(_ATTENTION, inside, strict=True)))
        states = [
            held.count(tensors)
            for tensors in (
                [*parameters, *engine.model.buffers()],
                [parameter.grad for parameter in parameters],
                list(engine.optimizer.state.values()),
            )
        ]
        with held:
            loss = engine.model(**fakes, ring_hilbert=prepared).sum()
            activations = held.now - sum(states)
            engine.backward(loss)
            del loss
            engine.optimizer.step()
        temporary, exchange = held.most - sum(states) - activations, held.most_inside - held.most
        count = sum(parameter.numel() for parameter in parameters)
        layers = len(decoder_layers(engine.model))
    host, offloaded = states[0] + states[2] if config.checkpoint.asynchronous else 0, 0
    if config.engine == "deepspeed":
        host = 0
        states, offloaded = _zero_states(config, count)
    if config.train.offload_activations:
        # Here the host is the same device, so offloaded tensors were counted: all layers' inputs but two in transit.
        width = hf_config.get_text_config(decoder=True).hidden_size * (2 if config.train.precision == "bf16" else 4)
        size = config.train.micro_batch * rows * width
        activations -= max(0, layers - 2) * size
        offloaded += layers << (size - 1).bit_length()  # PyTorch pins powers of two
    allocated = sum(states) + activations + temporary + exchange + walks
    contexts = CONTEXT + communicators(config.parallel) if cuda else 0
    slack = int(SLACK * allocated) if cuda else 0
    held_on_device = activations, temporary, exchange, walks, contexts, slack
    return MemoryPlan(count, host, offloaded, states[0], states[1], states[2], *held_on_device)


def communicators(parallel: ParallelConfig) -> int:
    """Bytes of NCCL's communicators: for all ranks, parameter shards, and a sequence's rows."""
    return COMMUNICATOR * (2 + (parallel.sp > 1)) if parallel.world_size > 1 else 0


@contextmanager
def _nothing_launched() -> Iterator[None]:
    """Triton kernels, of Liger here, compute nothing: what their callers allocate for them is what counts."""
    if not has_triton_package():
        yield
        return
    from triton.runtime.jit import KernelInterface

    def nothing(*_: Any, **__: Any) -> None: ...

    with patch.object(KernelInterface, "__getitem__", lambda *_: nothing):
        yield


class _Held(TorchDispatchMode):
    """Bytes of live storages, and their peak, as operators run on fake tensors.

    `inside`: bytes that some operators hold beyond arguments and results; `most_inside` includes them, `most` does not.
    """

    def __init__(self, inside: Mapping[Any, int]) -> None:
        super().__init__()
        self.inside = inside
        self.now = self.most = self.most_inside = 0
        self._sizes: dict[int, tuple[int, weakref.ref[Any]]] = {}

    def count(self, tensors: Any) -> int:
        """Register existing tensors, nested in any way; returns how many bytes are new."""
        before = self.now
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                for storage in get_untyped_storages(tensor):
                    self._take(storage)
        return self.now - before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count(result)
        self._most(self.inside.get(func, 0))
        return result

    def __enter__(self) -> _Held:
        self._resize, held = torch.UntypedStorage.resize_, self

        def resize_(self: torch.UntypedStorage, size: int) -> Any:  # how FSDP frees gathered parameters
            result = held._resize(self, size)
            if id(self) in held._sizes:
                held._gone(id(self))
                held._take(self)
            held._most(0)
            return result

        torch.UntypedStorage.resize_ = resize_
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize
        super().__exit__(*error)

    def _take(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes(), weakref.ref(storage, lambda _: self._gone(key))
            self.now += storage.nbytes()

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key)[0]

    def _most(self, inside: int) -> None:
        self.most, self.most_inside = max(self.most, self.now), max(self.most_inside, self.now + inside)


def _zero_states(config: RunConfig, count: int) -> tuple[list[int], int]:
    """Bytes of parameters, of gradients (float32), and of AdamW with the float32 copy that ZeRO updates, on a rank's device; and
    of what ZeRO keeps of these in main memory, where AdamW has gradients of its own.
    """
    zero, ranks = deepspeed_settings(config)["zero_optimization"], config.parallel.world_size
    stage, width = zero["stage"], 2 if config.train.precision == "bf16" else 4
    parameters = width * count // (ranks if stage == 3 else 1)
    gradients = 4 * count // (ranks if stage >= 2 else 1)
    optimizer = 12 * count // ranks if stage else 8 * count
    where = {what: (zero.get(f"offload_{what}") or {}).get("device", "none") for what in ("param", "optimizer")}
    offloaded = parameters if where["param"] == "cpu" else 0
    offloaded += optimizer + gradients if where["optimizer"] == "cpu" else 0
    here = [
        parameters if where["param"] == "none" else 0,
        gradients,
        optimizer if where["optimizer"] == "none" else 0,
    ]
    return here, offloaded
