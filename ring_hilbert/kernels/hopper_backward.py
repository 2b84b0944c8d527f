# SPDX-License-Identifier: Apache-2.0
"""Backward for compute capability 9.0, in Gluon: the walks of `backward.py`, with copies and matrix products in flight."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from ring_hilbert.kernels.hopper_steps import (
    AHEAD,
    FLAT,
    STAGES,
    add_rows,
    begin_keys,
    buffer_of,
    columns_of,
    dots,
    hidden,
    in_order,
    load_outer,
    no_sums,
    not_staged,
    products,
    room,
    row_cells,
    row_interval,
    seen,
    send,
    send_keys,
    send_outer,
    send_rows,
    store_outer,
    vectors,
    wait_for,
    walk_on,
)
from ring_hilbert.kernels.hopper_walk import (
    WIDTH,
    along_grid,
    copied_outer,
    copied_rows,
    next_step,
    outer_rows,
    step_rows,
    step_weight,
    tile_of,
    walk_from,
)
from ring_hilbert.kernels.steps import VARIES


@gluon.jit
def add_keys(
    dq, walk, step, queries, douts, keys, index, full, number, log, delta, low, high, scale2,
    D: gl.constexpr, BLOCK_N: gl.constexpr, INDEXED: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Add to `dq [M, D]`, a product in flight, the contribution of `number` blocks of keys, without the scale."""
    M: gl.constexpr = queries[0].shape[0]
    SCORES: gl.constexpr = products(BLOCK_N, gl.num_warps())
    k_ring, v_ring, key_ring = keys[1]
    zeros = gl.zeros([M, BLOCK_N], gl.float32, SCORES)
    for _ in range(number):
        async_copy.wait_group(AHEAD - 1)
        fence_async_shared()
        send_keys(keys, walk, step + AHEAD, full, D)
        here = buffer_of(step)
        scores = dots(queries, k_ring, here, zeros)
        dp = dots(douts, v_ring, here, zeros)
        weight = walk[2][0]
        walk = walk_on(walk, walk[2][1:], index, BLOCK_N, INDEXED)
        scores = warpgroup_mma_wait(len(dq), [scores])
        p = scores * scale2 - gl.expand_dims(log - weight, 1)
        if MASKED:
            p = gl.where(seen(key_ring.index(here), low, high, SCORES), p, float("-inf"))
        p = gl.exp2(p)
        dp = warpgroup_mma_wait(0, [dp])
        ds = (p * (dp - gl.expand_dims(delta, 1))).to(queries[0].dtype)
        ds = gl.convert_layout(ds, gl.DotOperandLayout(0, SCORES, 2), assert_trivial=True)
        dq = add_rows(dq, ds, k_ring, here)
        step += 1
    return dq, walk, step


@gluon.jit
def slot_of(slots, strides, rows):
    """The staging index of each row, -1 if not staged."""
    return gl.load(slots + rows.to(gl.int64) * strides[1], mask=rows >= 0, other=-1)


@gluon.jit(do_not_specialize=VARIES)
def dq_kernel(
    q, k, v, dout, lse2, delta, dq, slots, s_values,
    q_strides, k_strides, v_strides, dout_strides, lse_strides, dq_strides, slot_strides, values_strides,
    tables, order, tiles, steps, runs, outer, index, low, high, key,
    table_strides, num_tiles, tile_width, num_runs, interval_strides, scale, scale2,
    GROUP: gl.constexpr, MEMBERS: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    INDEXED: gl.constexpr, STAGED: gl.constexpr,
):  # fmt: skip
    """Grid `(tiles, H / MEMBERS, B)`: the outer rows are queries, of MEMBERS heads, one after the other."""
    M: gl.constexpr = BLOCK_M * MEMBERS
    SCORES: gl.constexpr = products(BLOCK_N, gl.num_warps())
    dtype: gl.constexpr = k.dtype.element_ty
    batch = gl.program_id(2).to(gl.int64)
    at, head = along_grid(num_tiles)
    head *= MEMBERS
    kv_head = head // GROUP
    count, place, run, full, masked = tile_of(
        tables, order, tiles, steps, table_strides, num_tiles, tile_width, num_runs, batch, kv_head, at
    )
    if count == 0:
        return
    run = runs + run * WIDTH
    columns = columns_of(D)
    queries = room(dtype, [M], columns)
    douts = room(dtype, [M], columns)
    own = copied_outer(outer, place, count, BLOCK_M, MEMBERS, columns)
    send_outer(queries, q, q_strides, batch, head, own, columns, D)
    send_outer(douts, dout, dout_strides, batch, head, own, columns, D)
    keys, walk = begin_keys(
        k, v, key, k_strides, v_strides, interval_strides, batch, kv_head, columns, run, index, full, D, BLOCK_N, INDEXED,
    )  # fmt: skip

    row, member = outer_rows(outer, place, count, BLOCK_M, MEMBERS, gl.SliceLayout(1, SCORES))
    exists = row >= 0
    cells = row_cells(lse_strides, batch, head, row, member)
    log = gl.load(lse2 + cells, mask=exists, other=float("inf"))
    shift = gl.load(delta + cells, mask=exists, other=0.0)
    gradient = no_sums(M, columns)
    if STAGED:
        slots += batch * slot_strides[0] + kv_head * slot_strides[2]
    if STAGED >= 2:
        gradient = load_outer(s_values, values_strides, batch, head, slot_of(slots, slot_strides, row), member, D)

    gradient = [warpgroup_mma_init(x) for x in gradient]
    step = 0
    nowhere = gl.zeros([M], gl.int32, gl.SliceLayout(1, SCORES))
    gradient, walk, step = add_keys(
        gradient, walk, step, queries, douts, keys, index, full, full, log, shift, nowhere, nowhere, scale2[0],
        D, BLOCK_N, INDEXED, False,
    )  # fmt: skip
    first, last = row_interval(low, high, batch, interval_strides[0], row)
    gradient, walk, step = add_keys(
        gradient, walk, step, queries, douts, keys, index, full, masked, log, shift, first, last, scale2[0],
        D, BLOCK_N, INDEXED, True,
    )  # fmt: skip
    gradient = [warpgroup_mma_wait(0, [x]) for x in gradient]
    async_copy.wait_group(0)

    place = in_order(place)
    own = copied_outer(outer, place, in_order(count), BLOCK_M, MEMBERS, columns)  # as in forward
    if STAGED == 1 or STAGED == 3:
        places = [(slot_of(slots, slot_strides, x[0]), x[1]) for x in own]
        store_outer(s_values, values_strides, batch, head, places, gradient, columns, D)
        if STAGED == 3:
            return
        own = not_staged(own, places)
    store_outer(dq, dq_strides, batch, head, own, [x * scale for x in gradient], columns, D)


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
    to = buffer_of(step)
    head = member.to(gl.int64)
    send_rows(q_ring, to, q + gl.multiple_of(head * q_strides[2], 8), rows, q_strides[1], columns, D)
    send_rows(dout_ring, to, dout + gl.multiple_of(head * dout_strides[2], 8), rows, dout_strides[1], columns, D)
    cells = flat * lse_strides[1] + head * lse_strides[2]
    send(terms[0].index(to), lse2 + cells, flat >= 0)
    send(terms[1].index(to), delta + cells, flat >= 0)
    if is_masked:
        send(bounds[0].index(to), low + flat, flat >= 0)
        send(bounds[1].index(to), high + flat, flat >= 0)
    async_copy.commit_group()


@gluon.jit
def next_of_group(at, left, member, number, BLOCK: gl.constexpr, GROUP: gl.constexpr, INDEXED: gl.constexpr):
    """The next state of a walk that each head of the group repeats in `number` steps, `left` of which are left for this one."""
    left -= 1
    if GROUP > 1:  # behind the last step of a head, as before the first run
        ends = left == 0
        runs, run, first, step, rows, times = at
        at = runs, gl.where(ends, -1, run), first, step, gl.where(ends, 0, rows), times
        left = gl.where(ends, number, left)
        member = (member + ends.to(gl.int32)) % GROUP
    at = next_step(at, BLOCK, INDEXED)
    return at, left, member


@gluon.jit
def add_queries(
    dk, dv, ds, at, left, member, rows, flat, weights, step, keys, values, q_ring, dout_ring, terms, bounds,
    q, dout, lse2, delta, low, high, q_strides, dout_strides, lse_strides, index, columns, full, masked, own_keys, scale2,
    GROUP: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr, INDEXED: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Add to `dk, dv [N, D]` what one head's blocks of queries contribute; `dk` lacks the last one's `ds`.

    `dv` is in flight in tiles of 64 rows; in larger ones registers do not suffice for that, nor for the addresses of all products
    at once. Two products are still in flight when `delta` is loaded, which earlier would take registers from them.
    """
    IN_FLIGHT: gl.constexpr = keys[0].shape[0] == 64
    N: gl.constexpr = keys[0].shape[0]
    PARTS: gl.constexpr = len(columns)
    SCORES: gl.constexpr = products(BLOCK_M, gl.num_warps())
    COLUMN: gl.constexpr = gl.SliceLayout(0, SCORES)
    zeros = gl.zeros([N, BLOCK_M], gl.float32, SCORES)
    for _ in range(masked if MASKED else full):
        async_copy.wait_group(AHEAD - 1)
        fence_async_shared()
        send_queries(
            q, dout, lse2, delta, low, high, q_strides, dout_strides, lse_strides, member, rows, flat, columns,
            q_ring, dout_ring, terms, bounds, step + AHEAD, left <= masked, D,
        )  # fmt: skip
        here = buffer_of(step)
        scores = dots(keys, q_ring, here, zeros)
        there = here if IN_FLIGHT else hidden(here)
        dp = dots(values, dout_ring, there, zeros)
        before = buffer_of(gl.maximum(step - 1, 0))
        dk = add_rows(dk, ds, q_ring, before if IN_FLIGHT else hidden(before))
        weight = weights[0]
        weights = weights[1:] + (step_weight(at),)
        at, left, member = next_of_group(at, left, member, full + masked, BLOCK_M, GROUP, INDEXED)
        rows = copied_rows(at, index, BLOCK_M, INDEXED, columns)
        flat = step_rows(at, index, BLOCK_M, INDEXED, vectors(gl.num_warps()))
        log = terms[0].index(here).load(COLUMN)
        scores = warpgroup_mma_wait(2 * PARTS, [scores])
        exact = gl.exp2(scores * scale2 - gl.expand_dims(log - weight, 0))
        if MASKED:
            own = gl.expand_dims(own_keys.load(gl.SliceLayout(1, SCORES)), 1)  # not in registers all the time
            first, last = bounds[0].index(here).load(COLUMN), bounds[1].index(here).load(COLUMN)
            exact = gl.where((own >= gl.expand_dims(first, 0)) & (own <= gl.expand_dims(last, 0)), exact, 0.0)
        p = gl.convert_layout(exact.to(ds.dtype), ds.type.layout, assert_trivial=True)
        dv = add_rows(dv, p, dout_ring, there)
        dp = warpgroup_mma_wait(2 * PARTS, [dp])
        shift = terms[1].index(here).load(COLUMN)
        product = (exact * (dp - gl.expand_dims(shift, 0))).to(ds.dtype)
        product = gl.convert_layout(product, ds.type.layout, assert_trivial=True)
        step = in_order(step)
        if IN_FLIGHT:
            dk, ds = wait_for(PARTS, dk, product)
        else:
            done, ds = wait_for(0, dk + dv, product)
            dk, dv = done[:PARTS], done[PARTS:]
        step += 1
    return dk, dv, ds, at, left, member, rows, flat, weights, step


@gluon.jit(do_not_specialize=VARIES)
def dkdv_kernel(
    q, k, v, dout, lse2, delta, dk, dv,
    q_strides, k_strides, v_strides, dout_strides, lse_strides, dk_strides, dv_strides,
    tables, order, tiles, steps, runs, outer, index, low, high, key,
    table_strides, num_tiles, tile_width, num_runs, interval_strides, scale, scale2,
    GROUP: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_M: gl.constexpr, INDEXED: gl.constexpr,
):  # fmt: skip
    """Grid `(tiles, Hkv, B)`: the outer rows are keys. The heads of a group take turns."""
    SCORES: gl.constexpr = products(BLOCK_M, gl.num_warps())
    dtype: gl.constexpr = k.dtype.element_ty
    batch = gl.program_id(2).to(gl.int64)
    at, kv_head = along_grid(num_tiles)
    count, place, run, full, masked = tile_of(
        tables, order, tiles, steps, table_strides, num_tiles, tile_width, num_runs, batch, kv_head, at
    )
    if count == 0:
        return
    run = runs + run * WIDTH
    head = kv_head.to(gl.int64) * GROUP
    q += gl.multiple_of(batch * q_strides[0] + head * q_strides[2], 8)
    dout += gl.multiple_of(batch * dout_strides[0] + head * dout_strides[2], 8)
    lse2 += batch * lse_strides[0] + head * lse_strides[2]
    delta += batch * lse_strides[0] + head * lse_strides[2]
    low += batch * interval_strides[0]
    high += batch * interval_strides[0]

    columns = columns_of(D)
    keys = room(dtype, [BLOCK_N], columns)
    values = room(dtype, [BLOCK_N], columns)
    q_ring = room(dtype, [STAGES, BLOCK_M], columns)
    dout_ring = room(dtype, [STAGES, BLOCK_M], columns)
    # Blocks of their own, since the compiler puts a barrier between copies to the same block.
    terms = row_ring(gl.float32, BLOCK_M), row_ring(gl.float32, BLOCK_M)
    bounds = row_ring(gl.int32, BLOCK_M), row_ring(gl.int32, BLOCK_M)
    own = copied_outer(outer, place, count, BLOCK_N, 1, columns)
    send_outer(keys, k, k_strides, batch, kv_head, own, columns, D)
    send_outer(values, v, v_strides, batch, kv_head, own, columns, D)
    at, left = walk_from(run, 0, INDEXED), full + masked
    member, step = full * 0, full * 0  # run-time values, not constants
    weights = ()
    for i in gl.static_range(AHEAD):
        rows = copied_rows(at, index, BLOCK_M, INDEXED, columns)
        flat = step_rows(at, index, BLOCK_M, INDEXED, vectors(gl.num_warps()))
        send_queries(
            q, dout, lse2, delta, low, high, q_strides, dout_strides, lse_strides, member, rows, flat, columns,
            q_ring, dout_ring, terms, bounds, i, left <= masked, D,
        )  # fmt: skip
        weights = weights + (step_weight(at),)
        at, left, member = next_of_group(at, left, member, full + masked, BLOCK_M, GROUP, INDEXED)
    rows = copied_rows(at, index, BLOCK_M, INDEXED, columns)
    flat = step_rows(at, index, BLOCK_M, INDEXED, vectors(gl.num_warps()))

    row, _ = outer_rows(outer, place, count, BLOCK_N, 1, gl.SliceLayout(1, SCORES))
    own_keys = gl.allocate_shared_memory(gl.int32, [BLOCK_N], FLAT)
    own_keys.store(gl.load(key + batch * interval_strides[1] + row, mask=row >= 0, other=0))
    ds = gl.zeros([BLOCK_N, BLOCK_M], dtype, gl.DotOperandLayout(0, SCORES, 2))
    key_gradient = no_sums(BLOCK_N, columns)
    value_gradient = no_sums(BLOCK_N, columns)
    if BLOCK_N == 64:
        value_gradient = [warpgroup_mma_init(x) for x in value_gradient]
    for _ in range(GROUP):
        key_gradient, value_gradient, ds, at, left, member, rows, flat, weights, step = add_queries(
            key_gradient, value_gradient, ds, at, left, member, rows, flat, weights, step,
            keys, values, q_ring, dout_ring, terms, bounds, q, dout, lse2, delta, low, high,
            q_strides, dout_strides, lse_strides, index, columns, full, masked, own_keys, scale2[0],
            GROUP, D, BLOCK_M, INDEXED, False,
        )  # fmt: skip
        key_gradient, value_gradient, ds, at, left, member, rows, flat, weights, step = add_queries(
            key_gradient, value_gradient, ds, at, left, member, rows, flat, weights, step,
            keys, values, q_ring, dout_ring, terms, bounds, q, dout, lse2, delta, low, high,
            q_strides, dout_strides, lse_strides, index, columns, full, masked, own_keys, scale2[0],
            GROUP, D, BLOCK_M, INDEXED, True,
        )  # fmt: skip
    async_copy.wait_group(0)
    fence_async_shared()
    key_gradient = add_rows(key_gradient, ds, q_ring, buffer_of(gl.maximum(step - 1, 0)))
    done = warpgroup_mma_wait(0, key_gradient + value_gradient)
    key_gradient, value_gradient = done[: len(columns)], done[len(columns) :]

    place = in_order(place)
    own = copied_outer(outer, place, in_order(count), BLOCK_N, 1, columns)  # as in forward
    store_outer(dk, dk_strides, batch, kv_head, own, [x * scale for x in key_gradient], columns, D)
    store_outer(dv, dv_strides, batch, kv_head, own, value_gradient, columns, D)
