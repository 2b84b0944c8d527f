# SPDX-License-Identifier: Apache-2.0
"""Layouts: which rows of the whole sequence each rank of a group owns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ring_hilbert.ops.order import TokenOrder
from ring_hilbert.ops.visits import Chunk
from ring_hilbert.parallel.arguments import check_choices


@dataclass(frozen=True)
class Layout:
    """Which rank owns which rows.

    "contiguous": group rank `p` owns rows `[sum L_<p, + L_p)`; lengths may differ and may be 0. "zigzag": the sequence is cut
    into `2P` equal chunks, and rank `p` owns chunk `p` and then chunk `2P - 1 - p`, which balances causal attention.

    Args:
        lengths: rows of each rank, `L_0 ... L_{P-1}`.
        kind: "contiguous" or "zigzag".

    Raises:
        ValueError: for another kind, or zigzag lengths that differ or are odd.
    """

    lengths: tuple[int, ...]
    kind: str = "contiguous"

    def __post_init__(self) -> None:
        check_choices(layout=self.kind)
        if self.kind == "zigzag" and (len(set(self.lengths)) > 1 or self.lengths[0] % 2):
            raise ValueError(
                f"layout='zigzag' cuts the sequence into 2 x {self.world_size} equal chunks, but its {self.seq_len} rows "
                f"over {self.world_size} ranks ({_listed(self.lengths)}) do not divide evenly; pad the sequence to a multiple of "
                f"{2 * self.world_size} rows (document id -1), or use layout='contiguous'"
            )

    @classmethod
    def even(cls, seq_len: int, world_size: int, kind: str = "contiguous") -> Layout:
        """The default lengths: the first `seq_len % world_size` ranks own one extra row."""
        base, extra = divmod(seq_len, world_size)
        return cls(tuple(base + (p < extra) for p in range(world_size)), kind)

    @classmethod
    def of(cls, seq_len: int, world_size: int, kind: str, local_lengths: Sequence[int] | None) -> Layout:
        """The layout of these `local_lengths`, by default even.

        Raises:
            ValueError: unless there is a length for every rank and their sum is `seq_len`.
        """
        if local_lengths is None:
            return cls.even(seq_len, world_size, kind)
        lengths = tuple(local_lengths)
        if len(lengths) != world_size or sum(lengths) != seq_len or min(lengths) < 0:
            raise ValueError(
                f"local_lengths={list(lengths)} must be {world_size} lengths >= 0 with sum {seq_len}, got sum {sum(lengths)}"
            )
        return cls(lengths, kind)

    @property
    def world_size(self) -> int:
        """Number of ranks, P."""
        return len(self.lengths)

    @cached_property
    def seq_len(self) -> int:
        """Rows of the whole sequence, S."""
        return sum(self.lengths)

    @cached_property
    def cuts(self) -> np.ndarray:
        """Where chunks begin, ascending, and the sequence length as the last entry: int64 `[chunks + 1]`."""
        sizes = self.lengths if self.kind == "contiguous" else [n // 2 for n in (*self.lengths, *self.lengths)]
        return np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))

    @cached_property
    def owners(self) -> np.ndarray:
        """The rank that owns each chunk, int64 `[chunks]`."""
        ranks = np.arange(self.world_size)
        return ranks if self.kind == "contiguous" else np.concatenate((ranks, ranks[::-1]))

    def chunks(self, rank: int) -> tuple[Chunk, ...]:
        """The runs of rows that `rank` owns, in the order of its local rows, which is ascending."""
        numbers = [rank] if self.kind == "contiguous" else [rank, 2 * self.world_size - 1 - rank]
        runs: list[Chunk] = []
        for start, stop in ((int(self.cuts[i]), int(self.cuts[i + 1])) for i in numbers):
            if runs and runs[-1].stop == start:
                runs[-1] = runs[-1]._replace(stop=stop)
            elif stop > start:
                runs.append(Chunk(start, stop, sum(c.stop - c.start for c in runs)))
        return tuple(runs)

    def rows(self, rank: int) -> np.ndarray:
        """The rows that `rank` owns, int64 `[L_rank]`, ascending."""
        runs = [np.arange(chunk.start, chunk.stop) for chunk in self.chunks(rank)]
        return np.concatenate(runs) if runs else np.empty(0, np.int64)

    def cut(self, rank: int, whole: Tensor) -> Tensor:
        """The rows of `rank` from the whole sequence `[B, S]`, `[B, L_rank]`: a view if they are contiguous."""
        parts = [whole[:, chunk.start : chunk.stop] for chunk in self.chunks(rank)]
        return parts[0] if len(parts) == 1 else torch.cat([whole[:, :0], *parts], dim=1)

    def tokens(self, rank: int, order: TokenOrder) -> Tensor:
        """The token of every row of `rank` in a sequence without padding in `order`: int64 `[L_rank]`."""
        pieces = [order.permutation(self.seq_len, chunk.start, chunk.stop) for chunk in self.chunks(rank)]
        return torch.cat([torch.empty(0, dtype=torch.int64), *pieces])

    def assemble(self, pieces: Sequence[Tensor]) -> Tensor:
        """The whole sequence `[..., S]` from every rank's `[..., L_p]`."""
        parts = list[tuple[int, Tensor]]()
        for rank, piece in enumerate(pieces):
            for chunk in self.chunks(rank):
                parts.append((chunk.start, piece[..., chunk.local : chunk.local + chunk.stop - chunk.start]))
        return torch.cat([pieces[0][..., :0], *(part for _, part in sorted(parts, key=lambda part: part[0]))], dim=-1)


def _listed(lengths: tuple[int, ...]) -> str:
    return ", ".join(map(str, lengths[:8])) + (", ..." if len(lengths) > 8 else "")
