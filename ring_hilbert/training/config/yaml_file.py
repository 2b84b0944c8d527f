# SPDX-License-Identifier: Apache-2.0
"""YAML with interpolations and command-line overrides, read through OmegaConf into a plain dict."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError


def _python_stdlib() -> str:
    return Path(sysconfig.get_path("stdlib")).as_posix()


# Renamed in OmegaConf 2.4.
_register = getattr(
    OmegaConf, "register_resolver" if hasattr(OmegaConf, "register_resolver") else "register_new_resolver"
)
_register("python_stdlib", _python_stdlib, replace=True)


def read_yaml(path: str | Path, overrides: list[str]) -> dict[str, dict[str, Any]]:
    """The mapping in a YAML file, each `key.sub=value` of `overrides` laid over it in turn, interpolations resolved; by stage.

    A file with `stages`, a mapping of names to what is different in each, gives one mapping for each, in this order; any other
    file gives one, named "". Values of overrides are YAML; list elements are addressed by number (`data.sources.0.weight=2`).
    `${python_stdlib:}` is the folder of the running interpreter's standard library.

    Raises:
        ValueError: the file cannot be read or is no mapping; an override is malformed or does not fit; an interpolation
            fails.
    """
    try:
        config = OmegaConf.load(path)
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"config {path} cannot be read as YAML: {error}") from error
    if not isinstance(config, DictConfig):
        raise ValueError(f"config {path} must be a YAML mapping of sections (model, attention, data, ...), got a list")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not (equals and all(key.split("."))):
            raise ValueError(f"override {override!r} is not of the form key.sub=value, e.g. train.steps=200")
        try:
            value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index]
            OmegaConf.update(config, key, value, merge=False, force_add=True)
        except (OmegaConfBaseException, YAMLError, AttributeError, TypeError, ValueError, IndexError) as error:
            raise ValueError(f"override {override!r} cannot be applied to {path}: {error}") from error
    try:
        stages = config.pop("stages", None)
        if stages is None:
            return {"": _plain(config)}
        if not OmegaConf.is_dict(stages) or not stages:
            raise ValueError(
                f"config {path}: stages must be a mapping of names to sections, e.g. 128k: {{data: {{seq_len: 131072}}}}"
            )
        return {str(name): _plain(OmegaConf.merge(config, changes)) for name, changes in stages.items()}
    except OmegaConfBaseException as error:
        raise ValueError(f"config {path}: {error}") from error


def _plain(config: Any) -> dict[str, Any]:
    resolved = OmegaConf.to_container(config, resolve=True)
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}
