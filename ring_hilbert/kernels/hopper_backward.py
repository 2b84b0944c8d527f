# SPDX-License-Identifier: Apache-2.0
"""Backward for compute capability 9.0, in Gluon: the walks of `backward.py`, with copies and matrix products in flight."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from ring_hilbert.kernels.hopper_steps import (
    AHEAD,
    FLAT,
    STAGES,
    along_grid,
    begin_keys,
    copied,
    in_order,
    next_step,
    operand,
    outer_cells,
    outer_rows,
    products,
    row_cells,
    seen,
    send,
    send_keys,
    send_rows,
    step_rows,
    step_weight,
    tile_of,
    vectors,
    walk_from,
    walk_on,
)
from ring_hilbert.kernels.steps import VARIES


@gluon.jit
def add_keys(
    dq, walk, step, queries, douts, keys, index, full, number, log, delta, low, high, scale2,
    D: gl.constexpr, BLOCK_N: gl.constexpr, INDEXED: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Add to `dq [M, D]`, a product in flight, the contribution of `number` blocks of keys, without the scale."""
    M: gl.constexpr = queries.shape[0]
    SCORES: gl.constexpr = products(BLOCK_N, gl.num_warps())
    k_ring, v_ring, key_ring = keys[1]
    zeros = gl.zeros([M, BLOCK_N], gl.float32, SCORES)
    for _ in range(number):
        async_copy.wait_group(AHEAD - 1)
        fence_async_shared()
        send_keys(keys, walk, step + AHEAD, full, D)
        here = step % STAGES
        scores = warpgroup_mma(queries, k_ring.index(here).permute((1, 0)), zeros, use_acc=False, is_async=True)
        dp = warpgroup_mma(douts, v_ring.index(here).permute((1, 0)), zeros, use_acc=False, is_async=True)
        weight = walk[2][0]
        walk = walk_on(walk, walk[2][1:], index, BLOCK_N, INDEXED)
        scores = warpgroup_mma_wait(1, [scores])
        p = gl.exp2(scores * scale2 - gl.expand_dims(log - weight, 1))
        if MASKED:
            p = gl.where(seen(key_ring.index(here), low, high, SCORES), p, 0.0)
        dp = warpgroup_mma_wait(0, [dp])
        ds = (p * (dp - gl.expand_dims(delta, 1))).to(queries.dtype)
        ds = gl.convert_layout(
            ds, gl.DotOperandLayout(0, products(queries.shape[1], gl.num_warps()), 2), assert_trivial=True
        )
        dq = warpgroup_mma(ds, k_ring.index(here), dq, is_async=True)
        step += 1
    return dq, walk, step


@gluon.jit(do_not_specialize=VARIES)
def dq_kernel(
    q, k, v, dout, lse2, delta, dq, slots, s_values,
    q_strides, k_strides, v_strides, dout_strides, lse_strides, dq_strides, slot_strides, values_strides,
    tables, order, tiles, steps, runs, outer, index, low, high, key,
    table_strides, num_tiles, tile_width, num_runs, interval_strides, scale, scale2,
    GROUP: gl.constexpr, MEMBERS: gl.constexpr, D: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, INDEXED: gl.constexpr, STAGED: gl.constexpr,
):  # fmt: skip
    """Grid `(tiles, H / MEMBERS, B)`: the outer rows are queries, of MEMBERS heads, one after the other."""
    M: gl.constexpr = BLOCK_M * MEMBERS
    WARPS: gl.constexpr = gl.num_warps()
    SCORES: gl.constexpr = products(BLOCK_N, WARPS)
    VALUES: gl.constexpr = products(BLOCK_D, WARPS)
    COPIED: gl.constexpr = copied(BLOCK_D, WARPS)
    dtype: gl.constexpr = k.dtype.element_ty
    batch, head = gl.program_id(2).to(gl.int64), along_grid(num_tiles)[1] * MEMBERS
    kv_head = head // GROUP
    count, place, run, full, masked = tile_of(
        tables, order, tiles, steps, runs, table_strides, num_tiles, tile_width, num_runs, batch, kv_head
    )
    if count == 0:
        return
    queries = gl.allocate_shared_memory(dtype, [M, BLOCK_D], operand(M, BLOCK_D, dtype))
    douts = gl.allocate_shared_memory(dtype, [M, BLOCK_D], operand(M, BLOCK_D, dtype))
    columns = gl.arange(0, BLOCK_D, gl.SliceLayout(0, COPIED))
    own, members = outer_rows(outer, place, count, BLOCK_M, MEMBERS, gl.SliceLayout(1, COPIED))
    send(queries, *outer_cells(q, q_strides, batch, head, own, members, columns, D))
    send(douts, *outer_cells(dout, dout_strides, batch, head, own, members, columns, D))
    keys, walk = begin_keys(
        k, v, key, k_strides, v_strides, interval_strides, batch, kv_head, columns, run, index, full, D, BLOCK_N, INDEXED,
    )  # fmt: skip

    row, member = outer_rows(outer, place, count, BLOCK_M, MEMBERS, gl.SliceLayout(1, SCORES))
    exists = row >= 0
    cells = row_cells(lse_strides, batch, head, row, member)
    log = gl.load(lse2 + cells, mask=exists, other=float("inf"))
    shift = gl.load(delta + cells, mask=exists, other=0.0)
    gradient = gl.zeros([M, BLOCK_D], gl.float32, VALUES)
    if STAGED:
        slots += batch * slot_strides[0] + kv_head * slot_strides[2]
    if STAGED >= 2:
        slot = gl.load(slots + own.to(gl.int64) * slot_strides[1], mask=own >= 0, other=-1)
        s_cells, staged = outer_cells(s_values, values_strides, batch, head, slot, members, columns, D)
        gradient = gl.convert_layout(gl.load(s_cells, mask=staged, other=0.0), VALUES)

    gradient = warpgroup_mma_init(gradient)
    step = 0
    nowhere = gl.zeros([M], gl.int32, gl.SliceLayout(1, SCORES))
    gradient, walk, step = add_keys(
        gradient, walk, step, queries, douts, keys, index, full, full, log, shift, nowhere, nowhere, scale2[0],
        D, BLOCK_N, INDEXED, False,
    )  # fmt: skip
    first = gl.load(low + batch * interval_strides[0] + row, mask=exists, other=0)
    last = gl.load(high + batch * interval_strides[0] + row, mask=exists, other=0)
    gradient, walk, step = add_keys(
        gradient, walk, step, queries, douts, keys, index, full, masked, log, shift, first, last, scale2[0],
        D, BLOCK_N, INDEXED, True,
    )  # fmt: skip
    gradient = warpgroup_mma_wait(0, [gradient])
    async_copy.wait_group(0)

    place = in_order(place)
    own, members = outer_rows(outer, place, count, BLOCK_M, MEMBERS, gl.SliceLayout(1, COPIED))  # as in forward
    if STAGED == 1 or STAGED == 3:
        slot = gl.load(slots + own.to(gl.int64) * slot_strides[1], mask=own >= 0, other=-1)
        s_cells, staged = outer_cells(s_values, values_strides, batch, head, slot, members, columns, D)
        gl.store(s_cells, gl.convert_layout(gradient, COPIED), mask=staged)
        if STAGED == 3:
            return
        own = gl.where(slot < 0, own, -1)
    gradient = gl.convert_layout((gradient * scale).to(dq.dtype.element_ty), COPIED)
    cells, own_cells = outer_cells(dq, dq_strides, batch, head, own, members, columns, D)
    gl.store(cells, gradient, mask=own_cells)


@gluon.jit
def row_ring(dtype: gl.constexpr, ROWS: gl.constexpr):
    """A ring of vectors in shared memory."""
    return gl.allocate_shared_memory(dtype, [STAGES, ROWS], FLAT)


@gluon.jit
def send_queries(
    q, dout, lse2, delta, low, high, q_strides, dout_strides, lse_strides, member, rows, flat, columns,
    q_ring, dout_ring, terms, bounds, step, is_masked, D: gl.constexpr,
):  # fmt: skip
    """Start copying the queries of a step, for one head of the group, and their row terms."""
    to = step % STAGES
    head = member.to(gl.int64)
    send_rows(q_ring.index(to), q + head * q_strides[2], rows, q_strides[1], columns, D)
    send_rows(dout_ring.index(to), dout + head * dout_strides[2], rows, dout_strides[1], columns, D)
    cells = flat * lse_strides[1] + head * lse_strides[2]
    send(terms[0].index(to), lse2 + cells, flat >= 0)
    send(terms[1].index(to), delta + cells, flat >= 0)
    if is_masked:
        send(bounds[0].index(to), low + flat, flat >= 0)
        send(bounds[1].index(to), high + flat, flat >= 0)
    async_copy.commit_group()


@gluon.jit
def next_of_group(at, run, left, member, number, BLOCK: gl.constexpr, GROUP: gl.constexpr):
    """The next state of a walk that each head of the group repeats in `number` steps; after the last, the first step again."""
    left -= 1
    if left == 0:
        at = walk_from(run)
        left = number
        member = (member + 1) % GROUP
    else:
        at = next_step(at, BLOCK)
    return at, left, member


@gluon.jit
def add_queries(
    dk, dv, ds, at, left, member, rows, flat, weights, step, keys, values, q_ring, dout_ring, terms, bounds,
    q, dout, lse2, delta, low, high, q_strides, dout_strides, lse_strides, index, columns, run, full, masked, key, scale2,
    GROUP: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr, INDEXED: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Add to `dk, dv [N, D]` what one head's blocks of queries contribute; `dv` is in flight, `dk` lacks the last one's `ds`."""
    N: gl.constexpr = keys.shape[0]
    SCORES: gl.constexpr = products(BLOCK_M, gl.num_warps())
    COLUMN: gl.constexpr = gl.SliceLayout(0, SCORES)
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, products(keys.shape[1], gl.num_warps()), 2)
    ROWS: gl.constexpr = gl.SliceLayout(1, copied(keys.shape[1], gl.num_warps()))
    zeros = gl.zeros([N, BLOCK_M], gl.float32, SCORES)
    for _ in range(masked if MASKED else full):
        async_copy.wait_group(AHEAD - 1)
        fence_async_shared()
        send_queries(
            q, dout, lse2, delta, low, high, q_strides, dout_strides, lse_strides, member, rows, flat, columns,
            q_ring, dout_ring, terms, bounds, step + AHEAD, left <= masked, D,
        )  # fmt: skip
        here = step % STAGES
        scores = warpgroup_mma(keys, q_ring.index(here).permute((1, 0)), zeros, use_acc=False, is_async=True)
        dp = warpgroup_mma(values, dout_ring.index(here).permute((1, 0)), zeros, use_acc=False, is_async=True)
        dk = warpgroup_mma(ds, q_ring.index(gl.maximum(step - 1, 0) % STAGES), dk, is_async=True)
        weight = weights[0]
        weights = weights[1:] + (step_weight(at),)
        at, left, member = next_of_group(at, run, left, member, full + masked, BLOCK_M, GROUP)
        rows = step_rows(at, index, BLOCK_M, INDEXED, ROWS)
        flat = step_rows(at, index, BLOCK_M, INDEXED, vectors(gl.num_warps()))
        log = terms[0].index(here).load(COLUMN)
        scores = warpgroup_mma_wait(2, [scores])
        exact = gl.exp2(scores * scale2 - gl.expand_dims(log - weight, 0))
        if MASKED:
            first, last = bounds[0].index(here).load(COLUMN), bounds[1].index(here).load(COLUMN)
            own = gl.expand_dims(key, 1)
            exact = gl.where((own >= gl.expand_dims(first, 0)) & (own <= gl.expand_dims(last, 0)), exact, 0.0)
        shift = terms[1].index(here).load(COLUMN)
        p = gl.convert_layout(exact.to(keys.dtype), OPERAND, assert_trivial=True)
        dv = warpgroup_mma(p, dout_ring.index(here), dv, is_async=True)
        dp = warpgroup_mma_wait(2, [dp])
        product = (exact * (dp - gl.expand_dims(shift, 0))).to(keys.dtype)
        product = gl.convert_layout(product, OPERAND, assert_trivial=True)
        step = in_order(step)
        dk, ds = warpgroup_mma_wait(1, [dk, product])
        step += 1
    return dk, dv, ds, at, left, member, rows, flat, weights, step


@gluon.jit(do_not_specialize=VARIES)
def dkdv_kernel(
    q, k, v, dout, lse2, delta, dk, dv,
    q_strides, k_strides, v_strides, dout_strides, lse_strides, dk_strides, dv_strides,
    tables, order, tiles, steps, runs, outer, index, low, high, key,
    table_strides, num_tiles, tile_width, num_runs, interval_strides, scale, scale2,
    GROUP: gl.constexpr, D: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_M: gl.constexpr,
    INDEXED: gl.constexpr,
):  # fmt: skip
    """Grid `(tiles, Hkv, B)`: the outer rows are keys. The heads of a group take turns."""
    WARPS: gl.constexpr = gl.num_warps()
    SCORES: gl.constexpr = products(BLOCK_M, WARPS)
    VALUES: gl.constexpr = products(BLOCK_D, WARPS)
    COPIED: gl.constexpr = copied(BLOCK_D, WARPS)
    dtype: gl.constexpr = k.dtype.element_ty
    batch, kv_head = gl.program_id(2).to(gl.int64), along_grid(num_tiles)[1]
    count, place, run, full, masked = tile_of(
        tables, order, tiles, steps, runs, table_strides, num_tiles, tile_width, num_runs, batch, kv_head
    )
    if count == 0:
        return
    head = kv_head.to(gl.int64) * GROUP
    q += batch * q_strides[0] + head * q_strides[2]
    dout += batch * dout_strides[0] + head * dout_strides[2]
    lse2 += batch * lse_strides[0] + head * lse_strides[2]
    delta += batch * lse_strides[0] + head * lse_strides[2]
    low += batch * interval_strides[0]
    high += batch * interval_strides[0]

    keys = gl.allocate_shared_memory(dtype, [BLOCK_N, BLOCK_D], operand(BLOCK_N, BLOCK_D, dtype))
    values = gl.allocate_shared_memory(dtype, [BLOCK_N, BLOCK_D], operand(BLOCK_N, BLOCK_D, dtype))
    q_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_D], operand(BLOCK_M, BLOCK_D, dtype))
    dout_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_D], operand(BLOCK_M, BLOCK_D, dtype))
    # Blocks of their own, since the compiler puts a barrier between copies to the same block.
    terms = row_ring(gl.float32, BLOCK_M), row_ring(gl.float32, BLOCK_M)
    bounds = row_ring(gl.int32, BLOCK_M), row_ring(gl.int32, BLOCK_M)
    columns = gl.arange(0, BLOCK_D, gl.SliceLayout(0, COPIED))
    own, none = outer_rows(outer, place, count, BLOCK_N, 1, gl.SliceLayout(1, COPIED))
    send(keys, *outer_cells(k, k_strides, batch, kv_head, own, none, columns, D))
    send(values, *outer_cells(v, v_strides, batch, kv_head, own, none, columns, D))
    at, left = walk_from(run), full + masked
    member = full * 0  # a run-time value, not a constant
    weights = ()
    for i in gl.static_range(AHEAD):
        rows = step_rows(at, index, BLOCK_M, INDEXED, gl.SliceLayout(1, COPIED))
        flat = step_rows(at, index, BLOCK_M, INDEXED, vectors(WARPS))
        send_queries(
            q, dout, lse2, delta, low, high, q_strides, dout_strides, lse_strides, member, rows, flat, columns,
            q_ring, dout_ring, terms, bounds, i, left <= masked, D,
        )  # fmt: skip
        weights = weights + (step_weight(at),)
        at, left, member = next_of_group(at, run, left, member, full + masked, BLOCK_M, GROUP)
    rows = step_rows(at, index, BLOCK_M, INDEXED, gl.SliceLayout(1, COPIED))
    flat = step_rows(at, index, BLOCK_M, INDEXED, vectors(WARPS))

    row, _ = outer_rows(outer, place, count, BLOCK_N, 1, gl.SliceLayout(1, SCORES))
    own_key = gl.load(key + batch * interval_strides[1] + row, mask=row >= 0, other=0)
    ds = gl.zeros([BLOCK_N, BLOCK_M], dtype, gl.DotOperandLayout(0, VALUES, 2))
    key_gradient = gl.zeros([BLOCK_N, BLOCK_D], gl.float32, VALUES)
    value_gradient = warpgroup_mma_init(key_gradient)
    step = 0
    for _ in range(GROUP):
        key_gradient, value_gradient, ds, at, left, member, rows, flat, weights, step = add_queries(
            key_gradient, value_gradient, ds, at, left, member, rows, flat, weights, step,
            keys, values, q_ring, dout_ring, terms, bounds, q, dout, lse2, delta, low, high,
            q_strides, dout_strides, lse_strides, index, columns, run, full, masked, own_key, scale2[0],
            GROUP, D, BLOCK_M, INDEXED, False,
        )  # fmt: skip
        key_gradient, value_gradient, ds, at, left, member, rows, flat, weights, step = add_queries(
            key_gradient, value_gradient, ds, at, left, member, rows, flat, weights, step,
            keys, values, q_ring, dout_ring, terms, bounds, q, dout, lse2, delta, low, high,
            q_strides, dout_strides, lse_strides, index, columns, run, full, masked, own_key, scale2[0],
            GROUP, D, BLOCK_M, INDEXED, True,
        )  # fmt: skip
    async_copy.wait_group(0)
    fence_async_shared()
    key_gradient = warpgroup_mma(ds, q_ring.index(gl.maximum(step - 1, 0) % STAGES), key_gradient, is_async=True)
    key_gradient, value_gradient = warpgroup_mma_wait(0, [key_gradient, value_gradient])

    place = in_order(place)
    own, none = outer_rows(outer, place, count, BLOCK_N, 1, gl.SliceLayout(1, COPIED))  # as in forward
    key_gradient = gl.convert_layout((key_gradient * scale).to(dk.dtype.element_ty), COPIED)
    cells, exists = outer_cells(dk, dk_strides, batch, kv_head, own, none, columns, D)
    gl.store(cells, key_gradient, mask=exists)
    value_gradient = gl.convert_layout(value_gradient.to(dv.dtype.element_ty), COPIED)
    cells, exists = outer_cells(dv, dv_strides, batch, kv_head, own, none, columns, D)
    gl.store(cells, value_gradient, mask=exists)
