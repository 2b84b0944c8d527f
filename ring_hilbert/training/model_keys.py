# SPDX-License-Identifier: Apache-2.0
"""Keys of a model's configuration that Transformers would take in silence, and that would have no effect: refused by name."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from transformers import PretrainedConfig

_LEGACY_ROPE = {"rope_theta", "rope_scaling"}
_LEGACY_KEYS = _LEGACY_ROPE | {"torch_dtype", "dtype"}  # still accepted, but no fields of a configuration class
_ROPE_KEYS = (
    "rope_type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings", "attention_factor",
    "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "short_factor", "long_factor", "low_freq_factor",
    "high_freq_factor",
)  # fmt: skip


def refuse_unknown(hf_config: PretrainedConfig, keys: dict[str, Any]) -> None:
    """Refuse unknown keys: Transformers would keep a misspelt one as an attribute that nothing reads."""
    if not dataclasses.is_dataclass(hf_config):
        return
    known = {field.name for field in dataclasses.fields(hf_config)} | set(hf_config.attribute_map) | _LEGACY_KEYS
    for key in keys:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise ValueError(f"{type(hf_config).__name__} has no key {key!r}{hint}")


def refuse_forgotten(saved: dict[str, Any], changes: dict[str, Any]) -> None:
    """Refuse changes of RoPE that would have no effect, or take back more of it than they name."""
    for key in _LEGACY_ROPE & changes.keys():
        raise ValueError(
            f"changes.{key} would not take effect beside rope_parameters; change these: {saved['rope_parameters']}"
        )
    old, new = saved.get("rope_parameters") or {}, changes.get("rope_parameters")
    if not isinstance(new, dict):
        return
    refuse_misspelt_rope(new)
    own = {key for key, value in old.items() if key in _ROPE_KEYS[:3] or isinstance(value, dict)}
    if own - new.keys():
        raise ValueError(
            f"changes.rope_parameters replaces all of {old}, and has no {', '.join(sorted(own - new.keys()))}; give it in full"
        )


def refuse_misspelt_rope(rope: Any) -> None:
    """Refuse what Transformers would only warn of, and leave out."""
    for key in rope if isinstance(rope, dict) else ():
        nearest = difflib.get_close_matches(key, _ROPE_KEYS, n=1, cutoff=0.8)
        if nearest and key not in _ROPE_KEYS and not isinstance(rope[key], dict):
            raise ValueError(f"rope_parameters has no key {key!r}; did you mean {nearest[0]}?")
