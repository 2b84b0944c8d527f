# SPDX-License-Identifier: Apache-2.0
"""Accelerate with sequences sharded over ranks: the scale of the loss.

    accelerator, groups = Accelerator(), SequenceParallel(sp_size=4)
    model, optimizer = accelerator.prepare(model, optimizer)  # not the loader: Accelerate would give every rank different sequences
    for batch in ShardedLoader(loader, groups.group, order=order, device=accelerator.device):
        labels = batch.pop("shift_labels")
        loss = cross_entropy_sum(model(**batch).logits, labels) / targets_of_all_ranks_and_micro_steps
        accelerator.backward(loss_for_backward(loss, accelerator))

`accelerator.register_for_checkpointing(loader)` saves a ShardedLoader's position with `save_state`; `skip_first_batches` is
for Accelerate's own loaders. A complete script: launch/examples/accelerate_loop.py. Importing this module does
not import Accelerate.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ring_hilbert.integrations.sequence_parallel import SequenceParallel, ShardedLoader

__all__ = ["SequenceParallel", "ShardedLoader", "loss_for_backward"]


def loss_for_backward(loss: Tensor, accelerator: Any) -> Tensor:
    """`loss` times what `accelerator.backward` and the wrapped model divide by: micro-steps, and the mean over all ranks.

    Args:
        loss: this rank's part: the sum over its tokens, divided by the number of targets of the whole batch (all ranks and
            micro-steps), so that gradients only need to be summed.
        accelerator: an `accelerate.Accelerator`, for one process, DDP, FSDP or DeepSpeed, whose data-parallel ranks are all ranks:
            without a `parallelism_config` that assigns some of them to other uses.

    Returns:
        The loss to pass to `accelerator.backward`.

    Raises:
        ValueError: if the accelerator has a parallelism_config with tp, cp or sp, which would scale and shard a second time.
    """
    config = getattr(accelerator, "parallelism_config", None)
    taken = [name for name in ("tp", "cp", "sp") if getattr(config, f"{name}_size", 1) > 1]
    if taken:
        raise ValueError(
            f"the accelerator's parallelism_config uses {', '.join(taken)}; leave it out: SequenceParallel makes the groups of "
            "ranks that share a sequence, and Accelerate must see all ranks as data-parallel"
        )
    return loss * (accelerator.num_processes * accelerator.gradient_accumulation_steps)
