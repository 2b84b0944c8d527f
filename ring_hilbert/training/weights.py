# SPDX-License-Identifier: Apache-2.0
"""Initial weights, one part of the model at a time: no process ever holds all of them.

Drawn weights depend only on the seed and the module's name: they are the same at every world size and in every engine.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"
# Numbers of other dtypes are quantised, and mean nothing by themselves.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Weights:
    """The initial values of parameters and buffers.

    Args:
        skeleton: the model on the meta device; it stays there.
        seed: for drawn values.
        folder: a Transformers model folder with safetensors files, or None to draw all parameters.
        only_buffers: leave parameters out.

    Raises:
        ValueError: if the folder has no such files, or weights in them that the model would be without.
    """

    def __init__(
        self, skeleton: PreTrainedModel, seed: int, folder: Path | None, *, only_buffers: bool = False
    ) -> None:
        self.skeleton = skeleton
        self.only_buffers = only_buffers
        self.seed = seed
        self.files = None if folder is None else _Files(folder)
        if self.files is not None and not only_buffers:
            self.files.require_used(skeleton)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Tensors by name on the CPU, float32 if floating, one layer or other module at a time.

        Tied parameters come once. Buffers are included, even those not in the state dict.

        Raises:
            ValueError: if the folder lacks a parameter or holds it in another shape; or the model says by no `_init_weights` what a
                parameter or buffer begins with.
        """
        seen: set[int] = set()
        for name, module in _parts(self.skeleton):
            parameters = {key: p for key, p in module.named_parameters() if id(p) not in seen and not self.only_buffers}
            seen |= {id(p) for p in parameters.values()}
            buffers = dict(module.named_buffers())
            if not parameters and not buffers:
                continue
            drawn = self._draw(name, module) if self.files is None or buffers else {}
            part = {key: drawn[key] for key in (parameters if self.files is None else {}) | buffers}
            if self.files is not None:
                saved = {key: b for key, b in buffers.items() if _join(name, key) in self.files.place}
                part |= {key: self.files.read(_join(name, key), t) for key, t in (parameters | saved).items()}
            for key, value in part.items():
                if value is drawn.get(key) and _has_unset(value):
                    raise ValueError(
                        f"model: {type(self.skeleton).__name__} gives {_join(name, key)} its first value in a constructor, not in "
                        "_init_weights, so that it cannot be drawn; "
                        + ("use a saved model, by model.path" if key in parameters else "use another class")
                    )
            yield {_join(name, key): _float32(value) for key, value in part.items()}

    def fill(self, model: nn.Module) -> None:
        """Copy everything into `model`, which has the skeleton's names and whole tensors."""
        tensors = {**dict(model.named_buffers()), **dict(model.named_parameters())}
        with torch.no_grad():
            for part in self:
                for name, value in part.items():
                    tensors[name].copy_(value)

    def _draw(self, name: str, module: nn.Module) -> dict[str, Tensor]:
        real = copy.deepcopy(module).to_empty(device="cpu", recurse=True)
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            for value in (*real.parameters(), *real.buffers()):
                if value.dtype != torch.bool:
                    value.fill_(_unset(value.dtype))
            torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            # Inner ones first: GPT-2's attention draws the weights of its own layers again, with another spread.
            for part in sorted(real.modules(), key=_depth_below):
                self.skeleton._init_weights(part)
        return {**dict(real.named_parameters()), **dict(real.named_buffers())}


class _Files:
    """The safetensors files of a model folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if (folder / INDEX).is_file():
            self.place = json.loads((folder / INDEX).read_text())["weight_map"]
        elif (folder / SINGLE).is_file():
            with safe_open(folder / SINGLE, "pt") as file:
                self.place = dict.fromkeys(file.keys(), SINGLE)
        else:
            raise ValueError(f"model.path: {folder} has neither {SINGLE} nor {INDEX}")
        if (folder / ADAPTER).is_file():
            raise ValueError(
                f"model.path: {folder} has an adapter ({ADAPTER}); merge it into the weights, and save these alone"
            )

    def require_used(self, model: PreTrainedModel) -> None:
        """Raise ValueError for tensors that would be left out, except those that Transformers leaves out of this class."""
        names = dict[int, list[str]]()
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        if any(self.place.keys().isdisjoint(tied) for tied in names.values()):
            return  # `read` says which are missing
        ours = {*(name for tied in names.values() for name in tied), *(name for name, _ in model.named_buffers())}
        ignored = [r"rotary_emb\.inv_freq$", *(model._keys_to_ignore_on_load_unexpected or ())]
        left = [name for name in self.place if name not in ours and not any(re.search(rule, name) for rule in ignored)]
        if left:
            raise ValueError(
                f"model.path: the files of {self.folder} have {left[0]}{f' and {len(left) - 1} others' * (len(left) > 1)}, which "
                f"this {type(model).__name__} has not; mend its configuration, or load and save the model once with Transformers"
            )
        for first, *others in ([name for name in tied if name in self.place] for tied in names.values()):
            for other in others:
                if not torch.equal(self._tensor(first), self._tensor(other)):
                    raise ValueError(
                        f"model.path: {first} and {other} in {self.folder} differ, but the configuration makes them one; set "
                        "model.changes.tie_word_embeddings=false"
                    )

    def read(self, name: str, like: Tensor) -> Tensor:
        if name not in self.place:
            raise ValueError(
                f"model.path: the files of {self.folder} have no {name}; if they are of an older format, load and save the model "
                "once with Transformers (from_pretrained, save_pretrained)"
            )
        value = self._tensor(name)
        if value.shape != like.shape:
            raise ValueError(
                f"model.path: {name} in {self.folder} is {list(value.shape)}, the model's is {list(like.shape)}"
            )
        if like.is_floating_point() and value.dtype not in FLOATS:
            raise ValueError(
                f"model.path: {name} in {self.folder} is quantised, {value.dtype}; load the model with Transformers, dequantise() "
                "it, and save it in bfloat16"
            )
        return value

    def _tensor(self, name: str) -> Tensor:
        with safe_open(self.folder / self.place[name], "pt") as file:
            return file.get_tensor(name)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a Transformers model, each sharded, checkpointed and drawn as a unit."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _parts(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Layers, and leaf modules outside them; every parameter is in one of them."""
    if isinstance(model, GradientCheckpointingLayer) or not any(True for _ in model.children()):
        yield name, model
        return
    own = copy.copy(model)
    own._modules = {}
    yield name, own
    for child, module in model.named_children():
        yield from _parts(module, _join(name, child))


def _unset(dtype: torch.dtype) -> float:
    """A number that no initial value is."""
    return torch.nan if dtype.is_floating_point or dtype.is_complex else torch.iinfo(dtype).max


def _has_unset(value: Tensor) -> bool:
    if value.dtype == torch.bool:  # all that it can be are initial values
        return False
    return bool((value.isnan() if value.is_floating_point() else value == _unset(value.dtype)).any())


def _depth_below(module: nn.Module) -> int:
    """Levels of modules in `module`, itself included."""
    return 1 + max(map(_depth_below, module.children()), default=0)


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _float32(value: Tensor) -> Tensor:
    return value.detach().float() if value.is_floating_point() else value.detach()
