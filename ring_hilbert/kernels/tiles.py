# SPDX-License-Identifier: Apache-2.0
"""The kernels' tile sizes: a table, written by hand or by an offline tuner. Nothing is tuned while a model trains."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import Literal, NamedTuple, get_args

import torch

from ring_hilbert.kernels.tables import CHUNK, Walk

Pass = Literal["forward", "dq", "dkdv"]
PASSES: tuple[Pass, ...] = get_args(Pass)


class Tile(NamedTuple):
    """Rows of a tile (queries in forward and dQ, keys in dK and dV), rows of a step, warps, pipeline stages.

    `registers`: limit per thread, where a few more would reduce the tiles resident at once; 0: no limit.
    `gluon`: use the kernels for compute capability 9.0, whose pipeline length is fixed; `warps` are per head, and `registers`
    for two heads (of a single one, shared memory limits the tiles resident). `specialized`: forward with warps of their own for
    copies, for two heads together.
    """

    block_outer: int
    block_inner: int
    warps: int
    stages: int
    registers: int = 0
    gluon: bool = False
    specialized: bool = False

    @property
    def chunk(self) -> int:
        """Rows whose extremes are taken together when a schedule is made: fewer for smaller steps."""
        return min(CHUNK, self.block_inner)


# (least compute capability, largest padded head dim, bytes of an element): tiles of forward, dQ, dK and dV. A pass may have up
# to four, for walks of increasing register demand (`demand`). The first row that fits a call is used, so rows go from the
# newest generation to the oldest. `ring-hilbert bench kernels --tune` and `--aot` measure what a change is worth.
TILES: dict[tuple[int, int, int], tuple[tuple[Tile, ...], tuple[Tile, ...], tuple[Tile, ...]]] = {
    (100, 64, 2): (
        (*(Tile(128, 64, 8, 3),) * 2, Tile(128, 32, 8, 3)),
        (Tile(64, 64, 4, 2), Tile(128, 32, 8, 2), Tile(128, 32, 8, 3)),
        (Tile(64, 64, 4, 2), Tile(64, 16, 4, 2)),
    ),
    (100, 128, 2): (
        (*(Tile(128, 64, 8, 3),) * 2, Tile(128, 32, 8, 3)),
        (Tile(64, 64, 4, 2), Tile(64, 64, 8, 2), Tile(64, 64, 4, 2), Tile(64, 32, 4, 2)),
        (Tile(64, 32, 8, 2),),
    ),
    (90, 64, 2): (
        (*(Tile(64, 64, 4, 3, 168),) * 2, Tile(64, 64, 4, 3), Tile(64, 32, 4, 3)),
        (*(Tile(64, 64, 4, 3, 168),) * 2, Tile(64, 64, 4, 3), Tile(64, 32, 4, 3)),
        (*(Tile(64, 32, 4, 3),) * 3, Tile(64, 16, 4, 3)),
    ),
    (90, 128, 2): (
        (Tile(128, 128, 8, 3), *(Tile(128, 64, 8, 3),) * 2, Tile(128, 32, 8, 2)),
        (*(Tile(128, 64, 8, 3),) * 2, Tile(128, 32, 8, 3)),
        (Tile(128, 32, 8, 2), *(Tile(128, 16, 8, 3),) * 2, Tile(64, 16, 8, 3)),
    ),
    (90, 256, 2): ((Tile(64, 64, 4, 2),), (Tile(64, 32, 8, 1),), (Tile(32, 32, 4, 1),)),
    (0, 64, 2): (
        (*(Tile(128, 64, 8, 3),) * 3, Tile(128, 32, 8, 2)),
        (Tile(64, 64, 4, 3), *(Tile(64, 32, 4, 2),) * 2, Tile(64, 16, 4, 2)),
        (Tile(64, 32, 4, 2), Tile(64, 16, 4, 2)),
    ),
    (0, 128, 2): ((Tile(64, 64, 4, 2), Tile(64, 32, 4, 2)), (Tile(64, 64, 4, 2), Tile(64, 32, 4, 2)), (Tile(64, 32, 8, 2),)),
    (0, 256, 2): ((Tile(64, 32, 4, 1),), (Tile(64, 32, 8, 1),), (Tile(32, 32, 4, 1),)),
    (0, 64, 4): ((Tile(64, 32, 4, 2),), (Tile(64, 32, 4, 1),), (Tile(32, 32, 4, 1),)),
    (0, 128, 4): ((Tile(32, 32, 4, 1),), (Tile(32, 32, 4, 1),), (Tile(32, 32, 4, 1),)),
    (0, 256, 4): ((Tile(16, 16, 4, 1),), (Tile(16, 16, 4, 1),), (Tile(16, 16, 4, 1),)),
}  # fmt: skip
# For compute capability 9.0, by the largest head dim, from 24 on: tiles of forward, dQ, dK and dV; of two, the second is for
# rows in a list. They replace those above for walks whose masks do not compare segments.
# One is kept because it is faster, although the assembler makes dQ's matrix products of heads of 64 wait for one another; dK and
# dV of heads of 128 spilled up to 24 bytes when they were timed. Backward of the 1B ladder, with them on an H200 and with tiles
# free of both on an H100: 23.3 and 25.4 ms with heads of 64, 24.1 and 27.2 with heads of 128; forward took 9.3 and 9.5, 8.9 and
# 9.0 there.
# Backward of slides with heads of 24 took 15.9 ms with dQ in steps of 64 keys and dK and dV without a limit, each of which costs 5
# to 10 percent, although the limit too makes products wait for one another (H200).
# Of dK and dV of heads of 128, 64 and 128 rows took 15.0 and 14.0 ms in curve order, 7.9 and 9.1 on the raster x2 ladder (H100).
_SMALL = Tile(64, 64, 4, 4, gluon=True)
_LIMITED = _SMALL._replace(registers=128)
HOPPER: dict[int, tuple[tuple[Tile, ...], tuple[Tile, ...], tuple[Tile, ...]]] = {
    32: ((_LIMITED,), (Tile(64, 32, 4, 4, gluon=True),), (_SMALL._replace(registers=168),)),
    64: ((_LIMITED,), (_LIMITED,), (_SMALL,)),
    96: ((_SMALL,), (_SMALL,), (Tile(64, 32, 4, 4, gluon=True),)),
    128: (
        (Tile(128, 64, 8, 4, gluon=True),),
        (_SMALL,),
        (Tile(64, 32, 4, 4, gluon=True), Tile(128, 64, 8, 4, gluon=True)),
    ),
}
# Forward's, if kv heads have an even number of query heads. If not, a multiprocessor has room for 8 warps of one head: `_SMALL`, of
# which shared memory admits four, takes 1.19 to 1.30 times as long, the tiles above 1.13 to 1.33 times (x2 and 1B ladder, 2**17 and
# 2**20 rows, H200).
PAIRED = {128: Tile(64, 128, 4, 2, gluon=True, specialized=True)}
INTERPRETER = Tile(32, 32, 1, 1)  # wherever there is no GPU


@lru_cache
def has_gluon() -> bool:
    """Whether this Triton has Gluon, in which the kernels for compute capability 9.0 are written."""
    try:
        return find_spec("triton.experimental.gluon") is not None
    except ModuleNotFoundError:
        return False


def padded_head_dim(head_dim: int) -> int:
    """The least power of two, at least 16, that holds `head_dim` columns."""
    return max(16, 1 << (head_dim - 1).bit_length())


def demand(walk: Walk) -> int:
    """How many extra registers a walk's rows and masks take: level 0, 1, 2 or 3, found by compiling."""
    return 2 * walk.segments + walk.indexed


@lru_cache(maxsize=256)
def tiles_for(pass_: Pass, capability: int, head_dim: int, dtype: torch.dtype, group: int = 1) -> tuple[Tile, ...]:
    """The tiles, by demand, of a pass at a compute capability (90: 9.0); ValueError if the table has none.

    `group`: query heads per kv head.
    """
    for (least, dim, size), passes in TILES.items():
        if capability >= least and padded_head_dim(head_dim) <= dim and dtype.itemsize == size:
            tiles = passes[PASSES.index(pass_)]
            kind = next((most for most in HOPPER if 16 < head_dim <= most), None) if size == 2 and has_gluon() else None
            if capability // 10 == 9 and kind is not None:
                own = HOPPER[kind][PASSES.index(pass_)]
                if pass_ == "forward" and group % 2 == 0 and kind in PAIRED:
                    own = (PAIRED[kind],)
                return own[0], own[-1], *tiles[2:]
            return tiles
    raise ValueError(
        f"the Triton kernels have no tiles for head dim {head_dim} in {dtype}; at most 256, fp16, bf16 or fp32"
    )


def device_tiles(
    pass_: Pass, head_dim: int, dtype: torch.dtype, device: torch.device, group: int = 1
) -> tuple[Tile, ...]:
    """The tiles for a device."""
    if device.type != "cuda":
        return (INTERPRETER,)
    major, minor = torch.cuda.get_device_capability(device)
    return tiles_for(pass_, 10 * major + minor, head_dim, dtype, group)


def plan_tile(tiles: tuple[Tile, ...], plan: Callable[[Tile], Walk]) -> tuple[Tile, Walk]:
    """The tile of a walk, and the walk that `plan` makes for it.

    Raises:
        ValueError: for a Gluon tile if some tiles of the walk lie in several segments.
    """
    tile, walk = tiles[0], plan(tiles[0])
    level = demand(walk)
    while tile != tiles[min(level, len(tiles) - 1)]:
        tile = tiles[min(level, len(tiles) - 1)]
        walk = plan(tile)
        level = max(level, demand(walk))  # larger tiles may lie in several segments where smaller ones do not
    if tile.gluon and walk.segments:
        raise ValueError(
            f"tiles={tile}: some tiles of {tile.block_outer} rows lie in several segments, which the masks of Gluon kernels do "
            "not compare; use fewer rows (block_outer), or gluon=False"
        )
    return tile, walk
