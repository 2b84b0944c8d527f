# SPDX-License-Identifier: Apache-2.0
"""What a model's own `forward` does between base model and logits: before the output layer, and after it.

Granite divides its logits, Cohere multiplies them, Gemma caps them, MiniCPM scales the input of the output layer, BERT transforms
it. None of them is special-cased: `forward` itself runs, its base model and output layer replaced by stand-ins that return given
tensors, so that logits need to exist only where and when the loss needs them.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
INSTEAD = "train it in a custom loop, on the logits of model(**rh.shard_batch(...)) (launch/examples)"


class HiddenStates:
    """A base model's output with only `last_hidden_state`: every other attribute is None."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int | slice | str) -> Any:
        return getattr(self, index) if isinstance(index, str) else (self.last_hidden_state,)[index]


class OwnHead:
    """A model's path from hidden states to logits, except for the output layer's product.

    Args:
        model: with a linear output layer over a base model. Its parameters and buffers are used wherever they are at the time.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        base, output = model.base_model, output_layer(model)
        self._base, self._output = _Given(base), _Given(output)
        self._shell = _with(model, {base: self._base, output: self._output})
        self._size = (output.in_features, output.out_features)
        self._name = type(model).__name__

    def features(self, hidden: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor] | None]:
        """The output layer's input for `hidden [B, S, E]`, and `logits`, or None if the class does not change the product.

        Raises:
            ValueError: if `forward` does not call base model and output layer once each, or its logits depend on anything else.
        """
        product = hidden.new_zeros(1, 1, self._size[1], dtype=torch.promote_types(hidden.dtype, torch.float32))
        features, logits = self._run(hidden, product)
        if logits.requires_grad:
            raise ValueError(f"{self._name} adds a term to its logits for which the loss has no gradient; {INSTEAD}")
        if _same(logits, product) and product._version == 0:
            return features, None
        if not _same(
            features, hidden
        ):  # `logits` would run it again, in backward, where an engine may have no parameters for it
            raise ValueError(
                f"{self._name} has layers before its output layer and changes its logits after it; {INSTEAD}"
            )
        return features, self.logits

    def logits(self, product: Tensor) -> Tensor:
        """The model's logits for rows `product [n, V]` of the output layer; the result may be written to."""
        hidden = product.new_zeros(1, 1, 1).expand(1, len(product), self._size[0])
        return self._run(hidden, product[None])[1][0].to(product.dtype)

    def _run(self, hidden: Tensor, product: Tensor) -> tuple[Tensor, Tensor]:
        base, output = self._base, self._output
        base.result, output.result, base.taken, output.taken = HiddenStates(hidden), product, [], []
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        result = self._shell.forward(input_ids=ids, use_cache=False, return_dict=True)
        if len(base.taken) != 1 or len(output.taken) != 1:
            raise ValueError(
                f"{self._name}.forward calls its base model {len(base.taken)} times and its output layer {len(output.taken)} times "
                f"where the loss needs one each; {INSTEAD}"
            )
        features = output.taken.pop()
        base.taken, base.result, output.result = [], None, None
        return features, result.logits


def output_layer(model: PreTrainedModel) -> nn.Linear:
    """The layer that makes logits `[..., V]` of features `[..., E]`, of a model that `make_model` accepted."""
    output = model.get_output_embeddings()
    assert isinstance(output, nn.Linear)
    return output


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether the elements of `a` are those of `b`, not only equal to them."""
    return a.shape == b.shape and (a is b or (a._base is not None and (a._base is b or a._base is b._base)))


class _Given:
    """Stands in for a module: records its arguments and returns a given result; all else is the module's."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.taken: list[Any] = []
        self.result: Any = None

    def __call__(self, *args: Any, **_: Any) -> Any:
        self.taken.append(args[0] if args else None)
        return self.result

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["module"], name)


def _with(module: nn.Module, replaced: Mapping[nn.Module | None, Any]) -> nn.Module:
    """A copy of `module` with some submodules replaced, without hooks; submodules off the path to them are shared, not copied."""
    copied = copy.copy(module)
    for hooks in HOOKS:
        setattr(copied, hooks, OrderedDict())
    copied._modules = {
        name: replaced[child]
        if child in replaced
        else _with(child, replaced)
        if child is not None and any(part in replaced for part in child.modules())
        else child
        for name, child in module._modules.items()
    }
    return copied
