"""Lesson 2's samplers against exact recursions, for Gaussian data and the exact network."""

import math

from lesson_02.dpm import DPM, Gaussian, erasing_beta, multiply
from lesson_02.network import ConvDense
from lesson_02.sample_mnist import read_mask

import pytest
import torch
from helpers_02 import NETWORK, GaussianOracle
from torch import Tensor


def scripted(monkeypatch: pytest.MonkeyPatch, noise: Tensor) -> None:
    """Make the samplers draw this noise, one row after the other."""
    draws = iter(noise)
    monkeypatch.setattr(torch, "randn_like", lambda x: next(draws).view(x.shape))


def test_sampler_follows_the_exact_recursion(monkeypatch):
    process = DPM(erasing_beta(300))
    oracle = GaussianOracle(process, 0.3, 0.5)
    noise = torch.randn(300, 1000)
    scripted(monkeypatch, noise[1:])
    steps = list(process.trajectory(oracle, noise[0].view(250, 1, 2, 2)))
    samples = steps[-1][1]
    exact, mean, var = noise[0].double(), 0.0, 1.0
    for k, t in enumerate(range(300, 1, -1)):
        a, c, step_var = oracle.step(t)
        exact = a * exact + c + math.sqrt(step_var) * noise[k + 1]
        mean, var = a * mean + c, a**2 * var + step_var
    assert torch.allclose(samples.flatten().double(), exact, atol=2e-4)
    assert [t for t, _ in steps] == list(range(299, 0, -1))
    scripted(monkeypatch, noise[1:])
    assert torch.equal(process.sample(oracle, noise[0].view(250, 1, 2, 2)), samples)
    # The samples are distributed as X1, up to what remains of the data at T.
    mean_1, var_1 = oracle.moments(1)
    assert mean == pytest.approx(mean_1, abs=0.03)
    assert var == pytest.approx(var_1, rel=0.01)


def test_multiplying_by_evidence_equals_bayes_on_a_grid():
    p = Gaussian(torch.full((1, 1, 1, 1), 0.4), torch.full((1, 1, 1, 1), math.log(0.3)))
    z = torch.linspace(-8, 8, 100_001, dtype=torch.float64)
    log_p = -((z - 0.4) ** 2) / 0.6 - (z + 0.5) ** 2 / (2 * 0.2)
    mass = torch.softmax(log_p, 0)
    mean = (mass * z).sum()
    q = multiply(p, torch.full((1, 1, 1, 1), -0.5), torch.full((1, 1, 1, 1), 0.2))
    assert q.mean.item() == pytest.approx(mean.item(), abs=1e-6)
    assert q.log_var.exp().item() == pytest.approx((mass * (z - mean) ** 2).sum().item(), rel=1e-5)
    y = torch.full((1, 1, 1, 1), 0.1)
    known, unknown = (multiply(p, y, torch.full_like(y, v)) for v in (0.0, float("inf")))
    assert torch.equal(known.mean, y)
    assert known.log_var.exp() == 0
    assert torch.equal(unknown.mean, p.mean)
    assert torch.equal(unknown.log_var, p.log_var)


def perturbed_recursion(oracle: GaussianOracle, y: float, noise_var: float) -> tuple[float, float]:
    """Mean and variance of the algorithm's x1, for noisy evidence y on a single value."""
    mean, var = y / (1 + noise_var), noise_var / (1 + noise_var)  # π r
    for t in range(len(oracle.beta), 1, -1):
        a, c, step_var = oracle.step(t)
        weight = step_var / (step_var + noise_var)
        mean = (1 - weight) * (a * mean + c) + weight * y
        var = ((1 - weight) * a) ** 2 * var + (1 - weight) * step_var
    return mean, var


def test_posterior_draws_follow_the_linear_recursion(monkeypatch):
    process = DPM(erasing_beta(100))
    oracle = GaussianOracle(process, 0.2, 0.9)
    noise = torch.randn(100, 600)
    y = torch.full((150, 1, 2, 2), 1.5)
    scripted(monkeypatch, noise)
    draws = process.posterior_sample(oracle, y, torch.full_like(y, 0.4))
    scripted(monkeypatch, noise)
    *_, (t, last) = process.posterior_trajectory(oracle, y, torch.full_like(y, 0.4))
    assert t == 1
    assert torch.equal(last, draws)
    exact = 1.5 / 1.4 + math.sqrt(0.4 / 1.4) * noise[0].double()
    for k, t in enumerate(range(100, 1, -1)):
        a, c, var = oracle.step(t)
        precision = 1 / var + 1 / 0.4
        exact = ((a * exact + c) / var + 1.5 / 0.4) / precision + noise[k + 1] / precision**0.5
    assert torch.allclose(draws.flatten().double(), exact, atol=2e-4)
    mean, var = perturbed_recursion(oracle, 1.5, 0.4)
    assert draws.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(var / 600))
    assert draws.var().item() == pytest.approx(var, rel=5 * math.sqrt(2 / 600))


def test_constant_evidence_counts_about_twice():
    """Unit data, unit noise, y = 1: the README's table. The true posterior is 0.5 and 0.5."""
    mean, var = perturbed_recursion(GaussianOracle(DPM(erasing_beta(1000))), 1.0, 1.0)
    assert mean == pytest.approx(0.667, abs=2e-3)
    assert var == pytest.approx(0.333, abs=2e-3)


@pytest.mark.parametrize("channels", [1, 3])
def test_inpainting_leaves_the_known_pixels_unchanged(channels):
    process = DPM(erasing_beta(30))
    network = ConvDense(channels, 28, 30, **NETWORK)
    torch.nn.init.normal_(network.readouts[-1].weight, std=0.3)
    x0 = torch.randn(1, channels, 28, 28)
    missing = read_mask("left", 28, 28)
    assert missing[..., :14].all()
    assert not missing[..., 14:].any()
    noise_var = torch.where(missing, float("inf"), 0.0).expand_as(x0)
    draws = process.posterior_sample(network, torch.where(missing, 0.0, x0), noise_var)
    assert torch.equal(draws[..., 14:], x0[..., 14:])
    assert (draws[..., :14] != x0[..., :14]).all()
    assert draws.isfinite().all()


def test_missing_pixels_are_drawn_from_the_model():
    """The pixels are independent: neither a known pixel nor y at a missing pixel has an effect."""
    process = DPM(erasing_beta(100))
    oracle = GaussianOracle(process, 0.5, 0.7)
    y = torch.full((2000, 1, 1, 2), 9.0)
    noise_var = torch.tensor([0.0, float("inf")]).view(1, 1, 1, 2).expand_as(y)
    draws = process.posterior_sample(oracle, y, noise_var)
    mean, var = perturbed_recursion(oracle, 0.0, 1e12)
    assert (draws[..., 0] == 9).all()
    assert draws[..., 1].mean().item() == pytest.approx(mean, abs=5 * math.sqrt(var / 2000))
    assert draws[..., 1].var().item() == pytest.approx(var, rel=5 * math.sqrt(2 / 2000))


def test_denoising_without_noise_returns_the_image():
    process = DPM(erasing_beta(30))
    y = torch.randn(2, 3, 4, 4)
    assert torch.equal(process.posterior_sample(GaussianOracle(process), y, 0 * y), y)
