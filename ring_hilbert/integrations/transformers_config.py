# SPDX-License-Identifier: Apache-2.0
"""`config.ring_hilbert` of a Transformers model: its keys, and the pattern and order that it gives each layer.

A plain mapping, so that `save_pretrained` and `from_pretrained` preserve it. Setting it selects `use_cache=False`, and
`attn_implementation="ring_hilbert"` unless another was requested. The saved file names the implementation, which Transformers
refuses unless `ring_hilbert` was imported: a saved model is never silently loaded with dense attention.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from wrapt import wrap_function_wrapper

from ring_hilbert.ops.order import TokenOrder
from ring_hilbert.ops.pattern import DilatedPattern, LayerRule, OwnPattern

NAME = "ring_hilbert"
SAVED_NAME = "_attn_implementation"  # the key that every Transformers 5 reads from config.json
PATTERN_KEYS = ("segment_lengths", "dilation_rates", "offset_rule", "head_shift", "segment_shift", "weights", "count")
KEYS = (*PATTERN_KEYS, "order", "layers", "strategy", "backend", "layout")
# Of a configuration's layer_types: attention over all rows (sliding windows are refused where one is given), what sees one row
# only, and what mixes rows in their natural order, on one device. All others are some other attention.
OURS, OF_A_ROW = {"full_attention", "attention", "sliding_attention"}, {"moe", "mlp", "sparse", "dense"}
MIXING = {"linear_attention", "conv", "hybrid", "mamba", "recurrent"}
LAYER_KEYS = ("dense", "head_shift", "segment_shift", "branches")
LOCAL_ROPE = (
    "rope_type {!r} derives its frequencies from the longest position on a rank, so that the ranks of a sequence would "
    "rotate by different angles; use yarn, linear or llama3 in config.rope_parameters"
)


def settings_of(config: Any) -> Mapping[str, Any]:
    """The checked mapping `config.ring_hilbert`.

    Raises:
        ValueError: if it is not set, has unknown or missing keys, or the model has layers with another kind of attention.
    """
    settings = getattr(config, NAME, None)
    if not isinstance(settings, Mapping):
        raise ValueError(
            "attn_implementation='ring_hilbert' needs config.ring_hilbert = {'segment_lengths': [...], 'dilation_rates': [...]}; "
            f"it is {settings!r}"
        )
    unknown, missing = set(settings) - set(KEYS), {"segment_lengths", "dilation_rates"} - set(settings)
    if unknown or missing:
        raise ValueError(
            f"config.ring_hilbert has unknown keys {sorted(unknown)} and lacks {sorted(missing)}; it may have {', '.join(KEYS)}"
        )
    other = layer_types(config) - OURS - OF_A_ROW - MIXING
    if other:
        raise ValueError(
            f"attn_implementation='ring_hilbert' has no {' nor '.join(sorted(other))}; use config.layer_types all 'full_attention'"
        )
    return settings


def layer_types(config: Any) -> set[str]:
    """The kinds of layers that a configuration lists, and "mamba" if it has settings of those."""
    listed = set(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ())
    return listed | ({"mamba"} if any(name.startswith("mamba_") for name in vars(config)) else set())


def pattern_of(config: Any, layer: int) -> DilatedPattern:
    """The pattern of layer number `layer`."""
    return layer_rule(config).of(layer)


def layer_rule(config: Any) -> LayerRule:
    """The patterns of all layers.

    `head_shift: auto` is `layer * Hkv`, so that where `r > Hkv` some layer covers every residue. `layers` maps layer numbers
    (as text) to `{"dense": true}`, to their own `head_shift` or `segment_shift`, or to how many of the
    first `branches` they keep.
    """
    settings = settings_of(config)
    fields = {key: settings[key] for key in PATTERN_KEYS if key in settings}
    layers, head_shift = settings.get("layers", {}), fields.get("head_shift", 0)
    rotates, step = head_shift == "auto", 0
    if rotates or any(own.get("head_shift") == "auto" for own in layers.values()):
        step = heads_of(config)[1] if fields.get("offset_rule", "modulo") == "modulo" else 0
    given: dict[str, Any] = fields | {"head_shift": 0} if rotates else fields
    first = DilatedPattern(**given)
    different = []
    for key, own in layers.items():
        if not str(key).isdecimal():
            raise ValueError(f"config.ring_hilbert['layers'] has the key {key!r}; its keys must be layer numbers")
        unknown = set(own) - set(LAYER_KEYS)
        if unknown:
            raise ValueError(
                f"config.ring_hilbert['layers']['{key}'] has unknown keys {sorted(unknown)}; it may have {LAYER_KEYS}"
            )
        number, dense = int(key), bool(own.get("dense"))
        if number >= getattr(config, "num_hidden_layers", number + 1):
            raise ValueError(
                f"config.ring_hilbert['layers'] has layer {number}; the model's are 0 to {config.num_hidden_layers - 1}"
            )
        own_head, own_segment = own.get("head_shift"), own.get("segment_shift")
        own_head = head_shift if own_head is None else own_head
        own_head = step * number if own_head == "auto" else own_head
        own_segment = first.segment_shift if own_segment is None else own_segment
        kept = own.get("branches") or 0
        if not 0 <= kept <= len(first.branches):
            raise ValueError(
                f"config.ring_hilbert['layers']['{key}'] has branches {kept}; the first 1 to {len(first.branches)} can be kept"
            )
        different.append(OwnPattern(number, dense, own_head, own_segment, kept))
    return LayerRule(first, step if rotates else 0, tuple(different))


def heads_of(config: Any) -> tuple[int, int, int]:
    """H, Hkv and D, as the model's layers derive them where its configuration leaves them out."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def order_of(config: Any) -> TokenOrder | None:
    """The token order, or None for rows as given."""
    order = settings_of(config).get("order")
    return None if order is None else TokenOrder.from_config(order)


def local_rope(config: Any) -> str | None:
    """The RoPE type of `config` if its frequencies depend on the longest position on a rank, else None.

    The ranks of a sequence would then rotate by angles different from each other's and from one device's.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [each.get("rope_type") or "" for each in (rope, *rope.values()) if isinstance(each, Mapping)]
    return next((kind for kind in kinds if "dynamic" in kind or kind == "longrope"), None)


def register(module: ModuleType) -> None:
    """Register with `transformers.configuration_utils`, called once that is imported."""
    config = module.PreTrainedConfig
    config.ring_hilbert = _SelectsImplementation()
    wrap_function_wrapper(config, "__post_init__" if hasattr(config, "__post_init__") else "__init__", _init)
    wrap_function_wrapper(config, "to_dict", _to_dict)


def adopt(module: ModuleType) -> None:
    """Handle configurations made before `ring_hilbert` was imported: select the implementation, or warn if it is too late."""
    for found in gc.get_objects():
        if issubclass(type(found), module.PreTrainedConfig) and vars(found).get(NAME) is not None:
            setattr(found, NAME, vars(found)[NAME])
            if found._attn_implementation != NAME:
                warnings.warn(
                    f"a {type(found).__name__} with ring_hilbert settings has attn_implementation={found._attn_implementation!r}: "
                    "models made or loaded before `import ring_hilbert` use that; import it first",
                    stacklevel=2,
                )


def _init(wrapped: Callable[..., None], config: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Wraps a configuration's constructor: `ring_hilbert` selects the implementation, not its name in the file, which would
    override another one requested. Transformers gives all parts of a configuration the implementation of the whole, even None.
    """
    saved = kwargs.get(SAVED_NAME)
    if NAME in (saved.values() if isinstance(saved, Mapping) else [saved]):
        del kwargs[SAVED_NAME]
    wrapped(*args, **kwargs)
    for part in _parts(config).values():
        part.ring_hilbert = part.ring_hilbert


def _to_dict(wrapped: Callable[..., dict[str, Any]], config: Any, args: tuple[Any, ...], kwargs: Any) -> dict[str, Any]:
    """The contents of `config.json`: adds the implementation, of the whole or of its parts, as the property takes it."""
    saved = NAME if vars(config).get(NAME) is not None else dict.fromkeys(_parts(config), NAME)
    return wrapped(*args, **kwargs) | ({SAVED_NAME: saved} if saved else {})


def _parts(config: Any) -> dict[str, Any]:
    """The parts of a configuration, such as text_config, that have their own settings."""
    parts = {name: vars(config).get(name) for name in config.sub_configs}
    return {name: part for name, part in parts.items() if getattr(part, NAME, None) is not None}


class _SelectsImplementation:
    """The attribute `ring_hilbert` of every Transformers configuration; its value is stored in the instance as usual."""

    def __get__(self, config: Any, owner: type) -> Any:
        if config is None:
            return self
        try:
            return config.__dict__[NAME]
        except KeyError:
            raise AttributeError(f"{owner.__name__} has no attribute {NAME!r}") from None

    def __set__(self, config: Any, value: Any) -> None:
        config.__dict__[NAME] = value
        if value is not None and config._attn_implementation is None:
            config._attn_implementation = NAME
        if value is not None and getattr(config, "use_cache", None):
            config.use_cache = False  # decoding with a key-value cache is not supported

    def __delete__(self, config: Any) -> None:
        config.__dict__.pop(NAME, None)
