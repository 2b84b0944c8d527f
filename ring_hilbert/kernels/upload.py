# SPDX-License-Identifier: Apache-2.0
"""Index tensors from the host to where they are read."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`. The host does not wait for what a CUDA device has still to do: that needs pinned memory."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
