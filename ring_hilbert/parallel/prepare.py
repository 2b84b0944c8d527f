# SPDX-License-Identifier: Apache-2.0
"""`prepare`: all ranks of a group agree on a batch's metadata before any row is sent."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ring_hilbert.ops.order import TokenOrder
from ring_hilbert.ops.visible import Visible
from ring_hilbert.parallel.agreement import Group, gather, note_agreement, raise_disagreement, resolve_group
from ring_hilbert.parallel.arguments import check_choices, check_least_document, metadata
from ring_hilbert.parallel.layout import Layout
from ring_hilbert.parallel.prepared import Prepared
from ring_hilbert.parallel.wire import all_rows


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
    """Agree on one batch's metadata with all ranks of `group`: one gather, which raises any rank's mistake on all.

    What these arguments mean is said here for the operator, `shard_batch` and `plan` as well.

    Args:
        local_len: rows of this rank, `S_local`; may differ between ranks and be 0.
        group: process group or 1-D DeviceMesh over which the sequence is sharded; None is one device, never the world.
        layout: "contiguous": group rank p holds rows `[sum L_<p, + L_p)`. "zigzag": of 2P equal chunks rank p holds chunk p,
            then chunk 2P-1-p, which balances dense causal attention.
        order: the token order on which the pattern acts, for callers whose q, k, v, positions, document ids and results are in
            natural token order; its `block` must divide every rank boundary. None: the pattern acts on the rows as given.
        positions: integers `[S_local]` or `[B, S_local]` for causality; default the row index (with `order`, token index).
        document_ids: integers `[S_local]` or `[B, S_local]`; documents do not see each other; -1 marks padding rows.
        causal: mask keys with a larger position.
        strategy: "exchange" (one collective brings all rows), "ring" (the same rows in hops, from one rank at a time, for
            patterns that read more of other ranks than fits), "ulysses" (every rank gets all rows for some of the heads), or
            "auto": chosen by the plans, once per job.
        save_remote: keep the received rows for backward instead of fetching them again, overlapped with local work.

    Returns:
        A `Prepared`, for `dilated_attention(..., prepared=...)`.

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
    """`prepare` combined with `agree` on the fields of a call, or on the `error` already found by this rank."""
    process_group, rank, _ = resolve_group(group)
    local = {"positions": positions, "document_ids": document_ids}
    facts = dict[str, Tensor]()
    try:
        if error is None:
            check_choices(order=order, layout=layout, strategy=strategy)
            if isinstance(local_len, bool) or not isinstance(local_len, int) or local_len < 0:
                raise ValueError(f"local_len must be an integer >= 0, got {local_len!r}")
            facts = {name: metadata(name, value, local_len) for name, value in local.items() if value is not None}
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
        facts = {
            name: rows.assemble(all_rows(x, rows.lengths, process_group, f"the agreement on {name}"))
            for name, x in facts.items()
        }
    if order is not None:
        _check_order(order, rows)
        permutation = rows.assemble([rows.tokens(p, order) for p in range(rows.world_size)]) if facts else None
        facts = {name: x[:, permutation.to(x.device)] for name, x in facts.items() if permutation is not None}
    documents = facts.get("document_ids")
    visible = Visible(rows.seq_len, causal, order=order, positions=facts.get("positions"), documents=documents)
    prepared = Prepared(rows, rank, process_group, visible, order=order, strategy=strategy, save_remote=save_remote)
    # Read together with what must be read anyway.
    late = documents is not None and documents.device.type != "cpu" and documents.numel()
    least = [documents.amin()] if documents is not None and late else []
    for (lowest,) in prepared.find_travel(None, *least):
        check_least_document(lowest)
    return prepared


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
