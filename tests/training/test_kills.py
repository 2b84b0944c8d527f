# SPDX-License-Identifier: Apache-2.0
"""Six of the kills of `tests.harness.kills`: each victim and each moment, with both engines."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.full
@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
def test_killed_runs_go_on(tmp_path: Path, engine: str) -> None:
    if engine == "deepspeed" and (importlib.util.find_spec("deepspeed") is None or shutil.which("g++") is None):
        pytest.skip("DeepSpeed, or g++ for its CPU extension, is not here")
    counts = ["--torch", "0", "--deepspeed", "0", f"--{engine}", "3"]
    command = [sys.executable, "-m", "tests.harness.kills", str(tmp_path), *counts]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=290, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count("bit for bit") == 3 and ended.stdout.endswith("3 kills, 0 failed\n")
