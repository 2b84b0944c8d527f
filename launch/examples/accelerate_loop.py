# SPDX-License-Identifier: Apache-2.0
"""A training loop of one's own with Accelerate: every sequence is shared by all ranks. Resumes from `folder`, saves in it.

ACCELERATE_USE_CPU=1 torchrun --nproc-per-node 2 launch/examples/accelerate_loop.py [folder]  # on GPUs, without ACCELERATE_USE_CPU
"""

import sys
import sysconfig
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoConfig, AutoModelForCausalLM

import ring_hilbert as rh
from ring_hilbert.integrations.accelerate import SequenceParallel, ShardedLoader, loss_for_backward

LENGTH, STEPS, MICRO_STEPS = 512, 6, 2
ORDER = {"curve": "hilbert", "block": 128}

accelerator, groups = Accelerator(gradient_accumulation_steps=MICRO_STEPS), SequenceParallel(dist.get_world_size())
text = Path(sysconfig.get_path("stdlib"), "argparse.py").read_bytes()
dataset = [{"input_ids": torch.tensor(list(text[at : at + LENGTH]))} for at in range(0, len(text) - LENGTH, LENGTH)]
order, sampler = rh.TokenOrder(**ORDER), DistributedSampler(dataset, groups.dp_size, groups.dp_rank, shuffle=False)
torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
config = AutoConfig.for_model("llama", vocab_size=256, **sizes)
config.ring_hilbert = {"segment_lengths": [128, LENGTH], "dilation_rates": [1, 4], "order": ORDER}
model = AutoModelForCausalLM.from_config(config)
model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=3e-3))
loader = ShardedLoader(DataLoader(dataset, sampler=sampler), groups.group, order=order, device=accelerator.device)
accelerator.register_for_checkpointing(loader)  # which epoch, and where in it
for folder in filter(Path.exists, map(Path, sys.argv[1:])):
    accelerator.load_state(folder)
for step, micro_batches in zip(range(STEPS), zip(*[iter(loader)] * MICRO_STEPS, strict=False), strict=False):
    targets = sum((batch["shift_labels"] != -100).sum() for batch in micro_batches)
    dist.all_reduce(targets)  # of all ranks and micro-steps: what every loss is divided by
    total = torch.zeros((), device=accelerator.device)
    for batch in micro_batches:
        labels = batch.pop("shift_labels").flatten()
        logits = model(**batch).logits.flatten(0, 1).float()
        loss = F.cross_entropy(logits, labels, reduction="sum") / targets
        with accelerator.accumulate(model):
            accelerator.backward(loss_for_backward(loss, accelerator))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        total += loss.detach()
    dist.all_reduce(total)
    accelerator.print(f"step {step + 1}: loss {total.item():.6f}", flush=True)
for folder in sys.argv[1:]:
    accelerator.save_state(folder)
dist.destroy_process_group()
time.sleep(0.2)  # while Python shuts down, torch 2.13 aborts on what Gloo's threads still hold
