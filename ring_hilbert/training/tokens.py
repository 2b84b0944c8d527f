# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: loading one by name, text to token ids, and a digest that tells two of them apart."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase

Encoder = Callable[[list[str]], list[np.ndarray]]


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer `data.tokenizer` names: "bytes" (ByT5's, which needs no files) or a folder on disk.

    Raises:
        ValueError: the folder holds no tokenizer, or one without an end-of-sequence token to close documents with.
    """
    if name == "bytes":
        return ByT5Tokenizer()
    if not Path(name).is_dir():
        raise ValueError(f'data.tokenizer {name!r} is neither "bytes" nor a folder')
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"data.tokenizer {name!r} holds no tokenizer that AutoTokenizer can load: {error}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"data.tokenizer {name!r} has no eos token; documents need one at their end")
    return tokenizer


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over the files that the tokenizer saves: its whole behaviour, whatever folder it came from."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(Path(folder).rglob("*")):
            if file.is_file():
                digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def document_encoder(tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """A function from texts to one int32 array of token ids per text, its eos at the end.

    Bytes are encoded here and not by ByT5Tokenizer, which goes character by character in Python and would read the
    names of special tokens in a document, such as `</s>`, as those tokens.
    """
    eos = tokenizer.eos_token_id
    assert isinstance(eos, int)
    if isinstance(tokenizer, ByT5Tokenizer):
        first = tokenizer.convert_tokens_to_ids(chr(0))

        def encode(texts: list[str]) -> list[np.ndarray]:
            rows = (np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32) + first for text in texts)
            return [np.append(row, np.int32(eos)) for row in rows]
    else:

        def encode(texts: list[str]) -> list[np.ndarray]:
            rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            return [np.array([*row, eos], dtype=np.int32) for row in rows]

    return encode
