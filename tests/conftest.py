# SPDX-License-Identifier: Apache-2.0
"""What every test runs under: one thread per process, no network, and hypothesis the same on every machine."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; spawned ranks and commands inherit it
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

from hypothesis import HealthCheck, settings

# The first example of a process pays for imports and spawned ranks, so neither deadlines nor slowness say anything.
settings.register_profile(
    "fast", max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("full", settings.get_profile("fast"), max_examples=250)
settings.load_profile("fast")
