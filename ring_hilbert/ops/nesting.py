# SPDX-License-Identifier: Apache-2.0
"""Nesting: chains of branches, each within the one before, and the depth of a row in a chain.

Branches `(w, r)` of a *chain* are nested: each branch's rows and segments lie within those of the one before. A row then has a
*depth* in the chain: it is in branches `0 .. depth` and in no others (-1: in none). The pairs of a chain are visited shell by
shell: *shell* `j` is a row's segment of branch `j` without its segment of branch `j - 1`. A pair held by several branches is
visited once, in the innermost of them, where for rows of depths `c` and `d` it counts as often as branches `j .. min(c, d)` weigh
together, or, counted once, as branch `j` weighs: its *multiplicity*.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from ring_hilbert.ops.pattern import Branch, DilatedPattern


@dataclass(frozen=True)
class Chain:
    """Nested branches, `offsets[i][g]` of branch i and kv head g, `weights[i]`; `once`: the innermost alone counts a pair."""

    branches: tuple[Branch, ...]
    offsets: tuple[tuple[int, ...], ...]
    weights: tuple[int, ...]
    once: bool

    def holds(self, branch: Branch, offsets: Sequence[int]) -> bool:
        """Whether `branch` may follow the last one: it extends that, and the offsets agree."""
        last = self.branches[-1]
        agree = all(o % last.dilation_rate == o_in for o, o_in in zip(offsets, self.offsets[-1], strict=True))
        return branch.extends(last) and agree

    def multiplicity(self, shell: int, depth: int) -> int:
        """How often a pair of shell `shell` counts, the smaller of its rows' depths being `depth`."""
        return self.weights[shell] if self.once else sum(self.weights[shell : depth + 1])

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
    for branch in pattern.from_innermost:
        own = tuple(pattern.offset(branch, head, num_kv_heads) for head in range(num_kv_heads))
        weight = pattern.weight(branch)
        for at, chain in enumerate(result):
            if chain.holds(branch, own):
                joined = (*chain.branches, branch), (*chain.offsets, own), (*chain.weights, weight)
                result[at] = Chain(*joined, chain.once)
                break
        else:
            result.append(Chain((branch,), (own,), (weight,), pattern.count == "once"))
    return result


def nested(pattern: DilatedPattern) -> tuple[Branch, ...] | None:
    """The branches from innermost to outermost if they form one chain for any heads (rule "modulo"), else None."""
    if pattern.offset_rule != "modulo":
        return None
    found = chains(pattern, 1)
    return found[0].branches if len(found) == 1 else None
