# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are safe: they run no code, damage is named, one folder is one run's, and nothing bad replaces anything good."""

from __future__ import annotations

import errno
import itertools
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ring_hilbert.training import checkpoint as checkpoint_module
from ring_hilbert.training.checkpoint import Checkpoints
from ring_hilbert.training.config import RunConfig
from ring_hilbert.training.convert import convert, export_checkpoint
from ring_hilbert.training.engine import make_engine
from ring_hilbert.training.loop import pretrain
from ring_hilbert.training.model import model_config
from ring_hilbert.training.storage import lock as lock_module
from ring_hilbert.training.storage.background import Saver
from ring_hilbert.training.storage.folder import checkpoints_in, read_run
from ring_hilbert.training.storage.lock import FolderLock
from ring_hilbert.training.storage.manifest import MANIFEST, SummedFile, sum_file, write_manifest
from ring_hilbert.training.storage.tensors import Reader, Rehearsal
from ring_hilbert.training.world import open_world
from tests.harness.ranks import run_ranks, run_ranks_collect
from tests.harness.tiny_run import tiny_config


def config_in(texts: Path, folder: Path, steps: int, **changes: Any) -> RunConfig:
    """A run of so many steps below `folder`, of a schedule of six, with a checkpoint every other step."""
    places = {"checkpoint__dir": str(folder / "checkpoints"), "log__dir": str(folder / "logs")}
    schedule = {"optim__decay_steps": 6, "checkpoint__every": 2, "train__steps": steps}
    return tiny_config(texts, **{**places, **schedule, "data__eval": None, **changes})


def run(rank: int, world_size: int, config: RunConfig) -> None:
    pretrain(config)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / "model" / "model.safetensors")


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


def seal(path: Path) -> None:
    """Give a checkpoint that was tampered with a matching manifest, as an attacker would."""
    (path / MANIFEST).unlink(missing_ok=True)
    write_manifest(path, {str(file.relative_to(path)): sum_file(file) for file in files_of(path)})


@pytest.fixture(scope="module")
def whole(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights of six steps without an interruption."""
    folder = tmp_path_factory.mktemp("whole")
    pretrain(config_in(texts, folder, 6))
    return weights(folder)


@pytest.fixture(scope="module")
def four_steps(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped after four steps, with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("four")
    pretrain(config_in(texts, folder, 4))
    shutil.rmtree(folder / "checkpoints" / "model")
    return folder


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.mark),)


def poison_entries(file: Path, payload: bytes) -> int:
    """Put `payload` into the bytes of every tensor of a safetensors file that has room for it; returns how many have."""
    data = bytearray(file.read_bytes())
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    planted = 0
    for begin, end in (entry["data_offsets"] for entry in header.values()):
        if end - begin >= len(payload):
            data[8 + size + begin : 8 + size + begin + len(payload)] = payload
            planted += 1
    file.write_bytes(data)
    return planted


@pytest.mark.slow
@pytest.mark.parametrize("as_init", [False, pytest.param(True, marks=pytest.mark.full)])
def test_nothing_in_a_checkpoint_is_executed(texts: Path, four_steps: Path, tmp_path: Path, as_init: bool) -> None:
    """A payload in each file, in each entry and in files of other names; every one with a manifest that fits."""
    mark = tmp_path / "executed"
    payloads = [pickle.dumps(Payload(mark))]
    torch.save(Payload(mark), tmp_path / "payload.pt")
    payloads.append((tmp_path / "payload.pt").read_bytes())
    path = checkpoints_in(four_steps / "checkpoints")[-1].relative_to(four_steps)
    # The last three at once: names under which pickles were or are read elsewhere, but not here.
    plants = [[str(file.relative_to(four_steps / path))] for file in files_of(four_steps / path)]
    plants.append(["engine/.metadata", "rng_0.pt", "engine/__0_0.distcp"])
    for number, names in enumerate(plants):
        folder = tmp_path / str(number)
        shutil.copytree(four_steps, folder)
        for name in names:
            (folder / path / name).write_bytes(payloads[number % 2])
        if MANIFEST not in names:
            seal(folder / path)
        settings: dict[str, Any] = {"checkpoint__verify": False}
        if as_init:
            settings |= {"checkpoint__init": str(folder / "checkpoints"), "checkpoint__dir": str(folder / "other")}
        harmless = len(names) > 1 or (as_init and "random" in names[0])  # random state is not what a run starts with
        with nullcontext() if harmless else pytest.raises(ValueError, match=path.name):
            pretrain(config_in(texts, folder, 5, **settings))
        assert not mark.exists(), f"one of {names} was executed"
    folder = tmp_path / "entries"
    shutil.copytree(four_steps, folder)
    path = folder / path
    planted = poison_entries(path / "engine" / "rank_00000.safetensors", payloads[0])
    assert planted >= 3 * 5 and poison_entries(path / "random_00000.safetensors", payloads[0]) == 1
    seal(path)
    with pytest.raises(ValueError, match="is not a random state"):
        pretrain(config_in(texts, folder, 5))
    for tensor in Reader(path / "engine").values():
        assert isinstance(tensor, torch.Tensor)
    assert not mark.exists()


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    middle = len(data) // 2
    for place in range(max(0, middle - 32), min(len(data), middle + 32)):
        data[place] ^= 0x55
    file.write_bytes(data)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def empty(file: Path) -> None:
    file.write_bytes(b"")


FAULTS = (flip, truncate, empty, Path.unlink)
FILES = {
    1: ("engine/index.json", "engine/rank_00000.safetensors", MANIFEST, "random_00000.safetensors", "run.json"),
    2: (
        "engine/index.json", "engine/rank_00000.safetensors", "engine/rank_00001.safetensors", MANIFEST,
        "random_00000.safetensors", "random_00001.safetensors", "run.json",
    ),
}  # fmt: skip


def check_damage(
    texts: Path, healthy: Path, folder: Path, ranks: int, name: str, fault: Callable[[Path], None]
) -> None:
    """Damage a file of the newest checkpoint: the error names it, and the run resumes from the one before."""
    shutil.copytree(healthy, folder)
    path = folder / "checkpoints" / "step_00000004"
    fault(path / name)
    before = (folder / "logs" / "metrics.jsonl").read_bytes()
    with pytest.raises(
        ValueError, match=r"step 4 is damaged.*checkpoint.resume=2, or checkpoint.on_damage=previous"
    ) as error:
        run_ranks(run, ranks, config_in(texts, folder, 6, parallel__sp=ranks))
    assert str(path / name) in str(error.value)
    assert path.is_dir() and (folder / "logs" / "metrics.jsonl").read_bytes() == before
    run_ranks(run, ranks, config_in(texts, folder, 6, parallel__sp=ranks, checkpoint__on_damage="previous"))
    kept = sorted(file.name for file in (folder / "checkpoints").iterdir())
    assert kept == ["model", "step_00000004", "step_00000004.damaged", "step_00000006"]


@pytest.mark.parametrize(("fault", "name"), [(flip, FILES[1][1]), (Path.unlink, MANIFEST)])
def test_damage(
    texts: Path,
    four_steps: Path,
    whole: dict[str, torch.Tensor],
    tmp_path: Path,
    fault: Callable[[Path], None],
    name: str,
) -> None:
    check_damage(texts, four_steps, tmp_path / "run", 1, name, fault)
    assert same(weights(tmp_path / "run"), whole)


@pytest.mark.full
@pytest.mark.parametrize("ranks", FILES)
def test_any_damage(texts: Path, tmp_path: Path, ranks: int) -> None:
    """Each file of a checkpoint flipped, truncated, emptied and deleted in turn."""
    run_ranks(run, ranks, config_in(texts, tmp_path / "whole", 6, parallel__sp=ranks))
    expected = weights(tmp_path / "whole")
    run_ranks(run, ranks, config_in(texts, tmp_path / "four", 4, parallel__sp=ranks))
    path = tmp_path / "four" / "checkpoints" / "step_00000004"
    assert [str(file.relative_to(path)) for file in files_of(path)] == list(FILES[ranks])
    for number, (name, fault) in enumerate(itertools.product(FILES[ranks], FAULTS)):
        folder = tmp_path / str(number)
        check_damage(texts, tmp_path / "four", folder, ranks, name, fault)
        assert same(weights(folder), expected), (name, fault)
        shutil.rmtree(folder)


def test_all_damaged_is_not_a_fresh_start(texts: Path, four_steps: Path, tmp_path: Path) -> None:
    shutil.copytree(four_steps, tmp_path / "run")
    for path in checkpoints_in(tmp_path / "run" / "checkpoints"):
        (path / "run.json").unlink()
    with pytest.raises(ValueError, match=r"step 4 is damaged.*step 2 is damaged.*There is none before it"):
        pretrain(config_in(texts, tmp_path / "run", 6, checkpoint__on_damage="previous"))
    assert len(checkpoints_in(tmp_path / "run" / "checkpoints")) == 2


def test_checksums_can_be_left_out(texts: Path, four_steps: Path, tmp_path: Path) -> None:
    """Sizes are compared all the same."""
    shutil.copytree(four_steps, tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "step_00000004" / "engine" / "rank_00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1  # of a mantissa
    file.write_bytes(data)
    with pytest.raises(ValueError, match="has another checksum"):
        pretrain(config_in(texts, tmp_path / "run", 5))
    assert pretrain(config_in(texts, tmp_path / "run", 5, checkpoint__verify=False)).progress.step == 5
    truncate(checkpoints_in(tmp_path / "run" / "checkpoints")[-1] / "engine" / "rank_00000.safetensors")
    with pytest.raises(ValueError, match="bytes, but was written with"):
        pretrain(config_in(texts, tmp_path / "run", 6, checkpoint__verify=False))


def test_going_back(texts: Path, four_steps: Path, whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """To a step that is asked for; what is newer stays under another name; asked again it goes on, not back."""
    folder = tmp_path / "run"
    shutil.copytree(four_steps, folder)
    with pytest.raises(ValueError, match=r"checkpoint.resume: .* has no checkpoint of step 3; it has those of 2, 4"):
        pretrain(config_in(texts, folder, 6, checkpoint__resume=3))
    pretrain(config_in(texts, folder, 3, checkpoint__resume=2))
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["model", "step_00000002", "step_00000003", "step_00000004.aside"]
    pretrain(config_in(texts, folder, 6, checkpoint__resume=2))
    steps = [json.loads(line)["step"] for line in (folder / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6] and same(weights(folder), whole)


def test_weights_of_another_model_are_refused(texts: Path, four_steps: Path, tmp_path: Path) -> None:
    """Whether that has less, more or others."""
    init = {"checkpoint__init": str(four_steps / "checkpoints")}
    for changes, match in (
        ({"model__config__num_hidden_layers": 1}, "its exp_avg of model.layers.1.* is not in this one"),
        ({"model__config__num_hidden_layers": 3}, "it has no exp_avg of model.layers.2"),
        ({"model__config__intermediate_size": 96}, r"mlp.down_proj.weight is \[32, 64\], but \[32, 96\] here"),
    ):
        with pytest.raises(ValueError, match=f"step_00000004/engine is of another model: .*{match}"):
            pretrain(config_in(texts, tmp_path, 1, **init, **changes))
    same_shapes = {"model__config__num_attention_heads": 2, "model__config__num_key_value_heads": 1}
    with pytest.raises(
        ValueError, match=r"another model: model.config.num_attention_heads: 4, now 2, model.config.num_key"
    ):
        pretrain(config_in(texts, tmp_path, 1, **init, **same_shapes))


def test_values_that_a_model_may_change_are_told(
    texts: Path, four_steps: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    init = {"checkpoint__init": str(four_steps / "checkpoints"), "model__config__rms_norm_eps": 1e-4}
    pretrain(config_in(texts, tmp_path, 1, **init))
    assert (
        "checkpoint.init has weights of a model with another model.config.rms_norm_eps: None, now 0.0001"
        in capsys.readouterr().out
    )


def test_a_renamed_checkpoint_is_refused(texts: Path, four_steps: Path, tmp_path: Path) -> None:
    shutil.copytree(four_steps, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step_00000002").rename(tmp_path / "run" / "checkpoints" / "step_00000007")
    with pytest.raises(ValueError, match="step_00000007 holds the checkpoint of step 2"):
        pretrain(config_in(texts, tmp_path / "run", 6))


def run_elsewhere(rank: int, world_size: int, texts: Path, folder: Path) -> None:
    """Each rank finds another folder under the name, as on hosts with disks of their own."""
    lock_module.PATIENCE, kept = 0.5, lock_module.PATIENCE
    try:
        pretrain(config_in(texts, folder / f"host{rank}", 2, parallel__sp=2))
    finally:
        lock_module.PATIENCE = kept


def test_a_folder_that_is_not_shared(texts: Path, tmp_path: Path) -> None:
    """Is noticed before anything is computed, on hosts where the folder is there too."""
    (tmp_path / "host1" / "checkpoints").mkdir(parents=True)
    errors = run_ranks_collect(run_elsewhere, 2, texts, tmp_path)
    assert all("does not see in" in str(error) and "all hosts share" in str(error) for error in errors), errors
    assert not (tmp_path / "host0" / "logs").exists()


HOLD = "import pathlib, runpy, sys, time; runpy.run_path(sys.argv[1])['FolderLock'](pathlib.Path(sys.argv[2]), {}); time.sleep(600)"


def test_one_folder_one_run(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other run is named while it lives, and no longer once it was killed."""
    folder = tmp_path / "checkpoints"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(lock_module.__file__), str(folder)])
    try:
        while lock_module.read_lock(folder) is None:
            time.sleep(0.05)
        monkeypatch.setattr(lock_module, "PATIENCE", 0.2)
        with pytest.raises(
            ValueError, match=rf"another run \(process {holder.pid} on .*\) is using .*checkpoints; wait"
        ):
            pretrain(config_in(texts, tmp_path, 2))
    finally:
        holder.kill()
        holder.wait()
    assert pretrain(config_in(texts, tmp_path, 2)).progress.step == 2
    assert lock_module.read_lock(folder) is None


def test_a_lock_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk: it names the file, and holds nothing."""

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(lock_module.os, "write", full)
    with pytest.raises(ValueError, match=r"checkpoint.dir: .*run.lock cannot be written: No space left on device"):
        FolderLock(tmp_path, {})
    monkeypatch.undo()
    monkeypatch.setattr(lock_module, "PATIENCE", 0.2)
    FolderLock(tmp_path, {}).release()


def test_a_folder_that_was_taken_over(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where locks do not reach other hosts: the run that lost its folder publishes nothing any more."""
    monkeypatch.setattr(lock_module.fcntl, "flock", lambda *_: None)
    make_room = Checkpoints._make_room

    def steal(self: Checkpoints, *args: Any) -> None:
        make_room(self, *args)
        FolderLock(self.folder, {})

    monkeypatch.setattr(Checkpoints, "_make_room", steal)
    with pytest.raises(ValueError, match=r"another run \(process .* has taken .* over from this run"):
        pretrain(config_in(texts, tmp_path, 4))
    assert not checkpoints_in(tmp_path / "checkpoints")


@pytest.mark.slow
def test_a_full_disk(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen before: nothing is written. Not seen before: the file, with the same figures. The older checkpoint stays."""
    config = config_in(texts, tmp_path, 4)
    pretrain(config_in(texts, tmp_path, 2))
    usage = shutil.disk_usage(tmp_path)
    little = SimpleNamespace(total=usage.total, used=usage.used, free=1000)
    monkeypatch.setattr(checkpoint_module.shutil, "disk_usage", lambda _: little)
    match = r"checkpoint.dir: the checkpoint of step 4 needs at least [\d,]{6,} bytes, and .*checkpoints has 1,000 bytes free"
    with pytest.raises(ValueError, match=match):
        pretrain(config)
    assert [path.name for path in (tmp_path / "checkpoints").glob("step*")] == ["step_00000002"]
    monkeypatch.undo()
    write = SummedFile.write

    def fill(self: SummedFile, data: Any) -> None:
        if self.path.suffix == ".safetensors" and self.size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        write(self, data)

    monkeypatch.setattr(SummedFile, "write", fill)
    with pytest.raises(
        ValueError, match=r"step 4 needs .* bytes free; .*No space left on device.*rank_00000.safetensors"
    ):
        pretrain(config)
    assert [path.name for path in checkpoints_in(tmp_path / "checkpoints")] == ["step_00000002"]


def save_not_finite(rank: int, world_size: int, config: RunConfig, key: str) -> list[str]:
    """What happens when one number of one tensor of the last rank is NaN."""
    with open_world(config.parallel) as world:
        engine: Any = make_engine(config, model_config(config), world)
        checkpoints = Checkpoints(config, world, {})
        checkpoints.save(engine, checkpoint_module.Progress(step=1))
        if rank == world_size - 1:
            kind, _, name = key.partition(".")
            engine._state()[kind][name].to_local().view(-1)[3] = float("nan")
        try:
            checkpoints.save(engine, checkpoint_module.Progress(step=2))
            checkpoints.wait()
            return []
        except ValueError as error:
            return [str(error), *(path.name for path in (checkpoints.folder).iterdir())]
        finally:
            engine.close()


@pytest.mark.parametrize("key", ["weight.model.embed_tokens.weight", "exp_avg_sq.model.layers.1.mlp.up_proj.weight"])
def test_what_is_not_finite_is_not_saved(texts: Path, tmp_path: Path, key: str) -> None:
    config = config_in(texts, tmp_path, 2, parallel__sp=2, checkpoint__keep=1)
    for message, *names in run_ranks(save_not_finite, 2, config, key):
        assert message.startswith(f"rank 1: step 2: {key} is not finite; nothing was saved"), message
        assert names == ["step_00000001"]


def test_steps_wait_until_they_are_copied(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long copying takes, a checkpoint holds the weights of its step, and writing does not hold up the next step."""
    stager = Saver._make_stager

    def slow(self: Saver) -> Any:
        made = stager(self)
        stage = made._stage

        def stage_and_close(*args: Any, **kwargs: Any) -> Any:
            time.sleep(0.3)
            copied = stage(*args, **kwargs)
            made._state_dict_stager.close()  # as PyTorch 2.11 does
            return copied

        made._stage = stage_and_close
        return made

    pretrain(
        config_in(
            texts, tmp_path / "waiting", 3, checkpoint__every=1, checkpoint__keep=9, checkpoint__asynchronous=False
        )
    )
    monkeypatch.setattr(Saver, "_make_stager", slow)
    pretrain(config_in(texts, tmp_path / "slow", 3, checkpoint__every=1, checkpoint__keep=9))
    for step in range(1, 4):
        name = f"checkpoints/step_{step:08d}/engine"
        found, expected = Reader(tmp_path / "slow" / name), Reader(tmp_path / "waiting" / name)
        assert same(dict(found), dict(expected)), step


def test_export_of_a_step(texts: Path, four_steps: Path, tmp_path: Path) -> None:
    """The model as it was after two of four steps, and nothing that is no model's folder is replaced."""
    pretrain(config_in(texts, tmp_path, 2))
    shutil.copytree(four_steps, tmp_path / "run")
    config = config_in(texts, tmp_path / "run", 4)
    export_checkpoint(config, tmp_path / "model", step=2)
    assert same(load_file(tmp_path / "model" / "model.safetensors"), weights(tmp_path))
    with pytest.raises(ValueError, match="is no model's folder"):
        export_checkpoint(config, tmp_path / "run" / "checkpoints")
    with pytest.raises(ValueError, match=r"--step: .* no checkpoint of step 3; it has those of 2, 4"):
        export_checkpoint(config, tmp_path / "model", step=3)


def test_common_form_continues_bit_for_bit(
    texts: Path, four_steps: Path, whole: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = convert(four_steps / "checkpoints", tmp_path / "common", step=2)
    assert read_run(path)["engine"] == {"name": "common"}
    assert {file.suffix for file in files_of(path)} == {".json", ".safetensors"}
    with pytest.raises(ValueError, match="is already there"):
        convert(four_steps / "checkpoints", tmp_path / "common", step=2)
    settings = {"checkpoint__dir": str(tmp_path / "common")}
    pretrain(config_in(texts, tmp_path, 6, **settings))
    assert same(load_file(tmp_path / "common" / "model" / "model.safetensors"), whole)


def test_a_rehearsed_save_leaves_nothing(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank takes part in one before the first step; the save after it holds what the weights are by then."""
    planned = []
    write = Rehearsal.write_data
    monkeypatch.setattr(Rehearsal, "write_data", lambda *args: planned.append(len(args[1].items)) or write(*args))
    config = config_in(texts, tmp_path, 2)
    with open_world(config.parallel) as world:
        engine = make_engine(config, model_config(config), world)
        engine.prepare_to_save()
        assert planned and planned[0] > 0 and not list(tmp_path.iterdir())
        with torch.no_grad():
            for parameter in engine.model.parameters():
                parameter.add_(1.0)
        expected = {f"weight.{name}": x.clone() for name, x in engine.whole_state().items()}
        (tmp_path / "saved").mkdir()
        engine.save(tmp_path / "saved", lambda _: None).result()
        engine.close()
    found = {name: x for name, x in Reader(tmp_path / "saved").items() if name.startswith("weight.")}
    assert same(found, {name: expected[name] for name in found}) and len(found) > 9 and len(planned) == 1
