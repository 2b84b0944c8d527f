# SPDX-License-Identifier: Apache-2.0
"""Transformers' Trainer with sequences sharded over ranks.

    trainer = SequenceParallelTrainer(model, arguments, train_dataset=dataset, sp_size=4)
    trainer.train()

A complete script: launch/examples/trainer.py. The Trainer itself divides by the number of targets of all ranks and micro-steps and
undoes the mean over ranks (`average_tokens_across_devices`), in training and evaluation; what remains is to give the ranks of a
group the same sequence and each its rows of it, and to gather the results for metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.data_loader import IterableDatasetShard, prepare_data_loader
from accelerate.utils import recursively_apply
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput, has_length

from ring_hilbert.integrations.resuming import Passes, SamePlace
from ring_hilbert.integrations.sequence_parallel import SequenceParallel
from ring_hilbert.integrations.transformers_config import order_of, settings_of
from ring_hilbert.ops.visible import PADDING
from ring_hilbert.parallel.gathering import gather_batch, gather_rows
from ring_hilbert.parallel.sharding import IGNORED, KEYS, shard_batch


class SequenceParallelTrainer(Trainer):
    """`transformers.Trainer` whose ranks share sequences, `sp_size` neighbours each.

    The model's `config.ring_hilbert` decides how rows are ordered and distributed over the ranks. A row of a dataset has
    `input_ids` and whatever else `shard_batch` takes, of a fixed length or padded by a `data_collator`. Batch sizes are per group
    of ranks; groups take the batches of a dataset in turn, as ranks do in the Trainer, so that one group reads what one rank would
    read there. A resumed run continues with the same data, even in mid-epoch; with different batches it is refused.

    An `IterableDataset` must yield the same rows on all ranks and in every run, one epoch per pass, in an order that depends only
    on `set_epoch(epoch)` or the seed of its `generator`, if it has either. Without a length it is read pass after pass, all of
    which the Trainer takes for one epoch; evaluation accepts one only if all ranks share every sequence.

    `compute_metrics` and `predict` get what the Trainer would give them: rows of the dataset in its order, tokens in natural order,
    labels not shifted. Labels are -100 where no token predicts them: padding, and the first tokens of further documents.
    `preprocess_logits_for_metrics(logits, labels)` runs on this rank's rows `[B, S_local, ...]` in the order of the model, with
    the labels of the same tokens, also not shifted: its result must have a value for every row, like `logits.argmax(-1)`, and is
    gathered in natural order. Compare tokens with their predictions in `compute_metrics`: the row before may be another rank's.

    Gradients are averaged over all ranks by DDP, FSDP2, or DeepSpeed without sequence-parallel settings of its own.

    Args:
        arguments, options: as for `transformers.Trainer`.
        sp_size: ranks per sequence, a divisor of the number of ranks.
        max_logits_bytes: limit on all logits of an evaluation, in float32, to be gathered on every rank; more is refused before
            the model runs, asking for `preprocess_logits_for_metrics`.

    Raises:
        ValueError: if the ranks cannot be divided like this, or for settings that would change how loss or data are divided.
    """

    def __init__(self, *arguments: Any, sp_size: int = 1, max_logits_bytes: int = 2**32, **options: Any) -> None:
        super().__init__(*arguments, **options)
        args = self.args
        accelerator: Any = args.accelerator_config  # an AcceleratorConfig by now
        settings_of(self._text_config)
        self.sampling = getattr(args, "train_sampling_strategy", "random")
        wrong = {  # ranks of a sequence have different numbers of targets, and shard batches together in their main processes
            "average_tokens_across_devices": not args.average_tokens_across_devices,
            "compute_loss_func": self.compute_loss_func is not None,
            "label_smoothing_factor": args.label_smoothing_factor != 0,
            "dataloader_num_workers": args.dataloader_num_workers > 0,
            "train_sampling_strategy": self.sampling not in ("random", "sequential"),
            "parallelism_config": getattr(args, "parallelism_config", None) is not None,
            "accelerator_config.split_batches": accelerator.split_batches,
            "accelerator_config.dispatch_batches": accelerator.dispatch_batches is True,
        }
        if any(wrong.values()):
            names = ", ".join(name for name, is_wrong in wrong.items() if is_wrong)
            raise ValueError(f"SequenceParallelTrainer only works with the default of {names}: do not set it")
        if not self.model_accepts_loss_kwargs:
            raise ValueError(
                f"{type(self.model).__name__}.forward does not take num_items_in_batch, which the loss is divided by"
            )
        if sp_size > 1 and args.world_size == 1:
            raise ValueError(
                f"sp_size={sp_size} with one rank; start torchrun --nproc-per-node {sp_size}, or use sp_size=1"
            )
        self.groups = None if args.world_size == 1 else SequenceParallel(sp_size)
        self.dp_size, self.dp_rank = (1, 0) if self.groups is None else (self.groups.dp_size, self.groups.dp_rank)
        self.add_callback(SamePlace)
        self.max_logits_bytes = max_logits_bytes
        self._logits_bytes = 0  # that are held
        self._held: tuple[int, int] | None = None  # rows and batches, 0 if not known; None if held one batch at a time
        self._preprocess: Callable[[Any, Tensor], Any] | None = None
        self._loss_compared = False

    def get_train_dataloader(self) -> DataLoader[Any]:
        """This rank's rows of its group's share of the data, reshuffled in every epoch by `data_seed` or `seed`."""
        dataset, args = self.train_dataset, self.args
        if dataset is None:
            raise ValueError("training needs a train_dataset")
        if isinstance(dataset, IterableDataset):
            dataset = Passes(dataset)

        def shard(rows: list[dict[str, Any]]) -> dict[str, Any]:
            return self._shard(self._collate(rows))

        return self._loader(
            dataset, self._train_batch_size, shard, self.sampling == "random", args.dataloader_drop_last
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Whole batches in order, from the Trainer's `eval_dataset`, one of several by name, or another dataset."""
        dataset: Any = self.eval_dataset if eval_dataset is None or isinstance(eval_dataset, str) else eval_dataset
        if isinstance(eval_dataset, str):
            dataset = dataset[eval_dataset]
        if dataset is None:
            raise ValueError("evaluation needs an eval_dataset")
        if isinstance(dataset, IterableDataset) and self.dp_size > 1:
            raise ValueError(
                f"an IterableDataset is evaluated only where all ranks share every sequence, sp_size={self.args.world_size}: "
                f"{self.dp_size} groups of ranks cannot tell which of its rows pad the last batch; give a dataset with a length"
            )
        return self._loader(dataset, self.args.eval_batch_size, self._collate)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """As `get_eval_dataloader`."""
        return self.get_eval_dataloader(test_dataset)

    def evaluation_loop(
        self, dataloader: DataLoader[Any], description: str, *arguments: Any, **options: Any
    ) -> EvalLoopOutput:
        """As in the Trainer, which here gathers over groups: results within a group are already whole."""
        kept = self.preprocess_logits_for_metrics, self.gather_function
        self._preprocess, self.preprocess_logits_for_metrics = self.preprocess_logits_for_metrics, None
        self.gather_function, self._logits_bytes = self._of_all_groups, 0
        self._held = (len(dataloader.dataset), len(dataloader)) if has_length(dataloader.dataset) else (0, 0)
        if self.args.batch_eval_metrics and description != "Prediction":
            self._held = None
        try:
            return super().evaluation_loop(dataloader, description, *arguments, **options)
        finally:
            self._preprocess, (self.preprocess_logits_for_metrics, self.gather_function) = None, kept

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Tensor | None]:
        """Evaluate a group's whole batch `[B, S]`.

        Returns:
            The mean loss of all groups' targets, the logits or what `preprocess_logits_for_metrics` makes of them `[B, S, ...]`,
            and the labels `[B, S]`, on all ranks of the group.
        """
        if not prediction_loss_only and self._preprocess is None:
            self._check_logits(*inputs["input_ids"].shape)
        batch = self._shard(inputs)
        prepared, state, size = batch["ring_hilbert"], self.accelerator.gradient_state, len(batch["input_ids"])
        if self.dp_size > 1 and state.end_of_dataloader and state.remainder > 0:
            if size != self.args.eval_batch_size:
                raise ValueError(
                    f"the data_collator makes {size} rows of {self.args.eval_batch_size}, so that {self.dp_size} groups of ranks "
                    "cannot leave out the padding of the last batch; give an eval_dataset of whole batches for all groups, or use "
                    f"sp_size={self.args.world_size}"
                )
            real = max(state.remainder - self.dp_rank * size, 0)  # the others pad the last batch
            batch["labels"][real:] = IGNORED
        loss, outputs, _ = super().prediction_step(model, batch, prediction_loss_only, ignore_keys)
        mean: Any = self.accelerator.reduce(loss, "mean")
        if prediction_loss_only:
            return mean, None, None
        targets, documents = (gather_rows(batch[key], prepared) for key in ("shift_labels", "document_ids"))
        first = inputs.get("labels", inputs["input_ids"])[:, :1].to(targets.device)
        labels = torch.cat((first.masked_fill(documents[:, :1] == PADDING, IGNORED), targets[:, :-1]), dim=1)
        if self._preprocess is not None:
            rows = prepared.rows.to(labels.device).expand(size, -1)
            outputs = self._preprocess(outputs, labels.take_along_dim(rows, 1))

        def whole(x: Any) -> Tensor:
            if not isinstance(x, Tensor) or x.shape[:2] != batch["input_ids"].shape:
                source = "the model has" if self._preprocess is None else "preprocess_logits_for_metrics returns"
                got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
                raise ValueError(
                    f"metrics need one value per row, [B={size}, S_local={prepared.local_len}, ...], but {source} {got}; drop it "
                    "by ignore_keys or in preprocess_logits_for_metrics"
                )
            return gather_rows(x, prepared)

        return mean, recursively_apply(whole, outputs, test_type=lambda _: True), labels

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As in the Trainer; the first loss is compared with the logits.

        Raises:
            ValueError: on all ranks, if a model does not take `shift_labels` and `num_items_in_batch`, or adds to its loss.
        """
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        logits = getattr(outputs, "logits", None)  # None by fused losses
        if not self._loss_compared and logits is not None and num_items_in_batch:
            parts = zip(
                logits.detach().flatten(0, 1).split(256), inputs["shift_labels"].flatten().split(256), strict=True
            )
            own = torch.stack([cross_entropy(rows.float(), labels, reduction="sum") for rows, labels in parts]).sum()
            own = own / num_items_in_batch * self.accelerator.num_processes
            wrong: Any = self.accelerator.reduce(((loss.detach() - own).abs() > 1e-4 * own + 1e-6).float(), "sum")
            if wrong.item():
                raise ValueError(
                    f"{type(self.accelerator.unwrap_model(model)).__name__} has the loss {loss.item():.6g} where the targets of "
                    f"all ranks and micro-steps give {own.item():.6g}: it does not take shift_labels and num_items_in_batch, or "
                    "adds another loss (config.output_router_logits)"
                )
            self._loss_compared = True
        return (loss, outputs) if return_outputs else loss

    @property
    def _text_config(self) -> Any:
        model: Any = self.accelerator.unwrap_model(self.model)
        return model.config.get_text_config(decoder=True)

    def _loader(
        self, dataset: Any, batch_size: int, collate: Callable[..., Any], shuffle: bool = False, drop_last: bool = False
    ) -> DataLoader[Any]:
        """A loader of this group's share that supports all that the Trainer does with its own: epochs, skipping, ends."""
        groups, options = (self.dp_size, self.dp_rank), {"batch_size": batch_size, "drop_last": drop_last}
        if isinstance(dataset, IterableDataset):
            if self.dp_size > 1:
                dataset, groups = IterableDatasetShard(dataset, batch_size, drop_last, *groups), (1, 0)
        else:
            options["sampler"] = (RandomSampler if shuffle else SequentialSampler)(dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        loader: DataLoader[Any] = DataLoader(dataset, collate_fn=collate, **options)
        return prepare_data_loader(
            loader, num_processes=groups[0], process_index=groups[1], use_seedable_sampler=True, data_seed=seed
        )

    def _collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        if self.args.remove_unused_columns:
            rows = [{key: row[key] for key in KEYS if key in row} for row in rows]
        return dict(self.data_collator(rows))

    def _shard(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """This rank's rows of a batch, in the form in which the Trainer counts targets and the model computes its loss."""
        settings = settings_of(self._text_config)
        given = {key: settings[key] for key in ("layout", "strategy") if key in settings}
        group, order = None if self.groups is None else self.groups.group, order_of(self._text_config)
        batch = shard_batch(batch, group, order=order, device=self.args.device, **given)
        return {**batch, "labels": batch["shift_labels"]}

    def _check_logits(self, batch_size: int, length: int) -> None:
        """Raise ValueError, on all ranks, if a batch `[B, S]` brings the logits to be gathered above the limit."""
        lengths: Any = self.accelerator.gather(torch.tensor([length], device=self.args.device))
        longest = int(lengths.max())
        row, held = 4 * longest * self._text_config.vocab_size, self._logits_bytes
        rows = self.dp_size * batch_size
        size = self._logits_bytes = row * rows + (0 if self._held is None else held)
        if held == 0 and self._held is not None:  # the first batch stands for all
            size = max(size, row * min(self._held[0], rows * self._held[1]))
        if size > self.max_logits_bytes:
            raise ValueError(
                f"compute_metrics and predict would gather {size / 2**30:.1f} GiB of logits on every rank, more than "
                f"max_logits_bytes={self.max_logits_bytes}; pass preprocess_logits_for_metrics, which keeps of each row what is "
                "needed, such as lambda logits, labels: logits.argmax(-1), or raise max_logits_bytes"
            )

    def _of_all_groups(self, value: Any) -> Any:
        """The values of all groups, in dataset order, on all ranks, without the rows that pad the last batch."""
        state = self.accelerator.gradient_state
        rows = state.remainder if state.end_of_dataloader and state.remainder > 0 else None
        if self.groups is not None and self.dp_size > 1:
            value = recursively_apply(gather_batch, value, self.groups.peers)
        return recursively_apply(lambda x: x[:rows], value)
