# SPDX-License-Identifier: Apache-2.0
"""Which key rows a query row may see, as one interval: three integers per row in place of positions and documents.

All rows of a sequence are ranked by (document, position): that rank is a row's `key`. A query row sees the key rows whose key
lies in `[low, high]`: from the first row of its document to the last row at its own position (causal), so that equal positions
see each other, or to the last row of its document. Keys count from 1; padding has key 0, which no interval holds, and an empty
interval. These numbers alone encode positions, documents, ties, padding and causality; they are computed on the device of the
batch, without synchronising with the host, and every layer, pass and core reads them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ring_hilbert.ops.order import TokenOrder, natural_places

PADDING = -1  # the document id of rows that see nothing and are seen by nothing
HIDDEN = 0  # the key of padding rows, and their `high`; also what a kernel reads where there is no row
KEPT_PLACES = 8  # cached orders of recent sequences
NOWHERE = 2**31 - 1  # the `low` of padding rows


class Intervals(NamedTuple):
    """`key`, and the interval `[low, high]` of keys that a row sees; int32 `[1 or B, rows]`."""

    key: Tensor
    low: Tensor
    high: Tensor


def intervals(
    positions: Tensor | None, documents: Tensor | None, causal: bool, natural: Tensor | None = None
) -> Intervals:
    """The intervals of all rows of a sequence.

    Args:
        positions: integers `[1 or B, S]`, any of 64 bits; None: the row index. Not looked at unless `causal`.
        documents: integers `[1 or B, S]`, -1 for padding; None: one document.
        causal: rows see no larger position.
        natural: int64 `[1 or B, S]`, the rows in the order of their tokens; documents are ranked by the first of their rows. It
            decides which keys are neighbours, hence how few blocks of keys need a mask, never what is visible. Default: as given.

    Returns:
        The intervals, on the device of the arguments; at least one of positions and documents must be given.
    """
    given = positions if positions is not None else documents
    assert given is not None
    batch = max(len(x) for x in (positions, documents, natural) if x is not None)
    size, device = given.shape[-1], given.device
    index = torch.arange(size, device=device).expand(batch, size)
    position = index if positions is None else positions.expand(batch, size)
    if documents is None:
        number = torch.zeros_like(index)
    else:
        number = _by_first_row(documents.expand(batch, size), index, natural)
    order = position.argsort(dim=1, stable=True) if causal else index
    order = order.gather(1, number.gather(1, order).argsort(dim=1, stable=True))
    number, position = number.gather(1, order), position.gather(1, order)

    begins = changes(number)
    low, high = first_before(begins), first_behind(begins | changes(position) if causal else begins) - 1
    padding = number == size
    columns = (
        (index + 1).masked_fill(padding, HIDDEN),
        (low + 1).masked_fill(padding, NOWHERE),
        (high + 1).masked_fill(padding, HIDDEN),
    )
    return Intervals(*(torch.empty_like(x).scatter_(1, order, x).to(torch.int32) for x in columns))


def packed_intervals(documents: Tensor, tokens: Tensor, causal: bool) -> Intervals:
    """The same, of rows that hold `tokens` int64 `[1 or B, S]`, which are their positions, without sorting.

    `documents [1 or B, S]`: by token, -1 for padding; the tokens of every document are one run.
    """
    index = torch.arange(documents.shape[1], device=documents.device)
    padding, begins = documents == PADDING, changes(documents)
    key = (index + 1).expand_as(documents).masked_fill(padding, HIDDEN)
    low = (first_before(begins) + 1).masked_fill(padding, NOWHERE)
    high = key if causal else first_behind(begins).masked_fill(padding, HIDDEN)
    batch = max(len(documents), len(tokens))
    by_token = (x.to(torch.int32).expand(batch, -1) for x in (key, low, high))
    return Intervals(*(x.gather(1, tokens.expand(batch, -1)) for x in by_token))


def _by_first_row(documents: Tensor, index: Tensor, natural: Tensor | None) -> Tensor:
    """For each row the number, in natural order, of the first row of its document, `S` for padding: int64 `[B, S]`."""
    rows = index if natural is None else natural.expand_as(index)
    ids, order = documents.gather(1, rows).sort(dim=1, stable=True)
    number = order.gather(1, first_before(changes(ids))).masked_fill(ids == PADDING, index.shape[1])
    return torch.empty_like(index).scatter_(1, rows.gather(1, order), number)


def changes(values: Tensor) -> Tensor:
    """Where runs of equal `values [B, S]` begin, and the end: bool `[B, S + 1]`."""
    edge = torch.ones((len(values), 1), dtype=torch.bool, device=values.device)
    return torch.cat((edge[:, : values.shape[1]], values[:, 1:] != values[:, :-1], edge), dim=1)


def first_before(edges: Tensor) -> Tensor:
    """Where the run of equal values at each place begins: int64 `[B, S]`, from the result of `changes`."""
    index = torch.arange(edges.shape[1] - 1, device=edges.device)
    return torch.where(edges[:, :-1], index, 0).cummax(1).values


def first_behind(edges: Tensor) -> Tensor:
    """Where the run after that of each place begins: int64 `[B, S]`."""
    size = edges.shape[1] - 1
    index = torch.arange(1, size + 1, device=edges.device)
    return torch.where(edges[:, 1:], index, size).flip(1).cummin(1).values.flip(1)


class Visible:
    """What the rows of a whole sequence see.

    Without positions and documents nothing is computed until a device asks for it: the sequence is then only a length, as a
    plan for thousands of ranks needs it.

    Args:
        seq_len: rows of the sequence, S.
        causal: rows see no larger position.
        order: the order of the rows; without `positions`, a row's position is its token's index.
        positions, documents: integers `[1 or B, S]` by row, or None, see `intervals`.
        natural: `positions`, if given, still rise with the tokens of `order` (rows that hold only the real tokens).
        padded: some of `documents` may be padding.
        packed: every document is one run of tokens; `documents` are by token here, and `positions` are the tokens of the rows.

    Attributes:
        natural: positions rise from one block of the order to the next, so what is behind all queries may be skipped unread.
    """

    def __init__(
        self,
        seq_len: int,
        causal: bool,
        *,
        order: TokenOrder | None = None,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        natural: bool = False,
        padded: bool = True,
        packed: bool = False,
    ) -> None:
        self.seq_len, self.causal, self.order = seq_len, causal, order
        self.natural = natural or positions is None
        self.has_documents, self._has_positions = documents is not None, positions is not None
        self._given: Intervals | None = None
        self._padded = padded and self.has_documents
        self.refreshed = 0  # how often `refresh` replaced the contents
        self.replayed = False  # a CUDA graph holds a `refresh`, so that a replay may replace them unseen
        self._host: tuple[np.ndarray, ...] | None = None
        self._on: dict[torch.device, Intervals] = {}
        if packed:
            assert positions is not None and documents is not None
            with torch.inference_mode(False):
                self._given = packed_intervals(documents, positions, causal)
        elif documents is not None or (positions is not None and causal):
            self._given = self._made(positions, documents)

    def _made(self, positions: Tensor | None, documents: Tensor | None) -> Intervals:
        positions = positions if self.causal else None
        given = positions if positions is not None else documents
        assert given is not None
        natural = None if self.order is None else natural_rows(self.seq_len, self.order, given.device)
        if positions is None and self.causal and self.order is not None:
            positions = self.places(given.device)
        with torch.inference_mode(False):  # otherwise they could not be refreshed outside it
            return intervals(positions, documents, self.causal, natural)

    def refresh(self, positions: Tensor | None, documents: Tensor | None) -> None:
        """Take other positions and documents of the same shapes, in place, without host reads, so that it may be captured.

        Raises:
            ValueError: unless exactly those given before are given, in the same shapes.
        """
        if (positions is not None, documents is not None) != (self._has_positions, self.has_documents):
            raise ValueError("refresh() takes positions and document_ids if and only if they were given before")
        made = None if self._given is None else self._made(positions, documents)
        if made is not None and self._given is not None:
            if made.key.shape != self._given.key.shape:
                raise ValueError(
                    f"refresh() takes {list(self._given.key.shape)} rows as before, got {list(made.key.shape)}"
                )
            for held in (self._given, *self._on.values()):
                for old, new in zip(held, made, strict=True):
                    old.copy_(new)
        self._host = None
        self._padded = self.has_documents
        self.refreshed += 1
        self.replayed |= _capturing()

    @property
    def padded(self) -> bool:
        """Whether some rows may be padding, now or when a graph that is being captured is replayed after `refresh`."""
        return self._padded or (self.has_documents and _capturing())

    @property
    def default(self) -> bool:
        """Whether all rows are one document, at their default positions."""
        return self._given is None

    @property
    def row_causal(self) -> bool:
        """Whether causality follows the row index (so that rows over themselves form a triangle)."""
        return self.causal and self.default and self.order is None

    @property
    def by_row_alone(self) -> bool:
        """Whether visibility follows from row indices alone, so that pairs can be counted in closed form."""
        return self.default and (not self.causal or self.order is None)

    @property
    def batch_size(self) -> int:
        """1 if visibility is the same in all batch entries, else their number."""
        return 1 if self._given is None else len(self._given.key)

    def rises_at(self, cuts: np.ndarray) -> bool:
        """Whether, for each row of `cuts`, all positions before it are known to be smaller than all from it on, without reading."""
        inner = cuts[(cuts > 0) & (cuts < self.seq_len)]
        if not self.natural:
            return False
        return (
            self.order is None
            or not len(inner)
            or (self.order.block is not None and not (inner % self.order.block).any())
        )

    def places(self, device: torch.device) -> Tensor:
        """The natural token index of every row if the sequence had no padding: int64 `[1, S]`."""
        return row_places(self.seq_len, self.order, device)

    def on(self, device: torch.device) -> Intervals:
        """The intervals of all rows, on `device`."""
        if self._given is not None and self._given.key.device == device:
            return self._given
        if device not in self._on:
            self._on[device] = self._sent(device)
        return self._on[device]

    def _sent(self, device: torch.device) -> Intervals:
        if self._given is not None:
            return Intervals(*(x.to(device) for x in self._given))
        index = torch.arange(self.seq_len, device=device, dtype=torch.int32)[None]
        key = self.places(device).to(torch.int32) if self.causal else index
        key = key + 1
        return Intervals(key, torch.ones_like(key), key if self.causal else torch.full_like(key, self.seq_len))

    # ---- on the host, for plans

    def of(self, rows: np.ndarray, entry: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Key, low and high of `rows` (any shape) of one batch entry, int64."""
        if self._given is not None:
            if self._host is None:
                self._host = tuple(x.cpu().numpy().astype(np.int64) for x in self._given)
            key, low, high = (x[min(entry, len(x) - 1)][rows] for x in self._host)
            return key, low, high
        key = natural_places(rows, self.seq_len, self.order) if self.causal else rows
        return key + 1, np.ones_like(rows), key + 1 if self.causal else np.full_like(rows, self.seq_len)

    def pairs(self, queries: np.ndarray, keys: np.ndarray, entry: int = 0) -> int:
        """Number of visible (query, key) pairs of two sets of rows."""
        key = np.sort(self.of(keys, entry)[0])
        _, low, high = self.of(queries, entry)
        return int(np.maximum(np.searchsorted(key, high, "right") - np.searchsorted(key, low, "left"), 0).sum())


def _capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


@lru_cache(maxsize=KEPT_PLACES)
def row_places(seq_len: int, order: TokenOrder | None, device: torch.device) -> Tensor:
    """The natural token index of every row of a sequence without padding, int64 `[1, S]`; not to be written to."""
    with torch.inference_mode(False):
        return torch.from_numpy(natural_places(np.arange(seq_len), seq_len, order)).to(device)[None]


@lru_cache(maxsize=KEPT_PLACES)
def natural_rows(seq_len: int, order: TokenOrder, device: torch.device) -> Tensor:
    """The rows of a sequence without padding in the order of their tokens, int64 `[1, S]`; not to be written to."""
    with torch.inference_mode(False):
        return row_places(seq_len, order, device).argsort(dim=1)


def reached(queries: Tensor, keys: Tensor, low: Tensor, high: Tensor, key: Tensor) -> Tensor:
    """Which keys are seen by some query of their group: bool `[N]`.

    Args:
        queries, keys: the group of every query and every key, int64 `[M]` and `[N]`.
        low, high: of the queries, int32 or int64 `[M]`.
        key: of the keys, `[N]`.
    """
    if not len(queries) or not len(keys):
        return torch.zeros(len(keys), dtype=torch.bool, device=keys.device)
    # Sort queries by (group, low) with a running maximum of `high`: a key is seen if the queries with `low` up to it reach it.
    queries = queries << 32
    starts, order = (queries + low).sort()
    furthest = (queries + high)[order].cummax(0).values
    wanted = (keys << 32) + key
    last = torch.searchsorted(starts, wanted, right=True) - 1
    return (last >= 0) & (furthest[last.clamp(min=0)] >= wanted) & (key != HIDDEN)
