# SPDX-License-Identifier: Apache-2.0
"""What several files of tests of training stand on."""

from pathlib import Path

import pytest

from tests.harness.tiny_run import write_texts


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What runs prepare for themselves lies in a folder of this test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(folder))
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What tiny runs train on, for all tests of a file."""
    folder = tmp_path_factory.mktemp("texts")
    write_texts(folder)
    return folder
