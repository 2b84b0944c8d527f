# SPDX-License-Identifier: Apache-2.0
"""`help()` is enough: every public name says what it takes, returns and raises."""

from __future__ import annotations

import csv
import inspect
import pydoc
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import ring_hilbert as rh
from ring_hilbert import compat

NAMED = {name: getattr(rh, name) for name in rh.__all__} | {f"compat.{x}": getattr(compat, x) for x in compat.__all__}


def exported() -> Iterator[tuple[str, Any]]:
    """Every name of an `__all__`, and every public function, method and property of those that are modules or classes."""
    for name, thing in NAMED.items():
        yield name, thing
        if isinstance(thing, ModuleType):
            members = {key: x for key, x in vars(thing).items() if getattr(x, "__module__", None) == thing.__name__}
        elif inspect.isclass(thing):
            members = {key: x for key, x in vars(thing).items() if inspect.isroutine(x) or isinstance(x, property)}
        else:
            continue
        yield from ((f"{name}.{key}", x) for key, x in members.items() if not key.startswith("_"))


EXPORTED = dict(exported())
CALLED = {name: thing for name, thing in NAMED.items() if callable(thing)}


def documentation(thing: Any) -> str:
    """The docstring as it stands in the source: torch's and NamedTuple's own do not count."""
    return inspect.cleandoc(vars(thing).get("__doc__") or "" if inspect.isclass(thing) else thing.__doc__ or "")


def parameters(thing: Any) -> list[str]:
    return [name for name in inspect.signature(thing).parameters if name not in ("self", "cls")]


@pytest.mark.parametrize("module", [rh, compat])
def test_all_is_sorted_and_there(module: ModuleType):
    assert sorted(module.__all__) == module.__all__ and all(hasattr(module, name) for name in module.__all__)


@pytest.mark.parametrize("name", EXPORTED)
def test_every_public_name_has_a_docstring(name: str):
    assert len(documentation(EXPORTED[name])) > 15


@pytest.mark.parametrize("name", CALLED)
def test_docstrings_name_every_argument(name: str):
    text = documentation(CALLED[name])
    missing = [p for p in parameters(CALLED[name]) if not re.search(rf"\b{p}\b", text)]
    assert not missing, f"{name} says nothing of {missing}"


@pytest.mark.parametrize("name", [n for n in CALLED if n not in ("Branch", "Prepared", "Plan")])
def test_what_is_called_says_what_it_returns_or_raises(name: str):
    text = documentation(CALLED[name])
    assert "Returns:" in text or "Raises:" in text
    if inspect.isfunction(CALLED[name]):
        assert "Returns:" in text


def test_help_of_the_operator():
    text = pydoc.render_doc(rh.dilated_attention, renderer=pydoc.plaintext)
    for name in parameters(rh.dilated_attention):
        assert re.search(rf"^ +([\w, ]+, )?{name}(, [\w, ]+)?: ", text, re.MULTILINE), name
    for words in (
        "[B, S, H, D]",
        "[B, H, S]",
        "fp16, bf16, fp32 or fp64",
        "float32",
        "Raises",
        "ValueError",
        "2307.02486",
    ):
        assert words in text, words


# ---- the pages


ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def anchors(page: Path) -> set[str]:
    """Of the headings of a page, as forges make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_anchors_resolve(page: Path):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)(?: \"[^\"]*\")?\)", text):
        if not link.startswith(("http://", "https://")):
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


FIGURE = re.compile(r"(?<![\w.^])(\d[\d,]*(?:\.\d+)?)(e-?\d+|B|\^\d+)?(?![\w^])")
MEASURED = re.compile(r"\d ?(%|ms|s|seconds?|minutes?|[KMG]i?B|tokens/s|T?FLOP/s|times)(?!\w)")
ROWS = re.compile(r"\[rows\]\((\S+\.csv) \"([^\"]+)\"\)")


def claims() -> list[str]:
    """The README's lines that say what was measured: the table of it, and any others with a unit of measurement."""
    text = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    table = text.partition("| | measured | where |")[2].partition("\n## ")[0].splitlines()
    return [line for line in text.splitlines() if figures(line) and (line in table or MEASURED.search(line))]


def figures(line: str) -> dict[tuple[str, str], tuple[float, float]]:
    """Every number of a line, but for code and links, in two parts: its value, and how far from it what was rounded may lie."""
    found = {}
    for match in FIGURE.finditer(re.sub(r"`[^`]*`|\[[^]]*\]\([^)]*\)", "", line)):
        digits, suffix = match[1].replace(",", ""), match[2] or ""
        if suffix.startswith("^"):
            found[match[1], suffix] = float(digits) ** int(suffix[1:]), 0.0
        else:
            scale = 1e9 if suffix == "B" else float(f"1{suffix}")
            found[match[1], suffix] = float(digits) * scale, 0.5 * scale * 10.0 ** -len(digits.partition(".")[2])
    return found


def unsupported(line: str) -> list[str]:
    """The figures of a line that are no field, rounded, of the rows that it cites: `[rows](FILE.csv "column=value; ...")`."""
    values = list[float]()
    for name, chosen in ROWS.findall(line):
        wanted = dict(part.split("=") for part in chosen.split("; "))
        with (ROOT / name).open(newline="") as file:
            for row in csv.DictReader(file):
                if all(row[column] == value for column, value in wanted.items()):
                    numbers = [x for x in row.values() if re.fullmatch(r"\d+(\.\d+)?(e[+-]\d+)?", x or "")]
                    values += map(float, numbers)
    return [
        "".join(text)
        for text, (value, error) in figures(line).items()
        if not any(abs(value - x) <= error * (1 + 1e-9) for x in values)
    ]


def test_figures_of_the_readme_are_of_the_rows_that_it_cites():
    assert sum(len(ROWS.findall(line)) for line in claims()) >= 4
    assert not {line: found for line in claims() if (found := unsupported(line))}


def test_a_wrong_figure_in_the_readme_would_be_found():
    """With a last digit one larger few are another field of these rows by chance."""
    found = [
        f"{wrong}{suffix}"
        in unsupported(re.sub(rf"(?<![\w.,]){re.escape(digits + suffix)}(?!\w)", wrong + suffix, line))
        for line in claims()
        for digits, suffix in figures(line)
        for wrong in [f"{digits[:-1]}{(int(digits[-1]) + 1) % 10}"]
    ]
    assert sum(found) >= 0.8 * len(found) > 8
