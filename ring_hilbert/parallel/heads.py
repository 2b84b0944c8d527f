# SPDX-License-Identifier: Apache-2.0
"""Which heads each rank computes where heads are exchanged for rows (DeepSpeed Ulysses, arXiv 2309.14509)."""

from __future__ import annotations

from typing import NamedTuple


class HeadShare(NamedTuple):
    """The query heads and the kv heads of one rank; every query head's own kv head is among these."""

    heads: range
    kv_heads: range


def head_shares(num_heads: int, num_kv_heads: int, world_size: int) -> tuple[HeadShare, ...]:
    """A share for every rank: whole groups of a kv head and its query heads, or, where these are fewer, a part of one group.

    Shares may be uneven; kv heads are replicated only where there are fewer of them than ranks.

    Raises:
        ValueError: for more ranks than query heads.
    """
    if world_size > num_heads:
        raise ValueError(
            f"strategy='ulysses' gives every rank some of the heads, but {world_size} ranks are more than the {num_heads} "
            "heads of q; use 'exchange' or 'ring', or fewer ranks"
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
    """`whole` in `parts` runs, the first ones one longer if need be."""
    base, extra = divmod(len(whole), parts)
    sizes = [base + (i < extra) for i in range(parts)]
    return [whole[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(parts)]
