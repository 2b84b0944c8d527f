# SPDX-License-Identifier: Apache-2.0
"""Zero keys: what the padding of torchscale's LongNet adds to a softmax, in closed form.

torchscale fills segments up with rows of zeros and does not mask them: keys of score 0 and value 0. Summed over the branches
that hold a query there are N of them, which only affect its denominator: `lse' = log(e^lse + N)` and
`out' = out e^(lse - lse')`. The backward of a partial attention takes the merged `lse` and `out`; given these it is already the
exact gradient, since a zero key has none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ring_hilbert.ops.pattern import DilatedPattern


def count_zero_keys(pattern: DilatedPattern, rows: Tensor, seq_len: int, num_kv_heads: int) -> Tensor:
    """How many zero keys every row sees, in all branches that hold it: int32 `[Hkv, L]`.

    Args:
        pattern: the branches; with `zero_keys`.
        rows: int64 `[L]`, rows of the sequence; the result is on their device.
        seq_len: rows of the whole sequence, S.
        num_kv_heads: Hkv.
    """
    count = torch.zeros((num_kv_heads, len(rows)), dtype=torch.int32, device=rows.device)
    for branch in pattern.branches:
        r, w = branch.dilation_rate, max(1, min(branch.segment_length or seq_len, seq_len))
        offsets = [pattern.offset(branch, head, num_kv_heads) for head in range(num_kv_heads)]
        within = rows % w
        own = within % r  # the offset of the heads that hold the row
        size = (seq_len - rows + within).clamp(max=w)  # rows of the segment
        missing = -(-w // r) - (size - own + r - 1).div(r, rounding_mode="floor")
        count += torch.where(own == torch.tensor(offsets, device=rows.device)[:, None], missing.int(), 0)
    return count


def add_zero_keys(out: Tensor, lse: Tensor, lse_error: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`out` (in place), `lse` and `lse_error` of the softmax with `count` more zero keys.

    Args:
        out: `[B, S, H, D]`.
        lse, lse_error: `[B, H, S]`, float32 or float64; their sum is the logarithm.
        count: int32 `[Hkv, S]`.
    """
    exact = lse.double() + lse_error
    merged = torch.logaddexp(exact, count.double().log().repeat_interleave(lse.shape[1] // len(count), dim=0))
    share = (exact - merged).exp_().nan_to_num_(0.0)  # NaN: a row without any key
    out.mul_(share.to(lse.dtype).transpose(1, 2).unsqueeze(-1))
    lse = merged.to(lse.dtype)
    return out, lse, (merged - lse).nan_to_num_(0.0).to(lse.dtype)
