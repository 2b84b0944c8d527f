# SPDX-License-Identifier: Apache-2.0
"""`ring-hilbert prepare-data` and `data-info`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ring_hilbert.commands.mistakes import in_one_line
from ring_hilbert.commands.parser import add_command, add_config_or_flags

PREPARE = """\
tokenise on all cores into a folder that runs read, wherever they are

Tokenise the documents of a run into a folder of memory-mapped files: data.prepared of runs that read it.

examples:
  ring-hilbert prepare-data --config configs/llama_1b_1m.yaml data.tokenizer=/my/tokenizer data.prepared=/data/tokens
  ring-hilbert prepare-data --sources /my/texts /my/rows.jsonl.gz --tokenizer /my/tokenizer --output /data/tokens
  torchrun --nproc-per-node 8 -m ring_hilbert.cli pretrain --config configs/llama_1b_1m.yaml \\
      data.sources=null data.tokenizer=/my/tokenizer data.prepared=/data/tokens

Interrupted, the same command goes on from where it was. The folder may be copied to any machine, and any number of ranks read it.
"""


def add_prepare_data(commands: Any) -> None:
    """`ring-hilbert prepare-data`: tokenise once, for runs anywhere."""
    parser = add_command(commands, "prepare-data", PREPARE, _prepare_data)
    asked = add_config_or_flags(parser)
    asked.add_argument("--sources", nargs="+", metavar="PATH", help="files, folders or globs, each a source of its own")
    asked.add_argument("--eval", nargs="+", metavar="PATH", help="files, folders or globs that are held out")
    asked.add_argument("--tokenizer", default="bytes", metavar="FOLDER", help="default: bytes")
    asked.add_argument(
        "--field", default="text", help="where JSON values and Parquet rows hold the text; default: text"
    )
    parser.add_argument("--output", metavar="FOLDER", help="the folder to write; default: data.prepared")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that tokenise; default: one per core")


@in_one_line
def _prepare_data(chosen: argparse.Namespace) -> None:
    from ring_hilbert.training.config import DataConfig, load_stages
    from ring_hilbert.training.prepared import prepare

    if (chosen.config is None) == (chosen.sources is None):
        raise ValueError("give either --config FILE or --sources PATH ...")
    if chosen.config is None and chosen.overrides:
        raise ValueError(f"{chosen.overrides[0]!r} replaces a value of --config FILE, which is not given")
    if chosen.config is not None:
        stages = [config.data for config in load_stages(chosen.config, chosen.overrides).values()]
    else:
        sources = [{"path": path, "field": chosen.field} for path in chosen.sources]
        held_out = None if chosen.eval is None else {"path": chosen.eval, "field": chosen.field}
        raw = {"sources": sources, "eval": held_out, "tokenizer": chosen.tokenizer, "seq_len": 2}
        stages = [DataConfig.model_validate(raw)]
    flags = {"prepared": chosen.output, "workers": chosen.workers}
    for data in stages:  # those of the same documents find them done
        prepare(data.model_copy(update={key: value for key, value in flags.items() if value is not None}), print)


INFO = """\
what is in a folder of prepared data: documents by length, tokens by source, packing, a sample

Show what is in a folder that prepare-data wrote, after checking that it is in order.

example:
  ring-hilbert data-info /data/tokens --seq-len 8192 131072 --verify
"""


def add_data_info(commands: Any) -> None:
    """`ring-hilbert data-info`: what is in a folder of prepared data."""
    parser = add_command(commands, "data-info", INFO, _data_info)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument(
        "--seq-len", type=int, nargs="+", default=[8192, 131072], metavar="S",
        help="tokens of a sequence, for the padding and the cuts of each packing; default: 8192 131072",
    )  # fmt: skip
    parser.add_argument("--sample", type=int, default=200, metavar="N", help="tokens that are decoded; default: 200")
    parser.add_argument("--verify", action="store_true", help="compare all tokens with their checksum, not some")


@in_one_line
def _data_info(chosen: argparse.Namespace) -> None:
    from ring_hilbert.training.data_info import report

    for line in report(chosen.folder, chosen.seq_len, chosen.sample, chosen.verify):
        print(line, flush=True)
