# SPDX-License-Identifier: Apache-2.0
"""Two hosts on this machine: network namespaces joined by a link that can be cut. They share the disk, and have one name."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ADDRESSES = ("10.231.77.1", "10.231.77.2")


class Hosts:
    """Names and addresses of the two; the interface is called veth0 on both."""

    def __init__(self) -> None:
        self.names = [f"rh{os.getpid()}{side}" for side in "ab"]

    def start(self, host: int, *command: str | Path, log: Path, **environment: str) -> subprocess.Popen[bytes]:
        """A command on a host, its output in `log`."""
        inherited = {key: value for key, value in os.environ.items() if key != "GLOO_SOCKET_IFNAME"}
        changes = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        with log.open("ab") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.names[host], *map(str, command)],
                env={**inherited, **changes, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **environment},
                cwd=ROOT, stdout=file, stderr=file, start_new_session=True,
            )  # fmt: skip

    def run(self, host: int, *command: str) -> None:
        """A command on a host, to its end."""
        _ip("netns", "exec", self.names[host], *command)

    def link(self, state: str) -> None:
        """Cut the link ("down": no carrier, which the hosts see; "lost": frames vanish, which they do not) or mend it ("up")."""
        _ip("-n", self.names[1], "link", "set", "veth0", "down" if state == "down" else "up")
        if state != "down":
            nowhere = ("lladdr", "02:00:00:00:00:00", "nud", "permanent") if state == "lost" else ("nud", "failed")
            for name, other in zip(self.names, reversed(ADDRESSES), strict=True):
                _ip("-n", name, "neigh", "replace", other, "dev", "veth0", *nowhere)


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """The hosts, removed afterwards; skips the test where they may not be made."""
    if shutil.which("ip") is None:
        pytest.skip("there is no `ip` (iproute2) to make network namespaces with")
    hosts = Hosts()
    one, two = hosts.names
    try:
        try:
            for name in hosts.names:
                _ip("netns", "add", name)
            _ip("-n", one, "link", "add", "name", "veth0", "type", "veth", "peer", "name", "veth0", "netns", two)
        except subprocess.CalledProcessError as error:
            reason = error.stderr.decode().strip()
            if not any(
                words in reason
                for words in ("not permitted", "not supported", "Permission denied", "Unknown device type")
            ):
                raise
            pytest.skip(f"network namespaces are not permitted here: {reason}")
        for name, address in zip(hosts.names, ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "veth0")
            _ip("-n", name, "link", "set", "veth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield hosts
    finally:
        for name in hosts.names:
            left = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False).stdout
            for process in left.split():
                os.kill(int(process), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], capture_output=True, check=True)
