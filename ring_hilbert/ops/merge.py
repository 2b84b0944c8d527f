# SPDX-License-Identifier: Apache-2.0
"""The running softmax that partial attentions are merged into.

A partial is kept unnormalised, as (row maximum, sum of exponentials, weighted sum of values), so that merging never
rounds a logarithm: the error does not grow with the number of visits (online softmax, Milakov and Gimelshein,
arXiv 1805.02867).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class RunningSoftmax:
    """`maximum`, `total` `[...]` and `values` `[..., D]`, in float32 or float64; any views of equal leading shape."""

    maximum: Tensor
    total: Tensor
    values: Tensor

    @classmethod
    def empty(cls, shape: tuple[int, ...], head_dim: int, dtype: torch.dtype, device: torch.device) -> RunningSoftmax:
        """The state before any key was seen."""
        return cls(
            torch.full(shape, float("-inf"), dtype=dtype, device=device),
            torch.zeros(shape, dtype=dtype, device=device),
            torch.zeros((*shape, head_dim), dtype=dtype, device=device),
        )

    def add(self, scores: Tensor, values: Tensor) -> None:
        """Merge keys, in place.

        Args:
            scores: `[..., K]`, overwritten; -inf marks a hidden key. Its leading axes are those of the state, in whatever
                folding `values` goes with.
            values: `[..., K, D]`, broadcast against `scores` as a matrix product does.
        """
        shape = self.maximum.shape
        maximum = torch.maximum(self.maximum, scores.amax(-1).reshape(shape))
        finite = maximum.masked_fill(maximum == float("-inf"), 0.0)  # exp(-inf - -inf) would be NaN
        weights = scores.sub_(finite.reshape(scores.shape[:-1]).unsqueeze(-1)).exp_()
        decay = (self.maximum - finite).exp_()
        self.total.mul_(decay).add_(weights.sum(-1).reshape(shape))
        self.values.mul_(decay.unsqueeze(-1)).add_((weights @ values).reshape(self.values.shape))
        self.maximum.copy_(maximum)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """`(out [..., D], lse [...], residue [...])`; rows that saw no key get 0, -inf and 0.

        `residue` is what rounding took from lse: `lse + residue` is the logarithm to twice the precision. Backward needs it:
        at logits of 60 the rounding of a float32 lse alone is as large as all other errors of a softmax together.
        """
        out = self.values / self.total.masked_fill(self.total == 0, 1.0).unsqueeze(-1)
        exact = self.maximum.double() + self.total.double().log()
        lse = exact.to(self.maximum.dtype)
        return out, lse, (exact - lse).nan_to_num(0.0).to(lse.dtype)
