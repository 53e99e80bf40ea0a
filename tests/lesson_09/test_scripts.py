"""Lesson 9's scripts, on tiny runs."""

import json
import math
import re
import runpy
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import checkpoint
from lesson_09 import evaluate, sample_mnist, train_mnist
from lesson_09.options import IDDPMOptions
from lesson_09.timesteps import LossAwareTimesteps
from lesson_09.unet import UNet

import pytest
from helpers import (
    NETWORK,
    ROOT,
    TINY_RUN,
    assert_same_results,
    error_line,
    metrics,
    signal_after,
)
from PIL import Image

QUICK = NETWORK | {"multipliers": [1, 1, 2], "attention_resolutions": [7], "num_groups": 1}


def train(folder: Path, **changes: Any) -> Path:
    """A tiny run on scikit-learn's digits; returns its folder."""
    options = {**TINY_RUN, "learning_rate": 1e-3, "num_steps": 5, **changes}
    train_mnist.main(IDDPMOptions(output_dir=str(folder), **options), QUICK)
    return folder


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a tiny run with learned variance."""
    return train(tmp_path_factory.mktemp("hybrid")) / "checkpoint_000004.safetensors"


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with fixed variance."""
    folder = tmp_path_factory.mktemp("fixed")
    train(folder, variance="beta", vlb_weight=0.0, schedule="linear")
    return folder / "checkpoint_000004.safetensors"


def test_a_run_writes_its_files_and_logs_both_terms(hybrid):
    names = {path.name for path in hybrid.parent.iterdir()}
    assert {"samples.png", "forward.png", "losses.png", "samples_000004.png"} <= names
    (row,) = metrics(hybrid.parent)
    loss, simple, vlb = (float(row[name]) for name in ("loss", "simple", "vlb"))
    assert loss == pytest.approx(simple + 1e-3 * vlb, rel=1e-4)  # vlb is the sum over t
    assert vlb > 1
    assert float(row["loss_quarter_1"]) > 0


def test_resume_with_the_loss_aware_sampler_is_bit_exact(tmp_path, monkeypatch):
    settings = {"num_training_steps": 20, "decay_learning_rate": True, "num_timesteps": 4}
    settings |= {"timestep_sampler": "loss_aware", "simple_weight": 0.0, "vlb_weight": 1.0}
    settings |= {"num_samples": 1, "num_steps": None, "batch_size": 16, "log_every": 10}
    whole = train(tmp_path / "whole", **settings)
    signal_after(monkeypatch, 10, signal.SIGTERM)
    parts = tmp_path / "parts"
    with pytest.raises(SystemExit) as stopped:
        train(parts, **settings)
    assert stopped.value.code == 128 + signal.SIGTERM
    tensors = checkpoint.load(parts / "checkpoint_000010.safetensors").tensors
    sampler = LossAwareTimesteps(4)
    sampler.load_state_dict({name: tensors[f"timesteps.{name}"] for name in ("terms", "seen")})
    assert sampler.weights().max() > 1.5 * sampler.weights().min()  # the state matters
    train(parts, **settings, resume="latest")
    assert_same_results(whole, parts)


def test_samples_in_few_steps_and_with_each_variance(hybrid, fixed, tmp_path, capsys):
    for file, flags, steps in [
        (hybrid, {}, 60),
        (hybrid, {"num_steps": 25}, 25),
        (hybrid, {"num_steps": 1, "variance": "beta"}, 1),
        (fixed, {"num_steps": 10, "variance": "beta_tilde"}, 10),
    ]:
        options = sample_mnist.SamplingOptions(
            output_dir=str(tmp_path), device="cpu", model_checkpoint=str(file), num_samples=1
        )
        sample_mnist.main(options=options, **flags)
        assert f"in {steps} steps" in capsys.readouterr().out
        assert (tmp_path / "reverse.png").exists()
    process, network, content = sample_mnist.load(str(hybrid))
    assert (process.variance, process.num_timesteps) == ("learned", 60)
    assert not network.training
    assert content.config["network"]["learned_variance"]


def test_bad_input_is_refused_in_one_line(hybrid, fixed, tmp_path, capsys):
    words = ["--output_dir", tmp_path / "out", "--device", "cpu", "--model_checkpoint"]
    for script, extra, message in [
        (sample_mnist, [hybrid, "--num_steps", "0"], "num_steps is 0: it must be from 1 to 60"),
        (sample_mnist, [hybrid, "--num_steps", "61"], "num_steps is 61"),
        (sample_mnist, [hybrid, "--num_samples", "0"], "num_samples is 0"),
        (sample_mnist, [fixed, "--variance", "learned"], "trained without learned variance"),
        (evaluate, [hybrid, "--num_terms", "1"], "num_terms is 1"),
        (evaluate, [hybrid, "--num_images", "1"], "num_images is 1"),
        (evaluate, [hybrid, "--batch_size", "0"], "batch_size is 0"),
    ]:
        assert message in error_line(capsys, script.main, *words, *extra)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--schedule quadratic", "quadratic"),
        ("--variance large", "large"),
        ("--vlb_weight -1", "vlb_weight"),
        ("--simple_weight 0 --vlb_weight 0", "one must be positive"),
        ("--timestep_sampler greedy", "greedy"),
        ("--num_timesteps 0", "num_timesteps is 0"),
        ("--num_timesteps 20 --num_steps 30", "num_steps is 30"),
        ("--network.num_heads 3", "3 attention heads"),
        ("--network.learned_variance true", "learned_variance"),
    ],
)
def test_bad_settings_of_a_run_are_refused_in_one_line(words, message, tmp_path, capsys):
    flags = ["--config", "configs/laptop.yaml", "--dataset", "digits", "--output_dir", tmp_path]
    flags += ["--network.channels", "8", *words.split()]
    assert message in error_line(capsys, train_mnist.main, *flags, presets=True, network=UNet)


def test_evaluation_writes_the_parts_of_the_bound_and_the_figures(hybrid, tmp_path, capsys):
    def evaluated(name: str, **flags: int) -> dict[str, Any]:
        options = evaluate.CheckpointOptions(
            output_dir=str(tmp_path / name), device="cpu", model_checkpoint=str(hybrid)
        )
        evaluate.main(num_images=20, options=options, **flags)
        return json.loads((tmp_path / name / "bits_per_dim.json").read_text())

    full = evaluated("full", num_terms=10, num_steps=10)
    parts = [full[name]["mean"] for name in ("prior", "KL", "decoder")]
    assert sum(parts) == pytest.approx(full["total"]["mean"], rel=1e-4)
    assert full["num_terms"] == full["num_timesteps"] == 10
    assert evaluated("few", num_terms=50, num_steps=4)["num_terms"] == 4  # there are no more
    estimate = evaluated("estimate", num_terms=5, num_steps=10, batch_size=7)["total"]
    gap = abs(estimate["mean"] - full["total"]["mean"])
    assert gap < 5 * math.hypot(estimate["standard_error"], full["total"]["standard_error"])
    for name in ("terms.png", "variance_ratio.png", "schedules.png"):
        assert (tmp_path / "full" / name).exists()
    assert "±" in capsys.readouterr().out


# The README


README = ROOT / "lesson_09" / "README.md"
TINY = {
    "train_mnist.py": "--dataset digits --network.channels 8 --network.num_groups 1 "
    "--num_samples 1 --num_training_steps 2 --num_timesteps 60 --num_steps 5 --batch_size 4 "
    "--num_previews 1 --device cpu",
    "sample_mnist.py": "--num_samples 1 --num_steps 5 --device cpu",
    "evaluate.py": "--num_images 4 --num_terms 3 --device cpu",
    "variance.py": "--num_images 4 --num_terms 3 --steps 5 --num_samples 3 "
    "--num_classifier_steps 2 --device cpu",
    "break_it.py": "--num_samples 1 --num_steps 3 --num_training_steps 1 --device cpu "
    "--model_checkpoint output/checkpoint",
}
COMMANDS = re.findall(r"^python (?!exercises)\w+\.py\b.*$", README.read_text(), re.MULTILINE)


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_of_the_readme_runs(line, hybrid, tmp_path, monkeypatch):
    """In the lesson's folder; the first in a separate process, as a user runs it."""
    words = shlex.split(line)[1:]
    tiny = TINY[words[0]]
    if "--data_dir" in words:  # a folder of one's own images
        words[words.index("--data_dir") + 1] = str(tmp_path / "photos")
        (tmp_path / "photos").mkdir()
        for number in range(6):
            Image.effect_noise((60, 40), number).save(tmp_path / "photos" / f"{number}.jpg")
        tiny = tiny.replace("--dataset digits ", "")
    words += [*shlex.split(tiny), "--output_dir", str(tmp_path / "run")]
    if "--model_checkpoint" in words:
        words[words.index("--model_checkpoint") + 1] = str(hybrid)
    if line == COMMANDS[0]:
        command = [sys.executable, *words]
        result = subprocess.run(
            command, cwd=README.parent, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, result.stderr
    else:
        monkeypatch.chdir(README.parent)
        monkeypatch.setattr(sys, "argv", words)
        runpy.run_path(words[0], run_name="__main__")
    assert any((tmp_path / "run").iterdir())
