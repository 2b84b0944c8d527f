# SPDX-License-Identifier: Apache-2.0
"""Held-out loss: the same token-weighted mean on every rank and at every world size, and the unigram model to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ring_hilbert.parallel.sharding import IGNORED
from ring_hilbert.training.batches import Batches
from ring_hilbert.training.data import PackedDataset
from ring_hilbert.training.world import World

UNIGRAM_TOKENS = 2**22  # most training tokens to which the unigram model is fitted


@dataclass(frozen=True)
class Evaluation:
    """Mean loss in nats per target token, and its components."""

    loss: float
    tokens: int
    # [seq_len] float64 CPU: mean loss of the targets that follow token i; NaN where there is none.
    position_loss: torch.Tensor
    target_counts: torch.Tensor  # [vocab] int64 CPU: how often each token is a target

    def unigram_loss(self, train_counts: torch.Tensor) -> float:
        """Mean loss, on the same targets, of a model of token frequencies only: `train_counts [vocab]`, add-one smoothed."""
        smoothed = train_counts.double() + 1
        log_probabilities = (smoothed / smoothed.sum()).log()
        return -(self.target_counts * log_probabilities).sum().item() / self.tokens

    def by_position(self) -> dict[int, float]:
        """Mean loss of the targets after tokens 2^i .. 2^(i+1) - 1 of a sequence, as of `by_power`."""
        return by_power(self.position_loss)


def by_power(losses: torch.Tensor) -> dict[int, float]:
    """Of the losses after the first token, the second, ... `[n]`: the mean after tokens 2^i .. 2^(i+1) - 1, by 2^i.

    NaN is no loss; ranges without one are omitted.
    """
    found = {}
    for power in range(len(losses).bit_length()):
        inside = losses[2**power - 1 : 2 ** (power + 1) - 1]
        if torch.isfinite(inside).any():
            found[2**power] = inside.nanmean().item()
    return found


@torch.no_grad()
def evaluate(model: torch.nn.Module, batches: Batches, vocab: int, world: World) -> Evaluation:
    """Run `model` over the whole dataset of `batches`, all ranks together.

    Raises:
        ValueError: if it holds no target token.
    """
    length = len(batches.dataset)
    losses = torch.zeros(batches.seq_len, dtype=torch.float64, device=world.device)  # by natural token index
    counts = torch.zeros(batches.seq_len, dtype=torch.int64, device=world.device)
    targets = torch.zeros(vocab, dtype=torch.int64, device=world.device)
    was_training = model.training
    model.eval()
    for number in range(batches.rounds(length)):
        batch = batches.load(0, length, number)
        labels = batch["shift_labels"]
        per_token = model(**batch)
        real = labels != IGNORED
        tokens = batch["ring_hilbert"].rows.to(world.device).expand_as(labels)[real]  # the natural index of each
        losses.index_add_(0, tokens, per_token[real].double())
        counts += torch.bincount(tokens, minlength=batches.seq_len)
        targets += torch.bincount(labels[real], minlength=vocab)
    model.train(was_training)
    for total in (losses, counts, targets):
        world.sum(total)
    total_count = int(counts.sum())
    if total_count == 0:
        raise ValueError("data.eval: the held-out sequences hold no target token")
    return Evaluation(losses.sum().item() / total_count, total_count, (losses / counts).cpu(), targets.cpu())


def count_tokens(dataset: PackedDataset, vocab: int, seq_len: int) -> torch.Tensor:
    """How often each token occurs in the first training sequences, up to `UNIGRAM_TOKENS`: [vocab] int64."""
    counts = torch.zeros(vocab, dtype=torch.int64)
    for index in range(min(len(dataset), max(1, UNIGRAM_TOKENS // seq_len))):
        sample = dataset[index]
        tokens = torch.from_numpy(sample["input_ids"][sample["document_ids"] >= 0])
        counts += torch.bincount(tokens, minlength=vocab)
    return counts
