#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The main job on this machine, set-up included: pretrain a small byte-level language model on the source files of
# Python's standard library, with sequence-parallel dilated attention in Hilbert order. It uses every CUDA device (NCCL)
# if there is one, else two processes on the CPU (Gloo). It takes a few minutes on two cores. Run again, it resumes from its last
# checkpoint; delete runs/quickstart to start over.
#
#     bash launch/quickstart.sh [key.sub=value ...]        e.g. train.steps=20 log.dir=/tmp/try
set -euo pipefail
cd "$(dirname "$0")/.."
extras=train
if command -v nvidia-smi >/dev/null; then extras=train,gpu; fi
. launch/environment.sh "$extras"

read -r devices cores < <(python -c '
import os, torch
cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
print(torch.cuda.device_count(), cores)')
ranks=$((devices > 0 ? devices : 2))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}

exec torchrun --standalone --nproc-per-node "$ranks" -m ring_hilbert.cli \
    pretrain --config configs/quickstart.yaml "parallel.sp=$ranks" "$@"
