# SPDX-License-Identifier: Apache-2.0
"""The command line: `ring-hilbert <command> ...`. A command is a function that adds its parser; see `COMMANDS`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

PRETRAIN_EXAMPLES = """\
examples:
  ring-hilbert pretrain --config configs/quickstart.yaml parallel.sp=1 train.steps=20
  torchrun --nproc-per-node 2 -m ring_hilbert.cli pretrain --config configs/quickstart.yaml
  ring-hilbert pretrain --dry-run --config configs/llama_1b_1m.yaml parallel.sp=64

A run goes on from the newest checkpoint in checkpoint.dir, if there is one. Ranks use Gloo on the CPU, NCCL with CUDA devices.
"""


def add_pretrain(commands: Any) -> None:
    """`ring-hilbert pretrain`: train a Transformers model from a YAML file."""
    parser = commands.add_parser(
        "pretrain",
        help="train a language model, alone or under torchrun",
        description="Pretrain a Transformers causal language model with dilated attention, as a YAML file says.",
        epilog=PRETRAIN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the YAML file of the run; see configs/")
    parser.add_argument(
        "--dry-run", action="store_true",
        help="train nothing: say, from one process and for all ranks of the run, what would travel and what a rank would hold",
    )  # fmt: skip
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.sub=value",
        help="replaces a value of the file, e.g. train.steps=20 optim.lr=1e-3",
    )
    parser.set_defaults(run=_pretrain)


PREPARE_EXAMPLES = """\
examples:
  ring-hilbert prepare-data --config configs/llama_1b_1m.yaml data.tokenizer=/my/tokenizer data.prepared=/data/tokens
  ring-hilbert prepare-data --sources /my/texts /my/rows.jsonl.gz --tokenizer /my/tokenizer --output /data/tokens
  torchrun --nproc-per-node 8 -m ring_hilbert.cli pretrain --config configs/llama_1b_1m.yaml \\
      data.sources=null data.tokenizer=/my/tokenizer data.prepared=/data/tokens

Interrupted, the same command goes on from where it was. The folder may be copied to any machine, and any number of ranks read it.
"""


def add_prepare_data(commands: Any) -> None:
    """`ring-hilbert prepare-data`: tokenise once, for runs anywhere."""
    parser = commands.add_parser(
        "prepare-data",
        help="tokenise on all cores into a folder that runs read, wherever they are",
        description="Tokenise the documents of a run into a folder of memory-mapped files: data.prepared of runs that read it.",
        epilog=PREPARE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="the YAML file of a run, instead of the flags below"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="replaces a value of the file")
    asked = parser.add_argument_group("without --config")
    asked.add_argument("--sources", nargs="+", metavar="PATH", help="files, folders or globs, each a source of its own")
    asked.add_argument("--eval", nargs="+", metavar="PATH", help="files, folders or globs that are held out")
    asked.add_argument("--tokenizer", default="bytes", metavar="FOLDER", help="default: bytes")
    asked.add_argument(
        "--field", default="text", help="where JSON values and Parquet rows hold the text; default: text"
    )
    parser.add_argument("--output", metavar="FOLDER", help="the folder to write; default: data.prepared")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that tokenise; default: one per core")
    parser.set_defaults(run=_prepare_data)


def add_data_info(commands: Any) -> None:
    """`ring-hilbert data-info`: what is in a folder of prepared data."""
    parser = commands.add_parser(
        "data-info",
        help="what is in a folder of prepared data: documents by length, tokens by source, packing, a sample",
        description="Show what is in a folder that prepare-data wrote, after checking that it is in order.",
        epilog="example:\n  ring-hilbert data-info /data/tokens --seq-len 8192 131072 --verify",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument(
        "--seq-len", type=int, nargs="+", default=[8192, 131072], metavar="S",
        help="tokens of a sequence, for the padding and the cuts of each packing; default: 8192 131072",
    )  # fmt: skip
    parser.add_argument("--sample", type=int, default=200, metavar="N", help="tokens that are decoded; default: 200")
    parser.add_argument("--verify", action="store_true", help="compare all tokens with their checksum, not some")
    parser.set_defaults(run=_data_info)


CONVERT_EXAMPLES = """\
examples:
  ring-hilbert convert runs/zero/checkpoints runs/zero/common --trust
  torchrun --nproc-per-node 4 -m ring_hilbert.cli pretrain --config run.yaml engine=torch checkpoint.dir=runs/zero/common

The run goes on there with its optimizer's state, from the same place in its data, with any engine on any number of ranks.
"""


def add_convert(commands: Any) -> None:
    """`ring-hilbert convert`: a checkpoint of any engine in the form that every engine loads."""
    parser = commands.add_parser(
        "convert",
        help="write a checkpoint in the form that every engine loads",
        description="Write a checkpoint of any engine as safetensors and JSON, from which a run with any other engine, ZeRO stage "
        "or number of ranks goes on. One process, on the CPU; the checkpoint stays as it is.",
        epilog=CONVERT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, metavar="FROM", help="the checkpoint.dir of a run")
    parser.add_argument("target", type=Path, metavar="TO", help="the checkpoint.dir of the run that will go on")
    parser.add_argument("--step", type=int, metavar="N", help="the checkpoint of this step; default: the newest")
    parser.add_argument(
        "--trust", action="store_true", help="the files are mine: DeepSpeed's are pickles, which can run any code"
    )
    parser.set_defaults(run=_convert)


def add_export(commands: Any) -> None:
    """`ring-hilbert export`: the model of a checkpoint as a Transformers folder."""
    parser = commands.add_parser(
        "export",
        help="write the model of a checkpoint as a folder that Transformers loads",
        description="Write the model of a checkpoint, with its configuration and tokenizer, as a folder for from_pretrained. One "
        "process, on the CPU; a run in the same folder may go on meanwhile.",
        epilog="example:\n  ring-hilbert export --config configs/quickstart.yaml --step 100 runs/quickstart/model-100",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "target", type=Path, metavar="TO", help="the folder to write; an older export there is replaced"
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the YAML file of the run")
    parser.add_argument("--stage", metavar="NAME", help="of a file with stages; default: the last")
    parser.add_argument("--step", type=int, metavar="N", help="the checkpoint of this step; default: the newest")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="replaces a value of the file")
    parser.set_defaults(run=_export)


SCORE_EXAMPLES = """\
examples:
  ring-hilbert score --model runs/quickstart/checkpoints/final --data /my/held_out --json score.json
  torchrun --nproc-per-node 8 -m ring_hilbert.cli score --model /my/model --data /my/rows.jsonl --seq-len 1048576
  ring-hilbert score --model /my/model --tasks my_task --include-path /my/tasks      # pip install 'ring_hilbert[lm-eval]'

Ranks share every sequence; each holds the whole model. A folder without ring_hilbert settings is scored with dense attention.
"""


def add_score(commands: Any) -> None:
    """`ring-hilbert score`: the loss of a saved model on documents, by position."""
    parser = commands.add_parser(
        "score",
        help="loss of a saved model on documents, by position, alone or under torchrun; likelihood tasks of lm-eval",
        description="Score documents with a saved model: mean loss in nats per token, and by position. Nothing is generated.",
        epilog=SCORE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, type=Path, metavar="FOLDER", help="a model saved for Transformers")
    parser.add_argument("--data", nargs="+", metavar="PATH", help="files, folders or globs of documents to score")
    parser.add_argument(
        "--field", default="text", help="where JSON values and Parquet rows hold the text; default: text"
    )
    parser.add_argument(
        "--tokenizer", metavar="NAME", help='a folder, or "bytes"; default: what the model was saved with'
    )
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
    parser.set_defaults(run=_score)


def add_bench(commands: Any) -> None:
    """`ring-hilbert bench <measurement>`: measure and keep the rows; each measurement declares its own flags."""
    from ring_hilbert.bench.command import add_measurements

    parser = commands.add_parser(
        "bench",
        help="measure, and append rows to a CSV file",
        description="Measure, print, and append a row per figure to a CSV file, with date, commit, device and versions.",
    )
    add_measurements(parser)
    parser.set_defaults(run=_bench)


PLAN_EXAMPLES = """\
examples:
  ring-hilbert plan --config configs/quickstart.yaml parallel.sp=4
  ring-hilbert plan --length 1048576 --ranks 64 --heads 32 --head-dim 128 \\
      --segment-lengths 2048 8192 32768 all --dilation-rates 1 4 16 64 --link-gbps 25 50 450 --plot needs.png
"""


def add_plan(commands: Any) -> None:
    """`ring-hilbert plan`: what every strategy costs, before anything runs."""
    parser = commands.add_parser(
        "plan",
        help="what every strategy sends, computes and holds, and which one auto takes",
        description="Bytes, FLOPs, balance, memory and seconds of every strategy, for the configuration of a run or for flags.",
        epilog=PLAN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="the YAML file of a run, instead of the flags below"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="replaces a value of the file")
    asked = parser.add_argument_group("without --config")
    asked.add_argument("--length", type=int, metavar="S", help="rows of the sequence")
    asked.add_argument("--ranks", type=int, metavar="P", help="ranks of the sequence-parallel group")
    asked.add_argument("--segment-lengths", type=_length, nargs="+", metavar="W", help="or 'all'")
    asked.add_argument("--dilation-rates", type=int, nargs="+", metavar="R")
    asked.add_argument("--heads", type=int, default=32, metavar="H", help="default: 32")
    asked.add_argument("--kv-heads", type=int, metavar="HKV", help="default: as many as --heads")
    asked.add_argument("--head-dim", type=int, default=128, metavar="D", help="default: 128")
    asked.add_argument("--batch", type=int, default=1, metavar="B", help="default: 1")
    asked.add_argument(
        "--dtype", default="bfloat16", choices=["float16", "bfloat16", "float32", "float64"], help="default: bfloat16"
    )
    asked.add_argument("--full", action="store_true", help="not causal")
    asked.add_argument("--layout", default="contiguous", help="contiguous (default) or zigzag")
    asked.add_argument("--strategy", default="auto", help="exchange, ring, ulysses or auto (default)")
    asked.add_argument("--curve", help="token order: hilbert, morton, peano, snake or raster")
    asked.add_argument("--block", type=int, metavar="N", help="tokens that the curve orders at a time")
    parser.add_argument(
        "--link-gbps", type=float, nargs="+", default=[50.0], metavar="GB/S",
        help="gigabytes per second that a rank receives; auto takes the first; default: 50",
    )  # fmt: skip
    parser.add_argument("--ranks-per-host", type=int, metavar="N", help="say what crosses hosts of so many ranks")
    parser.add_argument("--tflops", type=float, default=300.0, metavar="X", help="of attention on a rank; default: 300")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw who needs whose rows: .png or .svg")
    parser.set_defaults(run=_plan)


def add_check(commands: Any) -> None:
    """`ring-hilbert check`: whether these ranks compute the right thing, and how fast they are joined."""
    parser = commands.add_parser(
        "check",
        help="equality with one rank, link bandwidth and versions on these ranks: OK, or what to do",
        description="Check the operator on the ranks at hand: every strategy against one rank, the links, the versions.",
        epilog="example:\n  torchrun --nproc-per-node 8 -m ring_hilbert.cli check",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--timeout", type=float, default=60.0, metavar="S", help="seconds to wait for another rank; default: 60"
    )
    parser.set_defaults(run=_check)


PLOT_EXAMPLES = """\
pictures (--what):
  overview   the mask of a row, the curve, and who reads whose rows: the picture of the README
  mask       how often each key counts for each query: by row, and by natural token
  order      the curve over one block or grid
  coverage   the tokens that a token reaches through one layer and through two, and the share of those it may see
  shards     who owns which tokens, and whose rows each rank reads

examples:
  ring-hilbert plot idea.png
  ring-hilbert plot blind.svg --what coverage --kv-heads 2 --head-shift 0 2 --segment-shift 0 32
  ring-hilbert plot shards.png --what shards --grid 32 32 --length 1024 --ranks 8
"""


def add_plot(commands: Any) -> None:
    """`ring-hilbert plot`: draw a pattern, its order, what it covers and its shards."""
    parser = commands.add_parser(
        "plot",
        help="draw a pattern, its token order, what it covers and its shards",
        description="Draw what a pattern does, as PNG or SVG by the ending of FILE.",
        epilog=PLOT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("output", type=Path, metavar="FILE", help="a .png or .svg file")
    parser.add_argument("--what", default="overview", metavar="PICTURE", help="default: overview")
    parser.add_argument(
        "--segment-lengths", type=_length, nargs="+", default=[64, 128, 256], metavar="W",
        help="or 'all'; default: 64 128 256",
    )  # fmt: skip
    parser.add_argument("--dilation-rates", type=int, nargs="+", default=[1, 2, 8], metavar="R", help="default: 1 2 8")
    parser.add_argument(
        "--head-shift", type=int, nargs="+", default=[0], metavar="N", help="of the first layer [and the second]"
    )
    parser.add_argument(
        "--segment-shift", type=int, nargs="+", default=[0], metavar="N", help="of the first layer [and the second]"
    )
    parser.add_argument("--length", type=int, default=256, metavar="S", help="rows of the sequence; default: 256")
    parser.add_argument("--ranks", type=int, default=4, metavar="P", help="default: 4")
    parser.add_argument("--kv-heads", type=int, metavar="HKV", help="default: one for each residue")
    parser.add_argument("--head", type=int, default=0, metavar="G", help="the kv head whose mask is drawn; default: 0")
    parser.add_argument("--curve", default="hilbert", help="default: hilbert")
    parser.add_argument("--block", type=int, metavar="N", help="tokens that the curve orders at a time; default: 256")
    parser.add_argument("--grid", type=int, nargs="+", metavar="N", help="instead of --block: sides H W of a picture")
    parser.add_argument("--full", action="store_true", help="not causal")
    parser.set_defaults(run=_plot)


COMMANDS: tuple[Callable[[Any], None], ...] = (
    add_pretrain,
    add_prepare_data,
    add_data_info,
    add_convert,
    add_export,
    add_score,
    add_plan,
    add_check,
    add_bench,
    add_plot,
)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets `run`, a function of the parsed arguments to the exit status."""
    parser = argparse.ArgumentParser(
        prog="ring-hilbert", description="Exact sequence-parallel dilated attention in space-filling-curve order."
    )
    parser.add_argument(
        "--local_rank", "--local-rank", help=argparse.SUPPRESS
    )  # of DeepSpeed's launcher, which sets LOCAL_RANK too
    commands = parser.add_subparsers(title="commands", required=True, metavar="<command>")
    for add in COMMANDS:
        add(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 0, or 2 and a message, without traceback, for what the user can mend."""
    chosen = build_parser().parse_args(arguments)
    return chosen.run(chosen)


def _pretrain(chosen: argparse.Namespace) -> int:
    # Imported here so that --help answers at once.
    from ring_hilbert.training.config import load_stages
    from ring_hilbert.training.loop import pretrain_stages
    from ring_hilbert.training.watchdog import RankLost
    from ring_hilbert.training.world import RankError

    try:
        if chosen.dry_run:
            return _dry_run(chosen)
        pretrain_stages(load_stages(chosen.config, chosen.overrides))
    except (ValueError, FloatingPointError) as error:
        rank = os.environ.get("RANK", "0")
        shared = isinstance(error, (RankError, FloatingPointError))  # every rank knows of it
        if rank == "0" or not shared:
            where = "" if shared or "RANK" not in os.environ else f" (rank {rank})"
            print(f"ring-hilbert pretrain: error{where}: {error}", file=sys.stderr)
        return 2
    except RankLost as error:
        print(f"ring-hilbert pretrain: error: {error}: {error.__cause__}", file=sys.stderr)
        return 1
    return 0


def _convert(chosen: argparse.Namespace) -> int:
    from ring_hilbert.training.convert import convert

    try:
        print(f"written: {convert(chosen.source, chosen.target, chosen.step, chosen.trust)}")
    except (ValueError, OSError) as error:
        print(f"ring-hilbert convert: error: {error}", file=sys.stderr)
        return 2
    return 0


def _export(chosen: argparse.Namespace) -> int:
    from ring_hilbert.training.config import load_config
    from ring_hilbert.training.convert import export_checkpoint

    try:
        config = load_config(chosen.config, chosen.overrides, chosen.stage)
        print(f"model of {export_checkpoint(config, chosen.target, chosen.step)}: {chosen.target}")
    except (ValueError, OSError) as error:
        print(f"ring-hilbert export: error: {error}", file=sys.stderr)
        return 2
    return 0


def _score(chosen: argparse.Namespace) -> int:
    from ring_hilbert.bench.scoring import run
    from ring_hilbert.training.watchdog import RankLost
    from ring_hilbert.training.world import RankError

    try:
        run(chosen)
    except (ValueError, OSError) as error:
        rank = os.environ.get("RANK", "0")
        if rank == "0" or not isinstance(error, RankError):
            print(f"ring-hilbert score: error: {error}", file=sys.stderr)
        return 2
    except RankLost as error:
        print(f"ring-hilbert score: error: {error}: {error.__cause__}", file=sys.stderr)
        return 1
    return 0


def _dry_run(chosen: argparse.Namespace) -> int:
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
            f"a step is {config.sequences_per_step} sequences of {length:,} tokens in {micro_steps} micro-steps, "
            f"{-(-length // parallel.sp):,} rows per rank and sequence\n"
        )
        question, speeds = planning.question_of(config), Speeds(300e12, 50e9)
        print(planning.report(question, planning.answer(question, speeds), speeds, [speeds.link]))
        fitted = fit(config, None, cuda=True)
        if fitted.refusal:
            raise ValueError(fitted.refusal)
        print(f"\nmemory: {fitted.taken(config)}\n")
    return 0


def _prepare_data(chosen: argparse.Namespace) -> int:
    from ring_hilbert.training.config import DataConfig, load_stages
    from ring_hilbert.training.prepared import prepare

    try:
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
    except (ValueError, OSError) as error:
        print(f"ring-hilbert prepare-data: error: {error}", file=sys.stderr)
        return 2
    return 0


def _data_info(chosen: argparse.Namespace) -> int:
    from ring_hilbert.training.data_info import report

    try:
        for line in report(chosen.folder, chosen.seq_len, chosen.sample, chosen.verify):
            print(line, flush=True)
    except (ValueError, OSError) as error:
        print(f"ring-hilbert data-info: error: {error}", file=sys.stderr)
        return 2
    return 0


def _bench(chosen: argparse.Namespace) -> int:
    from ring_hilbert.bench.command import run

    try:
        run(chosen)
    except ValueError as error:
        print(f"ring-hilbert bench {chosen.measurement}: error: {error}", file=sys.stderr)
        return 2
    return 0


def _length(text: str) -> int | None:
    return None if text == "all" else int(text)


def _plot(chosen: argparse.Namespace) -> int:
    import ring_hilbert as rh
    from ring_hilbert.bench.picture import Subject, draw

    try:
        grid = None if chosen.grid is None else tuple(chosen.grid)
        block = 256 if chosen.block is None and grid is None else chosen.block
        order = rh.TokenOrder(chosen.curve, block=block, grid=grid)
        subject = Subject(
            _layers(chosen), order, chosen.length, chosen.ranks, not chosen.full, chosen.kv_heads, chosen.head
        )
        draw(chosen.output, subject, chosen.what)
    except ValueError as error:
        print(f"ring-hilbert plot: error: {error}", file=sys.stderr)
        return 2
    return 0


def _plan(chosen: argparse.Namespace) -> int:
    from ring_hilbert.bench import planning
    from ring_hilbert.parallel.choice import Speeds

    try:
        if min(chosen.link_gbps) <= 0 or chosen.tflops <= 0:
            raise ValueError("--link-gbps and --tflops must be above 0")
        speeds = Speeds(chosen.tflops * 1e12, chosen.link_gbps[0] * 1e9)
        question = (
            planning.from_config(chosen.config, chosen.overrides) if chosen.config is not None else _question(chosen)
        )
        if chosen.ranks_per_host is not None:
            if chosen.ranks_per_host < 1:
                raise ValueError(f"--ranks-per-host must be at least 1, got {chosen.ranks_per_host}")
            question = replace(question, ranks_per_host=chosen.ranks_per_host)
        choice = planning.answer(question, speeds)
        print(planning.report(question, choice, speeds, [link * 1e9 for link in chosen.link_gbps]))
        if chosen.plot is not None:
            planning.draw(chosen.plot, choice, question.strategy)
            print(f"\ndrawn: {chosen.plot}")
    except (ValueError, OSError) as error:
        print(f"ring-hilbert plan: error: {error}", file=sys.stderr)
        return 2
    return 0


def _check(chosen: argparse.Namespace) -> int:
    from ring_hilbert.bench.check import check

    try:
        page, mine = check(chosen.timeout)
    except (ValueError, RuntimeError) as error:
        print(f"ring-hilbert check: NOT OK: {error}", file=sys.stderr)
        return 1
    if mine:
        print(page)
    return 1 if page.faults else 0


def _question(chosen: argparse.Namespace) -> Any:
    import torch

    import ring_hilbert as rh
    from ring_hilbert.bench.planning import Question
    from ring_hilbert.parallel.plan import Shapes, check_strategy

    flags = {
        "--length": chosen.length, "--ranks": chosen.ranks, "--segment-lengths": chosen.segment_lengths,
        "--dilation-rates": chosen.dilation_rates,
    }  # fmt: skip
    missing = [flag for flag, value in flags.items() if value is None]
    if missing or chosen.overrides:
        what = f"without it {', '.join(missing)} is needed" if missing else "key=value needs it"
        raise ValueError(f"--config FILE is not given; {what}")
    if min(chosen.length, chosen.ranks, chosen.heads, chosen.head_dim, chosen.batch) < 1:
        raise ValueError("--length, --ranks, --heads, --head-dim and --batch must be at least 1")
    kv_heads = chosen.heads if chosen.kv_heads is None else chosen.kv_heads
    if kv_heads < 1 or chosen.heads % kv_heads:
        raise ValueError(f"--heads {chosen.heads} must be a multiple of --kv-heads {kv_heads}")
    order = None
    if chosen.curve is not None or chosen.block is not None:
        order = rh.TokenOrder(chosen.curve or "hilbert", block=chosen.block)
    return Question(
        rh.DilatedPattern(tuple(chosen.segment_lengths), tuple(chosen.dilation_rates)), chosen.length, chosen.ranks,
        Shapes(chosen.batch, chosen.heads, kv_heads, chosen.head_dim, getattr(torch, chosen.dtype)), order,
        not chosen.full, chosen.layout, check_strategy(chosen.strategy),
    )  # fmt: skip


def _layers(chosen: argparse.Namespace) -> tuple[Any, ...]:
    """The pattern of one layer, or of two where a shift differs between them."""
    import ring_hilbert as rh

    shifts = {"--head-shift": chosen.head_shift, "--segment-shift": chosen.segment_shift}
    for flag, values in shifts.items():
        if len(values) > 2:
            raise ValueError(f"{flag} takes one value, or one for each of two layers, got {len(values)}")
    layers = max(map(len, shifts.values()))
    return tuple(
        rh.DilatedPattern(
            tuple(chosen.segment_lengths),
            tuple(chosen.dilation_rates),
            head_shift=chosen.head_shift[min(i, len(chosen.head_shift) - 1)],
            segment_shift=chosen.segment_shift[min(i, len(chosen.segment_shift) - 1)],
        )
        for i in range(layers)
    )


if __name__ == "__main__":
    sys.exit(main())
