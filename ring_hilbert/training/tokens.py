# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: loading one by name, text to token ids, and a digest that distinguishes them."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

Encoder = Callable[[list[str]], list[np.ndarray]]


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer `data.tokenizer` names: "bytes" (ByT5's, which needs no files) or a folder on disk.

    Raises:
        ValueError: if the folder holds no tokenizer, or one without an end-of-sequence token to end documents with.
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


def refuse_other_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Refuse ids that mean other tokens to the model in a folder."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return
    try:
        theirs = {number: token for token, number in load_tokenizer(str(folder)).get_vocab().items()}
    except ValueError as error:
        raise ValueError(f"model.path: its tokenizer cannot be compared with data.tokenizer: {error}") from error
    for token, number in tokenizer.get_vocab().items():
        if theirs.get(number, token) != token:
            raise ValueError(
                f"data.tokenizer: its id {number} is {token!r}, and {theirs[number]!r} to the model in model.path; use "
                f"data.tokenizer: {folder}, or take the tokenizer out of that folder to train the model on another one"
            )


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over the files that the tokenizer saves: its whole behaviour, whatever folder it came from."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return saved_digest(Path(folder))


def saved_digest(folder: Path) -> str:
    """The `tokenizer_digest` of the tokenizer that was saved in a folder."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def document_prefix(tokenizer: PreTrainedTokenizerBase, bos: bool | None = None) -> list[int]:
    """The token ids that precede every document: `data.bos`.

    Args:
        tokenizer: from `load_tokenizer`.
        bos: True for the BOS token, False for nothing, None for what the tokenizer itself puts before a text, as its models
            expect: BOS for Llama and Gemma, nothing for GPT-2 and bytes.

    Raises:
        ValueError: if `bos` is True and the tokenizer has no BOS token, or None and its prefix cannot be told from a text.
    """
    if bos is None:
        text = tokenizer("a b", add_special_tokens=False)["input_ids"]
        whole = tokenizer("a b")["input_ids"]
        starts = [n for n in range(len(whole)) if text and whole[n : n + len(text)] == text]
        if whole and not starts:
            raise ValueError(
                f"data.bos is null, but what the tokenizer puts ahead of a text cannot be told: 'a b' is {text} to it, and with "
                f"special tokens {whole}; set data.bos to true or false"
            )
        return whole[: starts[-1]] if starts else []  # the last: "a b" may be unknown tokens, as may those before it
    if not bos:
        return []
    first = tokenizer.bos_token_id
    if not isinstance(first, int):
        raise ValueError("data.bos is true, but the tokenizer has no bos token; leave it out or set it to false")
    return [first]


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token id that ends every document; `load_tokenizer` accepts no tokenizer without one."""
    eos = tokenizer.eos_token_id
    assert isinstance(eos, int)
    return eos


def document_encoder(tokenizer: PreTrainedTokenizerBase, bos: bool | None = None) -> Encoder:
    """A function from texts to one int32 array of token ids per text: `document_prefix`, the text's own, eos.

    Special tokens spelt out in a text, such as `</s>`, are treated as text.

    Raises:
        ValueError: see `document_prefix`. From the function: if the tokenizer still reads such a spelling as the token.
    """
    encode = _text_encoder(tokenizer)
    prefix, eos = np.array(document_prefix(tokenizer, bos), dtype=np.int32), np.int32(eos_id(tokenizer))
    return lambda texts: [np.concatenate([prefix, ids, [eos]], dtype=np.int32) for ids in encode(texts)]


def _text_encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[str]], list[Any]]:
    """From texts to the ids of each, as a list or an array, without added special tokens."""
    if isinstance(tokenizer, ByT5Tokenizer):
        # not by itself: it works character by character in Python, and reads the names of special tokens as tokens
        first = tokenizer.convert_tokens_to_ids(chr(0))
        return lambda texts: [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32) + first for text in texts]
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        backend = _without_spellings(tokenizer)
        return lambda texts: [found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=False)]
    special = {token for token in tokenizer.all_special_ids if token != tokenizer.unk_token_id}

    def encode(texts: list[str]) -> list[list[int]]:
        rows = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        for row in rows:
            if not special.isdisjoint(row):
                raise ValueError(
                    f"a document spells one of {tokenizer.all_special_tokens}, and {type(tokenizer).__name__} reads it as that "
                    "token; use a tokenizer with a tokenizer.json"
                )
        return rows

    return encode


def _without_spellings(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy whose special tokens have names that occur in no text.

    `split_special_tokens` is not enough: the vocabularies of Unigram and word models hold those names too, and match them.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    added, model = state["added_tokens"], state["model"]
    special = {*tokenizer.all_special_tokens, *(token["content"] for token in added if token["special"])}
    names = {name: hashlib.sha256(name.encode()).hexdigest() for name in special}
    for token in added:
        token["content"] = names.get(token["content"], token["content"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): number for piece, number in model["vocab"].items()}
    else:
        model["vocab"] = [(names.get(piece, piece), score) for piece, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if special.isdisjoint((*pair, "".join(pair)))]
    return Tokenizer.from_str(json.dumps(state | {"truncation": None, "padding": None}))
