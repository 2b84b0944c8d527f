# SPDX-License-Identifier: Apache-2.0
"""The Trainer of Transformers with sequences sharded over ranks.

    trainer = SequenceParallelTrainer(model, arguments, train_dataset=dataset, sp_size=4)
    trainer.train()

A whole script: launch/examples/trainer.py. The Trainer divides by the number of targets of all ranks and micro-steps and undoes the
mean over ranks by itself (`average_tokens_across_devices`), in training and evaluation; what is left is to give the ranks of a
sequence the same one, and each its rows of it.
"""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader, DistributedSampler
from transformers import Trainer

from ring_hilbert.integrations.sequence_parallel import SequenceParallel
from ring_hilbert.integrations.transformers_config import order_of, settings_of
from ring_hilbert.parallel.sharding import KEYS, shard_batch


class SequenceParallelTrainer(Trainer):
    """`transformers.Trainer` whose ranks share sequences, `sp_size` neighbours each.

    The model's `config.ring_hilbert` says how rows are ordered and laid over the ranks. Datasets have a length; a row has
    `input_ids` and whatever else `shard_batch` takes, of a fixed length or padded by a `data_collator`. Batch sizes are those of a
    group of ranks. Gradients are averaged over all ranks by DDP, FSDP2, or DeepSpeed without sequence-parallel settings of its own.

    Args:
        arguments, options: as of `transformers.Trainer`.
        sp_size: ranks of a sequence; it divides the number of ranks.

    Raises:
        ValueError: for ranks that cannot be divided so, or settings that would scale the loss or share the data out otherwise.
    """

    def __init__(self, *arguments: Any, sp_size: int = 1, **options: Any) -> None:
        super().__init__(*arguments, **options)
        args = self.args
        settings_of(self._text_config)
        self.sampling = getattr(args, "train_sampling_strategy", "random")
        wrong = {  # ranks of a sequence have unequal numbers of targets, and shard a batch together in their main processes
            "average_tokens_across_devices": not args.average_tokens_across_devices,
            "compute_loss_func": self.compute_loss_func is not None,
            "label_smoothing_factor": args.label_smoothing_factor != 0,
            "dataloader_num_workers": args.dataloader_num_workers > 0,
            "train_sampling_strategy": self.sampling not in ("random", "sequential"),
            "parallelism_config": getattr(args, "parallelism_config", None) is not None,
        }
        if any(wrong.values()):
            names = ", ".join(name for name, is_wrong in wrong.items() if is_wrong)
            raise ValueError(f"SequenceParallelTrainer works with the default of {names} only: leave out what sets it")
        if not self.model_accepts_loss_kwargs:
            raise ValueError(
                f"{type(self.model).__name__}.forward does not take num_items_in_batch, which the loss is divided by"
            )
        if sp_size > 1 and args.world_size == 1:
            raise ValueError(
                f"sp_size={sp_size} with one rank; start torchrun --nproc-per-node {sp_size}, or use sp_size=1"
            )
        self.groups = None if args.world_size == 1 else SequenceParallel(sp_size)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Every group of ranks reads a share of its own, drawn anew in every epoch by `data_seed` or `seed`."""
        if self.train_dataset is None:
            raise ValueError("training needs a train_dataset")
        size, shuffle = self.args.per_device_train_batch_size, self.sampling == "random"
        return self._loader(self.train_dataset, size, shuffle, self.args.dataloader_drop_last)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Of the Trainer's `eval_dataset`, of one of several by name, or of another; shares are filled up from the beginning."""
        dataset: Any = self.eval_dataset if eval_dataset is None or isinstance(eval_dataset, str) else eval_dataset
        if isinstance(eval_dataset, str):
            dataset = dataset[eval_dataset]
        if dataset is None:
            raise ValueError("evaluation needs an eval_dataset")
        return self._loader(dataset, self.args.per_device_eval_batch_size)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """As `get_eval_dataloader`."""
        return self._loader(test_dataset, self.args.per_device_eval_batch_size)

    @property
    def _text_config(self) -> Any:
        return self.accelerator.unwrap_model(self.model).config.get_text_config(decoder=True)

    def _loader(self, dataset: Any, batch_size: int, shuffle: bool = False, drop_last: bool = False) -> DataLoader[Any]:
        groups, args = self.groups, self.args
        sampler: DistributedSampler[Any] = DistributedSampler(
            dataset, 1 if groups is None else groups.dp_size, 0 if groups is None else groups.dp_rank, shuffle,
            args.seed if args.data_seed is None else args.data_seed, drop_last,
        )  # fmt: skip
        return _Loader(dataset, batch_size, sampler=sampler, drop_last=drop_last, collate_fn=self._shard)

    def _shard(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """This rank's rows of a batch, as the Trainer counts its targets and the model computes its loss."""
        if self.args.remove_unused_columns:
            rows = [{key: row[key] for key in KEYS if key in row} for row in rows]
        settings = settings_of(self._text_config)
        given = {key: settings[key] for key in ("layout", "strategy") if key in settings}
        group = None if self.groups is None else self.groups.group
        full, order = dict(self.data_collator(rows)), order_of(self._text_config)
        batch = shard_batch(full, group, order=order, device=self.args.device, **given)
        return {**batch, "labels": batch["shift_labels"]}


class _Loader(DataLoader[Any]):
    """A loader that tells its sampler of the epoch, as the Trainer asks of those that it makes."""

    def set_epoch(self, epoch: int) -> None:
        """Shuffle otherwise from now on."""
        self.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
