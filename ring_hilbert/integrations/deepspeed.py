# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed with sequences sharded over ranks, ZeRO 0 to 3: groups, the scale of the loss, and the data.

    mpu = SequenceParallel(sp_size=4)
    engine, *_ = deepspeed.initialize(model=model, config=config, model_parameters=model.parameters(), mpu=mpu)
    for batch in ShardedLoader(loader, mpu.group, order=order, device=engine.device):
        labels = batch.pop("shift_labels")
        loss = cross_entropy_sum(engine(**batch).logits, labels) / targets_of_all_ranks_and_micro_steps
        engine.backward(loss_for_backward(loss, engine), scale_wrt_gas=False)
        engine.step()

`engine.save_checkpoint(folder, client_state={"loader": loader.state_dict()})` saves a ShardedLoader's position. A complete script:
launch/examples/deepspeed_loop.py. Importing this module does not import DeepSpeed.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from ring_hilbert.integrations.sequence_parallel import SequenceParallel, ShardedLoader

__all__ = ["SequenceParallel", "ShardedLoader", "gradient_divisor", "loss_for_backward"]


def loss_for_backward(loss: Tensor, engine: Any) -> Tensor:
    """`loss` times what DeepSpeed divides by, for `engine.backward(..., scale_wrt_gas=False)`.

    Args:
        loss: this rank's part: the sum over its tokens, divided by the number of targets of the whole batch (all ranks and
            micro-steps). Gradients then only need to be summed, but DeepSpeed averages them: over the groups of ranks that read
            different data, or with ZeRO-3 and `reduce_scatter` (its default) over all ranks.
        engine: what `deepspeed.initialize` returned.

    Returns:
        The loss to pass to `backward`.

    Raises:
        ValueError: if DeepSpeed was given sequence-parallel sizes without an mpu, and a ZeRO stage that then omits the sum
            over the ranks of a sequence.
    """
    return loss * gradient_divisor(engine)


def gradient_divisor(engine: Any) -> float:
    """The divisor that DeepSpeed 0.19 applies to the sum of all ranks' gradients; see `loss_for_backward`."""
    ranks, sp, stage = dist.get_world_size(), engine.sequence_parallel_size, engine.zero_optimization_stage()
    if sp > 1 and getattr(engine, "mpu", None) is None and stage in (1, 2):
        raise ValueError(
            f"DeepSpeed was given sequence_parallel_size {sp} without an mpu: ZeRO-{stage} then does not sum gradients over the "
            "ranks of a sequence, and replicas drift apart; pass deepspeed.initialize(mpu=SequenceParallel(sp_size=...))"
        )
    over_all = stage == 3 and engine.zero_reduce_scatter()
    return ranks if over_all else ranks / sp
