# SPDX-License-Identifier: Apache-2.0
"""The run configuration: what is read, what is refused and how the refusal reads, what a resumed run must agree on."""

import json
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from ring_hilbert.bench.planning import question_of
from ring_hilbert.integrations.transformers_config import pattern_of
from ring_hilbert.training.config import load_config
from ring_hilbert.training.model import model_config

CONFIGS = Path(__file__).parents[2] / "configs"


def minimal() -> dict[str, Any]:
    return {
        "model": {"config": {"model_type": "llama", "hidden_size": 64}},
        "attention": {"segment_lengths": [256, 1024], "dilation_rates": [1, 4], "order": {"block": 256}},
        "data": {"sources": [{"path": "texts"}], "seq_len": 1024, "eval": {"path": "held_out"}},
        "train": {"steps": 10, "global_batch_tokens": 4096},
        "checkpoint": {"dir": "${log.dir}/checkpoints"},
        "log": {"dir": "runs"},
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(minimal()))
    return path


def refused(file: Path, *overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        load_config(file, list(overrides))
    return str(caught.value)


def test_defaults_interpolations_and_single_paths(file: Path) -> None:
    config = load_config(file)
    assert config.checkpoint.dir == "runs/checkpoints"
    assert config.data.sources[0].path == ["texts"]
    assert config.data.sources[0].weight == 1.0
    assert (config.parallel.sp, config.parallel.dp, config.engine) == (1, 1, "torch")
    assert config.data.tokenizer == "bytes"
    assert config.sequences_per_step == 4


def test_overrides_are_yaml_and_later_ones_win(file: Path) -> None:
    config = load_config(
        file,
        [
            "optim.lr=3e-4",
            "train.steps=20",
            "train.steps=30",
            "data.sources.0.weight=2",
            "data.sources.0.exclude=[test, '*.md']",
            "attention.order=null",
            "attention.head_shift=auto",
            "attention.layers.3.dense=true",
            "data.eval.path=[a, b]",
            "model.config.num_hidden_layers=2",
            "log.dir=other",
        ],
    )
    assert config.optim.lr == 3e-4
    assert config.train.steps == 30
    assert (config.data.sources[0].weight, config.data.sources[0].exclude) == (2.0, ["test", "*.md"])
    assert config.attention.order is None
    assert config.attention.head_shift == "auto"
    assert config.attention.layers[3].dense
    assert config.data.eval is not None
    assert config.data.eval.path == ["a", "b"]
    assert config.model.config == {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2}
    assert config.checkpoint.dir == "other/checkpoints", "interpolations are resolved after overrides"


def test_python_stdlib_is_that_of_this_interpreter(file: Path) -> None:
    config = load_config(file, ["data.sources.0.path=${python_stdlib:}/json"])
    assert config.data.sources[0].path == [Path(sysconfig.get_path("stdlib")).as_posix() + "/json"]


@pytest.mark.parametrize(
    ("override", "where", "nearest", "valid"),
    [
        ("train.stepz=3", "train.stepz", "steps", "global_batch_tokens"),
        ("optimizer.lr=3", "optimizer", "optim", "checkpoint"),
        ("data.sources.0.wieght=2", "data.sources.0.wieght", "weight", "exclude"),
        ("data.eval.evry=2", "data.eval.evry", "every", "sequences"),
        ("attention.order.blok=2", "attention.order.blok", "block", "curve"),
        ("attention.layers.1.head_shfit=2", "attention.layers.1.head_shfit", "head_shift", "dense"),
    ],
)
def test_unknown_keys_name_the_path_the_nearest_and_the_valid_ones(
    file: Path, override: str, where: str, nearest: str, valid: str
) -> None:
    message = refused(file, override)
    line = next(line for line in message.splitlines() if line.strip().startswith(f"{where}:"))
    assert f"did you mean {nearest}?" in line
    assert valid in line.split("valid here:")[1]


def test_unknown_keys_in_the_file_are_refused_too(tmp_path: Path) -> None:
    wrong = minimal()
    wrong["train"]["step"] = 3
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(wrong))
    assert "train.step: unknown key (did you mean steps?)" in refused(path)


@pytest.mark.parametrize(
    "override", ["train.steps", "=3", "train..steps=3", "", "train.steps.=3", "log.dir=[", "a.b={"]
)
def test_malformed_overrides(file: Path, override: str) -> None:
    assert f"override {override!r}" in refused(file, override)


@pytest.mark.parametrize(
    "override", ["data.sources.5.weight=2", "data.sources.first.weight=2"], ids=["beyond the list", "not a number"]
)
def test_overrides_of_list_elements_that_are_not_there(file: Path, override: str) -> None:
    assert f"override {override!r} cannot be applied" in refused(file, override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps=ten", "train.steps: got 'ten'"),
        ("train.steps=1.5", "train.steps: got 1.5"),
        ("train.steps=true", "train.steps: got True"),
        ("train.steps=null", "train.steps: got None"),
        ("train.steps=0", "train.steps: got 0"),
        ("train.steps.more=1", "train.steps: got {'more': 1}"),
        ("optim.lr=.nan", "optim.lr: got nan"),
        ("optim.betas=[0.9, 1.0]", "optim: betas need 0 <= beta < 1"),
        ("engine=jax", "engine: got 'jax'"),
        ("train.precision=fp8", "train.precision: got 'fp8'"),
        ("data.sources=[]", "data.sources: got []"),
        ("data.sources.0.weight=0", "data.sources.0.weight: got 0"),
        ("data.eval.path=[]", "data.eval.path: got []"),
        ("data.sources.0={weight: 2}", "data.sources.0.path: required, but missing"),
        ("model.path=folder", "model: give exactly one of `config`"),
        ("model.config=null", "model: give exactly one of `config`"),
        ("model.config={hidden_size: 3}", "needs a model_type"),
        ("attention.dilation_rates=[1]", "attention: segment_lengths has 2 entries and dilation_rates 1"),
        (
            "attention.dilation_rates=[1, 2000]",
            "dilation_rates[1] must be an integer with 1 <= r <= segment length 1024, got 2000",
        ),
        (
            "attention.dilation_rates=[0, 1]",
            "dilation_rates[0] must be an integer with 1 <= r <= segment length 256, got 0",
        ),
        ("attention.weights=[1]", "attention: weights has 1 entries and segment_lengths 2; give one weight per branch"),
        ("attention.weights=[1, 0.5]", "attention.weights.1: got 0.5"),
        ("attention.order.block=0", "attention.order.block: got 0"),
        ("attention.layers.1.branches=3", "layers.1 keeps 3 of 2 branches; keep 1 to 2 of them"),
        ("attention.layers={1: {branches: 1, dense: true}}", "layers.1 keeps 1 of 2 branches and is dense"),
        ("attention.order.grid=[32, 32]", "attention.order: give exactly one of `block`"),
        ("attention.order={grid: [30, 30]}", "attention.order.grid [30, 30] has 900 cells, data.seq_len is 1024"),
        ("attention.head_shift=sideways", "attention.head_shift: got 'sideways'"),
        ("attention.layers.x.dense=true", "attention.layers.x"),
        ("parallel.sp=0", "parallel.sp: got 0"),
        ("train.global_batch_tokens=5000", "not a multiple of data.seq_len 1024; the nearest is 5120"),
        ("parallel.dp_shard=3", "3 * 1 * 1 = 3; the next that is: 6144 tokens"),
        ("train.micro_batch=8", "1 * 1 * 8 = 8; the next that is: 8192 tokens"),
        ("log.dir=${nowhere}", "Interpolation key 'nowhere' not found"),
    ],
)
def test_wrong_values_name_the_key_and_what_came(file: Path, override: str, message: str) -> None:
    assert message in refused(file, override)


def test_block_rule_excludes_head_shift_and_counting_once(file: Path) -> None:
    message = refused(file, "attention.offset_rule=block", "attention.head_shift=1")
    assert "attention: head_shift=1 needs offset_rule='modulo'; with 'block' it must be 0" in message
    message = refused(file, "attention.offset_rule=block", "attention.count=once")
    assert "attention: count='once' needs nested branches, with offset_rule='modulo': (256, 1) and (1024, 4)" in message


@pytest.mark.parametrize("content", ["[1, 2]", "a: [", "just words", "\xff"])
def test_files_that_hold_no_configuration(tmp_path: Path, content: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content.encode("latin-1"))
    assert str(path) in refused(path)


def test_missing_file_and_missing_sections(tmp_path: Path) -> None:
    assert "nowhere.yaml cannot be read" in refused(tmp_path / "nowhere.yaml")
    path = tmp_path / "empty.yaml"
    path.write_text("")
    message = refused(path)
    for section in ("model", "attention", "data", "train", "checkpoint", "log"):
        assert f"{section}: required, but missing" in message


def test_loaded_values_do_not_change(file: Path) -> None:
    config = load_config(file)
    with pytest.raises(ValueError):
        config.train.steps = 3  # type: ignore[misc]


def test_attention_mapping_is_plain_and_survives_json(file: Path) -> None:
    mapping = load_config(
        file, ["attention.layers.1.dense=true", "attention.layers.0.head_shift=3"]
    ).attention.to_mapping()
    assert mapping == json.loads(json.dumps(mapping))
    assert mapping["segment_lengths"] == [256, 1024]
    assert mapping["order"] == {"curve": "hilbert", "block": 256}
    assert mapping["layers"] == {"0": {"head_shift": 3}, "1": {"dense": True}}
    assert load_config(file, ["attention.order=null"]).attention.to_mapping()["order"] is None


@pytest.mark.parametrize(
    "override",
    [
        "model.config.hidden_size=128",
        "attention.dilation_rates=[1, 8]",
        "attention.order.block=128",
        "attention.weights=[1, 4]",
        "attention.count=once",
        "data.sources.0.weight=2",
        "data.seq_len=2048",
        "optim.lr=1e-4",
        "train.seed=1",
        "train.global_batch_tokens=8192",
        "train.precision=bf16",
    ],
)
def test_digest_changes_with_what_decides_the_losses(file: Path, override: str) -> None:
    assert load_config(file, [override]).digest() != load_config(file).digest()


def test_digest_ignores_how_and_where_a_run_is_executed(file: Path) -> None:
    moved = [
        "parallel={sp: 4, dp_shard: 2, dp_replicate: 2}",
        "engine=deepspeed",
        "train.steps=1000",
        "train.checkpoint_activations=false",
        "attention.strategy=ring",
        "attention.layout=zigzag",
        "attention.backend=torch",
        "data.sources.0.path=elsewhere",
        "data.sources.0.field=body",
        "data.tokenizer=folder",
        "data.eval.path=elsewhere",
        "data.eval.every=7",
        "data.eval.sequences=3",
        "checkpoint={dir: elsewhere, every: 3, keep: 9, changed_data: accept}",
        "log.dir=elsewhere",
    ]
    assert load_config(file, moved).digest() == load_config(file).digest()
    assert load_config(file, ["train.micro_batch=4"]).digest() == load_config(file).digest()


def test_how_pairs_count_reaches_the_layers_and_leaves_digests_of_runs_without_it(file: Path) -> None:
    how = ["attention.weights=[1, 4]", "attention.count=once"]
    config = load_config(file, [*how, "attention.layers.1.branches=1"])
    hf_config = model_config(config)
    first, second = pattern_of(hf_config, 0), pattern_of(hf_config, 1)
    assert (first.weights, first.count) == ((1, 4), "once") and first == config.attention.pattern(0)
    assert (second.weights, second.count) == ((1,), "once")
    assert question_of(config).pattern == first
    without = load_config(file)
    for dumped in (without.identity()["attention"], without.attention.to_mapping()):
        assert {"weights", "count"}.isdisjoint(dumped)
    said = load_config(file, ["attention.weights=null", "attention.count=per_branch"])
    assert said.digest() == without.digest()


def test_digest_is_the_same_in_another_process(file: Path) -> None:
    command = (
        "import sys; from ring_hilbert.training.config import load_config; print(load_config(sys.argv[1]).digest())"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", command, file], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == load_config(file).digest()


def test_identity_survives_json_and_names_what_differs(file: Path) -> None:
    identity = load_config(file, ["attention.layers.1.dense=true"]).identity()
    assert json.loads(json.dumps(identity)) == identity
    assert identity["train"] == {"global_batch_tokens": 4096, "precision": "fp32", "seed": 0}
    assert identity["data"]["sources"] == [{"weight": 1.0}]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_are_valid(path: Path) -> None:
    assert load_config(path).train.steps > 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["attention.order.block=512"], "segment length 256 of .* nearest: segment length 512, or order.block=256"),
        (["attention.segment_shift=128"], "segment_shift 128: .* nearest: segment_shift 0 or 256, or order.block=128"),
        (["attention.layers.1.segment_shift=384"], "segment_shift 384: .* nearest: segment_shift 256 or 512, or"),
    ],
)
def test_a_block_of_the_order_that_segments_cut_is_refused(file: Path, overrides: list[str], message: str) -> None:
    assert re.search(f"attention: order.block=[0-9]+ does not divide {message}", refused(file, *overrides))
    load_config(file, [*overrides, "attention.order=null"])
    load_config(file, [*overrides, "attention.order={curve: raster, block: 256}"])


def test_quickstart_is_what_the_readme_says() -> None:
    config = load_config(CONFIGS / "quickstart.yaml")
    rows_per_rank = config.data.seq_len // config.parallel.sp
    crossing = [w for w in config.attention.segment_lengths if w is None or w > rows_per_rank]
    assert config.data.seq_len >= 8192
    assert config.parallel.world_size == 2
    assert len(config.attention.segment_lengths) >= 3
    assert crossing
    assert config.attention.order is not None
    assert config.attention.order.curve == "hilbert"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**(config.model.config or {})))
    assert model.num_parameters() <= 4_000_000


def test_dp_shard_is_what_ranks_leave_to_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    auto = ["parallel.dp_shard=auto", "parallel.sp=2"]
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert load_config(file, auto).parallel.world_size == 2  # a plan, say
    for ranks, dp_shard in ((8, 4), (4, 2), (2, 1)):
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        config = load_config(file, auto)
        assert (config.parallel.dp_shard, config.sequences_per_step) == (dp_shard, 4)
    monkeypatch.setenv("WORLD_SIZE", "5")
    assert "multiple of sp * dp_replicate = 2 ranks, but 5 are running; start 4 or 6" in refused(file, *auto)
    monkeypatch.setenv("WORLD_SIZE", "6")  # three groups for four sequences
    assert "as many tokens need dp_shard * dp_replicate of 2 or 4" in refused(file, *auto)
    assert "parallel.sp: got 'two'" in refused(file, "parallel.dp_shard=auto", "parallel.sp=two")


def test_time_limits(file: Path) -> None:
    limits = load_config(file, ["timeouts.step=20", "timeouts.save=7200.5"]).timeouts
    assert (limits.start, limits.step, limits.data, limits.save) == (600, 20, 600, 7200.5)
    assert limits.longest > 7200.5
    assert "timeouts.step" in refused(file, "timeouts.step=0")
