# SPDX-License-Identifier: Apache-2.0
"""Backward of the merged softmax: delta, then dQ over the queries' walk, then dK and dV over the keys' walk.

Every row of a gradient is written by one program, so results are bitwise reproducible (FlashAttention-2, arXiv 2307.08691, with
the two passes separate).
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


@triton.jit(do_not_specialize=["num_rows", "lse_strides"])
def delta_kernel(
    out, dout, lse, delta, lse2, out_strides, dout_strides, lse_strides, num_rows,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """`delta = rowsum(dout * out)` and `lse2 = lse * log2(e)`, +inf for rows without a key: exp2(score - inf) = 0.

    Grid `(row blocks, H, B)`; strides are of `(batch, row, head)`; `delta` and `lse2` have the strides of `lse`.
    """
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = rows < num_rows
    o = load_rows(at_head(out, out_strides, batch, head, D), out_strides[1], rows, exists, columns, D, True)
    do = load_rows(at_head(dout, dout_strides, batch, head, D), dout_strides[1], rows, exists, columns, D, True)
    at = batch * lse_strides[0] + head * lse_strides[2] + rows.to(tl.int64) * lse_strides[1]
    log = tl.load(lse + at, mask=exists, other=0.0)
    tl.store(delta + at, tl.sum(o.to(tl.float32) * do.to(tl.float32), 1), mask=exists)
    tl.store(lse2 + at, tl.where(log == float("-inf"), float("inf"), log * 1.4426950408889634), mask=exists)


@triton.jit
def add_keys(
    dq, q, do, log, delta, k, v, k_stride, v_stride, number, runs, index, at,
    outer, interval, key, batch, key_stride, columns, scale2,
    D: tl.constexpr, BLOCK_N: tl.constexpr, SEGMENTS: tl.constexpr,
    INDEXED: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to `dq [M, D]` the contribution of `number` blocks of keys, from `at` on, without the scale."""
    for _ in tl.range(0, number):
        inner, exists, weight = step_rows(at, BLOCK_N, INDEXED)
        keys = load_rows(k, k_stride, inner, exists, columns, D, MASKED)
        vals = load_rows(v, v_stride, inner, exists, columns, D, MASKED)
        scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
        if q.dtype == tl.float32:
            p = tl.math.exp2(above(scores, scale2, (log - weight)[:, None]))
        else:
            p = tl.math.exp2(scores * scale2[0] - (log - weight)[:, None])
        if MASKED:
            visible = sees(interval, row_key(key, batch, key_stride, inner, exists))
            visible = within_segments(visible, runs, at, outer, inner, SEGMENTS)
            p = tl.where(visible, p, 0.0)
        dp = tl.dot(do, tl.trans(vals), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(keys.dtype), keys, dq, input_precision=PRECISION)
        at = next_step(runs, index, at, BLOCK_N, INDEXED)
    return dq, at


@triton.jit(do_not_specialize=VARIES)
def dq_kernel(
    q, k, v, dout, lse2, delta, dq, slots, s_values,
    q_strides, k_strides, v_strides, dout_strides, lse_strides, dq_strides, slot_strides, values_strides,
    tables, order, tiles, steps, runs, rows, index, low, high, key,
    table_strides, num_tiles, tile_width, num_runs, interval_strides, scale, scale2,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SEGMENTS: tl.constexpr, INDEXED: tl.constexpr,
    STAGED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid `(tiles, H, B)`: the outer rows are queries. STAGED as in the forward kernel, but for sums."""
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
    dout = at_head(dout, dout_strides, batch, head, D)
    k = at_head(k, k_strides, batch, kv_head, D)
    v = at_head(v, v_strides, batch, kv_head, D)
    queries = load_rows(q, q_strides[1], outer, exists, columns, D, True)
    do = load_rows(dout, dout_strides[1], outer, exists, columns, D, True)
    row = batch * lse_strides[0] + head * lse_strides[2] + outer.to(tl.int64) * lse_strides[1]
    log = tl.load(lse2 + row, mask=exists, other=float("inf"))
    shift = tl.load(delta + row, mask=exists, other=0.0)

    if STAGED:
        slots += batch * slot_strides[0] + kv_head * slot_strides[2]
        slot = slot_of(slots, slot_strides, outer, exists)
        in_slot = slot >= 0
        s_values = at_head(s_values, values_strides, batch, head, D)
    if STAGED >= 2:
        gradient = load_rows(s_values, values_strides[1], slot, in_slot, columns, D, True)
    else:
        gradient = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    gradient, at = add_keys(
        gradient, queries, do, log, shift, k, v, k_strides[1], v_strides[1], full, runs, index,
        start_walk(runs, run, index, BLOCK_N, INDEXED), outer, (outer, outer), key, batch, interval_strides[1], columns, scale2,
        D, BLOCK_N, SEGMENTS, INDEXED, False, PRECISION,
    )  # fmt: skip
    interval = row_interval(low, high, batch, interval_strides[0], outer, exists)
    gradient, at = add_keys(
        gradient, queries, do, log, shift, k, v, k_strides[1], v_strides[1], masked, runs, index,
        at, outer, interval, key, batch, interval_strides[1], columns, scale2,
        D, BLOCK_N, SEGMENTS, INDEXED, True, PRECISION,
    )  # fmt: skip

    outer = outer_rows(tile, rows, BLOCK_M, True)
    exists = outer >= 0
    if STAGED == 1 or STAGED == 3:
        store_rows(s_values, values_strides[1], slot, in_slot, columns, gradient, D)
        if STAGED == 3:
            return
        exists = exists & (slot < 0)
    dq = at_head(dq, dq_strides, batch, head, D)
    store_rows(dq, dq_strides[1], outer, exists, columns, gradient * scale, D)


@triton.jit
def add_queries(
    dk, dv, k, v, q, dout, lse2, delta, q_stride, dout_stride, row_stride, number, runs, index, at,
    outer, key, low, high, batch, interval_stride, columns, scale2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, SEGMENTS: tl.constexpr,
    INDEXED: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to `dk, dv [N, D]` the contribution of `number` blocks of queries, from `at` on; dk without the scale."""
    for _ in tl.range(0, number):
        inner, exists, weight = step_rows(at, BLOCK_M, INDEXED)
        queries = load_rows(q, q_stride, inner, exists, columns, D, MASKED)
        do = load_rows(dout, dout_stride, inner, exists, columns, D, MASKED)
        places = inner * row_stride  # within the rows of one head
        if MASKED:
            log = tl.load(lse2 + places, mask=exists, other=0.0)
            shift = tl.load(delta + places, mask=exists, other=0.0)
        else:
            log = tl.load(lse2 + places)
            shift = tl.load(delta + places)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)  # computed first: fewer live registers
        scores = tl.dot(k, tl.trans(queries), input_precision=PRECISION)
        if k.dtype == tl.float32:
            p = tl.math.exp2(above(scores, scale2, (log - weight)[None, :]))
        else:
            p = tl.math.exp2(scores * scale2[0] - (log - weight)[None, :])
        if MASKED:
            first, last = row_interval(low, high, batch, interval_stride, inner, exists)
            visible = (key[:, None] >= first[None, :]) & (key[:, None] <= last[None, :])
            visible = within_segments(visible, runs, at, outer, inner, SEGMENTS)
            p = tl.where(visible, p, 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        ds = p * (dp - shift[None, :])
        dk = tl.dot(ds.to(queries.dtype), queries, dk, input_precision=PRECISION)
        at = next_step(runs, index, at, BLOCK_M, INDEXED)
    return dk, dv, at


@triton.jit(do_not_specialize=VARIES)
def dkdv_kernel(
    q, k, v, dout, lse2, delta, dk, dv,
    q_strides, k_strides, v_strides, dout_strides, lse_strides, dk_strides, dv_strides,
    tables, order, tiles, steps, runs, rows, index, low, high, key,
    table_strides, num_tiles, tile_width, num_runs, interval_strides, scale, scale2,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    SEGMENTS: tl.constexpr, INDEXED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid `(tiles, Hkv, B)`: the outer rows are keys."""
    batch = tl.program_id(2).to(tl.int64)
    turn, kv_head = along_grid(num_tiles)
    tile, count, runs, run, full, masked = tile_of(
        tables, order, tiles, steps, runs, table_strides, num_tiles, tile_width, num_runs, batch, kv_head, turn
    )
    if count == 0:
        return
    outer = outer_rows(tile, rows, BLOCK_N)
    exists = outer >= 0
    columns = tl.arange(0, BLOCK_D)
    k = at_head(k, k_strides, batch, kv_head, D)
    v = at_head(v, v_strides, batch, kv_head, D)
    keys = load_rows(k, k_strides[1], outer, exists, columns, D, True)
    vals = load_rows(v, v_strides[1], outer, exists, columns, D, True)
    own_key = row_key(key, batch, interval_strides[1], outer, exists)
    key_gradient = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    value_gradient = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    for member in range(GROUP):
        head = kv_head * GROUP + member
        queries = at_head(q, q_strides, batch, head, D)
        douts = at_head(dout, dout_strides, batch, head, D)
        row = batch * lse_strides[0] + head * lse_strides[2]
        key_gradient, value_gradient, walk = add_queries(
            key_gradient, value_gradient, keys, vals, queries, douts, lse2 + row, delta + row,
            q_strides[1], dout_strides[1], lse_strides[1], full, runs, index, start_walk(runs, run, index, BLOCK_M, INDEXED),
            outer, own_key, low, high, batch, interval_strides[0], columns, scale2,
            D, BLOCK_M, SEGMENTS, INDEXED, False, PRECISION,
        )  # fmt: skip
        key_gradient, value_gradient, walk = add_queries(
            key_gradient, value_gradient, keys, vals, queries, douts, lse2 + row, delta + row,
            q_strides[1], dout_strides[1], lse_strides[1], masked, runs, index, walk,
            outer, own_key, low, high, batch, interval_strides[0], columns, scale2,
            D, BLOCK_M, SEGMENTS, INDEXED, True, PRECISION,
        )  # fmt: skip

    outer = outer_rows(tile, rows, BLOCK_N, True)
    exists = outer >= 0
    dk = at_head(dk, dk_strides, batch, kv_head, D)
    dv = at_head(dv, dv_strides, batch, kv_head, D)
    store_rows(dk, dk_strides[1], outer, exists, columns, key_gradient * scale, D)
    store_rows(dv, dv_strides[1], outer, exists, columns, value_gradient, D)
