# SPDX-License-Identifier: Apache-2.0
"""Kill training runs at random moments, start them again, and compare what they end with with a run that nobody killed.

    python -m tests.harness.kills FOLDER [--torch 30] [--deepspeed 10] [--seconds S]

A trial is a run of two ranks under torch's elastic launcher. SIGKILL strikes one rank, all ranks or the launcher, in the middle of
a step, of a save, or of making a checkpoint visible; then the same run is started again until it ends. The weights must be those
of the undisturbed run, bit for bit. What was done is kept in FOLDER: called again, it goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ring_hilbert.training import checkpoint as checkpoint_module
from ring_hilbert.training.config import RunConfig
from ring_hilbert.training.engine_deepspeed import DeepSpeedEngine
from ring_hilbert.training.loop import Run, pretrain
from ring_hilbert.training.metrics import read_metrics
from ring_hilbert.training.storage import lock as lock_module
from ring_hilbert.training.storage.tensors import Writer
from tests.harness.tiny_run import tiny_config, write_texts

RANKS, STEPS = 2, 10
VICTIMS = ("one rank", "all ranks", "launcher")
MOMENTS = ("step", "save", "publish")
# Calls of the code that makes a checkpoint visible.
PUBLISHING = "write_json", "write_manifest", "sync_file", "rmtree"
LIMIT = 240.0  # seconds that a start may take

_context = multiprocessing.get_context("fork")  # everything is imported once


@dataclass(frozen=True)
class Strike:
    """Who is killed when: from `step` on the moment is awaited, `delay` seconds later it strikes; `call` of `PUBLISHING`."""

    victim: str
    moment: str
    step: int
    delay: float
    call: str
    rank: int


def config_in(folder: Path, engine: str) -> RunConfig:
    """A run that saves at every other step."""
    zero = {"deepspeed": {"config": {"zero_optimization": {"stage": 1}}}, "checkpoint__trust": True}
    places = {"checkpoint__dir": str(folder / "checkpoints"), "log__dir": str(folder / "logs")}
    sizes = {"train__steps": STEPS, "checkpoint__every": 2, "parallel__sp": RANKS, "data__eval": None}
    texts = folder.parent / "texts"
    return tiny_config(texts, **places, **sizes, engine=engine, **(zero if engine == "deepspeed" else {}))


def trial(folder: Path, engine: str, strike: Strike) -> str:
    """What happened, in words; raises AssertionError where the run does not end as the undisturbed one."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    config, told = config_in(folder, engine), []
    first = _start(config, strike, folder)
    _wait(first)
    assert first.exitcode != 0, "the strike did not happen"
    found = (
        sorted(path.name for path in (folder / "checkpoints").iterdir()) if (folder / "checkpoints").exists() else []
    )
    told.append(f"left {', '.join(found) or 'nothing'}")
    if strike.victim == "launcher":  # its ranks live on, and hold the folder for as long
        orphans = _ranks(folder)
        second = _start(config, None, folder, patience=0.5)
        _wait(second)
        ended = f"resumed from step {STEPS}" in (folder / "output.txt").read_text()
        assert second.exitcode != 0 or ended, "a second run was let into the folder of one that goes on"
        told.append(
            f"a second start was {'refused' if second.exitcode else 'let in, the ranks having done their steps'}"
        )
        for rank in orphans:
            _kill(rank)
    last = _start(config, None, folder)
    _wait(last)
    assert last.exitcode == 0, f"the run did not go on: exit code {last.exitcode}"
    told.append(_compare(folder, folder.parent / f"whole-{engine}"))
    return "; ".join(told)


def undisturbed(folder: Path, engine: str) -> None:
    """The run to compare with."""
    if not (folder / "checkpoints" / "model").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        run = _start(config_in(folder, engine), None, folder)
        _wait(run)
        assert run.exitcode == 0


def strikes(count: int, seed: int) -> list[Strike]:
    """Every victim at every moment: all of each after three strikes, all pairs after nine; the rest at random."""
    dice = random.Random(seed)
    made = []
    for number in range(count):
        moment = MOMENTS[(number + number // 3) % 3]
        step = dice.randrange(1, STEPS) if moment == "step" else dice.choice((4, 6, 8))
        chances = dice.uniform(0, 0.15), dice.choice(PUBLISHING), dice.randrange(RANKS)
        made.append(Strike(VICTIMS[number % 3], moment, step, *chances))
    return made


def _start(config: RunConfig, strike: Strike | None, folder: Path, patience: float = lock_module.PATIENCE) -> Any:
    process = _context.Process(target=_launch, args=(config, strike, folder, patience))
    process.start()
    return process


def _wait(process: Any) -> None:
    """Until the launcher has ended; `join` would wait for ranks that outlive it."""
    deadline = time.monotonic() + LIMIT
    while process.exitcode is None:
        assert time.monotonic() < deadline, f"a run takes longer than {LIMIT} s"
        time.sleep(0.02)


def _launch(config: RunConfig, strike: Strike | None, folder: Path, patience: float) -> None:
    """The launcher's process."""
    (folder / "launcher").write_text(str(os.getpid()))
    sys.stdout = sys.stderr = (folder / "output.txt").open("a", buffering=1)
    os.dup2(sys.stderr.fileno(), 1)
    os.dup2(sys.stderr.fileno(), 2)
    launch = LaunchConfig(
        1, 1, RANKS, run_id=str(os.getpid()), rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0,
        start_method="fork", monitor_interval=0.1,
    )  # fmt: skip
    elastic_launch(launch, _rank)(config, strike, folder, patience)


def _rank(config: RunConfig, strike: Strike | None, folder: Path, patience: float) -> None:
    """A rank's process; as under torchrun it survives its launcher."""
    import ctypes

    ctypes.CDLL(None).prctl(1, 0)  # PR_SET_PDEATHSIG: the function launcher sets it, torchrun does not
    torch.set_num_threads(1)
    lock_module.PATIENCE = patience
    rank = int(os.environ["RANK"])
    (folder / f"rank{rank}").write_text(str(os.getpid()))
    if strike is not None:
        _arm(strike, rank, folder)
    pretrain(config)


def _arm(strike: Strike, rank: int, folder: Path) -> None:
    """Make the moment come: rank 0 for what only it does, else the rank that is to die."""
    killer = 0 if strike.moment == "publish" else strike.rank

    def strike_now() -> None:
        if struck:
            return
        struck.append(True)
        if strike.victim == "launcher":
            _kill(int((folder / "launcher").read_text()))
        elif strike.victim == "all ranks":
            for other in range(RANKS):
                if other != rank:
                    _kill(int((folder / f"rank{other}").read_text()))
        if strike.victim != "launcher":
            os.kill(os.getpid(), signal.SIGKILL)

    def soon() -> None:
        threading.Timer(strike.delay, strike_now).start()

    struck: list[bool] = []
    seen = {"step": 0}

    def before(owner: Any, name: str, do: Callable[[], object], when: Callable[[], bool]) -> None:
        kept = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if when():
                do()
            return kept(*args, **kwargs)

        setattr(owner, name, wrapped)

    def count() -> bool:
        seen["step"] += 1
        return False

    before(Run, "train_step", count, count)
    if rank != killer:
        return
    at_step = lambda: seen["step"] == strike.step  # noqa: E731
    if strike.moment == "step":
        before(Run, "train_step", soon, at_step)
    elif strike.moment == "save":
        # In the background, so that the run may be a step further by now; the first checkpoint after it will do.
        later = lambda: seen["step"] >= strike.step  # noqa: E731
        before(Writer, "write_data", soon, later)
        before(DeepSpeedEngine, "save", soon, later)
    else:
        publishing = lambda: seen["step"] >= strike.step and "_publish" in _callers()  # noqa: E731
        owner = checkpoint_module.shutil if strike.call == "rmtree" else checkpoint_module
        before(owner, strike.call, strike_now, publishing)


def _callers() -> list[str]:
    frame, names = sys._getframe(), []
    while frame is not None:
        names.append(frame.f_code.co_name)
        frame = frame.f_back
    return names


def _ranks(folder: Path) -> list[int]:
    return [int(file.read_text()) for file in folder.glob("rank?") if file.read_text()]


def _alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _kill(process: int) -> None:
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return
    deadline = time.monotonic() + 10
    while _alive(process) and time.monotonic() < deadline:
        time.sleep(0.01)


def _compare(folder: Path, whole: Path) -> str:
    name = Path("checkpoints") / "model" / "model.safetensors"
    found, expected = load_file(folder / name), load_file(whole / name)
    assert found.keys() == expected.keys()
    different = [key for key in expected if not torch.equal(found[key], expected[key])]
    assert not different, f"other weights: {different}"
    lines = [[(x["step"], x["loss"]) for x in read_metrics(at / "logs" / "metrics.jsonl")] for at in (folder, whole)]
    assert lines[0] == lines[1], "other losses"
    return "bit for bit"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--torch", type=int, default=30, metavar="N", help="kills of FSDP2 runs; default: 30")
    parser.add_argument("--deepspeed", type=int, default=10, metavar="N", help="kills of ZeRO-1 runs; default: 10")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no trial after so many; default: all of them")
    chosen = parser.parse_args()
    deadline = time.monotonic() + chosen.seconds
    torch.set_num_threads(1)  # no threads before a fork
    os.environ["DS_ACCELERATOR"] = "cpu"
    if chosen.deepspeed:
        importlib.import_module("deepspeed")
    chosen.folder.mkdir(parents=True, exist_ok=True)
    if not (chosen.folder / "texts").exists():
        write_texts(chosen.folder / "texts")
    log = chosen.folder / "results.jsonl"
    done = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    for engine, count in (("torch", chosen.torch), ("deepspeed", chosen.deepspeed)):
        for number, strike in enumerate(strikes(count, seed=len(engine))):
            if any((line["engine"], line["number"]) == (engine, number) for line in done):
                continue
            if time.monotonic() > deadline:
                return
            undisturbed(chosen.folder / f"whole-{engine}", engine)
            try:
                result = trial(chosen.folder / "trial", engine, strike)
            except AssertionError as error:
                result = f"FAILED: {error}"
                shutil.copytree(
                    chosen.folder / "trial", chosen.folder / f"failed-{engine}-{number}", dirs_exist_ok=True
                )
            done.append({"engine": engine, "number": number, **asdict(strike), "result": result})
            with log.open("a") as file:
                file.write(json.dumps(done[-1]) + "\n")
            print(engine, number, strike, result, flush=True)
    failed = sum("FAILED" in line["result"] for line in done)
    print(f"{len(done)} kills, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
