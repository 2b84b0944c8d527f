# SPDX-License-Identifier: Apache-2.0
"""The schedule inside a kernel: the rows of a tile, the rows of a step, and which pairs of them count.

What the tables hold is in `tables.py`. Rows are int32; offsets into tensors are int64.
"""

import triton
import triton.language as tl

from ring_hilbert.kernels import tables

# Numbers that change with the batch: kernels are not specialised on their divisibility by 16.
VARIES = ["lse_strides", "slot_strides", "row_strides", "table_strides", "num_tiles", "num_runs", "interval_strides"]

PLACE, COUNT, RUN = (tl.constexpr(x) for x in (tables.TILE_PLACE, tables.TILE_COUNT, tables.TILE_RUN))
FIRST, STEP, LEFT, TIMES = (
    tl.constexpr(x) for x in (tables.RUN_FIRST, tables.RUN_STEP, tables.RUN_COUNT, tables.RUN_TIMES)
)
SEGMENT, AHEAD, HOLE, HOLE_AHEAD, WIDTH = (
    tl.constexpr(x)
    for x in (tables.RUN_SEGMENT, tables.RUN_AHEAD, tables.RUN_HOLE, tables.RUN_HOLE_AHEAD, tables.RUN_WIDTH)
)


@triton.jit
def along_grid(num_tiles):
    """This program's place in the order of tiles, and its head: tiles lie along the first axis of the grid or the second."""
    tiles_first = tl.num_programs(0) == num_tiles
    return (
        tl.where(tiles_first, tl.program_id(0), tl.program_id(1)),
        tl.where(tiles_first, tl.program_id(1), tl.program_id(0)),
    )


@triton.jit
def tile_of(tables, order, tiles, steps, runs, table_strides, num_tiles, tile_width, num_runs, batch, kv_head, at):
    """The tile at a place of the order: `(its entry, rows, runs, first run, blocks without a mask, blocks with one)`."""
    table = tl.load(tables + batch * table_strides[0] + kv_head).to(tl.int64)
    number = table + batch * table_strides[1]
    name = tl.load(order + number * num_tiles + at)
    tile = tiles + (table * num_tiles + name) * tile_width
    runs += number * num_runs * WIDTH
    steps += (number * num_tiles + name) * 2
    return tile, tl.load(tile + COUNT), runs, tl.load(tile + RUN), tl.load(steps), tl.load(steps + 1)


@triton.jit
def slot_of(slots, strides, rows, exists):
    """The staging index of each row, -1 if not staged."""
    return tl.load(slots + rows.to(tl.int64) * strides[1], mask=exists, other=-1)


@triton.jit
def outer_rows(tile, rows, BLOCK: tl.constexpr, AGAIN: tl.constexpr = False):
    """The rows `[BLOCK]` of a tile, -1 where there is none; AGAIN: nothing of before, which occupies registers during loops."""
    within = tl.arange(0, BLOCK)
    exists = within < tl.load(tile + COUNT, volatile=AGAIN)
    return tl.load(rows + tl.load(tile + PLACE, volatile=AGAIN) + within, mask=exists, other=-1)


@triton.jit
def start_walk(runs, run, index, BLOCK: tl.constexpr, INDEXED: tl.constexpr):
    """The initial state of a walk: `(run, first row, stride, rows left, multiplicity, with INDEXED the rows)`."""
    entry = runs + WIDTH * run
    first = tl.load(entry + FIRST)
    rows = first
    if INDEXED:
        rows = tl.load(index + first + tl.arange(0, BLOCK))
    step = 1
    if not INDEXED:
        step = tl.load(entry + STEP)
    return run, first, step, tl.load(entry + LEFT), tl.load(entry + TIMES), rows


@triton.jit
def step_rows(at, BLOCK: tl.constexpr, INDEXED: tl.constexpr):
    """A walk's current step: `(inner rows [BLOCK], which of them exist, log2 of their multiplicity)`."""
    _, first, step, left, times, rows = at
    places = tl.arange(0, BLOCK)
    inner = rows if INDEXED else first + places * step
    exists = places < left
    if INDEXED:
        exists = exists & (rows >= 0)
    return inner, exists, tl.math.log2(times.to(tl.float32))


@triton.jit
def next_step(runs, index, at, BLOCK: tl.constexpr, INDEXED: tl.constexpr):
    """The state of a walk after this step.

    Without a branch, and with loads used only in the next iteration: otherwise Triton does not pipeline the loop, or puts these
    loads, on which those of rows depend, into stages of their own.
    """
    run, first, step, left, _, rows = at
    ends = left <= BLOCK
    run += ends.to(tl.int32)
    entry = runs + WIDTH * run
    first = tl.where(ends, tl.load(entry + FIRST), first + BLOCK * step)
    left = tl.where(ends, tl.load(entry + LEFT), left - BLOCK)
    if INDEXED:
        rows = tl.load(index + first + tl.arange(0, BLOCK))
    else:
        step = tl.load(entry + STEP)
    return run, first, step, left, tl.load(entry + TIMES), rows


@triton.jit
def row_interval(low, high, batch, stride, rows, exists):
    """The intervals of keys that query rows see; `[0, 0]`, which holds no key, where there is no row."""
    place = batch * stride + rows
    return tl.load(low + place, mask=exists, other=0), tl.load(high + place, mask=exists, other=0)


@triton.jit
def row_key(key, batch, stride, rows, exists):
    """The keys of key rows; 0, which nothing sees, where there is no row: other numbers would cost registers."""
    return tl.load(key + batch * stride + rows, mask=exists, other=0)


@triton.jit
def sees(interval, key):
    """Which query rows `[M]` see which key rows `[N]`: bool `[M, N]`."""
    return (key[None, :] >= interval[0][:, None]) & (key[None, :] <= interval[1][:, None])


@triton.jit
def segment_of(rows, ahead, length):
    """The number of the segment that holds each row."""
    return (rows + ahead).to(tl.uint32) // length.to(tl.uint32)


@triton.jit
def within_segments(visible, runs, at, outer, inner, SEGMENTS: tl.constexpr):
    """`visible [M, N]` without the pairs that, by the run, lie in different segments or in one that is left out."""
    if SEGMENTS:
        run = runs + WIDTH * at[0]
        length, ahead = tl.load(run + SEGMENT), tl.load(run + AHEAD)
        visible = visible & (segment_of(outer, ahead, length)[:, None] == segment_of(inner, ahead, length)[None, :])
        hole, ahead = tl.load(run + HOLE), tl.load(run + HOLE_AHEAD)
        length = tl.maximum(hole, 1)
        inside = segment_of(outer, ahead, length)[:, None] == segment_of(inner, ahead, length)[None, :]
        visible = visible & ((hole == 0) | (inside == 0))
    return visible


@triton.jit
def above(scores, scale2, level):
    """`scores * scale - level` in powers of two; `scale2` is the factor and, for float32, its rounding error."""
    result = scores * scale2[0] - level
    return result + scores * scale2[1]


@triton.jit
def at_head(tensor, strides, batch, head, D: tl.constexpr):
    """`tensor` from a head of a batch entry on; `strides` over batch, row and head."""
    offset = batch * strides[0] + head * strides[2]
    if D % 16 != 0:  # strides are multiples of 8, of which the compiler is told by itself only if they are of 16
        offset = tl.multiple_of(offset, 8)
    return tensor + offset


@triton.jit
def row_offsets(rows, stride):
    """Where rows begin, in elements: in units of 8, 32 bits suffice."""
    return (rows * (stride // 8)).to(tl.uint32).to(tl.int64) * 8


@triton.jit
def load_rows(pointer, stride, rows, exists, columns, D: tl.constexpr, MASKED: tl.constexpr):
    """Rows `[N, BLOCK_D]` of a tensor; 0 in columns from D on and, with MASKED, where not `exists [N]`."""
    pointers = pointer + row_offsets(rows, stride)[:, None] + columns[None, :]
    if columns.shape[0] != D:
        if MASKED:
            block = tl.load(pointers, mask=exists[:, None] & (columns < D)[None, :], other=0.0)
        else:
            block = tl.load(pointers, mask=(columns < D)[None, :], other=0.0)
    elif MASKED:
        block = tl.load(pointers, mask=exists[:, None], other=0.0)
    else:
        block = tl.load(pointers)
    return block


@triton.jit
def store_rows(pointer, stride, rows, exists, columns, values, D: tl.constexpr):
    """Write rows `[M, BLOCK_D]`, those that exist, in the dtype of the tensor."""
    cells = exists[:, None] & (columns < D)[None, :]
    pointers = pointer + row_offsets(rows, stride)[:, None] + columns[None, :]
    tl.store(pointers, values.to(pointer.dtype.element_ty), mask=cells)
