# SPDX-License-Identifier: Apache-2.0
"""The sections `model` and `attention`: what is trained, and what its attention is."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ring_hilbert.ops.pattern import DilatedPattern
from ring_hilbert.training.config.section import Section


class ModelConfig(Section):
    """The Transformers model: a configuration to initialise (`config`, with a `model_type`) or a folder (`path`).

    `changes`: keys of the folder's configuration that get other values, for instance all of `rope_parameters` for a longer
    context. A tokenizer in the folder must be that of `data.tokenizer`.
    """

    config: dict[str, Any] | None = None
    path: str | None = None
    changes: dict[str, Any] = {}

    @model_validator(mode="after")
    def _one_of(self) -> ModelConfig:
        if (self.config is None) == (self.path is None):
            raise ValueError("give exactly one of `config` (a mapping with a model_type) and `path` (a model folder)")
        if self.changes and self.path is None:
            raise ValueError("`changes` are of the configuration in `path`; with `config`, write them there")
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ValueError(f"`config` needs a model_type, e.g. model_type: llama; it has {sorted(self.config)}")
        return self


class OrderConfig(Section):
    """Token order: a curve over blocks of `block` tokens, or over one `grid` of exactly seq_len cells."""

    curve: Literal["hilbert", "morton", "peano", "snake", "raster"] = "hilbert"
    block: int | None = Field(default=None, ge=1)
    grid: list[int] | None = Field(default=None, min_length=2, max_length=3)

    @model_validator(mode="after")
    def _one_of(self) -> OrderConfig:
        if (self.block is None) == (self.grid is None):
            raise ValueError("give exactly one of `block` (1-D data) and `grid` (2 or 3 sides)")
        if self.grid is not None and min(self.grid) < 1:
            raise ValueError(f"`grid` needs positive sides, got {self.grid}")
        return self


class LayerConfig(Section):
    """What one layer does differently: its own shifts, only the first so many `branches`, or plain dense attention."""

    dense: bool = False
    head_shift: int | None = None
    segment_shift: int | None = None
    branches: int | None = Field(default=None, ge=1)


class AttentionConfig(Section):
    """Pattern, order and execution of the attention: the keys of `config.ring_hilbert` in a Transformers model."""

    segment_lengths: list[int | None] = Field(min_length=1)  # null: the whole sequence
    dilation_rates: list[int] = Field(min_length=1)
    offset_rule: Literal["modulo", "block"] = "modulo"
    head_shift: int | Literal["auto"] = 0
    segment_shift: int = 0
    # Left out of dumps where they say nothing, so that the digests of earlier runs stay.
    weights: list[int] | None = Field(default=None, exclude_if=lambda weights: weights is None)
    count: Literal["per_branch", "once"] = Field(default="per_branch", exclude_if=lambda count: count == "per_branch")
    order: OrderConfig | None = None
    layers: dict[int, LayerConfig] = {}
    strategy: Literal["exchange", "ring", "ulysses", "auto"] = "auto"
    backend: Literal["triton", "torch", "auto"] = "auto"
    layout: Literal["contiguous", "zigzag"] = "contiguous"

    @field_validator("layers", mode="before")
    @classmethod
    def _layer_numbers(cls, layers: object) -> object:
        """Layer numbers arrive as strings from the command line and from JSON."""
        if isinstance(layers, dict):
            return {int(n) if isinstance(n, str) and n.isdecimal() else n: layer for n, layer in layers.items()}
        return layers

    def pattern(self, segment_shift: int) -> DilatedPattern:
        """The pattern of layers with this shift of segments; their `head_shift: auto` is 0."""
        shift = 0 if self.head_shift == "auto" else self.head_shift
        lengths, rates = tuple(self.segment_lengths), tuple(self.dilation_rates)
        weights = None if self.weights is None else tuple(self.weights)
        return DilatedPattern(lengths, rates, self.offset_rule, shift, segment_shift, weights=weights, count=self.count)

    @model_validator(mode="after")
    def _branches(self) -> AttentionConfig:
        count = len(self.pattern(self.segment_shift).branches)
        for number, layer in self.layers.items():
            if layer.branches is not None and (layer.dense or layer.branches > count):
                raise ValueError(
                    f"layers.{number} keeps {layer.branches} of {count} branches{' and is dense' * layer.dense}; keep 1 to "
                    f"{count} of them, or make it dense"
                )
        return self

    def to_mapping(self) -> dict[str, Any]:
        """The value of `config.ring_hilbert`: plain lists, dicts, scalars; layer numbers as strings, as in JSON."""
        mapping = self.model_dump(exclude={"order", "layers"})
        mapping["order"] = None if self.order is None else self.order.model_dump(exclude_none=True)
        mapping["layers"] = {str(n): layer.model_dump(exclude_unset=True) for n, layer in sorted(self.layers.items())}
        return mapping
