# SPDX-License-Identifier: Apache-2.0
"""Which heads each rank computes when heads are exchanged for rows (DeepSpeed Ulysses, arXiv 2309.14509)."""

from __future__ import annotations

from typing import NamedTuple


class HeadShare(NamedTuple):
    """The query heads and kv heads of one rank; the kv head of each query head is included."""

    heads: range
    kv_heads: range


def head_shares(num_heads: int, num_kv_heads: int, world_size: int) -> tuple[HeadShare, ...]:
    """A share for every rank: whole groups (a kv head and its query heads), or part of one if there are fewer groups than ranks.

    Shares may be uneven; kv heads are replicated only where there are fewer of them than ranks.

    Raises:
        ValueError: for more ranks than query heads.
    """
    if world_size > num_heads:
        raise ValueError(
            f"strategy='ulysses' gives every rank some of the heads, but there are {world_size} ranks and only {num_heads} "
            "heads of q; use strategy 'exchange' or 'ring', or fewer ranks"
        )
    group = num_heads // num_kv_heads
    if world_size <= num_kv_heads:
        kv_shares = _cut(range(num_kv_heads), world_size)
        return tuple(HeadShare(range(kv.start * group, kv.stop * group), kv) for kv in kv_shares)
    shares = []
    for kv_head, ranks in enumerate(_cut(range(world_size), num_kv_heads)):
        heads = range(kv_head * group, (kv_head + 1) * group)
        shares += [HeadShare(part, range(kv_head, kv_head + 1)) for part in _cut(heads, len(ranks))]
    return tuple(shares)


def _cut(whole: range, parts: int) -> list[range]:
    """`whole` cut into `parts` ranges, the first ones longer by one if it does not divide evenly."""
    base, extra = divmod(len(whole), parts)
    sizes = [base + (i < extra) for i in range(parts)]
    return [whole[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(parts)]
