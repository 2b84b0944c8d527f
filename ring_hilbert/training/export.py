# SPDX-License-Identifier: Apache-2.0
"""The trained model as a folder that `AutoModelForCausalLM.from_pretrained` loads after `import ring_hilbert`."""

from __future__ import annotations

import shutil
from pathlib import Path

from ring_hilbert.training.config import RunConfig
from ring_hilbert.training.engine import Engine
from ring_hilbert.training.tokens import load_tokenizer
from ring_hilbert.training.world import World


def export_model(engine: Engine, config: RunConfig, world: World, folder: Path) -> None:
    """Write model, configuration (with its `ring_hilbert`) and tokenizer, whole or not at all; replaces an older export."""
    unfinished = folder.with_name(folder.name + ".unfinished")
    world.from_main(lambda: shutil.rmtree(unfinished, ignore_errors=True))
    engine.export(unfinished)
    world.from_main(lambda: _finish(config, unfinished, folder))


def _finish(config: RunConfig, unfinished: Path, folder: Path) -> None:
    load_tokenizer(config.data.tokenizer).save_pretrained(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
