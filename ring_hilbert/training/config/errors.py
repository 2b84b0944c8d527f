# SPDX-License-Identifier: Apache-2.0
"""Validation errors of a configuration in the user's words: dotted key, what came, what was expected, nearest match."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ValidationError


def describe(error: ValidationError, model: type[BaseModel], raw: object) -> str:
    """One line per wrong key. `raw` is the mapping that `model` refused."""
    lines: dict[str, list[str]] = {}
    for item in error.errors(include_url=False):
        missing = item["type"] == "missing"
        keys = list(_keys(item["loc"], raw, missing))
        dotted = ".".join(str(key) for key in keys)
        if item["type"] == "extra_forbidden":
            text = _unknown(str(keys[-1]), _model_at(model, keys[:-1]))
        elif missing:
            text = "required, but missing"
        elif "ctx" in item and item["type"] == "value_error":
            text = str(item["ctx"]["error"])
        else:
            text = f"got {item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}"
        lines.setdefault(dotted, []).append(text)
    return "\n".join(f"  {dotted}{': ' if dotted else ''}{'; or '.join(texts)}" for dotted, texts in lines.items())


def _keys(loc: tuple[int | str, ...], raw: object, missing: bool) -> Iterator[int | str]:
    """The part of pydantic's location that is in the file (it also names the members of unions)."""
    for part in loc:
        pairs = enumerate(raw) if isinstance(raw, list) else raw.items() if isinstance(raw, dict) else ()
        children = {str(key): child for key, child in pairs}  # a layer's number may be a string in the file
        if str(part) in children:
            raw = children[str(part)]
            yield part
        elif missing and part == loc[-1]:
            yield part


def _model_at(model: type[BaseModel], keys: list[int | str]) -> type[BaseModel]:
    """The model of the mapping found by following `keys` from `model` (through optional fields, lists and dicts)."""
    for key in keys:
        field = model.model_fields.get(str(key))
        if field is not None:
            model = next(_models(field.annotation))
    return model


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


def _unknown(key: str, model: type[BaseModel]) -> str:
    valid = list(model.model_fields)
    nearest = difflib.get_close_matches(key, valid, n=1)
    hint = f" (did you mean {nearest[0]}?)" if nearest else ""
    return f"unknown key{hint}; valid here: {', '.join(valid)}"
