# SPDX-License-Identifier: Apache-2.0
"""A run small enough for tests: two layers, 256 tokens, byte tokens, text written on the spot."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ring_hilbert.training.config import RunConfig

VOCAB = 259  # ByT5's: 3 special tokens and 256 bytes
SEQ_LEN = 256


def write_texts(folder: Path) -> None:
    """`folder/train` and `folder/eval` with documents that a small model learns something of."""
    words = ["segment", "branch", "offset", "visit", "plan", "exchange", "shard", "order", "row", "curve"]
    chooser = random.Random(0)
    for split, documents in (("train", 30), ("eval", 3)):
        (folder / split).mkdir(parents=True)
        for number in range(documents):
            text = " ".join(chooser.choices(words, k=chooser.randrange(40, 120)))
            (folder / split / f"{number:02d}.txt").write_text(text)


def tiny_config(folder: Path, **changes: Any) -> RunConfig:
    """A whole configuration below `folder`; `changes` are values by dotted key with `__` for the dot."""
    raw: dict[str, Any] = {
        "model": {
            "config": {
                "model_type": "llama",
                "vocab_size": VOCAB,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "tie_word_embeddings": True,
            }
        },
        "attention": {
            "segment_lengths": [64, 256],
            "dilation_rates": [1, 4],
            "head_shift": "auto",
            "order": {"curve": "hilbert", "block": 64},
        },
        "data": {
            "sources": [{"path": str(folder / "train")}],
            "seq_len": SEQ_LEN,
            "eval": {"path": str(folder / "eval"), "every": 10},
        },
        "optim": {"lr": 3e-3, "warmup_steps": 4},
        "train": {"steps": 20, "global_batch_tokens": 4 * SEQ_LEN, "checkpoint_activations": False, "probe": False},
        "checkpoint": {"dir": str(folder / "checkpoints"), "every": 10},
        "log": {"dir": str(folder / "logs"), "tensorboard": False, "memory_plan": False},
    }
    for dotted, value in changes.items():
        *parents, key = dotted.split("__")
        section = raw
        for parent in parents:
            section = section.setdefault(parent, {})
        section[key] = value
    return RunConfig.model_validate(raw)


class PaddedDataset:
    """`size` numbered sequences of documents; some end in padding, some are nothing else.

    In every four sequences the second is padding in its last three quarters and the fourth in all of it, so that some sp rank,
    and some dp rank, has only padding.
    """

    def __init__(self, size: int = 80) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(3, 30, (SEQ_LEN,), generator=generator)
        ids[1::2] = ids[::2]  # something to learn
        documents = torch.arange(SEQ_LEN) // 100
        real = (SEQ_LEN, SEQ_LEN // 4, SEQ_LEN - 7, 0)[number % 4]
        ids[real:], documents[real:] = 0, -1
        return {"input_ids": ids.numpy(), "document_ids": documents.numpy()}
