# SPDX-License-Identifier: Apache-2.0
"""What a saved model says of given tokens: their loss, and whether each was its first choice. Nothing is generated.

Of any folder for `AutoModelForCausalLM`, on one device or with every sequence over all ranks of a world. A model without
`config.ring_hilbert` is scored with dense attention, which over ranks is ring attention.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

from ring_hilbert.integrations.transformers_config import LOCAL_ROPE, NAME, local_rope, order_of
from ring_hilbert.parallel.gathering import gather_rows
from ring_hilbert.parallel.sharding import IGNORED, shard_batch
from ring_hilbert.training.config import DataConfig
from ring_hilbert.training.data import PackedDataset, open_dataset
from ring_hilbert.training.disks import once_per_disk
from ring_hilbert.training.evaluate import Evaluation
from ring_hilbert.training.head import OwnHead
from ring_hilbert.training.loss import HitHead, LossHead
from ring_hilbert.training.model import vocab_size
from ring_hilbert.training.prepare import cache_folder
from ring_hilbert.training.world import World

DENSE = {"segment_lengths": [None], "dilation_rates": [1]}


class Scorer:
    """A model in evaluation mode on this rank's device, whole on every rank.

    Args:
        folder: what `save_pretrained` wrote, or a run's exported model.
        world: its ranks share every sequence.
        dtype: "float32", "bfloat16" ...; "auto" is what the folder says.

    Raises:
        ValueError: the folder holds no causal language model, or one that ranks cannot share a sequence of.
    """

    def __init__(self, folder: str | Path, world: World, dtype: str = "auto") -> None:
        self.world = world
        try:
            self.config = AutoConfig.from_pretrained(folder, local_files_only=True)
            if getattr(self.config, NAME, None) is None:
                self.config.ring_hilbert = DENSE
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, config=self.config, dtype=dtype, attn_implementation=NAME, local_files_only=True,
                output_loading_info=True,
            )  # fmt: skip
            model, loading = loaded
        except (ValueError, OSError) as error:
            raise ValueError(f"model folder {str(folder)!r} cannot be loaded: {error}") from error
        for found, keys in (("lack", "missing_keys"), ("have what the model has not:", "unexpected_keys")):
            if loading[keys]:  # Transformers draws or drops them, and only logs it
                raise ValueError(
                    f"model folder {str(folder)!r}: its files {found} {', '.join(sorted(loading[keys])[:3])}"
                )
        kind = local_rope(self.config.get_text_config(decoder=True)) if world.size > 1 else None
        if kind is not None:
            raise ValueError(f"model folder {str(folder)!r}: {LOCAL_ROPE.format(kind)}, or score on one rank")
        self.model: Any = model.eval().to(world.device)  # pyright: ignore[reportArgumentType]  # the stub lacks devices
        self.order = order_of(self.config)
        self._own_head = OwnHead(self.model)
        self._losses, self._hits = (kind(self.model.get_output_embeddings()) for kind in (LossHead, HitHead))

    @property
    def longest(self) -> int | None:
        """How many tokens of a sequence the model has positions for; None if it does not say."""
        return getattr(self.config.get_text_config(decoder=True), "max_position_embeddings", None)

    @torch.no_grad()
    def __call__(self, input_ids: np.ndarray, document_ids: np.ndarray | None = None) -> tuple[Tensor, Tensor]:
        """Score sequences, the same ones on all ranks, with all of them.

        Args:
            input_ids: int64 `[B, S]` in natural order.
            document_ids: int64 `[B, S]`, -1 for padding; default one document.

        Returns:
            Both `[B, S]` on the CPU, on every rank, entry t about token t + 1 given those of its document up to t: its loss in
            nats, float64 and NaN where there is none; and whether no token is likelier, bool.
        """
        full = {"input_ids": torch.from_numpy(input_ids)}
        if document_ids is not None:
            full["document_ids"] = torch.from_numpy(document_ids)
        world = self.world
        batch: dict[str, Any] = shard_batch(full, world.sp_group, order=self.order, device=world.device)
        labels, prepared = batch.pop("shift_labels"), batch["ring_hilbert"]
        hidden = self.model.base_model(**batch, use_cache=False).last_hidden_state
        features, after = self._own_head.features(hidden)
        losses = self._losses(features, labels, after).double().masked_fill(labels == IGNORED, torch.nan)
        hits = self._hits(features, labels, after) > 0
        return gather_rows(losses, prepared).cpu(), gather_rows(hits, prepared).cpu()


def score(scorer: Scorer, data: DataConfig) -> Evaluation:
    """The held-out documents of `data`, in sequences of `data.seq_len`. All ranks call it.

    Raises:
        ValueError: the data cannot be read, have not one target, or the model has no positions for such sequences.
    """
    world, vocab = scorer.world, vocab_size(scorer.config)
    if scorer.longest is not None and data.seq_len > scorer.longest:
        raise ValueError(
            f"sequences of {data.seq_len} tokens, but the model has positions for {scorer.longest} "
            f"(max_position_embeddings); use at most that many"
        )

    def opened() -> PackedDataset:
        return open_dataset(data, "eval", vocab)

    with world.phase("data", "preparing data"):
        once_per_disk(world, cache_folder(), opened)
    with world.together():
        sequences = opened()
    losses, counts = torch.zeros(data.seq_len, dtype=torch.float64), torch.zeros(data.seq_len, dtype=torch.int64)
    targets = torch.zeros(vocab, dtype=torch.int64)
    for number in tqdm(range(len(sequences)), unit="sequence", disable=not world.is_main, mininterval=1):
        sample = sequences[number]
        found, _ = scorer(sample["input_ids"][None], sample["document_ids"][None])
        real = ~found[0].isnan()
        losses += found[0].nan_to_num()
        counts += real
        targets += torch.bincount(torch.from_numpy(sample["input_ids"][1:])[real[:-1]], minlength=vocab)
    if not counts.any():
        raise ValueError("the documents to score hold not one token after another")
    total = int(counts.sum())
    return Evaluation(losses.sum().item() / total, total, losses / counts, targets)
