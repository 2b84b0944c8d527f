# SPDX-License-Identifier: Apache-2.0
"""The rank harness itself: values by rank, failures with their rank, and no hang."""

import datetime
import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.harness import ranks
from tests.harness.ranks import RemoteTraceback, run_ranks, run_ranks_collect


class Unpicklable(Exception):
    """An exception that cannot be rebuilt from its arguments."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


def _sum_over_ranks(rank: int, world_size: int, tensor: torch.Tensor) -> tuple[int, int, torch.Tensor]:
    mine = tensor * (rank + 1)
    dist.all_reduce(mine)
    return rank, world_size, mine


def _group_facts(rank: int, world_size: int) -> dict[str, object]:
    return {
        "rank": dist.get_rank(),
        "size": dist.get_world_size(),
        "threads": torch.get_num_threads(),
        "pid": os.getpid(),
        "draw": torch.rand(3),
        "default": (rank, world_size),
    }


def _raise_on(rank: int, _world_size: int, bad: int) -> int:
    if rank == bad:
        raise KeyError(f"field of rank {rank}")
    dist.barrier()
    return rank


def _raise_everywhere(rank: int, _world_size: int) -> None:
    raise ValueError(f"argument k of rank {rank}")


def _raise_unpicklable(_rank: int, _world_size: int) -> None:
    raise Unpicklable(3, 4)


def _sleep_on(rank: int, _world_size: int, bad: int) -> None:
    if rank == bad:
        time.sleep(600)


def _wait_for_sleeper(rank: int, _world_size: int, bad: int) -> None:
    if rank == bad:
        time.sleep(600)
    dist.barrier()


def _die_on(rank: int, _world_size: int, bad: int) -> int:
    if rank == bad:
        os._exit(7)
    return rank


def _fail_to_join(rank: int, _world_size: int) -> None:
    dist.destroy_process_group()
    if rank == 1:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]  # documented
        dist.init_process_group("gloo", store=store, rank=0, world_size=2, timeout=datetime.timedelta(seconds=1))


def _use_subgroup(rank: int, _world_size: int) -> float:
    groups = [dist.new_group([0, 1]), dist.new_group([2])]
    mine = torch.tensor(float(rank + 1))
    dist.all_reduce(mine, group=groups[rank // 2])
    return mine.item()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_values_come_back_in_rank_order(world_size: int) -> None:
    tensor = torch.arange(6, dtype=torch.float64).reshape(2, 3)
    total = world_size * (world_size + 1) / 2
    for rank, (got_rank, got_size, summed) in enumerate(run_ranks(_sum_over_ranks, world_size, tensor)):
        assert (got_rank, got_size) == (rank, world_size)
        assert torch.equal(summed, tensor * total)


def test_processes_are_kept_and_each_call_starts_alike() -> None:
    first, second = run_ranks(_group_facts, 2), run_ranks(_group_facts, 2)
    for rank, (before, after) in enumerate(zip(first, second, strict=True)):
        assert (before["rank"], before["size"], before["threads"]) == (rank, 2, 1)
        assert before["pid"] == after["pid"] != os.getpid()
        assert torch.equal(before["draw"], after["draw"])
    assert first[0]["pid"] != first[1]["pid"]


def test_exception_names_rank_and_traceback() -> None:
    with pytest.raises(KeyError, match="field of rank 1") as caught:
        run_ranks(_raise_on, 3, 1)
    cause = str(caught.value.__cause__)
    assert "rank 1 of 3" in cause
    assert "_raise_on" in cause


def test_exceptions_are_collected_by_rank() -> None:
    outcomes = run_ranks_collect(_raise_everywhere, 2)
    assert [str(outcome) for outcome in outcomes] == ["argument k of rank 0", "argument k of rank 1"]
    assert all(type(outcome) is ValueError and isinstance(outcome.__cause__, RemoteTraceback) for outcome in outcomes)
    assert run_ranks(_raise_on, 2, -1) == [0, 1]


def test_rank_that_could_not_join_does_not_disturb_the_next_call() -> None:
    with pytest.raises(dist.DistStoreError):
        run_ranks(_fail_to_join, 2)
    assert run_ranks(_raise_on, 2, -1, timeout=10) == [0, 1]


def test_exception_that_does_not_pickle_keeps_its_message() -> None:
    with pytest.raises(RuntimeError, match="Unpicklable: 3 and 4"):
        run_ranks(_raise_unpicklable, 1)


def test_hang_fails_within_the_timeout_and_says_where() -> None:
    run_ranks(_group_facts, 2)
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"ranks \[1\] of 2(.|\n)*_sleep_on"):
        run_ranks(_sleep_on, 2, 1, timeout=4)
    assert time.monotonic() - start < 8
    assert run_ranks(_raise_on, 2, -1) == [0, 1]


def test_collective_that_one_rank_never_joins_fails_on_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "GRACE", 1.0)
    with pytest.raises(RuntimeError) as caught:
        run_ranks(_wait_for_sleeper, 2, 0, timeout=4)
    assert "rank 0 of 2 was at" in str(caught.value.__cause__)


def test_dead_rank_is_named() -> None:
    with pytest.raises(ChildProcessError, match="rank 1 of 2 died with exit code 7"):
        run_ranks(_die_on, 2, 1, timeout=10)
    value, error = run_ranks_collect(_die_on, 2, 1, timeout=10)
    assert value == 0
    assert isinstance(error, ChildProcessError)


def test_subgroups_work() -> None:
    assert run_ranks(_use_subgroup, 3) == [3.0, 3.0, 3.0]


def test_only_importable_functions_are_taken() -> None:
    with pytest.raises(ValueError, match="top level"):
        run_ranks(lambda _rank, _world_size: None, 1)
    with pytest.raises(ValueError, match="world_size"):
        run_ranks(_group_facts, 0)
