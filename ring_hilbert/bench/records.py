# SPDX-License-Identifier: Apache-2.0
"""Benchmark records: self-describing CSV rows that say what was measured, on what, with which commit, and when."""

from __future__ import annotations

import csv
import datetime
import functools
import platform
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def stamp(device: torch.device) -> dict[str, str]:
    """Date, commit (with "+" if the tree has changes), device and versions: the first columns of every row."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": _commit(),
        "device": name,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def append(path: Path, rows: Iterable[Mapping[str, Any]], device: torch.device) -> None:
    """Append stamped `rows` to the CSV file at `path`, which is created with a header if missing.

    Raises:
        ValueError: if the columns are not those of the file.
    """
    records = [stamp(device) | dict(row) for row in rows]
    if not records:
        return
    columns = list(records[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    if not new:
        with path.open(newline="") as file:
            present = next(csv.reader(file))
        if present != columns:
            raise ValueError(
                f"{path} has the columns {present}, the new rows {columns}; name another file with --output"
            )
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        writer.writerows(records)


@functools.cache
def _commit() -> str:
    """The commit of the running code, looked up once."""

    def git(*arguments: str) -> str:
        folder = Path(__file__).parent
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--", ":!*.csv") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
