# SPDX-License-Identifier: Apache-2.0
"""Fused elementwise work in one model's layers: Liger's kernels in place of some modules, or compiled layers.

Which modules match a kernel is not decided by name: each is run on a few numbers and its results are compared. Replacements are
bound to this instance; Transformers' classes and modules stay unchanged.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections import Counter
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._triton import has_triton_package
from transformers import PreTrainedModel

from ring_hilbert.training.config import RunConfig
from ring_hilbert.training.weights import decoder_layers

ROPE = "apply_rotary_pos_emb"  # as the attention of every Transformers model calls it
NORMS = (("llama", 0.0), ("gemma", 1.0), ("gemma", 0.0))  # Liger's casting modes, and the offset of the weights
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "LigerSiLUMulFunction": F.silu,
    "LigerGELUMulFunction": lambda x: F.gelu(x, approximate="tanh"),
}
GATED = ({"gate_proj": (6, 4), "up_proj": (6, 4), "down_proj": (4, 6)}, {"gate_up_proj": (12, 4), "down_proj": (4, 6)})


class Fused(NamedTuple):
    """The choice, "liger", "compile" or "none", with the parts replaced or the reason."""

    kind: str
    details: str

    def __str__(self) -> str:
        return f"{self.kind} ({self.details})"


def fuse(
    model: PreTrainedModel, config: RunConfig, device: torch.device, kinds: tuple[str, ...] = ("liger", "compile")
) -> Fused:
    """Apply `train.fused` to a model that will compute on `device`, before anything wraps its modules.

    `kinds`: what may be done; the rest of what `train.fused` says is left.

    Raises:
        ValueError: if it is not "auto" and cannot be done.
    """
    wanted = config.train.fused
    if wanted == "none" or (wanted == "auto" and device.type != "cuda"):
        return Fused("none", "as asked" if wanted == "none" else f"the device is a {device.type}")
    reasons: list[str] = []
    for kind, take in (("liger", _take_kernels), ("compile", _take_compiler)):
        if kind in kinds and wanted in ("auto", kind):
            try:
                return Fused(kind, "; ".join([take(model, config, device), *reasons]))
            except ValueError as reason:
                reasons.append(f"no {kind}: {reason}")
    if wanted in kinds:
        raise ValueError(f"train.fused: {reasons[0]}; use {'auto' if device.type == 'cuda' else 'none'}")
    return Fused("none", "; ".join(reasons))


def _take_kernels(model: PreTrainedModel, config: RunConfig, device: torch.device) -> str:
    """Install Liger's kernels; returns how many of each."""
    if importlib.util.find_spec("liger_kernel") is None:
        raise ValueError("liger-kernel is not installed (pip install 'ring_hilbert[gpu]')")
    if device.type != "cuda":
        raise ValueError(f"its kernels need a CUDA device, this rank has a {device.type}")
    if config.train.precision == "fp64":
        raise ValueError("its kernels compute in float32, train.precision is fp64")
    parts = _parts(model)
    inside = [Counter(part.name for part in parts if part.module in set(x.modules())) for x in decoder_layers(model)]
    if not parts or (config.train.fused == "auto" and not all(x["RMSNorm"] and x["gated MLP"] for x in inside)):
        raise ValueError(f"its kernels do not compute what the norms and MLPs of {type(model).__name__} do")
    for part in parts:
        part.module.forward = MethodType(part.forward, part.module)
    return ", ".join(f"{count} {name}" for name, count in Counter(part.name for part in parts).items())


def _take_compiler(model: PreTrainedModel, config: RunConfig, device: torch.device) -> str:
    """Compile the decoder layers; returns how many."""
    if config.train.offload_activations or config.train.mlp_tiles not in ("auto", 1):
        raise ValueError("compiled layers support neither offload_activations nor mlp_tiles")
    if config.train.recomputes == "selective":
        raise ValueError("compiled layers do not show which products to keep (recompute: selective)")
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError("ZeRO-3 gathers parameters one by one, by hooks that compiled code does not run")
    if device.type == "cpu" and shutil.which("g++") is None and shutil.which("clang++") is None:
        raise ValueError("it needs a C++ compiler on the CPU, and there is no g++")
    if device.type == "cuda" and not has_triton_package():
        raise ValueError("it needs Triton, which is not installed")
    layers = decoder_layers(model)
    for layer in layers:
        layer.forward = _compiled(layer)
    return f"{len(layers)} layers"


def _compiled(layer: nn.Module) -> Callable[..., Any]:
    """The layer's compiled forward, checkpointed by itself or from outside, whatever class an engine turns the layer into."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return type(layer).forward(layer, *args, **kwargs)

    return torch.compile(forward)


# ---- Liger's kernels


class _Part(NamedTuple):
    """A module whose forward matches a Liger kernel, and the forward with that kernel."""

    name: str
    module: nn.Module
    forward: Callable[..., Any]


def _parts(model: PreTrainedModel) -> list[_Part]:
    """The modules of a model for which Liger has kernels."""
    generator, found = torch.Generator().manual_seed(0), []

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    for module in model.base_model.modules():
        for name, recognise in (("RMSNorm", _norm), ("gated MLP", _gated), ("RoPE", _rope)):
            forward = recognise(module, drawn)
            if forward is not None:
                found.append(_Part(name, module, forward))
    return found


def _result(module: nn.Module, weights: dict[str, Tensor], x: Tensor) -> Tensor | None:
    """The module's result for `x` with these weights in place of its own; None if it fails."""
    try:
        result = functional_call(module, weights, (x,))
    except Exception:  # the module's code can raise anything
        return None
    return result if isinstance(result, Tensor) and result.device == x.device else None


def _norm(module: nn.Module, drawn: Callable[..., Tensor]) -> Callable[..., Tensor] | None:
    """`weight * x / rms(x)`, or with `1 + weight`; the rounding tells Liger's casting modes apart."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if [name for name, _ in module.named_parameters()] != ["weight"] or not isinstance(eps, float) or eps <= 0:
        return None
    weight, x = drawn(32).bfloat16(), (drawn(64, 32) * eps**0.5).bfloat16()
    result, normed = _result(module, {"weight": weight}, x), x.float()
    normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + eps)
    for casting, offset in NORMS:
        by_mode = {
            "llama": (offset + weight) * normed.bfloat16(),
            "gemma": (normed * (offset + weight.float())).bfloat16(),
        }
        if result is not None and torch.equal(result, by_mode[casting]):
            from liger_kernel.ops import LigerRMSNormFunction

            def forward(self: nn.Module, x: Tensor, casting: str = casting, offset: float = offset) -> Tensor:
                # Not in place: the buffer may also be the gradient of a residual.
                return LigerRMSNormFunction.apply(x, self.weight, eps, offset, casting, False, None)

            return forward
    return None


def _gated(module: nn.Module, drawn: Callable[..., Tensor]) -> Callable[..., Tensor] | None:
    """`down(activation(gate(x)) * up(x))`, with gate and up in one layer or two."""
    children = dict(module.named_children())
    for shapes in GATED:
        if not all(isinstance(children.get(name), nn.Linear) for name in shapes):
            continue
        weights = {f"{name}.weight": drawn(*shape) for name, shape in shapes.items()}
        for name, shape in shapes.items():
            if children[name].bias is not None:
                weights[f"{name}.bias"] = drawn(shape[0])
        if {name for name, _ in module.named_parameters()} != weights.keys():
            return None
        x = drawn(16, 4)
        result = _result(module, weights, x)
        *inner, outer = ((weights[f"{name}.weight"], weights.get(f"{name}.bias")) for name in shapes)
        gate, up = torch.cat([F.linear(x, *layer) for layer in inner], -1).chunk(2, -1)
        for kernel, activation in ACTIVATIONS.items():
            if result is not None and torch.allclose(
                result, F.linear(activation(gate) * up, *outer), rtol=1e-6, atol=1e-6
            ):
                return _with_kernel(kernel, together=len(inner) == 1)
    return None


def _with_kernel(kernel: str, *, together: bool) -> Callable[..., Tensor]:
    import liger_kernel.ops

    product = getattr(liger_kernel.ops, kernel).apply

    def forward(self: Any, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1) if together else (self.gate_proj(x), self.up_proj(x))
        return self.down_proj(product(gate, up))

    return forward


def _rope(module: nn.Module, drawn: Callable[..., Tensor]) -> Callable[..., Any] | None:
    """The attention's own code with its half-rotation of heads by given cos and sin replaced: rows may be at any positions."""
    own = type(module).forward
    rotate = getattr(own, "__globals__", {}).get(ROPE)
    if rotate is None or ROPE not in own.__code__.co_names:
        return None
    q, k, angles = drawn(1, 4, 5, 8), drawn(1, 2, 5, 8), drawn(1, 5, 4).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    try:
        results = rotate(q, k, cos, sin)
    except Exception:  # the model's code can raise anything
        return None
    for x, result in zip((q, k), results, strict=True):
        first, second = x.chunk(2, -1)
        expected = x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]
        if result.shape != x.shape or not torch.allclose(result, expected, rtol=1e-6, atol=1e-6):
            return None
    from liger_kernel.ops import LigerRopeFunction

    def kernel(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if args or kwargs:  # another tensor layout
            return rotate(q, k, cos, sin, *args, **kwargs)
        return LigerRopeFunction.apply(q, k, cos, sin)

    forward = FunctionType(
        own.__code__, {**own.__globals__, ROPE: kernel}, own.__name__, own.__defaults__, own.__closure__
    )
    forward.__kwdefaults__ = own.__kwdefaults__
    return forward
