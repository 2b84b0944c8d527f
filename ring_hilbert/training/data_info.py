# SPDX-License-Identifier: Apache-2.0
"""A readable report on a folder of prepared data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ring_hilbert.training.config import DataConfig
from ring_hilbert.training.documents import Documents, Part
from ring_hilbert.training.packing import BestFit, Concat, describe
from ring_hilbert.training.prepared import HELD_OUT, open_part, with_prepared
from ring_hilbert.training.tokens import load_tokenizer


def report(folder: Path, seq_lens: list[int], sample: int, verify: bool) -> Iterator[str]:
    """Lines: tokens by source, documents by length, the result of each packing at some lengths, the start of a document decoded.

    Raises:
        ValueError: if the folder is damaged; names the file. With `verify` the checksum of all tokens is checked.
    """
    if min(seq_lens) < 2 or sample < 1:
        raise ValueError(f"--seq-len must be at least 2 and --sample at least 1, got {min(seq_lens)} and {sample}")
    data = with_prepared(DataConfig(prepared=str(folder), seq_len=min(seq_lens)))
    assert data.sources is not None
    names = [f"data.sources.{number}" for number in range(len(data.sources))]
    if data.eval is not None and data.eval.path is not None:
        names.append(HELD_OUT)
    parts = {name: open_part(data, name) for name in names}
    total = sum(part.record["columns"]["tokens"]["count"] for part in parts.values())
    weights = {name: source.weight for name, source in zip(names, data.sources, strict=False)}
    tokenizer = load_tokenizer(data.tokenizer)
    largest = max(part.record["largest_id"] for part in parts.values())
    yield f"{folder}: {total:,} tokens of {type(tokenizer).__name__}, ids up to {largest}"
    for name, part in parts.items():
        if verify:
            part.check_tokens()
        documents = Documents([part], [None])
        share = part.record["columns"]["tokens"]["count"] / total
        weight = f", weight {weights[name]:g} of {sum(weights.values()):g}" if name in weights else ", held out"
        yield f"\n{name}: {documents.summary}; {share:.2%} of the tokens{weight}{', all tokens verified' if verify else ''}"
        yield from _by_length(part)
        for seq_len in seq_lens:
            packings = {"concat": Concat(documents, seq_len, last=False), "best_fit": BestFit(documents, seq_len)}
            for packing, packed in packings.items():
                yield f"  {packing}: {describe(packed)}"
        document = len(part.lengths) // 2
        ids = part.tokens(document, 0, min(sample, int(part.lengths[document])))
        yield f"  document {document}, from {part.file(document)}, begins: {tokenizer.decode(ids.tolist())!r}"


def _by_length(part: Part) -> Iterator[str]:
    """How many documents, and how many of the tokens, have lengths from one power of two to the next."""
    powers = np.frexp(part.lengths)[1] - 1
    documents = np.bincount(powers)
    tokens = np.bincount(powers, weights=part.lengths)
    yield "  tokens of a document      documents     of the tokens"
    for power in np.flatnonzero(documents):
        yield f"  {2**power:>11,} .. {2 ** (power + 1) - 1:<11,}{documents[power]:>9,}{tokens[power] / tokens.sum():>17.2%}"
