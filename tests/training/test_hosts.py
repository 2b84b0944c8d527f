# SPDX-License-Identifier: Apache-2.0
"""Two hosts: what launch/ starts on them, a link that is cut, and one tokenising rank per disk."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ring_hilbert.cli import main
from ring_hilbert.training.config import RunConfig
from ring_hilbert.training.disks import once_per_disk
from ring_hilbert.training.hosts import (
    STATUS,
    address_of,
    groups_across,
    interface_of,
    is_local,
    local_address,
    ranks_named,
)
from ring_hilbert.training.loop import pretrain
from ring_hilbert.training.metrics import read_metrics
from ring_hilbert.training.world import RankError, open_world
from tests.harness.namespaces import ADDRESSES, ROOT, Hosts, two_hosts
from tests.harness.ranks import run_ranks, run_ranks_collect
from tests.harness.tiny_run import SEQ_LEN, tiny_config, write_texts


def test_addresses_of_this_host() -> None:
    assert local_address("127.0.0.1") == "127.0.0.1"
    assert is_local("localhost") and not is_local("192.0.2.77") and not is_local("no.such.host.invalid")
    assert local_address("no.such.host.invalid") is None
    assert interface_of("127.0.0.1") == ("lo" if sys.platform == "linux" else None)
    assert interface_of("192.0.2.77") is None
    assert address_of("no such") is None and (sys.platform != "linux" or address_of("lo") == "127.0.0.1")


KEEP = (
    "import datetime, torch.distributed as dist\n"
    "store = dist.TCPStore('127.0.0.1', 0, None, True, datetime.timedelta(seconds=60), wait_for_workers=False)\n"
    "print(store.port, flush=True)\ninput()"
)
JOIN = "from ring_hilbert.training import hosts\nhosts.SLACK = 1\nhosts.join('gloo', 1, 1)"


def test_a_store_that_is_stopped_holds_nobody_up() -> None:
    """It takes connections, and never answers."""
    keeper = subprocess.Popen(
        [sys.executable, "-c", KEEP], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert keeper.stdout is not None
        port = keeper.stdout.readline().decode().strip()
        keeper.send_signal(signal.SIGSTOP)
        places = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **places, "TORCHELASTIC_USE_AGENT_STORE": "True", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", JOIN], env=environment, capture_output=True, text=True, timeout=100, check=False
        )
    finally:
        keeper.kill()
        keeper.wait()
    assert done.returncode == STATUS, done.stderr
    assert f"rank 1 on {socket.gethostname()}: the store at 127.0.0.1:{port}, where ranks meet, has not" in done.stderr


def test_groups_that_cross_hosts() -> None:
    assert groups_across(["a", "a", "b", "b"], 2) == []
    assert groups_across(["a", "a", "b", "b"], 4) == [0]
    assert groups_across(["a", "a", "a", "b"], 2) == [1]  # hosts of unequal size
    assert (ranks_named([3]), ranks_named([4, 5, 6]), ranks_named([1, 4])) == ("rank 3", "ranks 4 to 6", "ranks 1, 4")


def test_plan_says_what_crosses(capsys: pytest.CaptureFixture[str]) -> None:
    shape = [
        "--length",
        "4096",
        "--heads",
        "8",
        "--head-dim",
        "64",
        "--segment-lengths",
        "256",
        "all",
        "--dilation-rates",
        "1",
        "8",
    ]
    for ranks, per_host, words in (
        (8, 4, ["Hosts of 4 ranks: a group of 8 lies on 2.", "MiB at the host with most"]),
        (4, 8, ["every group of 4 is within one"]),
        (6, 4, ["a group of 6 lies on 2; 6 is not a multiple of 4"]),
    ):
        assert main(["plan", *shape, "--ranks", str(ranks), "--ranks-per-host", str(per_host)]) == 0
        printed = capsys.readouterr().out
        assert all(word in printed for word in words), printed
    assert main(["plan", *shape, "--ranks", "4", "--ranks-per-host", "0"]) == 2


def fill_once(rank: int, world_size: int, folder: Path, fail: bool) -> list[int]:
    """The ranks that were asked to fill the folder; ranks 2 and 3 have another kernel and another disk."""
    host = rank // 2
    config = tiny_config(folder, parallel__sp=world_size)
    with open_world(config.parallel) as world:
        for report in world.reports:
            object.__setattr__(report, "machine", f"host {report.rank // 2}")
        disk, mark = folder / f"disk{host}", folder / f"called{rank}"

        def fill() -> None:
            time.sleep(0.3)
            mark.touch()
            if fail and rank == 2:
                raise ValueError("no such text")

        with world.phase("data", "preparing data"):
            once_per_disk(world, disk, fill)
            once_per_disk(world, folder / "shared", fill)
        assert not list(disk.iterdir())
        return sorted(int(path.name.removeprefix("called")) for path in folder.glob("called*"))


def test_one_rank_per_disk(tmp_path: Path) -> None:
    assert run_ranks(fill_once, 4, tmp_path, False) == [[0, 2]] * 4


def test_an_error_while_others_wait(tmp_path: Path) -> None:
    errors = run_ranks_collect(fill_once, 4, tmp_path, True)
    assert all(isinstance(error, RankError) and str(error) == "rank 2: no such text" for error in errors)


# ---- two hosts on this machine

LIMIT = 24.0  # timeouts.step; steps take longer where other work takes the cores


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with two_hosts() as found:
        yield found


def launch(hosts: Hosts, folder: Path, *command: str | Path) -> list[subprocess.Popen[bytes]]:
    """multinode.sh on both, two ranks each."""
    arguments = ["--head", ADDRESSES[0], "--hosts", "2", "--ranks", "2", *command]
    return [hosts.start(host, "bash", "launch/multinode.sh", *arguments, log=folder / f"log{host}") for host in (0, 1)]


def ended(processes: list[subprocess.Popen[bytes]], folder: Path, seconds: float) -> list[int]:
    try:
        return [process.wait(seconds) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, 9)
                print(*((folder / f"log{host}").read_text()[-3000:] for host in (0, 1)), sep="\n")


def config_of(folder: Path, texts: Path, **changes: Any) -> Path:
    """The file of a run of 60 steps that writes below `folder`."""
    folder.mkdir(exist_ok=True)
    places = {"checkpoint__dir": str(folder / "checkpoints"), "log__dir": str(folder / "logs")}
    common = {
        "train__steps": 60,
        "train__global_batch_tokens": 2 * SEQ_LEN,
        "checkpoint__every": 20,
        "timeouts__step": LIMIT,
    }
    places |= {"data__eval": None, "log__breakdown_every": None}
    path = folder / "run.yaml"
    path.write_text(json.dumps(tiny_config(texts, **{**common, **places, **changes}).model_dump()))
    return path


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "logs" / "metrics.jsonl") if line["kind"] == "train"]


def single(rank: int, world_size: int, file: Path) -> None:
    pretrain(RunConfig.model_validate(json.loads(file.read_text())))


@pytest.mark.full
def test_check_counts_hosts_by_network(tmp_path: Path, hosts: Hosts) -> None:
    """Both have this machine's name."""
    assert ended(launch(hosts, tmp_path, "check"), tmp_path, 200) == [0, 0]
    page = (tmp_path / "log0").read_text() + (tmp_path / "log1").read_text()
    assert "4 rank(s) on 2 host(s): " in page and f"({ADDRESSES[0]}) 2" in page and f"({ADDRESSES[1]}) 2" in page
    assert re.search(r"sp=2 +every group is within a host", page) and re.search(
        r"sp=4 +1 of 1 groups cross hosts", page
    )
    assert "\nOK" in page


@pytest.mark.full
@pytest.mark.parametrize("way", ["default route", "--interface", "none"])
def test_a_head_whose_name_leads_to_its_loopback(tmp_path: Path, hosts: Hosts, way: str) -> None:
    """As distributions write it into /etc/hosts; the others know the name by its address."""
    etc = [Path("/etc/netns") / name for name in hosts.names]  # `ip netns exec` mounts its files over /etc
    try:
        for folder, address in zip(etc, ("127.0.1.1", ADDRESSES[0]), strict=True):
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n{address} rh-head\n")
        if way == "default route":
            hosts.run(0, "ip", "route", "add", "default", "dev", "veth0")
        option = ["--interface", "veth0"] if way == "--interface" else []
        command = ["bash", "launch/multinode.sh", "--head", "rh-head", "--hosts", "2", "--ranks", "1", *option, "check"]
        processes = [
            hosts.start(host, *command, log=tmp_path / f"log{host}") for host in range(2 if way != "none" else 1)
        ]
        codes = ended(processes, tmp_path, 200)
        page = (tmp_path / "log0").read_text()
        if way == "none":
            assert codes == [2] and "rh-head leads to the loopback of this host; give --head an address" in page
        else:
            assert codes == [0, 0] and "2 rank(s) on 2 host(s): " in page + (tmp_path / "log1").read_text()
    finally:
        for folder in etc:
            shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.full
def test_check_says_which_interface_was_taken(tmp_path: Path, hosts: Hosts) -> None:
    command = [sys.executable, "-m", "ring_hilbert.cli", "check", "--timeout", "8"]
    processes = [
        hosts.start(
            host, *command, log=tmp_path / f"log{host}", GLOO_SOCKET_IFNAME="lo", RANK=str(host), LOCAL_RANK="0", WORLD_SIZE="2",
            MASTER_ADDR=ADDRESSES[0], MASTER_PORT="29411",
        )
        for host in (0, 1)
    ]  # fmt: skip
    assert ended(processes, tmp_path, 100) == [1, 1]
    for host in (0, 1):
        text = (tmp_path / f"log{host}").read_text()
        assert "Gloo took interface lo" in text and f"is reached by interface veth0 ({ADDRESSES[host]})" in text, text


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("sp", "cut"), [(4, "down"), (2, "down"), (4, "lost")])
def test_two_hosts_are_as_one_and_survive_a_cut_link(tmp_path: Path, hosts: Hosts, sp: int, cut: str) -> None:
    """The losses of one host, with sequences or dp across the link; when it is cut, all ranks raise and the run can resume."""
    write_texts(tmp_path)
    parallel = {"parallel__sp": sp, "parallel__dp_shard": 4 // sp}
    run_ranks(single, 4, config_of(tmp_path / "one", tmp_path, **parallel), timeout=200)
    two = tmp_path / "two"
    file = config_of(two, tmp_path, **parallel)
    processes = launch(hosts, tmp_path, "pretrain", "--config", file)
    metrics, began = two / "logs" / "metrics.jsonl", time.monotonic()
    while not metrics.exists() or metrics.read_text().count("\n") < 23:
        assert time.monotonic() - began < 150 and all(process.poll() is None for process in processes), (
            tmp_path / "log0"
        ).read_text()
        time.sleep(0.1)
    hosts.link(cut)
    began = time.monotonic()
    said = [set(), set()]
    while any(len(ranks) < 2 for ranks in said):
        assert time.monotonic() - began < LIMIT, [(tmp_path / f"log{host}").read_text()[-3000:] for host in (0, 1)]
        for host in (0, 1):
            text = (tmp_path / f"log{host}").read_text(errors="replace")
            said[host] = set(
                re.findall(
                    r"ring-hilbert: (rank \d) .* in .*, step \d+, for rank (?:\d) .*has not been heard of since", text
                )
            )
        time.sleep(0.1)
    assert said == [{"rank 0", "rank 1"}, {"rank 2", "rank 3"}]
    assert all(ended(processes, tmp_path, 90))
    hosts.link("up")
    assert ended(launch(hosts, tmp_path, "pretrain", "--config", file), tmp_path, 150) == [0, 0]
    assert re.search(r"resumed from step 20", (tmp_path / "log0").read_text() + (tmp_path / "log1").read_text())
    assert losses(two) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


@pytest.mark.full
def test_deepspeed_launcher_without_ssh(tmp_path: Path, hosts: Hosts) -> None:
    if shutil.which("deepspeed", path=str(Path(sys.executable).parent)) is None:
        pytest.skip("DeepSpeed is not installed")
    write_texts(tmp_path)
    zero = {"engine": "deepspeed", "deepspeed__config": {"zero_optimization": {"stage": 2}}, "checkpoint__trust": True}
    file = config_of(tmp_path / "two", tmp_path, parallel__sp=2, parallel__dp_shard=2, train__steps=5, **zero)
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("".join(f"{address} slots=2\n" for address in ADDRESSES))
    processes = [
        hosts.start(
            host, "deepspeed", "--hostfile", hostfile, "--no_ssh", "--node_rank", str(host), "--master_addr", ADDRESSES[0],
            "--module", "ring_hilbert.cli", "pretrain", "--config", file, log=tmp_path / f"log{host}",
        )
        for host in (0, 1)
    ]  # fmt: skip
    assert ended(processes, tmp_path, 200) == [0, 0]
    assert len(losses(tmp_path / "two")) == 5


@pytest.mark.full
def test_half_of_the_ranks_go_on(tmp_path: Path) -> None:
    """`dp_shard: auto`, four ranks and then two, as launchers start them: the losses of a run on one."""
    write_texts(tmp_path)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    common = {"optim__decay_steps": 20, "train__steps": 20, "train__global_batch_tokens": 4 * SEQ_LEN}
    run_ranks(single, 1, config_of(whole, tmp_path, **common), timeout=200)
    file = config_of(parts, tmp_path, **common)
    raw = json.loads(file.read_text())
    raw["parallel"] = {"sp": 1, "dp_shard": "auto"}
    file.write_text(json.dumps(raw))
    for ranks, steps in ((4, 10), (2, 20)):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(ranks),
            "-m",
            "ring_hilbert.cli",
        ]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONPATH": str(ROOT),
            "CUDA_VISIBLE_DEVICES": "",
        }
        done = subprocess.run(
            [*command, "pretrain", "--config", str(file), f"train.steps={steps}"],
            env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    run = json.loads((parts / "checkpoints" / "step_00000020" / "run.json").read_text())
    assert (run["world_size"], run["progress"]["sequences"]) == (2, 80)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    weights, expected = (load_file(folder / "checkpoints" / "model" / "model.safetensors") for folder in (parts, whole))
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-5)
