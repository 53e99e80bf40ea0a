"""Interpolation between two images by way of their noise."""

import math

from common import cli
from lesson_05 import interpolate as script
from lesson_05.ddpm import DDPM, linear_beta
from lesson_05.interpolate import interpolate

import pytest
import torch
from helpers import error_line
from PIL import Image
from torch import Tensor


def test_the_ends_of_an_interpolation_have_noise_of_their_own():
    """Halfway between two noised copies of one image the noise has 1/√2 of its size; with the
    same noise at both ends it would have all of it."""
    process, calls = DDPM(linear_beta(60)), []

    def model(xt: Tensor, t: Tensor) -> Tensor:
        calls.append((t[0].item(), xt))
        return torch.zeros_like(xt)

    x0 = torch.full((1, 1, 100, 100), 0.4)
    trajectory = list(interpolate(process, model, x0, -x0, 30, [0.0, 0.25, 0.5, 1.0]))
    assert [s for s, _ in trajectory] == list(range(29, -1, -1))
    assert trajectory[-1][1].shape == (4, 1, 100, 100)
    assert [t for t, _ in calls] == list(range(30, 0, -1))
    first, quarter, half, second = calls[0][1]
    signal, noise = process.signal_rate[30].item(), process.noise_rate[30].item()
    for image, mean, size in [
        (first, 0.4, 1.0),
        (quarter, 0.2, math.hypot(0.75, 0.25)),
        (half, 0.0, math.sqrt(0.5)),
        (second, -0.4, 1.0),
    ]:
        assert image.mean().item() == pytest.approx(signal * mean, abs=0.05)
        assert image.std().item() == pytest.approx(noise * size, rel=0.05)
    torch.testing.assert_close(quarter, 0.75 * first + 0.25 * second)


def test_an_interpolation_from_little_noise_ends_at_the_images():
    """With a network that predicts the true noise, t = 1 gives the straight line between them."""
    process = DDPM(linear_beta(60))
    x0, other = torch.rand(2, 1, 1, 8, 8) * 2 - 1
    fractions = torch.linspace(0, 1, 5).view(-1, 1, 1, 1)
    line = (1 - fractions) * x0 + fractions * other

    def true_noise(xt: Tensor, t: Tensor) -> Tensor:
        return (xt - process.signal_rate[t] * line) / process.noise_rate[t]

    ((_, images),) = interpolate(process, true_noise, x0, other, 1, fractions.flatten().tolist())
    torch.testing.assert_close(images, line, atol=1e-5, rtol=0)


def test_interpolate_writes_its_picture_and_refuses_impossible_flags(trained, tmp_path, capsys):
    flags = ["--model_checkpoint", str(trained / "checkpoint_000004.safetensors")]
    flags += ["--dataset", "digits", "--num_columns", "3", "--device", "cpu"]
    flags += ["--output_dir", str(tmp_path / "out")]
    cli.run(script.main, [*flags, "--times", "2", "5"])
    with Image.open(tmp_path / "out" / "interpolation.png") as picture:
        assert picture.size == (2 * (5 * 29 + 1), 2 * (2 * 29 + 1))
    for words, message in [
        (["--times", "0"], "times [0]"),
        (["--times", "5", "61"], "choose times from 1 to 60"),
        (["--first", "-1"], "there is no test image -1"),
        (["--second", "297"], "choose 0 to 296"),
        (["--num_columns", "1"], "2 columns"),
    ]:
        capsys.readouterr()
        assert message in error_line(capsys, script.main, *flags, *words)
