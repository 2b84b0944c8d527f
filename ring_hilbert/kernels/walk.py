# SPDX-License-Identifier: Apache-2.0
"""The walk: which rows a tile holds and which rows it visits, decided on the host, as small index tensors that kernels read.

A *tile* is a block of rows of the *outer* side (queries in forward and dQ, keys in dK and dV) that are in the same branches.
It visits *runs* of the *inner* side, block after block: first those of which every pair counts, then those that need a mask.
What is decided here is how often a pair counts, and, by the smallest and largest position and document of a tile and of a
block, which blocks are not visited at all.

Branches `(w, r)` of a *chain* are nested: each branch's rows and segments lie within those of the one before. A row then has
a *depth* in the chain: it is in its branches `0 .. depth` and in no other (-1: in none). A tile of depth `c` visits in *ring*
`j <= c` its segment of branch `j` without its segment of branch `j - 1`; a pair that several branches hold is met once, in the
innermost of them, and counts `min(c, depth of the inner row) - j + 1` times. A ring is therefore cut into the inner rows of
depth `j`, of depth `j + 1`, ..., and of depth `c` or more: a number per run. That is symmetric, so the transposed walk is the
same walk.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ring_hilbert.kernels.upload import upload

ENDLESS = 2**31 - 1  # the length of a segment that holds every row
READ_AHEAD = 8  # runs that a pipelined loop may look at beyond the last one
FAMILIES = 4  # rows of one depth are visited as at most so many arithmetic progressions, else through a list
ROW_FIRST, ROW_RATE, ROW_COUNT, ROW_SEGMENT, ROW_HOLE, RUN_WIDTH = 0, 1, 2, 4, 6, 8
TIMES = 256  # a run's step and how often its rows count are one number: step * TIMES + count


@dataclass(frozen=True)
class Chain:
    """Nested branches `(w, r)`, w None for one segment over everything, and `offsets[i][g]` of branch i and kv head g."""

    branches: tuple[tuple[int | None, int], ...]
    offsets: tuple[tuple[int, ...], ...]

    def holds(self, branch: tuple[int | None, int], offsets: Sequence[int]) -> bool:
        """Whether `branch` may follow the last one: `r_i | r`, `w_i | w`, `r_i | w_i` and offsets that agree."""
        (w_in, r_in), (w, r) = self.branches[-1], branch
        return (
            r % r_in == 0
            and (w is None or (w_in is not None and w % w_in == 0))
            and (w_in is None or w_in % r_in == 0)
            and all(o % r_in == o_in for o, o_in in zip(offsets, self.offsets[-1], strict=True))
        )


def chains(branches: Sequence[tuple[int | None, int]], offsets: Sequence[Sequence[int]]) -> list[Chain]:
    """The branches as few chains; one if all are nested. Branch i has offset `offsets[i][g]` for kv head g."""
    result: list[Chain] = []
    order = sorted(range(len(branches)), key=lambda i: (branches[i][0] or math.inf, branches[i][1]))
    for i in order:
        branch, own = (branches[i][0], branches[i][1]), tuple(offsets[i])
        for at, chain in enumerate(result):
            if chain.holds(branch, own):
                result[at] = Chain((*chain.branches, branch), (*chain.offsets, own))
                break
        else:
            result.append(Chain((branch,), (own,)))
    return result


class Facts(NamedTuple):
    """Positions and documents (-1: padding) of the rows of a side, integers `[B or 1, rows]`, or None where they hide nothing."""

    positions: np.ndarray | None = None
    documents: np.ndarray | None = None

    def of(self, entry: int) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Those of one batch entry, `[rows]`."""
        positions, documents = (None if x is None else x[min(entry, len(x) - 1)] for x in self)
        return positions, documents

    @property
    def entries(self) -> int:
        """1 if all batch entries share the facts, else their number."""
        return max([1] + [len(x) for x in self if x is not None])


@dataclass(frozen=True)
class Walk:
    """What one launch reads: int32 tensors, and how the kernels are to take them.

    Attributes:
        tables: `[B or 1, Hkv]`: which table of tiles a batch entry and kv head reads.
        tiles: `[tables, T, 4]`: place in `rows`, first run, blocks to visit without a mask, blocks with one; the longest walk
            first. Place 0 is no tile.
        rows: `[places, block_outer]` rows of the outer tensor, -1 where there is none. Rows of no branch are in no tile.
        runs: `[runs, 8]`: first row (with `indexed`: place in `index`), `TIMES` x the step to the next + how often they count,
            how many rows, nothing, then for tiles that hold rows of several segments the segment length and what to add to
            a row before it is divided by it, and the same of the segments to leave out (0: none).
        index: rows of the inner tensor, if `indexed`.
        facts: outer positions, outer documents, inner positions, inner documents, `[B or 1, rows]`; empty where not needed.
        causal: 0: nothing is hidden by position; 1: positions are the rows of the tensors; 2: they are in `facts`.
        documents: whether documents hide pairs.
        segments: whether some tiles hold rows of several segments, so that masks compare segments.
        indexed: whether runs are pieces of `index` rather than rows at equal steps.
        block_outer, block_inner: rows of a tile and of a step.
        steps: blocks that all tiles visit, over kv heads (and batch entries, where `tables` has several).
    """

    tables: Tensor
    tiles: Tensor
    rows: Tensor
    runs: Tensor
    index: Tensor
    facts: tuple[Tensor, Tensor, Tensor, Tensor]
    causal: int
    documents: bool
    segments: bool
    indexed: bool
    block_outer: int
    block_inner: int
    steps: int

    def to(self, device: torch.device) -> Walk:
        """The walk with its tensors on `device`."""
        moved = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        moved = {name: upload(x, device) for name, x in moved.items()}
        return replace(self, **moved, facts=tuple(upload(x, device) for x in self.facts))


@dataclass(frozen=True)
class Rule:
    """What a walk is planned for.

    Attributes:
        block_outer, block_inner: rows of a tile and of a step, powers of two.
        transposed: the outer rows are keys, the inner rows queries.
        causal: 0, 1 or 2, see `Walk`.
        indexed: see `Walk`.
    """

    block_outer: int
    block_inner: int
    transposed: bool = False
    causal: int = 0
    indexed: bool = False


def plan_rows(
    chains: Sequence[Chain],
    segment_shift: int,
    rows: np.ndarray,
    facts: Facts,
    *,
    causal: bool,
    block_outer: int,
    block_inner: int,
    transposed: bool = False,
    deduplicate: bool = True,
) -> Walk:
    """The walk of `rows` of the sequence, ascending, over themselves: row i of all tensors is `rows[i]`.

    Args:
        chains: the branches.
        segment_shift: added to a row's number in the sequence before it is cut into segments.
        rows: the rows at hand, int64.
        facts: of these rows; positions None: the row.
        causal: rows see no larger position.
        block_outer, block_inner, transposed: see `Rule`.
        deduplicate: visit every pair of a chain once, with a weight, or once for each branch that holds it.
    """
    s, unbroken = rows + segment_shift, len(rows) == 0 or rows[-1] - rows[0] + 1 == len(rows)
    if not causal:
        facts = facts._replace(positions=None)
    facts = compact(facts)
    offsets = np.array([o for chain in chains for o in chain.offsets], np.int64)
    kinds, kind_of_head = np.unique(offsets, axis=1, return_inverse=True)  # heads of equal offsets walk alike
    sorting = [_Sorting(s, chain, *facts.of(entry)) for entry in range(facts.entries) for chain in chains]
    rule = Rule(
        block_outer, block_inner, transposed, (1 if facts.positions is None else 2) if causal else 0,
        not unbroken or any(x.moves for x in sorting) or not all(_progressions(chain) for chain in chains),
    )  # fmt: skip
    builder = _Builder(rule, facts, facts)
    for entry in range(facts.entries):
        orders = sorting[entry * len(chains) : (entry + 1) * len(chains)]
        for kind in kinds.T:
            split = np.split(kind, np.cumsum([len(chain.branches) for chain in chains])[:-1])
            levels = [_Levels(s, *x) for x in zip(chains, split, orders, strict=True)]
            builder.add(_tiles_of(levels, rule, entry, deduplicate, unbroken))
    tables = np.arange(facts.entries)[:, None] * kinds.shape[1] + kind_of_head.reshape(1, -1)
    return builder.walk(tables)


def plan_lists(
    visits: Sequence[Sequence[Sequence[tuple[np.ndarray, np.ndarray]]]], outer: Facts, inner: Facts, rule: Rule
) -> Walk:
    """The walk of explicit lists: `visits[b][g]` are the pairs (outer rows, inner rows) of batch entry b and kv head g.

    A row may be in several visits: its pairs with an inner row of several of them count as often. Only rows that are in some
    visit are in a tile. `rule` is indexed.
    """
    assert rule.indexed
    outer, inner = compact(outer, inner)
    builder = _Builder(rule, outer, inner)
    for entry, heads in enumerate(visits):
        for pairs in heads:
            builder.add(_tiles_of_lists(pairs, rule, entry, outer, inner))
    return builder.walk(np.arange(len(visits) * len(visits[0])).reshape(len(visits), -1))


def compact(facts: Facts, other: Facts | None = None) -> Facts | tuple[Facts, Facts]:
    """The same order and equality in numbers of 32 bits; documents are numbered as they come. Of two sides in common, if given."""
    sides = [facts] if other is None else [facts, other]
    columns = []
    for name in ("positions", "documents"):
        arrays = [getattr(side, name) for side in sides]
        if any(x is None for x in arrays):
            columns.append([None] * len(sides))
            continue
        flat = np.concatenate([x.reshape(-1) for x in arrays])
        if name == "documents":
            values, first, inverse = np.unique(flat, return_index=True, return_inverse=True)
            number = np.empty(len(values), np.int64)
            number[np.argsort(first)] = np.arange(len(values))
            flat = np.where(flat == -1, -1, number[inverse])
        elif flat.size and (flat.max() >= ENDLESS or flat.min() <= -ENDLESS):
            flat = np.unique(flat, return_inverse=True)[1]
        cuts = np.cumsum([x.size for x in arrays])[:-1]
        columns.append([x.reshape(a.shape) for x, a in zip(np.split(flat, cuts), arrays, strict=True)])
    result = [Facts(*column) for column in zip(*columns, strict=True)]
    return result[0] if other is None else (result[0], result[1])


# ---- the rows of a chain


def _segment(s: np.ndarray, w: int | None) -> np.ndarray:
    return np.zeros_like(s) if w is None else s // w


def _progressions(chain: Chain) -> bool:
    """Whether the rows of every depth are few arithmetic progressions."""
    w, r = chain.branches[-1]
    rates = [rate for _, rate in chain.branches]
    steps = [b // a for a, b in itertools.pairwise(rates)]
    return (w is None or w % r == 0) and all(step <= FAMILIES + 1 for step in steps)


class _Sorting:
    """In which order rows are visited: by the innermost segments of a chain, then document, then position: so masks are few."""

    def __init__(self, s: np.ndarray, chain: Chain, positions: np.ndarray | None, documents: np.ndarray | None) -> None:
        keys = [np.arange(len(s))]
        keys += [] if positions is None else [positions]
        keys += [] if documents is None else [np.where(documents < 0, ENDLESS, documents)]
        self.moves = False
        if len(keys) > 1:
            self.order = np.lexsort([*keys, _segment(s, chain.branches[0][0])])
            self.moves = bool((self.order[1:] < self.order[:-1]).any())
        if not self.moves:
            self.order = keys[0]
        self.keys = keys


class _List(NamedTuple):
    """Inner rows that are visited together, and the step between them (0: none is the same)."""

    rows: np.ndarray
    rate: int


class _Levels:
    """The depths of all rows in one chain for one kind of heads, and the lists of rows by depth."""

    def __init__(self, s: np.ndarray, chain: Chain, offsets: np.ndarray, sorting: _Sorting) -> None:
        self.s, self.chain, self.sorting = s, chain, sorting
        self.depth = np.full(len(s), -1, np.int64)
        for (w, r), offset in zip(chain.branches, offsets, strict=True):
            self.depth += (s if w is None else s % w) % r == offset
        self.segments = [_segment(s, w) for w, _ in chain.branches]
        self.bounds = [_segment_bounds(s, w) for w, _ in chain.branches]
        self._lists: dict[tuple[int, bool, bool], list[_List]] = {}

    def lists(self, depth: int, deeper: bool, indexed: bool) -> list[_List]:
        """The rows of `depth`, or (`deeper`) of `depth` or more."""
        key = (depth, deeper, indexed)
        if key not in self._lists:
            order, rates = self.sorting.order, [r for _, r in self.chain.branches]
            chosen = self.depth[order] >= depth if deeper else self.depth[order] == depth
            rows = order[chosen]
            if indexed or not len(rows):
                self._lists[key] = [_List(rows, 0)]
            else:
                rate = rates[depth] if deeper else rates[depth + 1]
                residues = self.s[rows] % rate
                self._lists[key] = [_List(rows[residues == x], rate) for x in np.flatnonzero(np.bincount(residues))]
        return self._lists[key]


def _segment_bounds(s: np.ndarray, w: int | None) -> tuple[int, int]:
    """The segment length, and what to add to a row of the tensor before it is divided by it."""
    if w is None or not len(s) or s[0] // w == s[-1] // w:
        return ENDLESS, 0
    return w, int(s[0] % w)


# ---- tiles and what they visit


class _Group(NamedTuple):
    """Pieces `[start, stop)` of one list: which tile visits each, and whether its pairs must be compared by segment."""

    inner: _List
    tile: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    straddles: np.ndarray
    count: int
    segment: tuple[int, int]
    hole: tuple[int, int]


class _Table(NamedTuple):
    """The tiles of one batch entry and kind of heads."""

    entry: int
    rows: np.ndarray
    groups: list[_Group]


def _cut_into_tiles(rows: np.ndarray, groups: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """`rows` in tiles `[T, block]` that hold rows of one group each, and the first place of every tile in `rows`."""
    first = np.flatnonzero(np.r_[True, groups[1:] != groups[:-1]])
    sizes = np.diff(np.r_[first, len(rows)])
    within = np.arange(len(rows)) - np.repeat(first, sizes)
    starts = np.flatnonzero(within % block == 0)
    tiles = np.full((len(starts), block), -1, np.int64)
    tiles[np.cumsum(within % block == 0) - 1, within % block] = rows
    return tiles, starts


def _tiles_of(levels: list[_Levels], rule: Rule, entry: int, deduplicate: bool, unbroken: bool) -> _Table:
    count = len(levels[0].s)
    kind = np.zeros(count, np.int64)
    for level in levels:
        kind = kind * (len(level.chain.branches) + 1) + level.depth + 1
    tiles: list[np.ndarray] = []
    groups: list[_Group] = []
    before = 0
    for value in np.unique(kind):
        if value == 0:
            continue  # in no branch
        rows = np.flatnonzero(kind == value)
        depths = [int(level.depth[rows[0]]) for level in levels]
        segments = [level.segments[j] for level, c in zip(levels, depths, strict=True) for j in range(c + 1)]
        number = [1 + np.count_nonzero(np.diff(x[rows])) for x in segments]
        order = sorted(range(len(segments)), key=lambda i: -number[i])
        # Tiles end where segments do, of the shortest that hold half a tile; rows of several shorter ones are masked apart.
        # Of rows with gaps, which no mask can tell apart by their place in the tensor, tiles end where any segment does.
        long = (i for i in order if len(rows) >= rule.block_outer // 2 * number[i])
        inner, cut = segments[order[0]], segments[next(long, order[-1])]
        if not unbroken:
            cut = np.cumsum([0, *np.any([np.diff(x) != 0 for x in segments], axis=0)])
        rows = rows[np.lexsort([*(key[rows] for key in levels[0].sorting.keys), inner[rows], cut[rows]])]
        own, starts = _cut_into_tiles(rows, cut[rows], rule.block_outer)
        for level, depth in zip(levels, depths, strict=True):
            groups += _rings(level, depth, rows, starts, before, rule.indexed, deduplicate)
        tiles.append(own)
        before += len(own)
    return _Table(entry, np.concatenate(tiles) if tiles else np.empty((0, rule.block_outer), np.int64), groups)


def _rings(
    level: _Levels, depth: int, rows: np.ndarray, starts: np.ndarray, before: int, indexed: bool, deduplicate: bool
) -> Iterator[_Group]:
    """What tiles of `depth` visit: tile `before + i` holds the rows from `rows[starts[i]]` on."""
    tile = before + np.arange(len(starts))
    for j in range(depth + 1):
        lists = [(x, 1) for x in level.lists(j, True, indexed)]
        if deduplicate:
            lists = [(x, d - j + 1) for d in range(j, depth) for x in level.lists(d, False, indexed)]
            lists += [(x, depth - j + 1) for x in level.lists(depth, True, indexed)]
        low, high = (f.reduceat(level.segments[j][rows], starts) for f in (np.minimum, np.maximum))
        several = low != high
        if j > 0 and deduplicate:
            low_in, high_in = (f.reduceat(level.segments[j - 1][rows], starts) for f in (np.minimum, np.maximum))
            inside = low_in != high_in
        for inner, count in lists:
            segment = level.segments[j][inner.rows]
            start, stop = np.searchsorted(segment, low), np.searchsorted(segment, high, "right")
            if j == 0 or not deduplicate:
                yield _Group(inner, tile, start, stop, several, count, level.bounds[j], (0, 0))
                continue
            segment = level.segments[j - 1][inner.rows]
            hole, hole_stop = np.searchsorted(segment, low_in), np.searchsorted(segment, high_in, "right")
            yield _Group(
                inner, np.concatenate((tile, tile, tile[inside])), np.concatenate((start, hole_stop, hole[inside])),
                np.concatenate((hole, stop, hole_stop[inside])),
                np.concatenate((several, several, np.ones(inside.sum(), bool))), count, level.bounds[j], level.bounds[j - 1],
            )  # fmt: skip


def _tiles_of_lists(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]], rule: Rule, entry: int, outer: Facts, inner: Facts
) -> _Table:
    rows = np.unique(np.concatenate([np.empty(0, np.int64), *(x for x, _ in pairs)]))
    if not len(rows):
        return _Table(entry, np.empty((0, rule.block_outer), np.int64), [])
    member = np.zeros((len(rows), len(pairs)), bool)
    for i, (x, _) in enumerate(pairs):
        member[np.searchsorted(rows, x), i] = True
    patterns, kind = np.unique(member, axis=0, return_inverse=True)
    kind = kind.reshape(-1)
    order = np.lexsort([*_keys(rows, outer, entry), kind])
    tiles, starts = _cut_into_tiles(rows[order], kind[order], rule.block_outer)
    kind = kind[order][starts]
    groups = []
    for i, (_, x) in enumerate(pairs):
        tile = np.flatnonzero(patterns[kind, i])
        x = x[np.lexsort(_keys(x, inner, entry))]
        zero = np.zeros(len(tile), np.int64)
        groups.append(_Group(_List(x, 0), tile, zero, zero + len(x), zero > 0, 1, (ENDLESS, 0), (0, 0)))
    return _Table(entry, tiles, groups)


def _keys(rows: np.ndarray, facts: Facts, entry: int) -> list[np.ndarray]:
    positions, documents = facts.of(entry)
    keys = [rows]
    keys += [] if positions is None else [positions[rows]]
    keys += [] if documents is None else [np.where(documents[rows] < 0, ENDLESS, documents[rows])]
    return keys


# ---- blocks, runs and tables


@dataclass
class _Builder:
    """Puts the tables of one walk together."""

    rule: Rule
    outer: Facts
    inner: Facts
    tiles: list[np.ndarray] = field(default_factory=list)
    rows: list[np.ndarray] = field(default_factory=list)
    runs: list[np.ndarray] = field(default_factory=list)
    index: list[np.ndarray] = field(default_factory=list)
    straddles: bool = False
    places: int = 1
    num_runs: int = 0
    num_index: int = 0
    _at: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rows.append(np.full((1, self.rule.block_outer), -1, np.int64))

    def add(self, table: _Table) -> None:
        """One more table."""
        spans = _spans(table.rows, *self.outer.of(table.entry), bool(self.rule.causal))
        blocks = [self._blocks(group, number, table.entry, spans) for number, group in enumerate(table.groups)]
        found = np.concatenate([np.empty((0, 4 + RUN_WIDTH), np.int64), *blocks])
        found = found[np.lexsort((found[:, 1], found[:, 0]))]
        tile, masked, place = found[:, 0], found[:, 1], found[:, 3]
        runs, size = found[:, 4:], self.rule.block_inner
        # blocks that follow each other in a list become one run
        count = runs[:, ROW_COUNT]
        ahead = np.zeros(len(found), bool)
        columns = [0, 1, 2, *range(4 + ROW_SEGMENT, 4 + RUN_WIDTH)]
        same = (found[1:, columns] == found[:-1, columns]).all(1)
        ahead[1:] = same & (place[1:] == place[:-1] + count[:-1]) & (count[:-1] % size == 0)
        first = np.flatnonzero(~ahead)
        total = np.add.reduceat(count, first) if len(first) else count
        runs = runs[first]
        runs[:, ROW_COUNT] = total
        tile, masked = tile[first], masked[first]

        number, steps = len(table.rows), -(-total // size)
        full, partial = (np.bincount(tile, steps * (masked == m), number).astype(np.int64) for m in (0, 1))
        first_run = self.num_runs + np.searchsorted(tile, np.arange(number))
        tiles = np.stack((self.places + np.arange(number), first_run, full, partial), 1)
        self.tiles.append(tiles[np.argsort(-(full + partial), kind="stable")])
        self.rows.append(table.rows)
        self.runs.append(runs)
        self.places += number
        self.num_runs += len(runs)
        self._at.clear()

    def walk(self, tables: np.ndarray) -> Walk:
        """All tables; `tables [B or 1, Hkv]` says which one a batch entry and kv head reads."""
        longest = max(1, *(len(x) for x in self.tiles))
        tiles = np.zeros((len(self.tiles), longest, 4), np.int64)
        for i, x in enumerate(self.tiles):
            tiles[i, : len(x)] = x
        blank = np.zeros((READ_AHEAD, RUN_WIDTH), np.int64)
        blank[:, ROW_COUNT], blank[:, ROW_SEGMENT] = 1, ENDLESS
        blank[:, ROW_RATE] = TIMES + 1
        index = np.concatenate([*self.index, np.zeros(self.rule.block_inner, np.int64)])
        facts = [
            x if x is not None and needed else np.empty((1, 0))
            for side in (self.outer, self.inner)
            for x, needed in ((side.positions, self.rule.causal == 2), (side.documents, True))
        ]
        tensors = (tables, tiles, np.concatenate(self.rows), np.concatenate([*self.runs, blank]), index, *facts)
        assert all(not x.size or (x.max() <= ENDLESS and x.min() >= -ENDLESS - 1) for x in tensors)
        tables_, tiles_, rows, runs, index_, *rest = (torch.from_numpy(x.astype(np.int32)) for x in tensors)
        steps = tiles[:, :, 2:].sum((1, 2))[tables].sum()
        return Walk(
            tables_, tiles_, rows, runs, index_, tuple(rest), self.rule.causal, self.outer.documents is not None,
            self.straddles, self.rule.indexed, self.rule.block_outer, self.rule.block_inner, int(steps),
        )  # fmt: skip

    def _blocks(self, group: _Group, number: int, entry: int, spans: _Spans) -> np.ndarray:
        """The blocks of a group that are visited, `[n, 4 + 8]`: tile, whether masked, group, place in the list, run."""
        some = group.stop > group.start
        tile, start, stop, straddles = (x[some] for x in (group.tile, group.start, group.stop, group.straddles))
        if not len(tile):
            return np.empty((0, 4 + RUN_WIDTH), np.int64)
        size, inner = self.rule.block_inner, group.inner
        masked, count = straddles, stop - start
        if self.rule.causal or self.outer.documents is not None:
            pieces, which = np.unique(start * (len(inner.rows) + 1) + stop, return_inverse=True)
            piece_start, piece_stop = np.divmod(pieces, len(inner.rows) + 1)
            each = -(-(piece_stop - piece_start) // size)
            of_piece = np.repeat(np.arange(len(pieces)), each)
            base = np.cumsum(each) - each
            block_start = piece_start[of_piece] + (np.arange(each.sum()) - base[of_piece]) * size
            block_stop = np.minimum(block_start + size, piece_stop[of_piece])
            which = which.reshape(-1)
            times = each[which]
            block = np.repeat(base[which] - (np.cumsum(times) - times), times) + np.arange(times.sum())
            tile, straddles = np.repeat(tile, times), np.repeat(straddles, times)
            full, empty = self._decide(entry, spans, tile, inner.rows, block_start, block_stop, block)
            start, count = block_start[block], (block_stop - block_start)[block]
            keep = ~empty
            tile, start, count, straddles, full = (x[keep] for x in (tile, start, count, straddles, full))
            masked = straddles | ~full | (count < size)
        else:  # whole blocks, and what is left over of a list
            whole = count // size * size
            left = ~straddles & (count > whole)
            some = ~straddles & (whole > 0)
            tile = np.concatenate((tile[straddles], tile[some], tile[left]))
            masked = np.concatenate((straddles[straddles], straddles[some], left[left]))
            start_left, count_left = (start + whole)[left], (count - whole)[left]
            start = np.concatenate((start[straddles], start[some], start_left))
            count = np.concatenate((count[straddles], whole[some], count_left))
            straddles = np.concatenate((straddles[straddles], np.zeros(len(tile) - straddles.sum(), bool)))
        self.straddles |= bool(straddles.any())
        found = np.zeros((len(tile), 4 + RUN_WIDTH), np.int64)
        found[:, 0], found[:, 1], found[:, 2], found[:, 3] = tile, masked, number, start
        runs = found[:, 4:]
        runs[:, ROW_FIRST] = start + self._place(inner) if self.rule.indexed else inner.rows[start]
        rate = 1 if self.rule.indexed else inner.rate
        runs[:, ROW_RATE], runs[:, ROW_COUNT] = rate * TIMES + group.count, count
        runs[:, ROW_SEGMENT : ROW_SEGMENT + 2] = np.where(straddles[:, None], group.segment, (ENDLESS, 0))
        runs[:, ROW_HOLE : ROW_HOLE + 2] = np.where(straddles[:, None], group.hole, (0, 0))
        return found

    def _place(self, inner: _List) -> int:
        """Where a list begins in `index`; put there the first time. The lists of a table live as long as it does."""
        if id(inner.rows) not in self._at:
            self._at[id(inner.rows)] = self.num_index
            self.index.append(inner.rows)
            self.num_index += len(inner.rows)
        return self._at[id(inner.rows)]

    def _decide(
        self, entry: int, tiles: _Spans, tile: np.ndarray, rows: np.ndarray, start: np.ndarray, stop: np.ndarray,
        block: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        """Of every visit of `tile[i]` to block `[start, stop)[block[i]]` of `rows`: all pairs count; none does."""
        full, empty = np.ones(len(tile), bool), np.zeros(len(tile), bool)
        positions, documents = self.inner.of(entry)
        if tiles.positions is not None:
            (low, high), (low_in, high_in) = (
                tiles.positions,
                _block_extremes(rows if positions is None else positions[rows], start, stop),
            )
            low, high, low_in, high_in = low[tile], high[tile], low_in[block], high_in[block]
            if self.rule.transposed:
                low, high, low_in, high_in = low_in, high_in, low, high
            full &= high_in <= low
            empty |= low_in > high
        if tiles.documents is not None and documents is not None:
            (low, high), (low_in, high_in) = tiles.documents, _block_extremes(documents[rows], start, stop)
            low, high, low_in, high_in = low[tile], high[tile], low_in[block], high_in[block]
            full &= (low == high) & (low_in == high_in) & (low == low_in) & (low >= 0)
            empty |= (low > high_in) | (high < low_in) | (high < 0) | (high_in < 0)
        return full, empty


class _Spans(NamedTuple):
    """Smallest and largest position and document of every tile, where they hide pairs."""

    positions: tuple[np.ndarray, np.ndarray] | None
    documents: tuple[np.ndarray, np.ndarray] | None


def _spans(tiles: np.ndarray, positions: np.ndarray | None, documents: np.ndarray | None, causal: bool) -> _Spans:
    """Those of tiles of rows, -1 where there is none; without `positions` a row is its position."""
    there, rows = tiles >= 0, np.maximum(tiles, 0)

    def extremes(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.where(there, values, ENDLESS).min(1), np.where(there, values, -ENDLESS).max(1)

    return _Spans(
        extremes(rows if positions is None else positions[rows]) if causal else None,
        None if documents is None else extremes(documents[rows]),
    )


def _block_extremes(values: np.ndarray, start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest of every `values[start:stop]`, none of them empty."""
    values = np.append(values, 0)  # so that a stop may be the end
    ends = np.stack((start, stop), 1).reshape(-1)
    return np.minimum.reduceat(values, ends)[::2], np.maximum.reduceat(values, ends)[::2]
