# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed in a rank process of `tests.harness.ranks`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STAGES: list[dict[str, Any]] = [{"stage": stage} for stage in range(4)] + [{"stage": 3, "reduce_scatter": False}]


def zero(stage: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"engine": "deepspeed", "deepspeed": {"config": {"zero_optimization": stage}}, **changes}


@contextmanager
def deepspeed_rank(rank: int) -> Iterator[None]:
    """Set what a launcher sets; afterwards clear what DeepSpeed keeps of this process's groups: the next test has others."""
    os.environ["LOCAL_RANK"] = str(rank)
    try:
        yield
    finally:
        del os.environ["LOCAL_RANK"]
        if "deepspeed" in sys.modules:
            import deepspeed
            from deepspeed.runtime.sequence_parallel import parallel_state_sp
            from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

            deepspeed.comm.comm.cdb = None
            for module in (deepspeed.utils.groups, parallel_state_sp):
                kept = [name for name in vars(module) if name == "mpu" or (name.startswith("_") and name.isupper())]
                vars(module).update(dict.fromkeys(kept))
            # ZeRO-3 numbers parameters and modules and compares the numbers over ranks, which have served other tests before.
            deepspeed.zero.Init.param_id = 0
            defaults: Any = DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__
            defaults[0][0] = 0
