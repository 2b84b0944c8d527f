# SPDX-License-Identifier: Apache-2.0
"""The dense kernels against each other, and the operator over the one that needs no fused kernel."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

import ring_hilbert as rh
from ring_hilbert.ops import dense, torch_core
from ring_hilbert.ops.dense import CpuFlash, MatrixProducts
from tests.harness.cases import Case, assert_close, cases


class Unbiased(CpuFlash):
    """A fused kernel that takes no bias, as those on CUDA: masked tiles must go through matrix products."""

    takes_bias = False

    def forward(self, q, k, v, causal, bias, scale):
        """As the fused kernel's, without the bias."""
        assert bias is None
        return super().forward(q, k, v, causal, bias, scale)


@pytest.fixture(params=[MatrixProducts, Unbiased])
def other_kernel(request, monkeypatch):
    monkeypatch.setattr(torch_core, "dense_kernel", lambda *_: request.param(torch.float64))


@pytest.mark.usefixtures("other_kernel")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("seq_len", [63, 700])
def test_the_operator_over_other_kernels(causal: bool, seq_len: int):
    pattern = rh.DilatedPattern((300, 600, None), (1, 2, 4), segment_shift=17)
    for case in (
        Case(pattern, seq_len, 2, 4, 2, 8, causal),
        Case(pattern, seq_len, 1, 4, 2, 8, causal, documents="padding"),
        Case(pattern, seq_len, 1, 2, 2, 8, causal, positions="shuffled"),
    ):
        assert_close(case.actual(), case.expected())


@given(cases())
@settings(max_examples=60, deadline=None)
def test_any_case_over_matrix_products(case: Case):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_core, "dense_kernel", lambda *_: MatrixProducts(torch.float64))
        patch.setattr("ring_hilbert.ops.torch_visit.MATRIX_QUERIES", 7)
        patch.setattr("ring_hilbert.ops.torch_visit.MATRIX_KEYS", 5)
        assert_close(case.actual(), case.expected())


@given(cases())
@settings(max_examples=60, deadline=None)
def test_any_case_in_small_tiles(case: Case):
    """The tiles of masks and triangles, and the pieces of a visit, cut at a few rows."""
    with pytest.MonkeyPatch.context() as patch:
        for name, size in (("TILE_QUERIES", 4), ("TILE_KEYS", 3), ("LONGEST_KEYS", 9), ("TRIANGLE_GRAIN", 16)):
            patch.setattr(f"ring_hilbert.ops.sight.{name}", size)
        patch.setattr("ring_hilbert.ops.torch_visit.PIECE", 64)
        assert_close(case.actual(), case.expected())


def test_what_cuda_gets():
    cuda = torch.device("cuda")
    assert isinstance(dense.dense_kernel(cuda, torch.bfloat16, 64), dense.CudaFlash)
    assert isinstance(dense.dense_kernel(cuda, torch.float32, 64), dense.MatrixProducts)
    assert isinstance(dense.dense_kernel(cuda, torch.float64, 64), dense.MatrixProducts)
    assert isinstance(dense.dense_kernel(cuda, torch.bfloat16, 60), dense.MatrixProducts)


@pytest.mark.parametrize("causal", [True, False])
def test_peaked_rows_are_computed_in_float64(causal: bool):
    """At a logit deviation of 16 the fused kernel's float32 backward alone is several times worse than eager's."""
    case = Case(rh.DilatedPattern((128, 256), (1, 2)), 256, 1, 2, 2, 32, causal, logit_scale=16.0)
    exact, eager, ours = case.expected(inputs=torch.float32), case.expected(torch.float32), case.actual(torch.float32)
    for name in ("dq", "dk", "dv"):
        assert (ours[name] - exact[name]).abs().max() <= (eager[name] - exact[name]).abs().max(), name
