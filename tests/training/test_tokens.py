# SPDX-License-Identifier: Apache-2.0
"""Texts to token ids: what stands ahead of a document and behind it, and that what is spelt in a text stays text."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

from ring_hilbert.training.tokens import document_encoder, document_prefix, load_tokenizer

SPECIAL = ["<unk>", "<s>", "</s>"]
CORPUS = ["the quick brown fox <s> jumps </s> over <unk> lazy dogs", "s / < > < / s > u n k | i m"] * 50
KEYS = {"special_tokens": SPECIAL, "show_progress": False}
MODELS: dict[str, tuple[Any, Any, Any]] = {
    "unigram": (
        models.Unigram(),
        pre_tokenizers.Metaspace(),
        trainers.UnigramTrainer(vocab_size=90, unk_token="<unk>", **KEYS),
    ),
    "bpe of bytes": (models.BPE(), pre_tokenizers.ByteLevel(False), trainers.BpeTrainer(vocab_size=400, **KEYS)),
    "bpe": (models.BPE(unk_token="<unk>"), pre_tokenizers.Metaspace(), trainers.BpeTrainer(vocab_size=100, **KEYS)),
    "wordpiece": (
        models.WordPiece(unk_token="<unk>"),
        pre_tokenizers.BertPreTokenizer(),
        trainers.WordPieceTrainer(vocab_size=100, **KEYS),
    ),
    "words": (
        models.WordLevel(unk_token="<unk>"),
        pre_tokenizers.WhitespaceSplit(),
        trainers.WordLevelTrainer(**KEYS),
    ),
}


@cache
def trained(kind: str) -> str:
    """A small tokenizer of that model type, with special and other added tokens."""
    model, split, trainer = MODELS[kind]
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = split
    if kind == "bpe of bytes":
        tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<|im|>", special=True), AddedToken("<think>", special=False)])
    return tokenizer.to_str()


def make(kind: str, template: str | None = None) -> PreTrainedTokenizerFast:
    """The same that puts `template` around a text."""
    inner = Tokenizer.from_str(trained(kind))
    if template is not None:
        names = [(name, inner.token_to_id(name)) for name in SPECIAL]
        inner.post_processor = TemplateProcessing(single=template, special_tokens=names)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@given(st.text(max_size=60))
def test_bytes_are_byt5_ids(document: str) -> None:
    tokenizer = ByT5Tokenizer()
    if any(name in document for name in tokenizer.all_special_tokens):
        return
    ids = document_encoder(load_tokenizer("bytes"))([document])[0]
    assert ids.tolist() == tokenizer(document)["input_ids"]


def test_names_of_special_tokens_in_a_document_are_text() -> None:
    ids = document_encoder(load_tokenizer("bytes"))(["</s><pad><extra_id_0>"])[0]
    assert bytes((ids[:-1] - 3).tolist()) == b"</s><pad><extra_id_0>"
    assert (ids[:-1] > 2).all()
    assert ids.max() < 259


@pytest.mark.parametrize("kind", MODELS)
def test_special_tokens_spelt_in_a_text_are_text(kind: str) -> None:
    tokenizer = make(kind)
    encode = document_encoder(tokenizer)
    special = set(tokenizer.convert_tokens_to_ids(["<s>", "</s>", "<|im|>"]))
    for spelt in ("</s>", "fox</s>dogs", "<s> fox </s> <|im|> dogs", "<unk>"):
        ids = encode([spelt])[0].tolist()
        assert ids[-1] == tokenizer.eos_token_id
        assert special.isdisjoint(ids[:-1]), "no such token"
        assert len(ids) > 1, "and not left out"
    if "bytes" in kind:
        assert tokenizer.decode(encode(["a</s><unk><|im|>"])[0][:-1]) == "a</s><unk><|im|>"


@pytest.mark.parametrize("kind", MODELS)
def test_other_texts_are_what_the_tokenizer_says(kind: str) -> None:
    tokenizer = make(kind)
    texts = ["the quick brown fox", "lazy <think> dogs  /s> jumps", "dög"]
    assert [ids.tolist() for ids in document_encoder(tokenizer)(texts)] == [
        [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in texts
    ]
    assert document_encoder(tokenizer)([]) == []


def test_truncation_and_padding_of_the_tokenizer_do_not_touch_documents() -> None:
    tokenizer = make("words")
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=20)
    assert [len(ids) for ids in document_encoder(tokenizer)(["fox", "the quick brown fox"])] == [2, 5]


class Words(PreTrainedTokenizer):
    """A tokenizer in Python whose own vocabulary holds the names of special tokens."""

    def __init__(self, **keys: Any) -> None:
        self.words = ["<unk>", "</s>", "fox"]
        super().__init__(unk_token="<unk>", eos_token="</s>", **keys)

    @property
    def vocab_size(self) -> int:  # noqa: D102
        return len(self.words)

    def get_vocab(self) -> dict[str, int]:  # noqa: D102
        return {word: number for number, word in enumerate(self.words)}

    def _tokenize(self, text: str, **keys: Any) -> list[str]:
        return text.split()

    def _convert_token_to_id(self, token: str) -> int:
        return self.words.index(token) if token in self.words else 0

    def build_inputs_with_special_tokens(self, token_ids_0: list[int], token_ids_1: Any = None) -> list[int]:  # noqa: D102
        return token_ids_0

    def _convert_id_to_token(self, index: int) -> str:
        return self.words[index]


def test_a_tokenizer_that_reads_a_spelling_as_the_token_is_refused() -> None:
    encode = document_encoder(Words())
    assert encode(["fox dog"])[0].tolist() == [2, 0, 1]
    with pytest.raises(ValueError, match=r"Words reads it as that token; use a tokenizer with a tokenizer\.json"):
        encode(["fox", "fox </s> fox"])


@pytest.mark.parametrize(
    ("template", "bos", "prefix"),
    [
        (None, None, []),
        ("<s> $A", None, ["<s>"]),
        ("<s> $A </s>", None, ["<s>"]),
        ("$A </s>", None, []),
        ("</s> $A", None, ["</s>"]),  # as OPT and XGLM have it
        ("<s> <unk> $A", None, ["<s>", "<unk>"]),
        ("<s> $A", False, []),
        (None, True, ["<s>"]),
        ("$A </s>", True, ["<s>"]),
    ],
)
@pytest.mark.parametrize("kind", MODELS)
def test_documents_begin_as_the_tokenizer_says_or_as_they_are_told(
    kind: str, template: str | None, bos: bool | None, prefix: list[str]
) -> None:
    tokenizer = make(kind, template)
    plain = document_encoder(make(kind))(["lazy dogs"])[0]
    ids = document_encoder(tokenizer, bos)(["lazy dogs"])[0]
    assert ids.dtype == np.int32
    assert ids.tolist() == [*tokenizer.convert_tokens_to_ids(prefix), *plain.tolist()]


def test_what_cannot_be_told_of_the_beginning_must_be_said() -> None:
    """A tokenizer that leaves out what it has no token for tells nothing by a text of such characters."""
    inner = Tokenizer(models.BPE(vocab={"A": 0, "C": 1, "<s>": 2, "</s>": 3}, merges=[]))
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    assert document_prefix(PreTrainedTokenizerFast(tokenizer_object=inner, **names)) == []
    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **names)
    with pytest.raises(
        ValueError, match=r"cannot be told: 'a b' is \[\] to it, and with special tokens \[2\]; set data.bos"
    ):
        document_encoder(tokenizer)
    assert document_encoder(tokenizer, True)(["CA"])[0].tolist() == [2, 1, 0, 3]


def test_bytes_begin_with_nothing_and_have_no_bos() -> None:
    assert document_prefix(load_tokenizer("bytes")) == []
    with pytest.raises(ValueError, match=r"data\.bos is true, but the tokenizer has no bos token"):
        document_encoder(load_tokenizer("bytes"), True)
