# SPDX-License-Identifier: Apache-2.0
"""The Trainer of Transformers: every sequence is shared by all ranks.

torchrun --nproc-per-node 2 launch/examples/trainer.py
"""

import os
import sysconfig
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

import ring_hilbert as rh  # noqa: F401  registers attn_implementation="ring_hilbert"
from ring_hilbert.integrations.trainer import SequenceParallelTrainer

LENGTH, STEPS, MICRO_STEPS = 512, 6, 2
ORDER = {"curve": "hilbert", "block": 128}

text = Path(sysconfig.get_path("stdlib"), "argparse.py").read_bytes()
dataset = [{"input_ids": torch.tensor(list(text[at : at + LENGTH]))} for at in range(0, len(text) - LENGTH, LENGTH)]
torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
config = AutoConfig.for_model("llama", vocab_size=256, **sizes)
config.ring_hilbert = {"segment_lengths": [128, LENGTH], "dilation_rates": [1, 4], "order": ORDER}
model = AutoModelForCausalLM.from_config(config)
arguments = TrainingArguments(
    output_dir=tempfile.mkdtemp(),
    use_cpu=not torch.cuda.is_available(),
    max_steps=STEPS,
    per_device_train_batch_size=1,  # of a group of ranks
    gradient_accumulation_steps=MICRO_STEPS,
    learning_rate=3e-3,
    lr_scheduler_type="constant",
    weight_decay=0.01,
    train_sampling_strategy="sequential",
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
)
ranks = int(os.environ.get("WORLD_SIZE", "1"))
trainer = SequenceParallelTrainer(model, arguments, train_dataset=dataset, eval_dataset=dataset[:4], sp_size=ranks)
trainer.train()
trainer.evaluate()
time.sleep(0.2)  # while Python shuts down, torch 2.13 aborts on what Gloo's threads still hold
