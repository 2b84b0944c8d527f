# SPDX-License-Identifier: Apache-2.0
"""One folder, one run: a lock that names its holder and is released by the system however the holder dies."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
import uuid
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

LOCK = "run.lock"
PATIENCE = 10.0  # seconds to wait for a run that is just ending, and for a file to become visible on other hosts
UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


class FolderLock:
    """The exclusive right of one run to write to a folder.

    Args:
        folder: created if missing.
        about: further facts on the holder to write to the file.

    Attributes:
        nonce: a number unique to this run: whoever reads it in the file sees the same folder.
        note: a warning, None if all is well.

    Raises:
        ValueError: if another run holds it; names its host and process. Or if the file cannot be written.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.path = folder / LOCK
        self.nonce = uuid.uuid4().hex
        self.note: str | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self._descriptor = self._acquire()
        since = datetime.now(timezone.utc).isoformat(timespec="seconds")
        holder = {"nonce": self.nonce, "host": socket.gethostname(), "process": os.getpid(), "since": since, **about}
        try:
            os.ftruncate(self._descriptor, 0)
            os.write(self._descriptor, json.dumps(holder).encode())
            os.fsync(self._descriptor)
        except OSError as error:  # which names no file
            os.close(self._descriptor)
            raise ValueError(f"checkpoint.dir: {self.path} cannot be written: {error.strerror}") from error

    def check(self) -> None:
        """Check that this run still holds the folder; another could take it if locks do not work across hosts.

        Raises:
            ValueError: if another run has taken it.
        """
        holder = read_lock(self.path.parent)
        if holder is not None and holder["nonce"] != self.nonce:
            raise ValueError(f"checkpoint.dir: {_describe(holder)} has taken {self.path.parent} over from this run")

    def release(self) -> None:
        """Release the folder and the file."""
        holder = read_lock(self.path.parent)
        if holder is not None and holder["nonce"] == self.nonce:
            self.path.unlink(missing_ok=True)
        os.close(self._descriptor)

    def _acquire(self) -> int:
        deadline = time.monotonic() + PATIENCE
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_the_file(descriptor):
                    return descriptor
            except OSError as error:
                if error.errno in UNSUPPORTED:
                    self.note = (
                        f"{self.path.parent} cannot be locked ({error.strerror}): make sure that no other run uses it"
                    )
                    return descriptor
                if not isinstance(error, BlockingIOError):
                    os.close(descriptor)
                    raise
            os.close(descriptor)
            if time.monotonic() > deadline:
                raise ValueError(
                    f"checkpoint.dir: {_describe(read_lock(self.path.parent))} is using {self.path.parent}; wait for it, end it, "
                    "or give this run another checkpoint.dir"
                )
            time.sleep(0.2)

    def _is_the_file(self, descriptor: int) -> bool:
        """Whether the file was not replaced between opening and locking it."""
        try:
            return os.path.samestat(os.fstat(descriptor), self.path.stat())
        except FileNotFoundError:
            return False


def read_lock(folder: Path) -> dict[str, Any] | None:
    """What a folder's lock file says of its holder, None if there is none, or it is just being written."""
    try:
        holder = json.loads((folder / LOCK).read_text())
        return holder if "nonce" in holder else None
    except (FileNotFoundError, ValueError, TypeError):
        return None


def require_same_folder(folder: Path, nonce: str, writer: str) -> None:
    """Wait until this process sees the lock that host `writer` holds in the folder of this name.

    Raises:
        ValueError: if it does not.
    """
    deadline = time.monotonic() + PATIENCE
    while (read_lock(folder) or {}).get("nonce") != nonce:
        if time.monotonic() > deadline:
            raise ValueError(
                f"checkpoint.dir: {socket.gethostname()} does not see in {folder} what rank 0 has written there on {writer}; it "
                "must be on a file system that all hosts share"
            )
        time.sleep(0.2)


def _describe(holder: dict[str, Any] | None) -> str:
    if holder is None:
        return "another run"
    return f"another run (process {holder.get('process')} on {holder.get('host')}, since {holder.get('since')})"
