# SPDX-License-Identifier: Apache-2.0
"""`ring-hilbert score`: from flags to figures, printed and written as JSON."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from ring_hilbert.training.config import DataConfig, EvalConfig, ParallelConfig, SourceConfig
from ring_hilbert.training.likelihood import evaluate_tasks
from ring_hilbert.training.score import Scorer, score
from ring_hilbert.training.tokens import load_tokenizer
from ring_hilbert.training.world import open_world


def run(chosen: argparse.Namespace) -> None:
    """Score, print the figures, and write them to `--json`.

    Raises:
        ValueError: for flags that do not go together, and what `Scorer`, `score` and `evaluate_tasks` raise.
    """
    if (chosen.data is None) == (chosen.tasks is None):
        raise ValueError("give either --data PATH ... or --tasks TASK ...")
    with open_world(ParallelConfig(sp=int(os.environ.get("WORLD_SIZE", "1")))) as world:
        with world.together():
            scorer = Scorer(chosen.model, world, chosen.dtype)
        tokenizer = chosen.tokenizer or str(chosen.model)
        if chosen.tasks is None:
            found = _documents(scorer, chosen, tokenizer)
        else:
            with world.together():
                loaded = load_tokenizer(tokenizer)
            found = evaluate_tasks(scorer, loaded, chosen.tasks, chosen.include_path, chosen.limit)
        if not world.is_main:
            return
        found = {"model": str(chosen.model), "ranks": world.size, **found}
        for line in _page(found):
            print(line)
        if chosen.json is not None:
            chosen.json.parent.mkdir(parents=True, exist_ok=True)
            chosen.json.write_text(json.dumps(found, indent=2) + "\n")
            print(f"written: {chosen.json}")


def _documents(scorer: Scorer, chosen: argparse.Namespace, tokenizer: str) -> dict[str, Any]:
    length = chosen.seq_len or scorer.longest
    if length is None or length < 2:
        raise ValueError(f"--seq-len {length} must be at least 2; this model does not say how many positions it has")
    held_out = EvalConfig(path=chosen.data, field=chosen.field, sequences=chosen.sequences)
    sources = [SourceConfig(path=chosen.data)]
    data = DataConfig(sources=sources, tokenizer=tokenizer, bos=chosen.bos, seq_len=length, eval=held_out)
    found = score(scorer, data)
    positions = {str(first): loss for first, loss in found.by_position().items()}
    return {
        "data": chosen.data,
        "seq_len": length,
        "tokens": found.tokens,
        "loss": found.loss,
        "loss_by_position": positions,
    }


def _page(found: dict[str, Any]) -> list[str]:
    if "tasks" in found:
        return [f"{task:32}{name:24}{value:10.4f}" for task, v in found["tasks"].items() for name, value in v.items()]
    lines = [f"loss {found['loss']:.4f} nats per token over {found['tokens']:,} tokens", "", "after token        loss"]
    return lines + [f"{int(first):>11,}{loss:12.4f}" for first, loss in found["loss_by_position"].items()]
