# SPDX-License-Identifier: Apache-2.0
"""`ring-hilbert score`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ring_hilbert.commands.mistakes import over_ranks
from ring_hilbert.commands.parser import add_command

SCORE = """\
loss of a saved model on documents, by position, alone or under torchrun; likelihood tasks of lm-eval

Score documents with a saved model: mean loss in nats per token, and by position. Nothing is generated.

examples:
  ring-hilbert score --model runs/quickstart/checkpoints/model --data /my/held_out --json score.json
  torchrun --nproc-per-node 8 -m ring_hilbert.cli score --model /my/model --data /my/rows.jsonl --seq-len 1048576
  ring-hilbert score --model /my/model --tasks my_task --include-path /my/tasks      # pip install 'ring_hilbert[lm-eval]'

Ranks share every sequence; each holds the whole model. A folder without ring_hilbert settings is scored with dense attention.
"""


def add_score(commands: Any) -> None:
    """`ring-hilbert score`: the loss of a saved model on documents, by position."""
    parser = add_command(commands, "score", SCORE, _score)
    parser.add_argument("--model", required=True, type=Path, metavar="FOLDER", help="a model saved for Transformers")
    parser.add_argument("--data", nargs="+", metavar="PATH", help="files, folders or globs of documents to score")
    parser.add_argument(
        "--field", default="text", help="where JSON values and Parquet rows hold the text; default: text"
    )
    parser.add_argument(
        "--tokenizer", metavar="NAME", help='a folder, or "bytes"; default: what the model was saved with'
    )
    parser.add_argument(
        "--bos", action=argparse.BooleanOptionalAction, default=None,
        help="documents begin with BOS or with nothing, as data.bos of the run said; default: as the tokenizer begins a text",
    )  # fmt: skip
    parser.add_argument(
        "--seq-len", type=int, metavar="S", help="tokens of a sequence; default: all the model's positions"
    )
    parser.add_argument("--sequences", type=int, metavar="N", help="score so many, spread evenly; default: all")
    parser.add_argument("--dtype", default="auto", help="of the weights; default: what the folder says")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    tasks = parser.add_argument_group("tasks of lm-eval, instead of --data")
    tasks.add_argument("--tasks", nargs="+", metavar="TASK", help="likelihood tasks: multiple choice, perplexity")
    tasks.add_argument("--include-path", metavar="FOLDER", help="where tasks of your own are")
    tasks.add_argument("--limit", type=int, metavar="N", help="examples of a task; default: all")


@over_ranks
def _score(chosen: argparse.Namespace) -> None:
    from ring_hilbert.bench.scoring import run

    try:
        run(chosen)
    except OSError as error:
        raise ValueError(str(error)) from error
