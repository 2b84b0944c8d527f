# SPDX-License-Identifier: Apache-2.0
"""Extremes: the least and the largest keys of rows, and what they tell of blocks without a look at every pair. Imports Triton."""

import triton
import triton.language as tl

from ring_hilbert.kernels import tables

NOWHERE = tl.constexpr(tables.ENDLESS)
BASE, STEP = tl.constexpr(tables.LIST_BASE), tl.constexpr(tables.LIST_STEP)
LIST_COUNT, CHUNK_AT, LIST_WIDTH = (tl.constexpr(x) for x in (tables.LIST_COUNT, tables.LIST_CHUNK, tables.LIST_WIDTH))
# Extremes of a set of rows. For keys: least and largest without padding, then with it. For queries: the least low and the
# largest high, then the largest low and the least high.
LEAST, MOST, LEAST_ALL, MOST_ALL = (tl.constexpr(i) for i in range(tables.EXTREMES))
EXTREMES = tl.constexpr(tables.EXTREMES)
VARIES = ["low_stride", "key_stride", "num_tables", "num_lists", "num_chunks", "num_runs", "num_edges", "tile_width"]


@triton.jit
def extremes_of(low, high, key, low_stride, key_stride, entry, rows, there, KEYS: tl.constexpr, AXIS: tl.constexpr):
    """The four extremes of those `rows` that are `there`, along an axis."""
    if KEYS:
        value = tl.load(key + entry * key_stride + rows, mask=there, other=0)
        all_least = tl.min(tl.where(there, value, NOWHERE), AXIS)
        most = tl.max(value, AXIS)
        least = tl.min(tl.where(value > 0, value, NOWHERE), AXIS)
        all_most = most
    else:
        starts = tl.load(low + entry * low_stride + rows, mask=there, other=NOWHERE)
        ends = tl.load(high + entry * low_stride + rows, mask=there, other=0)
        least = tl.min(starts, AXIS)
        most = tl.max(ends, AXIS)
        all_least = tl.max(tl.where(there, starts, 0), AXIS)
        all_most = tl.min(tl.where(there, ends, NOWHERE), AXIS)
    return least, most, all_least, all_most


@triton.jit(do_not_specialize=VARIES)
def chunks_kernel(
    lists, inner, extremes, low, high, key, low_stride, key_stride, entries, num_tables, num_lists, num_chunks,
    CHUNK: tl.constexpr, INDEXED: tl.constexpr, TRANSPOSED: tl.constexpr, EXAMINED: tl.constexpr,
):  # fmt: skip
    """Grid (groups of chunks, lists, tables of the batch): the extremes of every chunk of every list."""
    number, name = tl.program_id(2), tl.program_id(1)
    table = number % num_tables
    entry = (tl.load(entries + table) + number // num_tables).to(tl.int64)
    record = lists + (table * num_lists + name) * LIST_WIDTH
    count = tl.load(record + LIST_COUNT)
    if tl.program_id(0) * EXAMINED * CHUNK >= count:
        return
    chunks = tl.program_id(0) * EXAMINED + tl.arange(0, EXAMINED)
    places = chunks[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    there = places < count
    base, step = tl.load(record + BASE), tl.load(record + STEP)
    if INDEXED:
        rows = tl.load(inner + base + places, mask=there, other=0)
    else:
        rows = base + places * step
    least, most, all_least, all_most = extremes_of(
        low, high, key, low_stride, key_stride, entry, rows, there, not TRANSPOSED, 1
    )
    exists = chunks * CHUNK < count
    to = extremes + (number.to(tl.int64) * num_chunks + tl.load(record + CHUNK_AT) + chunks) * EXTREMES
    tl.store(to + LEAST, least, mask=exists)
    tl.store(to + MOST, most, mask=exists)
    tl.store(to + LEAST_ALL, all_least, mask=exists)
    tl.store(to + MOST_ALL, all_most, mask=exists)


@triton.jit
def judged(
    extremes, begin, stop, size, there, own,
    BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, SPAN: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Of those blocks of a list that are `there`, by extremes: which may have a visible pair, which have one, which have no other.

    A block begins at `begin` and ends where the next would, or the span, at `stop`; the list has `size` rows. `extremes`: the
    list's; `own`: those of the tile's rows.
    """
    end = tl.minimum(begin + BLOCK_N, stop)
    chunk = (begin // CHUNK)[:, None] + tl.arange(0, SPAN)[None, :]
    inside = there[:, None] & (chunk <= ((end - 1) // CHUNK)[:, None])
    their = extremes + chunk * EXTREMES
    least = tl.min(tl.load(their + LEAST, mask=inside, other=NOWHERE), 1)
    most = tl.max(tl.load(their + MOST, mask=inside, other=0), 1)
    if TRANSPOSED:  # inner rows are queries
        all_least = tl.max(tl.load(their + LEAST_ALL, mask=inside, other=0), 1)
        all_most = tl.min(tl.load(their + MOST_ALL, mask=inside, other=NOWHERE), 1)
        low_least, high_most, low_most, high_least = least, most, all_least, all_most
        key_least, key_most, key_all_least, key_all_most = own
    else:
        all_least = tl.min(tl.load(their + LEAST_ALL, mask=inside, other=NOWHERE), 1)
        all_most = tl.max(tl.load(their + MOST_ALL, mask=inside, other=0), 1)
        low_least, high_most, low_most, high_least = own
        key_least, key_most, key_all_least, key_all_most = least, most, all_least, all_most
    seen = there & (key_least <= high_most) & (key_most >= low_least)
    # The query with the largest high sees the least key, or the one with the least low the largest. Chunks may hold other rows.
    # Of padding alone, keys are 0 to 2**31 - 1, which no query sees.
    exact = (begin % CHUNK == 0) & ((end % CHUNK == 0) | (end == size))
    first, last = (key_least >= low_most) & (key_least <= high_most), (key_most <= high_least) & (key_most >= low_least)
    sure = there & exact & (first | last)
    whole = seen & (key_all_least >= low_most) & (key_all_most <= high_least) & (begin + BLOCK_N <= stop)
    return seen, sure, whole
