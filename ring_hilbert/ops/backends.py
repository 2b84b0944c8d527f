# SPDX-License-Identifier: Apache-2.0
"""Which core computes a call: the Triton kernels or PyTorch's operators."""

from __future__ import annotations

import os

import torch
from torch.utils._triton import has_triton_package

BACKENDS = ("triton", "torch", "auto")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def unsupported(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the kernels cannot run for this device, dtype and head dim; None if they can."""
    if not has_triton_package():
        return "Triton is not installed"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return (
            f"the device is {device.type}; the kernels need a CUDA device, or Triton's interpreter (TRITON_INTERPRET=1)"
        )
    if dtype not in DTYPES:
        return f"the dtype is {dtype}; there are kernels for float16, bfloat16 and float32"
    if head_dim % 8 or head_dim > 256:
        return f"the head dim is {head_dim}; there are kernels for multiples of 8 up to 256"
    return None


def choose(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The backend to run, "triton" or "torch", for `backend`, which may be "auto": Triton on CUDA devices where it can run.

    Raises:
        ValueError: for another name, or for "triton" where it cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not supported; use one of {', '.join(map(repr, BACKENDS))}")
    why = unsupported(device, dtype, head_dim)
    if backend == "triton" and why:
        raise ValueError(f"backend='triton' is not supported here: {why}; use backend='torch' or 'auto'")
    automatic = "triton" if device.type == "cuda" and not why else "torch"
    return automatic if backend == "auto" else backend
