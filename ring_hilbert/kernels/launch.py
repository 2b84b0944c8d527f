# SPDX-License-Identifier: Apache-2.0
"""Kernel launches on whole tensors. Imports Triton: import this module only where it is installed.

Shapes: `B` batch, `S` outer or inner rows, `H` query heads, `Hkv` kv heads, `D` head dim, a multiple of 8. Strides
are multiples of 8, even 0; `D` is contiguous. A schedule's outer rows are q's in forward and dQ, k's in dK and dV.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ring_hilbert.kernels.backward import delta_kernel, dkdv_kernel, dq_kernel
from ring_hilbert.kernels.forward import forward_kernel, zero_keys_kernel
from ring_hilbert.kernels.starting import on
from ring_hilbert.kernels.tables import FEW_TILES, Schedule
from ring_hilbert.kernels.tiles import Tile, padded_head_dim

LOG2E = 1.4426950408889634
DELTA_ROWS = 64
STAGES = {"leave": 1, "finish": 2, "pass on": 3}


class Staging(NamedTuple):
    """The state that two launches share for rows on which both work, float32.

    `slots [B or 1, Hkv, S]` int32: the place of a row, -1 for rows that a single launch finishes. Row maximum (in powers of
    two) and total `[B, H, places]`, values (of the softmax, or of the gradient without the scale) `[B, places, H, D]`.
    """

    slots: Tensor
    maximum: Tensor
    total: Tensor
    values: Tensor

    @classmethod
    def allocate(cls, q: Tensor, slots: Tensor, places: int) -> Staging:
        """Uninitialised, for `q [B, S, H, D]`."""
        batch, _, heads, dim = q.shape
        row = torch.empty((batch, heads, places), dtype=torch.float32, device=q.device)
        return cls(slots, row, torch.empty_like(row), row.new_empty((batch, places, heads, dim)))


class Output(NamedTuple):
    """`out [B, S, H, D]`, `lse [B, H, S]` float32 and, on request, its rounding error `lse_error` of the same shape."""

    out: Tensor
    lse: Tensor
    lse_error: Tensor | None

    @classmethod
    def allocate(cls, q: Tensor, lse_error: bool, *, clear: bool = False) -> Output:
        """For `q [B, S, H, D]`: uninitialised, or (`clear`) the results of rows without a key, 0 and -inf."""
        make = torch.zeros if clear else torch.empty
        out = make(q.shape, dtype=q.dtype, device=q.device)
        lse = make((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32, device=q.device)
        rounding = make(lse.shape, dtype=torch.float32, device=q.device) if lse_error else None
        return cls(out, lse.fill_(float("-inf")) if clear else lse, rounding)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tile: Tile,
    schedule: Schedule,
    scale: float,
    output: Output,
    staging: Staging | None = None,
    *,
    stage: str = "leave",
    precision: str = "ieee",
) -> None:
    """Attend the schedule's rows.

    Args:
        q: `[B, S, H, D]`, fp16, bf16 or fp32.
        k, v: `[B, S, Hkv, D]`.
        tile: the tile for which the schedule was made.
        schedule: its outer rows are q's.
        scale: factor on the scores.
        output: where finished rows go.
        staging: where the running softmax of unfinished rows is stored and resumed.
        stage: with staging, whether this launch is to "leave" its rows there, to resume and "finish" them, or to resume them
            and "pass on".
        precision: of fp32 products, "ieee" or "tf32".
    """
    q, k, v, positive = _operands(q, k, v, scale, tile)
    slots, maximum, total, values = staging if staging is not None else (schedule.steps, q, q, q)
    sizes = {
        "BLOCK_M": tile.block_outer,
        "BLOCK_N": tile.block_inner,
        "STAGED": 0 if staging is None else STAGES[stage],
    }
    results: tuple[Tensor, ...] = output.out, output.lse
    more: tuple[Any, ...] = ()
    together: int | None = members(tile, q, k)
    grid = _grid(schedule, q, q.shape[2], together)
    if tile.specialized:
        from ring_hilbert.kernels.hopper_specialized_forward import forward_kernel as kernel

        assert together == 2, "a specialized tile is for two heads of a group"
        more, together = (torch.zeros(1, dtype=torch.int32, device=q.device), grid), None
        grid = min(math.prod(grid), _processors(q.device)), 1, 1
    elif tile.gluon:
        from ring_hilbert.kernels.hopper_forward import forward_kernel as kernel
    else:
        kernel = forward_kernel
        results += (output.lse if output.lse_error is None else output.lse_error,)
        sizes["LSE_ERROR"] = output.lse_error is not None
    on(kernel, grid)(
        q, k, v, *results, slots, maximum, total, values,
        _strides(q), _strides(k), _strides(v), _strides(output.out), _row_strides(output.lse), _slot_strides(staging),
        (0, 0, 0) if staging is None else _row_strides(maximum), _strides(values),
        *schedule.arguments, _in_twos(positive), *more, **sizes, **_options(q, k, schedule, tile, precision, together),
    )  # fmt: skip


def finish_rows(output: Output, staging: Staging, rows: Tensor) -> None:
    """Write the results of staged rows last passed on; `rows`: kv head, row and place of each, int64 `[3, n]`."""
    kv_head, row, place = rows
    group = staging.total.shape[1] // staging.slots.shape[1]
    for head in (kv_head * group + i for i in range(group)):
        total = staging.total[:, head, place]
        some = total > 0
        total = torch.where(some, total, 1.0)
        output.out[:, row, head] = (staging.values[:, place, head] / total[..., None]).to(output.out.dtype)
        maximum = torch.where(some, staging.maximum[:, head, place], 0.0).double()
        exact = (maximum + total.double().log2()) / LOG2E
        lse = exact.float()
        output.lse[:, head, row] = lse.masked_fill(~some, float("-inf"))
        if output.lse_error is not None:
            output.lse_error[:, head, row] = (exact - lse).float().masked_fill(~some, 0.0)


def add_zero_keys(out: Tensor, lse: Tensor, count: Tensor) -> None:
    """As in `ops.zero_keys`, in place, where `lse` has no rounding error."""
    batch, rows, heads, dim = out.shape
    on(zero_keys_kernel, (-(-rows // DELTA_ROWS), heads, batch))(
        out, lse, count, _strides(out), _row_strides(lse), count.stride(0), rows,
        GROUP=heads // len(count), D=dim, BLOCK_D=padded_head_dim(dim), BLOCK_M=DELTA_ROWS,
    )  # fmt: skip


def finish_gradient(gradient: Tensor, staging: Staging, rows: Tensor, scale: float) -> None:
    """Write the gradients of staged rows of q last passed on; like `finish_rows`."""
    kv_head, row, place = rows
    group = staging.total.shape[1] // staging.slots.shape[1]
    for head in (kv_head * group + i for i in range(group)):
        gradient[:, row, head] = (staging.values[:, place, head] * scale).to(gradient.dtype)


class RowTerms(NamedTuple):
    """What backward needs of every query row: dout, and lse in powers of two and delta, both float32 `[B, H, S]`."""

    dout: Tensor
    lse2: Tensor
    delta: Tensor


def row_terms(dout: Tensor, out: Tensor, lse: Tensor, lse_error: Tensor | None) -> RowTerms:
    """The terms of the merged softmax. With `lse_error` weights are exact to float32: its factor is moved into dout."""
    if lse_error is not None:
        exact = (lse.double() + lse_error.double()) * LOG2E
        lse2 = exact.float()
        factor = (lse2.double() - exact).nan_to_num(0.0).exp2().float()
        dout = dout.float() * factor.transpose(1, 2).unsqueeze(-1)
        # Of a row with one key, whose dq is 0, the rounding of delta is all that is left.
        delta = (dout * out.float()).sum(-1, dtype=torch.float64).float().transpose(1, 2).contiguous()
        return RowTerms(dout, lse2.masked_fill(lse == float("-inf"), float("inf")), delta)
    dout = _rows_of(dout)
    delta, lse2 = torch.empty_like(lse), torch.empty_like(lse)
    batch, rows, heads, dim = out.shape
    on(delta_kernel, (-(-rows // DELTA_ROWS), heads, batch))(
        out, dout, lse, delta, lse2, _strides(out), _strides(dout), _row_strides(lse), rows,
        D=dim, BLOCK_D=padded_head_dim(dim), BLOCK_M=DELTA_ROWS,
    )  # fmt: skip
    return RowTerms(dout, lse2, delta)


def dq(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    terms: RowTerms,
    gradient: Tensor,
    tile: Tile,
    schedule: Schedule,
    scale: float,
    staging: Staging | None = None,
    *,
    stage: str = "leave",
    precision: str = "ieee",
) -> None:
    """Write the schedule's rows of `gradient [B, S, H, D]`, in its dtype; arguments as in `forward`."""
    q, k, v, positive = _operands(q, k, v, scale, tile)
    dout, lse2, delta = _rows_of(terms.dout, tile), terms.lse2, terms.delta
    slots, _, _, values = staging if staging is not None else (schedule.steps, q, q, q)
    kernel = dq_kernel
    if tile.gluon:
        from ring_hilbert.kernels.hopper_backward import dq_kernel as kernel
    together = members(tile, q, k)
    on(kernel, _grid(schedule, q, q.shape[2], together))(
        q, k, v, dout, lse2, delta, gradient, slots, values,
        _strides(q), _strides(k), _strides(v), _strides(dout), _row_strides(lse2), _strides(gradient),
        _slot_strides(staging), _strides(values), *schedule.arguments, scale, _in_twos(positive),
        BLOCK_M=tile.block_outer, BLOCK_N=tile.block_inner,
        STAGED=0 if staging is None else STAGES[stage], **_options(q, k, schedule, tile, precision, together),
    )  # fmt: skip


def dkdv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    terms: RowTerms,
    gradients: tuple[Tensor, Tensor],
    tile: Tile,
    schedule: Schedule,
    scale: float,
    *,
    precision: str = "ieee",
) -> None:
    """Write the schedule's rows of `gradients`, of k's shape, in their dtype; the schedule's outer rows are k's."""
    q, k, v, positive = _operands(q, k, v, scale, tile)
    dout, lse2, delta = _rows_of(terms.dout, tile), terms.lse2, terms.delta
    kernel = dkdv_kernel
    if tile.gluon:
        from ring_hilbert.kernels.hopper_backward import dkdv_kernel as kernel
    on(kernel, _grid(schedule, q, k.shape[2]))(
        q, k, v, dout, lse2, delta, *gradients,
        _strides(q), _strides(k), _strides(v), _strides(dout), _row_strides(lse2),
        _strides(gradients[0]), _strides(gradients[1]), *schedule.arguments, positive, _in_twos(positive),
        BLOCK_N=tile.block_outer, BLOCK_M=tile.block_inner, **_options(q, k, schedule, tile, precision),
    )  # fmt: skip


def members(tile: Tile, q: Tensor, k: Tensor) -> int:
    """The number of heads of a group that one program processes together, sharing keys and values."""
    return 2 if tile.gluon and (q.shape[2] // k.shape[2]) % 2 == 0 else 1


@lru_cache(maxsize=64)
def _processors(device: torch.device) -> int:
    """Programs that stay resident, one on each multiprocessor; on the CPU, where they are interpreted, a few."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def _operands(q: Tensor, k: Tensor, v: Tensor, scale: float, tile: Tile) -> tuple[Tensor, Tensor, Tensor, float]:
    """Operands in the form that the kernels expect, with a non-negative scale."""
    q, k, v = _rows_of(q, tile), _rows_of(k, tile), _rows_of(v, tile)
    return (q, k, v, scale) if scale >= 0 else (-q, k, v, -scale)


def _rows_of(x: Tensor, tile: Tile | None = None) -> Tensor:
    """`x [B, S, H, D]` with contiguous rows, for copies of 16 bytes, at 32-bit offsets: of heads, and of rows in units of 8."""
    batch, row, head, column = x.stride()
    whole = column == 1 and not (batch | row | head) % 8 and x.shape[1] * row < 8 * 2**32 and x.shape[2] * head < 2**31
    if tile is not None and tile.gluon:
        whole &= x.data_ptr() % 16 == 0
    if whole:
        return x
    if math.prod(x.shape[1:]) >= 8 * 2**32:
        raise ValueError(f"the kernels take up to 2**35 numbers per batch entry and rank, got {list(x.shape)}")
    # Of a tensor that is contiguous, but begins elsewhere or has a single row, `contiguous()` would be the same.
    return x.clone(memory_format=torch.contiguous_format)


@lru_cache(maxsize=64)
def _in_twos(scale: float) -> tuple[float, float]:
    """The scale of scores in powers of two as two float32 numbers that sum to it."""
    exact = scale * LOG2E
    high = float(np.float32(exact))
    return high, exact - high


def _grid(schedule: Schedule, q: Tensor, heads: int, members: int = 1) -> tuple[int, int, int]:
    """Programs by tile and head, in either order (`FEW_TILES`), and batch entry; those of the first axis start one by one."""
    tiles, programs = schedule.walk.tiles.shape[1], heads // members
    return (programs, tiles, q.shape[0]) if tiles <= FEW_TILES else (tiles, programs, q.shape[0])


def _options(
    q: Tensor, k: Tensor, schedule: Schedule, tile: Tile, precision: str, members: int | None = None
) -> dict[str, Any]:
    walk = schedule.walk
    assert (tile.block_outer, tile.block_inner) == (walk.block_outer, schedule.block_inner)
    return _constants(tile, q.shape[2] // k.shape[2], q.shape[3], walk.indexed, walk.segments, precision, members)


@lru_cache(maxsize=256)
def _constants(
    tile: Tile, group: int, dim: int, indexed: bool, segments: bool, precision: str, members: int | None
) -> dict[str, Any]:
    """What kernels are compiled for; `members`: of a kernel that processes so many heads together."""
    alone = tile.gluon and members == 1
    limit = {"maxnreg": tile.registers} if tile.registers and torch.version.hip is None and not alone else {}
    shared = {"GROUP": group, "D": dim, "INDEXED": indexed}
    if tile.gluon:
        assert not segments
        more = {} if members is None else {"MEMBERS": members}
        return {**shared, **more, "num_warps": tile.warps * (members or 1), **limit}
    return {
        **shared, "BLOCK_D": padded_head_dim(dim), "SEGMENTS": segments, "PRECISION": precision,
        "num_warps": tile.warps, "num_stages": tile.stages, **limit,
    }  # fmt: skip


def _strides(x: Tensor) -> tuple[int, ...]:
    """Strides of `[B, S, H, D]` over batch, row and head."""
    batch, row, head, column = x.stride()
    assert column == 1 or x.shape[3] == 1, "rows must be contiguous"
    return batch, row, head


def _row_strides(x: Tensor) -> tuple[int, ...]:
    """Strides of `[B, H, S]` over batch, row and head."""
    batch, head, row = x.stride()
    return batch, row, head


def _slot_strides(staging: Staging | None) -> tuple[int, ...]:
    if staging is None:
        return 0, 0, 0
    batch, row, head = _row_strides(staging.slots)
    return (batch if len(staging.slots) > 1 else 0), row, head
