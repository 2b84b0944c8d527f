# SPDX-License-Identifier: Apache-2.0
"""What every section of the run configuration is."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A mapping of the YAML file: unknown keys are refused, types are not coerced, values are fixed after loading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def as_list(value: object) -> object:
    """One name where several may stand."""
    return [value] if isinstance(value, str) else value
