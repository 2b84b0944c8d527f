# SPDX-License-Identifier: Apache-2.0
"""Dense kernels: softmax attention of strided `[X, Y, rows, D]` blocks that returns `lse` and takes a merged one in backward.

Everything the torch core computes goes through one of these: the device's fused kernel where PyTorch has one, otherwise matrix
products in float32 or float64. A row whose keys are all masked has `out = 0`; its `lse` is left to the caller.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

aten = torch.ops.aten


class DenseKernel(Protocol):
    """Attention of `q [X, Y, Q, D]` over `k, v [X, Y, K, D]`, of any strides with the last one 1.

    `causal` masks key `j` for query `i` where `j > i`; `bias` is added to the scores, `[1 or X, 1 or Y, 1 or Q, K]` or None.
    """

    dtype: torch.dtype  # to which q, k and v must be converted
    takes_bias: bool
    max_scores: int | None  # most scores per call, if it materialises them

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, bias: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """`out [X, Y, Q, D]` and `lse [X, Y, Q]`, in the highest precision available."""
        ...

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool,
        bias: Tensor | None, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """`dq, dk, dv` from these keys' share of the softmax with this merged `out` and `lse`, float64 (+inf: no share)."""
        ...


class MatrixProducts:
    """Any device and dtype PyTorch multiplies matrices in."""

    takes_bias: bool = True
    max_scores: int | None = 1 << 20

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, bias: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See `DenseKernel`."""
        scores = self._scores(q, k, causal, bias, scale)
        maximum = scores.amax(-1, keepdim=True)
        weights = scores.sub_(maximum.masked_fill(maximum == float("-inf"), 0.0)).exp_()  # avoids exp(-inf - -inf)
        total = weights.sum(-1)
        out = (weights @ v) / total.masked_fill(total == 0, 1.0).unsqueeze(-1)
        return out, maximum.squeeze(-1).double() + total.double().log()

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool,
        bias: Tensor | None, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """See `DenseKernel`."""
        weights = self._scores(q, k, causal, bias, scale).sub_(lse.unsqueeze(-1)).exp_()
        dv = weights.mT @ dout
        delta = (dout * out).sum(-1, keepdim=True)
        dscores = (dout @ v.mT).sub_(delta).mul_(weights).mul_(scale)
        return dscores @ k, dscores.mT @ q, dv

    @staticmethod
    def _scores(q: Tensor, k: Tensor, causal: bool, bias: Tensor | None, scale: float) -> Tensor:
        scores = (q @ k.mT).mul_(scale)
        if bias is not None:
            scores += bias
        if causal:
            scores.masked_fill_(
                torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu_(1), float("-inf")
            )
        return scores


class CpuFlash:
    """PyTorch's fused CPU kernel, in float32 or float64: at low precision it would sum dK and dV in low precision.

    Backward recomputes the product of q and k in another order than forward, so that a weight near 1 is off by the rounding of
    its score: at large scores an error that a softmax does not have. With `careful`, blocks with such rows are computed in
    float64, and so are the first rows of a triangle, which have few keys.
    """

    takes_bias: bool = True
    max_scores: int | None = None
    FEW = 32  # rows of a triangle that may have a weight near 1 whatever the scores
    PEAKED = 3.5  # excess of lse over the logarithm of the number of keys that marks a row with large scores

    def __init__(self, dtype: torch.dtype, careful: bool = False) -> None:
        self.dtype, self.careful = dtype, careful

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, bias: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See `DenseKernel`."""
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
        if self._peaked(lse, k):
            q, k, v = (x.double() for x in (q, k, v))
            bias = None if bias is None else bias.double()
            out, lse = CpuFlash(torch.float64).forward(q, k, v, causal, bias, scale)
        return out.to(self.dtype), lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool,
        bias: Tensor | None, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """See `DenseKernel`."""
        if self._peaked(lse.masked_fill(lse == float("inf"), 0.0), k):
            dout, q, k, v, out = (x.double() for x in (dout, q, k, v, out))
            bias = None if bias is None else bias.double()
        exact = lse, dout
        lse, dout = _rounded(lse, dout)
        corner = slice(0, self.FEW if causal and self.careful and dout.dtype == torch.float32 else 0)
        if corner.stop:
            dout = dout.clone() if dout is exact[1] else dout
            dout[:, :, corner] = 0
        results = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=scale
        )
        if corner.stop:
            dout, q, k, v, out = (x[:, :, corner].double() for x in (exact[1], q, k, v, out))
            bias = None if bias is None else bias[..., corner, corner].double()
            parts = CpuFlash(torch.float64).backward(dout, q, k, v, out, exact[0][:, :, corner], causal, bias, scale)
            for whole, part in zip(results, parts, strict=True):
                whole[:, :, corner] += part
        return results

    def _peaked(self, lse: Tensor, k: Tensor) -> bool:
        return self.careful and lse.numel() > 0 and bool(lse.amax() > math.log(k.shape[2]) + self.PEAKED)


class CudaFlash:
    """FlashAttention-2 as shipped with PyTorch: fp16 and bf16, head dims that are multiples of 8 up to 256."""

    takes_bias: bool = False
    max_scores: int | None = None

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, bias: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See `DenseKernel`."""
        assert bias is None
        result = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
        return result[0], result[1]

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool,
        bias: Tensor | None, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """See `DenseKernel`."""
        assert bias is None
        seed = torch.empty((), dtype=torch.int64, device=q.device)  # required by the signature; there is no dropout
        return aten._scaled_dot_product_flash_attention_backward(
            dout,
            q,
            k,
            v,
            out,
            lse.float().contiguous(),
            None,
            None,
            q.shape[2],
            k.shape[2],
            0.0,
            causal,
            seed,
            seed,
            scale=scale,
        )


def _rounded(lse: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
    """A float64 lse in the dtype of dout, its rounding error moved into dout: weights are `exp(score - lse)`."""
    rounded = lse.to(dout.dtype)
    if rounded.dtype == lse.dtype:
        return rounded, dout
    lost = (lse - rounded).nan_to_num_(0.0)  # +inf loses nothing
    return rounded, dout * lost.neg_().exp_().to(dout.dtype).unsqueeze(-1)


def dense_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> DenseKernel:
    """The best kernel for attention in `dtype` on `device`."""
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    if device.type == "cpu":
        return CpuFlash(exact, careful=dtype == torch.float32)
    if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16) and head_dim % 8 == 0 and head_dim <= 256:
        return CudaFlash(dtype)  # PyTorch's fused kernel for float32 has 2.5 times the error of matrix products (H100)
    return MatrixProducts(exact)
