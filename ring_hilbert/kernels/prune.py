# SPDX-License-Identifier: Apache-2.0
"""Pruning: which blocks of a walk a batch needs, decided on the device by least and largest keys, in a fixed order.

A block with no visible pair is skipped; one with all pairs visible needs no mask. A span is visited as one run of blocks without a
mask, and masked blocks before and behind it. Among these, blocks that see nothing are skipped too, as long as the tile has room
for runs (`GAPS`); where extremes do not tell, every pair is tested. So a schedule's size does not depend on the batch, and the
host reads nothing. Imports Triton.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ring_hilbert.kernels import tables
from ring_hilbert.kernels.extremes import (
    BASE,
    CHUNK_AT,
    EXTREMES,
    LIST_COUNT,
    LIST_WIDTH,
    NOWHERE,
    STEP,
    VARIES,
    chunks_kernel,
    extremes_of,
    judged,
)
from ring_hilbert.kernels.starting import on
from ring_hilbert.kernels.steps import row_interval, row_key, sees, segment_of
from ring_hilbert.kernels.tables import FEW_TILES, RUN_WIDTH, Schedule, Walk

EXAMINED = 64  # blocks, or chunks, that a program examines together
RANKED, COMPARED = 32, 256  # tiles that a program ranks, and those that it compares them with at a time
ROUNDED = 21  # bits of a length as a float32, all but two behind the first
SPLITS = tl.constexpr(tables.GAPS)
COPIED = tl.constexpr(128)  # cells of runs copied at once

PLACE, COUNT = tl.constexpr(tables.TILE_PLACE), tl.constexpr(tables.TILE_COUNT)
VISIT, VISITS = tl.constexpr(tables.TILE_VISIT), tl.constexpr(tables.TILE_VISITS)
RUN, ROOM, SEGMENTS_OF = (tl.constexpr(x) for x in (tables.TILE_RUN, tables.TILE_ROOM, tables.TILE_SEGMENTS))
VISIT_LIST, VISIT_LEVEL = tl.constexpr(tables.VISIT_LIST), tl.constexpr(tables.VISIT_LEVEL)
VISIT_HOLE, VISIT_TIMES = tl.constexpr(tables.VISIT_HOLE), tl.constexpr(tables.VISIT_TIMES)
VISIT_WIDTH = tl.constexpr(tables.VISIT_WIDTH)
EDGE, LENGTH = tl.constexpr(tables.LEVEL_EDGE), tl.constexpr(tables.LEVEL_LENGTH)
LEVEL_AHEAD, LEVEL_WIDTH = tl.constexpr(tables.LEVEL_AHEAD), tl.constexpr(tables.LEVEL_WIDTH)
RUN_FIRST, RUN_STEP = tl.constexpr(tables.RUN_FIRST), tl.constexpr(tables.RUN_STEP)
RUN_COUNT, RUN_TIMES = tl.constexpr(tables.RUN_COUNT), tl.constexpr(tables.RUN_TIMES)
RUN_SEGMENT, RUN_AHEAD = tl.constexpr(tables.RUN_SEGMENT), tl.constexpr(tables.RUN_AHEAD)
RUN_HOLE, RUN_HOLE_AHEAD = tl.constexpr(tables.RUN_HOLE), tl.constexpr(tables.RUN_HOLE_AHEAD)
WIDTH = tl.constexpr(RUN_WIDTH)


def prune(
    walk: Walk, low: Tensor, high: Tensor, key: Tensor, *, block_inner: int, transposed: bool, entries: int = 1,
    rows: tuple[Tensor, Tensor] | None = None, places: Tensor | None = None,
) -> Schedule:  # fmt: skip
    """The schedule of one batch.

    Args:
        walk: tiles and lists.
        low, high: of the walk's query rows, int32 `[1 or B, rows]`.
        key: of its key rows, likewise.
        block_inner: rows of a step.
        transposed: the walk's outer rows are keys.
        entries: 1, or B if batch entries have different intervals but share the walk's tables.
        rows: the outer and inner rows to put into the schedule in place of the walk's, of the same lengths.
        places: the keys indexed by these rows, if not `key`.
    """
    number, tiles = entries * walk.tiles.shape[0], walk.tiles.shape[1]
    device, lists = walk.tiles.device, walk.lists.shape[1]
    extremes = torch.empty((number, walk.chunks, EXTREMES.value), dtype=torch.int32, device=device)
    steps = torch.empty((number, tiles, 2), dtype=torch.int32, device=device)
    runs = torch.empty((number, walk.runs, RUN_WIDTH), dtype=torch.int32, device=device)
    order = torch.empty((number, tiles), dtype=torch.int32, device=device)
    low_stride, key_stride = (x.stride(0) if x.shape[0] > 1 else 0 for x in (low, key))
    facts = (low, high, key, low_stride, key_stride, walk.entries, walk.tiles.shape[0])
    sizes = {"CHUNK": walk.chunk, "TRANSPOSED": transposed, "EXAMINED": EXAMINED, "num_warps": 1}
    if number and walk.longest:
        on(chunks_kernel, (triton.cdiv(walk.longest, walk.chunk * EXAMINED), lists, number))(
            walk.lists, walk.inner, extremes, *facts, lists, walk.chunks, INDEXED=walk.indexed, **sizes
        )
    if number and tiles:
        on(prune_kernel, (tiles, number, 1))(
            walk.tiles, walk.visits, walk.lists, walk.edges, walk.levels, walk.outer, walk.inner, extremes, steps, runs, *facts,
            lists, walk.chunks, walk.runs, walk.edges.shape[2], walk.tiles.shape[2],
            BLOCK_M=walk.block_outer, BLOCK_N=block_inner, SEGMENTS=walk.segments,
            INDEXED=walk.indexed, SPAN=triton.next_power_of_2(block_inner // walk.chunk + 1), **sizes,
        )  # fmt: skip
        on(order_kernel, (triton.cdiv(tiles, RANKED), number, 1))(
            steps, order, tiles, BLOCK=RANKED, OTHERS=COMPARED, DROPPED=0 if tiles <= FEW_TILES else ROUNDED
        )
    outer, inner = (walk.outer, walk.inner) if rows is None else rows
    return Schedule(
        walk, outer, inner, order, steps, runs, low, high, key if places is None else places, transposed, block_inner
    )


@triton.jit
def put_run(to, first, step, count, times, segment, ahead, hole, hole_ahead, SEGMENTS: tl.constexpr):
    """Write a run."""
    tl.store(to + RUN_FIRST, first)
    tl.store(to + RUN_STEP, step)
    tl.store(to + RUN_COUNT, count)
    tl.store(to + RUN_TIMES, times)
    if SEGMENTS:
        tl.store(to + RUN_SEGMENT, segment)
        tl.store(to + RUN_AHEAD, ahead)
        tl.store(to + RUN_HOLE, hole)
        tl.store(to + RUN_HOLE_AHEAD, hole_ahead)


@triton.jit
def same_segment(outer, inner, length, ahead, TRANSPOSED: tl.constexpr):
    """Which pairs lie in the same segment: bool, queries by keys."""
    mine, theirs = segment_of(outer, ahead, length), segment_of(inner, ahead, length)
    if TRANSPOSED:
        mine, theirs = theirs, mine
    return mine[:, None] == theirs[None, :]


@triton.jit
def has_pair(
    outer, own, inner, theirs, length, ahead, hole, hole_ahead, SEGMENTS: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """Whether an outer and an inner row see each other: of the side of the keys their keys, of the other intervals."""
    if TRANSPOSED:
        interval, keys = theirs, own
    else:
        interval, keys = own, theirs
    visible = sees(interval, keys) & (keys > 0)[None, :]  # no key is 0, nor any interval [0, 0]
    if SEGMENTS:
        visible &= same_segment(outer, inner, length, ahead, TRANSPOSED)
        inside = same_segment(outer, inner, tl.maximum(hole, 1), hole_ahead, TRANSPOSED)
        visible &= (hole == 0) | (inside == 0)
    return tl.max(visible.to(tl.int32)) > 0


@triton.jit
def bits_of(flags, SIZE: tl.constexpr):
    """Up to 64 flags as an int64, the first in its lowest bit."""
    return tl.sum(flags.to(tl.int64) << tl.arange(0, SIZE).to(tl.int64), 0)


@triton.jit(do_not_specialize=VARIES)
def prune_kernel(
    tiles, visits, lists, edges, levels, outer, inner, extremes, steps, runs,
    low, high, key, low_stride, key_stride, entries, num_tables,
    num_lists, num_chunks, num_runs, num_edges, tile_width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SEGMENTS: tl.constexpr, INDEXED: tl.constexpr, SPAN: tl.constexpr,
    CHUNK: tl.constexpr, TRANSPOSED: tl.constexpr, EXAMINED: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, tables of the batch): the runs of every tile, and their numbers of blocks."""
    number = tl.program_id(1)
    table = number % num_tables
    entry = (tl.load(entries + table) + number // num_tables).to(tl.int64)
    place = number.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tile = tiles + (table.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * tile_width
    count = tl.load(tile + COUNT)
    if count == 0:
        tl.store(steps + place * 2, 0)
        tl.store(steps + place * 2 + 1, 0)
        return
    within = tl.arange(0, BLOCK_M)
    rows = tl.load(outer + tl.load(tile + PLACE) + within, mask=within < count, other=0)
    own = extremes_of(low, high, key, low_stride, key_stride, entry, rows, within < count, TRANSPOSED, 0)
    if TRANSPOSED:
        own_facts = row_key(key, entry, key_stride, rows, within < count)
    else:
        own_facts = row_interval(low, high, entry, low_stride, rows, within < count)
    extremes += number.to(tl.int64) * num_chunks * EXTREMES
    runs += number.to(tl.int64) * num_runs * WIDTH
    full_to = runs + tl.load(tile + RUN) * WIDTH
    masked_from = full_to + tl.load(tile + ROOM) * WIDTH
    masked_cells = 0
    full_steps, masked_steps, gaps = 0, 0, 0
    first_visit = tl.load(tile + VISIT)

    for at in range(first_visit, first_visit + tl.load(tile + VISITS)):
        visit = visits + at * VISIT_WIDTH
        name, level, hole_level = tl.load(visit + VISIT_LIST), tl.load(visit + VISIT_LEVEL), tl.load(visit + VISIT_HOLE)
        times = tl.load(visit + VISIT_TIMES)
        record = lists + (table * num_lists + name) * LIST_WIDTH
        base, step, size = tl.load(record + BASE), tl.load(record + STEP), tl.load(record + LIST_COUNT)
        of_list = extremes + tl.load(record + CHUNK_AT) * EXTREMES
        edge = edges + (table * num_lists + name).to(tl.int64) * num_edges
        first_segment = tl.load(tile + SEGMENTS_OF + 2 * level)
        last_segment = tl.load(tile + SEGMENTS_OF + 2 * level + 1)
        level_edge = edge + tl.load(levels + level * LEVEL_WIDTH + EDGE)
        start, stop = tl.load(level_edge + first_segment), tl.load(level_edge + last_segment + 1)
        straddles = first_segment != last_segment
        hole, hole_stop, hole_straddles = stop, stop, first_segment != first_segment
        segment, ahead, hole_length, hole_ahead = NOWHERE, 0, 0, 0
        if SEGMENTS:
            segment = tl.load(levels + level * LEVEL_WIDTH + LENGTH)
            ahead = tl.load(levels + level * LEVEL_WIDTH + LEVEL_AHEAD)
        if hole_level >= 0:
            first_hole = tl.load(tile + SEGMENTS_OF + 2 * hole_level)
            last_hole = tl.load(tile + SEGMENTS_OF + 2 * hole_level + 1)
            level_edge = edge + tl.load(levels + hole_level * LEVEL_WIDTH + EDGE)
            hole, hole_stop = tl.load(level_edge + first_hole), tl.load(level_edge + last_hole + 1)
            hole_straddles = first_hole != last_hole
            if SEGMENTS:
                hole_length = tl.load(levels + hole_level * LEVEL_WIDTH + LENGTH)
                hole_ahead = tl.load(levels + hole_level * LEVEL_WIDTH + LEVEL_AHEAD)

        for part in range(3 if SEGMENTS else 2):  # before the hole, behind it, and within it
            a = tl.where(part == 0, start, tl.where(part == 1, hole_stop, hole))
            b = tl.where(part == 0, hole, tl.where(part == 1, stop, tl.where(hole_straddles, hole_stop, hole)))
            compares = straddles | (part == 2)
            length, move = tl.where(compares, segment, NOWHERE), tl.where(compares, ahead, 0)
            left_out, left_out_move = tl.where(compares, hole_length, 0), tl.where(compares, hole_ahead, 0)
            if b > a:
                blocks = (b - a + BLOCK_N - 1) // BLOCK_N
                first, last, first_full, last_full = blocks, 0, blocks, blocks  # the `last` ones are exclusive
                for done in range(0, blocks, EXAMINED):
                    i = done + tl.arange(0, EXAMINED)
                    there = i < blocks
                    seen, _, whole = judged(
                        of_list, a + i * BLOCK_N, b, size, there, own, BLOCK_N, CHUNK, SPAN, TRANSPOSED
                    )
                    whole = whole & (compares == 0)
                    first = tl.minimum(first, tl.min(tl.where(seen, i, blocks), 0))
                    last = tl.maximum(last, tl.max(tl.where(seen, i + 1, 0), 0))
                    first_full = tl.minimum(first_full, tl.min(tl.where(whole, i, blocks), 0))
                    last_full = tl.minimum(
                        last_full, tl.min(tl.where(there & (whole == 0) & (i > first_full), i, blocks), 0)
                    )
                none = first_full >= last  # no block without a mask
                first_full = tl.where(none, last, first_full)
                last_full = tl.where(none, last, tl.minimum(last_full, last))
                if first_full < last_full:
                    put_run(full_to, base + (a + first_full * BLOCK_N) * step, step, (last_full - first_full) * BLOCK_N, times,
                            NOWHERE, 0, 0, 0, SEGMENTS)  # fmt: skip
                    full_to += WIDTH
                    full_steps += last_full - first_full
                for side in range(2):  # before the blocks that need no mask, and behind them
                    i = tl.where(side == 0, first, last_full)
                    end = tl.where(side == 0, first_full, last)
                    run, run_stop = i, i
                    end = tl.where(i < end, end, -1)
                    while i <= end:
                        j = i + tl.arange(0, EXAMINED)
                        seen, sure, _ = judged(
                            of_list, a + j * BLOCK_N, b, size, j < end, own, BLOCK_N, CHUNK, SPAN, TRANSPOSED
                        )
                        sure = sure & (compares == 0)
                        known, unknown = bits_of(sure, EXAMINED), bits_of(seen & (sure == 0), EXAMINED)
                        for _ in range(tl.minimum(EXAMINED, end + 1 - i)):
                            some = (known & 1) > 0
                            if (unknown & 1) > 0:
                                places = (a + i * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int32)
                                there = places < b
                                theirs = base + places * step
                                if INDEXED:
                                    theirs = tl.load(inner + theirs, mask=there, other=0)
                                if TRANSPOSED:
                                    facts = row_interval(low, high, entry, low_stride, theirs, there)
                                else:
                                    facts = row_key(key, entry, key_stride, theirs, there)
                                some = has_pair(rows, own_facts, theirs, facts, length, move, left_out, left_out_move,
                                                SEGMENTS, TRANSPOSED)  # fmt: skip
                            # A run ends at a block that sees nothing, once another block follows or none can.
                            if (run < run_stop) & ((i == end) | (some & (run_stop < i) & (gaps < SPLITS))):
                                put_run(masked_from + masked_cells, base + (a + run * BLOCK_N) * step, step,
                                        tl.minimum(run_stop * BLOCK_N, b - a) - run * BLOCK_N, times,
                                        length, move, left_out, left_out_move, SEGMENTS)  # fmt: skip
                                masked_cells += WIDTH
                                masked_steps += run_stop - run
                                gaps += (i < end).to(tl.int32)
                                run = run_stop
                            run = tl.where(some & (run == run_stop), i, run)
                            run_stop = tl.where(some, i + 1, run_stop)
                            known, unknown, i = known >> 1, unknown >> 1, i + 1

    # The last run is followed by an endless one of the first row, because loops read one run ahead.
    put_run(masked_from + masked_cells, 0, 0, NOWHERE, 1, NOWHERE, 0, 0, 0, SEGMENTS)
    # Runs with a mask follow those without.
    tl.debug_barrier()
    last_cell = masked_cells + WIDTH
    for at in range(0, last_cell, COPIED):
        cells = at + tl.arange(0, COPIED)
        moved = tl.load(masked_from + cells, mask=cells < last_cell)
        tl.debug_barrier()
        tl.store(full_to + cells, moved, mask=cells < last_cell)
        tl.debug_barrier()
    tl.store(steps + place * 2, full_steps)
    tl.store(steps + place * 2 + 1, masked_steps)


@triton.jit
def length_of(steps, tiles, exists, DROPPED: tl.constexpr):
    """A number that rises with the blocks of a tile, without so many bits of their number as a float32; -1 where there is none."""
    length = tl.load(steps + 2 * tiles, mask=exists, other=0) + tl.load(steps + 2 * tiles + 1, mask=exists, other=0)
    return tl.where(exists, length.to(tl.float32).to(tl.int32, bitcast=True) >> DROPPED, -1)


@triton.jit(do_not_specialize=["num_tiles"])
def order_kernel(steps, order, num_tiles, BLOCK: tl.constexpr, OTHERS: tl.constexpr, DROPPED: tl.constexpr):
    """Grid (blocks of tiles, tables of the batch): the tiles by falling length, then by number.

    The place of each is the number of tiles before it, which a single launch counts; sorting takes several.
    """
    steps += tl.program_id(1).to(tl.int64) * num_tiles * 2
    order += tl.program_id(1).to(tl.int64) * num_tiles
    own = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = own < num_tiles
    length = length_of(steps, own, exists, DROPPED)
    place = tl.zeros([BLOCK], tl.int32)
    for at in range(0, num_tiles, OTHERS):
        others = at + tl.arange(0, OTHERS)
        theirs = length_of(steps, others, others < num_tiles, DROPPED)
        equal = (theirs[None, :] == length[:, None]) & (others[None, :] < own[:, None])
        place += tl.sum(((theirs[None, :] > length[:, None]) | equal).to(tl.int32), 1)
    tl.store(order + place, own, mask=exists)
