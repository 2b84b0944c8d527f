# SPDX-License-Identifier: Apache-2.0
"""The running softmax into which partial attentions are merged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class RunningSoftmax:
    """The state of each row so far: `lse [...]` in float64 and normalised `out [..., D]` in float32 or float64; or views.

    The weights of a merge come from float64 logarithms and sum to one, so the error does not grow with the number of merges.
    """

    lse: Tensor
    out: Tensor

    def clear(self) -> None:
        """Reset to no key seen."""
        self.lse.fill_(float("-inf"))
        self.out.zero_()

    def add(self, lse: Tensor, out: Tensor) -> None:
        """Merge a partial attention `lse [...]`, `out [..., D]`, in place; an lse of -inf adds nothing."""
        lse = lse.double()
        share = (lse - self.lse).sigmoid_().nan_to_num_(0.0)  # NaN: neither side has seen a key
        self.out.lerp_(out.to(self.out.dtype), share.to(self.out.dtype).unsqueeze(-1))
        self.lse.copy_(torch.logaddexp(self.lse, lse))

    def logarithms(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`(lse, lse_error)` in `dtype`: their sum is the logarithm to twice the precision, the error 0 where lse is -inf.

        Backward needs the error: at logits of 60 the rounding of a float32 lse alone is as large as all other errors of a
        softmax combined.
        """
        lse = self.lse.to(dtype)
        return lse, (self.lse - lse).nan_to_num(0.0).to(dtype)
