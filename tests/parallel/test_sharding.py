# SPDX-License-Identifier: Apache-2.0
"""`shard_batch`: tokens, labels, positions, documents, and agreement on them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import ring_hilbert as rh
from ring_hilbert.parallel import sharding
from ring_hilbert.parallel.prepared import FORGOTTEN_AFTER
from tests.harness.ranks import run_ranks, run_ranks_collect

IDS = torch.arange(100, 126).view(2, 13)
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 4, 4, -1, -1, -1], [2] * 13])
HILBERT = rh.TokenOrder("hilbert", block=4)


def test_one_device_in_natural_order():
    batch = rh.shard_batch({"input_ids": IDS, "document_ids": DOCUMENTS})
    assert torch.equal(batch["input_ids"], IDS) and torch.equal(batch["document_ids"], DOCUMENTS)
    expected = [101, 102, -100, 104, 105, 106, 107, -100, 109, -100, -100, -100, -100]
    assert batch["shift_labels"][0].tolist() == expected
    assert batch["shift_labels"][1].tolist() == [*range(114, 126), -100]
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 0, 0, 0]
    assert batch["ring_hilbert"].rows.tolist() == [list(range(13))]


def test_equal_ids_in_separate_runs_are_one_document():
    batch = rh.shard_batch({"input_ids": IDS[:1, :6], "document_ids": torch.tensor([[7, 7, 3, 3, 7, 3]])})
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 2]]
    assert batch["shift_labels"].tolist() == [[101, 104, 103, 105, -100, -100]]


@pytest.mark.parametrize("order", [None, HILBERT])
@pytest.mark.parametrize(
    "ids",
    [
        DOCUMENTS,
        [[3] * 5 + [1] * 7 + [2]] * 2,
        [[-1, 5, 5, 5, -1, -1, 2, 2, 2, 2, 9, -1, -1], [0] * 13],
        [[7, 7, 3, 3, 7, 3] + [1] * 7, [0] * 6 + [1] * 7],
    ],
)
@pytest.mark.parametrize("causal", [True, False])
def test_what_the_host_knows_changes_nothing(
    ids: list[list[int]], order: rh.TokenOrder | None, causal: bool, monkeypatch: pytest.MonkeyPatch
):
    """Documents that are known to be packed, or to hold no padding, spare work: nothing else."""

    def sharded() -> dict[str, torch.Tensor]:
        batch = rh.shard_batch({"input_ids": IDS, "document_ids": torch.as_tensor(ids)}, order=order, causal=causal)
        prepared = batch.pop("ring_hilbert")
        key, low, high = prepared.visible.on(torch.device("cpu"))
        seen = (low[:, :, None] <= key[:, None, :]) & (key[:, None, :] <= high[:, :, None])
        hides = prepared.visible.padded or bool((torch.as_tensor(ids) != -1).all())
        assert hides, "padding, and nobody knows"
        return batch | {"rows": prepared.rows.expand(2, -1), "seen": seen.expand(2, -1, -1)}

    known = sharded()
    monkeypatch.setattr(sharding, "_known", lambda _: sharding._Known())
    for name, value in sharded().items():
        assert torch.equal(known[name], value), name


def test_labels_masks_and_positions_of_the_caller():
    labels = IDS.clone()
    labels[:, 5] = -100
    given = {"input_ids": IDS, "labels": labels, "attention_mask": (DOCUMENTS >= 0).int(), "position_ids": IDS * 2}
    batch = rh.shard_batch(given)
    assert batch["shift_labels"][0, 4] == -100 and batch["shift_labels"][0, 3] == 104
    assert batch["document_ids"][0].tolist() == [0] * 10 + [-1] * 3
    assert torch.equal(batch["position_ids"], IDS * 2)


def packed_positions(*lengths: int, first: int = 0) -> torch.Tensor:
    return torch.cat([torch.arange(first, first + length) for length in lengths])


def test_position_ids_that_restart_are_documents():
    """Each entry its own; a document starts at a jump, not at a zero; with a mask, jumps mean nothing of the kind."""
    positions = torch.stack(
        (packed_positions(4, 1, 8), torch.cat((packed_positions(6, first=7), torch.arange(20, 27))))
    )
    batch = rh.shard_batch({"input_ids": IDS, "position_ids": positions})
    assert batch["document_ids"].tolist() == [[0] * 4 + [1] + [2] * 8, [0] * 6 + [1] * 7]
    ends = [[3, 4, 12], [5, 12]]
    for entry, labels in enumerate(batch["shift_labels"]):
        expected = IDS[entry].roll(-1).tolist()
        assert labels.tolist() == [-100 if at in ends[entry] else x for at, x in enumerate(expected)]
    assert torch.equal(batch["position_ids"], positions)
    masked = rh.shard_batch({"input_ids": IDS, "position_ids": positions, "attention_mask": torch.ones_like(IDS)})
    assert masked["document_ids"].tolist() == [[0] * 13] * 2


def test_position_ids_beside_document_ids():
    """They may continue, count documents that were interrupted, and be anything for padding; they may not start a new document."""
    ids = torch.tensor([[3, 3, 5, 5, 3, 5, -1, -1]])
    given = {"input_ids": IDS[:1, :8], "document_ids": ids}
    for positions in ([0, 1, 0, 1, 2, 2, 9, 9], [4, 5, 0, 1, 6, 2, 0, 0]):
        batch = rh.shard_batch({**given, "position_ids": torch.tensor([positions])})
        assert torch.equal(batch["document_ids"], ids) and batch["position_ids"].tolist() == [positions]
    for positions, token in (
        ([0, 1, 0, 1, 0, 1, 0, 1], 4),
        ([0, 0, 1, 2, 1, 3, 0, 0], 1),
        ([0, 1, 2, 3, 2, 2, 0, 0], 5),
    ):
        with pytest.raises(
            ValueError, match=rf"position_ids'\]\[0, {token}\] is {positions[token]}, which starts another"
        ):
            rh.shard_batch({**given, "position_ids": torch.tensor([positions])})


def _packed_shard(rank: int, world: int, positions: torch.Tensor, presharded: bool):
    batch = {"input_ids": IDS, "position_ids": positions}
    if presharded:
        batch = {name: value.split((6, 7), dim=1)[rank] for name, value in batch.items()}
    result = rh.shard_batch(batch, dist.group.WORLD, order=HILBERT, presharded=presharded)
    return {name: value for name, value in result.items() if name != "ring_hilbert"}


@pytest.mark.parametrize("presharded", [False, True])
def test_position_ids_are_documents_over_ranks(presharded: bool):
    """Also where a document begins on one rank and ends on the next."""
    positions = torch.stack((packed_positions(4, 5, 4), packed_positions(13)))
    ranks = run_ranks(_packed_shard, 2, positions, presharded)
    ids = torch.tensor([[0] * 4 + [1] * 5 + [2] * 4, [0] * 13])
    whole = rh.shard_batch({"input_ids": IDS, "document_ids": ids}, order=HILBERT)
    for name in ranks[0]:
        assert torch.equal(torch.cat([rank[name] for rank in ranks], dim=1), whole[name]), name


def test_real_tokens_are_ordered_first_and_padding_follows():
    batch = rh.shard_batch({"input_ids": IDS, "document_ids": DOCUMENTS}, order=HILBERT)
    rows = batch["ring_hilbert"].rows
    assert rows[0, :10].tolist() == HILBERT.permutation(10).tolist() and rows[0, 10:].tolist() == [10, 11, 12]
    assert rows[1].tolist() == HILBERT.permutation(13).tolist()
    for name, natural in (("input_ids", IDS), ("document_ids", DOCUMENTS)):
        assert torch.equal(batch[name], natural.gather(1, rows))


def test_a_grid_holds_all_real_tokens_or_none():
    grid = rh.TokenOrder("hilbert", grid=(2, 5))
    padding = torch.full((1, 13), -1)
    rows = rh.shard_batch({"input_ids": IDS, "document_ids": torch.cat((DOCUMENTS[:1], padding))}, order=grid)[
        "ring_hilbert"
    ].rows
    assert rows[0, :10].tolist() == grid.permutation(10).tolist() and rows[1].tolist() == list(range(13))
    with pytest.raises(ValueError, match="13"):
        rh.shard_batch({"input_ids": IDS}, order=grid)


def _shard(rank: int, world: int, presharded: bool, lengths: tuple[int, ...] | None):
    batch = {"input_ids": IDS, "document_ids": DOCUMENTS}
    if presharded:
        pieces = (2, 8, 3)
        batch = {name: value.split(pieces, dim=1)[rank] for name, value in batch.items()}
    result = rh.shard_batch(batch, dist.group.WORLD, order=HILBERT, presharded=presharded, local_lengths=lengths)
    return {name: value for name, value in result.items() if name != "ring_hilbert"}


@pytest.mark.parametrize("presharded", [False, True])
@pytest.mark.parametrize("lengths", [None, (13, 0, 0), (4, 8, 1)])
def test_shards_put_together_are_the_batch(presharded: bool, lengths: tuple[int, ...] | None):
    ranks = run_ranks(_shard, 3, presharded, lengths)
    assert [rank["input_ids"].shape[1] for rank in ranks] == list(lengths or (5, 4, 4))
    whole = rh.shard_batch({"input_ids": IDS, "document_ids": DOCUMENTS}, order=HILBERT)
    for name in ranks[0]:
        assert torch.equal(torch.cat([rank[name] for rank in ranks], dim=1), whole[name]), name


def _other_batch(rank: int, world: int, what: str):
    batch = {"input_ids": IDS.clone()}
    if rank == 1:
        if what == "ids":
            batch["input_ids"][0, 3] = 0
        elif what == "key":
            batch["labels"] = IDS
        elif what == "float":
            batch["input_ids"] = batch["input_ids"].float()
    return rh.shard_batch(batch, dist.group.WORLD)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("ids", ["batch['input_ids'] must be the same", "rank 1"]),
        ("key", ["keys of batch", "rank 1"]),
        ("float", ["rank 1", "tensor of integers"]),
    ],
)
def test_another_batch_on_one_rank_is_an_error_on_all(what: str, words: list[str]):
    for outcome in run_ranks_collect(_other_batch, 2, what, timeout=30):
        assert isinstance(outcome, ValueError) and all(word in str(outcome) for word in words), outcome


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"tokens": IDS}, "unknown keys"),
        ({"labels": IDS}, "needs 'input_ids'"),
        ({"input_ids": IDS[0]}, r"must be \[B, S\]"),
        ({"input_ids": IDS, "labels": IDS[:, 1:]}, r"must be \[2, 13\] like input_ids"),
        ({"input_ids": IDS, "document_ids": IDS - 103}, "-1 for padding"),
        ({"input_ids": IDS, "attention_mask": DOCUMENTS + 1}, "must be 0 for padding, else 1, got values from 0 to 5"),
    ],
)
def test_mistakes_are_named(batch: dict, message: str):
    with pytest.raises(ValueError, match=message):
        rh.shard_batch(batch)


def test_an_order_by_name_alone_is_refused() -> None:
    for made in (
        lambda order: rh.prepare(13, order=order),
        lambda order: rh.shard_batch({"input_ids": IDS}, order=order),
    ):
        with pytest.raises(ValueError, match="order must be a TokenOrder or None, got str"):
            made("hilbert")
    with pytest.raises(ValueError, match=r"local_lengths=\[12\] must be 1 lengths >= 0 with sum 13, got sum 12"):
        rh.shard_batch({"input_ids": IDS}, local_lengths=[12])


def test_tensors_go_where_they_are_wanted() -> None:
    """`position_ids` too, by which the model's attention knows the batch."""
    batch = rh.shard_batch({"input_ids": IDS}, device="meta")
    prepared = batch.pop("ring_hilbert")
    assert all(x.device.type == "meta" for x in batch.values()) and prepared.position_ids is batch["position_ids"]
    assert rh.shard_batch({"input_ids": IDS})["input_ids"].device == IDS.device


def counted_ahead(rank: int, world_size: int, backend: str) -> tuple[bool, bool, bool]:
    """Whether a batch knows what travels once it is prepared, if a layer asked before, and gives what it gives otherwise.

    And whether a call that is not made any more is forgotten, so that nothing is counted for it.
    """
    if backend == "triton":
        import tests.harness.interpreter  # noqa: F401
    pattern, group = rh.DilatedPattern((8, 64), (1, 4), head_shift=1), dist.group.WORLD
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 9, (1, 64), generator=generator)
    q = torch.randn(1, 32, 4, 16, generator=generator)
    batches = [{"input_ids": ids, "document_ids": torch.arange(64)[None] // length} for length in (40, 17)]
    plain, first = (rh.shard_batch(batches[n], group)["ring_hilbert"] for n in (1, 0))
    results = [rh.dilated_attention(q, q, q, pattern, backend=backend, prepared=p) for p in (plain, first)]
    again = rh.shard_batch(batches[1], group)["ring_hilbert"]
    known = len(again._travels) == 1
    found = rh.dilated_attention(q, q, q, pattern, backend=backend, prepared=again)
    known &= not again._travels
    ahead = [len(rh.shard_batch(batches[0], group)["ring_hilbert"]._travels) for _ in range(FORGOTTEN_AFTER + 2)]
    return known, torch.equal(results[0], found), ahead == [1] * FORGOTTEN_AFTER + [0, 0]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_what_travels_is_counted_when_a_batch_is_prepared(backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    assert run_ranks(counted_ahead, 2, backend) == [(True, True, True)] * 2


def test_what_is_prepared_in_inference_mode_can_be_trained_on():
    batch = {"input_ids": IDS, "document_ids": DOCUMENTS}
    pattern, order = rh.DilatedPattern((4, 13), (1, 2)), rh.TokenOrder("hilbert", block=4)
    q = torch.randn(len(IDS), IDS.shape[1], 2, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def gradient() -> torch.Tensor:
        out = rh.dilated_attention(q, q, q, pattern, prepared=prepared)
        return torch.autograd.grad(out.square().sum(), q)[0]

    with torch.inference_mode():
        prepared = rh.shard_batch(batch, order=order)["ring_hilbert"]
    first = gradient()
    rows = prepared.rows.expand(len(DOCUMENTS), -1)
    prepared.refresh(rows, DOCUMENTS.gather(1, rows))
    assert torch.equal(first, gradient())


def _keys_in_another_order(rank: int, world: int) -> list[torch.Tensor]:
    batch = {"input_ids": IDS, "document_ids": DOCUMENTS}
    batch = {key: value.split((5, 8), dim=1)[rank] for key, value in batch.items()}
    if rank:
        batch = dict(reversed(batch.items()))
    result = rh.shard_batch(batch, dist.group.WORLD, presharded=True)
    return [result[key] for key in ("input_ids", "document_ids", "shift_labels")]


def test_keys_may_stand_in_any_order_on_each_rank():
    whole = rh.shard_batch({"input_ids": IDS, "document_ids": DOCUMENTS})
    ranks = run_ranks(_keys_in_another_order, 2)
    for i, key in enumerate(("input_ids", "document_ids", "shift_labels")):
        assert torch.equal(torch.cat([rank[i] for rank in ranks], dim=1), whole[key])
