"""--minutes: the number of training steps follows from the speed of the first ones."""

from pathlib import Path

from common import checkpoint, training
from common.checkpoint import saved
from common.ema import Ema

import pytest
from helpers import NETWORK, metrics, same, signal_after, train
from torch import nn


class Clock:
    """A clock on which every look takes half a second."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.5
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.time, "perf_counter", Clock())


def run(folder: Path, **changes: object) -> Path:
    quiet = {"log_every": 1000, "preview_every": 1000, "num_samples": 0}
    return train(folder, NETWORK, minutes=0.2, decay_learning_rate=True, **quiet, **changes)


def test_the_steps_fit_the_time(tmp_path):
    run(tmp_path)
    content = checkpoint.load(saved(tmp_path)[-1])
    assert content.step == content.config["num_training_steps"] == 23  # 0.95 x 12 s / 0.5 s
    assert "0.2 minutes: 23 training steps, at 0.5 s each" in (tmp_path / "log.txt").read_text()
    assert metrics(tmp_path)[-1]["step"] == "23"  # the last step has its row


def test_a_slow_first_step_does_not_decide_alone(tmp_path, monkeypatch):
    clock, update = Clock(), Ema.update_parameters
    monkeypatch.setattr(training.time, "perf_counter", clock)

    def slow_once(self: Ema, model: nn.Module) -> None:
        update(self, model)
        monkeypatch.setattr(Ema, "update_parameters", update)
        clock.now += 0.5

    monkeypatch.setattr(Ema, "update_parameters", slow_once)
    quiet = {"log_every": 1000, "preview_every": 1000, "num_samples": 0}
    train(tmp_path, NETWORK, minutes=0.4, **quiet)  # 5 % of it are 1.2 s, two steps
    assert saved(tmp_path)[-1].name == "checkpoint_000030.safetensors"  # 0.95 x 24 s / 0.75 s


def test_a_resumed_run_keeps_the_number_of_steps(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole")
    with monkeypatch.context() as context:
        signal_after(context, 12, 15)
        with pytest.raises(SystemExit):
            run(tmp_path / "stopped")
    monkeypatch.setattr(training.time, "perf_counter", lambda: 1e6)  # another speed
    stopped = run(tmp_path / "stopped", resume="latest", num_training_steps=23)
    one, other = (checkpoint.load(saved(folder)[-1]) for folder in (whole, stopped))
    assert same(one.tensors, other.tensors)


def test_too_little_time_is_at_least_two_steps(tmp_path):
    train(tmp_path, NETWORK, minutes=0.001, num_samples=0)
    assert saved(tmp_path)[-1].name == "checkpoint_000002.safetensors"
