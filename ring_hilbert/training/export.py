# SPDX-License-Identifier: Apache-2.0
"""The trained model as a folder that `AutoModelForCausalLM.from_pretrained` loads after `import ring_hilbert`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from transformers import PretrainedConfig
from transformers.utils import GENERATION_CONFIG_NAME

from ring_hilbert.training.config import RunConfig
from ring_hilbert.training.engine import Engine
from ring_hilbert.training.model import build_skeleton, generation_settings
from ring_hilbert.training.tokens import load_tokenizer
from ring_hilbert.training.world import World


def export_model(engine: Engine, config: RunConfig, hf_config: PretrainedConfig, world: World, folder: Path) -> None:
    """Write model, configuration (with its `ring_hilbert`) and tokenizer atomically, replacing an older export.

    A model from model.path keeps its settings for generation.

    Weights are float32; the saved `dtype` is that of training, to which loading converts them.
    """
    state = engine.whole_state()
    world.from_main(lambda: write_model(config, hf_config, state, folder))


def write_model(config: RunConfig, hf_config: PretrainedConfig, state: dict[str, torch.Tensor], folder: Path) -> None:
    """The same from float32 weights by name, in one process."""
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model = build_skeleton(config, hf_config)
    model.config.dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    model.save_pretrained(unfinished, state_dict=state)
    if generation := generation_settings(config):
        file = unfinished / GENERATION_CONFIG_NAME  # derived from the model's configuration
        changed = {key: value for key, value in json.loads(file.read_text()).items() if key in config.model.changes}
        file.write_text(json.dumps(generation | changed | {"use_cache": False}, indent=2))
    load_tokenizer(config.data.tokenizer).save_pretrained(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
