# SPDX-License-Identifier: Apache-2.0
"""Shares of heads: each once, with the kv head it reads, and as even as they can be."""

from __future__ import annotations

import pytest

from ring_hilbert.parallel.heads import head_shares


@pytest.mark.parametrize("kv_heads", range(1, 7))
@pytest.mark.parametrize("group", range(1, 6))
def test_every_head_has_one_rank_and_its_kv_head_there(kv_heads: int, group: int):
    heads = kv_heads * group
    for world in range(1, heads + 1):
        shares = head_shares(heads, kv_heads, world)
        assert len(shares) == world and [h for share in shares for h in share.heads] == [*range(heads)]
        for share in shares:
            assert share.heads and [*share.kv_heads] == sorted({h // group for h in share.heads})
        held = [sum(kv in share.kv_heads for share in shares) for kv in range(kv_heads)]
        if world <= kv_heads:
            assert set(held) == {1} and _spread([len(share.kv_heads) for share in shares]) <= 1
        else:
            assert _spread(held) <= 1
            for kv in range(kv_heads):
                assert _spread([len(share.heads) for share in shares if kv in share.kv_heads]) <= 1
    with pytest.raises(
        ValueError, match=f"{heads + 1} ranks and only {heads} heads of q; use strategy 'exchange' or 'ring'"
    ):
        head_shares(heads, kv_heads, heads + 1)


def _spread(counts: list[int]) -> int:
    return max(counts) - min(counts)
