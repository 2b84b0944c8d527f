# SPDX-License-Identifier: Apache-2.0
"""Forward for compute capability 9.0, in Gluon: the walk of `forward.py`, with copies and matrix products in flight.

The softmax of a step overlaps the previous step's product with its values (FlashAttention-3, arXiv 2407.08608, section 3.2).
A tile may hold its rows for several query heads of a kv head, which share keys and values.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, warpgroup_mma_wait

from ring_hilbert.kernels.hopper_steps import (
    AHEAD,
    add_rows,
    begin_keys,
    buffer_of,
    columns_of,
    dots,
    in_order,
    load_outer,
    look_ahead,
    no_sums,
    not_staged,
    products,
    room,
    row_cells,
    row_interval,
    send_keys,
    send_outer,
    store_outer,
    wait_for,
    walk_on,
    where_seen,
)
from ring_hilbert.kernels.hopper_walk import (
    WIDTH,
    along_grid,
    copied_outer,
    outer_rows,
    tile_of,
)
from ring_hilbert.kernels.steps import VARIES


@gluon.jit
def summed(x):
    """`x [M, N]` summed over the columns of each thread: `[M, 4]`, so that no thread waits for another."""
    columns: gl.constexpr = x.shape[1] // 8
    return gl.sum(gl.sum(gl.reshape(x, [x.shape[0], columns, 4, 2]), 3), 1)


@gluon.jit
def by_row(factor, x):
    """`factor [M]` of the rows of `x [M, columns]`."""
    return gl.expand_dims(gl.convert_layout(factor, gl.SliceLayout(1, x.type.layout), assert_trivial=True), 1)


@gluon.jit
def by_thread(factor, total):
    """`factor [M]` of the rows of `total`, of `summed`."""
    return gl.expand_dims(gl.convert_layout(factor, gl.SliceLayout(1, total.type.layout)), 1)


@gluon.jit
def weighed(scores, highest, maximum, weight, scale2, MASKED: gl.constexpr):
    """The weights of `scores`, whose rows have a `highest`, relative to the new row maximum; that; the decay of the sums so far."""
    higher = gl.maximum(maximum, highest * scale2)
    finite = higher
    if MASKED:
        finite = gl.where(higher == float("-inf"), 0.0, higher)
    return gl.exp2(scores * scale2 - gl.expand_dims(finite - weight, 1)), higher, gl.exp2(maximum - finite)


@gluon.jit
def attend(
    values, maximum, total, p, walk, step, queries, keys, index, full, number, low, high, scale2,
    D: gl.constexpr, BLOCK_N: gl.constexpr, INDEXED: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Merge `number` blocks of keys into the running softmax; the last one's `p` is not in `values` yet.

    `walk`, of `begin_keys`, is `AHEAD` of `step`.
    """
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
        values = add_rows(values, p, v_ring, buffer_of(gl.maximum(step - 1, 0)))
        weight = walk[2][0]
        walk = walk_on(keys, walk, rows, walk[2][1:], index, BLOCK_N, INDEXED)
        scores = warpgroup_mma_wait(len(values), [scores])
        if MASKED:
            scores = where_seen(scores, key_ring.index(here), low, high)
        exact, maximum, decay = weighed(scores, gl.max(scores, 1), maximum, weight, scale2, MASKED)
        total = total * by_thread(decay, total) + summed(exact)
        exact = gl.convert_layout(exact.to(p.dtype), p.type.layout, assert_trivial=True)
        step = in_order(step)
        values, p = wait_for(0, values, exact)
        values = [x * by_row(decay, x) for x in values]
        if D <= 48:  # lest the compiler scale behind the loop, where products would wait for that (Triton 3.9)
            values, p = wait_for(0, values, p)
        step += 1
    return values, maximum, total, p, walk, step


@gluon.jit
def slot_of(results, batch, head, kv_head, row, member):
    """The staging index of each row, -1 if not staged, and the offset of its terms."""
    _, _, slots, _, _, _ = results[0]
    _, _, slot_strides, row_strides, _ = results[1]
    slots += batch * slot_strides[0] + kv_head * slot_strides[2]
    slot = gl.load(slots + row.to(gl.int64) * slot_strides[1], mask=row >= 0, other=-1)
    return slot, row_cells(row_strides, batch, head, slot, member)


@gluon.jit
def resumed(total, results, batch, head, slot, s_row, member, D: gl.constexpr):
    """The total, in the form of `total`, and the values of staged rows; 0 for others."""
    _, _, _, _, s_total, s_values = results[0]
    _, _, _, _, values_strides = results[1]
    before = gl.load(s_total + s_row, mask=slot >= 0, other=0.0)
    before = by_thread(before, total)
    first = gl.expand_dims(gl.arange(0, 4, gl.SliceLayout(0, total.type.layout)), 0) == 0
    values = load_outer(s_values, values_strides, batch, head, slot, member, D)
    return gl.where(first, before, 0.0), values


@gluon.jit
def finish(
    values, maximum, total, results, batch, head, kv_head, outer, place, count, columns,
    BLOCK_M: gl.constexpr, MEMBERS: gl.constexpr, D: gl.constexpr, STAGED: gl.constexpr,
):  # fmt: skip
    """Write what has been attended, or leave it to the launch that resumes it."""
    out, lse, _, s_maximum, s_total, s_values = results[0]
    out_strides, lse_strides, _, _, values_strides = results[1]
    OWN: gl.constexpr = maximum.type.layout
    own = copied_outer(outer, place, count, BLOCK_M, MEMBERS, columns)
    row, member = outer_rows(outer, place, count, BLOCK_M, MEMBERS, OWN)
    exists = row >= 0
    total = gl.convert_layout(gl.sum(total, 1), OWN)
    if STAGED == 1 or STAGED == 3:
        slot, s_row = slot_of(results, batch, head, kv_head, row, member)
        gl.store(s_maximum + s_row, maximum, mask=slot >= 0)
        gl.store(s_total + s_row, total, mask=slot >= 0)
        places = [(gl.convert_layout(slot, x[0].type.layout), x[1]) for x in own]
        store_outer(s_values, values_strides, batch, head, places, values, columns, D)
        exists = exists & (slot < 0)
        own = not_staged(own, places)
    if STAGED != 3:  # then all rows of the tile have a slot
        some = total > 0
        total = gl.where(some, total, 1.0)
        store_outer(out, out_strides, batch, head, own, [x / by_row(total, x) for x in values], columns, D)
        rounded = (maximum + gl.log2(total)) * 0.6931471805599453
        cells = row_cells(lse_strides, batch, head, row, member)
        gl.store(lse + cells, gl.where(some, rounded, float("-inf")), mask=exists)


@gluon.jit(do_not_specialize=VARIES)
def forward_kernel(
    q, k, v, out, lse, slots, s_maximum, s_total, s_values,
    q_strides, k_strides, v_strides, out_strides, lse_strides, slot_strides, row_strides, values_strides,
    tables, order, tiles, steps, runs, outer, index, low, high, key,
    table_strides, num_tiles, tile_width, num_runs, interval_strides, scale2,
    GROUP: gl.constexpr, MEMBERS: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    INDEXED: gl.constexpr, STAGED: gl.constexpr,
):  # fmt: skip
    """As the Triton kernel, but with grid `(tiles, H / MEMBERS, B)`. A program has its rows for MEMBERS heads, head by head."""
    M: gl.constexpr = BLOCK_M * MEMBERS
    WARPS: gl.constexpr = gl.num_warps()
    SCORES: gl.constexpr = products(BLOCK_N, WARPS)
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
    own = copied_outer(outer, place, count, BLOCK_M, MEMBERS, columns)
    send_outer(queries, q, q_strides, batch, head, own, columns, D)
    keys, walk = begin_keys(
        k, v, key, k_strides, v_strides, interval_strides, batch, kv_head, columns, run, index, full, D, BLOCK_N, INDEXED,
    )  # fmt: skip

    row, member = outer_rows(outer, place, count, BLOCK_M, MEMBERS, gl.SliceLayout(1, SCORES))
    zeros = gl.zeros([M, BLOCK_N], gl.float32, SCORES)
    p = gl.convert_layout(zeros.to(dtype), gl.DotOperandLayout(0, SCORES, 2))
    maximum = gl.full([M], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    total = summed(zeros)
    values = no_sums(M, columns)
    strides = out_strides, lse_strides, slot_strides, row_strides, values_strides
    results = (out, lse, slots, s_maximum, s_total, s_values), strides
    if STAGED >= 2:
        slot, s_row = slot_of(results, batch, head, kv_head, row, member)
        maximum = gl.load(s_maximum + s_row, mask=slot >= 0, other=float("-inf"))
        total, values = resumed(total, results, batch, head, slot, s_row, member, D)

    step = 0
    nowhere = gl.zeros([M], gl.int32, gl.SliceLayout(1, SCORES))
    values, maximum, total, p, walk, step = attend(
        values, maximum, total, p, walk, step, queries, keys, index, full, full, nowhere, nowhere, scale2[0],
        D, BLOCK_N, INDEXED, False,
    )  # fmt: skip
    first, last = row_interval(low, high, batch, interval_strides[0], row)
    values, maximum, total, p, walk, step = attend(
        values, maximum, total, p, walk, step, queries, keys, index, full, masked, first, last, scale2[0],
        D, BLOCK_N, INDEXED, True,
    )  # fmt: skip
    async_copy.wait_group(0)
    fence_async_shared()
    _, v_ring, _ = keys[1]
    values = add_rows(values, p, v_ring, buffer_of(gl.maximum(step - 1, 0)))
    values, p = wait_for(0, values, p)

    # Rows are looked up again, so as not to occupy registers during the loops.
    finish(
        values, maximum, total, results, batch, head, kv_head, outer, in_order(place), in_order(count), columns,
        BLOCK_M, MEMBERS, D, STAGED,
    )  # fmt: skip
