# SPDX-License-Identifier: Apache-2.0
"""Whether a run fits the memory of its devices, and with which settings: resolves "auto", and advises if nothing fits.

Settings are tried on the memory plan, from the fastest to the slowest, in a separate process while the run starts up, because it
needs a different kind of process group.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.distributed as dist
from pydantic import TypeAdapter, ValidationError

from ring_hilbert.training.config import ParallelConfig, RunConfig
from ring_hilbert.training.memory import GIB, STARTED, MemoryPlan, communicators, plan_memory
from ring_hilbert.training.model import model_config
from ring_hilbert.training.world import World

PATIENCE = 300.0  # seconds; the other ranks wait meanwhile
SPARE = 0.05  # fraction of the memory that "auto" leaves free
# The same for what is kept optionally: closer to the limit, the allocator's searches cost what keeping saves.
SPARE_TO_KEEP = 0.15
TILES = (1, 2, 4, 8, 16)
TILES_COST = {2: "about 2 %", 8: "about 4 %"}  # measured with the 1B model on an H100, as the other costs below
OFFLOAD_COST = "about 10 % more time, and room in the host's memory"
Plan = Callable[[RunConfig], MemoryPlan]


@dataclass(frozen=True)
class Fitted:
    """The `train` settings of a run, with its memory plan; `refusal`: why it cannot run, if it cannot."""

    train: dict[str, Any]
    plan: MemoryPlan
    refusal: str | None = None

    def settle(self, config: RunConfig) -> RunConfig:
        """`config` with these settings."""
        return _with(config, **self.train)

    def taken(self, config: RunConfig) -> str:
        """The plan, and the choices made where `config` says auto."""
        asked = {"recompute": config.train.recomputes, "recompute_layers": config.train.recompute_layers}
        asked["mlp_tiles"] = config.train.mlp_tiles
        chosen = {key: value for key, value in self.train.items() if asked[key] != value}
        named = ", ".join(f"train.{key}={value}" for key, value in chosen.items())
        return f"{self.plan}{'; taken: ' if named else ''}{named}"


@contextmanager
def planned(config: RunConfig, world: World) -> Iterator[Callable[[], Fitted | None]]:
    """The result of `fit` for this run, computed while the block runs. All ranks call it, before they allocate anything.

    Yields a function for rank 0 that waits for it. Without `log.memory_plan`, or if no plan can be made, it returns None.
    """
    room = world.gather(_room_on(world.device, config.parallel)).min().item()
    cuda = _on_gpu(world.device)
    planning = (
        Planning(config, int(room) if math.isfinite(room) else None, cuda=cuda)
        if world.is_main and config.log.memory_plan
        else None
    )

    def fitted() -> Fitted | None:
        found = None if planning is None else planning.result()
        assert not isinstance(found, str)
        return found

    try:
        yield fitted
    finally:
        if planning is not None:
            planning.close()


@contextmanager
def out_of_memory(config: RunConfig, fitted: Fitted | None) -> Iterator[None]:
    """Turns out-of-memory in the block into an error that gives the plan and settings that need less.

    Raises:
        ValueError: instead of `torch.OutOfMemoryError`.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        first = str(error).split(". ")[0]
        plan = "" if fitted is None else f" The memory plan was {fitted.plan}."
        less = Planning(config, None, cuda=True, only_advice=True).result()
        raise ValueError(f"out of memory: {first}.{plan} {less or ''}") from error


def _on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def _room_on(device: torch.device, parallel: ParallelConfig) -> float:
    """Bytes of a GPU that this process may use, including those it already has; infinity elsewhere."""
    if device.type != "cuda":
        return math.inf
    connected = dist.group.WORLD is not None and dist.group.WORLD.bound_device_id is not None
    contexts = STARTED + (communicators(parallel) if connected else 0)
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) + contexts


def settled(config: RunConfig) -> RunConfig:
    """`config` with "auto" resolved for unknown memory."""
    train = config.train
    return _with(
        config,
        recompute="all" if train.recomputes == "auto" else train.recomputes,
        mlp_tiles=1 if train.mlp_tiles == "auto" else train.mlp_tiles,
    )


def fit(config: RunConfig, room: int | None, *, cuda: bool) -> Fitted:
    """Settings for `config` on devices with `room` bytes per rank (None: not known); `train.memory_gib` may lower it.

    Raises:
        ValueError: if the configuration cannot run on any device.
    """
    if config.train.memory_gib is not None and cuda:
        room = min(int(config.train.memory_gib * GIB), room or sys.maxsize)
    plan = partial(_planned, cuda=cuda)
    chosen = settled(config)
    if room is None:
        return _fitted(chosen, plan(chosen))
    enough, tried = room * (1 - SPARE), chosen
    several = config.train.mlp_tiles == "auto" and chosen.train.recompute == "all"
    for tiles in TILES if several else (chosen.train.mlp_tiles,):
        try:
            tried = _with(chosen, mlp_tiles=tiles)
            needed = plan(tried).total
        except (ValueError, TypeError):
            if tiles == TILES[0] or not several:
                raise
            break  # these layers have no MLP of a single tensor
        if needed <= enough:
            chosen = tried
            if tiles == 1 and config.train.recomputes == "auto" and not config.train.offload_activations:
                chosen = _keeping(chosen, plan, room * (1 - SPARE_TO_KEEP))
            return _fitted(chosen, plan(chosen))
        if needed <= room and (tiles == TILES[-1] or not several):
            return _fitted(tried, plan(tried))  # as requested, or the best there is with less to spare
    return _fitted(chosen, plan(chosen), _refusal(chosen, plan, room))


def advice(config: RunConfig) -> str:
    """Changes of a settled `config` that would need at least a tenth less of a GPU, and the time that each costs."""
    plan = partial(_planned, cuda=True)
    return _advice(config, plan, 0.9 * plan(config).total)


def _planned(config: RunConfig, cuda: bool) -> MemoryPlan:
    return _plan(_with(config, memory_gib=None).model_dump_json(), cuda)


@lru_cache(maxsize=64)
def _plan(config: str, cuda: bool) -> MemoryPlan:
    return plan_memory(RunConfig.model_validate_json(config), cuda=cuda)


def _keeping(config: RunConfig, plan: Plan, room: float) -> RunConfig:
    """`config`, which fits, recomputing less if that also fits: nothing, or selectively in as many of the last layers as possible.

    A GiB kept by selective recomputation saves two to three times as much time as one kept by none (1B model, H100).
    """
    nothing, selective = _with(config, recompute="none"), _with(config, recompute="selective")
    if plan(nothing).total <= room:
        return nothing
    layers = model_config(config).get_text_config(decoder=True).num_hidden_layers
    base, most = plan(config).total, plan(selective).total
    first = math.ceil(layers * (most - room) / (most - base)) if most > base else 0  # linear in the layers that keep
    for count in range(max(0, first), layers):
        tried = _with(selective, recompute_layers=count)
        if plan(tried).total <= room:
            return tried
    return config


def _refusal(config: RunConfig, plan: Plan, room: float) -> str:
    return f"memory: {room / GIB:.1f} GiB are available per rank, but it needs {plan(config)}. {_advice(config, plan, room)}"


def _advice(config: RunConfig, plan: Plan, room: float) -> str:
    told = list[tuple[int, str, str]]()
    for changes, cost, changed in _alternatives(config):
        with suppress(ValueError, TypeError):  # this model, or this layout, cannot
            told.append((plan(changed).total, changes, cost))
    fits = [f"{changes} ({total / GIB:.1f} GiB, {cost})" for total, changes, cost in told if total <= room]
    if fits:
        return "What would fit: " + "; ".join(fits)
    least, changes, _ = min(told, default=(plan(config).total, "what it is now", ""))
    return f"The nearest: {changes}, {least / GIB:.1f} GiB; or more ranks (parallel.sp), a shorter data.seq_len, or a smaller model"


def _alternatives(config: RunConfig) -> Iterator[tuple[str, str, RunConfig]]:
    """Changes that need less memory, the time that each costs, and the configuration with it; fastest first."""
    train, parallel = config.train, config.parallel
    assert isinstance(train.mlp_tiles, int)
    half = train.micro_batch // 2
    if half and config.sequences_per_step % (parallel.dp * half) == 0:
        yield f"train.micro_batch={half}", "as many tokens in more micro-steps", _with(config, micro_batch=half)
    weaker, said = dict[str, Any](), ""
    if train.recompute != "all":
        weaker = {"recompute": "all", "recompute_layers": 0, "checkpoint_activations": True}
        said = f"train.recompute=all {'' if train.checkpoint_activations else 'train.checkpoint_activations=true '}"
        yield said.strip(), "up to a tenth more time a step", _with(config, **weaker)
    for tiles in (2, 8):
        if tiles > train.mlp_tiles:
            yield (
                f"{said}train.mlp_tiles={tiles}",
                f"{TILES_COST[tiles]} more time",
                _with(config, mlp_tiles=tiles, **weaker),
            )
    if not train.offload_activations:
        for tiles in sorted({train.mlp_tiles, max(8, train.mlp_tiles)}):
            more = f"train.mlp_tiles={tiles} " if tiles > train.mlp_tiles else ""
            yield (
                f"{said}{more}train.offload_activations=true",
                OFFLOAD_COST,
                _with(config, mlp_tiles=tiles, offload_activations=True, **weaker),
            )
    wider = parallel.model_copy(update={"sp": 2 * parallel.sp})
    yield (
        f"parallel.sp={2 * parallel.sp} on {2 * parallel.world_size} ranks",
        "about half the time a step",
        config.model_copy(update={"parallel": wider}),
    )


def _with(config: RunConfig, **train: Any) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update=train)})


def _fitted(config: RunConfig, plan: MemoryPlan, refusal: str | None = None) -> Fitted:
    keys = ("recompute", "recompute_layers", "mlp_tiles")
    return Fitted({key: getattr(config.train, key) for key in keys}, plan, refusal)


@dataclass(frozen=True)
class _Question:
    """What `Planning` sends to the other process."""

    config: RunConfig
    room: int | None
    cuda: bool
    advice: bool


class Planning:
    """`fit` for a run, or with `only_advice` its `advice`, in another process while this one starts up."""

    def __init__(self, config: RunConfig, room: int | None, *, cuda: bool, only_advice: bool = False) -> None:
        self.only_advice = only_advice
        environment = {
            key: value for key, value in os.environ.items() if key not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")
        }
        environment["CUDA_VISIBLE_DEVICES"] = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ring_hilbert.training.fitting"], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert self.process.stdin is not None
        self.process.stdin.write(TypeAdapter(_Question).dump_json(_Question(config, room, cuda, only_advice)).decode())
        self.process.stdin.close()
        self.process.stdin = None

    def result(self) -> Fitted | str | None:
        """Wait for the answer; None if there is none, or it takes too long."""
        try:
            answer, _ = self.process.communicate(timeout=PATIENCE)
            kind: Any = str if self.only_advice else Fitted
            return TypeAdapter(kind).validate_json(answer.splitlines()[-1]) if answer else None
        except (subprocess.TimeoutExpired, ValidationError):
            self.close()
            return None

    def close(self) -> None:
        """End the other process."""
        self.process.kill()
        self.process.wait()


if __name__ == "__main__":
    asked = TypeAdapter(_Question).validate_json(sys.stdin.read())
    if asked.advice:
        sys.stdout.write(TypeAdapter(str).dump_json(advice(asked.config)).decode())
    else:
        sys.stdout.write(TypeAdapter(Fitted).dump_json(fit(asked.config, asked.room, cuda=asked.cuda)).decode())
