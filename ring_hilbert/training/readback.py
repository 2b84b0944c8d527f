# SPDX-License-Identifier: Apache-2.0
"""Numbers that the host needs from a device, without waiting for what the device was given after them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def read_later(x: torch.Tensor) -> Callable[[], Any]:
    """Start copying `x` to the host. The function returned waits for that copy alone, and gives `x.tolist()` as it was here."""
    if x.device.type != "cuda":
        values = x.tolist()
        return lambda: values
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(x.device))

    def read() -> Any:
        copied.synchronize()
        return host.tolist()

    return read
