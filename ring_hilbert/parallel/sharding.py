# SPDX-License-Identifier: Apache-2.0
"""`shard_batch`: from a full batch of tokens to one rank's rows, with all that a model needs to train on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ring_hilbert.ops.order import TokenOrder
from ring_hilbert.ops.visible import PADDING, Visible, changes, first_before, row_places
from ring_hilbert.parallel.agreement import Group, gather, raise_disagreement, resolve_group
from ring_hilbert.parallel.arguments import check_choices, check_least_document
from ring_hilbert.parallel.layout import Layout
from ring_hilbert.parallel.prepared import Prepared
from ring_hilbert.parallel.wire import all_rows, from_all

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
            a mask mark where packed documents start: wherever they jump. With `document_ids` as well, a document's position
            ids must count its tokens, starting anywhere.
        group, layout, causal, strategy, save_remote: as in `prepare`; layout "zigzag" needs `S % 2P == 0`.
        order: order of the rows; only the real tokens are ordered, padding rows follow them.
        local_lengths: rows of each rank; default `S // P`, the first `S % P` ranks one extra.
        presharded: the batch holds only this rank's tokens, a contiguous piece `[B, S_local]` of the natural order.
        device: where the tensors go; default: that of `input_ids`. A batch still on the host is read there and sent without
            waiting for the device's pending work.

    Returns:
        `input_ids`, `position_ids`, `shift_labels` (the next token of the same document, or -100), `document_ids`, all
        int64 `[B, S_local]` on `device`, and `ring_hilbert`, the `Prepared` (its `rows` are the token
        indices of the local rows).

    Raises:
        ValueError: on every rank, naming the rank and the key that is wrong or differs.
    """
    process_group, rank, world = resolve_group(group)
    error, record, documents = None, dict[str, Tensor](), None
    try:
        check_choices(order=order, layout=layout, strategy=strategy)
        record = _checked(batch, presharded)
        if not presharded:  # a mistake in it, on one rank or all, is an error on all
            documents = _documents(record)
    except ValueError as problem:
        error = str(problem)
    fields = {
        "order": order, "layout": layout, "causal": causal, "strategy": strategy, "presharded": presharded,
        "save_remote": save_remote, "local_lengths": None if local_lengths is None else tuple(local_lengths),
        "keys of batch": tuple(sorted(record)),
        "batch size": next((len(x) for x in record.values()), 0),
        **({} if presharded else {"tokens": next((x.shape[1] for x in record.values()), 0)}),
    }  # fmt: skip
    message = {"fields": fields, "error": error, "tokens": next((x.shape[1] for x in record.values()), 0)}
    records = [message] if process_group is None else gather(message, process_group, error)
    if process_group is None and error:
        raise ValueError(error)
    raise_disagreement(records)

    there = batch["input_ids"].device if device is None else torch.device(device)
    packed = any(key in record for key in ("document_ids", "attention_mask", "position_ids"))
    if presharded and process_group is not None:
        pieces = [r["tokens"] for r in records]
        record = {
            key: torch.cat(all_rows(x, pieces, process_group, f"gathering {key}"), dim=1) for key, x in record.items()
        }
    seq_len = record["input_ids"].shape[1]
    rows = Layout.of(seq_len, world, layout, local_lengths)
    documents = _documents(record) if documents is None else documents
    known = _known(documents) if packed else _Known(one_document=True, all_real=True, packed=True)
    different = {id(x): x for x in (*record.values(), documents)}  # one tensor may be several of these
    sent = {name: _sent(x, there) for name, x in different.items()}
    record, documents = {key: sent[id(x)] for key, x in record.items()}, sent[id(documents)]
    sums = list[Tensor]()  # by rank and key; compared when the host reads from the device anyway
    if not presharded and process_group is not None:
        mine = _checksums(torch.stack(list(record.values())))
        sums.append(torch.stack(from_all(mine, process_group, "the agreement on the batch")))
    targets, places = _per_document(record.get("labels", record["input_ids"]), documents, known.packed)
    tokens = _token_of_row(documents, order, all_real=known.all_real)
    prepared = _prepare(documents, tokens, rows, rank, process_group, causal, strategy, order, known, save_remote)
    for found in prepared.find_travel(len(documents), *sums):
        _raise_difference(np.array(found).reshape(world, -1), list(record))

    def local(array: Tensor) -> Tensor:
        return array.gather(1, prepared.rows.expand(len(array), -1))

    prepared.position_ids = local(record.get("position_ids", places))
    return {
        "input_ids": local(record["input_ids"]),
        "position_ids": prepared.position_ids,
        "shift_labels": local(targets),
        "document_ids": local(documents),
        "ring_hilbert": prepared,
    }


def prepare_tokens(documents: Tensor, order: TokenOrder, *, causal: bool = True) -> Prepared:
    """A `Prepared` for one device and rows that hold the real tokens in `order`, then padding (`rows` says which).

    Args:
        documents: document ids int64 `[B, S]` in natural token order, -1 for padding, which may be anywhere.
        order: of the real tokens.
        causal: mask later tokens; positions are token indices.
    """
    tokens = _token_of_row(documents, order, all_real=False)
    layout = Layout((documents.shape[1],))
    return _prepare(documents, tokens, layout, 0, None, causal, "exchange", order, _Known())


class _Known(NamedTuple):
    """What the host knows of document ids without reading from a device."""

    one_document: bool = False  # all tokens are of the same, and none is padding
    all_real: bool = False  # none is padding
    packed: bool = False  # the tokens of every document are one run


def _known(documents: Tensor) -> _Known:
    """All there is to know of ids on the host; in NumPy, since torch would wake a thread per core, which takes longer."""
    if documents.device.type != "cpu":
        return _Known()
    ids = [_runs(line) for line in documents.numpy()]
    all_real = all(bool((runs != PADDING).all()) for runs in ids)
    one_document = all_real and all(len(runs) == 1 and runs[0] == ids[0][0] for runs in ids)
    real = [runs[runs != PADDING] for runs in ids]
    return _Known(one_document, all_real, all(len(np.unique(runs)) == len(runs) for runs in real))


def _runs(ids: np.ndarray) -> np.ndarray:
    """The id of every run of equal `ids [S]`: few numbers to look at where documents are packed."""
    return ids[np.concatenate(([0], np.flatnonzero(ids[1:] != ids[:-1]) + 1))]


def _prepare(
    documents: Tensor, tokens: Tensor, layout: Layout, rank: int, group: Any, causal: bool, strategy: str,
    order: TokenOrder | None, known: _Known, save_remote: bool = False,
) -> Prepared:  # fmt: skip
    """The `Prepared` of rows that hold `tokens [1 or B, S]`, whose documents are `documents [B, S]` (by token)."""
    if known.one_document:
        visible = Visible(layout.seq_len, causal, order=order)
    else:
        if documents.device.type == "cpu":  # shared by all entries: computed once
            documents, tokens = _shared(documents), _shared(tokens)
        if not known.packed:  # by row
            documents = documents.gather(1, tokens.expand(len(documents), -1))
        visible = Visible(
            layout.seq_len, causal, order=order, positions=tokens, documents=documents, natural=True,
            padded=not known.all_real, packed=known.packed,
        )  # fmt: skip
    return Prepared(
        layout, rank, group, visible, rows=layout.cut(rank, tokens), strategy=strategy, save_remote=save_remote
    )


def _checked(batch: Mapping[str, Any], presharded: bool) -> dict[str, Tensor]:
    """The known keys of a batch as validated int64 `[B, S]`, on their own device."""
    unknown = sorted(set(batch) - set(KEYS))
    if unknown:
        raise ValueError(f"batch has unknown keys {unknown}; it may have {', '.join(KEYS)}")
    if "input_ids" not in batch:
        raise ValueError(f"batch needs 'input_ids' [B, S], got keys {sorted(batch)}")
    tensors = dict[str, Tensor]()
    for key in KEYS:  # in the same order on all ranks, whatever that of their dictionaries
        value = batch.get(key)
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
        tensors[key] = value.detach().to(torch.int64)
    return tensors


def _sent(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`, through pinned memory, so that the host does not wait for a CUDA device's pending work."""
    if x.device.type == "cpu" and device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def _checksums(x: Tensor) -> Tensor:
    """A checksum of the contents of each of `x [n, B, S]`, to compare over ranks: int64 `[n]`."""
    x = x.flatten(1)
    place = torch.arange(x.shape[1], device=x.device)
    mixed = (x + 0x1E3779B97F4A7C15) * (2 * place + 1) * 0x2545F4914F6CDD1D
    return (mixed ^ (mixed >> 29)).sum(1)


def _raise_difference(sums: np.ndarray, keys: Sequence[str]) -> None:
    """Raise ValueError unless the checksums `[P, keys]` of all ranks are the same."""
    fields = [
        {f"batch[{key!r}]": f"contents {n:x}" for key, n in zip(keys, line, strict=True)} for line in sums.tolist()
    ]
    raise_disagreement([{"error": None, "fields": of} for of in fields])


def _documents(record: dict[str, Tensor]) -> Tensor:
    """Document ids `[B, S]`, -1 where the ids or the mask mark padding; without either, documents begin where positions jump."""
    mask, positions = record.get("attention_mask"), record.get("position_ids")
    documents = record["document_ids"] if "document_ids" in record else torch.zeros_like(record["input_ids"])
    if documents.numel():
        check_least_document(int(_plain(documents).min()), "batch['document_ids']")
    if mask is not None:
        if not (_plain(mask) >> 1 == 0).all():
            raise ValueError(
                f"batch['attention_mask'] must be 0 for padding, else 1, got values from {mask.min()} to {mask.max()}; to say "
                "which document a token belongs to, use document_ids"
            )
        return documents.masked_fill(mask == 0, PADDING)
    if positions is None:
        return documents
    if "document_ids" not in record:
        return (positions.diff(dim=1, prepend=positions[:, :1] - 1) != 1).cumsum(1)
    _check_positions(positions.cpu().numpy(), documents.cpu().numpy())
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
                "give an attention_mask if position_ids do not mark documents"
            )


def _plain(x: Tensor) -> Any:
    """A host tensor as an array: torch would wake a thread per core, which takes longer than reading the data."""
    return x.numpy() if x.device.type == "cpu" else x


def _per_document(labels: Tensor, documents: Tensor, packed: bool) -> tuple[Tensor, Tensor]:
    """(label of the next token of the same document or -100, index of each token within its document), both `[B, S]`.

    Equal ids in separate runs are one document, here as in the attention; `packed`: there are none.
    """
    by_document = None if packed else documents.argsort(dim=1, stable=True)
    ids, labels = (x if by_document is None else x.gather(1, by_document) for x in (documents, labels))
    change, padding = changes(ids), ids == PADDING
    index = torch.arange(ids.shape[1], device=ids.device)
    place = torch.where(padding, 0, index - first_before(change))
    target = labels.roll(-1, dims=1).masked_fill(change[:, 1:] | padding, IGNORED)
    if by_document is not None:
        target, place = (torch.empty_like(x).scatter_(1, by_document, x) for x in (target, place))
    return target, place


def _token_of_row(documents: Tensor, order: TokenOrder | None, *, all_real: bool) -> Tensor:
    """The token of every row, int64 `[1 or B, S]`: real tokens in `order`, then padding. `all_real`: there is no padding."""
    batch, size = documents.shape
    index = torch.arange(size, device=documents.device)[None]
    if order is None:
        return index
    if order.size is not None:
        for line in documents:  # a grid must have exactly one cell for every real token
            real = size if all_real else int((line != PADDING).sum())
            if real:
                order.permutation(real)
    curve = row_places(size, order, documents.device)
    if all_real:
        return curve
    padding = documents == PADDING
    real_first = padding.int().argsort(dim=1, stable=True)
    count = (~padding).sum(1, keepdim=True)
    # The curve through the first `count` tokens is the curve through all with the others left out.
    within = (curve < count).expand(batch, -1)
    row = torch.where(within, within.cumsum(1) - 1, curve)
    return torch.empty_like(real_first).scatter_(1, row, real_first.gather(1, curve.expand(batch, -1)))


def _shared(lines: Tensor) -> Tensor:
    """Only the first line if all lines are equal."""
    return lines[:1] if len(lines) == 1 or bool((lines == lines[:1]).all()) else lines
