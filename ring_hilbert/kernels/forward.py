# SPDX-License-Identifier: Apache-2.0
"""Forward: one launch walks all that a query tile visits and writes out and lse once, from registers.

Online softmax (Milakov and Gimelshein, arXiv 1805.02867) in tiles (FlashAttention-2, arXiv 2307.08691), in powers of two.
"""

import triton
import triton.language as tl

from ring_hilbert.kernels.steps import (
    VARIES,
    above,
    along_grid,
    at_head,
    load_rows,
    next_step,
    outer_rows,
    row_interval,
    row_key,
    sees,
    slot_of,
    start_walk,
    step_rows,
    store_rows,
    tile_of,
    within_segments,
)


@triton.jit
def attend(
    values, maximum, total, q, k, v, k_stride, v_stride, number, runs, index, at,
    outer, interval, key, batch, key_stride, columns, scale2,
    D: tl.constexpr, BLOCK_N: tl.constexpr, SEGMENTS: tl.constexpr,
    INDEXED: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Merge `number` blocks of keys, from `at` on, into the running softmax `(values, maximum, total)`."""
    for _ in tl.range(0, number):
        inner, exists, weight = step_rows(at, BLOCK_N, INDEXED)
        keys = load_rows(k, k_stride, inner, exists, columns, D, MASKED)
        scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
        if MASKED:
            visible = sees(interval, row_key(key, batch, key_stride, inner, exists))
            visible = within_segments(visible, runs, at, outer, inner, SEGMENTS)
            powers = tl.where(visible, scores * scale2[0], float("-inf"))
            higher = tl.maximum(maximum, tl.max(powers, 1))
            finite = tl.where(higher == float("-inf"), 0.0, higher)
            if q.dtype == tl.float32:  # bitwise as in backward
                p = tl.where(visible, tl.math.exp2(above(scores, scale2, (finite - weight)[:, None])), 0.0)
            else:
                p = tl.math.exp2(powers - (finite - weight)[:, None])
        else:
            higher = tl.maximum(maximum, tl.max(scores, 1) * scale2[0])
            finite = higher
            if q.dtype == tl.float32:
                p = tl.math.exp2(above(scores, scale2, (finite - weight)[:, None]))
            else:
                p = tl.math.exp2(scores * scale2[0] - (finite - weight)[:, None])
        decay = tl.math.exp2(maximum - finite)
        maximum = higher
        total = total * decay + tl.sum(p, 1)
        values = values * decay[:, None]
        vals = load_rows(v, v_stride, inner, exists, columns, D, MASKED)
        values = tl.dot(p.to(vals.dtype), vals, values, input_precision=PRECISION)
        at = next_step(runs, index, at, BLOCK_N, INDEXED)
    return values, maximum, total, at


@triton.jit(do_not_specialize=VARIES)
def forward_kernel(
    q, k, v, out, lse, lse_error, slots, s_maximum, s_total, s_values,
    q_strides, k_strides, v_strides, out_strides, lse_strides, slot_strides, row_strides, values_strides,
    tables, order, tiles, steps, runs, rows, index, low, high, key,
    table_strides, num_tiles, tile_width, num_runs, interval_strides, scale2,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SEGMENTS: tl.constexpr, INDEXED: tl.constexpr,
    STAGED: tl.constexpr, LSE_ERROR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid `(tiles, H, B)` or `(H, tiles, B)`. For the tensors see `launch.forward`; strides are of `(batch, row, head)`.

    STAGED 1: rows with a slot leave their running softmax there instead of a result; 2: they resume from it; 3: both.
    """
    batch = tl.program_id(2).to(tl.int64)
    turn, head = along_grid(num_tiles)
    kv_head = head // GROUP
    tile, count, runs, run, full, masked = tile_of(
        tables, order, tiles, steps, runs, table_strides, num_tiles, tile_width, num_runs, batch, kv_head, turn
    )
    if count == 0:
        return
    outer = outer_rows(tile, rows, BLOCK_M)
    exists = outer >= 0
    columns = tl.arange(0, BLOCK_D)
    q = at_head(q, q_strides, batch, head, D)
    k = at_head(k, k_strides, batch, kv_head, D)
    v = at_head(v, v_strides, batch, kv_head, D)
    queries = load_rows(q, q_strides[1], outer, exists, columns, D, True)

    if STAGED:
        slots += batch * slot_strides[0] + kv_head * slot_strides[2]
        terms = batch * row_strides[0] + head * row_strides[2]
        s_values = at_head(s_values, values_strides, batch, head, D)
    if STAGED >= 2:
        slot = slot_of(slots, slot_strides, outer, exists)
        in_slot = slot >= 0
        s_row = terms + slot.to(tl.int64) * row_strides[1]
        maximum = tl.load(s_maximum + s_row, mask=in_slot, other=float("-inf"))
        total = tl.load(s_total + s_row, mask=in_slot, other=0.0)
        values = load_rows(s_values, values_strides[1], slot, in_slot, columns, D, True)
    else:
        maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        values = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    values, maximum, total, at = attend(
        values, maximum, total, queries, k, v, k_strides[1], v_strides[1], full, runs, index,
        start_walk(runs, run, index, BLOCK_N, INDEXED), outer, (outer, outer), key, batch, interval_strides[1], columns, scale2,
        D, BLOCK_N, SEGMENTS, INDEXED, False, PRECISION,
    )  # fmt: skip
    interval = row_interval(low, high, batch, interval_strides[0], outer, exists)
    values, maximum, total, at = attend(
        values, maximum, total, queries, k, v, k_strides[1], v_strides[1], masked, runs, index,
        at, outer, interval, key, batch, interval_strides[1], columns, scale2,
        D, BLOCK_N, SEGMENTS, INDEXED, True, PRECISION,
    )  # fmt: skip

    outer = outer_rows(tile, rows, BLOCK_M, True)
    exists = outer >= 0
    if STAGED == 1 or STAGED == 3:
        slot = slot_of(slots, slot_strides, outer, exists)
        in_slot = slot >= 0
        s_row = terms + slot.to(tl.int64) * row_strides[1]
        tl.store(s_maximum + s_row, maximum, mask=in_slot)
        tl.store(s_total + s_row, total, mask=in_slot)
        store_rows(s_values, values_strides[1], slot, in_slot, columns, values, D)
        if STAGED == 3:  # all its rows have a slot
            return
        exists = exists & (slot < 0)
    some = total > 0
    values = values / tl.where(some, total, 1.0)[:, None]
    store_rows(at_head(out, out_strides, batch, head, D), out_strides[1], outer, exists, columns, values, D)
    row = batch * lse_strides[0] + head * lse_strides[2] + outer.to(tl.int64) * lse_strides[1]
    ln2: tl.constexpr = 0.6931471805599453
    if LSE_ERROR:
        highest = tl.where(some, maximum, 0.0).to(tl.float64)
        exact = (highest + tl.math.log2(tl.where(some, total, 1.0).to(tl.float64))) * ln2
        rounded = exact.to(tl.float32)
        tl.store(lse_error + row, tl.where(some, (exact - rounded.to(tl.float64)).to(tl.float32), 0.0), mask=exists)
    else:
        rounded = (maximum + tl.math.log2(tl.where(some, total, 1.0))) * ln2
    tl.store(lse + row, tl.where(some, rounded, float("-inf")), mask=exists)


@triton.jit(do_not_specialize=["num_rows", "lse_strides", "count_stride"])
def zero_keys_kernel(
    out, lse, count, out_strides, lse_strides, count_stride, num_rows,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """`ops.zero_keys.add_zero_keys` of rows that see some, in place.

    Grid `(row blocks, H, B)`; strides are of `(batch, row, head)`.
    """
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    zeros = tl.load(count + (head // GROUP).to(tl.int64) * count_stride + rows, mask=rows < num_rows, other=0)
    some = zeros > 0
    if tl.max(zeros) > 0:
        at = lse + batch * lse_strides[0] + head * lse_strides[2] + rows.to(tl.int64) * lse_strides[1]
        before = tl.load(at, mask=some, other=0.0)
        maximum = tl.maximum(before, 0.0)  # of the scores; those of zero keys are 0
        share = tl.exp(before - maximum)
        total = share + zeros.to(tl.float32) * tl.exp(-maximum)
        columns = tl.arange(0, BLOCK_D)
        out = at_head(out, out_strides, batch, head, D)
        values = load_rows(out, out_strides[1], rows, some, columns, D, True).to(tl.float32)
        store_rows(out, out_strides[1], rows, some, columns, values * (share / total)[:, None], D)
        tl.store(at, maximum + tl.log(total), mask=some)
