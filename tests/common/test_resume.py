"""Runs that are stopped or killed and then resumed end like undisturbed ones."""

import os
import signal
from dataclasses import replace
from pathlib import Path

from common import checkpoint, cli, training
from common.checkpoint import saved
from common.data import load_images
from common.errors import UserError
from lesson_05 import train_mnist
from lesson_05.unet import UNet

import pytest
import stress
import torch
from helpers import (
    NETWORK,
    assert_same_results,
    error_line,
    metrics,
    same,
    signal_after,
    train,
)
from toy import toy_run

FAST = NETWORK | {"channels": 4, "num_groups": 2, "attention_resolutions": []}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_forty_steps_equal_twenty_a_signal_and_twenty(tmp_path, monkeypatch, capsys, number):
    """With dropout, channels_last weights, fused Adam, a decaying rate, and samples at the end."""
    settings = {"num_training_steps": 40, "decay_learning_rate": True, "log_every": 7}
    settings |= {"num_samples": 1}
    whole = train(tmp_path / "whole", **settings)
    signal_after(monkeypatch, 20, number)
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path / "parts", **settings)
    assert stopped.value.code == 128 + number
    assert "--resume" in capsys.readouterr().out
    parts = tmp_path / "parts"
    assert (parts / "checkpoint_000020.safetensors").exists()
    with (parts / "metrics.csv").open("a") as log:
        log.write("35,9,9,9,9,9,9,9,9,9\n")  # as left by a run that was killed later
    train(parts, **settings, resume="latest")
    assert saved(parts)[-1].name == "checkpoint_000040.safetensors"
    assert_same_results(whole, parts)


def test_rows_after_the_checkpoint_are_dropped_and_written_anew(tmp_path):
    toy_run(tmp_path / "whole")
    parts = tmp_path / "parts"

    def stop_at_6(step: int) -> None:
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit):
        toy_run(parts, on_step=stop_at_6, checkpoint_every=2)
    assert [path.stem[-1] for path in saved(parts)] == ["4", "6"]
    early = str(parts / "checkpoint_000004.safetensors")
    with pytest.raises(UserError, match=r"holds later checkpoints \(checkpoint_000006\."):
        toy_run(parts, resume=early)
    (parts / "checkpoint_000006.safetensors").unlink()
    toy_run(parts, resume=early)  # the row of step 6 is there already
    name = "checkpoint_000008.safetensors"
    one, other = (checkpoint.load(folder / name) for folder in (tmp_path / "whole", parts))
    assert same(one.tensors, other.tensors)
    assert same(one.training, other.training)
    assert metrics(parts) == metrics(tmp_path / "whole")


def test_a_run_on_a_gpu_is_resumed_on_the_cpu(tmp_path):
    """Its checkpoint also holds the random state of the GPU."""
    toy_run(tmp_path, steps=2)
    path = tmp_path / "checkpoint_000002.safetensors"
    content = checkpoint.load(path)
    tensors = {**content.tensors, "rng.cuda": torch.zeros(16, dtype=torch.uint8)}
    checkpoint.save(path, replace(content, tensors=tensors))
    toy_run(tmp_path, steps=3, resume="latest")
    assert "rng.cuda" not in checkpoint.load(saved(tmp_path)[-1]).tensors


def test_killed_runs_end_like_undisturbed_ones(tmp_path):
    result = stress.kills(2, tmp_path, seed=1, steps=8)
    assert result["kills"] >= 2


def test_auto_starts_a_run_or_resumes_it(tmp_path, capsys):
    toy_run(tmp_path / "run", steps=2, resume="auto")
    assert "Resumed" not in capsys.readouterr().out
    toy_run(tmp_path / "run", steps=3, resume="auto")
    assert "Resumed after step 2" in capsys.readouterr().out
    toy_run(tmp_path / "killed", steps=1)
    (tmp_path / "killed" / "checkpoint_000001.safetensors").unlink()  # killed before it saved
    toy_run(tmp_path / "killed", steps=3, resume="auto")
    assert [row["step"] for row in metrics(tmp_path / "killed")] == ["3"]


def test_a_folder_that_holds_a_run_is_refused_and_unchanged(trained, capsys):
    names = sorted(trained.iterdir())
    with pytest.raises(UserError, match=r"holds a run already: --resume goes on with it"):
        train(trained)
    assert sorted(trained.iterdir()) == names


def test_a_finished_run_and_a_small_file_are_not_resumed_by_mistake(trained, tmp_path):
    small = tmp_path / "small.safetensors"
    checkpoint.shrink(str(trained / "checkpoint_000004.safetensors"), str(small))
    with pytest.raises(UserError, match="for sampling only"):
        train(tmp_path / "other", resume=str(small))
    train(tmp_path / "run", start_from=str(small), num_training_steps=1, num_samples=0)


def test_resume_takes_the_settings_of_the_run(tmp_path, capsys):
    train(tmp_path / "run", FAST, learning_rate=0.0123, num_samples=0)
    words = ["--resume", "--num_training_steps", "6", "--output_dir", str(tmp_path / "run")]
    cli.run(train_mnist.main, words, presets=True, network=UNet)
    content = checkpoint.load(tmp_path / "run" / "checkpoint_000006.safetensors")
    assert content.config["learning_rate"] == 0.0123
    assert content.config["network"]["channels"] == 4
    assert "Resumed after step 4" in capsys.readouterr().out


def test_resume_takes_another_learning_rate(tmp_path):
    rate = {"num_warmup_steps": 1, "log_every": 1, "checkpoint_every": 2, "num_samples": 0}
    train(tmp_path, FAST, learning_rate=0.01, num_training_steps=2, **rate)
    train(tmp_path, FAST, learning_rate=0.001, num_training_steps=3, resume="latest", **rate)
    assert [float(row["learning_rate"]) for row in metrics(tmp_path)] == [0.01, 0.01, 0.001]


def test_steps_on_the_command_line_override_the_epochs_of_the_run(tmp_path):
    train(tmp_path, FAST, num_epochs=1, batch_size=750, num_samples=0)
    words = ["--resume", "--num_training_steps", "3", "--output_dir", str(tmp_path)]
    cli.run(train_mnist.main, words, presets=True, network=UNet)
    assert (tmp_path / "checkpoint_000003.safetensors").exists()


def test_resume_with_another_network_is_one_line(tmp_path, capsys):
    train(tmp_path, FAST, num_samples=0)
    words = ["--resume", "--output_dir", tmp_path, "--network.channels", 8]
    words += ["--num_training_steps", 6]
    line = error_line(capsys, train_mnist.main, *words, presets=True, network=UNet)
    assert "checkpoint_000004.safetensors" in line


def test_an_optimiser_state_keeps_the_layout_of_its_parameter(tmp_path):
    """Fused Adam pairs elements by address: with another layout it would silently train wrongly."""
    layouts = []

    class Watched(torch.optim.Adam):
        def step(self, *args: object) -> None:
            for parameter, state in self.state.items():
                layouts.append(parameter.stride() == state["exp_avg"].stride())
            super().step(*args)

    train(tmp_path, FAST, num_samples=0)
    adam, torch.optim.Adam = torch.optim.Adam, Watched
    try:
        train(tmp_path, FAST, num_samples=0, num_training_steps=6, resume="latest")
    finally:
        torch.optim.Adam = adam
    assert len(layouts) > 50
    assert all(layouts)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux lists open files there")
def test_a_resumed_run_lets_go_of_the_file(tmp_path):
    """Otherwise the space of a removed checkpoint stays in use, and Windows cannot remove it."""
    toy_run(tmp_path, steps=2)
    mapped = []

    def check(step: int) -> None:
        mapped.append(str(tmp_path) in Path("/proc/self/maps").read_text())

    toy_run(tmp_path, steps=3, resume="latest", on_step=check)
    assert mapped == [False]


def test_a_finished_run_can_be_resumed_into_a_new_folder(tmp_path, capsys):
    """There is nothing left to train: samples and a checkpoint are written there."""
    first = train(tmp_path / "first", num_training_steps=2)
    second = train(tmp_path / "second", num_training_steps=2, resume=str(saved(first)[-1]))
    one, other = (checkpoint.load(saved(folder)[-1]) for folder in (first, second))
    assert same(one.tensors, other.tensors)
    assert str(saved(second)[-1]) in capsys.readouterr().out


def test_resuming_where_other_data_are_found_names_the_flag(tmp_path, monkeypatch):
    """As after a download failed and the run fell back to scikit-learn's digits."""
    folder = train(tmp_path / "run", num_training_steps=1)
    found = replace(load_images("digits"), name="mnist")
    monkeypatch.setattr(training, "load_images", lambda *arguments: found)
    with pytest.raises(
        UserError, match=r"trained on digits, but .* now is mnist: add --dataset di"
    ):
        train(folder, num_training_steps=2, resume="latest")
