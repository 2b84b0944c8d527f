# SPDX-License-Identifier: Apache-2.0
"""The running softmax against one softmax over all keys."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ring_hilbert.ops.merge import RunningSoftmax

ROWS, DIM = 3, 2
PARTS = st.lists(st.lists(st.integers(0, 6), min_size=ROWS, max_size=ROWS), min_size=1, max_size=5)  # keys of every row


def attention(logits: np.ndarray, values: np.ndarray) -> tuple[float, np.ndarray]:
    """The logarithm of the sum of exponentials, and the mean of the values; -inf and 0 without a key."""
    if not len(logits):
        return -np.inf, np.zeros(DIM)
    weights = np.exp(logits - logits.max())
    return logits.max() + np.log(weights.sum()), weights @ values / weights.sum()


@given(PARTS, st.integers(0, 2**32 - 1), st.sampled_from([1.0, 50.0, 600.0]))
def test_parts_of_the_keys_merge_to_all_of_them(parts: list[list[int]], seed: int, size: float):
    random = np.random.default_rng(seed)
    keys = [[(random.normal(size=n) * size, random.normal(size=(n, DIM))) for n in part] for part in parts]
    merged = RunningSoftmax(torch.empty(ROWS, dtype=torch.float64), torch.empty(ROWS, DIM, dtype=torch.float64))
    merged.clear()
    for part in keys:
        lse, out = (torch.from_numpy(np.array(x)) for x in zip(*(attention(*row) for row in part), strict=True))
        merged.add(lse, out)
    for row in range(ROWS):
        logits, values = (np.concatenate([part[row][i] for part in keys]) for i in range(2))
        lse, out = attention(logits, values)
        assert merged.lse[row].item() == pytest.approx(lse, rel=1e-14, abs=1e-13)
        np.testing.assert_allclose(merged.out[row].numpy(), out, rtol=1e-11, atol=1e-12)


@given(st.lists(st.one_of(st.just(-np.inf), st.floats(-1e4, 1e4)), min_size=1))
def test_two_float32_logarithms_are_one_to_twice_the_precision(values: list[float]):
    exact = torch.tensor(values, dtype=torch.float64)
    lse, error = RunningSoftmax(exact, exact[:, None]).logarithms(torch.float32)
    assert lse.dtype == error.dtype == torch.float32 and torch.equal(lse.double(), exact.float().double())
    assert not error[exact.isinf()].any()
    real = exact[~exact.isinf()]
    off = (lse.double() + error.double())[~exact.isinf()] - real
    assert (off.abs() <= 2**-47 * real.abs() + 2**-149).all(), "2**-149 is the smallest float32"
