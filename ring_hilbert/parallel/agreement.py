# SPDX-License-Identifier: Apache-2.0
"""Agreement: the ranks compare their arguments, and a mistake on one raises the same error on all."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ring_hilbert.parallel.wire import communicator

Group = dist.ProcessGroup | DeviceMesh | None

_agreed: weakref.WeakKeyDictionary[dist.ProcessGroup, set[tuple]] = weakref.WeakKeyDictionary()


def resolve_group(group: Group) -> tuple[dist.ProcessGroup | None, int, int]:
    """`(group, rank in it, world size)` of a process group, a 1-D DeviceMesh, or None (one device)."""
    if group is None:
        return None, 0, 1
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"group must be a 1-D DeviceMesh, got {group.ndim} dimensions; pass its sequence-parallel axis, such as mesh['sp']"
            )
        group = group.get_group()
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(
            "group does not contain this rank; every rank must pass the sequence-parallel group it belongs to"
        )
    return group, rank, dist.get_world_size(group)


def gather(record: dict[str, Any], group: dist.ProcessGroup, error: str | None = None) -> list[dict[str, Any]]:
    """Every rank's `record`, by group rank. If the others never arrive, the local `error` (if any) is reported."""
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
    """Raise the same ValueError on every rank if a record holds an error, or if a value in `fields` differs between ranks."""
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


def agree(fields: dict[str, Any], error: str | None, group: dist.ProcessGroup | None) -> None:
    """Make sure, collectively, that the call is valid and that its `fields` (hashable values) are the same on all ranks.

    One small collective the first time a group sees these fields, nothing afterwards.

    Raises:
        ValueError: on every rank, naming the ranks and the field that differs, or a rank's own `error`.
    """
    if group is None:
        if error:
            raise ValueError(error)
        return
    agreed, signature = _agreed.setdefault(group, set()), tuple(fields.items())
    if error is None and signature in agreed:
        return
    raise_disagreement(gather({"fields": fields, "error": error}, group, error))
    agreed.add(signature)


def note_agreement(fields: dict[str, Any], group: dist.ProcessGroup) -> None:
    """Remember that `fields` were agreed on in another way."""
    _agreed.setdefault(group, set()).add(tuple(fields.items()))
