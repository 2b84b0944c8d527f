# SPDX-License-Identifier: Apache-2.0
"""`ring-hilbert convert` and `export`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ring_hilbert.commands.mistakes import in_one_line
from ring_hilbert.commands.parser import add_command, add_overrides

CONVERT = """\
write a checkpoint in the form that every engine loads

Write a checkpoint of any engine as safetensors and JSON, from which a run with any other engine, ZeRO stage or number
of ranks goes on. One process, on the CPU; the checkpoint stays as it is.

examples:
  ring-hilbert convert runs/zero/checkpoints runs/zero/common --trust
  torchrun --nproc-per-node 4 -m ring_hilbert.cli pretrain --config run.yaml engine=torch checkpoint.dir=runs/zero/common

The run goes on there with its optimizer's state, from the same place in its data, with any engine on any number of ranks.
"""


def add_convert(commands: Any) -> None:
    """`ring-hilbert convert`: a checkpoint of any engine in the form that every engine loads."""
    parser = add_command(commands, "convert", CONVERT, _convert)
    parser.add_argument("source", type=Path, metavar="FROM", help="the checkpoint.dir of a run")
    parser.add_argument("target", type=Path, metavar="TO", help="the checkpoint.dir of the run that will go on")
    parser.add_argument("--step", type=int, metavar="N", help="the checkpoint of this step; default: the newest")
    parser.add_argument(
        "--trust", action="store_true", help="the files are mine: DeepSpeed's are pickles, which can run any code"
    )


@in_one_line
def _convert(chosen: argparse.Namespace) -> None:
    from ring_hilbert.training.convert import convert

    print(f"written: {convert(chosen.source, chosen.target, chosen.step, chosen.trust)}")


EXPORT = """\
write the model of a checkpoint as a folder that Transformers loads

Write the model of a checkpoint, with its configuration and tokenizer, as a folder for from_pretrained. One process, on
the CPU; a run in the same folder may go on meanwhile.

example:
  ring-hilbert export --config configs/quickstart.yaml --step 100 runs/quickstart/model-100
"""


def add_export(commands: Any) -> None:
    """`ring-hilbert export`: the model of a checkpoint as a Transformers folder."""
    parser = add_command(commands, "export", EXPORT, _export)
    parser.add_argument(
        "target", type=Path, metavar="TO", help="the folder to write; an older export there is replaced"
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the YAML file of the run")
    parser.add_argument("--stage", metavar="NAME", help="of a file with stages; default: the last")
    parser.add_argument("--step", type=int, metavar="N", help="the checkpoint of this step; default: the newest")
    add_overrides(parser)


@in_one_line
def _export(chosen: argparse.Namespace) -> None:
    from ring_hilbert.training.config import load_config
    from ring_hilbert.training.convert import export_checkpoint

    config = load_config(chosen.config, chosen.overrides, chosen.stage)
    print(f"model of {export_checkpoint(config, chosen.target, chosen.step)}: {chosen.target}")
