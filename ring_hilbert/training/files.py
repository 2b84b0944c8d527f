# SPDX-License-Identifier: Apache-2.0
"""Data files by path, folder or glob. Patterns only name local files, so "::", spaces and "[" have no special meaning in names."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path


def find_files(patterns: list[str], exclude: list[str]) -> list[Path]:
    """The files, folders and globs of `patterns` as absolute paths of non-empty files; a file with several names is listed once.

    Sorted within each pattern, so that every machine sees the same order. Hidden files are found only by their exact name.
    `exclude`: see `SourceConfig`.

    Raises:
        ValueError: if a pattern matches no file, only empty or excluded ones, or a broken link.
    """
    files: dict[Path, Path] = {}  # by link target
    for pattern in patterns:
        base, names = _expand(pattern)
        dropped = {base / name for rule in exclude for name in _below(base, rule)}
        matched = [path for path in (base / name for name in sorted(names)) if not path.is_dir()]
        kept = [path for path in matched if path not in dropped and dropped.isdisjoint(path.parents)]
        lost = next((path for path in kept if not path.exists()), None)
        if lost is not None:
            raise ValueError(
                f"data path {pattern!r} matches the link {lost}, which leads nowhere; mend it or exclude it"
            )
        filled = [path.absolute() for path in kept if path.stat().st_size]
        if not filled:
            counts = f"{len(matched)} files, {len(matched) - len(kept)} of them excluded, {len(kept)} empty"
            raise ValueError(f"data path {pattern!r} matches {counts if matched else 'no file'}")
        for path in filled:
            files.setdefault(path.resolve(), path)
    return list(files.values())


def _expand(pattern: str) -> tuple[Path, set[str]]:
    """The base folder of a pattern, and the names that it matches below that."""
    path = Path(pattern).expanduser()
    if path.is_file():
        return path.parent, {path.name}
    if path.is_dir():
        return path, _below(path, "**")
    fixed = next((n for n, part in enumerate(path.parts) if glob.has_magic(part)), len(path.parts))
    base = Path(*path.parts[:fixed])
    return base, _below(base, "/".join(path.parts[fixed:]))


def _below(base: Path, pattern: str) -> set[str]:
    """What a glob matches below a folder. `**` is any folders, except hidden ones and cycles through links."""
    parts = pattern.split("/")
    if "**" not in parts:
        return set(glob.glob(pattern, root_dir=base))  # noqa: PTH207 - Path.glob takes hidden files too
    place = parts.index("**")
    rest = "/".join(parts[place + 1 :]) or "*"
    tops = [f"{top}/" for top in _below(base, "/".join(parts[:place])) if (base / top).is_dir()] if place else [""]
    folders = [found for top in tops for found in _folders(str(base / top), top, frozenset())]
    return {prefix + name for folder, prefix in folders for name in _below(Path(folder), rest)}


def _folders(folder: str, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[tuple[str, str]]:
    """A folder and those below it, each with the prefix of its files' names."""
    found = os.stat(folder)  # noqa: PTH116 - there may be very many
    here = found.st_dev, found.st_ino
    if here not in above:
        yield folder, prefix
        with os.scandir(folder) as entries:
            inner = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
        for name in inner:
            yield from _folders(f"{folder}/{name}", f"{prefix}{name}/", above | {here})
