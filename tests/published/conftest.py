"""Small networks in place of the published ones, so that tests of files are quick."""

from lesson_05 import published as five
from lesson_09 import published as nine

import official
import pytest


@pytest.fixture
def small_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {**five.PROCESS, "variance": "beta", "network": official.NETWORK}
    tables = [five.DIFFUSERS, five.DIFFUSERS_2022, five.ERMONGROUP]
    monkeypatch.setattr(five, "PUBLISHED", {"small": five.Published(tables, "cifar10", config)})
    network = {"learned_variance": True, "num_heads": 2, "time_scale": 0.25, **official.NETWORK}
    config = {**nine.COSINE, "network": network}
    small = nine.Published([nine.OPENAI], "cifar10", config)
    monkeypatch.setattr(nine, "PUBLISHED", {"small-openai": small})
