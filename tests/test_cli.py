# SPDX-License-Identifier: Apache-2.0
"""The command line, alone and under torchrun: help, one-line errors, exit statuses, and no job that hangs."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

import ring_hilbert as rh
from ring_hilbert.bench import check, wire
from ring_hilbert.cli import main
from ring_hilbert.training.metrics import read_metrics
from tests.harness.ranks import run_ranks, run_ranks_collect
from tests.harness.tiny_run import tiny_config, write_texts

ROOT = Path(__file__).parents[1]


def config_file(folder: Path) -> Path:
    """A tiny run of two steps as a file (JSON is YAML)."""
    write_texts(folder)
    path = folder / "run.yaml"
    path.write_text(json.dumps(tiny_config(folder, train__steps=2).model_dump()))
    return path


def torchrun(*arguments: str | Path, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # ranks would need a device each
    return subprocess.run(
        [*command, *map(str, arguments)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    """The commands, and of `pretrain` the options with an example."""
    for arguments, words in (
        (["--help"], ["pretrain"]),
        (["pretrain", "--help"], ["--config", "torchrun", "key.sub=value"]),
        (["plan", "--help"], ["--config", "--link-gbps", "--plot", "examples:"]),
        (["check", "--help"], ["--timeout", "torchrun"]),
        (["bench", "--help"], ["exactness", "wire", "attention"]),
        (["bench", "attention", "--help"], ["--lengths", "--no-causal", "--dense-limit", "--output", "floor"]),
        (["bench", "wire", "--help"], ["--output"]),
        (["plot", "--help"], ["--what", "coverage", "--grid"]),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0
        text = capsys.readouterr().out
        assert all(word in text for word in words)


@pytest.mark.parametrize("arguments", [[], ["pretrian"], ["pretrain"], ["bench"], ["bench", "wire", "--lengths", "1"]])
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err


PLANNED = (
    "plan --length 4096 --ranks 8 --segment-lengths 256 all --dilation-rates 1 16 --heads 8 --kv-heads 4 --head-dim 16"
)


def test_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line per strategy, the choice with its reason, warnings, a picture; from flags and from a run's configuration."""
    picture = tmp_path / "needs.png"
    assert main([*PLANNED.split(), "--link-gbps", "1", "100", "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    for words in ("exchange ", "ring ", "ulysses ", "ms at 100 GB/s", "auto takes exchange:", "rows of 12 residues"):
        assert words in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["plan", "--config", str(config_file(tmp_path)), "parallel.sp=2"]) == 0
    assert "over 2 ranks" in capsys.readouterr().out


def test_plan_takes_heads_for_a_dense_pattern(capsys: pytest.CaptureFixture[str]) -> None:
    dense = ["plan", "--length", "65536", "--segment-lengths", "all", "--dilation-rates", "1", "--full", "--ranks"]
    assert main([*dense, "64"]) == 0
    printed = capsys.readouterr().out
    assert "auto takes ring: an exchange would hold" in printed and "there are 64 ranks and only 32 heads" in printed
    assert main([*dense, "8", "--link-gbps", "5"]) == 0
    assert "auto takes ulysses: faster than ring on the slowest rank" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ("--ranks 16 --strategy ulysses", "there are 16 ranks and only 8 heads"),
        ("--length 4097 --layout zigzag", "2 x 8 equal chunks"),
        ("--kv-heads 3", "--heads 8 must be a multiple of --kv-heads 3"),
        ("--layout spiral", "layout='spiral' is not supported"),
        ("--plot needs.gif", "must end in"),
        ("--link-gbps 0", "must be above 0"),
        ("train.steps=3", "--config FILE is not given"),
    ],
)
def test_impossible_plans(changes: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PLANNED.split(), *changes.split()]) == 2
    assert f"{words}" in capsys.readouterr().err


def test_check_alone(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The page ends in OK; a result that is off, in what to do."""
    assert main(["check"]) == 0
    printed = capsys.readouterr().out
    assert printed.endswith("OK\n") and "float64" in printed and "start it under torchrun" in printed
    right = rh.dilated_attention
    monkeypatch.setattr(rh, "dilated_attention", lambda q, *rest, **facts: right(q * 1.001, *rest, **facts))
    assert main(["check"]) == 1
    assert "NOT OK\n- exchange, contiguous, float64: rank 0 is off by" in capsys.readouterr().out


def _checked(rank: int, world: int, timeout: float) -> str:
    """What a rank finds; with a missing rank 1, what it is told."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", str(world))
        patch.setattr(check, "join", lambda *_: None)
        patch.setattr(dist, "destroy_process_group", lambda *_: None)
        patch.setattr(check, "MESSAGE", 1 << 20)
        if rank == 1 and timeout:
            return ""
        return str(check.check(60)[0])


def test_check_of_ranks() -> None:
    pages = run_ranks(_checked, 3, 0.0)
    for page in pages:
        assert page.endswith("OK") and "NOT" not in page and "ulysses" in page and "GB/s received" in page


def test_check_says_who_does_not_come() -> None:
    outcomes = run_ranks_collect(_checked, 2, 1.0, timeout=10)
    assert isinstance(outcomes[0], RuntimeError) and "rank 0: not all ranks arrived" in str(outcomes[0])


def test_bench_wire(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows go to the file and to the terminal."""
    monkeypatch.setattr(wire, "RANKS", 4)
    output = tmp_path / "wire.csv"
    assert main(["bench", "wire", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    lines = output.read_text().splitlines()
    assert len(lines) == 25 and lines[0].startswith("date,commit,device")
    assert any("dense" in line and "12288.00" in line for line in lines)
    assert f"24 rows appended to {output}" in printed


def test_pretrain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Overrides count; the end prints held-out loss, unigram loss and their ratio."""
    path = config_file(tmp_path)
    # As DeepSpeed's launcher calls it.
    assert main(["--local_rank=0", "pretrain", "--config", str(path), "train.steps=3"]) == 0
    assert read_metrics(tmp_path / "logs" / "metrics.jsonl")[-1]["step"] == 3
    printed = capsys.readouterr().out
    assert "final held-out loss" in printed
    assert "unigram model" in printed
    assert "ratio" in printed


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stepps=3", ["stepps", "steps"]),
        ("train.steps=many", ["train.steps", "many"]),
        ("data.sources.0.path=/nowhere", ["/nowhere"]),
        ("model.config.vocab_size=64", ["vocab"]),
        ("parallel.sp=2", ["torchrun --nproc-per-node 2"]),
    ],
)
def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, words: list[str]) -> None:
    """Status 2, a message and no traceback, nothing written."""
    path = config_file(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert main(["pretrain", "--config", str(path), override]) == 2
    printed = capsys.readouterr()
    assert "ring-hilbert pretrain: error: " in printed.err
    assert all(word in printed.err for word in words)
    assert "Traceback" not in printed.err
    assert sorted(tmp_path.iterdir()) == before


def test_torchrun(tmp_path: Path) -> None:
    """Two ranks of one sequence; one of them prints."""
    done = torchrun("-m", "ring_hilbert.cli", "pretrain", "--config", config_file(tmp_path), "parallel.sp=2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("final held-out loss") == 1
    run = json.loads((tmp_path / "checkpoints" / "step_00000002" / "run.json").read_text())
    assert run["world_size"] == 2


def run_main(rank: int, world_size: int, arguments: list[str]) -> tuple[int, str]:
    """Status of `main` and what it prints to stderr, as under torchrun."""
    assert world_size == 2
    printed = io.StringIO()
    os.environ["RANK"] = str(rank)
    try:
        with contextlib.redirect_stderr(printed):
            return main(arguments), printed.getvalue()
    finally:
        del os.environ["RANK"]


def test_ranks_tell_a_mistake_once(tmp_path: Path) -> None:
    """Rank 0 prints what every rank knows; each ends with status 2."""
    arguments = ["pretrain", "--config", str(config_file(tmp_path)), "parallel.sp=2", "data.sources.0.path=/nowhere"]
    (status, printed), (other_status, nothing) = run_ranks(run_main, 2, arguments)
    assert status == other_status == 2
    assert printed.startswith("ring-hilbert pretrain: error: rank 0: ")
    assert nothing == ""
    assert not (tmp_path / "logs").exists()


FAILING_RANK = """
import os, sys
from ring_hilbert import cli
from ring_hilbert.training.loop import Run
step = Run.train_step
def fail_on_rank_1(self):
    if os.environ["RANK"] == "1":
        raise RuntimeError("spam on rank 1")
    return step(self)
Run.train_step = fail_on_rank_1
sys.exit(cli.main())
"""


def test_torchrun_ends_when_a_rank_fails(tmp_path: Path) -> None:
    """The other rank waits in a collective that never comes; the job ends all the same, well before the group's timeout."""
    script = tmp_path / "failing_rank.py"
    script.write_text(FAILING_RANK)
    done = torchrun(script, "pretrain", "--config", config_file(tmp_path), "parallel.sp=2")
    assert done.returncode != 0
    assert "spam on rank 1" in done.stderr


BARE = """
import contextlib, importlib.metadata, io, re, sys
for line in importlib.metadata.requires("ring_hilbert"):
    if "extra ==" in line:
        sys.modules[re.match(r"[\\w-]+", line)[0].replace("-", "_")] = None
from ring_hilbert.cli import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    main(["--help"])
status = main("plan --length 64 --ranks 2 --segment-lengths 16 all --dilation-rates 1 4".split())
assert "torch._dynamo" not in sys.modules, "nothing was compiled, and the compiler's import takes as long as torch's"
print([status, *(main(line.split()) for line in sys.argv[1:])])
"""


def test_without_extras_there_are_help_and_plan_and_what_lacks_is_named():
    lines = ["pretrain --config x.yaml", "bench wire", "convert a b", "plot a.png"]
    done = subprocess.run([sys.executable, "-c", BARE, *lines], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-1] == str([0, 2, 2, 2, 2])
    assert done.stderr.splitlines() == [
        f"ring-hilbert: error: this needs {module}, which is not installed: pip install 'ring_hilbert[train]'"
        for module in ("tqdm", "pydantic", "tqdm", "matplotlib")
    ]
