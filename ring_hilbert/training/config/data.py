# SPDX-License-Identifier: Apache-2.0
"""The section `data`: which documents, and how they are packed."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from ring_hilbert.training.config.section import Section, as_list


class SourceConfig(Section):
    """Documents to train on: files, folders and globs (a folder means every file below it).

    `exclude` holds globs relative to the folder in `path` (for a glob: to the part before its first wildcard); a
    match on a folder leaves out all below it. `weight`: the source gives weight / sum of weights of the training
    tokens, whatever its size. `field`: where JSON values and Parquet rows hold a document's text; meta.text if it is nested.
    `format`: "auto" goes by the name: .jsonl, .ndjson, .jsonlines, .json and .parquet, .pq have rows, any other file is one
    document; all but Parquet may have .gz, .bz2, .xz or .zst behind. What then does not look like one document is refused: JSON
    lines, NUL characters, .csv and .tsv. Else `format` is what all files of the source hold, whatever their names.
    """

    path: list[str] = Field(min_length=1)  # a single string is also accepted
    exclude: list[str] = []
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    field: str = "text"
    format: Literal["auto", "text", "json", "parquet"] = "auto"

    _path = field_validator("path", mode="before")(as_list)


class EvalConfig(Section):
    """Documents to evaluate on, every `every` steps: those in `path`, or a `share` of the documents of all sources.

    They are never trained on: neither the files matched here, nor any document of the same tokens, wherever it lies. Which
    documents a share takes is decided by hashes of their tokens, so that it is the same ones however files are moved, renamed
    and joined. `sequences` caps an evaluation at that many sequences, taken evenly from the whole set (null: all of it).
    """

    path: list[str] | None = Field(default=None, min_length=1)  # a single string is also accepted
    share: float | None = Field(default=None, gt=0, lt=1)
    exclude: list[str] = []
    field: str = "text"
    format: Literal["auto", "text", "json", "parquet"] = "auto"
    every: int = Field(default=50, ge=1)
    sequences: int | None = Field(default=None, ge=1)

    _path = field_validator("path", mode="before")(as_list)

    @model_validator(mode="after")
    def _one_of(self) -> EvalConfig:
        if (self.path is None) == (self.share is None):
            raise ValueError(
                "give exactly one of `path` (documents of their own) and `share` (of those in the sources)"
            )
        return self


class DataConfig(Section):
    """Documents, tokenizer and packing.

    `tokenizer`: "bytes" (ByT5's ids: byte + 3), or a folder for AutoTokenizer. `bos`: a document begins with the BOS token (true),
    with nothing (false), or as the tokenizer by itself begins a text (null). `encoding_errors`: what is not UTF-8, and a lone
    surrogate in JSON, is refused (strict) or read as U+FFFD (replace).

    `packing`: "concat" joins documents and cuts the whole into sequences, without padding; "best_fit" cuts none but those longer
    than a sequence, and pads. `prepared`: a folder that `ring-hilbert prepare-data` wrote; neither files nor tokenizer are needed
    then, what is not said here is as it was prepared (sources and their weights, tokenizer, bos, eval), and what is said must be
    so, but for weights. Without it a run prepares for itself, in `$HF_HOME/ring_hilbert`. `workers`: processes that tokenise
    (null: one per core).
    """

    sources: list[SourceConfig] | None = Field(default=None, min_length=1)
    tokenizer: str = "bytes"
    bos: bool | None = None
    seq_len: int = Field(ge=2)
    packing: Literal["concat", "best_fit"] = "concat"
    encoding_errors: Literal["strict", "replace"] = "strict"
    eval: EvalConfig | None = None
    prepared: str | None = None
    workers: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _from_somewhere(self) -> DataConfig:
        if self.sources is None and self.prepared is None:
            raise ValueError("give `sources` to read, or in `prepared` a folder that `ring-hilbert prepare-data` wrote")
        return self
