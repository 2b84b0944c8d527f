# SPDX-License-Identifier: Apache-2.0
"""Nesting: chains of branches, each within the one before, and the depth of a row in a chain.

Branches `(w, r)` of a *chain* are nested: each branch's rows and segments lie within those of the one before. A row then has a
*depth* in the chain: it is in branches `0 .. depth` and in no others (-1: in none). The pairs of a chain are visited shell by
shell: *shell* `j` is a row's segment of branch `j` without its segment of branch `j - 1`. A pair held by several branches is
visited once, in the innermost of them, where it counts `min(c, d) - j + 1` times for rows of depths `c` and `d`: its
*multiplicity*.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ring_hilbert.ops.pattern import Branch, DilatedPattern


@dataclass(frozen=True)
class Chain:
    """Nested branches, and `offsets[i][g]` of branch i and kv head g."""

    branches: tuple[Branch, ...]
    offsets: tuple[tuple[int, ...], ...]

    def holds(self, branch: Branch, offsets: Sequence[int]) -> bool:
        """Whether `branch` may follow the last one: `r_i | r`, `w_i | w`, `r_i | w_i`, and the offsets agree."""
        (w_in, r_in), (w, r) = self.branches[-1], branch
        return (
            r % r_in == 0
            and (w is None or (w_in is not None and w % w_in == 0))
            and (w_in is None or w_in % r_in == 0)
            and all(o % r_in == o_in for o, o_in in zip(offsets, self.offsets[-1], strict=True))
        )

    @property
    def unbroken(self) -> bool:
        """Whether the rows of every branch keep their stride from one segment into the next."""
        return all(w is None or w % r == 0 for w, r in self.branches)

    def progressions(self, most: int) -> bool:
        """Whether the rows of every depth form at most `most` arithmetic progressions."""
        steps = [b // a for (_, a), (_, b) in itertools.pairwise(self.branches)]
        return self.unbroken and all(step <= most + 1 for step in steps)


def chains(pattern: DilatedPattern, num_kv_heads: int) -> list[Chain]:
    """The branches of `pattern` in few chains; in one if all are nested."""
    result: list[Chain] = []
    for branch in sorted(
        pattern.branches, key=lambda branch: (branch.segment_length or math.inf, branch.dilation_rate)
    ):
        own = tuple(pattern.offset(branch, head, num_kv_heads) for head in range(num_kv_heads))
        for at, chain in enumerate(result):
            if chain.holds(branch, own):
                result[at] = Chain((*chain.branches, branch), (*chain.offsets, own))
                break
        else:
            result.append(Chain((branch,), (own,)))
    return result


def nested(pattern: DilatedPattern) -> tuple[Branch, ...] | None:
    """The branches from innermost to outermost if they form one chain for any heads (rule "modulo"), else None."""
    if pattern.offset_rule != "modulo":
        return None
    found = chains(pattern, 1)
    return found[0].branches if len(found) == 1 else None
