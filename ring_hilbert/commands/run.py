# SPDX-License-Identifier: Apache-2.0
"""`ring-hilbert pretrain`."""

from __future__ import annotations

import argparse
from typing import Any

from ring_hilbert.commands.mistakes import over_ranks
from ring_hilbert.commands.parser import add_command, add_overrides

PRETRAIN = """\
train a language model, alone or under torchrun

Pretrain a Transformers causal language model with dilated attention, as a YAML file says.

examples:
  ring-hilbert pretrain --config configs/quickstart.yaml parallel.sp=1 train.steps=20
  torchrun --nproc-per-node 2 -m ring_hilbert.cli pretrain --config configs/quickstart.yaml
  ring-hilbert pretrain --dry-run --config configs/llama_1b_1m.yaml parallel.sp=64

A run goes on from the newest checkpoint in checkpoint.dir, if there is one. Ranks use Gloo on the CPU, NCCL with CUDA devices.
"""


def add_pretrain(commands: Any) -> None:
    """`ring-hilbert pretrain`: train a Transformers model from a YAML file."""
    parser = add_command(commands, "pretrain", PRETRAIN, _pretrain)
    parser.add_argument("--config", required=True, metavar="FILE", help="the YAML file of the run; see configs/")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="train nothing: say, from one process and for all ranks of the run, what would travel and what a rank would hold",
    )
    add_overrides(parser)


@over_ranks
def _pretrain(chosen: argparse.Namespace) -> None:
    # Imported here so that --help answers at once.
    from ring_hilbert.training.config import load_stages
    from ring_hilbert.training.loop import pretrain_stages

    if chosen.dry_run:
        _dry_run(chosen)
    else:
        pretrain_stages(load_stages(chosen.config, chosen.overrides))


def _dry_run(chosen: argparse.Namespace) -> None:
    from ring_hilbert.bench import planning
    from ring_hilbert.parallel.choice import Speeds
    from ring_hilbert.training.config import load_stages
    from ring_hilbert.training.engine import check_engine
    from ring_hilbert.training.fitting import fit

    for name, config in load_stages(chosen.config, chosen.overrides).items():
        check_engine(config)
        parallel, length = config.parallel, config.data.seq_len
        micro_steps = config.sequences_per_step // (parallel.dp * config.train.micro_batch)
        print(
            (f"stage {name}: " if name else "")
            + f"{parallel.world_size} ranks, dp_replicate {parallel.dp_replicate} * dp_shard {parallel.dp_shard} * "
            f"sp {parallel.sp}; "
            f"a step is {_counted(config.sequences_per_step, 'sequence')} of {length:,} tokens in "
            f"{_counted(micro_steps, 'micro-step')}, "
            f"{-(-length // parallel.sp):,} rows per rank and sequence\n"
        )
        question, speeds = planning.question_of(config), Speeds(300e12, 50e9)
        print(planning.report(question, planning.answer(question, speeds), speeds, [speeds.link]))
        fitted = fit(config, None, cuda=True)
        if fitted.refusal:
            raise ValueError(fitted.refusal)
        print(f"\nmemory: {fitted.taken(config)}\n")


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
