# SPDX-License-Identifier: Apache-2.0
"""`shard_batch`: from a full batch of tokens to one rank's rows, with everything a model needs to train on them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ring_hilbert.kernels.upload import upload
from ring_hilbert.ops.order import TokenOrder
from ring_hilbert.parallel.facts import PADDING, Facts
from ring_hilbert.parallel.layout import Layout, check_layout
from ring_hilbert.parallel.plan import check_strategy
from ring_hilbert.parallel.prepare import Group, Prepared, gather, raise_disagreement, resolve_group

IGNORED = -100  # the label of a row without a target
KEYS = ("input_ids", "labels", "document_ids", "position_ids", "attention_mask")


def shard_batch(
    batch: Mapping[str, Any],
    group: Group = None,
    *,
    order: TokenOrder | None = None,
    layout: str = "contiguous",
    local_lengths: Sequence[int] | None = None,
    presharded: bool = False,
    causal: bool = True,
    strategy: str = "auto",
    save_remote: bool = False,
    device: torch.device | str | None = None,
) -> dict[str, Any]:
    """Order the tokens, cut them over the ranks of `group`, and prepare the batch: `model(**shard_batch(batch, group))`.

    Args:
        batch: integer tensors `[B, S]` in natural token order, the same on all ranks of `group`: `input_ids`, and optionally
            `labels` (not shifted, -100 ignored; default `input_ids`), `document_ids` (-1 for padding), `attention_mask`
            (0 for padding, else 1), `position_ids` (default: restart per document). As in Transformers, position ids without
            a mask say where packed documents start: wherever they jump. With `document_ids` too, a document's position ids
            count its tokens, from any number on.
        group: process group or 1-D DeviceMesh; None is one device.
        order: order of the rows; the real tokens are ordered first, padding rows follow them.
        layout: "contiguous" or "zigzag", as in `prepare`; zigzag needs `S % 2P == 0`.
        local_lengths: rows of each rank; default `S // P`, the first `S % P` ranks one more.
        presharded: the batch holds only this rank's tokens, a contiguous piece `[B, S_local]` of the natural order.
        causal, strategy, save_remote: as in `prepare`.
        device: where the tensors go; default: where `input_ids` is. A batch that is still on the host is read there, and sent
            without waiting for what the device has to do.

    Returns:
        `input_ids`, `position_ids`, `shift_labels` (the next token of the same document, or -100), `document_ids`, all
        int64 `[B, S_local]` on `device`, and `ring_hilbert`, the `Prepared` (its `rows` are the token
        indices of the local rows).

    Raises:
        ValueError: on every rank, naming the rank and the key that is wrong or differs.
    """
    process_group, rank, world = resolve_group(group)
    error, record = None, {}
    try:
        check_layout(layout)
        strategy = check_strategy(strategy)
        record = _host_arrays(batch, presharded)
    except ValueError as problem:
        error = str(problem)
    fields = {
        "order": order, "layout": layout, "causal": causal, "strategy": strategy, "presharded": presharded,
        "save_remote": save_remote, "local_lengths": None if local_lengths is None else tuple(local_lengths),
        "keys of batch": tuple(sorted(record)),
        "batch size": next((len(x) for x in record.values()), 0),
    }  # fmt: skip
    if not presharded:  # the same everywhere, so a digest of it is enough
        fields |= {f"batch[{key!r}]": _digest(array) for key, array in record.items()}
    message = {"fields": fields, "error": error, "arrays": record if presharded else None}
    records = [message] if process_group is None else gather(message, process_group, error)
    if process_group is None and error:
        raise ValueError(error)
    raise_disagreement(records)
    if presharded:
        record = {key: np.concatenate([r["arrays"][key] for r in records], axis=1) for key in record}

    seq_len = record["input_ids"].shape[1]
    rows = Layout.even(seq_len, world, layout) if local_lengths is None else Layout(tuple(local_lengths), layout)
    if rows.world_size != world or rows.seq_len != seq_len or min(rows.lengths) < 0:
        raise ValueError(f"local_lengths={list(rows.lengths)} must be {world} lengths >= 0 with sum {seq_len}")

    documents = _documents(record)
    targets, places = _per_document(record.get("labels", record["input_ids"]), documents)
    tokens = _token_of_row(documents, order)
    prepared = _prepare(documents, tokens, rows, rank, process_group, causal, strategy, save_remote)
    mine, there = prepared.rows.numpy(), batch["input_ids"].device if device is None else torch.device(device)

    def local(array: np.ndarray) -> Tensor:
        return upload(torch.from_numpy(np.ascontiguousarray(_rows(array, mine))), there)

    prepared.position_ids = local(record.get("position_ids", places))
    return {
        "input_ids": local(record["input_ids"]),
        "position_ids": prepared.position_ids,
        "shift_labels": local(targets),
        "document_ids": local(documents),
        "ring_hilbert": prepared,
    }


def prepare_tokens(documents: np.ndarray, order: TokenOrder, *, causal: bool = True) -> Prepared:
    """A `Prepared` for one device and rows that hold the real tokens in `order`, then padding (`rows` says which).

    Args:
        documents: document ids int64 `[B, S]` in natural token order, -1 for padding, which may be anywhere.
        order: of the real tokens.
        causal: positions are token indices.
    """
    tokens = _token_of_row(documents, order)
    return _prepare(documents, tokens, Layout((documents.shape[1],)), 0, None, causal, "exchange")


def _prepare(
    documents: np.ndarray, tokens: np.ndarray, layout: Layout, rank: int, group: Any, causal: bool, strategy: str,
    save_remote: bool = False,
) -> Prepared:  # fmt: skip
    """The `Prepared` of rows that hold `tokens [1 or B, S]`, whose documents are `documents [B, S]` (by token)."""
    natural = np.array_equal(tokens, np.arange(layout.seq_len)[None])
    one_document = (documents == documents[:1, :1]).all() and documents[0, 0] != PADDING
    facts = Facts(
        layout.seq_len,
        causal,
        positions=tokens if causal and not natural else None,
        documents=None if one_document else _shared(_rows(documents, tokens)),
    )
    mine = tokens[:, layout.rows(rank)]
    rows = torch.from_numpy(mine)
    return Prepared(layout, rank, group, facts, rows=rows, strategy=strategy, save_remote=save_remote)


def _host_arrays(batch: Mapping[str, Any], presharded: bool) -> dict[str, np.ndarray]:
    """The known keys of a batch as validated int64 `[B, S]`."""
    unknown = sorted(set(batch) - set(KEYS))
    if unknown:
        raise ValueError(f"batch has unknown keys {unknown}; it may have {', '.join(KEYS)}")
    if "input_ids" not in batch:
        raise ValueError(f"batch needs 'input_ids' [B, S], got keys {sorted(batch)}")
    arrays = {}
    for key, value in batch.items():
        if value is None:
            continue
        if not isinstance(value, Tensor) or value.dtype.is_floating_point or value.dtype.is_complex:
            got = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"batch[{key!r}] must be a tensor of integers, got {got}")
        if value.ndim != 2 or value.shape[0] == 0 or (not presharded and value.shape[1] == 0):
            raise ValueError(f"batch[{key!r}] must be [B, S] with at least one token, got {list(value.shape)}")
        if value.shape != batch["input_ids"].shape:
            raise ValueError(
                f"batch[{key!r}] must be {list(batch['input_ids'].shape)} like input_ids, got {list(value.shape)}"
            )
        arrays[key] = value.detach().cpu().numpy().astype(np.int64)
    return arrays


def _digest(array: np.ndarray) -> str:
    """A short name of the contents, to compare over ranks."""
    return f"{list(array.shape)} {hashlib.blake2b(array.tobytes(), digest_size=6).hexdigest()}"


def _documents(record: dict[str, np.ndarray]) -> np.ndarray:
    """Document ids `[B, S]`, -1 where either the ids or the mask say padding; without both, where position ids jump."""
    mask, positions = record.get("attention_mask"), record.get("position_ids")
    documents = record.get("document_ids", np.zeros_like(record["input_ids"]))
    if documents.size and documents.min() < PADDING:
        raise ValueError(f"batch['document_ids'] must be >= 0, or -1 for padding, got {documents.min()}")
    if mask is not None:
        if not np.isin(mask, (0, 1)).all():
            raise ValueError(
                f"batch['attention_mask'] must be 0 for padding, else 1, got values from {mask.min()} to {mask.max()}; which "
                "document a token belongs to is said by document_ids"
            )
        return np.where(mask == 0, PADDING, documents)
    if positions is None:
        return documents
    if "document_ids" not in record:
        return np.cumsum(np.diff(positions, axis=1, prepend=positions[:, :1] - 1) != 1, axis=1)
    _check_positions(positions, documents)
    return documents


def _check_positions(positions: np.ndarray, documents: np.ndarray) -> None:
    """Raise ValueError if `positions` start another document within one of `documents`, both `[B, S]`."""
    for entry, (ids, line) in enumerate(zip(documents, positions, strict=True)):
        by_document = np.argsort(ids, kind="stable")
        same = (np.diff(ids[by_document]) == 0) & (ids[by_document[1:]] != PADDING)
        wrong = by_document[1:][same & (np.diff(line[by_document]) != 1)]
        if len(wrong):
            token = wrong.min()
            before = np.flatnonzero(ids[:token] == ids[token])[-1]
            raise ValueError(
                f"batch['position_ids'][{entry}, {token}] is {line[token]}, which starts another document after "
                f"{line[before]} at token {before}, but document_ids say {ids[token]} for both; leave out one of the two, or "
                "say with an attention_mask that position_ids mean no documents"
            )


def _per_document(labels: np.ndarray, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(label of the next token of the same document or -100, place of each token within its document), both `[B, S]`.

    Equal ids in separate runs are one document, here as in the attention.
    """
    targets, places = np.full_like(labels, IGNORED), np.zeros_like(labels)
    for entry, ids in enumerate(documents):
        by_document = np.argsort(ids, kind="stable")
        sorted_ids = ids[by_document]
        real = sorted_ids != PADDING
        same = (sorted_ids[1:] == sorted_ids[:-1]) & real[1:]
        targets[entry, by_document[:-1][same]] = labels[entry, by_document[1:][same]]
        first = np.searchsorted(sorted_ids, sorted_ids)  # where each document starts among the sorted tokens
        places[entry, by_document] = np.where(real, np.arange(len(ids)) - first, 0)
    return targets, places


def _token_of_row(documents: np.ndarray, order: TokenOrder | None) -> np.ndarray:
    """The token of every row, int64 `[1 or B, S]`: real tokens in `order`, then padding; one line if all entries agree."""
    if order is None:
        return np.arange(documents.shape[1])[None]
    lines = []
    for ids in _shared(documents):
        real = np.flatnonzero(ids != PADDING)
        ordered = real[order.permutation(len(real)).numpy()] if len(real) else real
        lines.append(np.concatenate((ordered, np.flatnonzero(ids == PADDING))))
    return _shared(np.stack(lines))


def _shared(array: np.ndarray) -> np.ndarray:
    """The first line alone if all lines are the same."""
    return array[:1] if (array == array[:1]).all() else array


def _rows(array: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """`array [B, S]` of tokens as an array of rows `[B, rows]`."""
    return np.take_along_axis(array, np.broadcast_to(tokens, (len(array), tokens.shape[1])), axis=1)
