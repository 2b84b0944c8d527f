# SPDX-License-Identifier: Apache-2.0
"""Layouts: which rows of the whole sequence each rank of a group owns."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from ring_hilbert.ops.visits import Chunk


@dataclass(frozen=True)
class Layout:
    """The contiguous layout: group rank `p` owns rows `[sum L_<p, + L_p)`; lengths may differ and may be 0.

    Args:
        lengths: rows of each rank, `L_0 ... L_{P-1}`.
        kind: only "contiguous"; anything else is a ValueError.
    """

    lengths: tuple[int, ...]
    kind: str = "contiguous"

    def __post_init__(self) -> None:
        check_layout(self.kind)

    @classmethod
    def even(cls, seq_len: int, world_size: int, kind: str = "contiguous") -> Layout:
        """The default lengths: the first `seq_len % world_size` ranks own one row more."""
        base, extra = divmod(seq_len, world_size)
        return cls(tuple(base + (p < extra) for p in range(world_size)), kind)

    @property
    def world_size(self) -> int:
        """Number of ranks, P."""
        return len(self.lengths)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First row of each rank, and the sequence length as the last entry."""
        return tuple(accumulate(self.lengths, initial=0))

    @property
    def seq_len(self) -> int:
        """Rows of the whole sequence, S."""
        return self.starts[-1]

    def chunks(self, rank: int) -> tuple[Chunk, ...]:
        """The runs of rows that `rank` owns, in the order of its local rows."""
        start, stop = self.starts[rank], self.starts[rank + 1]
        return (Chunk(start, stop, 0),) if stop > start else ()

    def owners(self, start: int, stop: int) -> Iterator[tuple[int, Chunk]]:
        """The ranks that own a row of `[start, stop)`, with the chunk that holds it."""
        rank = max(bisect_right(self.starts, start) - 1, 0)
        while rank < self.world_size and self.starts[rank] < stop:
            for chunk in self.chunks(rank):
                yield rank, chunk
            rank += 1


def check_layout(kind: str) -> None:
    """Raise ValueError unless `kind` is a layout this version has."""
    if kind != "contiguous":
        raise ValueError(f"layout={kind!r} is not supported; use 'contiguous'")
