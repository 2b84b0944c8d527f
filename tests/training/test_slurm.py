# SPDX-License-Identifier: Apache-2.0
"""Slurm with two nodes on this machine, a network namespace each: submitted, preempted, requeued, ended."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ring_hilbert.training.metrics import read_metrics
from tests.harness.namespaces import ADDRESSES, ROOT, two_hosts
from tests.harness.ranks import run_ranks
from tests.harness.tiny_run import write_texts
from tests.training.test_hosts import config_of, losses, single

NODES = ("rha", "rhb")
CONFIGURATION = """\
ClusterName=test
SlurmctldHost=rha({addresses[0]})
SlurmUser=root
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
SchedulerParameters=sched_interval=2,requeue_delay=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MailProg=/bin/true
NodeName=rha NodeAddr={addresses[0]} CPUs={cpus}
NodeName=rhb NodeAddr={addresses[1]} CPUs={cpus}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=90
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""


class Cluster:
    """The daemons, and commands on the first node."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder, self.names = folder, names
        self.environment = {
            **{key: value for key, value in os.environ.items() if key not in ("GLOO_SOCKET_IFNAME", "WORLD_SIZE")},
            "SLURM_CONF": str(folder / "slurm.conf"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RANKS_PER_HOST": "2",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin", "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        self.daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Write the configuration and start munged, slurmctld and two slurmd."""
        (self.folder / "slurm.conf").write_text(
            CONFIGURATION.format(folder=self.folder, addresses=ADDRESSES, cpus=os.cpu_count())
        )
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # which is not used, and not looked for
        (self.folder / "munge").mkdir(mode=0o755)
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        files = [f"--{name}-file={self.folder}/munge/{name}" for name in ("key", "pid", "log", "seed")]
        self._daemon("munged", "--foreground", "--force", f"--socket={self.folder}/munge/socket", *files)
        self._wait(lambda: (self.folder / "munge" / "socket").exists(), 20)
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir()
        self._daemon(*self._on(0), "slurmctld", "-D")
        for number in range(2):
            self._daemon(*self._on(number), "slurmd", "-D", "-N", NODES[number])
        self._wait(lambda: self.run("sinfo", "-h", "-o", "%T").stdout.split() == ["idle"], 60)

    def stop(self) -> None:
        """End what was started, the steps of jobs included."""
        self.run("scancel", "--full", "--signal=KILL", "--user=root")
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """A command of Slurm on the first node."""
        return subprocess.run(
            [*self._on(0), *map(str, command)], env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=60,
            check=False,
        )  # fmt: skip

    def wait_for(self, job: str, states: set[str], seconds: float) -> None:
        """Until the job is in one of these states."""
        self._wait(lambda: self.state(job) in states, seconds)

    def state(self, job: str) -> str:
        """Of a job, as squeue and scontrol call it."""
        shown = self.run("scontrol", "show", "job", job).stdout
        return shown.partition("JobState=")[2].split()[0] if "JobState=" in shown else "unknown"

    def _on(self, node: int) -> list[str]:
        """A node is a namespace and a name."""
        return [
            "ip",
            "netns",
            "exec",
            self.names[node],
            "unshare",
            "--uts",
            "sh",
            "-c",
            f'hostname {NODES[node]}; exec "$@"',
            "sh",
        ]

    def _daemon(self, *command: str) -> None:
        with (self.folder / "daemons.log").open("ab") as log:
            self.daemons.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))

    def _wait(self, what: Callable[[], bool], seconds: float) -> None:
        began = time.monotonic()
        while not what():
            if time.monotonic() - began > seconds:
                logs = [path.read_text(errors="replace")[-1500:] for path in sorted(self.folder.glob("*.log"))]
                raise TimeoutError("\n----\n".join([self.run("squeue", "-a").stdout, self.run("sinfo").stdout, *logs]))
            time.sleep(0.3)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    missing = [
        name
        for name in ("munged", "slurmctld", "slurmd", "sbatch")
        if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None
    ]
    if missing:
        pytest.skip(f"Slurm is not installed ({', '.join(missing)}); on Debian: apt install slurm-wlm munge")
    with two_hosts() as hosts:
        etc = [Path("/etc/netns") / name for name in hosts.names]  # `ip netns exec` mounts this over /etc/hosts
        for folder in etc:
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(
                "127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for a, n in zip(ADDRESSES, NODES, strict=True))
            )
        found = Cluster(tmp_path, hosts.names)
        try:
            found.start()
            yield found
        finally:
            found.stop()
            for folder in etc:
                shutil.rmtree(folder)


@pytest.mark.full
@pytest.mark.timeout(600)
def test_preempted_requeued_and_ended(tmp_path: Path, cluster: Cluster) -> None:
    """A job of higher priority takes the nodes in the middle of a run, which later resumes as if nothing had happened."""
    write_texts(tmp_path)
    run_ranks(single, 4, config_of(tmp_path / "one", tmp_path, parallel__sp=4), timeout=200)
    two = tmp_path / "two"
    file = config_of(two, tmp_path, parallel__sp=4, checkpoint__every=1000)
    submitted = cluster.run(
        "sbatch", "--parsable", "--partition", "low", "--nodes", "2", f"--chdir={ROOT}", f"--output={tmp_path}/job.log",
        ROOT / "launch" / "slurm.sbatch", "--config", file,
    )  # fmt: skip
    assert submitted.returncode == 0, submitted.stderr
    job, metrics = submitted.stdout.strip(), two / "logs" / "metrics.jsonl"
    cluster._wait(lambda: metrics.exists() and metrics.read_text().count("\n") >= 5, 120)
    other = cluster.run(
        "sbatch",
        "--parsable",
        "--partition",
        "high",
        "--nodes",
        "2",
        f"--output={tmp_path}/other.log",
        "--wrap",
        "sleep 3",
    )
    cluster.wait_for(job, {"PENDING"}, 120)
    saved = [path.name for path in (two / "checkpoints").iterdir()]
    assert len(saved) == 1 and 5 <= int(saved[0].removeprefix("step_")) < 60, saved
    cluster.wait_for(other.stdout.strip(), {"COMPLETED"}, 60)
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")  # Slurm holds back requeued jobs for two minutes
    cluster.wait_for(job, {"COMPLETED"}, 200)
    log = (tmp_path / "job.log").read_text(errors="replace")
    assert "stopped after step" in log and "resumed from step" in log and "model: " in log
    assert "Restarts=1" in cluster.run("scontrol", "show", "job", job).stdout
    assert losses(two) == losses(tmp_path / "one") and len(read_metrics(metrics)) == 60
    weights, expected = (
        load_file(folder / "checkpoints" / "model" / "model.safetensors") for folder in (two, tmp_path / "one")
    )
    assert all(torch.equal(weight, expected[name]) for name, weight in weights.items())
