"""Fixtures of lesson 2's tests."""

from pathlib import Path

import pytest
from helpers_02 import train


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a tiny run."""
    return train(tmp_path_factory.mktemp("tiny") / "run") / "checkpoint_000004.safetensors"
