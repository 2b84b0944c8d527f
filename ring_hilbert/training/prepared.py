# SPDX-License-Identifier: Apache-2.0
"""A folder of prepared data: a part per source, the tokenizer, and a manifest; all the data a run needs, wherever it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ring_hilbert.training.config import DataConfig, EvalConfig, SourceConfig
from ring_hilbert.training.content import Content
from ring_hilbert.training.documents import MEND, VERSION, Documents, Part, read_record, refuse_foreign
from ring_hilbert.training.files import find_files
from ring_hilbert.training.prepare import Reading, cached, locked, tokenise, write_record
from ring_hilbert.training.tokens import load_tokenizer, saved_digest, tokenizer_digest

MANIFEST, TOKENIZER = "manifest.json", "tokenizer"
HELD_OUT = "data.eval"  # the name of the held-out part
READ = {"path", "exclude", "field", "format"}  # settings of a source that decide on its documents


def open_part(data: DataConfig, name: str) -> Part:
    """The documents of a source, by its name in the configuration: "data.sources.0" or "data.eval", whose `path` must be set.

    From the folder `data.prepared`; without it they are tokenised now, unless cached. Any number of processes may call it at the
    same time; it is quicker if one on each host calls it before the others.

    Args:
        data: as `with_prepared` returns it.

    Raises:
        ValueError: if there are none, they cannot be read, or the folder is damaged; names the file.
    """
    if data.prepared is not None:
        part = Part(Path(data.prepared) / name)
        if part.record["key"] != _manifest(data.prepared)["parts"][name]["key"]:
            raise ValueError(f"{part.folder} does not belong in {data.prepared}: it was prepared separately; {MEND}")
    else:
        part = cached(_reading(data, name), load_tokenizer(data.tokenizer), data.workers)
    _refuse_empty(part, data, name)
    return part


def with_prepared(data: DataConfig) -> DataConfig:
    """`data`, with unset keys taken from `data.prepared`: sources, weights, tokenizer, bos, eval.

    Raises:
        ValueError: if the folder is damaged (names the file), or contradicts `data`.
    """
    if data.prepared is None:
        return data
    folder = Path(data.prepared)
    manifest = _manifest(data.prepared)
    refuse_foreign(folder, {MANIFEST, TOKENIZER, *manifest["parts"]})
    for name in (TOKENIZER, *manifest["parts"]):
        if not (folder / name).is_dir():
            raise ValueError(f"{folder / name} is missing; {MEND}")
    if saved_digest(folder / TOKENIZER) != manifest["tokenizer"]["digest"]:
        raise ValueError(f"{folder / TOKENIZER} is not the tokenizer that the data were prepared with; {MEND}")
    then = DataConfig.model_validate(manifest["settings"])
    differences = list(_differences(data, then, manifest["tokenizer"], folder / TOKENIZER))
    if differences:
        raise ValueError(
            f"data.prepared {folder} differs from the configuration: {'; '.join(differences)}; leave these keys "
            "out to use what was prepared, or prepare the data again"
        )
    name = manifest["tokenizer"]["name"]
    filled: dict[str, Any] = {"tokenizer": name if name == "bytes" else str(folder / TOKENIZER), "bos": then.bos}
    filled |= {"sources": data.sources or then.sources, "encoding_errors": then.encoding_errors}
    return data.model_copy(update=filled | ({} if "eval" in data.model_fields_set else {"eval": then.eval}))


def prepare(data: DataConfig, say: Callable[[str], object]) -> None:
    """Write the folder `data.prepared`, resume an interrupted one, or find it done.

    Raises:
        ValueError: if the data cannot be read, or the folder holds something else; names the file.
        OSError: if it cannot be written, or a process was killed; the same call resumes from there.
    """
    if data.prepared is None or data.sources is None:
        raise ValueError("data.prepared names the folder to write and data.sources what to read: give both")
    folder = Path(data.prepared)
    tokenizer = load_tokenizer(data.tokenizer)
    names = [f"data.sources.{number}" for number in range(len(data.sources))]
    if data.eval is not None and data.eval.path is not None:
        names.append(HELD_OUT)
    with locked(folder):
        folder.mkdir(exist_ok=True)
        refuse_foreign(folder, {MANIFEST, f"{MANIFEST}.new", TOKENIZER, *names})
        for name in names:
            tokenise(_reading(data, name), tokenizer, folder / name, data.workers, name)
        parts = write_manifest(data, names)["parts"]
    for name, part in parts.items():
        say(f"{name}: {part['documents']:,} documents, {part['tokens']:,} tokens; {part['kinds']}")


def write_manifest(data: DataConfig, names: list[str]) -> dict[str, Any]:
    """Write the manifest that turns existing parts in `data.prepared` into a folder for runs; returns its contents."""
    assert data.prepared is not None
    folder, tokenizer = Path(data.prepared), load_tokenizer(data.tokenizer)
    tokenizer.save_pretrained(folder / TOKENIZER)
    parts = {name: Part(folder / name) for name in names}
    for name, part in parts.items():
        _refuse_empty(part, data, name)
    manifest = {
        "version": VERSION,
        "tokenizer": {"name": data.tokenizer, "digest": tokenizer_digest(tokenizer)},
        "settings": data.model_dump(mode="json", exclude={"prepared", "workers"}),
        "parts": {
            name: {
                "key": part.record["key"],
                "documents": len(part.lengths),
                "tokens": part.record["columns"]["tokens"]["count"],
                "largest_id": part.record["largest_id"],
                "kinds": part.record["kinds"],
                "content": asdict(Content.of(Documents([part], [None]))),
            }
            for name, part in parts.items()
        },
    }
    write_record(folder / MANIFEST, manifest)
    return manifest


def _manifest(folder: str) -> dict[str, Any]:
    return read_record(Path(folder), MANIFEST)


def _section(data: DataConfig, name: str) -> SourceConfig | EvalConfig:
    if name == HELD_OUT:
        assert data.eval is not None
        return data.eval
    assert data.sources is not None
    return data.sources[int(name.rpartition(".")[2])]


def _refuse_empty(part: Part, data: DataConfig, name: str) -> None:
    if not len(part.lengths):
        raise ValueError(f"data path {_section(data, name).path} is empty: its files hold no text")


def _reading(data: DataConfig, name: str) -> Reading:
    """The files of a source, except those held out by data.eval.path."""
    section = _section(data, name)
    assert section.path is not None
    files = find_files(section.path, section.exclude)
    if name != HELD_OUT and data.eval is not None and data.eval.path is not None:
        held_out = {file.resolve() for file in find_files(data.eval.path, data.eval.exclude)}
        files = [file for file in files if file.resolve() not in held_out]
        if not files:
            raise ValueError(f"data path {section.path} is empty: all its files are held out by data.eval.path")
    return Reading(files, section.field, section.format, data.encoding_errors, data.bos)


def _differences(now: DataConfig, then: DataConfig, tokenizer: dict[str, str], saved: Path) -> Iterator[str]:
    """`key: then, now` for settings given now that differ from those with which the data were prepared."""
    for key in ("bos", "encoding_errors"):
        if key in now.model_fields_set and getattr(now, key) != getattr(then, key):
            yield f"data.{key}: {getattr(then, key)} in the folder, now {getattr(now, key)}"
    if now.sources is not None:
        assert then.sources is not None
        if len(now.sources) != len(then.sources):
            yield f"data.sources: {len(then.sources)} of them in the folder, now {len(now.sources)}"
        for number, pair in enumerate(zip(now.sources, then.sources, strict=False)):
            yield from _changed(f"data.sources.{number}", *pair)
    if now.eval is not None and now.eval.path is not None:
        if then.eval is None or then.eval.path is None:
            yield "data.eval.path: none in the folder"
        else:
            yield from _changed(HELD_OUT, now.eval, then.eval)
    if "tokenizer" in now.model_fields_set and now.tokenizer != str(saved):
        there = now.tokenizer == "bytes" or Path(now.tokenizer).is_dir()  # if not, it is not needed: compare its name
        if (
            tokenizer_digest(load_tokenizer(now.tokenizer)) != tokenizer["digest"]
            if there
            else now.tokenizer != tokenizer["name"]
        ):
            yield f"data.tokenizer: {tokenizer['name']} in the folder, now {now.tokenizer}, a different one"


def _changed(name: str, now: SourceConfig | EvalConfig, then: SourceConfig | EvalConfig) -> Iterator[str]:
    for key in sorted(READ):
        if getattr(now, key) != getattr(then, key):
            yield f"{name}.{key}: {getattr(then, key)} in the folder, now {getattr(now, key)}"
