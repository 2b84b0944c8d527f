# SPDX-License-Identifier: Apache-2.0
"""What is in flight inside a kernel for compute capability 9.0, in Gluon: copies of the rows of a step, and matrix products.

A program starts copying the rows of a step two steps before it uses them, wherever they lie, into a ring of `STAGES` buffers in
shared memory. All loops follow `attend` of `hopper_forward.py`.

Blocks of columns are powers of two. What has the columns of a head is a list of them, its *parts*: heads of 48 are of 32 and 16.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, warpgroup_mma, warpgroup_mma_wait

from ring_hilbert.kernels.hopper_walk import copied_rows, next_step, step_weight, walk_from

# The second are the names in Triton 3.6.
send = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
together = (
    getattr(gl, "barrier", None) or gl.thread_barrier
)  # of the threads of a program, or of a part with warps of its own

STAGES = gl.constexpr(4)
AHEAD = gl.constexpr(2)  # in steps: STAGES - 2, since the product with the previous step may be in flight
FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))  # of vectors in shared memory


@gluon.constexpr_function
def copied(dim, warps):
    """How threads copy rows of `dim` columns: 16 bytes each, at most 128 of a row at once, so that few rows are looked up."""
    row = min(dim, 64) // 8
    return gl.BlockedLayout([1, 8], [32 // row, row], [warps, 1], [1, 0])


@gluon.constexpr_function
def products(columns, warps):
    """Layout of accumulators: 16 rows per warp."""
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, columns, 16])


@gluon.constexpr_function
def vectors(warps):
    """How threads copy vectors."""
    return gl.BlockedLayout([1], [32], [warps], [0])


@gluon.constexpr_function
def operand(rows, dim, dtype):
    """Shared-memory layout of rows for the tensor cores."""
    return gl.NVMMASharedLayout.get_default_for([rows, dim], dtype)


@gluon.constexpr_function
def padded(dim):
    """The columns in which heads of `dim`, at least 16, are processed: a power of two, or two of them if that is less."""
    half = 1 << (dim - 1).bit_length() - 1
    return half + max(16, 1 << (dim - half - 1).bit_length()) if dim > 16 else 16


@gluon.constexpr_function
def whole(part, dim):
    """Whether all columns of a part of so many exist: of the larger of two, or of a last one that `dim` fills."""
    return part < dim < 2 * part or dim % part == 0


@gluon.jit
def part_of(i: gl.constexpr, D: gl.constexpr, LAYOUT: gl.constexpr):
    """The columns of the part of 2**i columns of heads of D."""
    return gl.arange(0, 1 << i, gl.SliceLayout(0, LAYOUT)) + (padded(D) >> (i + 1) << (i + 1))


@gluon.jit
def columns_of(D: gl.constexpr):
    """The columns of heads of D by parts, the larger one first; some of the last part may not exist."""
    columns = []
    for i in gl.static_range(8, 3, -1):
        if padded(D) & (1 << i):
            columns = columns + [part_of(i, D, copied(1 << i, gl.num_warps()))]
    return columns


@gluon.jit
def room(dtype: gl.constexpr, shape, columns):
    """Shared memory for rows: `shape` without the columns."""
    return [
        gl.allocate_shared_memory(dtype, shape + [x.shape[0]], operand(shape[-1], x.shape[0], dtype)) for x in columns
    ]


@gluon.jit
def row_ring(dtype: gl.constexpr, ROWS: gl.constexpr):
    """A ring of vectors in shared memory."""
    return gl.allocate_shared_memory(dtype, [STAGES, ROWS], FLAT)


@gluon.jit
def kept(x):
    """A vector of ints in shared memory."""
    memory = gl.allocate_shared_memory(gl.int32, x.shape, FLAT)
    memory.store(x)
    return memory


@gluon.jit
def row_interval(low, high, batch, stride, row):
    """The intervals of keys that query rows see."""
    at = batch * hidden(stride) + row
    return gl.load(low + at, mask=row >= 0, other=0), gl.load(high + at, mask=row >= 0, other=0)


@gluon.jit
def within(x, key, low, high, otherwise):
    """`x` where `low <= key <= high`, and `otherwise` elsewhere, by one selection; `gl.where` would become two."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred %p; setp.ge.s32 %p, $2, $3; setp.le.and.s32 %p, $2, $4, %p; selp.f32 $0, $1, $5, %p; }",
        "=f,f,r,r,r,f", [x, key, low, high, otherwise], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def where_seen(scores, place, low, high):
    """`scores` of the keys, whose `key` numbers lie at `place`, that each query sees; -inf for others."""
    keys = gl.expand_dims(place.load(gl.SliceLayout(0, scores.type.layout)), 0)
    return within(scores, keys, gl.expand_dims(low, 1), gl.expand_dims(high, 1), float("-inf"))


@gluon.jit
def inner_cells(pointer, rows, stride, columns):
    """Pointers to `rows [N]`, which are multiples of 8 elements apart; in units of 8 their offsets fit in 32 bits."""
    # With the column of each thread in the same 32 bits, not in a pointer of its own for each tensor.
    offsets = gl.expand_dims(rows * (stride // 8), 1) + gl.expand_dims(columns // 8 % 8, 0)
    rest = columns // 64 * 64 + columns % 8
    return pointer + offsets.to(gl.uint32).to(gl.int64) * 8 + gl.expand_dims(rest, 0)


@gluon.jit
def there(rows, columns, D: gl.constexpr):
    """Which cells exist: those of rows that are not -1, in columns below D."""
    cells = gl.expand_dims(rows >= 0, 1)
    if not whole(columns.shape[0], D):
        cells = cells & gl.expand_dims(columns < D, 0)
    return cells


@gluon.jit
def buffer_of(step):
    """The buffer of a ring that a step uses; a remainder would take four more instructions, since numbers may be negative."""
    return step & (STAGES - 1)


@gluon.jit
def send_rows(ring, to, pointer, rows, stride, columns, D: gl.constexpr):
    """Start copying rows of a tensor to a buffer of a ring; 0 where a row is -1, and from column D on."""
    for i in gl.static_range(len(columns)):
        send(ring[i].index(to), inner_cells(pointer, rows[i], stride, columns[i]), there(rows[i], columns[i], D))


@gluon.jit
def begin_keys(
    k, v, key, k_strides, v_strides, interval_strides, batch, kv_head, columns, run, index, full,
    D: gl.constexpr, BLOCK: gl.constexpr, INDEXED: gl.constexpr,
):  # fmt: skip
    """What `send_keys` needs: tensors and their rings; and the state of a walk, `AHEAD` of the steps whose keys it has sent.

    The state is where the walk stands, the rows that are sent next, and the weights of the steps sent. Rows in a list are loaded a
    step ahead: the walk stands behind the rows sent next, whose weight is among the others.
    """
    dtype: gl.constexpr = k.dtype.element_ty
    k_ring = room(dtype, [STAGES, BLOCK], columns)
    v_ring = room(dtype, [STAGES, BLOCK], columns)
    key_ring = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK], FLAT)
    k += gl.multiple_of(batch * k_strides[0] + kv_head * k_strides[2], 8)
    v += gl.multiple_of(batch * v_strides[0] + kv_head * v_strides[2], 8)
    keys = (k, v, key + batch * interval_strides[1], k_strides[1], v_strides[1], columns), (k_ring, v_ring, key_ring)
    at = walk_from(run, 0, INDEXED)
    walk = at, copied_rows(at, index, BLOCK, INDEXED, columns), ()
    if INDEXED:
        walk = next_step(at, BLOCK, INDEXED), walk[1], (step_weight(at),)
    for i in gl.static_range(AHEAD):
        send_keys(keys, walk, i, full, D)
        walk = walk_on(keys, walk, look_ahead(keys, walk, index, BLOCK, INDEXED), walk[2], index, BLOCK, INDEXED)
    return keys, walk


@gluon.jit
def look_ahead(keys, walk, index, BLOCK: gl.constexpr, INDEXED: gl.constexpr):
    """For `walk_on`: loads the rows of a list, before copies are started, whose requests the loads would wait behind."""
    rows = walk[1]
    if INDEXED:
        rows = copied_rows(walk[0], index, BLOCK, INDEXED, keys[0][5])
    return rows


@gluon.jit
def walk_on(keys, walk, rows, weights, index, BLOCK: gl.constexpr, INDEXED: gl.constexpr):
    """The state of a walk after a step, whose weight is appended to `weights`; `rows`: what `look_ahead` returned."""
    weights = weights + (step_weight(walk[0]),)
    at = next_step(walk[0], BLOCK, INDEXED)
    if not INDEXED:
        rows = copied_rows(at, index, BLOCK, INDEXED, keys[0][5])
    return at, rows, weights


@gluon.jit
def send_keys(keys, walk, step, full, D: gl.constexpr):
    """Start copying the keys and values of a step and, from step `full` on, the `key` numbers that decide visibility."""
    k, v, key, k_stride, v_stride, columns = keys[0]
    k_ring, v_ring, key_ring = keys[1]
    rows = walk[1]
    to = buffer_of(step)
    send_rows(k_ring, to, k, rows, k_stride, columns, D)
    send_rows(v_ring, to, v, rows, v_stride, columns, D)
    if step >= full:
        send(key_ring.index(to), key + rows[0], rows[0] >= 0)
    async_copy.commit_group()


@gluon.jit
def outer_cells(pointer, strides, batch, head, rows, members, columns, D: gl.constexpr):
    """Pointers to the outer rows of several heads, and which of these cells exist."""
    stride = hidden(strides[1])
    heads = (head + members).to(gl.int64) * hidden(strides[2])
    offsets = gl.multiple_of(batch * hidden(strides[0]) + rows.to(gl.int64) * stride + heads, 8)
    return pointer + gl.expand_dims(offsets, 1) + gl.expand_dims(columns, 0), there(rows, columns, D)


@gluon.jit
def send_outer(to, pointer, strides, batch, head, own, columns, D: gl.constexpr):
    """Start copying the outer rows of several heads."""
    for i in gl.static_range(len(columns)):
        send(to[i], *outer_cells(pointer, strides, batch, head, *own[i], columns[i], D))


@gluon.jit
def load_part(pointer, strides, batch, head, rows, members, i: gl.constexpr, D: gl.constexpr):
    """`load_outer` of the part of 2**i columns."""
    LAYOUT: gl.constexpr = products(1 << i, gl.num_warps())
    ROWS: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    rows = gl.convert_layout(rows, ROWS, assert_trivial=True)
    members = gl.convert_layout(members, ROWS, assert_trivial=True)
    cells, exist = outer_cells(pointer, strides, batch, head, rows, members, part_of(i, D, LAYOUT), D)
    return gl.load(cells, mask=exist, other=0.0)


@gluon.jit
def load_outer(pointer, strides, batch, head, rows, members, D: gl.constexpr):
    """The outer rows of several heads, as accumulators and with their rows; 0 where a row is -1."""
    loaded = []
    for i in gl.static_range(8, 3, -1):
        if padded(D) & (1 << i):
            loaded = loaded + [load_part(pointer, strides, batch, head, rows, members, i, D)]
    return loaded


@gluon.jit
def store_outer(pointer, strides, batch, head, own, values, columns, D: gl.constexpr):
    """Write the outer rows of several heads that are not -1."""
    for i in gl.static_range(len(columns)):
        x = gl.convert_layout(values[i].to(pointer.dtype.element_ty), columns[i].type.layout.parent)
        cells, exist = outer_cells(pointer, strides, batch, head, *own[i], columns[i], D)
        gl.store(cells, x, mask=exist)


@gluon.jit
def not_staged(own, slots):
    """`own` with -1 for rows that have a slot."""
    rest = []
    for i in gl.static_range(len(own)):
        rest = rest + [(gl.where(slots[i][0] < 0, own[i][0], -1), own[i][1])]
    return rest


@gluon.jit
def row_cells(strides, batch, head, rows, members):
    """Offsets of the per-row terms of the outer rows of several heads."""
    heads = (head + members).to(gl.int64) * hidden(strides[2])
    return batch * hidden(strides[0]) + rows.to(gl.int64) * strides[1] + heads


@gluon.jit
def no_sums(M: gl.constexpr, columns):
    """Accumulators `[M, columns]` of 0."""
    return [gl.zeros([M, x.shape[0]], gl.float32, products(x.shape[0], gl.num_warps())) for x in columns]


@gluon.jit
def dots(outer, ring, slot, zeros):
    """The products of outer rows with the rows in a buffer of a ring, in flight."""
    sums = warpgroup_mma(outer[0], ring[0].index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
    for i in gl.static_range(1, len(outer)):
        sums = warpgroup_mma(outer[i], ring[i].index(slot).permute((1, 0)), sums, is_async=True)
    return sums


@gluon.jit
def add_rows(sums, weights, ring, slot):
    """`sums` and the rows in a buffer of a ring, weighted by `weights [M, rows]`; a product in flight for each part."""
    added = []
    for i in gl.static_range(len(sums)):
        added = added + [warpgroup_mma(weights, ring[i].index(slot), sums[i], is_async=True)]
    return added


@gluon.jit
def wait_for(left: gl.constexpr, sums, kept):
    """Sums in flight, done once at most `left` products are, and `kept`, which stays where it is until then."""
    done = warpgroup_mma_wait(left, sums + [kept])
    return done[:-1], done[-1]


@gluon.jit
def barriers(NUMBER: gl.constexpr, ARRIVALS: gl.constexpr):
    """Barriers, each of whose phases ends after so many arrivals."""
    made = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUMBER):
        mbarrier.init(made.index(i), count=ARRIVALS)
    return made


@gluon.jit
def until(bar, number, SLOTS: gl.constexpr):
    """Wait at the barrier of a slot until the `number`-th use of the slots has arrived there; if it is negative, not at all."""
    mbarrier.wait(bar.index((number + SLOTS) % SLOTS), ((number + SLOTS) // SLOTS + 1) & 1)


@gluon.jit
def in_order(x):
    """The int `x`, as a compiler barrier: keeps arithmetic before the wait for the product that it overlaps."""
    return gl.inline_asm_elementwise(
        "bar.warp.sync 0xffffffff; mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def hidden(x):
    """The number `x`, but what follows from it is not computed ahead of a loop, nor of the products before it.

    There it would occupy registers: of each thread, or of those that threads share, of which few are left to the rest.
    """
    if x.dtype == gl.int32:
        x = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)
    return x
