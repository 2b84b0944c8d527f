# SPDX-License-Identifier: Apache-2.0
"""The hosts of a run: which this is, which device a rank takes, which interface leads to the first host, and how the ranks meet.

As a command for launchers: `python -m ring_hilbert.training.hosts 10.0.0.1 29400 [eth0]` prints this host's address and
interface towards 10.0.0.1 (or of eth0), whether the ranks should meet here, at port 29400 (1 or 0), and the number of CUDA devices.
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store, _set_pg_timeout
from torch.distributed.rendezvous import rendezvous

ANYWHERE = "192.0.2.1"  # reserved for documentation: only the default route leads there
SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface
SLACK = 30.0  # seconds by which the store may miss a time limit
STATUS = 70  # of a process that ends a hang by ending itself


def identity() -> str:
    """Equal on two ranks iff they share a kernel and its network; host names are neither unique nor always distinct."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/net').stat().st_ino}"
    except OSError:
        return socket.gethostname()


def rank_device() -> torch.device:
    """This rank's CUDA device, made the current one, or the CPU.

    Raises:
        ValueError: if there are CUDA devices, but fewer than ranks on this host.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= count:
        raise ValueError(
            f"local rank {local_rank} has no CUDA device of its own: this host has {count}; "
            f"start {count} ranks per host, or hide the devices with CUDA_VISIBLE_DEVICES= to run on the CPU"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def local_address(towards: str) -> str | None:
    """The source address of packets to `towards`, None if it is unreachable."""
    for family, _, _, _, target in _resolved(towards):
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(target)  # sends nothing
                return probe.getsockname()[0]
            except OSError:
                continue
    return None


def is_local(host: str, port: int = 0) -> bool:
    """Whether `host` is an address or name of this machine, and nothing listens there at `port` (0: any port)."""
    for family, kind, protocol, _, target in _resolved(host):
        with socket.socket(family, kind, protocol) as probe:
            try:
                # A process that has just ended does not listen.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((target[0], port))
                return True
            except OSError:
                continue
    return False


def reachable_address(head: str) -> str | None:
    """`local_address`, but on the head itself, whose own name often leads to its loopback, that of the default route."""
    address = local_address(head)
    if address is not None and ipaddress.ip_address(address).is_loopback:
        return local_address(ANYWHERE) or address
    return address


def interface_of(address: str | None) -> str | None:
    """The interface with this IPv4 address; None if not known (on systems other than Linux)."""
    if sys.platform != "linux" or address is None:
        return None
    return next((name for _, name in socket.if_nameindex() if address_of(name) == address), None)


def address_of(interface: str) -> str | None:
    """The IPv4 address of an interface of this host; None if it has none, or there is no such interface. Linux."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            found = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            return None
    return socket.inet_ntoa(found[20:24])


def gloo_address() -> str:
    """The address that this process's Gloo announces: that of GLOO_SOCKET_IFNAME, or the one to which this host's name resolves."""
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return f"interface {os.environ['GLOO_SOCKET_IFNAME']}, as GLOO_SOCKET_IFNAME says"
    name = socket.gethostname()
    address = next((target[4][0] for target in _resolved(name) if is_local(target[4][0])), "127.0.0.1")
    return f"interface {interface_of(address)} ({address}), where the name {name} leads to"


def join(backend: str, start: float, timeout: float, device: torch.device | None = None) -> None:
    """Initialise the process group that the launcher describes.

    With several hosts and GLOO_SOCKET_IFNAME not set, it is set to the interface that leads to MASTER_ADDR: by default Gloo
    takes the one to which this host's name resolves, which is often the loopback or a container bridge.

    Args:
        backend: of torch.distributed.
        start: seconds to wait for the others.
        timeout: seconds that a collective may take.
        device: this rank's, for NCCL to connect at once; None: on first use.

    Raises:
        ValueError: if ranks do not arrive, naming them; or cannot reach each other, naming the interfaces.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    head = os.environ.get("MASTER_ADDR", "")
    place = f"{head}:{os.environ.get('MASTER_PORT', '')}"
    try:
        with answered(start):
            store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=start)))
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"rank {rank} on {socket.gethostname()}: {place} (MASTER_ADDR, MASTER_PORT) did not answer within {start:g} s; see "
            f"that the address is right, its port open, and that the first host was started: {error}"
        ) from error
    with answered(start):
        store.set(f"host/{rank}", identity())
        _wait_for_all(store, rank, size, start)
        several = len({store.get(f"host/{other}") for other in range(size)}) > 1
    address = local_address(head)
    if "GLOO_SOCKET_IFNAME" not in os.environ and several:
        interface = interface_of(address)
        if interface is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = interface
    try:
        with answered(4 * start):  # Gloo tries so often to connect before it says what failed
            dist.init_process_group(
                backend,
                store=PrefixStore("group", store),
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=start),
                device_id=device,
            )
    except RuntimeError as error:
        raise ValueError(
            f"rank {rank} on {socket.gethostname()}: all ranks found {place}, but do not reach each other. Here Gloo took "
            f"{gloo_address()}; {head} is reached by interface {interface_of(address)} ({address}). Set GLOO_SOCKET_IFNAME on "
            f"every host to the interface towards the others (NCCL_SOCKET_IFNAME as well, with CUDA), or open its ports: {error}"
        ) from error
    _set_pg_timeout(timedelta(seconds=timeout))


@contextmanager
def answered(seconds: float) -> Iterator[None]:
    """End this process where the ranks do not meet in the block in so many seconds and a little more, and say so.

    By itself the store waits for an answer as long as TCP tries, for ever where the process that keeps it is stopped; its time
    limits are for keys that nobody sets.
    """
    place = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    text = (
        f"ring-hilbert: rank {os.environ.get('RANK', 0)} on {socket.gethostname()}: the store at {place}, where ranks meet, has "
        f"not answered for {seconds + SLACK:g} s; the process that keeps it is stopped, or this host was cut off from it "
        "(timeouts.start)\n"
    )
    timer = threading.Timer(seconds + SLACK, lambda: (os.write(2, text.encode()), os._exit(STATUS)))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _wait_for_all(store: Store, rank: int, size: int, start: float) -> None:
    """Wait until every rank has registered; rank 0 reports for whom it waits."""
    keys = [f"host/{other}" for other in range(size)]
    began, tell = time.monotonic(), 10.0
    while not store.check(keys):
        waited = time.monotonic() - began
        if waited > min(start, tell):
            missing = ranks_named([other for other, key in enumerate(keys) if not store.check([key])])
            if waited > start:
                raise ValueError(
                    f"rank {rank} on {socket.gethostname()}: {missing} of {size} did not come within {start:g} s; see that they "
                    "were started on every host, with the same address, port and number of hosts"
                )
            if rank == 0:
                print(f"waiting for {missing} of {size} to start", file=sys.stderr, flush=True)  # noqa: T201
            tell = waited + 10
        time.sleep(0.05)


def groups_across(machines: Sequence[str], sp: int) -> list[int]:
    """The numbers of the sp groups (neighbouring ranks) that span several machines; `machines` in rank order."""
    return [group for group in range(len(machines) // sp) if len(set(machines[group * sp : (group + 1) * sp])) > 1]


def ranks_named(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 4 to 7`, `ranks 1, 2, 5`; the first eight of many."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks[:8]))}" + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def _resolved(host: str) -> list[tuple]:
    try:
        return socket.getaddrinfo(host, 9, type=socket.SOCK_STREAM)
    except OSError:
        return []


if __name__ == "__main__":
    head, port, *named = sys.argv[1:]
    out = address_of(named[0]) if named else reachable_address(head)
    print(out, interface_of(out), int(is_local(head, int(port))), torch.cuda.device_count())  # noqa: T201
