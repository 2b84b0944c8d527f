# SPDX-License-Identifier: Apache-2.0
"""`Prepared`: everything true of one batch and nothing of the pattern, agreed on by all ranks before any row is sent."""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ring_hilbert.kernels import workers
from ring_hilbert.ops.order import TokenOrder
from ring_hilbert.ops.pattern import DilatedPattern
from ring_hilbert.ops.triton_core import plan_elsewhere
from ring_hilbert.parallel.choice import choose
from ring_hilbert.parallel.execution import Execution
from ring_hilbert.parallel.facts import Facts
from ring_hilbert.parallel.handles import new_handle
from ring_hilbert.parallel.layout import Layout, check_layout
from ring_hilbert.parallel.plan import Plan, Shapes, check_strategy
from ring_hilbert.parallel.ulysses import Ulysses
from ring_hilbert.parallel.wire import communicator

Group = dist.ProcessGroup | DeviceMesh | None

log = logging.getLogger(__name__)

_chosen: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[tuple[Any, ...], str]] = weakref.WeakKeyDictionary()
_agreed: weakref.WeakKeyDictionary[dist.ProcessGroup, set[tuple]] = weakref.WeakKeyDictionary()


_planners = ThreadPoolExecutor(workers.count(), "ring_hilbert-plan", plan_elsewhere)


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
        facts: positions and documents of the whole sequence.
        order: the order of a caller with natural-order tensors (`dilated_attention(order=...)`), else None.
        strategy: how rows reach other ranks; "auto" is resolved by `strategy_for`.
        save_remote: whether received rows are kept for backward instead of being fetched again.
        rows: int64 `[1 or B, S_local]` on the CPU: the natural token index of every local row.
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
        facts: Facts,
        *,
        order: TokenOrder | None = None,
        rows: Tensor | None = None,
        position_ids: Tensor | None = None,
        strategy: str = "exchange",
        save_remote: bool = False,
    ) -> None:
        self.layout, self.rank, self.group, self.facts = layout, rank, group, facts
        self.order, self.strategy, self.save_remote = order, strategy, save_remote
        self.position_ids, self.position_ids_checked = position_ids, False
        self.rows = torch.from_numpy(layout.rows(rank))[None] if rows is None else rows
        self._executions: dict[_Key, Execution | Ulysses | Future[Execution | Ulysses]] = {}
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
        return self.facts.causal

    def plan(self, pattern: DilatedPattern, shapes: Shapes) -> Plan:
        """The plan of `pattern` on this batch: the very object that is executed."""
        return self.execution(pattern, shapes, torch.device("cpu")).plan

    def strategy_for(self, pattern: DilatedPattern, shapes: Shapes, *, whole_heads: bool = False) -> str:
        """The strategy of a call; an "auto" one is chosen once per group, from what its ranks know alike, and logged.

        `whole_heads`: not "ulysses".
        """
        if self.group is None or self.strategy != "auto":
            return "exchange" if self.strategy == "auto" else self.strategy
        chosen = _chosen.setdefault(self.group, {})
        key = (pattern, shapes._replace(batch_size=1), self.layout.kind, self.causal, self.order, whole_heads)
        if key not in chosen:
            choice = choose(pattern, self.layout, self.facts, shapes)
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
        found = self._executions.get(key)
        if not isinstance(found, (Execution, Ulysses)):
            found = self._executions[key] = self._bind(key) if found is None else found.result()
        return found

    def plan_ahead(self, like: Prepared) -> None:
        """Begin to plan, in other processes, what the layers asked of another batch: they find it done, or wait for the rest.

        For callers that prepare a batch while the device still computes on the one before, `like`: planning is the host's work,
        and takes as long as a layer or longer where every batch has documents of its own. Errors are the layers' to raise. Does
        nothing for batches of different groups.
        """
        if like.group is not self.group:
            return
        streams = {
            key.device: torch.cuda.current_stream(key.device) for key in like._executions if key.device.type == "cuda"
        }
        for key in like._executions.keys() - self._executions.keys():
            self._executions[key] = _planners.submit(self._bind, key, streams.get(key.device))

    def forget_plans(self) -> None:
        """Drop what was planned for this batch, and what waits to be: it is not used again, or would be planned anew."""
        for planned in self._executions.values():
            if isinstance(planned, Future):
                planned.cancel()
        self._executions.clear()

    def _bind(self, key: _Key, stream: torch.cuda.Stream | None = None) -> Execution | Ulysses:
        """What `execution` returns; its tensors are made in `stream`, if given."""
        # Fused kernels of other devices take no weights, and the Triton core deduplicates by itself.
        deduplicate = None if key.device.type == "cpu" else False
        plan = Plan(key.pattern, self.layout, self.facts, key.shapes, key.strategy, deduplicate)
        bind = Ulysses if key.strategy == "ulysses" else Execution
        with torch.cuda.stream(stream):  # None: the current one
            return bind(plan, self.rank, self.group, key.device, key.backend)

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
        if self.facts.batch_size not in (1, q.shape[0]):
            return f"q must have the batch size {self.facts.batch_size} of prepared, got {list(q.shape)}"
        return None

    def agree(self, fields: dict[str, Any], error: str | None) -> None:
        """Make sure, on all ranks together, that a call with `fields` (hashable values) is everybody's and is valid.

        One small collective the first time a group sees these fields, nothing afterwards.

        Raises:
            ValueError: on every rank, naming the ranks and the field that differs, or a rank's own `error`.
        """
        if self.group is None:
            if error:
                raise ValueError(error)
            return
        agreed, signature = _agreed.setdefault(self.group, set()), tuple(fields.items())
        if error is None and signature in agreed:
            return
        raise_disagreement(gather({"fields": fields, "error": error}, self.group, error))
        agreed.add(signature)


def resolve_group(group: Group) -> tuple[dist.ProcessGroup | None, int, int]:
    """`(group, rank in it, world size)` of a process group, a 1-D DeviceMesh, or None (one device)."""
    if group is None:
        return None, 0, 1
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"group must be a 1-D DeviceMesh, got {group.ndim} dimensions; pass mesh['sp'], the sp axis"
            )
        group = group.get_group()
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(
            "group does not contain this rank; every rank passes the sequence-parallel group it belongs to"
        )
    return group, rank, dist.get_world_size(group)


def gather(record: dict[str, Any], group: dist.ProcessGroup, error: str | None = None) -> list[dict[str, Any]]:
    """Every rank's `record`, by group rank. If the others never come, the local `error` (if any) is what is reported."""
    records: list[Any] = [None] * dist.get_world_size(group)
    try:
        dist.all_gather_object(records, record, group=communicator(group))
    except RuntimeError as failure:
        rank = dist.get_rank(group)
        reason = f"; this rank's own error: {error}" if error else ""
        raise RuntimeError(
            f"rank {rank}: not all ranks of the group arrived at the agreement on this call{reason}"
        ) from failure
    return records


def raise_disagreement(records: list[dict[str, Any]]) -> None:
    """Raise the same ValueError on every rank if a record holds an error, or if a value in `fields` is not everybody's."""
    errors = [f"rank {rank}: {record['error']}" for rank, record in enumerate(records) if record["error"]]
    if errors:
        raise ValueError("; ".join(errors))
    for name in records[0]["fields"]:
        values = [record["fields"].get(name) for record in records]
        usual, _ = Counter(values).most_common(1)[0]
        odd = [rank for rank, value in enumerate(values) if value != usual]
        if odd:
            given = ", ".join(f"rank {rank} has {values[rank]!r}" for rank in odd[:4])
            more = f" and {len(odd) - 4} more ranks" if len(odd) > 4 else ""
            raise ValueError(f"{name} must be the same on all ranks: {given}{more}, the others have {usual!r}")


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
    arrays: dict[str, np.ndarray | None] = {}
    try:
        if error is None:
            check_layout(layout)
            strategy = check_strategy(strategy)
            if isinstance(local_len, bool) or not isinstance(local_len, int) or local_len < 0:
                raise ValueError(f"local_len must be an integer >= 0, got {local_len!r}")
            arrays = {name: _fact(name, value, local_len) for name, value in local.items()}
    except ValueError as problem:
        error = str(problem)
    fields = call_fields | {"layout": layout, "order": order, "causal": causal, "strategy": strategy}
    fields["save_remote"] = save_remote
    fields |= {f"{name} is given": value is not None for name, value in local.items()}
    fields |= {f"batch size of {name}": len(a) for name, a in arrays.items() if a is not None}
    record = {"fields": fields, "error": error, "local_len": local_len, "arrays": arrays}
    records = [record] if process_group is None else gather(record, process_group, error)
    if process_group is None and error:
        raise ValueError(error)
    raise_disagreement(records)
    if process_group is not None and call_fields:
        _agreed.setdefault(process_group, set()).add(tuple(call_fields.items()))

    rows = Layout(tuple(r["local_len"] for r in records), layout)
    whole = {name: _assemble([r["arrays"][name] for r in records], rows) for name in local}
    if order is not None:
        _check_order(order, rows)
        permutation = rows.assemble([_ordered(order, rows, p).numpy() for p in range(rows.world_size)])
        whole = {name: None if a is None else a[:, permutation] for name, a in whole.items()}
    facts = Facts(
        rows.seq_len,
        causal,
        whole["positions"] if causal else None,
        whole["document_ids"],
        order=order if causal else None,
    )
    return Prepared(rows, rank, process_group, facts, order=order, strategy=strategy, save_remote=save_remote)


def _ordered(order: TokenOrder, layout: Layout, rank: int) -> Tensor:
    """The token of every row of `rank`, int64 `[L_rank]`."""
    pieces = [order.permutation(layout.seq_len, chunk.start, chunk.stop) for chunk in layout.chunks(rank)]
    return torch.cat([torch.empty(0, dtype=torch.int64), *pieces])


def _fact(name: str, value: Tensor | None, local_len: int) -> np.ndarray | None:
    """A validated fact as int64 `[B or 1, S_local]` on the host."""
    if value is None:
        return None
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
    array = np.atleast_2d(value.detach().cpu().numpy().astype(np.int64))
    if name == "document_ids" and array.size and array.min() < -1:
        raise ValueError(f"document_ids must be >= 0, or -1 for padding rows, got {array.min()}")
    return array


def _assemble(pieces: list[np.ndarray | None], layout: Layout) -> np.ndarray | None:
    """The whole sequence from every rank's `[B or 1, S_local]`."""
    present = [piece for piece in pieces if piece is not None]
    return layout.assemble(present) if present else None


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
