# SPDX-License-Identifier: Apache-2.0
"""Whether a model can be trained here: only our attention may mix rows, and the loss must be that of its logits.

Both are checked by running the model's own code on a few rows, with stand-ins for its large weights, so that the cost does not
grow with them.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from ring_hilbert.parallel.sharding import shard_batch
from ring_hilbert.training.head import INSTEAD, HiddenStates, output_layer

ROWS, CLASSES = 4, 7
SMALL = 2**20  # parameters up to this many elements are materialised
TOLERANCE = 1e-3  # of a log-probability in float32; a forgotten factor or cap changes it by 0.1 or more


@torch.no_grad()
def check_rows(model: PreTrainedModel) -> None:
    """If every row is its own document and one is NaN, the hidden states of the others must be finite.

    NaN propagates whatever the weights, so they need no values: the large ones are one number, expanded to a matrix.

    Args:
        model: on the meta device, with `attn_implementation=ROWS_ALONE`; it is given those values.

    Raises:
        ValueError: if rows see each other outside the attention, or the attention refuses the model.
    """
    _fill(model, lambda like: torch.ones(like.shape) if like.numel() <= SMALL else torch.ones(()).expand(like.shape))
    ids = torch.arange(ROWS)[None]
    batch = shard_batch({"input_ids": ids, "document_ids": ids})
    del batch["shift_labels"]
    with _StandIns():
        for poisoned in ([], [1]):
            handle = model.get_input_embeddings().register_forward_hook(_Poison(poisoned))
            hidden = model.base_model(**batch, use_cache=False).last_hidden_state
            handle.remove()
            reached = hidden[0].isnan().any(-1).nonzero().flatten().tolist()
            if reached != poisoned:
                raise ValueError(
                    f"with NaN in rows {poisoned} of {ROWS}, each a document of its own, hidden states of rows {reached} are NaN: "
                    "rows may see each other only in the attention that Transformers looks up by name. Recurrent layers, "
                    "convolutions over the sequence and attention of the model's own know neither documents nor the order of rows "
                    "nor other ranks"
                )


def check_head(model: PreTrainedModel, loss_model: Callable[[PreTrainedModel], nn.Module]) -> None:
    """The loss of given hidden states must be that of the logits that the model's own `forward` makes of them.

    Args:
        model: as `check_rows` left it; to be discarded afterwards.
        loss_model: wraps it in a module that returns the loss of every row.

    Raises:
        ValueError: if the logits cannot be derived from the hidden states.
    """
    output = output_layer(model)
    output.out_features, width = CLASSES, output.in_features
    for name, parameter in list(output.named_parameters()):
        setattr(output, name, nn.Parameter(torch.randn(CLASSES, *parameter.shape[1:])))
    inside = {*model.base_model.modules(), output}
    for module in set(model.modules()) - inside:
        kinds: list[dict[str, Any]] = [module._parameters, module._buffers]
        for values in kinds:
            values.update({name: _drawn(value) for name, value in values.items() if value is not None})
    hidden = torch.randn(1, ROWS, width) * 10 * width**-0.5  # logits of order 10, where a cap takes effect
    given = hidden

    def base_forward(*_: Any, **__: Any) -> HiddenStates:
        return HiddenStates(given)

    model.base_model.forward = base_forward
    ids = torch.zeros(1, ROWS, dtype=torch.int64)
    own = model(input_ids=ids, use_cache=False, return_dict=True).logits.detach().float().log_softmax(-1)
    loss, trained = loss_model(model), torch.empty(1, ROWS, CLASSES)
    for row, label in product(range(ROWS), range(CLASSES)):  # row by row: none may depend on another's logits
        given, labels = hidden[:, [row]], torch.tensor([[label]])
        trained[0, row, label] = -loss(input_ids=ids[:, [row]], shift_labels=labels).item()
    error = (own - trained).abs().max().item() if own.shape == trained.shape else torch.inf
    if not error <= TOLERANCE:
        raise ValueError(
            f"log-probabilities of {type(model).__name__} are off by {error:.2g} from those that the loss makes of the same hidden "
            f"states; {INSTEAD}"
        )


def _fill(model: nn.Module, parameter: Callable[[Tensor], Tensor]) -> None:
    """Give tensors on the meta device values: parameters `parameter(like)`, buffers and others ones."""
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = nn.Parameter(parameter(value))
        for values in (module._buffers, vars(module)):
            for name, value in values.items():
                if isinstance(value, Tensor) and value.is_meta:
                    values[name] = torch.ones(value.shape, dtype=value.dtype)


def _drawn(like: Tensor) -> Tensor:
    """Random values for a parameter or buffer, so that nothing cancels; non-floating ones stay as they are."""
    drawn = torch.rand(like.shape) + 0.5 if like.is_floating_point() else like
    return nn.Parameter(drawn) if isinstance(like, nn.Parameter) else drawn


class _Poison:
    """A hook that puts NaN in rows of a module's output."""

    def __init__(self, rows: list[int]) -> None:
        self.rows = torch.tensor(rows, dtype=torch.int64)

    def __call__(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return output.index_fill(1, self.rows, torch.nan)


class _StandIns(TorchFunctionMode):
    """Linear layers return the mean of each input row, whatever their weights, whose cost would grow with the model."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return args[0].mean(-1, keepdim=True).repeat_interleave(len(args[1]), -1)
        return func(*args, **(kwargs or {}))
