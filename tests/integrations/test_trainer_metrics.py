# SPDX-License-Identifier: Apache-2.0
"""Evaluation and prediction of `SequenceParallelTrainer`: what a plain Trainer gives on one device, whatever the ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import DataCollatorWithFlattening, LlamaForCausalLM, Trainer, TrainingArguments, default_data_collator

from ring_hilbert.integrations.trainer import SequenceParallelTrainer
from tests.harness.loops import VOCAB, accelerate_rank, documents, tiny_model
from tests.harness.ranks import run_ranks, run_ranks_collect

ROWS, LENGTH = 7, 24


def padded() -> list[dict[str, torch.Tensor]]:
    """Rows of unequal lengths, padded on the right, their labels with them."""
    rows = []
    for at, row in enumerate(documents(ROWS, LENGTH)):
        mask = (torch.arange(LENGTH) < LENGTH - 2 * at).long()
        labels = row["input_ids"].masked_fill(mask == 0, -100)
        rows.append({**row, "attention_mask": mask, "labels": labels})
    return rows


def packed() -> list[dict[str, torch.Tensor]]:
    """Rows of two documents and the labels that a padding-free collator makes."""
    rows = []
    for at, row in enumerate(documents(ROWS, LENGTH)):
        positions = torch.cat((torch.arange(9 + at), torch.arange(LENGTH - 9 - at)))
        rows.append({**row, "position_ids": positions, "labels": row["input_ids"].masked_fill(positions == 0, -100)})
    return rows


def flat() -> list[dict[str, Any]]:
    """Rows of unequal lengths, of which a collator makes one row a batch."""
    return [
        {"input_ids": row["input_ids"][: LENGTH - 2 * at].tolist()} for at, row in enumerate(documents(ROWS, LENGTH))
    ]


DATA = {"padded": padded, "packed": packed, "flat": flat}
COLLATORS = {"flat": DataCollatorWithFlattening}


def measures(prediction: Any) -> dict[str, float]:
    """As people write them: logits or tokens beside the token after."""
    predicted = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    predicted = predicted.argmax(-1) if predicted.ndim == 3 else predicted
    labels = prediction.label_ids[:, 1:]
    if prediction.inputs is not None:
        assert prediction.inputs[:, 0].tolist() == list(range(ROWS))
    return {"rows": len(labels), "right": float((predicted[:, :-1] == labels)[labels != -100].sum())}


def likely(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The most likely token other than the row's own, for which the labels of these very rows are needed."""
    return logits.scatter(-1, labels.clamp(min=0)[..., None], -1e9).argmax(-1)


def evaluated(cls: type[Trainer], folder: str, data: str, batch: int, **options: Any) -> dict[str, Any]:
    """Metrics of `evaluate`; predictions, labels and metrics of `predict`, once as they are and once preprocessed."""
    own = {name: options.pop(name) for name in ("sp_size", "max_logits_bytes") if name in options}
    settings = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "per_device_eval_batch_size": batch}
    found: dict[str, Any] = {}
    for preprocess in (None, likely):
        trainer = cls(
            tiny_model(), TrainingArguments(folder, **settings, **options), COLLATORS.get(data, lambda: None)(),
            eval_dataset=DATA[data](), compute_metrics=measures, preprocess_logits_for_metrics=preprocess, **own,
        )  # fmt: skip
        metrics, outcome = trainer.evaluate(), trainer.predict(DATA[data]())
        assert trainer.preprocess_logits_for_metrics is preprocess
        key = "plain" if preprocess is None else "preprocessed"
        found[key] = outcome.predictions, outcome.label_ids
        for source in (metrics, outcome.metrics):
            found |= {
                f"{key} {name}": source[name] for name in source if "loss" in name or "right" in name or "rows" in name
            }
    return found


def on_rank(rank: int, world_size: int, folder: str, data: str, batch: int, options: dict[str, Any]) -> dict[str, Any]:
    with accelerate_rank(rank, world_size):
        return evaluated(SequenceParallelTrainer, folder, data, batch, **options)


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys() and len(found) == 2 + 2 * 6
    for name, value in expected.items():
        if isinstance(value, tuple):
            for ours, theirs in zip(found[name], value, strict=True):
                assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
                np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
        else:
            assert found[name] == pytest.approx(value, rel=1e-5), name


class _Mean(LlamaForCausalLM):
    """Divides by the targets of this rank and micro-step, as models do that compute their loss without Transformers' function."""

    def forward(self, labels: Any = None, num_items_in_batch: Any = None, **inputs: Any) -> Any:
        return super().forward(labels=labels, **inputs)


class _Shifts(LlamaForCausalLM):
    """Shifts what is shifted already."""

    def forward(self, labels: Any = None, shift_labels: Any = None, **inputs: Any) -> Any:
        return super().forward(labels=labels, **inputs)


class _Adds(LlamaForCausalLM):
    """As a mixture of experts with output_router_logits, on every rank and in every micro-step."""

    def forward(self, labels: Any = None, **inputs: Any) -> Any:
        outputs = super().forward(labels=labels, **inputs)
        outputs.loss = outputs.loss + 0.01
        return outputs


@pytest.mark.parametrize("cls", [LlamaForCausalLM, _Mean, _Shifts, _Adds])
@pytest.mark.parametrize("training", [False, True])
def test_a_loss_that_is_not_that_of_all_targets_is_refused(tmp_path: Path, cls: Any, training: bool) -> None:
    settings: dict[str, Any] = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_steps": 2}
    settings |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = SequenceParallelTrainer(
        cls(tiny_model().config), TrainingArguments(str(tmp_path), **settings),
        train_dataset=padded(), eval_dataset=padded(),
    )  # fmt: skip
    run = trainer.train if training else trainer.evaluate
    if cls is LlamaForCausalLM or (cls is _Mean and not training):  # one batch at a time it is right
        run()
        return
    with pytest.raises(ValueError, match=f"{cls.__name__} has the loss .* num_items_in_batch, or adds another loss"):
        run()


CASES: list[tuple[int, str, int, dict[str, Any]]] = [
    (1, "padded", 2, {"include_for_metrics": ["inputs"]}),
    (2, "padded", 3, {"sp_size": 2, "include_for_metrics": ["inputs"]}),
    (2, "packed", 2, {"sp_size": 1, "eval_accumulation_steps": 1}),
    (2, "flat", 3, {"sp_size": 2, "max_logits_bytes": 4 * VOCAB * 3 * 3 * LENGTH}),
]
SLOW: list[tuple[int, str, int, dict[str, Any]]] = [
    *((1, data, batch, {}) for data in DATA for batch in (1, 7)),
    *((2, data, batch, {"sp_size": 2}) for data in DATA for batch in (1, 4)),
    *((2, data, batch, {"sp_size": 1}) for data in ("padded", "packed") for batch in (1, 4)),
    *((4, data, batch, {"sp_size": 2}) for data in ("padded", "packed") for batch in (1, 3)),
    (3, "packed", 2, {"sp_size": 3}),
    (3, "padded", 2, {"sp_size": 1}),
]


def mean_loss(data: str, batch: int) -> float:
    """The mean over rows of the loss of their batch, as Trainers give it, of a model on one device."""
    model, losses = tiny_model(), []
    for at in range(0, ROWS, batch):
        collate = COLLATORS.get(data, lambda: default_data_collator)()
        rows = collate(DATA[data]()[at : at + batch])
        labels = rows.pop("labels")[:, 1:].flatten()
        logits = model(**rows, use_cache=False).logits[:, :-1].flatten(0, 1)
        losses += [torch.nn.functional.cross_entropy(logits, labels).item()] * len(DATA[data]()[at : at + batch])
    return sum(losses) / ROWS


def check(ranks: int, data: str, batch: int, folder: Path, **options: Any) -> None:
    """A plain Trainer takes at once what all groups take; its first versions of 5 divided the loss by the first labels, too."""
    groups = ranks // options.get("sp_size", 1)
    expected = evaluated(Trainer, str(folder), data, batch * groups)
    expected |= {name: mean_loss(data, batch * groups) for name in expected if name.endswith("_loss")}
    for found in run_ranks(on_rank, ranks, str(folder), data, batch, options, timeout=200):
        same(found, expected)


@pytest.mark.parametrize(("ranks", "data", "batch", "options"), CASES)
def test_what_a_plain_trainer_gives(ranks: int, data: str, batch: int, options: dict[str, Any], tmp_path: Path) -> None:
    check(ranks, data, batch, tmp_path, **options)


@pytest.mark.full
@pytest.mark.parametrize(("ranks", "data", "batch", "options"), SLOW)
def test_over_groups_and_batches(ranks: int, data: str, batch: int, options: dict[str, Any], tmp_path: Path) -> None:
    check(ranks, data, batch, tmp_path, **options)


def one(folder: Path, rows: Any, **options: Any) -> SequenceParallelTrainer:
    """On this process alone."""
    names = ("compute_metrics", "max_logits_bytes", "preprocess_logits_for_metrics")
    own = {"compute_metrics": measures} | {name: options.pop(name) for name in names if name in options}
    settings = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "per_device_eval_batch_size": 2}
    arguments = TrainingArguments(str(folder), **settings, **options)
    return SequenceParallelTrainer(tiny_model(), arguments, eval_dataset=rows, **own)


def test_labels_without_labels(tmp_path: Path) -> None:
    """They are the tokens, as in training, except for padding on either side and the first tokens of further documents."""
    ids = torch.arange(1, 9)
    document_ids = torch.tensor([-1, 0, 0, 0, 3, 3, -1, -1])
    found = one(tmp_path, None).predict([{"input_ids": ids, "document_ids": document_ids}])
    assert found.label_ids.tolist() == [[-100, -100, 3, 4, -100, 6, -100, -100]]
    assert one(tmp_path, None).predict([{"input_ids": ids}]).label_ids.tolist() == [ids.tolist()]


def test_metrics_by_the_batch(tmp_path: Path) -> None:
    """`compute_result` comes with the last batch, and only that one says how much is right."""
    batches = []

    def by_the_batch(prediction: Any, compute_result: bool) -> dict[str, float]:
        batches.append((prediction.label_ids[:, 0].tolist(), compute_result))
        return {"batches": len(batches)} if compute_result else {}

    trainer = one(tmp_path, documents(5), batch_eval_metrics=True, compute_metrics=by_the_batch)
    assert trainer.evaluate()["eval_batches"] == 3
    assert batches == [([0, 1], False), ([2, 3], False), ([4], True)]


SIZE = 4 * ROWS * LENGTH * VOCAB


def too_many_logits(rank: int, world_size: int, folder: str, sp_size: int) -> str:
    """The error, and no forward pass before it."""
    with accelerate_rank(rank, world_size):
        arguments = TrainingArguments(folder, use_cpu=True, report_to="none", per_device_eval_batch_size=2)
        data = {"eval_dataset": documents(ROWS, LENGTH), "compute_metrics": measures, "sp_size": sp_size}
        trainer = SequenceParallelTrainer(tiny_model(), arguments, **data, max_logits_bytes=SIZE - 1)
        called: list[Any] = []
        trainer.model.register_forward_hook(lambda *_: called.append(1))
        with pytest.raises(ValueError, match=r"GiB of logits .* lambda logits, labels: logits.argmax\(-1\)") as error:
            trainer.evaluate()
        assert not called
        trainer.preprocess_logits_for_metrics = likely
        assert trainer.evaluate()["eval_rows"] == ROWS
        return str(error.value)


@pytest.mark.parametrize("sp_size", [1, 2])
def test_logits_that_are_too_large(tmp_path: Path, sp_size: int) -> None:
    assert len(set(run_ranks(too_many_logits, 2, str(tmp_path), sp_size))) == 1


def test_logits_are_counted(tmp_path: Path) -> None:
    """All that are kept: those of the whole evaluation, even where later rows are longer, or of a batch."""
    rows = documents(ROWS, LENGTH)
    assert one(tmp_path, rows, max_logits_bytes=SIZE).evaluate()["eval_rows"] == ROWS
    longer = [*documents(2, 8), *rows]
    with pytest.raises(ValueError, match=f"more than max_logits_bytes={SIZE};"):
        one(tmp_path, longer, max_logits_bytes=SIZE).evaluate()

    def of_the_last(prediction: Any, compute_result: bool) -> dict[str, float]:
        return {"rows": len(prediction.label_ids)}

    options = {"batch_eval_metrics": True, "compute_metrics": of_the_last, "max_logits_bytes": 4 * 2 * LENGTH * VOCAB}
    assert one(tmp_path, rows, **options).evaluate()["eval_rows"] == 1
    with pytest.raises(ValueError, match=f"more than max_logits_bytes={SIZE - 1};"):
        one(tmp_path, None, max_logits_bytes=SIZE - 1).predict(Unsized())
    one(tmp_path, rows, max_logits_bytes=0, prediction_loss_only=True).evaluate()  # nothing to keep


@pytest.mark.parametrize(
    ("result", "got"),
    [
        (lambda logits, labels: logits.mean(), r"\[\]"),
        (lambda logits, labels: logits[:, 1:], r"\[2, 23, 61\]"),
        (lambda logits, labels: (labels, "x"), "str"),
    ],
)
def test_results_that_are_not_of_rows(tmp_path: Path, result: Any, got: str) -> None:
    with pytest.raises(ValueError, match=rf"\[B=2, S_local=24, ...\], but preprocess_logits_for_metrics returns {got}"):
        one(tmp_path, documents(3), preprocess_logits_for_metrics=result).evaluate()


class Unsized(IterableDataset):
    """The documents, once."""

    def __iter__(self) -> Any:
        return iter(documents(ROWS, LENGTH))


def streamed(rank: int, world_size: int, folder: str, sp_size: int) -> int:
    with accelerate_rank(rank, world_size):
        arguments = TrainingArguments(folder, use_cpu=True, report_to="none", per_device_eval_batch_size=2)
        trainer = SequenceParallelTrainer(tiny_model(), arguments, sp_size=sp_size)
        return trainer.predict(Unsized()).label_ids[:, 0].tolist()


def test_streams(tmp_path: Path) -> None:
    """One group reads all; several would not know where the stream ends and the filling begins."""
    assert run_ranks(streamed, 2, str(tmp_path), 2) == [list(range(ROWS))] * 2
    for error in run_ranks_collect(streamed, 2, str(tmp_path), 1):
        assert isinstance(error, ValueError) and "give a dataset with a length" in str(error)


def test_rows_put_together_over_groups(tmp_path: Path) -> None:
    """In the last batch it is no longer known which documents are filler."""
    for error in run_ranks_collect(on_rank, 2, str(tmp_path), "flat", 3, {"sp_size": 1}):
        assert isinstance(error, ValueError) and "the data_collator makes 1 rows of 3" in str(error)
