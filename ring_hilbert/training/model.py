# SPDX-License-Identifier: Apache-2.0
"""The Transformers model of a run: its configuration with our attention in it, and its loss. No model code of ours."""

from __future__ import annotations

import copy
import json
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from ring_hilbert.checkpointing import checkpoint_contexts, selective_contexts
from ring_hilbert.integrations.transformers import ROWS_ALONE
from ring_hilbert.integrations.transformers_config import LOCAL_ROPE, NAME, local_rope
from ring_hilbert.training.breakdown import marked_loss
from ring_hilbert.training.check import check_head, check_rows
from ring_hilbert.training.config import RunConfig
from ring_hilbert.training.fused import Fused, fuse
from ring_hilbert.training.head import INSTEAD, OwnHead, output_layer
from ring_hilbert.training.loss import LossHead
from ring_hilbert.training.model_keys import refuse_forgotten, refuse_misspelt_rope, refuse_unknown
from ring_hilbert.training.tokens import load_tokenizer, refuse_other_tokenizer
from ring_hilbert.training.weights import Weights, decoder_layers


def model_config(config: RunConfig) -> PretrainedConfig:
    """The Transformers configuration of `config.model`, with the `attention` section as its `ring_hilbert`.

    A new model takes its maximum position from data.seq_len and its special tokens from the tokenizer, unless given.

    Raises:
        ValueError: if Transformers knows no such model_type, key, value or folder, or the tokenizer cannot be loaded, or is not
            that of the folder.
    """
    tokenizer = load_tokenizer(config.data.tokenizer)
    if config.model.path is not None and config.model.path != config.data.tokenizer:
        refuse_other_tokenizer(tokenizer, Path(config.model.path))
    try:
        if config.model.path is not None:
            hf_config = AutoConfig.from_pretrained(config.model.path, local_files_only=True)
            changes = copy.deepcopy(config.model.changes)  # Transformers adds to mappings that it is given
            refuse_unknown(hf_config, changes)
            refuse_forgotten(hf_config.to_dict(), changes)
            longest = max(hf_config.max_position_embeddings, config.data.seq_len)
            changed = hf_config.to_dict() | {"max_position_embeddings": longest} | changes
            hf_config = type(hf_config).from_dict(changed)
            generation_settings(config)  # now, not when the trained model is exported
        else:
            assert config.model.config is not None  # checked by RunConfig
            keys = {
                "max_position_embeddings": config.data.seq_len,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                **copy.deepcopy(config.model.config),
            }
            refuse_misspelt_rope(keys.get("rope_parameters"))
            hf_config = AutoConfig.for_model(keys.pop("model_type"), **keys)
            refuse_unknown(hf_config, keys)
    except (ValueError, TypeError, KeyError, OSError, StrictDataclassError) as error:
        raise ValueError(f"model: Transformers cannot make a configuration from this: {error}") from error
    kind = local_rope(hf_config.get_text_config(decoder=True)) if config.parallel.sp > 1 else None
    if kind is not None:
        raise ValueError(f"model: {LOCAL_ROPE.format(kind)} (model.changes.rope_parameters), or parallel.sp=1")
    hf_config.ring_hilbert = config.attention.to_mapping()
    return hf_config


def generation_settings(config: RunConfig) -> dict[str, Any]:
    """How the model in model.path generates by default, its `generation_config.json`; empty without one.

    It may name more tokens that end a text than the configuration does.

    Raises:
        ValueError: if the file is not a JSON object.
    """
    file = None if config.model.path is None else Path(config.model.path) / GENERATION_CONFIG_NAME
    if file is None or not file.is_file():
        return {}
    try:
        return {**json.loads(file.read_text())}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is not a JSON object: {error}; mend it, or take it out of the folder") from error


def vocab_size(hf_config: PretrainedConfig) -> int:
    """The size of the model's vocabulary."""
    return hf_config.get_text_config(decoder=True).vocab_size


def build_skeleton(
    config: RunConfig, hf_config: PretrainedConfig, device: torch.device | None = None, **fusing: Any
) -> PreTrainedModel:
    """The model without values, on the meta device, in training mode: `Weights` fills it. `check_model` accepts it.

    `device`: on which it will compute, None if on none. `fusing`: further arguments of `fuse`.
    """
    with torch.device("meta"):
        model = make_model(hf_config)
    return for_training(model, config, device, **fusing)


def for_training(
    model: PreTrainedModel, config: RunConfig, device: torch.device | None, **fusing: Any
) -> PreTrainedModel:
    """`model` in training mode, with the fused modules, activation checkpointing and tiled MLP of `config`.

    Raises:
        ValueError: if the layers have no `mlp` to tile, or `fuse` refuses.
    """
    train = config.train
    model.train()
    if device is not None:
        model.fused = fuse(model, config, device, **fusing)  # pyright: ignore[reportArgumentType]  # modules take any attribute
    if train.recomputes != "none" or train.recompute_layers:
        checkpoint_layers(model, checkpoint_contexts)
    layers: list[Any] = [*decoder_layers(model)]
    for number, layer in enumerate(layers):
        if train.recomputes == "none" and number >= train.recompute_layers:
            layer.gradient_checkpointing = False
        elif train.recomputes == "selective" and number >= train.recompute_layers:
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, context_fn=selective_contexts)
        if train.offload_activations:
            layer._gradient_checkpointing_func = _offloaded(layer._gradient_checkpointing_func)
        if train.mlp_tiles != "auto" and train.mlp_tiles > 1:
            if not isinstance(getattr(layer, "mlp", None), torch.nn.Module):
                raise ValueError(f"train.mlp_tiles: {type(layer).__name__} has no mlp; use 1")
            layer.mlp.forward = _tiled(layer.mlp.forward, train.mlp_tiles)
    return model


def checkpoint_layers(model: PreTrainedModel, contexts: Callable[[], Any]) -> None:
    """Recompute every layer in backward, but for what `contexts` keeps."""
    # The name since Transformers 5.2x; gradient_checkpointing_enable is the older one, deprecated there.
    new = "activation_checkpointing_enable"
    enable = getattr(model, new if hasattr(model, new) else "gradient_checkpointing_enable")
    enable({"use_reentrant": False, "context_fn": contexts})


def _offloaded(checkpointed: Callable[..., Any]) -> Callable[..., Any]:
    """Offload what the checkpoint keeps, the layer's input, to the host; pinned if there is a device to copy from."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with save_on_cpu(pin_memory=torch.cuda.is_available()):
            return checkpointed(*args, **kwargs)

    return run


def _tiled(forward: Callable[[torch.Tensor], torch.Tensor], tiles: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A row-wise function, run on `tiles` pieces of the rows, which backward recomputes one at a time.

    Every rank has the same number of pieces, some possibly empty, as engines that gather parameters for each require. (ALST, arXiv
    2506.13996.)
    """

    def run(hidden: torch.Tensor) -> torch.Tensor:
        kept = _Kept(hidden, tiles)
        return torch.cat(
            [kept.checkpoint(forward, *piece) for piece in enumerate(hidden.tensor_split(tiles, dim=1))], dim=1
        )

    return run


class _Kept:
    """Pieces of a tensor `[B, S, E]`, each the input of a checkpoint, kept as one tensor, before the first is computed.

    An enclosing checkpoint stops recomputing at the last tensor kept inside: here at this tensor, before any piece. If inputs were
    kept one by one, it would recompute all pieces but the last, and each again when backward reaches it.
    """

    def __init__(self, tensor: torch.Tensor, tiles: int) -> None:
        self.tiles = tiles
        self.held = _Keep.apply(tensor)
        self.again: tuple[torch.Tensor, ...] | None = None  # the pieces as recomputed for backward

    def checkpoint(
        self, forward: Callable[[torch.Tensor], torch.Tensor], number: int, piece: torch.Tensor
    ) -> torch.Tensor:
        """`forward` of a piece. Nothing here may keep it alive."""
        shape, node = piece.shape, self.held.grad_fn

        def pack(tensor: torch.Tensor) -> torch.Tensor | None:
            return None if node is not None and tensor.shape == shape else tensor

        def unpack(packed: torch.Tensor | None) -> torch.Tensor:
            if packed is not None:
                return packed
            if self.again is None:  # saved tensors can be unpacked only once
                (tensor,) = node.saved_tensors
                self.again = tuple(tensor.tensor_split(self.tiles, dim=1))
            return self.again[number]

        with saved_tensors_hooks(pack, unpack):
            return checkpoint(forward, piece, use_reentrant=False)


class _Keep(torch.autograd.Function):
    """Saves a tensor, to be retrieved through its node."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(tensor)
        return tensor.new_empty(0)

    @staticmethod
    def backward(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing is computed from it")


def check_model(hf_config: PretrainedConfig) -> None:
    """Refuse a model whose function the attention or the loss would change.

    Raises:
        ValueError: if the model cannot be made or run, needs what our attention does not support, lets rows see each other
            elsewhere, has logits that cannot be derived from its hidden states, or is to be trained on another loss as well.
    """
    if getattr(hf_config.get_text_config(decoder=True), "output_router_logits", False):
        raise ValueError(
            "model: output_router_logits adds a loss that balances experts, and the loss here is the cross-entropy alone; set it "
            f"to false, or {INSTEAD}"
        )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with a few rows, more would only wait for each other
    try:
        with torch.device("meta"):
            model = make_model(hf_config, attn_implementation=ROWS_ALONE, experts_implementation="eager")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            check_rows(model.train())
            check_head(model.eval(), LossModel)
    except (ValueError, OSError) as error:
        raise ValueError(f"model: this causal language model cannot be made or run: {error}") from error
    except Exception as error:  # the model's code can raise anything
        file, line, *_ = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(
            f"model: this causal language model cannot be made or run: {type(error).__name__}: {error} ({Path(file).name}:{line}). "
            "Trainable are models whose attention Transformers looks up by name and gives the keyword arguments of the model call, "
            "as Llama, Qwen, Mistral, Gemma, Granite and Phi have"
        ) from error
    finally:
        torch.set_num_threads(threads)


def make_model(hf_config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    """The model in float32 on the current device, initialised by Transformers; `options` as in its `from_config`.

    Raises:
        ValueError: if it has no output layer with which the loss can be computed.
    """
    options = {"attn_implementation": NAME, "dtype": torch.float32, **options}
    model = AutoModelForCausalLM.from_config(hf_config, **options)
    if not isinstance(model.get_output_embeddings(), torch.nn.Linear) or model.base_model is model:
        raise ValueError(f"{type(model).__name__} has no linear output layer over a base model")
    return model


def initial_weights(config: RunConfig, hf_config: PretrainedConfig, *, only_buffers: bool = False) -> Weights:
    """The initial parameters, drawn from train.seed or those of model.path, and buffers.

    Raises:
        ValueError: if the folder has no safetensors files.
    """
    folder = None if config.model.path is None else Path(config.model.path)
    return Weights(build_skeleton(config, hf_config), config.train.seed, folder, only_buffers=only_buffers)


class LossModel(torch.nn.Module):
    """A language model including its loss per token: what an engine trains.

    `model` is the Transformers model; `head` its output layer with the loss. `fused`: how its elementwise work was fused.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.fused: Fused | None = getattr(model, "fused", None)
        self.head = LossHead(output_layer(model), self.fused is not None and self.fused.kind != "none")
        self.own_head = OwnHead(model)

    def forward(self, *, shift_labels: torch.Tensor, **batch: Any) -> torch.Tensor:
        """What `shard_batch` returns -> cross-entropy of every row `[B, S_local]`, as `LossHead`."""
        hidden = self.model.base_model(**batch, use_cache=False).last_hidden_state
        features, after = self.own_head.features(hidden)
        with marked_loss():
            return self.head(features, shift_labels, after)
