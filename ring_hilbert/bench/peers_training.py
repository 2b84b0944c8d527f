# SPDX-License-Identifier: Apache-2.0
"""Training over ranks: with this operator, and with dense causal attention by PyTorch's `context_parallel`.

Model, FSDP2, optimizer, precision and loss are the trainer's in both; in both, attention results are kept and the rest of a layer
is recomputed. The peer's attention is `scaled_dot_product_attention`, over ranks by `context_parallel` with its own balancing of
the causal mask; its layers are compiled. With one dense branch both are the same model, as their first losses confirm.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor.experimental import context_parallel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from ring_hilbert.bench.timing import peak_bytes, seconds
from ring_hilbert.integrations.transformers_config import order_of
from ring_hilbert.training.batches import Batches
from ring_hilbert.training.config import RunConfig
from ring_hilbert.training.engine_torch import TorchEngine
from ring_hilbert.training.fitting import planned, settled
from ring_hilbert.training.model import build_skeleton, checkpoint_layers, initial_weights, make_model, model_config
from ring_hilbert.training.readback import read_later
from ring_hilbert.training.step import accumulate
from ring_hilbert.training.weights import decoder_layers
from ring_hilbert.training.world import World, open_world

OURS, THEIRS = "ring_hilbert", "torch context_parallel"
SDPA = "ring_hilbert_bench_sdpa"
WARM = 2  # steps
_KERNELS = [
    getattr(torch.ops.aten, f"_scaled_dot_product_{name}_attention").default for name in ("cudnn", "flash", "efficient")
]


def rows(config: RunConfig, device: torch.device, steps: int, compiled: bool) -> Iterator[dict[str, Any]]:
    """A record per contender, on rank 0: the median step, and the peak of PyTorch's allocator."""
    with open_world(config.parallel) as world:
        with planned(config, world) as fitted:
            fit = world.from_main(fitted)
        ours = settled(config) if fit is None else fit.settle(config)
        theirs = f"{THEIRS}, {'cuDNN' if device.type == 'cuda' else 'CPU'}{', compiled' if compiled else ''}, FSDP2"
        for name, contender in ((theirs, _Peer(config, world, compiled)), (f"{OURS}, FSDP2", _Ours(ours, world))):
            found = contender.run(device, steps)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            if world.is_main:
                yield {"contender": name, **found}


class _Ours:
    """Steps of the trainer."""

    def __init__(self, config: RunConfig, world: World) -> None:
        self.config, self.world = config, world
        self.hf_config = model_config(config)
        self.losses: list[float] = []

    def run(self, device: torch.device, steps: int) -> dict[str, Any]:
        """Times and losses of `steps` steps after WARM."""
        try:
            peak = self.world.gather(peak_bytes(self._warm_up, device)).max().item()
            times = [seconds(self.step, device) for _ in range(steps)]
        except torch.OutOfMemoryError:
            self.engine = None
            return {"seconds": None, "peak_gib": None, "loss": None}
        self.engine = None
        slowest = self.world.gather(statistics.median(times)).max().item()
        return {"seconds": slowest, "peak_gib": peak / 2**30, "loss": self.losses[0]}

    def _warm_up(self) -> None:
        self.engine: TorchEngine | None = self.make()
        for _ in range(WARM):
            self.step()

    def make(self) -> TorchEngine:
        """The engine."""
        data = _Sequences(self.config, self.hf_config.vocab_size)
        self.batches = Batches(data, self.config, order_of(self.hf_config), self.world)
        weights = initial_weights(self.config, self.hf_config)
        return TorchEngine(build_skeleton(self.config, self.hf_config), weights, self.config, self.world)

    def step(self) -> None:
        """One step on one sequence, a different one each time."""
        assert self.engine is not None
        number = len(self.losses)
        found = read_later(accumulate(self.engine, self.batches.of(number, number + 1), self.world))
        self.batches.read_ahead(number + 1, number + 2)
        self.engine.step(self.config.optim.lr)
        self.losses.append(found()[0])


class _Peer(_Ours):
    """Steps of the same model, dense and causal, under `context_parallel`."""

    def __init__(self, config: RunConfig, world: World, compiled: bool) -> None:
        super().__init__(config, world)
        self.compiled = compiled

    def make(self) -> TorchEngine:
        """The engine: FSDP2 as in the trainer."""
        AttentionInterface.register(SDPA, _sdpa)
        AttentionMaskInterface.register(SDPA, lambda **_: None)
        weights = initial_weights(self.config, self.hf_config)
        with torch.device("meta"):
            model = make_model(self.hf_config, attn_implementation=SDPA).train()
        # All of a layer but its attention, as the trainer does.
        checkpoint_layers(model, lambda: create_selective_checkpoint_contexts(_KERNELS))
        for layer in decoder_layers(model) if self.compiled else ():
            layer.compile()
        self.data = _Sequences(self.config, self.hf_config.vocab_size)
        return TorchEngine(model, weights, self.config, self.world)

    def step(self) -> None:
        """One step on one sequence."""
        assert self.engine is not None and self.world.mesh is not None
        ids = torch.from_numpy(self.data[len(self.losses)]["input_ids"])[None].to(self.world.device)
        labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], dim=1)
        batch = {
            "input_ids": ids,
            "position_ids": torch.arange(ids.shape[1], device=ids.device)[None],
            "shift_labels": labels,
        }
        with ExitStack() as stack:
            for context in self._contexts(batch):
                stack.enter_context(context)
            loss = self.engine.model(**batch).sum() / (self.config.data.seq_len - 1)
            self.engine.backward(loss)
        self.engine.step(self.config.optim.lr)
        self.losses.append(self.world.sum(loss.detach().double()).item())

    def _contexts(self, batch: dict[str, Tensor]) -> Iterator[AbstractContextManager[Any]]:
        assert self.world.mesh is not None
        if self.world.device.type == "cuda":
            yield sdpa_kernel(SDPBackend.CUDNN_ATTENTION)
        if self.world.size > 1:
            tensors = list(batch.values())
            yield context_parallel(
                self.world.mesh["shard"],
                buffers=tensors,
                buffer_seq_dims=[1] * len(tensors),
                no_restore_buffers=set(tensors),
            )


def _sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface; `context_parallel` replaces the function called here, for equal heads of k and q."""
    del module, attention_mask
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling).transpose(1, 2), None


class _Sequences:
    """Numbered sequences of random tokens, of one document each."""

    def __init__(self, config: RunConfig, vocab: int) -> None:
        self.length, self.vocab = config.data.seq_len, vocab

    def __len__(self) -> int:
        return 2**20

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        ids = np.random.default_rng(number).integers(3, self.vocab, self.length)
        return {"input_ids": ids, "document_ids": np.zeros(self.length, np.int64)}
