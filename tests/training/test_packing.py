# SPDX-License-Identifier: Apache-2.0
"""Documents in sequences: nothing lost, nothing twice, whole where they fit, and orders that are what their definition says."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_hilbert.training import packing
from ring_hilbert.training.data import EndlessSource, EvaluationSequences, TrainingSequences
from ring_hilbert.training.packing import BestFit, Concat, describe, shuffled
from tests.training.test_data import LENGTHS, InMemory, equal


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    """Sizes at which few documents are many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "PART", 8)
        patch.setattr(packing, "DRAWN", 3)
        patch.setattr(packing, "BLOCK", 4)
        yield


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 100, 1000])
def test_shuffled_is_the_stable_order_of_random_numbers(count: int) -> None:
    numbers = np.random.PCG64(np.random.SeedSequence((5, 3, count))).random_raw(count)
    found = shuffled(count, 5, 3, count)
    assert found.tolist() == np.argsort(numbers, kind="stable").tolist()
    assert found.dtype == np.min_scalar_type(count)


def test_equal_random_numbers_keep_their_order() -> None:
    numbers = np.random.default_rng(0).integers(0, 9, 5000).astype(np.uint64)
    assert packing._stable_order(numbers).tolist() == np.argsort(numbers, kind="stable").tolist()


def naive_best_fit(lengths: list[int], room: int) -> list[list[int]]:
    """One at a time, the longest first, into the bin that it leaves least room in."""
    bins: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [found for found in bins if sum(found) + length <= room]
        best = max(fitting, key=sum, default=None)
        if best is None:
            bins.append([length])
        else:
            best.append(length)
    return bins


@given(lengths=LENGTHS, seq_len=st.integers(2, 50), key=st.none() | st.tuples(st.integers(0, 3), st.integers(0, 3)))
def test_best_fit_packs_as_well_as_one_at_a_time_and_loses_nothing(
    lengths: list[int], seq_len: int, key: tuple[int, ...] | None
) -> None:
    packed = BestFit(InMemory(lengths), seq_len)
    pieces = packed.epoch(key)
    epoch = [pieces(number) for number in range(packed.sequences)]
    found: dict[int, list[tuple[int, int]]] = {}
    for document, start, stop in (piece for sequence in epoch for piece in sequence):
        found.setdefault(document, []).append((start, stop))
    for document, length in enumerate(lengths):  # long ones in whole sequences and a rest, others in one piece
        edges = [*range(0, length, seq_len), length]
        assert sorted(found[document]) == list(pairwise(edges))
    fills = sorted(sum(stop - start for _, start, stop in sequence) for sequence in epoch)
    rests = [length % seq_len for length in lengths if length % seq_len]
    full = sum(length // seq_len for length in lengths)
    assert fills == sorted([seq_len] * full + [sum(found) for found in naive_best_fit(rests, seq_len)])
    assert packed.tokens == sum(lengths)
    assert packed.cut() == sum(length > seq_len for length in lengths)
    again = packed.epoch(key)
    assert [again(number) for number in reversed(range(packed.sequences))] == epoch[::-1]


def test_best_fit_shuffles_documents_of_a_length_and_their_places() -> None:
    packed = BestFit(InMemory([5] * 20 + [3] * 20), 8)
    epochs = [[packed.epoch((0, e))(n) for n in range(packed.sequences)] for e in range(3)]
    assert packed.sequences == 20
    assert epochs[0] != epochs[1] != epochs[2]
    assert {tuple(sorted(d for d, _, _ in s)) for s in epochs[0]} != {
        tuple(sorted(d for d, _, _ in s)) for s in epochs[1]
    }
    assert {sequence[0][2] for sequence in epochs[0]} == {3, 5}, "either may come first"
    given_order = packed.epoch(None)
    assert [document for document, _, _ in given_order(0)] == [0, 20]


@given(lengths=LENGTHS, seq_len=st.integers(2, 50), last=st.booleans())
def test_concat_is_the_documents_joined_and_counts_its_cuts(lengths: list[int], seq_len: int, last: bool) -> None:
    packed = Concat(InMemory(lengths), seq_len, last)
    assert packed.sequences == (sum(lengths) + (seq_len - 1) * last) // seq_len
    order = shuffled(len(lengths), 0, 0, 0, 0).tolist()
    joined = [(document, token) for document in order for token in range(lengths[document])][: packed.tokens]
    pieces = packed.epoch((0, 0, 0))
    found = [
        [(document, token) for document, start, stop in pieces(number) for token in range(start, stop)]
        for number in range(packed.sequences)
    ]
    assert found == [joined[begin : begin + seq_len] for begin in range(0, len(joined), seq_len)]
    whole = [document for sequence in found for document in {d for d, _ in sequence if sequence.count((d, 0))}]
    kept = [d for d in whole if any({(d, token) for token in range(lengths[d])} <= set(sequence) for sequence in found)]
    assert packed.cut() == len({document for document, _ in joined}) - len(kept)


def test_what_packings_come_to_is_said() -> None:
    documents = InMemory([6, 6, 20])
    assert describe(BestFit(documents, 8)) == "5 sequences of 8: 20.00% padding, 33.33% of documents cut"
    assert describe(Concat(documents, 8, last=False)).startswith("4 sequences of 8: 0.00% padding, ")


def test_evaluation_in_whole_documents_and_padding_behind_them() -> None:
    dataset = EvaluationSequences(InMemory([5, 9, 3, 4]), 8, None, "best_fit")
    assert [item["input_ids"].tolist() for item in (dataset[n] for n in range(len(dataset)))] == [
        [5, 6, 7, 8, 9, 10, 11, 12],
        [0, 1, 2, 3, 4, 14, 15, 16],
        [13, 17, 18, 19, 20, 0, 0, 0],
    ]
    assert dataset[2]["document_ids"].tolist() == [0, 1, 1, 1, 1, -1, -1, -1]


@pytest.mark.parametrize("pack", ["concat", "best_fit"])
def test_access_is_random_in_any_epoch(pack: Literal["concat", "best_fit"]) -> None:
    lengths = np.random.default_rng(0).integers(1, 90, 60).tolist()
    source = EndlessSource(InMemory(lengths), 32, (7, 0), pack)
    wanted = {number: source[number] for number in range(3 * len(source))}
    again = EndlessSource(InMemory(lengths), 32, (7, 0), pack)
    for number in np.random.default_rng(1).permutation(3 * len(source)).tolist():
        assert equal(again[number], wanted[number])


FAR = 10**7


def token_shares(pack: Literal["concat", "best_fit"], weights: list[float], count: int) -> np.ndarray:
    """Of the first `count` sequences of sources with documents of different lengths."""
    draw = np.random.default_rng(0)
    lengths = [draw.integers(low, high, 50).tolist() for low, high in ((1, 9), (5, 8), (3, 30))]
    sources = [EndlessSource(InMemory(some, n * FAR), 8, (0, n), pack) for n, some in enumerate(lengths)]
    dataset, tokens = TrainingSequences(sources, weights), np.zeros(3)
    for number in range(count):
        item = dataset[number]
        tokens[item["input_ids"][0] // FAR] += (item["document_ids"] >= 0).sum()
    return tokens / tokens.sum()


@pytest.mark.parametrize("pack", ["concat", "best_fit"])
@pytest.mark.parametrize("count", [20_000, pytest.param(1_000_000, marks=[pytest.mark.full, pytest.mark.timeout(900)])])
def test_weights_are_shares_of_tokens_without_padding(pack: Literal["concat", "best_fit"], count: int) -> None:
    """Within 0.1 %, though the sources are so small that the nearest sequence of an epoch would be 1 %, and pad differently."""
    weights = [0.62, 0.05, 0.33]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "PART", 2**20)
        patch.setattr(packing, "DRAWN", 2**16)
        assert np.abs(token_shares(pack, weights, count) - weights).max() < 0.001
