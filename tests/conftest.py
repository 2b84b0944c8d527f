# SPDX-License-Identifier: Apache-2.0
"""What every test runs under: one thread per process, no network, and hypothesis the same on every machine."""

import importlib.util
import os
import subprocess
from multiprocessing.process import BaseProcess

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; spawned ranks and commands inherit it
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

import pytest
from hypothesis import HealthCheck, settings

# The first example of a process pays for imports and spawned ranks, so neither deadlines nor slowness say anything.
settings.register_profile(
    "fast", max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("quick", settings.get_profile("fast"), max_examples=5)
settings.register_profile("full", settings.get_profile("fast"), max_examples=250)
settings.load_profile("fast")


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option of `run.sh --quick`."""
    parser.addoption(
        "--quick",
        action="store_true",
        help="leave slow tests out, and skip the others as soon as they start a process or interpret a kernel",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --quick: no slow test."""
    if config.getoption("quick"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.fixture(autouse=True)
def quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --quick no test gets further than to where it starts ranks or commands, or Triton's interpreter."""

    def skip(*_: object, **__: object) -> None:
        pytest.skip("starts a process, or interprets a kernel (--quick)")

    if request.config.getoption("quick"):
        monkeypatch.setattr(subprocess.Popen, "__init__", skip)
        monkeypatch.setattr(BaseProcess, "start", skip)
        if "TRITON_INTERPRET" in os.environ and importlib.util.find_spec("triton") is not None:
            monkeypatch.setattr("triton.runtime.interpreter.GridExecutor.__call__", skip)
