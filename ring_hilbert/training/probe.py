# SPDX-License-Identifier: Apache-2.0
"""Before a run: does this engine, so configured and on these ranks, compute the right gradient?

The engine computes one step's gradient of a two-layer model of the same family, which is compared with that from the definition:
whole sequences in one process, Transformers' own loss, autograd. A gradient that differs by a factor (a mean in place of a sum) or
otherwise (ranks left out) is refused.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PretrainedConfig

from ring_hilbert.integrations.transformers_config import heads_of, order_of
from ring_hilbert.parallel.sharding import shard_batch
from ring_hilbert.training.batches import Batches
from ring_hilbert.training.config import RunConfig
from ring_hilbert.training.engine import make_engine
from ring_hilbert.training.model import initial_weights, make_model
from ring_hilbert.training.step import accumulate
from ring_hilbert.training.world import World

VOCAB = 256
NOTHING = 1e-6  # relative to the largest gradient: rounding
ROWS = 128  # per rank and sequence; fewer than a kernel's tile would compile kernels that the run itself does not use
TOLERANCE = {"fp64": 1e-4, "fp32": 1e-3, "bf16": 0.1}  # relative, of the factor and of the rest


@dataclass(frozen=True)
class Finding:
    """The parameter with the worst gradient: `gradient = factor * truth + rest`, `rest` relative to the larger of both."""

    name: str
    factor: float
    rest: float


def probe(config: RunConfig, hf_config: PretrainedConfig, world: World) -> Finding:
    """Compare one gradient with the true one. All ranks call it; takes seconds.

    Raises:
        ValueError: if it is wrong; says by which factor, or that ranks are missing.
    """
    small, small_model = _small(config), _small_model(hf_config)
    data = _Sequences(small)
    random_state = torch.random.get_rng_state()
    engine = make_engine(small, small_model, world)
    batches = Batches(data, small, order_of(small_model), world)
    accumulate(engine, batches.of(0, small.sequences_per_step), world)
    gradients = engine.gradients()
    truth = _truth(small, small_model, data)
    finding = worst(gradients, truth)
    engine.close()
    torch.random.set_rng_state(random_state)
    with world.together():
        check(finding, TOLERANCE[config.train.precision], config)
    return finding


def worst(gradients: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> Finding:
    """The finding for the parameter whose gradient is furthest from the true one."""
    findings, largest = [], max(true.norm().item() for true in truth.values())
    for name, true in truth.items():
        if name not in gradients:
            return Finding(name, 0.0, 0.0)
        mine = gradients[name].double().cpu()
        if max(mine.norm().item(), true.norm().item()) < NOTHING * largest:
            continue  # a key bias, to which softmax is invariant, or an expert without tokens
        factor = ((mine * true).sum() / (true * true).sum()).item()
        rest = ((mine - factor * true).norm() / max(mine.norm().item(), true.norm().item())).item()
        findings.append(Finding(name, factor, rest))
    return max(findings, key=lambda finding: _distance(finding))


def check(finding: Finding, tolerance: float, config: RunConfig) -> None:
    """Refuse a wrong gradient.

    Raises:
        ValueError: saying what is wrong.
    """
    if _distance(finding) <= tolerance:
        return
    parallel = config.parallel
    where = (
        f"engine {config.engine} on dp_shard {parallel.dp_shard} * dp_replicate {parallel.dp_replicate} * sp {parallel.sp} ranks: "
        f"the gradient of {finding.name} in a two-layer probe is"
    )
    if finding.rest <= tolerance:
        raise ValueError(
            f"{where} {finding.factor:.4g} times the true one{_named(finding.factor, config)}: a mean is used in place of a sum "
            "over ranks, or vice versa; the versions in launch/constraints.txt are correct"
        )
    raise ValueError(
        f"{where} not a multiple of the true one ({finding.rest:.0%} of it is something else): a sum over the ranks of a sequence "
        "is missing, or every rank divides its loss by its own count of targets instead of the global one"
    )


def _named(factor: float, config: RunConfig) -> str:
    """Which size of this run the factor equals, if any."""
    parallel = config.parallel
    sizes = {parallel.world_size: "the number of ranks", parallel.dp: "dp", parallel.sp: "sp"}
    for size, name in sizes.items():
        if size > 1 and math.isclose(factor, size, rel_tol=0.05):
            return f" ({name})"
        if size > 1 and math.isclose(factor * size, 1, rel_tol=0.05):
            return f" (1 / {name})"
    return ""


def _distance(finding: Finding) -> float:
    return max(abs(finding.factor - 1), finding.rest) if math.isfinite(finding.factor + finding.rest) else math.inf


def _small(config: RunConfig) -> RunConfig:
    """`config` with few, short sequences and a pattern for them; engine, ranks and precision as they are."""
    length = ROWS * config.parallel.sp
    steps = min(2, config.sequences_per_step // (config.parallel.dp * config.train.micro_batch))
    train = {
        "global_batch_tokens": length * config.parallel.dp * steps,
        "micro_batch": 1,
        "checkpoint_activations": config.train.checkpoint_activations,
    }
    attention = {
        "segment_lengths": [ROWS, 2 * ROWS],
        "dilation_rates": [1, 2],
        "weights": None,
        "order": None,
        "layers": {},
        "head_shift": 0,
    }
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"path": None, "config": {}}),
            "attention": config.attention.model_copy(update=attention | {"segment_shift": 0}),
            "data": config.data.model_copy(update={"seq_len": length}),
            "train": config.train.model_copy(update=train),
        }
    )


def _small_model(hf_config: PretrainedConfig) -> PretrainedConfig:
    """Two layers of the same family, with heads and an order for which the same kernels are compiled as for the model."""
    small = copy.deepcopy(hf_config.get_text_config(decoder=True))
    heads, kv_heads, head_dim = heads_of(small)
    small.num_hidden_layers = 2
    small.num_attention_heads, small.num_key_value_heads = 2 * heads // kv_heads, 2
    small.hidden_size, small.intermediate_size = small.num_attention_heads * head_dim, 2 * head_dim
    small.vocab_size, small.max_position_embeddings = VOCAB, 2**20
    small.pad_token_id = small.bos_token_id = small.eos_token_id = None
    if getattr(small, "layer_types", None) is not None:
        small.layer_types = small.layer_types[:2]
    small.initializer_range = 1 / math.sqrt(small.hidden_size)
    for key, value in vars(small).items():
        if "drop" in key and isinstance(value, float):  # random, so there would be no true gradient
            setattr(small, key, 0.0)
    theirs = hf_config.ring_hilbert
    small.ring_hilbert = {"segment_lengths": [ROWS, 2 * ROWS], "dilation_rates": [1, 2], "backend": theirs["backend"]}
    if "block" in (theirs.get("order") or {}):
        small.ring_hilbert["order"] = {**theirs["order"], "block": ROWS}
    return small


class _Sequences:
    """Sequences of random tokens: two documents and varying padding, so that ranks have different numbers of targets."""

    def __init__(self, config: RunConfig) -> None:
        self.length, self.count = config.data.seq_len, config.sequences_per_step

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        ids = np.random.default_rng(number).integers(3, VOCAB, self.length)
        documents = np.where(np.arange(self.length) < self.length // 3, 0, 1)
        real = self.length - 5 - (number % 3) * (self.length // 4)
        documents[real:] = -1
        return {"input_ids": ids, "document_ids": documents}


def _truth(config: RunConfig, hf_config: PretrainedConfig, data: _Sequences) -> dict[str, torch.Tensor]:
    """The gradient of the mean loss over all targets, float64 on the CPU: one process, whole sequences."""
    plain = copy.deepcopy(hf_config)
    plain.ring_hilbert = {**plain.ring_hilbert, "backend": "torch"}
    model = make_model(plain).double()
    initial_weights(config, plain).fill(model)
    samples = [data[number] for number in range(len(data))]
    full = {key: torch.from_numpy(np.stack([sample[key] for sample in samples])) for key in samples[0]}
    batch = shard_batch(full, order=order_of(plain))
    labels = batch.pop("shift_labels").flatten()
    logits = model(**batch).logits.flatten(0, 1)
    (F.cross_entropy(logits, labels, reduction="sum") / (labels != -100).sum()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
