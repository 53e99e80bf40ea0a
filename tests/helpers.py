"""Functions that several tests share."""

import csv
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import checkpoint, cli
from common.checkpoint import saved
from common.ema import Ema
from lesson_05 import train_mnist
from lesson_05.options import DDPMOptions

import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
NETWORK = {
    "channels": 8,
    "multipliers": [1, 2],
    "num_blocks": 1,
    "attention_resolutions": [14],
    "num_groups": 4,
    "dropout": 0.1,
}
TINY_RUN = {
    "device": "cpu",
    "precision": "float32",
    "dataset": "digits",
    "num_timesteps": 60,
    "num_training_steps": 4,
    "batch_size": 8,
    "log_every": 5,
    "num_previews": 2,
    "num_samples": 2,
}


def train(folder: Path, network: dict[str, Any] = NETWORK, **changes: Any) -> Path:
    """A tiny run of lesson 5 on scikit-learn's digits; returns its folder."""
    options = {**TINY_RUN, "num_warmup_steps": 2, **changes}
    train_mnist.main(DDPMOptions(output_dir=str(folder), **options), network)
    return folder


def metrics(folder: Path) -> list[dict[str, str]]:
    """The rows of a run's metrics.csv, without the speed, which differs from run to run."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]


def same(one: Any, other: Any) -> bool:
    """Whether two nested values, tensors among them, are equal bit for bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def signal_after(monkeypatch: pytest.MonkeyPatch, step: int, number: int) -> None:
    """Let this process get a signal after the given step of its next training."""
    steps = iter(range(1, step + 1))
    update = Ema.update_parameters

    def update_and_signal(self: Ema, model: nn.Module) -> None:
        update(self, model)
        if next(steps, None) == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Ema, "update_parameters", update_and_signal)


def assert_same_results(one: Path, other: Path) -> None:
    """Two runs' last checkpoints, figures and samples are the same, bit for bit."""
    a, b = (checkpoint.load(saved(folder)[-1]) for folder in (one, other))
    assert a.step == b.step
    assert same(a.tensors, b.tensors)
    assert same([a.config, a.training], [b.config, b.training])
    assert metrics(one) == metrics(other)
    assert (one / "samples.png").read_bytes() == (other / "samples.png").read_bytes()


def error_line(
    capsys: pytest.CaptureFixture, main: Callable[..., None], *words: object, **groups: Any
) -> str:
    """Run a command line that must fail with exit code 2; returns its one line on standard
    error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cli.run(main, [str(word) for word in words], **groups)
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]
