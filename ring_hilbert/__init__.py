# SPDX-License-Identifier: Apache-2.0
"""ring_hilbert: exact, sequence-parallel, LongNet-style dilated attention on tokens in space-filling-curve order."""

from ring_hilbert import integrations
from ring_hilbert.attention import dilated_attention
from ring_hilbert.checkpointing import checkpoint_contexts
from ring_hilbert.modules import MultiheadDilatedAttention, UlyssesAttention
from ring_hilbert.ops import reference
from ring_hilbert.ops.order import TokenOrder
from ring_hilbert.ops.pattern import Branch, DilatedPattern
from ring_hilbert.parallel.gathering import gather_rows
from ring_hilbert.parallel.plan import Plan
from ring_hilbert.parallel.planning import plan
from ring_hilbert.parallel.prepare import prepare
from ring_hilbert.parallel.prepared import Prepared
from ring_hilbert.parallel.sharding import shard_batch

__all__ = [
    "Branch",
    "DilatedPattern",
    "MultiheadDilatedAttention",
    "Plan",
    "Prepared",
    "TokenOrder",
    "UlyssesAttention",
    "checkpoint_contexts",
    "dilated_attention",
    "gather_rows",
    "plan",
    "prepare",
    "reference",
    "shard_batch",
]

integrations.install()
