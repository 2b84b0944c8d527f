# SPDX-License-Identifier: Apache-2.0
"""`Prepared`: everything true of one batch and nothing of the pattern, agreed on by all ranks before any row is sent."""

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
from ring_hilbert.parallel.agreement import Group, agree, gather, note_agreement, raise_disagreement, resolve_group
from ring_hilbert.parallel.choice import choose
from ring_hilbert.parallel.execution import Execution, travels_of
from ring_hilbert.parallel.handles import new_handle
from ring_hilbert.parallel.layout import Layout, check_layout
from ring_hilbert.parallel.plan import Plan, Shapes, check_strategy
from ring_hilbert.parallel.travel import HopTravel, read_counts
from ring_hilbert.parallel.ulysses import Ulysses
from ring_hilbert.parallel.wire import all_rows

KEPT_CALLS = 512  # whose rows that travel are counted as soon as a batch is prepared
FORGOTTEN_AFTER = 4  # batches prepared for a call without one

log = logging.getLogger(__name__)

_chosen: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[tuple[Any, ...], str]] = weakref.WeakKeyDictionary()
_calls: weakref.WeakKeyDictionary[dist.ProcessGroup, OrderedDict[_Call, int]] = weakref.WeakKeyDictionary()


class _Call(NamedTuple):
    """What was asked of an earlier batch of a layout, and most likely will be of the next."""

    layout: Layout
    key: _Key


class _Key(NamedTuple):
    """What a plan is made and bound for."""

    pattern: DilatedPattern
    shapes: Shapes
    device: torch.device
    backend: str
    strategy: str


class Prepared:
    """The facts of one batch on one rank: lengths, positions and documents of all rows, order, group.

    Make it with `prepare` or `shard_batch` once per batch and hand it to every layer. Plans and index tensors are cached in
    it per pattern.

    Attributes:
        layout: rows of every rank.
        rank: this rank within the group (0 without one).
        group: the process group, or None.
        visible: what the rows of the whole sequence see.
        order: the order of a caller with natural-order tensors (`dilated_attention(order=...)`), else None.
        strategy: how rows reach other ranks; "auto" is resolved by `strategy_for`.
        save_remote: whether received rows are kept for backward instead of being fetched again.
        rows: int64 `[1 or B, S_local]`, on the device of the batch: the natural token index of every local row.
        position_ids: what `shard_batch` returned as such, or None; integrations check that the model was given them.
        position_ids_checked: whether that was done for this batch.
        handle: int64 `[]` on the CPU, what compiled graphs and autograd hold of these facts, and keep them alive by. So
            nobody needs to keep this object until backward, but for one case: compiled code under hooks that save copies
            of tensors (`torch.autograd.graph.save_on_cpu`).
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
        self.position_ids, self.position_ids_checked = position_ids, False
        self.rows = torch.from_numpy(layout.rows(rank))[None] if rows is None else rows
        self._executions: dict[_Key, Execution | Ulysses] = {}
        self._travels: dict[_Key, list[HopTravel]] = {}
        self._permutations: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self.handle = self._new_handle()

    def _new_handle(self) -> Tensor:
        """A handle of another object with the same contents, which share all caches; the handle of `self` were a cycle."""
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
    def causal(self) -> bool:
        """Whether keys with a larger position are hidden."""
        return self.visible.causal

    def plan(self, pattern: DilatedPattern, shapes: Shapes) -> Plan:
        """The plan of `pattern` on this batch, as it is executed on a CPU."""
        strategy = self.strategy_for(pattern, shapes)
        return self._plan(_Key(pattern, shapes, torch.device("cpu"), "torch", strategy))

    def strategy_for(self, pattern: DilatedPattern, shapes: Shapes, *, whole_heads: bool = False) -> str:
        """The strategy of a call; an "auto" one is chosen once per group, from what its ranks know alike, and logged.

        `whole_heads`: not "ulysses".
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
                reason = "compiled code takes 'ulysses' only if that is asked for"
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
        key = _Key(pattern, shapes, device, backend, strategy)
        if key not in self._executions:
            self._executions[key] = self._bind(key)
        return self._executions[key]

    def _plan(self, key: _Key) -> Plan:
        # Fused kernels of other devices take no weights, and the Triton core deduplicates by itself.
        deduplicate = None if key.device.type == "cpu" else False
        return Plan(key.pattern, self.layout, self.visible, key.shapes, key.strategy, deduplicate)

    def _bind(self, key: _Key) -> Execution | Ulysses:
        plan = self._plan(key)
        if key.strategy == "ulysses":
            return Ulysses(plan, self.rank, self.group, key.device, key.backend)
        if self.group is not None and plan.crossings.communicates and not plan.all_travel:
            calls = _calls.setdefault(self.group, OrderedDict())
            calls[_Call(self.layout, key)] = 0
            calls.move_to_end(_Call(self.layout, key))
            while len(calls) > KEPT_CALLS:
                calls.popitem(last=False)
        return Execution(plan, self.rank, self.group, key.device, key.backend, self._travels.pop(key, None))

    def find_travel(self, batch: int | None, *also: Tensor) -> list[Any]:
        """Find what travels for the calls that were made with earlier batches like this one of `batch` entries (None: any).

        The one read of the device: it also brings the values of `also`, integers of any shape, as lists.
        """
        calls = OrderedDict[_Call, int]() if self.group is None else _calls.setdefault(self.group, OrderedDict())
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
        """Take another batch's positions and documents in place: for one device, the same shapes, and what was given before.

        Layers see them from their next launch on. Nothing is read by the host and nothing checked, so that it can be captured in
        a CUDA graph together with forward and backward. Document ids must be -1 or more.

        Raises:
            ValueError: with a group of ranks, other shapes, or facts that were not given when this was prepared.
        """
        if self.group is not None:
            raise ValueError(
                "refresh() is for one device; with a group prepare every batch anew: ranks must count what travels"
            )
        given = [None if x is None else torch.atleast_2d(x).to(torch.int64) for x in (positions, document_ids)]
        if self.order is not None:
            given = [None if x is None else x[:, self.visible.places(x.device)[0]] for x in given]
        self.visible.refresh(*given)
        for key in [key for key in self._executions if key.backend != "triton"]:  # decided on the host, once
            del self._executions[key]

    def permutation(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """With `order`: (local token of each local row, local row of each local token), int64 `[S_local]`; else None."""
        if self.order is None:
            return None
        if device not in self._permutations:
            rows = _ordered(self.order, self.layout, self.rank)
            for chunk in self.layout.chunks(self.rank):
                rows[chunk.local : chunk.local + chunk.stop - chunk.start] += chunk.local - chunk.start
            self._permutations[device] = rows.to(device), rows.argsort().to(device)
        return self._permutations[device]

    def misfit(self, q: Tensor) -> str | None:
        """Why `q [B, S, H, D]` cannot be the rows of this batch on this rank, or None if it can."""
        if q.shape[1] != self.local_len:
            return f"q must have the {self.local_len} rows that prepared says this rank holds, got {list(q.shape)}"
        if self.visible.batch_size not in (1, q.shape[0]):
            return f"q must have the batch size {self.visible.batch_size} of prepared, got {list(q.shape)}"
        return None

    def agree(self, fields: dict[str, Any], error: str | None) -> None:
        """Make sure, on all ranks together, that a call with `fields` (hashable values) is everybody's and is valid.

        One small collective the first time a group sees these fields, nothing afterwards.

        Raises:
            ValueError: on every rank, naming the ranks and the field that differs, or a rank's own `error`.
        """
        agree(fields, error, self.group)


def prepare(
    local_len: int,
    *,
    group: Group = None,
    layout: str = "contiguous",
    order: TokenOrder | None = None,
    positions: Tensor | None = None,
    document_ids: Tensor | None = None,
    causal: bool = True,
    strategy: str = "auto",
    save_remote: bool = False,
) -> Prepared:
    """Agree on the facts of one batch with all ranks of `group`: one gather, on which every mistake surfaces everywhere.

    Args:
        local_len: rows of this rank, `S_local`; may differ between ranks and be 0.
        group: process group or 1-D DeviceMesh; None is one device.
        layout: "contiguous": group rank p holds rows `[sum L_<p, + L_p)`. "zigzag": of 2P equal chunks rank p holds chunk p,
            then chunk 2P-1-p, which balances dense causal attention.
        order: given by callers whose tensors are in natural token order; its `block` must divide every rank's boundary.
        positions: integers `[S_local]` or `[B, S_local]` for causality; default the row index (with `order`, token index).
        document_ids: integers `[S_local]` or `[B, S_local]`; -1 marks padding rows.
        causal: keys with a larger position are hidden.
        strategy: "exchange" (one collective brings all rows), "ring" (the same rows in hops, from one rank at a time, for
            patterns that read more of other ranks than fits), "ulysses" (every rank gets all rows for some of the heads), or
            "auto": by the plan, once per job.
        save_remote: keep the received rows for backward instead of fetching them again.

    Returns:
        A `Prepared`, to be passed as `dilated_attention(..., prepared=...)`.

    Raises:
        ValueError: on every rank, naming the rank and the field that is wrong.
    """
    return prepare_call(
        local_len, {}, None, group=group, layout=layout, order=order, positions=positions, document_ids=document_ids,
        causal=causal, strategy=strategy, save_remote=save_remote,
    )  # fmt: skip


def prepare_call(
    local_len: int,
    call_fields: dict[str, Any],
    error: str | None,
    *,
    group: Group,
    layout: str,
    order: TokenOrder | None,
    positions: Tensor | None,
    document_ids: Tensor | None,
    causal: bool,
    strategy: str,
    save_remote: bool = False,
) -> Prepared:
    """`prepare` that is also `agree` on the fields of a call, or on the `error` this rank already knows of."""
    process_group, rank, _ = resolve_group(group)
    local = {"positions": positions, "document_ids": document_ids}
    facts: dict[str, Tensor] = {}
    try:
        if error is None:
            check_layout(layout)
            strategy = check_strategy(strategy)
            if isinstance(local_len, bool) or not isinstance(local_len, int) or local_len < 0:
                raise ValueError(f"local_len must be an integer >= 0, got {local_len!r}")
            facts = {name: _fact(name, value, local_len) for name, value in local.items() if value is not None}
    except ValueError as problem:
        error = str(problem)
    fields = call_fields | {"layout": layout, "order": order, "causal": causal, "strategy": strategy}
    fields["save_remote"] = save_remote
    fields |= {f"{name} is given": value is not None for name, value in local.items()}
    fields |= {f"batch size of {name}": len(fact) for name, fact in facts.items()}
    record = {"fields": fields, "error": error, "local_len": local_len}
    records = [record] if process_group is None else gather(record, process_group, error)
    if process_group is None and error:
        raise ValueError(error)
    raise_disagreement(records)
    if process_group is not None and call_fields:
        note_agreement(call_fields, process_group)

    rows = Layout(tuple(r["local_len"] for r in records), layout)
    if process_group is not None:
        facts = {name: rows.assemble(all_rows(x, rows.lengths, process_group)) for name, x in facts.items()}
    if order is not None:
        _check_order(order, rows)
        permutation = rows.assemble([_ordered(order, rows, p) for p in range(rows.world_size)]) if facts else None
        facts = {name: x[:, permutation.to(x.device)] for name, x in facts.items() if permutation is not None}
    documents = facts.get("document_ids")
    visible = Visible(rows.seq_len, causal, order=order, positions=facts.get("positions"), documents=documents)
    prepared = Prepared(rows, rank, process_group, visible, order=order, strategy=strategy, save_remote=save_remote)
    late = (
        documents is not None and documents.device.type != "cpu" and documents.numel()
    )  # read with what must be read anyway
    least = [documents.amin()] if documents is not None and late else []
    for (lowest,) in prepared.find_travel(None, *least):
        if lowest < -1:
            raise ValueError(f"document_ids must be >= 0, or -1 for padding rows, got {lowest}")
    return prepared


def _ordered(order: TokenOrder, layout: Layout, rank: int) -> Tensor:
    """The token of every row of `rank`, int64 `[L_rank]`."""
    pieces = [order.permutation(layout.seq_len, chunk.start, chunk.stop) for chunk in layout.chunks(rank)]
    return torch.cat([torch.empty(0, dtype=torch.int64), *pieces])


def _fact(name: str, value: Tensor, local_len: int) -> Tensor:
    """A validated fact as int64 `[B or 1, S_local]`."""
    if (
        not isinstance(value, Tensor)
        or value.dtype.is_floating_point
        or value.dtype.is_complex
        or value.dtype == torch.bool
    ):
        got = f"{value.dtype}" if isinstance(value, Tensor) else f"{type(value).__name__}"
        raise ValueError(f"{name} must be a tensor of integers, got {got}")
    if value.ndim not in (1, 2) or value.shape[-1] != local_len:
        raise ValueError(
            f"{name} must be [{local_len}] or [B, {local_len}] (the rows of this rank), got {list(value.shape)}"
        )
    if name == "document_ids" and value.device.type == "cpu" and value.numel() and value.min() < -1:
        raise ValueError(f"document_ids must be >= 0, or -1 for padding rows, got {value.min()}")
    return torch.atleast_2d(value.detach()).to(torch.int64)


def _check_order(order: TokenOrder, layout: Layout) -> None:
    if layout.world_size == 1:
        return
    if order.block is None:
        raise ValueError(
            f"order={order!r} permutes rows between ranks; use shard_batch(batch, group, order=...), which permutes the "
            "batch before it is cut, and call without order="
        )
    for rank, start in zip(layout.owners.tolist(), layout.cuts.tolist(), strict=False):
        if start % order.block and start != layout.seq_len:
            raise ValueError(
                f"order.block={order.block} must divide the first row of every rank's chunks, but rank {rank} starts at row "
                f"{start}; use other local lengths, or shard_batch(batch, group, order=...)"
            )
