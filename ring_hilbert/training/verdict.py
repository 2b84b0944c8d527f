# SPDX-License-Identifier: Apache-2.0
"""For which rank a rank waits, by all ranks' last reports."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path

from ring_hilbert.training.hosts import identity

SILENT = 5.0  # seconds without a message after which a rank counts as stopped, gone or cut off
NAMED = 4  # most ranks named in a message


def _machine() -> str:
    """Equal on two ranks that see each other's processes by their numbers; containers of one host need not."""
    try:
        return f"{identity()} {Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return identity()


@dataclass(frozen=True)
class Report:
    """A rank's report on itself.

    Attributes:
        machine: see `_machine`.
        whereabouts, collective: as in `Whereabouts` and `collective_of`.
        idle: seconds since anything last moved.
        progress: of long work, for those that wait.
        failure: the exception that ends it.
        leaving: whether it has found that it waits in vain, and ends.
        number: of the message.
    """

    rank: int
    host: str = field(default_factory=socket.gethostname)
    machine: str = field(default_factory=_machine)
    pid: int = field(default_factory=os.getpid)
    whereabouts: str = "start-up"
    collective: str | None = None
    idle: float = 0.0
    progress: str = ""
    failure: str = ""
    leaving: bool = False
    number: int = 0

    def as_json(self) -> str:
        """All of it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Report:
        """The report that `as_json` wrote."""
        return cls(**json.loads(text))

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid})"

    @property
    def place(self) -> str:
        """The collective, and where in the run it is."""
        return f"{self.collective}, {self.whereabouts}" if self.collective else self.whereabouts


@dataclass
class Heard:
    """The last report of another rank, and the seconds since then, excluding those in which this process itself was stopped.

    `patience`: the most seconds between two reports.
    """

    report: Report
    patience: float = SILENT
    silence: float = 0.0

    def absent(self, machine: str) -> str:
        """Why the rank will not respond, as seen from this machine; empty if it is alive."""
        state = _process_state(self.report) if self.report.machine == machine else ""
        if state in ("T", "t"):
            return "is stopped"
        if state in ("Z", "X", "gone"):
            return "has ended"
        return "has not been heard of" if self.silence > self.patience else ""


def verdict(me: Report, others: Sequence[Heard], store: str, keeper: int | None) -> str:
    """One sentence: how long this rank has waited, where, and for which rank.

    Args:
        me: with the seconds waited as `idle`.
        others: all other ranks.
        store: the address of the store that relays messages.
        keeper: the rank whose process hosts the store; None if a launcher does.
    """
    waited = f"has waited {me.idle:.0f} s, since {_ago(me.idle)}," if me.idle > 1 else "cannot go on"
    waits = f"{me} {waited} in {me.place}"
    gone = [heard for heard in others if heard.absent(me.machine)]
    absent = {heard.report.rank: heard for heard in gone if not heard.report.leaving}
    failed = [heard.report for heard in others if heard.report.failure]
    cut_off = len(gone) == len(others) > 1
    if keeper in absent and (cut_off or len(others) == 1):
        return f"{waits}, for {_missing(absent[keeper], me)}; it hosts the store at {store}, so that no other rank can be heard"
    if failed:
        return f"{waits}, for {', '.join(f'{report}, which failed: {report.failure}' for report in failed[:NAMED])}"
    if cut_off:  # nothing can be heard from this host either
        absent = {rank: h for rank, h in absent.items() if h.report.machine != me.machine} or absent
    if absent:
        named = "; ".join(_missing(heard, me) for heard in list(absent.values())[:NAMED])
        more = f"; and {len(absent) - NAMED} more ranks" if len(absent) > NAMED else ""
        alone = f"; nobody else has been heard of, so this host may be cut off from {store}" if cut_off else ""
        return f"{waits}, for {named}{more}{alone}"
    late = [heard.report for heard in others if heard.report.collective is None]
    if me.collective is None and not late:
        return f"{waits}: the others wait for it"
    where = "; ".join(
        f"{r} is in {r.place}, for {r.idle:.0f} s"
        for r in sorted(late or [h.report for h in others], key=_order)[:NAMED]
    )
    return f"{waits}, for ranks that are elsewhere: {where}"


def _order(report: Report) -> tuple[float, int]:
    return -report.idle, report.rank


def _missing(heard: Heard, me: Report) -> str:
    report = heard.report
    return f"{report}, which {heard.absent(me.machine)} since {_ago(heard.silence)}, when it was in {report.place}"


def _ago(seconds: float) -> str:
    return (datetime.now(timezone.utc) - timedelta(seconds=seconds)).strftime("%H:%M:%S UTC")


def _process_state(report: Report) -> str:
    """The Linux state of a process of this machine, "gone" if there is none; empty if not known."""
    if not Path("/proc/self/stat").exists():
        return ""
    try:
        return Path(f"/proc/{report.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "gone"
