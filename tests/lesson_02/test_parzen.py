"""The Parzen window of lesson 2."""

import math

from common.options import CheckpointOptions
from lesson_02 import parzen

import numpy as np
import pytest
import torch


@pytest.mark.parametrize("width", [0.1, 0.4])
def test_parzen_window_equals_the_mean_of_gaussians(width):
    samples = torch.randint(0, 256, (7, 1, 3, 3), dtype=torch.uint8)
    test = torch.randint(0, 256, (4, 1, 3, 3), dtype=torch.uint8)
    found = parzen.parzen_bits(samples, test, [0.2, width], torch.device("cpu"))
    window = torch.distributions.Normal(*torch.tensor([0.0, width], dtype=torch.float64))
    distance = (test[:, None].double() - samples[None].double()) / 255
    log_p = window.log_prob(distance).sum((2, 3, 4))
    expected = (log_p.logsumexp(1) - math.log(7)) / math.log(2)
    assert torch.allclose(found[1], expected, rtol=1e-9)


def test_parzen_window_does_not_depend_on_the_size_of_the_parts(monkeypatch):
    samples = torch.randint(0, 256, (23, 1, 4, 4), dtype=torch.uint8)
    test = torch.randint(0, 256, (11, 1, 4, 4), dtype=torch.uint8)
    whole = parzen.parzen_bits(samples, test, [0.2], torch.device("cpu"))
    monkeypatch.setattr(parzen, "MAX_SAMPLES", 5)
    monkeypatch.setattr(parzen, "MAX_IMAGES", 4)
    parts = parzen.parzen_bits(samples, test, [0.2], torch.device("cpu"))
    assert whole.shape == parts.shape == (1, 11)
    assert torch.allclose(whole, parts, rtol=1e-12)


def test_the_bandwidth_is_chosen_on_the_validation_images():
    """For Gaussian images around one sample, the best bandwidth is their standard deviation."""
    samples = torch.full((1, 1, 5, 5), 128, dtype=torch.uint8)
    spread = (128 + 25.5 * torch.randn(300, 1, 5, 5)).round().to(torch.uint8)
    wide = (128 + 51 * torch.randn(300, 1, 5, 5)).clamp(0, 255).round().to(torch.uint8)
    widths, cpu = [0.05, 0.1, 0.2, 0.4], torch.device("cpu")
    assert parzen.log_likelihood(samples, spread, wide, widths, cpu)[0] == 0.1
    assert parzen.log_likelihood(samples, wide, spread, widths, cpu)[0] == 0.2


def test_parzen_script_reuses_its_samples(tiny, tmp_path, capsys):
    flags = {"num_samples": 3, "num_validation": 10, "num_images": 20}
    options = CheckpointOptions(str(tmp_path), device="cpu", model_checkpoint=str(tiny))
    parzen.main(**flags, options=options)
    assert np.load(tmp_path / "samples.npz")["samples"].shape == (3, 1, 28, 28)
    first = capsys.readouterr().out
    parzen.main(**flags, samples=str(tmp_path / "samples.npz"), options=options)
    assert capsys.readouterr().out == first
    lines = {
        line.split("  ")[1].strip(): line for line in first.splitlines() if "bandwidth" in line
    }
    assert set(lines) == {"samples", "training images"}
    assert "317 ± 2.7" in first
    assert "3 samples" in first
