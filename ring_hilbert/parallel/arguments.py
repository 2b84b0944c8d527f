# SPDX-License-Identifier: Apache-2.0
"""What the arguments of a call must be, checked here for the operator, its modules, `prepare`, `shard_batch` and `plan` alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ring_hilbert.ops.order import TokenOrder
from ring_hilbert.ops.visible import PADDING

LAYOUTS = ("contiguous", "zigzag")
STRATEGIES = ("exchange", "ring", "ulysses", "auto")


def check_choices(*, order: TokenOrder | None = None, layout: str = "contiguous", strategy: str = "auto") -> None:
    """Raise ValueError unless these are an order, a layout and a strategy."""
    if order is not None and not isinstance(order, TokenOrder):
        raise ValueError(f"order must be a TokenOrder or None, got {type(order).__name__}")
    for name, value, known in (("layout", layout, LAYOUTS), ("strategy", strategy, STRATEGIES)):
        if value not in known:
            raise ValueError(f"{name}={value!r} is not supported; use one of {', '.join(map(repr, known))}")


def kv_heads_of(
    num_heads: int, num_kv_heads: int | None, names: tuple[str, str] = ("num_heads=", "num_kv_heads=")
) -> int:
    """`num_kv_heads`, by default `num_heads`; ValueError, with their `names`, unless that is a multiple of it."""
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if kv_heads < 1 or num_heads % kv_heads:
        fits = max((n for n in range(1, min(num_heads, kv_heads) + 1) if num_heads % n == 0), default=1)
        raise ValueError(
            f"{names[0]}{num_heads} must be a multiple of {names[1]}{kv_heads}; the nearest that fits is {fits}"
        )
    return kv_heads


def metadata(
    name: str, value: Any, rows: int, batch: int | None = None, *, whose: str = "the rows of this rank"
) -> Tensor:
    """Positions or document ids as int64 `[1 or B, rows]`.

    Raises:
        ValueError: for another type or shape, or ids less than -1 that the host can read without waiting for a device.
    """
    kind = value.dtype if isinstance(value, Tensor) else None
    if kind is None or kind == torch.bool or kind.is_floating_point or kind.is_complex:
        raise ValueError(f"{name} must be a tensor of integers, got {kind or type(value).__name__}")
    lines = value.shape[0] if value.ndim == 2 else 1
    if value.ndim not in (1, 2) or value.shape[-1] != rows or lines not in (1, lines if batch is None else batch):
        raise ValueError(
            f"{name} must be [{rows}] or [{'B' if batch is None else batch}, {rows}] ({whose}), got {list(value.shape)}"
        )
    integers = torch.atleast_2d(value.detach()).to(torch.int64)
    if name == "document_ids" and integers.device.type == "cpu" and integers.numel():
        check_least_document(int(integers.min()))
    return integers


def check_least_document(least: int, name: str = "document_ids") -> None:
    """Raise ValueError if the `least` of the document ids is less than that of padding."""
    if least < PADDING:
        raise ValueError(f"{name} must be >= 0, or {PADDING} for padding rows, got {least}")
