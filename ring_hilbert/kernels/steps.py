# SPDX-License-Identifier: Apache-2.0
"""The walk inside a kernel: the rows of a tile, the rows of a step, and which pairs of them count.

What the tables hold is in `walk.Walk`. Rows are int32; offsets into tensors are int64.
"""

import triton
import triton.language as tl

# Numbers that change with the batch: a kernel is not compiled anew for whether 16 divides them.
VARIES = ["lse_strides", "slot_strides", "row_strides", "table_stride", "num_tiles", "outer_strides", "inner_strides"]


@triton.jit
def tile_of(tables, tiles, rows, table_stride, num_tiles, batch, kv_head, BLOCK: tl.constexpr):
    """This program's tile: `(place, outer rows [BLOCK], first run, blocks without a mask, blocks with one)`; place 0: none."""
    tile = tiles + (tl.load(tables + batch * table_stride + kv_head) * num_tiles + tl.program_id(0)) * 4
    place = tl.load(tile)
    outer = tl.load(rows + place.to(tl.int64) * BLOCK + tl.arange(0, BLOCK))
    return place, outer, tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)


@triton.jit
def start_walk(runs, index, run, BLOCK: tl.constexpr, INDEXED: tl.constexpr):
    """Where a walk stands: `(run, first row, its step and how often rows count, rows left, with INDEXED the rows)`."""
    entry = runs + 8 * run
    first = tl.load(entry)
    rows = first
    if INDEXED:
        rows = tl.load(index + first + tl.arange(0, BLOCK))
    return run, first, tl.load(entry + 1), tl.load(entry + 2), rows


@triton.jit
def step_rows(at, BLOCK: tl.constexpr, INDEXED: tl.constexpr):
    """Of the step that a walk stands at: `(inner rows [BLOCK], which of them exist, log2 of how often they count)`."""
    _, first, step, left, rows = at
    places = tl.arange(0, BLOCK)
    inner = rows if INDEXED else first + places * (step >> 8)
    return inner, places < left, tl.math.log2((step & 255).to(tl.float32))


@triton.jit
def next_step(runs, index, at, BLOCK: tl.constexpr, INDEXED: tl.constexpr):
    """Where a walk stands after this step.

    Without a branch, and what is loaded here is used in the next iteration only: else Triton does not pipeline the loop, or
    gives these loads, which those of rows wait for, stages of their own.
    """
    run, first, step, left, rows = at
    ends = left <= BLOCK
    run += ends.to(tl.int32)
    entry = runs + 8 * run
    first = tl.where(ends, tl.load(entry), first + BLOCK * (step >> 8))
    if INDEXED:
        rows = tl.load(index + first + tl.arange(0, BLOCK))
    return run, first, tl.load(entry + 1), tl.where(ends, tl.load(entry + 2), left - BLOCK), rows


@triton.jit
def row_facts(positions, documents, batch, strides, rows, exists, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Positions and documents of rows; `strides` are of the batch, for each. What is not needed are the rows."""
    position, document = rows, rows
    if CAUSAL == 2:
        position = tl.load(positions + batch * strides[0] + rows, mask=exists, other=0)
    if DOCUMENTS:
        document = tl.load(documents + batch * strides[1] + rows, mask=exists, other=-1)
    return position, document


@triton.jit
def segment_of(rows, ahead, length):
    """The number of the segment that holds each row."""
    return (rows + ahead).to(tl.uint32) // length.to(tl.uint32)


@triton.jit
def counts(
    runs, at, outer, outer_facts, inner, inner_facts, exists,
    CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr, SEGMENTS: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Which pairs of outer and inner rows count, bool `[M, N]`; `exists [N]`: the inner rows that there are.

    With TRANSPOSED inner rows that do not exist are not hidden: their lse is infinite.
    """
    visible = tl.full([1, 1], 1, tl.int1) if TRANSPOSED else exists[None, :]
    if CAUSAL > 0:
        if TRANSPOSED:
            visible = visible & (outer_facts[0][:, None] <= inner_facts[0][None, :])
        else:
            visible = visible & (inner_facts[0][None, :] <= outer_facts[0][:, None])
    if DOCUMENTS:
        visible = visible & (outer_facts[1][:, None] == inner_facts[1][None, :]) & (inner_facts[1] >= 0)[None, :]
    if SEGMENTS:
        entry = runs + 8 * at[0]
        length, ahead = tl.load(entry + 4), tl.load(entry + 5)
        visible = visible & (segment_of(outer, ahead, length)[:, None] == segment_of(inner, ahead, length)[None, :])
        hole, ahead = tl.load(entry + 6), tl.load(entry + 7)
        length = tl.maximum(hole, 1)
        inside = segment_of(outer, ahead, length)[:, None] == segment_of(inner, ahead, length)[None, :]
        visible = visible & ((hole == 0) | (inside == 0))
    return visible


@triton.jit
def above(scores, scale2, level):
    """`scores * scale - level` in powers of two; `scale2` is the factor and what float32 takes from it, for float32."""
    result = scores * scale2[0] - level
    return result + scores * scale2[1]


@triton.jit
def load_rows(pointer, stride, rows, exists, columns, D: tl.constexpr, MASKED: tl.constexpr):
    """Rows `[N, BLOCK_D]` of a tensor; 0 in columns from D on and, with MASKED, where not `exists [N]`."""
    pointers = pointer + (rows.to(tl.int64) * stride)[:, None] + columns[None, :]
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
    pointers = pointer + (rows.to(tl.int64) * stride)[:, None] + columns[None, :]
    tl.store(pointers, values.to(pointer.dtype.element_ty), mask=cells)
