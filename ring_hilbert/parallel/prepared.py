# SPDX-License-Identifier: Apache-2.0
"""`Prepared`: all metadata of one batch, independent of the pattern."""

from __future__ import annotations

import logging
import weakref
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ring_hilbert.ops.order import TokenOrder
from ring_hilbert.ops.pattern import DilatedPattern
from ring_hilbert.ops.visible import Visible
from ring_hilbert.parallel.agreement import agree
from ring_hilbert.parallel.choice import choose
from ring_hilbert.parallel.execution import Execution, travels_of
from ring_hilbert.parallel.handles import new_handle
from ring_hilbert.parallel.layout import Layout
from ring_hilbert.parallel.plan import Plan, Shapes
from ring_hilbert.parallel.travel import HopTravel, read_counts
from ring_hilbert.parallel.ulysses import Ulysses

KEPT_CALLS = 512  # whose rows to send are counted as soon as a batch is prepared
FORGOTTEN_AFTER = 4  # batches prepared in a row without this call

log = logging.getLogger(__name__)

_chosen: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[tuple[Any, ...], str]] = weakref.WeakKeyDictionary()
_calls: weakref.WeakKeyDictionary[dist.ProcessGroup, OrderedDict[_EarlierCall, int]] = weakref.WeakKeyDictionary()


class _EarlierCall(NamedTuple):
    """A call made with an earlier batch of a layout, and most likely made again with the next."""

    layout: Layout
    key: _Key


class _Key(NamedTuple):
    """What a plan is made for and bound to."""

    pattern: DilatedPattern
    shapes: Shapes
    device: torch.device
    backend: str
    strategy: str


class Prepared:
    """The metadata of one batch on one rank: lengths, positions and documents of all rows, order, group.

    Make it once per batch with `prepare` or `shard_batch` and pass it to every layer. It caches plans and index tensors per
    pattern.

    Attributes:
        layout: rows of every rank.
        rank: this rank within the group (0 without one).
        group: the process group, or None.
        visible: which keys each row of the whole sequence sees.
        order: for callers with tensors in natural order (`dilated_attention(order=...)`), else None.
        strategy: how rows reach other ranks; "auto" is resolved by `strategy_for`.
        save_remote: whether received rows are kept for backward instead of being fetched again.
        rows: int64 `[1 or B, S_local]`, on the device of the batch: the natural token index of every local row.
        position_ids: int64 `[B, S_local]`, those that `shard_batch` returned, or None; integrations check that the model was given
            them.
        position_ids_checked: the tensor last found to be these, which the layers after the first need not compare again.
        handle: int64 `[]` on the CPU, by which compiled graphs and autograd refer to this metadata and keep it alive. So
            nobody needs to keep this object until backward, except compiled code under hooks that save copies of tensors
            (`torch.autograd.graph.save_on_cpu`).
    """

    def __init__(
        self,
        layout: Layout,
        rank: int,
        group: dist.ProcessGroup | None,
        visible: Visible,
        *,
        order: TokenOrder | None = None,
        rows: Tensor | None = None,
        position_ids: Tensor | None = None,
        strategy: str = "exchange",
        save_remote: bool = False,
    ) -> None:
        self.layout, self.rank, self.group, self.visible = layout, rank, group, visible
        self.order, self.strategy, self.save_remote = order, strategy, save_remote
        self.position_ids = position_ids
        self.position_ids_checked: Tensor | None = None
        self._attended = [False]  # one with the handle's, which compiled code is run with
        self.rows = torch.from_numpy(layout.rows(rank))[None] if rows is None else rows
        self._executions: dict[_Key, Execution | Ulysses] = {}
        self._travels: dict[_Key, list[HopTravel]] = {}
        self._permutations: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self.handle = self._new_handle()

    def _new_handle(self) -> Tensor:
        """A handle of another object that shares contents and caches; a handle of `self` would be a cycle."""
        contents = object.__new__(Prepared)
        contents.__dict__.update(self.__getstate__())
        return new_handle(contents)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "handle"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.handle = self._new_handle()  # the original's number may mean something else in this process

    @property
    def local_len(self) -> int:
        """Rows of this rank."""
        return self.layout.lengths[self.rank]

    @property
    def attended(self) -> bool:
        """Whether rows of this batch have met in the operator since somebody set this to False, in compiled code too."""
        return self._attended[0]

    @attended.setter
    def attended(self, value: bool) -> None:
        self._attended[0] = value

    @property
    def causal(self) -> bool:
        """Whether keys with a larger position are masked."""
        return self.visible.causal

    def plan(self, pattern: DilatedPattern, shapes: Shapes) -> Plan:
        """The plan of `pattern` on this batch, as it is executed on a CPU."""
        strategy = self.strategy_for(pattern, shapes)
        return self._plan(_Key(pattern, shapes, torch.device("cpu"), "torch", strategy))

    def strategy_for(self, pattern: DilatedPattern, shapes: Shapes, *, whole_heads: bool = False) -> str:
        """The strategy of a call; "auto" is resolved once per group, from what all its ranks know, and logged.

        `whole_heads`: rule out "ulysses".
        """
        if self.group is None or self.strategy != "auto":
            return "exchange" if self.strategy == "auto" else self.strategy
        chosen = _chosen.setdefault(self.group, {})
        key = (pattern, shapes._replace(batch_size=1), self.layout.kind, self.causal, self.order, whole_heads)
        if key not in chosen:
            choice = choose(pattern, self.layout, self.visible, shapes)
            chosen[key], reason = choice.strategy, choice.reason
            if whole_heads and choice.strategy == "ulysses":
                chosen[key] = "exchange" if choice.costs["exchange"].fits else "ring"
                reason = "compiled code uses 'ulysses' only on request"
            if self.rank == 0:
                log.info("strategy %r for %s over %d ranks: %s", chosen[key], pattern, self.layout.world_size, reason)
        return chosen[key]

    def execution(
        self,
        pattern: DilatedPattern,
        shapes: Shapes,
        device: torch.device,
        backend: str = "torch",
        strategy: str | None = None,
    ) -> Execution | Ulysses:
        """The plan of `pattern` bound to this rank, `device` and `backend`, made on first use."""
        if strategy is None or strategy == "auto":
            strategy = self.strategy_for(pattern, shapes, whole_heads=strategy == "auto")
        self.attended = True
        key = _Key(pattern, shapes, device, backend, strategy)
        if key not in self._executions:
            self._executions[key] = self._bind(key)
        return self._executions[key]

    def _plan(self, key: _Key) -> Plan:
        # Fused kernels of other devices take no weights, and the Triton core deduplicates itself.
        deduplicate = None if key.device.type == "cpu" else False
        return Plan(key.pattern, self.layout, self.visible, key.shapes, key.strategy, deduplicate)

    def _bind(self, key: _Key) -> Execution | Ulysses:
        plan = self._plan(key)
        if key.strategy == "ulysses":
            return Ulysses(plan, self.rank, self.group, key.device, key.backend)
        if self.group is not None and plan.crossings.communicates and not plan.all_travel:
            calls = _calls.setdefault(self.group, OrderedDict())
            calls[_EarlierCall(self.layout, key)] = 0
            calls.move_to_end(_EarlierCall(self.layout, key))
            while len(calls) > KEPT_CALLS:
                calls.popitem(last=False)
        return Execution(plan, self.rank, self.group, key.device, key.backend, self._travels.pop(key, None))

    def find_travel(self, batch: int | None, *also: Tensor) -> list[Any]:
        """Find what to send for the calls made with earlier batches like this one of `batch` entries (None: any).

        The only read from the device; it also returns the values of `also`, integers of any shape, as lists.
        """
        calls = OrderedDict[_EarlierCall, int]() if self.group is None else _calls.setdefault(self.group, OrderedDict())
        for call in list(calls):
            layout, key = call
            entries = self.visible.batch_size
            fits = key.shapes.batch_size == batch if batch else entries in (1, key.shapes.batch_size)
            if layout == self.layout and fits:
                plan = self._plan(key)
                calls[call] += 1
                if calls[call] > FORGOTTEN_AFTER:
                    del calls[call]
                elif not plan.all_travel:
                    self._travels[key] = travels_of(plan, self.rank, key.device)
        travels = [travel for found in self._travels.values() for travel in found]
        return read_counts([shipment for travel in travels for shipment in (travel.received, travel.sent)], also)

    def refresh(self, positions: Tensor | None = None, document_ids: Tensor | None = None) -> None:
        """Take another batch's positions and documents in place, on one device, of the same shapes and kinds as before.

        Layers see them from their next launch on. The host reads and checks nothing, so that this can be captured in a CUDA
        graph together with forward and backward.

        Args:
            positions, document_ids: as in `prepare`.

        Raises:
            ValueError: with a group, for other shapes, or unless exactly those given to `prepare` are given.
        """
        if self.group is not None:
            raise ValueError(
                "refresh() is for one device; with a group, prepare every batch anew: ranks must count the rows to send"
            )
        given = [None if x is None else torch.atleast_2d(x).to(torch.int64) for x in (positions, document_ids)]
        if self.order is not None:
            given = [None if x is None else x[:, self.visible.places(x.device)[0]] for x in given]
        self.visible.refresh(*given)
        for key in [key for key in self._executions if key.backend != "triton"]:  # decided once, on the host
            del self._executions[key]

    def permutation(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """With `order`: (local token of each local row, local row of each local token), int64 `[S_local]`; else None."""
        if self.order is None:
            return None
        if device not in self._permutations:
            rows = self.layout.tokens(self.rank, self.order)
            for chunk in self.layout.chunks(self.rank):
                rows[chunk.local : chunk.local + chunk.stop - chunk.start] += chunk.local - chunk.start
            self._permutations[device] = rows.to(device), rows.argsort().to(device)
        return self._permutations[device]

    def misfit(self, q: Tensor) -> str | None:
        """Why `q [B, S, H, D]` cannot be this rank's rows of this batch; None if it can."""
        if q.shape[1] != self.local_len:
            return f"q must have the {self.local_len} rows that prepared says this rank holds, got {list(q.shape)}"
        if self.visible.batch_size not in (1, q.shape[0]):
            return f"q must have the batch size {self.visible.batch_size} of prepared, got {list(q.shape)}"
        return None

    def agree(self, fields: dict[str, Any], error: str | None) -> None:
        """Make sure, collectively, that the call is valid and that its `fields` (hashable values) are the same on all ranks.

        One small collective the first time a group sees these fields, nothing afterwards.

        Raises:
            ValueError: on every rank, naming the ranks and the field that differs, or a rank's own `error`.
        """
        agree(fields, error, self.group)
