# SPDX-License-Identifier: Apache-2.0
"""A call of the operator in types that its schema allows, and back."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor

from ring_hilbert.ops.order import TokenOrder
from ring_hilbert.ops.pattern import DilatedPattern, LayerPattern, LayerRule, OwnPattern
from ring_hilbert.parallel.plan import Shapes
from ring_hilbert.parallel.prepare import prepare
from ring_hilbert.parallel.prepared import Prepared


class Call(NamedTuple):
    """A call apart from its tensors and batch metadata, in types that an operator's schema allows.

    Attributes:
        segment_lengths, dilation_rates, offset_rule: of the pattern; a segment length of 0 is the whole sequence.
        shifts: `(head_shift, segment_shift)` of the pattern.
        head_step, own: from `LayerRule`, `own` as five integers per layer; 0 and empty without one.
        heads: `(first, total)` of the pattern, or empty.
        zero_keys: of the pattern.
        weights, counted: of the pattern, `weights` and `count`; empty without weights.
        causal: without a handle, whether keys at later rows (with an order, later tokens) are masked.
        curve, sides: without a handle, the token order: no curve means no order, one side a block, more a grid.
        scale: factor on the scores.
        backend: "triton", "torch" or "auto".
        strategy: how rows reach other ranks; "auto" defers the choice between exchange and ring to the batch.
        keep: whether rows of other ranks are kept for backward.
        return_lse: whether lse is read.
        name: of the layer, for errors.
        trained: whether it may be differentiated: inside a compiled graph its tensors do not say so.
    """

    segment_lengths: list[int]
    dilation_rates: list[int]
    offset_rule: str
    shifts: list[int]
    head_step: int
    own: list[int]
    heads: list[int]
    zero_keys: bool
    weights: list[int]
    counted: str
    causal: bool
    curve: str
    sides: list[int]
    scale: float
    backend: str
    strategy: str
    keep: bool
    return_lse: bool
    name: str
    trained: bool

    @classmethod
    def of(
        cls,
        pattern: DilatedPattern | LayerPattern,
        *,
        causal: bool,
        order: TokenOrder | None,
        scale: float,
        name: str | None,
        backend: str = "auto",
        strategy: str = "exchange",
        keep: bool = False,
        return_lse: bool = True,
        trained: bool = False,
    ) -> Call:
        """The call for `pattern`; torch.compile traces through this."""
        head_step, own = 0, []
        if isinstance(pattern, LayerPattern):
            pattern, head_step, own_patterns = pattern.rule
            own = [int(number) for each in own_patterns for number in each]
        lengths = [0 if length is None else length for length in pattern.segment_lengths]
        curve: str = ""
        sides: list[int] = []
        if order is not None:
            curve, sides = order.curve, list(order.grid or (order.block or 0,))
        return cls(
            lengths, list(pattern.dilation_rates), pattern.offset_rule, [pattern.head_shift, pattern.segment_shift],
            head_step, own, list(pattern.heads or ()), pattern.zero_keys, list(pattern.weights or ()), pattern.count, causal,
            curve, sides, scale, backend, strategy, keep, return_lse, name or "", trained,
        )  # fmt: skip

    @property
    def pattern(self) -> DilatedPattern:
        """The pattern that `of` was given, that of layer 0 if given several."""
        return _pattern(
            tuple(self.segment_lengths), tuple(self.dilation_rates), self.offset_rule, *self.shifts, tuple(self.heads),
            self.zero_keys, tuple(self.weights), self.counted,
        )  # fmt: skip

    def at(self, layer: Tensor | None) -> Call:
        """This call for one of its layers."""
        if layer is None:
            return self
        number = int(layer)
        check = getattr(layer, "check", None)  # set by the maker of the tensor; lost if hooks copied it for backward
        if check is not None:
            check(number)
        fields = [self.own[i : i + 5] for i in range(0, len(self.own), 5)]
        own = tuple(OwnPattern(which, bool(dense), *rest) for which, dense, *rest in fields)
        one = LayerRule(self.pattern, self.head_step, own).of(number)
        return self._replace(
            segment_lengths=[w or 0 for w in one.segment_lengths], dilation_rates=list(one.dilation_rates),
            offset_rule=one.offset_rule, shifts=[one.head_shift, one.segment_shift], heads=list(one.heads or ()),
            zero_keys=one.zero_keys, weights=list(one.weights or ()), counted=one.count, head_step=0, own=[],
            name=self.name or f"layer {number}",
        )  # fmt: skip

    @property
    def keeps_all(self) -> bool:
        """Whether backward needs only what forward keeps."""
        return self.strategy == "ulysses"

    def default_facts(self, rows: int) -> Prepared:
        """The `Prepared` of a call without a handle: one device, one document, default positions."""
        return _default_facts(rows, self.causal, self.curve, tuple(self.sides))


@lru_cache(maxsize=1024)
def _pattern(
    lengths: tuple[int, ...], rates: tuple[int, ...], rule: Any, head_shift: int, segment_shift: int, heads: Any,
    zero_keys: bool, weights: tuple[int, ...], counted: Any,
) -> DilatedPattern:  # fmt: skip
    return DilatedPattern(
        tuple(w or None for w in lengths), rates, rule, head_shift, segment_shift, heads or None, zero_keys, weights or None,
        counted,
    )  # fmt: skip


@lru_cache(maxsize=16)
def _default_facts(rows: int, causal: bool, curve: str, sides: tuple[int, ...]) -> Prepared:
    order = None
    if curve:
        order = TokenOrder(curve, block=sides[0]) if len(sides) == 1 else TokenOrder(curve, grid=sides)
    return prepare(rows, causal=causal, order=order)


def agreed_fields(pattern: DilatedPattern | LayerPattern, scale: float | None, shapes: Shapes | None) -> dict[str, Any]:
    """The fields of a call that must agree on all ranks, by their names in errors."""
    fields: dict[str, Any] = {"pattern": pattern, "scale": scale}
    if shapes is not None:
        fields |= {
            "B (batch size of q)": shapes.batch_size,
            "H (heads of q)": shapes.num_heads,
            "Hkv (heads of k, v)": shapes.num_kv_heads,
            "D (head dim)": shapes.head_dim,
            "dtype": shapes.dtype,
        }
    return fields
