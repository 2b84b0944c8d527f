# SPDX-License-Identifier: Apache-2.0
"""A training loop of one's own with DeepSpeed, ZeRO 2: every sequence is shared by all ranks. Resumes from `folder`, saves in it.

DS_ACCELERATOR=cpu torchrun --nproc-per-node 2 launch/examples/deepspeed_loop.py [folder]  # on GPUs, without DS_ACCELERATOR
"""

import sys
import sysconfig
import time
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoConfig, AutoModelForCausalLM

import ring_hilbert as rh
from ring_hilbert.integrations.deepspeed import SequenceParallel, ShardedLoader, loss_for_backward

LENGTH, STEPS, MICRO_STEPS = 512, 6, 2
ORDER, ZERO = {"curve": "hilbert", "block": 128}, {"zero_optimization": {"stage": 2}}

deepspeed.init_distributed()
mpu = SequenceParallel(sp_size=dist.get_world_size())
text = Path(sysconfig.get_path("stdlib"), "argparse.py").read_bytes()
dataset = [{"input_ids": torch.tensor(list(text[at : at + LENGTH]))} for at in range(0, len(text) - LENGTH, LENGTH)]
order, sampler = rh.TokenOrder(**ORDER), DistributedSampler(dataset, mpu.dp_size, mpu.dp_rank, shuffle=False)
torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
config = AutoConfig.for_model("llama", vocab_size=256, **sizes)
config.ring_hilbert = {"segment_lengths": [128, LENGTH], "dilation_rates": [1, 4], "order": ORDER}
model = AutoModelForCausalLM.from_config(config)
settings = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": MICRO_STEPS, "gradient_clipping": 1.0}
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings | ZERO, mpu=mpu)
loader = ShardedLoader(DataLoader(dataset, sampler=sampler), mpu.group, order=order, device=engine.device)
for folder in filter(Path.exists, map(Path, sys.argv[1:])):
    loader.load_state_dict(engine.load_checkpoint(folder)[1]["loader"])  # which epoch, and where in it

for step, micro_batches in zip(range(STEPS), zip(*[iter(loader)] * MICRO_STEPS, strict=False), strict=False):
    targets = sum((batch["shift_labels"] != -100).sum() for batch in micro_batches)
    dist.all_reduce(targets)  # of all ranks and micro-steps: what every loss is divided by
    total = torch.zeros((), device=engine.device)
    for batch in micro_batches:
        labels = batch.pop("shift_labels").flatten()
        logits = engine(**batch).logits.flatten(0, 1).float()
        loss = F.cross_entropy(logits, labels, reduction="sum") / targets
        engine.backward(loss_for_backward(loss, engine), scale_wrt_gas=False)
        engine.step()
        total += loss.detach()
    dist.all_reduce(total)
    if dist.get_rank() == 0:
        print(f"step {step + 1}: loss {total.item():.6f}", flush=True)
for folder in sys.argv[1:]:
    engine.save_checkpoint(folder, client_state={"loader": loader.state_dict()})
dist.destroy_process_group()
time.sleep(0.2)  # while Python shuts down, torch 2.13 aborts on what Gloo's threads still hold
