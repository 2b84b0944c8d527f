# SPDX-License-Identifier: Apache-2.0
"""`ring-hilbert bench`: run a measurement and keep its rows."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist

from ring_hilbert.bench import exactness, wire
from ring_hilbert.bench.records import RESULTS, append

MEASUREMENTS = {
    "exactness": "errors against the float64 definition, alone or under torchrun",
    "wire": "bytes received per rank at a million tokens, from the plan",
}


def run(measurement: str, output: Path | None = None) -> None:
    """Run one of `MEASUREMENTS`, print its rows and append them to `output` (default `results/<measurement>.csv`)."""
    output = RESULTS / f"{measurement}.csv" if output is None else output
    device, group = torch.device("cpu"), None
    if measurement == "wire":
        records = list(wire.rows())
    else:
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            group = dist.group.WORLD
        records = list(exactness.rows(device, group))
    if group is None or dist.get_rank(group) == 0:
        for record in records:
            print("  ".join(f"{value}" for value in record.values()))
        append(output, records, device)
        print(f"{len(records)} rows appended to {output}")
    if group is not None:
        dist.destroy_process_group()
