# SPDX-License-Identifier: Apache-2.0
"""Which rows a program for compute capability 9.0 has and visits: its tile, and the walk through its runs, step by step."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ring_hilbert.kernels import tables

PLACE, COUNT, RUN = (gl.constexpr(x) for x in (tables.TILE_PLACE, tables.TILE_COUNT, tables.TILE_RUN))
FIRST, STEP, LEFT, TIMES, WIDTH = (
    gl.constexpr(x) for x in (tables.RUN_FIRST, tables.RUN_STEP, tables.RUN_COUNT, tables.RUN_TIMES, tables.RUN_WIDTH)
)
NOTHING = gl.constexpr(tables.ENDLESS // 2)  # the sentinel run after the last one has more rows


@gluon.jit
def along(num_tiles, size, first, second):
    """A place in the order of tiles, and a head, from numbers along two axes, the first of `size`, on which either may lie."""
    tiles_first = size == num_tiles
    return gl.where(tiles_first, first, second), gl.where(tiles_first, second, first)


@gluon.jit
def along_grid(num_tiles):
    """As in `steps.py`."""
    return along(num_tiles, gl.num_programs(0), gl.program_id(0), gl.program_id(1))


@gluon.jit
def uniform(x):
    """The int `x`, which all threads have, in a register that they share: their own do not suffice for dK and dV."""
    return gl.inline_asm_elementwise(
        "redux.sync.or.b32 $0, $1, 0xffffffff;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def tile_of(tables, order, tiles, steps, table_strides, num_tiles, tile_width, num_runs, batch, kv_head, at):
    """The tile at a place of the order: `(rows, place of the first, number of its first run, blocks without a mask, with one)`."""
    table = uniform(gl.load(tables + batch * table_strides[0] + kv_head)).to(gl.int64)
    number = table + batch * table_strides[1]
    name = uniform(gl.load(order + number * num_tiles + at))
    tile = tiles + (table * num_tiles + name) * tile_width
    run = number * num_runs + uniform(gl.load(tile + RUN))
    steps += (number * num_tiles + name) * 2
    count, place = uniform(gl.load(tile + COUNT)), uniform(gl.load(tile + PLACE))
    return count, place, run, uniform(gl.load(steps)), uniform(gl.load(steps + 1))


@gluon.jit
def walk_from(runs, run, INDEXED: gl.constexpr):
    """The state of a walk at the start of a run: `(runs, run, first row, stride, rows left, multiplicity)`."""
    entry = runs + run * WIDTH
    step = 1 if INDEXED else gl.load(entry + STEP)
    return runs, run, gl.load(entry + FIRST), step, gl.load(entry + LEFT), gl.load(entry + TIMES)


@gluon.jit
def next_step(at, BLOCK: gl.constexpr, INDEXED: gl.constexpr):
    """The state of a walk after a step."""
    runs, run, first, step, left, times = at
    at = runs, run, first + BLOCK * step, step, left - BLOCK, times
    if left <= BLOCK:
        at = walk_from(runs, run + 1, INDEXED)
    return at


@gluon.jit
def step_weight(at):
    """log2 of the multiplicity of a step's pairs: small, and exactly 0 for 1."""
    times = at[5].to(gl.float32)
    return gl.inline_asm_elementwise(
        "lg2.approx.ftz.f32 $0, $1;", "=f,f", [times], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.constexpr_function
def at_once(layout, most):
    """How many rows all threads have at once, as far as each has others by as many further on; `most` at most."""
    layout = getattr(layout, "parent", layout)
    return min(layout.threads_per_warp[0] * layout.warps_per_cta[0], most) if hasattr(layout, "threads_per_warp") else 1


@gluon.jit
def in_terms(NUMBER: gl.constexpr, BLOCK: gl.constexpr, LAYOUT: gl.constexpr):
    """`gl.arange(0, NUMBER)`, of which BLOCK is a part, as the sum of a number of each thread, in one register, and constants."""
    within = gl.arange(0, NUMBER, LAYOUT)
    own = within % at_once(LAYOUT, BLOCK)
    return own, within - own


@gluon.jit
def step_rows(at, index, BLOCK: gl.constexpr, INDEXED: gl.constexpr, LAYOUT: gl.constexpr):
    """The inner rows of a walk's current step, -1 where there is none."""
    _, _, first, step, left, _ = at
    own, rest = in_terms(BLOCK, BLOCK, LAYOUT)
    exists = (rest < left - own) & (left < NOTHING)
    if INDEXED:
        rows = gl.load(
            index + (first + own) + rest, mask=exists, other=-1
        )  # selecting behind the load would wait for it
    else:
        rows = gl.where(exists, first + own * step + rest * step, -1)
    return rows


@gluon.jit
def copied_rows(at, index, BLOCK: gl.constexpr, INDEXED: gl.constexpr, columns):
    """`step_rows` for the copies of each part."""
    return [step_rows(at, index, BLOCK, INDEXED, gl.SliceLayout(1, x.type.layout.parent)) for x in columns]


@gluon.jit
def outer_rows(outer, place, count, BLOCK: gl.constexpr, MEMBERS: gl.constexpr, LAYOUT: gl.constexpr):
    """The rows of a tile, -1 where there is none, repeated for each of its heads; and the head of each."""
    own, rest = in_terms(BLOCK * MEMBERS, BLOCK, LAYOUT)
    rows = gl.load(outer + (place + own) + rest % BLOCK, mask=rest % BLOCK < count - own, other=-1)
    return rows, rest // BLOCK


@gluon.jit
def copied_outer(outer, place, count, BLOCK: gl.constexpr, MEMBERS: gl.constexpr, columns):
    """`outer_rows` for the copies of each part."""
    return [outer_rows(outer, place, count, BLOCK, MEMBERS, gl.SliceLayout(1, x.type.layout.parent)) for x in columns]
