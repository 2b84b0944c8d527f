# SPDX-License-Identifier: Apache-2.0
"""Forward for compute capability 9.0 with warp groups of their own for copies and for products, in Gluon.

Programs stay: each takes one item, a tile for two heads, after the other. One warp group copies, up to two steps ahead and on
into the next item, while two others compute, a head each, so that the softmax of one overlaps the products of the other
(FlashAttention-3, arXiv 2407.08608, section 3.1). The keys of a step are free half a step before its values, and each have a
ring of their own, so two steps of 128 rows suffice.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma_wait,
)

from ring_hilbert.kernels.hopper_forward import by_row, by_thread, finish, resumed, slot_of, summed, weighed
from ring_hilbert.kernels.hopper_steps import (
    FLAT,
    add_rows,
    barriers,
    columns_of,
    dots,
    in_order,
    no_sums,
    products,
    room,
    row_interval,
    send,
    send_outer,
    send_rows,
    together,
    until,
    vectors,
    wait_for,
    where_seen,
)
from ring_hilbert.kernels.hopper_walk import (
    WIDTH,
    along,
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

RING = gl.constexpr(2)  # steps whose keys, or values, are in shared memory
REGISTERS = gl.constexpr(224)  # of a thread that computes
COPIER = gl.constexpr(56)  # of one that copies: together 3 * 168, as without these numbers
FACTS = gl.constexpr(8)  # numbers by which an item is told, at most


@gluon.jit
def tell(told, number, item, items, work, GROUP: gl.constexpr):
    """Look up the `number`-th item of this program and put what is needed of it into shared memory; head -1: there is none."""
    tables, order, tiles, steps, table_strides, num_tiles, tile_width, num_runs, sizes = work
    facts, known, free = told
    exists = item < items
    item = gl.minimum(item, items - 1)
    at, head = along(num_tiles, sizes[0], item % sizes[0], item // sizes[0] % sizes[1])
    batch, head = item // (sizes[0] * sizes[1]), 2 * head
    count, place, run, full, masked = tile_of(
        tables,
        order,
        tiles,
        steps,
        table_strides,
        num_tiles,
        tile_width,
        num_runs,
        batch.to(gl.int64),
        head // GROUP,
        at,
    )
    numbers = gl.where(exists, head, -1), batch, place, count, run.to(gl.int32), full, masked
    until(free, number - 2, 2)
    for i in gl.static_range(7):
        value = gl.full([1], numbers[i], gl.int32, vectors(gl.num_warps()))
        facts.index((number % 2) * FACTS + i).store(value)
    together()
    mbarrier.arrive(known.index(number % 2), count=1)


@gluon.jit
def fact(facts, number, i: gl.constexpr):
    """A number that the `number`-th item was told by."""
    return gl.sum(facts.index((number % 2) * FACTS + i).load(vectors(gl.num_warps())), 0)


@gluon.jit
def item_of(told, number, runs):
    """The `number`-th item: `(head, batch, place, rows, run, steps without a mask, with one)`."""
    facts, known, free = told
    until(known, number, 2)
    head, batch = fact(facts, number, 0), fact(facts, number, 1).to(gl.int64)
    place, count = fact(facts, number, 2), fact(facts, number, 3)
    run = runs + fact(facts, number, 4).to(gl.int64) * WIDTH
    full, masked = fact(facts, number, 5), fact(facts, number, 6)
    together()
    mbarrier.arrive(free.index(number % 2), count=1)
    return head, batch, place, count, run, full, masked


@gluon.jit
def copy(
    told, rings, signals, operands, ticket, first, items, work,
    GROUP: gl.constexpr, D: gl.constexpr, INDEXED: gl.constexpr,
):  # fmt: skip
    """Copy the queries of every item, and its keys and values step by step."""
    q, k, v, key, q_strides, k_strides, v_strides, interval_stride, outer, index, runs = operands
    queries, k_ring, v_ring, key_ring = rings
    q_ready, q_free, k_ready, k_free, v_ready, v_free, _ = signals
    M: gl.constexpr = queries[0].shape[1]
    BLOCK: gl.constexpr = k_ring[0].shape[1]
    columns = columns_of(D)
    number, turn, step = items * 0, items * 0, items * 0
    tell(told, number, first, items, work, GROUP)
    head, batch, place, count, run, full, masked = item_of(told, number, runs)
    while head >= 0:
        if count > 0:
            own_k = k + gl.multiple_of(batch * k_strides[0] + (head // GROUP) * k_strides[2], 8)
            own_v = v + gl.multiple_of(batch * v_strides[0] + (head // GROUP) * v_strides[2], 8)
            steps = gl.maximum(full + masked, 1)
            at = walk_from(run, 0, INDEXED)
            rows = copied_rows(at, index, BLOCK, INDEXED, columns)
            flat = step_rows(at, index, BLOCK, INDEXED, vectors(gl.num_warps()))
            for i in range(steps):
                to = step % RING
                until(k_free, step - RING, RING)
                send_rows(k_ring, to, own_k, rows, k_strides[1], columns, D)
                if (i >= full) | (i == 0):
                    send(key_ring.index(to), key + batch * interval_stride + flat, flat >= 0)
                async_copy.mbarrier_arrive(k_ready.index(to), increment_count=False)
                if i == 0:
                    until(q_free, turn - 1, 1)
                    for m in gl.static_range(2):
                        own = copied_outer(outer, in_order(place), count, M, 1, columns)
                        part = [x.index(m) for x in queries]
                        send_outer(part, q, q_strides, batch, in_order(head) + m, own, columns, D)
                    async_copy.mbarrier_arrive(q_ready.index(0), increment_count=False)
                until(v_free, step - RING, RING)
                send_rows(v_ring, to, own_v, rows, v_strides[1], columns, D)
                async_copy.mbarrier_arrive(v_ready.index(to), increment_count=False)
                at = next_step(at, BLOCK, INDEXED)
                rows = copied_rows(at, index, BLOCK, INDEXED, columns)
                flat = step_rows(at, index, BLOCK, INDEXED, vectors(gl.num_warps()))
                if i == gl.minimum(steps, RING) - 1:  # now there is time
                    tell(told, number + 1, gl.atomic_add(ticket, 1) + gl.num_programs(0), items, work, GROUP)
                step += 1
            turn += 1
        else:
            tell(told, number + 1, gl.atomic_add(ticket, 1) + gl.num_programs(0), items, work, GROUP)
        number += 1
        head, batch, place, count, run, full, masked = item_of(told, number, runs)


@gluon.jit
def highest(x):
    """The maximum of each row of `x [M, N]`, over neighbours first: chains of half the length."""
    pairs = gl.max(gl.reshape(x, [x.shape[0], x.shape[1] // 8, 4, 2]), 3)
    return gl.convert_layout(gl.max(gl.max(pairs, 1), 1), gl.SliceLayout(1, x.type.layout))


@gluon.jit
def attend(
    values, maximum, total, p, at, step, queries, rings, signals, number, low, high, scale2,
    MEMBER: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Merge `number` blocks of keys into the running softmax; the last one's `p` is not in `values` yet."""
    _, k_ring, v_ring, key_ring = rings
    _, _, k_ready, k_free, v_ready, v_free, turns = signals
    M: gl.constexpr = queries[0].shape[0]
    BLOCK: gl.constexpr = k_ring[0].shape[1]
    SCORES: gl.constexpr = products(BLOCK, gl.num_warps())
    zeros = gl.zeros([M, BLOCK], gl.float32, SCORES)
    for _ in range(number):
        here, before = step % RING, (step - 1) % RING
        until(k_ready, step, RING)
        until(v_ready, step - 1, RING)
        until(turns[MEMBER], step - 1 + MEMBER, 1)
        fence_async_shared()
        scores = dots(queries, k_ring, here, zeros)
        values = add_rows(values, p, v_ring, before)
        mbarrier.arrive(turns[1 - MEMBER].index(0), count=1)
        weight = step_weight(at)
        at = next_step(at, BLOCK, False)
        scores = warpgroup_mma_wait(len(values), [scores])
        if MASKED:
            scores = where_seen(scores, key_ring.index(here), low, high)
        together()
        mbarrier.arrive(k_free.index(here), count=1)
        exact, maximum, decay = weighed(scores, highest(scores), maximum, weight, scale2, MASKED)
        total = total * by_thread(decay, total) + summed(exact)
        exact = gl.convert_layout(exact.to(p.dtype), p.type.layout, assert_trivial=True)
        step = in_order(step)
        values, p = wait_for(0, values, exact)
        together()
        mbarrier.arrive(v_free.index(before), count=1)
        values = [x * by_row(decay, x) for x in values]
        step += 1
    return values, maximum, total, p, at, step


@gluon.jit
def compute(
    told, rings, signals, results, intervals, items, runs, scale2,
    GROUP: gl.constexpr, D: gl.constexpr, STAGED: gl.constexpr, MEMBER: gl.constexpr,
):  # fmt: skip
    """Attend the rows of every item for one of its heads."""
    out, _, _, s_maximum, _, _ = results[0]
    outer, low, high, interval_stride = intervals
    queries, k_ring, v_ring, key_ring = rings
    q_ready, q_free, k_ready, k_free, v_ready, v_free, turns = signals
    M: gl.constexpr = queries[0].shape[1]
    BLOCK: gl.constexpr = k_ring[0].shape[1]
    SCORES: gl.constexpr = products(BLOCK, gl.num_warps())
    OWN: gl.constexpr = gl.SliceLayout(1, SCORES)
    dtype: gl.constexpr = out.dtype.element_ty
    own_queries = [part.index(MEMBER) for part in queries]
    columns = columns_of(D)
    number, turn, step = items * 0, items * 0, items * 0
    head, batch, place, count, run, full, masked = item_of(told, number, runs)
    while head >= 0:
        if count > 0:
            kv_head = head // GROUP
            head += MEMBER
            row, member = outer_rows(outer, place, count, M, 1, OWN)
            maximum = gl.full([M], float("-inf"), gl.float32, OWN)
            if STAGED >= 2:
                slot, s_row = slot_of(results, batch, head, kv_head, row, member)
                maximum = gl.load(s_maximum + s_row, mask=slot >= 0, other=float("-inf"))

            # The first step, with a mask whether it needs one or not: there is no product with values yet.
            first, last = row_interval(low, high, batch, interval_stride, row)
            at = walk_from(run, 0, False)
            here = step % RING
            until(q_ready, turn, 1)
            until(k_ready, step, RING)
            until(turns[MEMBER], step - 1 + MEMBER, 1)
            fence_async_shared()
            zeros = gl.zeros([M, BLOCK], gl.float32, SCORES)
            scores = dots(own_queries, k_ring, here, zeros)
            mbarrier.arrive(turns[1 - MEMBER].index(0), count=1)
            weight = step_weight(at)
            at = next_step(at, BLOCK, False)
            scores = warpgroup_mma_wait(0, [scores])
            scores = where_seen(scores, key_ring.index(here), first, last)
            together()
            mbarrier.arrive(k_free.index(here), count=1)
            exact, maximum, decay = weighed(scores, highest(scores), maximum, weight, scale2, True)
            p = gl.convert_layout(exact.to(dtype), gl.DotOperandLayout(0, SCORES, 2), assert_trivial=True)
            total = summed(exact)
            values = no_sums(M, columns)
            if STAGED >= 2:
                before, values = resumed(total, results, batch, head, slot, s_row, member, D)
                total += before * by_thread(decay, total)
                values = [x * by_row(decay, x) for x in values]
                # Lest ptxas scale them in the loop, where products would wait for that.
                step = in_order(step)
                values, p = wait_for(0, values, p)
            step += 1

            nowhere = gl.zeros([M], gl.int32, OWN)
            values, maximum, total, p, at, step = attend(
                values, maximum, total, p, at, step, own_queries, rings, signals, full - 1, nowhere, nowhere, scale2,
                MEMBER, False,
            )  # fmt: skip
            # Rows are loaded again, so as not to occupy registers during the loops.
            place = in_order(place)
            row, member = outer_rows(outer, place, count, M, 1, OWN)
            first, last = row_interval(low, high, batch, interval_stride, row)
            left = masked - (full == 0).to(gl.int32)
            values, maximum, total, p, at, step = attend(
                values, maximum, total, p, at, step, own_queries, rings, signals, left, first, last, scale2,
                MEMBER, True,
            )  # fmt: skip
            mbarrier.arrive(q_free.index(0), count=1)
            until(v_ready, step - 1, RING)
            fence_async_shared()
            values = add_rows(values, p, v_ring, (step - 1) % RING)
            values, p = wait_for(0, values, p)
            together()
            mbarrier.arrive(v_free.index((step - 1) % RING), count=1)
            finish(
                values, maximum, total, results, batch, head, kv_head, outer, in_order(place), count, columns,
                M, 1, D, STAGED,
            )  # fmt: skip
            turn += 1
        number += 1
        head, batch, place, count, run, full, masked = item_of(told, number, runs)


@gluon.jit(do_not_specialize=[*VARIES, "sizes"])
def forward_kernel(
    q, k, v, out, lse, slots, s_maximum, s_total, s_values,
    q_strides, k_strides, v_strides, out_strides, lse_strides, slot_strides, row_strides, values_strides,
    tables, order, tiles, steps, runs, outer, index, low, high, key,
    table_strides, num_tiles, tile_width, num_runs, interval_strides, scale2, ticket, sizes,
    GROUP: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, INDEXED: gl.constexpr,
    STAGED: gl.constexpr,
):  # fmt: skip
    """As `hopper_forward`'s, for two heads, but with any number of programs. `ticket`: 0; `sizes`: what the grid would be there."""
    dtype: gl.constexpr = k.dtype.element_ty
    facts = gl.allocate_shared_memory(gl.int32, [2 * FACTS, 1], FLAT)
    columns = columns_of(D)
    queries = room(dtype, [2, BLOCK_M], columns)
    k_ring = room(dtype, [RING, BLOCK_N], columns)
    v_ring = room(dtype, [RING, BLOCK_N], columns)
    key_ring = gl.allocate_shared_memory(gl.int32, [RING, BLOCK_N], FLAT)
    rings = queries, k_ring, v_ring, key_ring
    told = facts, barriers(2, 1), barriers(2, 3)
    # Copies arrive for each thread of the copying warp group, everything else once for each reader.
    signals = (
        barriers(1, 128), barriers(1, 2), barriers(RING, 128), barriers(RING, 2), barriers(RING, 128), barriers(RING, 2),
        (barriers(1, 1), barriers(1, 1)),
    )  # fmt: skip
    fence_async_shared()
    together()
    work = tables, order, tiles, steps, table_strides, num_tiles, tile_width, num_runs, sizes
    items = sizes[0] * sizes[1] * sizes[2]
    strides = out_strides, lse_strides, slot_strides, row_strides, values_strides
    results = (out, lse, slots, s_maximum, s_total, s_values), strides
    operands = q, k, v, key, q_strides, k_strides, v_strides, interval_strides[1], outer, index, runs
    first, scale, rows = gl.program_id(0), scale2[0], (outer, low, high, interval_strides[0])
    gl.warp_specialize(
        [
            (compute, (told, rings, signals, results, rows, items, runs, scale, GROUP, D, STAGED, gl.constexpr(0))),
            (compute, (told, rings, signals, results, rows, items, runs, scale, GROUP, D, STAGED, gl.constexpr(1))),
            (copy, (told, rings, signals, operands, ticket, first, items, work, GROUP, D, INDEXED)),
        ],
        [4, 4],
        [REGISTERS, COPIER],
    )
