# SPDX-License-Identifier: Apache-2.0
"""Facts: positions and document ids of every row of the whole sequence, and which keys they let a set of queries see."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ring_hilbert.ops.order import TokenOrder

PADDING = -1  # the document id of rows that see nothing and are seen by nothing


@dataclass(frozen=True, eq=False)
class Facts:
    """What decides visibility, on the host.

    Args:
        seq_len: rows of the whole sequence.
        causal: keys with a larger position are hidden.
        positions: int64 `[1 or B, S]`, or None for the default: the row index, or with `order` the token index.
        documents: int64 `[1 or B, S]`, -1 for padding rows, or None if all rows are one document.
        order: the order the rows are in, for default positions only; evaluated in pieces, never as a whole.
    """

    seq_len: int
    causal: bool
    positions: np.ndarray | None = None
    documents: np.ndarray | None = None
    order: TokenOrder | None = None

    @property
    def row_causal(self) -> bool:
        """Causality follows the row index (so that a self visit is a triangle)."""
        return self.causal and self.positions is None and self.order is None

    @property
    def by_row_alone(self) -> bool:
        """Visibility follows from row indices alone: pairs can be counted in closed form."""
        return self.documents is None and (not self.causal or self.row_causal)

    @property
    def batch_size(self) -> int:
        """1 if all batch entries share the facts, else their number."""
        return max([1] + [x.shape[0] for x in (self.positions, self.documents) if x is not None])

    def ascending(self, cuts: np.ndarray) -> bool:
        """Whether all positions before each of the rows `cuts` are smaller than all from there on; for causal facts."""
        inner = np.unique(cuts[(cuts > 0) & (cuts < self.seq_len)])
        if self.positions is not None and len(inner):
            edges = np.concatenate(([0], inner))
            least, most = (f.reduceat(self.positions, edges, axis=1) for f in (np.minimum, np.maximum))
            return bool((most[:, :-1] < least[:, 1:]).all())
        if self.positions is None and self.order is not None and len(inner):
            return self.order.block is not None and not (inner % self.order.block).any()
        return True

    def positions_of(self, rows: np.ndarray, entry: int = 0) -> np.ndarray:
        """Positions of `rows`, in any order, for one batch entry."""
        if self.positions is not None:
            return self.positions[min(entry, len(self.positions) - 1), rows]
        if self.order is not None and len(rows):
            first = int(rows.min())
            return self.order.permutation(self.seq_len, first, int(rows.max()) + 1).numpy()[rows - first]
        return rows

    def documents_of(self, rows: np.ndarray, entry: int = 0) -> np.ndarray | None:
        """Document ids of `rows` for one batch entry; None if there is one document."""
        return None if self.documents is None else self.documents[min(entry, len(self.documents) - 1), rows]

    def needed(self, queries: np.ndarray, keys: np.ndarray, entry: int = 0) -> np.ndarray:
        """The `keys` (ascending rows) that at least one of the `queries` (ascending rows) sees."""
        if not len(queries) or not len(keys):
            return keys[:0]
        key_documents, query_documents = self.documents_of(keys, entry), self.documents_of(queries, entry)
        if key_documents is None or query_documents is None:
            return keys[self._reached(queries, keys, entry)] if self.causal else keys
        documents, inverse = np.unique(query_documents, return_inverse=True)
        place = np.minimum(np.searchsorted(documents, key_documents), len(documents) - 1)
        seen = (documents[place] == key_documents) & (key_documents != PADDING)
        if self.causal:
            latest = np.full(len(documents), np.iinfo(np.int64).min)
            np.maximum.at(latest, inverse, self.positions_of(queries, entry))
            seen &= self.positions_of(keys, entry) <= latest[place]
        return keys[seen]

    def _reached(self, queries: np.ndarray, keys: np.ndarray, entry: int) -> np.ndarray:
        """Which of the `keys` have a position that is not larger than that of all `queries`, bool `[keys]`."""
        if self.positions is not None or self.order is None or self.order.block is None:
            return self.positions_of(keys, entry) <= self.positions_of(queries, entry).max()
        last = queries[-1] // self.order.block  # blocks are in order, only within one rows are not
        reached, same = keys // self.order.block < last, keys // self.order.block == last
        latest = self.positions_of(queries[queries // self.order.block == last]).max()
        reached[same] = self.positions_of(keys[same]) <= latest
        return reached

    def pairs(self, queries: np.ndarray, keys: np.ndarray, entry: int = 0) -> int:
        """How many (query, key) pairs of two ascending row sets are allowed."""
        q_documents, k_documents = self.documents_of(queries, entry), self.documents_of(keys, entry)
        if q_documents is None or k_documents is None:
            q_documents, k_documents = np.zeros(len(queries), np.int64), np.zeros(len(keys), np.int64)
        real_q, real_k = q_documents != PADDING, k_documents != PADDING
        q_documents, k_documents = q_documents[real_q], k_documents[real_k]
        _, document = np.unique(np.concatenate((q_documents, k_documents)), return_inverse=True)
        q_rows, k_rows = queries[real_q], keys[real_k]
        positions = np.concatenate((self.positions_of(q_rows, entry), self.positions_of(k_rows, entry)))
        _, place = np.unique(positions, return_inverse=True)
        base = document * (len(place) + 1)  # (document, position) as one sortable integer
        q_count = len(q_rows)
        sorted_keys = np.sort(base[q_count:] + place[q_count:])
        last = place[:q_count] if self.causal else np.full(q_count, len(place))
        upto = np.searchsorted(sorted_keys, base[:q_count] + last, side="right")
        return int((upto - np.searchsorted(sorted_keys, base[:q_count], side="left")).sum())
