# SPDX-License-Identifier: Apache-2.0
"""The training loops of other libraries over the same few documents, interrupted where a test wants, on ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback, TrainingArguments

import ring_hilbert as rh
from ring_hilbert.integrations.sequence_parallel import SequenceParallel, ShardedLoader
from ring_hilbert.integrations.trainer import SequenceParallelTrainer
from tests.harness.deepspeed_rank import deepspeed_rank

VOCAB, LENGTH, DOCUMENTS, MICRO_STEPS, EPOCHS = 61, 24, 13, 2, 4
ORDER = {"curve": "hilbert", "block": 4}


@dataclass
class Log:
    """The first token of every sequence that was trained on, which numbers it, and the loss of every micro-step, over all ranks."""

    documents: list[list[int]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def add(self, batch: dict[str, Any], loss: torch.Tensor) -> None:
        """A micro-step of this rank, whose loss is its part."""
        total = loss.detach().clone()
        dist.all_reduce(total)
        self.documents.append(rh.gather_rows(batch["input_ids"], batch["ring_hilbert"])[:, 0].tolist())
        self.losses.append(total.item())


class Interrupted(Exception):
    """Here a machine went away."""


def documents(count: int = DOCUMENTS, length: int = LENGTH) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(count, VOCAB, (count, length), generator=generator)
    rows[:, 0] = torch.arange(count)
    return [{"input_ids": row} for row in rows]


class Stream(IterableDataset):
    """The documents one after another, starting from a different one in every epoch."""

    def __init__(self) -> None:
        self.rows, self.begin = documents(), 0

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for at in range(DOCUMENTS):
            yield self.rows[(self.begin + at) % DOCUMENTS]


class EpochStream(Stream):
    """As PyTorch's samplers want it."""

    def set_epoch(self, epoch: int) -> None:
        """Begin elsewhere."""
        self.begin = 5 * epoch


class SizedStream(EpochStream):
    """Of which the Trainer counts epochs."""

    def __len__(self) -> int:
        return DOCUMENTS


class SeededStream(Stream):
    """As Accelerate wants it, which seeds `generator` where there is no `set_epoch`."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator()

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        self.begin = int(torch.randint(DOCUMENTS, (), generator=self.generator))
        return super().__iter__()


STREAMS = {"stream": EpochStream, "sized": SizedStream, "seeded": SeededStream}


def tiny_model() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("llama", vocab_size=VOCAB, **sizes)
    config.ring_hilbert = {"segment_lengths": [8, None], "dilation_rates": [1, 2], "order": ORDER}
    return AutoModelForCausalLM.from_config(config)


@contextmanager
def accelerate_rank(rank: int, world_size: int) -> Iterator[None]:
    """What torchrun sets for Accelerate; afterwards nothing of what it keeps of this process: the next test has another group."""
    from accelerate.state import AcceleratorState, GradientState

    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    names |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "ACCELERATE_USE_CPU": "1"}
    os.environ.update({name: str(value) for name, value in names.items()})
    try:
        yield
    finally:
        for name in names:
            del os.environ[name]
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def trainer_loop(
    rank: int, world_size: int, folder: Path, stop: int, *, sp_size: int, data: str | None = None, **options: Any
) -> Log:
    """As `loop`, of the Trainer."""
    log = Log()

    class Recording(SequenceParallelTrainer):
        def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **keywords: Any) -> Any:
            loss: Any = super().compute_loss(model, inputs, *arguments, **keywords)
            log.add(inputs, loss / self.args.world_size)
            return loss

    class Interrupting(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == stop:
                raise Interrupted

    with accelerate_rank(rank, world_size):
        settings = {"num_train_epochs": EPOCHS, "gradient_accumulation_steps": MICRO_STEPS, **options}
        settings |= {"save_steps": stop if stop > 0 else 1000, "learning_rate": 1e-2, "per_device_train_batch_size": 1}
        arguments = TrainingArguments(str(folder), use_cpu=True, report_to="none", disable_tqdm=True, **settings)
        found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        dataset = documents() if data is None else STREAMS[data]()
        dist.barrier()  # everybody has looked
        trainer = Recording(tiny_model(), arguments, train_dataset=dataset, sp_size=sp_size, callbacks=[Interrupting()])
        with suppress(Interrupted):
            trainer.train(resume_from_checkpoint=str(found[-1]) if found else None)
    return log


def accelerate_loop(
    rank: int, world_size: int, folder: Path, stop: int, *, sp_size: int, data: str | None = None
) -> Log:
    """As `loop`, with Accelerate."""
    from accelerate import Accelerator

    from ring_hilbert.integrations.accelerate import loss_for_backward

    with accelerate_rank(rank, world_size):
        accelerator = Accelerator(gradient_accumulation_steps=MICRO_STEPS)
        loader = sharded(SequenceParallel(sp_size), data)
        model = tiny_model()
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
        accelerator.register_for_checkpointing(loader)
        if folder.exists():
            accelerator.load_state(str(folder))

        def backward(loss: torch.Tensor) -> None:
            with accelerator.accumulate(model):
                accelerator.backward(loss_for_backward(loss, accelerator))
                optimizer.step()
                optimizer.zero_grad()

        return loop(model, loader, backward, stop, lambda: accelerator.save_state(str(folder)))


def deepspeed_loop(
    rank: int, world_size: int, folder: Path, stop: int, *, sp_size: int, data: str | None = None, stage: int = 2
) -> Log:
    """As `loop`, with DeepSpeed."""
    import deepspeed

    from ring_hilbert.integrations.deepspeed import loss_for_backward

    with deepspeed_rank(rank):
        deepspeed.init_distributed(dist_init_required=False)
        mpu = SequenceParallel(sp_size)
        loader, model = sharded(mpu, data), tiny_model()
        settings: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": MICRO_STEPS}
        settings["zero_optimization"] = {"stage": stage}
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, mpu=mpu)
        if folder.exists():
            _, state = engine.load_checkpoint(str(folder))
            assert state is not None
            loader.load_state_dict(state["loader"])

        def backward(loss: torch.Tensor) -> None:
            engine.backward(loss_for_backward(loss, engine), scale_wrt_gas=False)
            engine.step()

        def save() -> None:
            engine.save_checkpoint(str(folder), client_state={"loader": loader.state_dict()})

        log = loop(engine, loader, backward, stop, save)
        engine.destroy()
    return log


def sharded(groups: SequenceParallel, data: str | None) -> ShardedLoader:
    """A loader of this group's share of the documents; of all of them, "shuffled" or as a stream."""
    rows: Any = documents()
    if data is None:
        loader = DataLoader(rows, sampler=DistributedSampler(rows, groups.dp_size, groups.dp_rank, seed=3))
    else:
        loader = DataLoader(rows, shuffle=True) if data == "shuffled" else DataLoader(STREAMS[data]())
    return ShardedLoader(loader, groups.group, order=rh.TokenOrder(**ORDER))


def loop(model: Any, loader: ShardedLoader, backward: Any, stop: int, save: Any) -> Log:
    """`EPOCHS` epochs from where `loader` is, in steps of `MICRO_STEPS` sequences a group; `save` and end after `stop` steps."""
    log, step = Log(), 0
    for _ in range(loader.epoch, EPOCHS):
        for micro_batches in zip(*[iter(loader)] * MICRO_STEPS, strict=False):
            targets = sum((batch["shift_labels"] != -100).sum() for batch in micro_batches)
            dist.all_reduce(targets)
            for batch in micro_batches:
                labels = batch.pop("shift_labels").flatten()
                logits = model(**batch).logits.flatten(0, 1).float()
                loss = F.cross_entropy(logits, labels, reduction="sum") / targets
                backward(loss)
                log.add(batch, loss)
            step += 1
            if step == stop:
                save()
                return log
    return log
