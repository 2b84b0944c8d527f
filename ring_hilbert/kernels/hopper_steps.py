# SPDX-License-Identifier: Apache-2.0
"""The schedule inside a kernel for compute capability 9.0, in Gluon: the counterpart of `steps.py`.

A program starts copying the rows of a step two steps before it uses them, wherever they lie, into a ring of `STAGES` buffers in
shared memory. All loops follow `attend` of `hopper_forward.py`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy

from ring_hilbert.kernels import tables

# The second is the name in Triton 3.6.
send = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

PLACE, COUNT, RUN = (gl.constexpr(x) for x in (tables.TILE_PLACE, tables.TILE_COUNT, tables.TILE_RUN))
FIRST, STEP, LEFT, TIMES, WIDTH = (
    gl.constexpr(x) for x in (tables.RUN_FIRST, tables.RUN_STEP, tables.RUN_COUNT, tables.RUN_TIMES, tables.RUN_WIDTH)
)
NOTHING = gl.constexpr(tables.ENDLESS // 2)  # the sentinel run after the last one has more rows
STAGES = gl.constexpr(4)
AHEAD = gl.constexpr(2)  # in steps: STAGES - 2, since the product with the previous step may be in flight
FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))  # of vectors in shared memory


@gluon.constexpr_function
def copied(dim, warps):
    """How threads copy rows of `dim` columns: 16 bytes each."""
    return gl.BlockedLayout([1, 8], [256 // dim, dim // 8], [warps, 1], [1, 0])


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


@gluon.jit
def along_grid(num_tiles):
    """As in `steps.py`."""
    tiles_first = gl.num_programs(0) == num_tiles
    return (
        gl.where(tiles_first, gl.program_id(0), gl.program_id(1)),
        gl.where(tiles_first, gl.program_id(1), gl.program_id(0)),
    )


@gluon.jit
def tile_of(tables, order, tiles, steps, runs, table_strides, num_tiles, tile_width, num_runs, batch, kv_head):
    """This program's tile: `(number of rows, place of the first, its first run, blocks without a mask, with one)`."""
    table = gl.load(tables + batch * table_strides[0] + kv_head).to(gl.int64)
    number = table + batch * table_strides[1]
    at, _ = along_grid(num_tiles)
    name = gl.load(order + number * num_tiles + at)
    tile = tiles + (table * num_tiles + name) * tile_width
    run = runs + (number * num_runs + gl.load(tile + RUN)) * WIDTH
    steps += (number * num_tiles + name) * 2
    return gl.load(tile + COUNT), gl.load(tile + PLACE), run, gl.load(steps), gl.load(steps + 1)


@gluon.jit
def walk_from(run):
    """The state of a walk at the start of a run: `(run, first row, stride, rows left, multiplicity)`."""
    return run, gl.load(run + FIRST), gl.load(run + STEP), gl.load(run + LEFT), gl.load(run + TIMES)


@gluon.jit
def outer_rows(outer, place, count, BLOCK: gl.constexpr, MEMBERS: gl.constexpr, LAYOUT: gl.constexpr):
    """The rows of a tile, -1 where there is none, repeated for each of its heads; and the head of each."""
    within = gl.arange(0, BLOCK * MEMBERS, LAYOUT)
    rows = gl.load(outer + place + within % BLOCK, mask=within % BLOCK < count, other=-1)
    return rows, within // BLOCK


@gluon.jit
def next_step(at, BLOCK: gl.constexpr):
    """The state of a walk after a step."""
    run, first, step, left, times = at
    if left <= BLOCK:
        at = walk_from(run + WIDTH)
    else:
        at = run, first + BLOCK * step, step, left - BLOCK, times
    return at


@gluon.jit
def step_rows(at, index, BLOCK: gl.constexpr, INDEXED: gl.constexpr, LAYOUT: gl.constexpr):
    """The inner rows of a walk's current step, -1 where there is none."""
    _, first, step, left, _ = at
    places = gl.arange(0, BLOCK, LAYOUT)
    exists = (places < left) & (left < NOTHING)
    if INDEXED:
        rows = gl.load(index + first + places, mask=exists, other=-1)  # selecting behind the load would wait for it
    else:
        rows = gl.where(exists, first + places * step, -1)
    return rows


@gluon.jit
def seen(place, low, high, SCORES: gl.constexpr):
    """Which of a step's keys, whose `key` numbers lie at `place`, each query sees."""
    keys = gl.expand_dims(place.load(gl.SliceLayout(0, SCORES)), 0)
    return (keys >= gl.expand_dims(low, 1)) & (keys <= gl.expand_dims(high, 1))


@gluon.jit
def step_weight(at):
    """log2 of the multiplicity of a step's pairs: small, and exactly 0 for 1."""
    times = at[4].to(gl.float32)
    return gl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=f,f", [times], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def inner_cells(pointer, rows, stride, columns):
    """Pointers to `rows [N]`, which are multiples of 8 elements apart; in units of 8 their offsets fit in 32 bits."""
    offsets = (rows * (stride // 8)).to(gl.uint32).to(gl.int64) * 8
    return pointer + gl.expand_dims(offsets, 1) + gl.expand_dims(columns, 0)


@gluon.jit
def there(rows, columns, D: gl.constexpr):
    """Which cells exist: those of rows that are not -1, in columns below D."""
    cells = gl.expand_dims(rows >= 0, 1)
    if columns.shape[0] != D:
        cells = cells & gl.expand_dims(columns < D, 0)
    return cells


@gluon.jit
def send_rows(place, pointer, rows, stride, columns, D: gl.constexpr):
    """Start copying rows of a tensor; 0 where a row is -1, and from column D on."""
    send(place, inner_cells(pointer, rows, stride, columns), there(rows, columns, D))


@gluon.jit
def begin_keys(
    k, v, key, k_strides, v_strides, interval_strides, batch, kv_head, columns, run, index, full,
    D: gl.constexpr, BLOCK: gl.constexpr, INDEXED: gl.constexpr,
):  # fmt: skip
    """What `send_keys` needs: tensors and their rings; and the state of a walk, `AHEAD` of the steps whose keys it has sent.

    The state is where the walk stands, its rows there, and the weights of the steps sent.
    """
    BLOCK_D: gl.constexpr = columns.shape[0]
    dtype: gl.constexpr = k.dtype.element_ty
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, BLOCK_D], operand(BLOCK, BLOCK_D, dtype))
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, BLOCK_D], operand(BLOCK, BLOCK_D, dtype))
    key_ring = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK], FLAT)
    k += batch * k_strides[0] + kv_head * k_strides[2]
    v += batch * v_strides[0] + kv_head * v_strides[2]
    keys = (k, v, key + batch * interval_strides[1], k_strides[1], v_strides[1], columns), (k_ring, v_ring, key_ring)
    at = walk_from(run)
    walk = at, step_rows(at, index, BLOCK, INDEXED, gl.SliceLayout(1, copied(BLOCK_D, gl.num_warps()))), ()
    for i in gl.static_range(AHEAD):
        send_keys(keys, walk, i, full, D)
        walk = walk_on(walk, walk[2], index, BLOCK, INDEXED)
    return keys, walk


@gluon.jit
def walk_on(walk, weights, index, BLOCK: gl.constexpr, INDEXED: gl.constexpr):
    """The state of a walk after a step, whose weight is appended to `weights`."""
    LAYOUT: gl.constexpr = walk[1].type.layout
    weights = weights + (step_weight(walk[0]),)
    at = next_step(walk[0], BLOCK)
    return at, step_rows(at, index, BLOCK, INDEXED, LAYOUT), weights


@gluon.jit
def send_keys(keys, walk, step, full, D: gl.constexpr):
    """Start copying the keys and values of a step and, from step `full` on, the `key` numbers that decide visibility."""
    k, v, key, k_stride, v_stride, columns = keys[0]
    k_ring, v_ring, key_ring = keys[1]
    rows = walk[1]
    to = step % STAGES
    send_rows(k_ring.index(to), k, rows, k_stride, columns, D)
    send_rows(v_ring.index(to), v, rows, v_stride, columns, D)
    if step >= full:
        send(key_ring.index(to), key + rows, rows >= 0)
    async_copy.commit_group()


@gluon.jit
def outer_cells(pointer, strides, batch, head, rows, members, columns, D: gl.constexpr):
    """Pointers to the outer rows of several heads, and which of these cells exist."""
    offsets = batch * strides[0] + rows.to(gl.int64) * strides[1] + (head + members).to(gl.int64) * strides[2]
    return pointer + gl.expand_dims(offsets, 1) + gl.expand_dims(columns, 0), there(rows, columns, D)


@gluon.jit
def row_cells(strides, batch, head, rows, members):
    """Offsets of the per-row terms of the outer rows of several heads."""
    return batch * strides[0] + rows.to(gl.int64) * strides[1] + (head + members).to(gl.int64) * strides[2]


@gluon.jit
def in_order(x):
    """The int `x`, as a compiler barrier: keeps arithmetic before the wait for the product that it overlaps."""
    return gl.inline_asm_elementwise(
        "bar.warp.sync 0xffffffff; mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1
    )
