# SPDX-License-Identifier: Apache-2.0
"""What several files of tests of training stand on."""

from pathlib import Path

import pytest


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What runs prepare for themselves lies in a folder of this test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(folder))
    return folder
