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
    STAGES,
    add_rows,
    begin_keys,
    buffer_of,
    columns_of,
    dots,
    hidden,
    in_order,
    kept,
    load_outer,
    look_ahead,
    no_sums,
    not_staged,
    products,
    room,
    row_cells,
    row_interval,
    row_ring,
    send,
    send_keys,
    send_outer,
    send_rows,
    store_outer,
    vectors,
    wait_for,
    walk_on,
    where_seen,
    within,
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
        rows = look_ahead(keys, walk, index, BLOCK_N, INDEXED)
        send_keys(keys, walk, step + AHEAD, full, D)
        here = buffer_of(step)
        scores = dots(queries, k_ring, here, zeros)
        dp = dots(douts, v_ring, here, zeros)
        weight = walk[2][0]
        walk = walk_on(keys, walk, rows, walk[2][1:], index, BLOCK_N, INDEXED)
        scores = warpgroup_mma_wait(len(dq), [scores])
        p = scores * scale2 - gl.expand_dims(log - weight, 1)
        if MASKED:
            p = where_seen(p, key_ring.index(here), low, high)
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
def look_up(walk, index, columns, BLOCK: gl.constexpr, INDEXED: gl.constexpr):
    """The queries of a walk's current step, for the copies of each part and of vectors, and the weight of its pairs."""
    flat = step_rows(walk[0], index, BLOCK, INDEXED, vectors(gl.num_warps()))
    return copied_rows(walk[0], index, BLOCK, INDEXED, columns), flat, step_weight(walk[0])


@gluon.jit
def send_queries(operands, rings, queries, walk, number, masked, step, columns, GROUP: gl.constexpr, D: gl.constexpr):
    """Start copying the queries of a step, for one head of the group, and their row terms; the walk stands behind it."""
    q, dout, lse2, delta, low, high, q_strides, dout_strides, lse_strides = operands
    q_ring, dout_ring, terms, bounds, weights = rings
    rows, flat, weight = queries
    _, left, member = walk  # the steps of this head left behind that one
    if GROUP > 1:
        ended = left == number
        left, member = gl.where(ended, 0, left), gl.where(ended, member + GROUP - 1, member) % GROUP
    to = buffer_of(step)
    head = member.to(gl.int64)
    send_rows(q_ring, to, q + gl.multiple_of(head * q_strides[2], 8), rows, q_strides[1], columns, D)
    send_rows(dout_ring, to, dout + gl.multiple_of(head * dout_strides[2], 8), rows, dout_strides[1], columns, D)
    cells = flat * lse_strides[1] + head * lse_strides[2]
    send(terms[1].index(to), delta + cells, flat >= 0)
    if left < masked:
        send(bounds[0].index(to), low + flat, flat >= 0)
        send(bounds[1].index(to), high + flat, flat >= 0)
    # The compiler puts a barrier before the first of these, which then serves all loads behind it.
    weights.index(to).store(gl.full([1], weight, gl.float32, vectors(gl.num_warps())))
    send(terms[0].index(to), lse2 + cells, flat >= 0)
    async_copy.commit_group()


@gluon.jit
def next_of_group(walk, number, BLOCK: gl.constexpr, GROUP: gl.constexpr, INDEXED: gl.constexpr):
    """The next state of a walk that each head of the group repeats in `number` steps, some of which are left for this one."""
    at, left, member = walk
    left -= 1
    if GROUP > 1:  # behind the last step of a head, as before the first run
        ends = left == 0
        runs, run, first, step, rows, times = at
        at = runs, gl.where(ends, -1, run), first, step, gl.where(ends, 0, rows), times
        left = gl.where(ends, number, left)
        member = (member + ends.to(gl.int32)) % GROUP
    return next_step(at, BLOCK, INDEXED), left, member


@gluon.jit
def add_queries(
    dk, dv, ds, walk, sent, step, keys, values, operands, rings, index, columns, full, masked, own_keys, scale2,
    GROUP: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr, INDEXED: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Add to `dk, dv [N, D]` what one head's blocks of queries contribute; `dk` lacks the last one's `ds`.

    `sent` are the queries copied in the next step, and `walk` is a step ahead of them. `dv` is in flight in tiles of 64 rows; in
    larger ones registers do not suffice for that, nor for the addresses of all products at once.
    """
    q_ring, dout_ring, terms, bounds, weights = rings
    IN_FLIGHT: gl.constexpr = keys[0].shape[0] == 64
    N: gl.constexpr = keys[0].shape[0]
    PARTS: gl.constexpr = len(columns)
    SCORES: gl.constexpr = products(BLOCK_M, gl.num_warps())
    COLUMN: gl.constexpr = gl.SliceLayout(0, SCORES)
    zeros = gl.zeros([N, BLOCK_M], gl.float32, SCORES)
    for _ in range(masked if MASKED else full):
        async_copy.wait_group(AHEAD - 1)
        fence_async_shared()
        here = buffer_of(step)
        # These loads would wait behind the copies, for as long as the products take.
        weight = gl.sum(weights.index(here).load(gl.SliceLayout(0, SCORES)), 0)
        log = terms[0].index(here).load(COLUMN) - weight
        following = look_up(walk, index, columns, BLOCK_M, INDEXED)
        send_queries(operands, rings, sent, walk, full + masked, masked, step + AHEAD, columns, GROUP, D)
        scores = dots(keys, q_ring, here, zeros)
        there = here if IN_FLIGHT else hidden(here)
        dp = dots(values, dout_ring, there, zeros)
        before = buffer_of(gl.maximum(step - 1, 0))
        dk = add_rows(dk, ds, q_ring, before if IN_FLIGHT else hidden(before))
        walk = next_of_group(walk, full + masked, BLOCK_M, GROUP, INDEXED)
        sent = following
        scores = warpgroup_mma_wait(2 * PARTS, [scores])
        exact = gl.exp2(scores * scale2 - gl.expand_dims(log, 0))
        if MASKED:
            own = gl.expand_dims(own_keys.load(gl.SliceLayout(1, SCORES)), 1)
            first, last = bounds[0].index(here).load(COLUMN), bounds[1].index(here).load(COLUMN)
            exact = within(exact, own, gl.expand_dims(first, 0), gl.expand_dims(last, 0), 0.0)
        p = gl.convert_layout(exact.to(ds.dtype), ds.type.layout, assert_trivial=True)
        if D <= 64:
            shift = terms[1].index(here).load(COLUMN)
        dv = add_rows(dv, p, dout_ring, there)
        dp = warpgroup_mma_wait(2 * PARTS, [dp])
        if D > 64:  # before, registers do not suffice
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
    return dk, dv, ds, walk, sent, step


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
    rings = q_ring, dout_ring, terms, bounds, row_ring(gl.float32, 1)
    operands = q, dout, lse2, delta, low, high, q_strides, dout_strides, lse_strides
    own = copied_outer(outer, place, count, BLOCK_N, 1, columns)
    send_outer(keys, k, k_strides, batch, kv_head, own, columns, D)
    send_outer(values, v, v_strides, batch, kv_head, own, columns, D)
    walk = walk_from(run, 0, INDEXED), full + masked, full * 0  # run-time values, not constants
    step = full * 0
    sent = look_up(walk, index, columns, BLOCK_M, INDEXED)
    walk = next_of_group(walk, full + masked, BLOCK_M, GROUP, INDEXED)
    for i in gl.static_range(AHEAD):
        send_queries(operands, rings, sent, walk, full + masked, masked, i, columns, GROUP, D)
        sent = look_up(walk, index, columns, BLOCK_M, INDEXED)
        walk = next_of_group(walk, full + masked, BLOCK_M, GROUP, INDEXED)

    row, _ = outer_rows(outer, place, count, BLOCK_N, 1, gl.SliceLayout(1, SCORES))
    # What is kept here does not occupy registers during the loops.
    own_head = kept(gl.full([1], kv_head, gl.int32, vectors(gl.num_warps())))
    own_rows = kept(row)
    own_keys = kept(gl.load(key + batch * interval_strides[1] + row, mask=row >= 0, other=0))
    ds = gl.zeros([BLOCK_N, BLOCK_M], dtype, gl.DotOperandLayout(0, SCORES, 2))
    key_gradient = no_sums(BLOCK_N, columns)
    value_gradient = no_sums(BLOCK_N, columns)
    if BLOCK_N == 64:
        value_gradient = [warpgroup_mma_init(x) for x in value_gradient]
    for _ in range(GROUP):
        for MASKED in gl.static_range(2):
            key_gradient, value_gradient, ds, walk, sent, step = add_queries(
                key_gradient, value_gradient, ds, walk, sent, step, keys, values, operands, rings, index, columns,
                full, masked, own_keys, scale2[0], GROUP, D, BLOCK_M, INDEXED, MASKED,
            )  # fmt: skip
    async_copy.wait_group(0)
    fence_async_shared()
    key_gradient = add_rows(key_gradient, ds, q_ring, buffer_of(gl.maximum(step - 1, 0)))
    done = warpgroup_mma_wait(0, key_gradient + value_gradient)
    key_gradient, value_gradient = done[: len(columns)], done[len(columns) :]

    own = [(own_rows.load(gl.SliceLayout(1, x.type.layout.parent)), 0) for x in columns]
    kv_head = gl.sum(own_head.load(vectors(gl.num_warps())), 0)
    store_outer(dk, dk_strides, batch, kv_head, own, [x * scale for x in key_gradient], columns, D)
    store_outer(dv, dv_strides, batch, kv_head, own, value_gradient, columns, D)
