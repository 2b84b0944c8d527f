# SPDX-License-Identifier: Apache-2.0
"""Processes that find what torchrun would have given them, without the seconds that its start and their imports take."""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]  # documented

from tests.harness.ranks import process_context


class Launched:
    """As a context, `world_size` processes that call `function(*args)`; at its end those that still run are killed.

    What each writes to stdout and stderr is in a file of `folder`.
    """

    def __init__(self, folder: Path, world_size: int, function: Callable[..., object], *args: Any) -> None:
        minute = datetime.timedelta(minutes=1)
        self.store = TCPStore("127.0.0.1", 0, None, True, minute, wait_for_workers=False)
        self.outputs = [folder / f"output{rank}" for rank in range(world_size)]
        self.processes = [
            process_context().Process(
                target=_begin, args=(rank, world_size, self.store.port, output, function, args), daemon=True
            )
            for rank, output in enumerate(self.outputs)
        ]

    def __enter__(self) -> Launched:
        for process in self.processes:
            process.start()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def told(self, rank: int) -> str:
        """Its output so far."""
        return self.outputs[rank].read_text(errors="replace") if self.outputs[rank].exists() else ""


def _begin(
    rank: int, world_size: int, port: int, output: Path, function: Callable[..., object], args: tuple[Any, ...]
) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    function(*args)
