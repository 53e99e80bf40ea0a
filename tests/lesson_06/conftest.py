"""Fixtures of lesson 6: a process of 1000 steps, and small checkpoints of all that it samples."""

from lesson_05.ddpm import DDPM, linear_beta

import pytest
from small_networks import LESSONS, save_small_checkpoint


@pytest.fixture(scope="session")
def process() -> DDPM:
    return DDPM(linear_beta(1000), "beta_tilde")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A checkpoint of a small random network for each lesson."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {lesson: save_small_checkpoint(folder, lesson) for lesson in LESSONS}
