# SPDX-License-Identifier: Apache-2.0
"""Fused elementwise work: what is recognised, that nobody else's model changes, and that losses stay what they are.

Liger's kernels need a GPU (`test_device.py`); here their formulas stand in for them, and what is tested is what they are put to.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama import modeling_llama

from ring_hilbert.training import fused, model
from ring_hilbert.training.config import RunConfig
from ring_hilbert.training.model import build_skeleton, model_config
from tests.harness.ranks import run_ranks
from tests.harness.tiny_run import tiny_config
from tests.training.test_invariance import check, train, true_gradients

KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 8},  # norms of q and k
    "gemma2": {
        "head_dim": 8,
        "attn_logit_softcapping": None,
        "layer_types": ["full_attention"] * 2,
    },  # GEGLU, weights that count from one
    "olmo2": {},  # weights multiplied before rounding
    "phi3": {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1},  # gate and up in one
    "cohere": {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1},  # pairs rotated, not halves; LayerNorm
}
FOUND = {
    "llama": {"RMSNorm": 5, "gated MLP": 2, "RoPE": 2},
    "qwen3": {"RMSNorm": 9, "gated MLP": 2, "RoPE": 2},
    "gemma2": {"RMSNorm": 9, "gated MLP": 2, "RoPE": 2},
    "olmo2": {"RMSNorm": 9, "gated MLP": 2, "RoPE": 2},
    "phi3": {"RMSNorm": 5, "gated MLP": 2, "RoPE": 2},
    "cohere": {"gated MLP": 2},
}


def model_of(model_type: str, folder: Path, **changes: Any) -> RunConfig:
    """A tiny run with a model of this type."""
    model = {**(tiny_config(folder).model.config or {}), "model_type": model_type, **KINDS[model_type]}
    return tiny_config(folder, model={"config": model}, **changes)


class _Norm:
    @staticmethod
    def apply(x: Tensor, weight: Tensor, eps: float, offset: float, casting: str, in_place: bool, _: None) -> Tensor:
        assert not in_place
        normed = F.rms_norm(x.float(), x.shape[-1:], eps=eps)
        if casting == "llama":
            return (offset + weight) * normed.to(x.dtype)
        return (normed * (offset + weight.float())).to(x.dtype)


class _Rope:
    @staticmethod
    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        half = cos.shape[-1] // 2  # the kernel reads these alone
        cos, sin = cos[:, None, :, :half], sin[:, None, :, :half]
        a, b = zip(q.split(half, -1), k.split(half, -1), strict=True)
        q, k = (torch.cat([x * cos - y * sin, y * cos + x * sin], -1) for x, y in zip(a, b, strict=True))
        return q, k


class _Silu:
    @staticmethod
    def apply(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up


class _Gelu:
    @staticmethod
    def apply(gate: Tensor, up: Tensor) -> Tensor:
        return F.gelu(gate, approximate="tanh") * up


class _Cuda:
    """A device that Liger's kernels would run on, as far as anybody asks."""

    type = "cuda"


@contextmanager
def stand_ins() -> Iterator[None]:
    """Replace Liger's functions by their formulas, and pretend that they run on this device."""
    import liger_kernel.ops as ops

    with pytest.MonkeyPatch.context() as patch:
        for name, formula in (("RMSNorm", _Norm), ("Rope", _Rope), ("SiLUMul", _Silu), ("GELUMul", _Gelu)):
            patch.setattr(ops, f"Liger{name}Function", formula)
        patch.setattr(model, "fuse", lambda skeleton, config, device, fuse=model.fuse: fuse(skeleton, config, _Cuda()))
        yield


def train_with_stand_ins(
    rank: int, world_size: int, config: RunConfig, truth: dict[str, Tensor]
) -> dict[str, list[float]]:
    with stand_ins():
        return train(rank, world_size, config, truth)


@pytest.mark.parametrize("model_type", KINDS)
def test_what_is_recognised(tmp_path: Path, model_type: str):
    pytest.importorskip("liger_kernel")
    config = model_of(model_type, tmp_path)
    found = fused._parts(build_skeleton(config, model_config(config)))
    assert Counter(part.name for part in found) == FOUND[model_type]


def test_another_function_of_the_same_shape_is_not_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A layer whose code was changed keeps that code, whatever its class is called."""
    pytest.importorskip("liger_kernel")
    config = model_of("llama", tmp_path)
    skeleton = build_skeleton(config, model_config(config))
    own = modeling_llama.LlamaRMSNorm.forward
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", lambda self, x: own(self, x) * 1.01)
    monkeypatch.setattr(
        modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q * cos[:, None], k * cos[:, None])
    )
    for layer in skeleton.model.layers:
        layer.mlp.act_fn = torch.nn.GELU()
    assert fused._parts(skeleton) == []


@pytest.mark.parametrize(
    "model_type", ["llama", *(pytest.param(kind, marks=pytest.mark.full) for kind in ("gemma2", "phi3"))]
)
def test_liger_on_two_ranks(tmp_path: Path, model_type: str):
    """20 losses and first gradients; rows are rotated by the positions that they have in the whole sequence."""
    pytest.importorskip("liger_kernel")
    truth = true_gradients(model_of(model_type, tmp_path))
    plain = run_ranks(train, 1, model_of(model_type, tmp_path, train__fused="none", train__micro_batch=4), truth)[0]
    config = model_of(
        model_type, tmp_path, train__fused="liger", train__micro_batch=2, parallel__sp=2, train__mlp_tiles=3
    )
    check(run_ranks(train_with_stand_ins, 2, config, truth, timeout=280), plain, 1e-4)


def test_one_model_and_no_other(tmp_path: Path):
    """Neither a class nor a module of Transformers changes, nor another instance."""
    pytest.importorskip("liger_kernel")
    before = dict(vars(modeling_llama)), {name: vars(kind)["forward"] for name, kind in classes()}
    config = model_of("llama", tmp_path, train__fused="liger")
    mine, other = (build_skeleton(config, model_config(config), on) for on in (torch.device("cuda"), None))
    assert mine.fused.kind == "liger"
    assert "forward" in vars(mine.model.norm) and "forward" not in vars(other.model.norm)
    assert before == (dict(vars(modeling_llama)), {name: vars(kind)["forward"] for name, kind in classes()})


def classes() -> list[tuple[str, type]]:
    return [(n, kind) for n, kind in vars(modeling_llama).items() if isinstance(kind, type) and "forward" in vars(kind)]


def test_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The choice "auto" takes what can be and says what; what was asked for and cannot be is an error."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")

    def taken(model_type: str, device: torch.device, **changes: Any) -> str:
        config = model_of(model_type, tmp_path, **changes)
        return str(build_skeleton(config, model_config(config), device).fused)

    assert taken("llama", cpu) == "none (the device is a cpu)"
    with pytest.raises(ValueError, match=r"train.fused: no liger: .*(this rank has a cpu|not installed).*; use none"):
        taken("llama", cpu, train__fused="liger")
    for impossible in (
        {"train__mlp_tiles": 2},
        {"train__offload_activations": True, "train__checkpoint_activations": True},
    ):
        with pytest.raises(ValueError, match=r"train.fused: no compile: .*mlp_tiles"):
            taken("llama", cpu, train__fused="compile", **impossible)
    selective = {"train__recompute": "selective", "train__checkpoint_activations": True}
    with pytest.raises(ValueError, match=r"train.fused: no compile: .*recompute: selective"):
        taken("llama", cpu, train__fused="compile", **selective)
    monkeypatch.setattr(fused, "has_triton_package", lambda: True)
    if importlib.util.find_spec("liger_kernel") is not None:
        assert taken("llama", cuda) == "liger (2 RoPE, 2 gated MLP, 5 RMSNorm)"
        assert taken("cohere", cuda).startswith(
            "compile (2 layers; no liger: its kernels do not compute what the norms and MLPs of CohereForCausalLM do)"
        )
        assert taken("cohere", cuda, train__fused="liger") == "liger (2 gated MLP)"
        assert taken("cohere", cuda, train__mlp_tiles=2).startswith("none (no liger: its kernels do not compute")
        assert taken("llama", cuda, train__precision="fp64").startswith(
            "compile (2 layers; no liger: its kernels compute in"
        )
    nothing = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None))
    monkeypatch.setattr(fused, "importlib", nothing)
    missing = "no liger: liger-kernel is not installed (pip install 'ring_hilbert[gpu]')"
    assert taken("llama", cuda) == f"compile (2 layers; {missing})"
    assert taken("llama", cuda, train__fused="compile") == "compile (2 layers)"


@pytest.mark.full
def test_compiled_layers_on_two_ranks(tmp_path: Path):
    """20 losses and first gradients, layers checkpointed; the loss is compiled as well."""
    truth = true_gradients(model_of("llama", tmp_path))
    plain = run_ranks(train, 1, model_of("llama", tmp_path, train__fused="none", train__micro_batch=4), truth)[0]
    saving = {"parallel__sp": 2, "train__checkpoint_activations": True}
    config = model_of("llama", tmp_path, train__fused="compile", **saving)
    check(run_ranks(train, 2, config, truth, timeout=280), plain, 1e-5)
