# SPDX-License-Identifier: Apache-2.0
"""The dilated pattern: which rows of which head belong to which branch."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

from torch import Tensor

OffsetRule = Literal["modulo", "block"]
Count = Literal["per_branch", "once"]

MOST_WEIGHT = 1 << 15  # of all branches together: kernels hold a pair's weight times an exponential in half precision


class Branch(NamedTuple):
    """One branch: rows are cut into segments of `segment_length` and every `dilation_rate`-th row is kept.

    `segment_length` is None for one segment over the whole sequence.
    """

    segment_length: int | None
    dilation_rate: int

    def extends(self, inner: Branch) -> bool:
        """Whether `inner` lies within it where their offsets agree: `r_in | r`, `w_in | w`, `r_in | w_in`."""
        (w_in, r_in), (w, r) = inner, self
        return (
            r % r_in == 0 and (w is None or (w_in is not None and w % w_in == 0)) and (w_in is None or w_in % r_in == 0)
        )


class Heads(NamedTuple):
    """The kv heads `start, start + step, ...` below `stop`: the heads of one offset."""

    start: int
    stop: int
    step: int

    @property
    def indices(self) -> range:
        """The heads."""
        return range(self.start, self.stop, self.step)

    @property
    def slice(self) -> slice:
        """The heads as an index of a tensor axis."""
        return slice(self.start, self.stop, self.step)


class Residue(NamedTuple):
    """All kv heads that share one offset within a branch."""

    offset: int
    heads: Heads


@dataclass(frozen=True)
class DilatedPattern:
    """Branches of segment lengths `w` and dilation rates `r` (LongNet, arXiv 2307.02486, section 2.2).

    Row `s` is in branch `i` for kv head `g` iff `((s + segment_shift) mod w_i) mod r_i == offset_i(g)`, where the offset is
    `(g + head_shift) mod r_i` (rule "modulo", the paper's) or `g // ceil(num_kv_heads / r_i)` (rule "block", the authors'
    released code). No divisibility is required. Duplicate branches count twice; their order is irrelevant.

    A (query, key) pair counts as often as branches hold it, each as often as its weight says; or, counted `once`, with the weight
    of the innermost branch that holds it.

    Args:
        segment_lengths: `w_i >= 1` in rows, or None for one segment over the whole sequence.
        dilation_rates: `r_i` with `1 <= r_i <= w_i`, as many as there are segment lengths.
        offset_rule: "modulo" or "block".
        head_shift: added to the head index of the modulo rule; a different value per layer rotates the residues.
        segment_shift: added to the row index before cutting into segments; moves the boundaries.
        heads: `(first, total)` for a pattern of some heads only (see `for_heads`): kv head `g` here is head `first + g` of
            `total`. None: all heads.
        zero_keys: reproduce torchscale's LongNet: keys of score 0 and value 0 fill segments up, as its padding does. With
            `w' = min(w, S)`, every segment has `ceil(w' / r)` keys in every branch and head: its rows at the offset, the rest
            zeros. Under causality the zeros come after all rows, and no query sees them.
        weights: how often a pair counts for each branch, positive integers; None: once. Only their ratios affect outputs; a
            common factor shifts `lse`.
        count: "per_branch", or "once" for nested branches: pairs that several branches hold count for the innermost alone.

    Raises:
        ValueError: for tuples of different lengths, values out of range, `head_shift` with the block rule, `zero_keys` with
            `segment_shift`, `weights` or `count`, duplicate branches with `weights` or `count`, or `count="once"` if the branches
            are not nested.
    """

    segment_lengths: tuple[int | None, ...]
    dilation_rates: tuple[int, ...]
    offset_rule: OffsetRule = "modulo"
    head_shift: int = 0
    segment_shift: int = 0
    heads: tuple[int, int] | None = None
    zero_keys: bool = False
    weights: tuple[int, ...] | None = None
    count: Count = "per_branch"

    def __post_init__(self) -> None:
        object.__setattr__(self, "segment_lengths", tuple(self.segment_lengths))
        object.__setattr__(self, "dilation_rates", tuple(self.dilation_rates))
        if not self.segment_lengths:
            raise ValueError("segment_lengths is empty; a pattern needs at least one branch, for example (1024,)")
        if len(self.segment_lengths) != len(self.dilation_rates):
            raise ValueError(
                f"segment_lengths has {len(self.segment_lengths)} entries and dilation_rates {len(self.dilation_rates)}; "
                "give one dilation rate per segment length"
            )
        for name in ("head_shift", "segment_shift"):
            if not _is_int(getattr(self, name)):
                raise ValueError(f"{name} must be an integer, got {getattr(self, name)!r}")
        for i, (w, r) in enumerate(self.branches):
            if w is not None and (not _is_int(w) or w < 1):
                raise ValueError(f"segment_lengths[{i}] must be a positive integer or None, got {w!r}")
            if not _is_int(r) or r < 1 or (w is not None and r > w):
                bound = "1 <= r" if w is None else f"1 <= r <= segment length {w}"
                raise ValueError(f"dilation_rates[{i}] must be an integer with {bound}, got {r!r}")
        if self.heads is not None:
            object.__setattr__(self, "heads", tuple(self.heads))
            if not all(map(_is_int, self.heads)) or not 0 <= self.heads[0] < self.heads[1]:
                raise ValueError(f"heads must be (first, total) with 0 <= first < total, got {self.heads!r}")
        if self.offset_rule not in get_args(OffsetRule):
            raise ValueError(f"offset_rule must be 'modulo' or 'block', got {self.offset_rule!r}")
        if self.offset_rule == "block" and self.head_shift != 0:
            raise ValueError(f"head_shift={self.head_shift} needs offset_rule='modulo'; with 'block' it must be 0")
        if not isinstance(self.zero_keys, bool):
            raise ValueError(f"zero_keys must be True or False, got {self.zero_keys!r}")
        if self.zero_keys and self.segment_shift != 0:
            raise ValueError(
                f"segment_shift={self.segment_shift} with zero_keys=True: torchscale's segments begin at row 0; use 0, or "
                "zero_keys=False"
            )
        self._check_counting()

    def _check_counting(self) -> None:
        if self.count not in get_args(Count):
            raise ValueError(f"count must be 'per_branch' or 'once', got {self.count!r}")
        if self.weights is not None:
            object.__setattr__(self, "weights", tuple(self.weights))
            if len(self.weights) != len(self.segment_lengths):
                raise ValueError(
                    f"weights has {len(self.weights)} entries and segment_lengths {len(self.segment_lengths)}; give one weight "
                    "per branch"
                )
            for i, weight in enumerate(self.weights):
                if not _is_int(weight) or weight < 1:
                    raise ValueError(
                        f"weights[{i}] must be a positive integer, got {weight!r}; only ratios affect outputs: for fractions "
                        "multiply all weights by one factor"
                    )
            if sum(self.weights) > MOST_WEIGHT:
                raise ValueError(
                    f"weights must sum to at most {MOST_WEIGHT}, got {sum(self.weights)}; divide all by one factor"
                )
        if self.weights is None and self.count == "per_branch":
            return
        given = f"count={self.count!r}" if self.weights is None else f"weights={self.weights}"
        if self.zero_keys:
            raise ValueError(
                f"{given} with zero_keys=True: torchscale counts every key once per branch; use zero_keys=False"
            )
        if len(set(self.branches)) < len(self.branches):
            twice = next(branch for branch in self.branches if self.branches.count(branch) > 1)
            raise ValueError(
                f"{given} with branch {tuple(twice)} given twice; give it once, with the sum as its weight"
            )
        if self.count == "once":
            for inner, outer in itertools.pairwise(self.from_innermost):
                if self.offset_rule != "modulo" or not outer.extends(inner):
                    raise ValueError(
                        f"count='once' needs nested branches, with offset_rule='modulo': {tuple(inner)} and {tuple(outer)} are "
                        f"not nested with {self.offset_rule!r}; let every segment length and dilation rate divide the next "
                        "larger one, and each rate its length, or use count='per_branch'"
                    )

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The branches as `(segment_length, dilation_rate)` pairs."""
        return tuple(Branch(w, r) for w, r in zip(self.segment_lengths, self.dilation_rates, strict=True))

    @property
    def from_innermost(self) -> tuple[Branch, ...]:
        """The branches in ascending order of segment length, then dilation rate: of nested ones the innermost first."""
        return tuple(
            sorted(self.branches, key=lambda branch: (branch.segment_length or math.inf, branch.dilation_rate))
        )

    @property
    def description(self) -> str:
        """The branches as `w/r`, each with its weight, and whether pairs count once: for reports."""
        parts = [f"{'all' if w is None else w}/{r}" for w, r in self.branches]
        if self.weights is not None:
            parts = [f"{part} weight {weight}" for part, weight in zip(parts, self.weights, strict=True)]
        return ", ".join(parts) + ("; pairs counted once" if self.count == "once" else "")

    def weight(self, branch: Branch) -> int:
        """How often a pair counts for `branch`."""
        return 1 if self.weights is None else self.weights[self.branches.index(branch)]

    def yields_to(self, branch: Branch) -> Branch | None:
        """With `count="once"` the branch for which pairs count that both hold, the next smaller one; else None."""
        if self.count == "per_branch":
            return None
        at = self.from_innermost.index(branch)
        return self.from_innermost[at - 1] if at else None

    def for_heads(self, first_kv_head: int, total_kv_heads: int) -> DilatedPattern:
        """This pattern for kv heads `first_kv_head, first_kv_head + 1, ...` of `total_kv_heads`, given without the others.

        For head-parallel attention: a rank's heads keep the offsets that they have among all heads, so
        `dilated_attention(q, k, v, pattern.for_heads(first, total))` of a slice of the heads is that slice of the result.

        Raises:
            ValueError: unless `0 <= first_kv_head < total_kv_heads`, or if this is already a pattern of some heads.
        """
        if self.heads is not None:
            raise ValueError(f"{self} is already a pattern of some heads; call for_heads on the one for all heads")
        return replace(self, heads=(first_kv_head, total_kv_heads))

    def offset(self, branch: Branch, head: int, num_kv_heads: int) -> int:
        """The offset of kv head `head` in `branch`."""
        first, total = self.heads or (0, num_kv_heads)
        if first + num_kv_heads > total:
            raise ValueError(f"{num_kv_heads} kv heads from head {first} on are more than the {total} of {self}")
        r = branch.dilation_rate
        if self.offset_rule == "modulo":
            return (first + head + self.head_shift) % r
        return (first + head) // -(-total // r)

    def residues(self, branch: Branch, num_kv_heads: int) -> list[Residue]:
        """The kv heads of `branch`, grouped by their offset, as strided ranges (every head is in exactly one)."""
        r = branch.dilation_rate
        if self.offset_rule == "modulo":
            strided = [Heads(g, num_kv_heads, r) for g in range(min(r, num_kv_heads))]
        else:
            first, total = self.heads or (0, num_kv_heads)
            size = -(-total // r)
            starts = [0, *range(size - first % size, num_kv_heads, size)]
            strided = [Heads(a, b, 1) for a, b in zip(starts, [*starts[1:], num_kv_heads], strict=True)]
        return [Residue(self.offset(branch, heads.start, num_kv_heads), heads) for heads in strided]


class OwnPattern(NamedTuple):
    """A layer that differs from the rule: by its shifts, by having only the first so many branches (0: all), or dense."""

    layer: int
    dense: bool
    head_shift: int
    segment_shift: int
    branches: int = 0


class LayerRule(NamedTuple):
    """The patterns of all layers of a model.

    Attributes:
        first: the pattern of layer 0 by the rule.
        head_step: added to `head_shift` from each layer to the next.
        own: the layers that differ from the rule.
    """

    first: DilatedPattern
    head_step: int = 0
    own: tuple[OwnPattern, ...] = ()

    def of(self, layer: int) -> DilatedPattern:
        """The pattern of layer `layer`."""
        for own in self.own:
            if own.layer == layer:
                if own.dense:
                    return DENSE
                kept = own.branches or len(self.first.segment_lengths)
                return replace(
                    self.first,
                    segment_lengths=self.first.segment_lengths[:kept],
                    head_shift=own.head_shift,
                    dilation_rates=self.first.dilation_rates[:kept],
                    segment_shift=own.segment_shift,
                    weights=self.first.weights and self.first.weights[:kept],
                )
        return replace(self.first, head_shift=self.first.head_shift + self.head_step * layer)


class LayerPattern(NamedTuple):
    """The pattern of a layer whose number, int64 `[]` on the CPU, is data, so that all layers share one compiled graph."""

    rule: LayerRule
    layer: Tensor


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


DENSE = DilatedPattern((None,), (1,))
