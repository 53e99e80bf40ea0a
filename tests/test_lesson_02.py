"""Lesson 2 against closed forms: Gaussian data, for which the bound and the samplers are known."""

import inspect
import math
import os
import runpy
import shlex
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from PIL import Image
from test_common import equal, fails, without_speed
from test_readme import scripts
from torch import Tensor

from common import checkpoint, mnist
from common.errors import UserError
from common.images import save_grid
from common.run import RunOptions
from lesson_02 import break_it, parzen, sample_mnist, swiss_roll, train_mnist
from lesson_02.dpm import (
    DPM,
    L_NULL,
    Gaussian,
    Standard,
    bumps,
    draw_times,
    erasing_beta,
    kl,
    multiply,
    standard,
    strata,
)
from lesson_02.network import ConvDense, MultiScaleConv, initialise

LESSON = ROOT / "lesson_02"
QUICK = {"num_conv_layers": 2, "conv_channels": 4, "num_scales": 3, "num_dense_layers": 2}
QUICK |= {"dense_channels": 8, "readout_channels": 6}


class GaussianOracle:
    """The exact reverse steps for data whose values are N(m, s²), as (μ, b) of the paper's p."""

    def __init__(self, process: DPM, m: float = 0.0, s: float = 1.0) -> None:
        self.beta, self.m, self.s = process.beta().detach(), m, s
        one = torch.ones(1, dtype=torch.float64)
        self.bar = torch.cat([one, (1 - self.beta).cumprod(0)])
        steps = [(1.0, 0.0, 1.0), *(self.step(t) for t in range(1, len(self.beta) + 1))]
        self.steps = torch.tensor(steps, dtype=torch.float64)

    def moments(self, t: int) -> tuple[float, float]:
        """Mean and variance of q(xt)."""
        bar = self.bar[t].item()
        return math.sqrt(bar) * self.m, bar * self.s**2 + 1 - bar

    def step(self, t: int) -> tuple[float, float, float]:
        """q(x_{t-1} | xt) = N(a xt + c, variance)."""
        beta = self.beta[t - 1].item()
        (mean, var), (before, var_before) = self.moments(t), self.moments(t - 1)
        a = math.sqrt(1 - beta) * var_before / var
        return a, before - a * mean, beta * var_before / var

    def __call__(self, xt: Tensor, t: Tensor) -> Tensor:
        a, c, var = self.steps[t].T.reshape(3, -1, 1, 1, 1)
        beta = self.beta[t - 1].view(-1, 1, 1, 1)
        mu = ((a - (1 - beta).sqrt()) * xt.double() + c) / beta.sqrt()
        b = math.sqrt(len(self.beta)) * (var.logit() - beta.logit()).expand_as(mu)
        return torch.cat([mu, b], 1).float()


def zero(xt: Tensor, t: Tensor) -> Tensor:
    """A network that answers 0."""
    return torch.zeros_like(torch.cat([xt, xt], 1))


def scripted(monkeypatch: pytest.MonkeyPatch, noise: Tensor) -> None:
    """Have the samplers draw this noise, one row after the other."""
    draws = iter(noise)
    monkeypatch.setattr(torch, "randn_like", lambda x: next(draws).view(x.shape))


# The schedule and the bumps


@pytest.mark.parametrize(("T", "beta_1"), [(100, 0.01099), (500, 0.00300), (1000, 0.00200)])
def test_first_beta_of_the_reference_code(T, beta_1):
    beta = erasing_beta(T)
    assert beta.shape == (T,)
    assert beta[0].item() == pytest.approx(beta_1, abs=5e-6)
    assert beta[-1].item() == pytest.approx(0.5, abs=1e-5)
    assert DPM(beta).ceiling(1).item() == pytest.approx(0.5 * math.log2(1 / beta_1), abs=0.01)


def test_every_step_erases_an_equal_share():
    bar = torch.cat([torch.ones(1), (1 - erasing_beta(1000)).cumprod(0)])
    lost = -bar.diff()[1:]
    assert lost.mean().item() == pytest.approx(1e-3, rel=0.01)
    assert lost.std() < 0.01 * lost.mean()
    with pytest.raises(UserError, match="num_timesteps is 1"):
        erasing_beta(1)


@pytest.mark.parametrize("T", [2, 40, 1000])
def test_bumps_sum_to_one_at_every_t(T):
    g = bumps(T)
    assert g.shape == (T + 1, 10)
    assert torch.allclose(g.sum(1), torch.ones(T + 1))
    if T == 1000:  # each is the largest where it stands
        assert g[torch.linspace(1, T, 10).round().long()].argmax(1).tolist() == list(range(10))
        assert g[1, 0] > 0.85


# The forward process and its posterior


def test_one_step_then_another_is_q_sample():
    process = DPM(erasing_beta(50))
    signal_rate, var = 1.0, 0.0
    for t, beta in enumerate(erasing_beta(50).tolist(), start=1):
        signal_rate, var = math.sqrt(1 - beta) * signal_rate, (1 - beta) * var + beta
        one = torch.ones(1, 1, 1, 1)
        mean = process.q_sample(one, torch.tensor([t]), 0 * one)
        spread = process.q_sample(0 * one, torch.tensor([t]), one)
        assert mean.item() == pytest.approx(signal_rate, rel=1e-5)
        assert spread.item() == pytest.approx(math.sqrt(var), rel=1e-5)


@pytest.mark.parametrize("t", [2, 3, 20, 40])
def test_posterior_equals_bayes_on_a_grid(t):
    process, x0, xt = DPM(erasing_beta(40)), 0.7, -0.2
    beta = erasing_beta(40)
    bar = (1 - beta[: t - 1]).prod()
    z = torch.linspace(-6, 6, 200_001, dtype=torch.float64)
    log_p = -((z - bar.sqrt() * x0) ** 2) / (2 * (1 - bar))
    log_p -= (xt - (1 - beta[t - 1]).sqrt() * z) ** 2 / (2 * beta[t - 1])
    p = torch.softmax(log_p, 0)
    mean = (p * z).sum()
    q = process.q_posterior(
        torch.full((1, 1, 1, 1), x0), torch.full((1, 1, 1, 1), xt), torch.tensor([t])
    )
    assert q.mean.item() == pytest.approx(mean.item(), abs=1e-6)
    assert q.log_var.exp().item() == pytest.approx((p * (z - mean) ** 2).sum().item(), rel=1e-4)


def test_kl_equals_torch_distributions():
    p, q = (Gaussian(torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)) for _ in range(2))
    normal = [torch.distributions.Normal(g.mean, torch.exp(0.5 * g.log_var)) for g in (p, q)]
    assert torch.allclose(kl(p, q), torch.distributions.kl_divergence(*normal), atol=1e-5)


def test_mean_and_variance_of_the_reverse_step():
    process = DPM(erasing_beta(100))
    t, xt, out = torch.tensor([2, 60]), torch.randn(2, 3, 4, 4), torch.randn(2, 6, 4, 4)
    p = process.p_mean_variance(out, xt, t)
    beta = erasing_beta(100)[t - 1].view(2, 1, 1, 1)
    mean = xt * (1 - beta).sqrt() + out[:, :3] * beta.sqrt()
    odds = beta / (1 - beta) * torch.exp(out[:, 3:].double() / 10)
    assert torch.allclose(p.mean.double(), mean, atol=1e-5)
    assert torch.allclose(p.log_var.exp().double(), odds / (1 + odds), rtol=1e-4)
    step = process.p_mean_variance(0 * out, xt, t)  # the forward step
    assert torch.allclose(step.log_var.exp().double(), beta.expand_as(mean), rtol=1e-5)


# The bound


def closed_form(process: DPM, oracle: GaussianOracle) -> float:
    """-H(X1) - KL(q(xT) || π), in bits a value."""
    T = process.num_timesteps
    (_, var_1), (mean, var) = oracle.moments(1), oracle.moments(T)
    entropy = 0.5 * math.log2(2 * math.pi * math.e * var_1)
    return -entropy - 0.5 * (var + mean**2 - 1 - math.log(var)) / math.log(2)


@pytest.mark.parametrize(("m", "s", "channels"), [(0.6, 0.8, 1), (0.995, 0.1, 3)])
def test_perfect_network_reaches_the_closed_form_of_the_bound(m, s, channels):
    """For data of mean square 1, m² + s² = 1, as the bound supposes."""
    process = DPM(erasing_beta(60))
    oracle = GaussianOracle(process, m, s)
    x0 = m + s * torch.randn(40, channels, 30, 30)
    bound = process.bound(oracle, x0)
    k = bound.total + channels * L_NULL
    expected = channels * closed_form(process, oracle)
    tolerance = 5 * k.std().item() / math.sqrt(40) + 1e-4
    assert tolerance < 0.03 * channels
    assert k.mean().item() == pytest.approx(expected, abs=tolerance)
    assert bound.terms.shape == bound.t.shape == (40, 59)


def test_quick_bound_is_unbiased_and_says_its_error():
    process = DPM(erasing_beta(200))
    oracle = GaussianOracle(process, 0.8, 0.6)
    x0 = 0.8 + 0.6 * torch.randn(1500, 1, 4, 4)
    few, full = (process.bound(oracle, x0, n) for n in (12, None))
    assert few.terms.shape == (1500, 12)
    error = math.hypot(few.total.std().item(), full.total.std().item()) / math.sqrt(1500)
    assert error < 0.05
    assert few.total.mean().item() == pytest.approx(full.total.mean().item(), abs=4 * error)


@pytest.mark.parametrize("T", [100, 1000])
def test_unit_data_and_a_perfect_network_give_l_null(T):
    process = DPM(erasing_beta(T))
    x0 = torch.randn(8, 1, 40, 40)
    bound = process.bound(GaussianOracle(process), x0, 40)
    tolerance = 5 * bound.total.std().item() / math.sqrt(8) + 1e-4
    assert bound.total.mean().item() == pytest.approx(0, abs=tolerance)
    out = GaussianOracle(process)(x0[:2], torch.tensor([2, T]))
    assert out.abs().max() < 2e-4  # for unit data the perfect network answers 0
    assert pytest.approx(-0.5 * math.log2(2 * math.pi * math.e)) == L_NULL


@pytest.mark.parametrize(("T", "parts"), [(2, 1), (3, 1), (40, 39), (1000, 32), (1000, None)])
def test_strata_cut_all_of_2_to_T(T, parts):
    edges = strata(T, parts)
    assert (edges[0], edges[-1]) == (2, T + 1)
    assert len(edges) == (T if parts is None else parts + 1)
    lengths = torch.tensor(edges).diff()
    assert lengths.min() >= 1
    if T == 1000 and parts:
        assert lengths[-1] > 100 > lengths[0] == 1
    for bad in (0, T):
        with pytest.raises(UserError, match=f"{bad} terms"):
            strata(T, bad)


@pytest.mark.parametrize("parts", [1, 7, 39])
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_drawn_times_and_their_weights_sum_over_t(parts, batch_size):
    """E[weight f(t)] = Σ_t f(t), whatever the parts and the batch."""
    edges = strata(40, parts)
    f = torch.linspace(2, 0.1, 41)
    sums, visits = [], torch.zeros(41)
    for _ in range(2000 // batch_size + 200):
        t, weight = draw_times(batch_size, edges, torch.device("cpu"))
        assert t.shape == weight.shape == (batch_size,)
        sums.append((weight * f[t]).mean())
        visits[t] = 1
    sums = torch.stack(sums)
    error = sums.std().item() / math.sqrt(len(sums))
    assert sums.mean().item() == pytest.approx(f[2:].sum().item(), abs=4.5 * error + 1e-3)
    assert visits[2:].all()
    assert not visits[:2].any()


def test_loss_is_the_bound_of_what_was_drawn():
    process = DPM(erasing_beta(30))
    x0, eps, t = torch.randn(3, 2, 5, 5), torch.randn(3, 2, 5, 5), torch.tensor([2, 9, 30])
    xt = process.q_sample(x0, t, eps)
    p = process.p_mean_variance(zero(xt, t), xt, t)
    bits = kl(process.q_posterior(x0, xt, t), p).sum((1, 2, 3)) / 25 / math.log(2)
    bar = (1 - erasing_beta(30)).prod().item()
    ceiling = 2 * 0.5 * math.log2((1 - bar) / erasing_beta(30)[0].item())  # two channels
    weight = torch.tensor([1.0, 4.0, 9.0])
    losses = process.loss(zero, x0, t, eps, weight)
    assert torch.allclose(losses, weight * bits - ceiling, atol=1e-4)
    alone = process.loss(zero, x0[1:2], t[1:2], eps[1:2], weight[1:2])  # a batch of one
    assert torch.allclose(alone, losses[1:2], atol=1e-5)


# Sampling, and the perturbed posterior


def test_sampler_follows_the_exact_recursion(monkeypatch):
    process = DPM(erasing_beta(300))
    oracle = GaussianOracle(process, 0.3, 0.5)
    noise = torch.randn(300, 1000)
    scripted(monkeypatch, noise[1:])
    seen = {}
    samples = process.sample(oracle, noise[0].view(250, 1, 2, 2), on_step=seen.__setitem__)
    exact, mean, var = noise[0].double(), 0.0, 1.0
    for k, t in enumerate(range(300, 1, -1)):
        a, c, step_var = oracle.step(t)
        exact = a * exact + c + math.sqrt(step_var) * noise[k + 1]
        mean, var = a * mean + c, a**2 * var + step_var
    assert torch.allclose(samples.flatten().double(), exact, atol=2e-4)
    assert list(seen) == list(range(299, 0, -1))
    assert torch.equal(seen[1], samples)
    # What is sampled is X1, within what remains of the data at T.
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
    """Mean and variance of the algorithm's x1, for evidence y with noise on a single value."""
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
    found = perturbed_recursion(GaussianOracle(DPM(erasing_beta(1000))), 1.0, 1.0)
    assert found[0] == pytest.approx(0.667, abs=2e-3)
    assert found[1] == pytest.approx(0.333, abs=2e-3)


@pytest.mark.parametrize("channels", [1, 3])
def test_inpainting_leaves_the_known_pixels_alone(channels):
    process = DPM(erasing_beta(30))
    network = ConvDense(channels, 28, 30, **QUICK)
    torch.nn.init.normal_(network.readouts[-1].weight, std=0.3)
    x0 = torch.randn(1, channels, 28, 28)
    missing = sample_mnist.read_mask("left", (channels, 28, 28))
    assert missing[..., :14].all()
    assert not missing[..., 14:].any()
    noise_var = torch.where(missing, float("inf"), 0.0).expand_as(x0)
    draws = process.posterior_sample(network, torch.where(missing, 0.0, x0), noise_var)
    assert torch.equal(draws[..., 14:], x0[..., 14:])
    assert (draws[..., :14] != x0[..., :14]).all()
    assert draws.isfinite().all()


def test_what_is_missing_is_drawn_from_the_model():
    """Independent pixels: what is known of one says nothing of the other, nor does the grey."""
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


# Learned rates


def test_learned_rates_have_the_derivatives_of_the_bound():
    """With frozen noise: against finite differences. β_1 does not move."""
    torch.manual_seed(1)
    process = DPM(erasing_beta(30), learned=True)
    x0, eps = torch.randn(64, 1, 4, 4).sign(), torch.randn(64, 1, 4, 4)
    t, weight = draw_times(64, strata(30), torch.device("cpu"))

    def network(xt, t):  # a good guess at the two points ±1, which no linear one can be
        return torch.cat([0.5 * (torch.tanh(2 * xt) - xt), -torch.ones_like(xt)], 1)

    def loss():
        return process.loss(network, x0, t, eps, weight).double().mean()

    loss().backward()
    found = process.shift.grad.clone()
    expected = torch.zeros(10)
    for j in range(10):
        sides = []
        for step in (0.02, -0.02):
            with torch.no_grad():
                process.shift[j] += step
                sides.append(loss().item())
                process.shift[j] -= step
        expected[j] = (sides[0] - sides[1]) / 0.04
    assert expected.abs().max() > 0.1
    assert torch.allclose(found, expected, rtol=0.02, atol=2e-4)
    with torch.no_grad():
        process.shift += torch.randn(10)
    beta = process.beta()
    assert beta[0].item() == pytest.approx(erasing_beta(30)[0].item(), rel=1e-6)
    assert (beta[1:] / erasing_beta(30)[1:] - 1).abs().max() > 0.1
    assert torch.allclose(DPM(beta.detach()).rates().post_x0, process.rates().post_x0)


def test_fixed_rates_are_no_parameters_and_learned_ones_start_there():
    beta = erasing_beta(50)
    fixed, learned = DPM(beta), DPM(beta, learned=True)
    assert list(fixed.parameters()) == []
    assert fixed.state_dict() == {}
    assert set(learned.state_dict()) == {"shift"}
    for one, other in zip(fixed.rates(), learned.rates(), strict=True):
        assert torch.allclose(one, other, rtol=1e-5)
    assert torch.allclose(learned.beta(), beta)


# The data


def test_standardised_data_have_mean_zero_and_variance_one():
    levels = torch.randint(0, 256, (50, 1, 8, 8), dtype=torch.uint8) // 3
    norm = standard(levels)
    images = levels.float() / 127.5 - 1
    x0 = norm.encode(images, dequantize=False)
    assert x0.mean().item() == pytest.approx(0, abs=1e-4)
    assert x0.var(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert torch.allclose(norm.decode(x0), images, atol=1e-5)
    with pytest.raises(UserError, match="one grey"):
        standard(torch.full((2, 1, 4, 4), 7, dtype=torch.uint8))


def test_dequantisation_spreads_a_level_over_its_width():
    norm = Standard(33.3, 78.6)
    images = torch.full((1, 1, 200, 200), 10 / 127.5 - 1)
    levels = norm.encode(images) * 78.6 + 33.3
    assert 9.5 - 1e-3 <= levels.min() < 9.51
    assert 10.49 < levels.max() <= 10.5 + 1e-3
    assert levels.mean().item() == pytest.approx(10, abs=0.01)
    assert levels.var().item() == pytest.approx(1 / 12, rel=0.02)
    whole = norm.encode(images, dequantize=False) * 78.6 + 33.3
    assert torch.allclose(whole, torch.tensor(10.0), atol=1e-4)


def test_bits_per_dim_of_a_gaussian_model():
    """L_null itself: -log2 of the density of a level under N(mean, std²), averaged over levels."""
    norm = Standard(100.0, 20.0)
    levels = 100 + 20 * torch.randn(200_000, dtype=torch.float64)
    density = torch.distributions.Normal(100.0, 20.0).log_prob(levels) / math.log(2)
    assert norm.bits_per_dim(0.0, 1) == pytest.approx(-density.mean().item(), abs=0.01)
    assert norm.bits_per_dim(3 * 2.0, 3) == pytest.approx(norm.bits_per_dim(0, 1) - 2)
    assert Standard(33.32, 78.57).bits_per_dim(0.0, 1) == pytest.approx(8.34, abs=5e-3)


def test_real_mnist_has_the_constant_of_the_readme(real_mnist):
    norm = standard(real_mnist.train)
    assert norm.mean == pytest.approx(33.318, abs=1e-2)
    assert norm.std == pytest.approx(78.567, abs=1e-2)
    assert norm.bits_per_dim(0.0, 1) == pytest.approx(8.34, abs=5e-3)


# The network


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("paths", [{}, {"num_conv_layers": 0}, {"num_dense_layers": 0}])
def test_a_new_network_is_the_forward_step_and_all_of_it_learns(channels, paths):
    network = ConvDense(channels, 28, 50, **QUICK | paths)
    xt, t = torch.randn(1, channels, 28, 28), torch.tensor([7])
    out = network(xt, t)
    assert out.shape == (1, 2 * channels, 28, 28)
    assert out.dtype == torch.float32
    assert (out == 0).all()
    torch.nn.init.normal_(network.readouts[-1].weight)
    network(torch.randn(4, channels, 28, 28), torch.tensor([1, 2, 9, 50])).square().sum().backward()
    idle = [name for name, p in network.named_parameters() if not p.grad.any()]
    assert idle == []


def test_the_time_enters_by_the_bumps_alone():
    network = ConvDense(1, 28, 1000, **QUICK)
    torch.nn.init.normal_(network.readouts[-1].weight)
    xt = torch.randn(1, 1, 28, 28)
    with torch.no_grad():
        many = network(xt.expand(1000, 1, 28, 28)[::50], torch.arange(1, 1001, 50))
    rank = torch.linalg.matrix_rank(many.flatten(1).double(), rtol=1e-5)
    assert rank <= 10
    assert rank >= 9


def test_each_coefficient_is_mixed_by_its_bump():
    network = ConvDense(2, 28, 40, **QUICK)
    bias = torch.randn(4, 10)
    network.readouts[-1].bias.data.copy_(bias.flatten())
    t = torch.tensor([1, 2, 17, 40])
    with torch.no_grad():
        out = network(torch.randn(4, 2, 28, 28), t)
    expected = bumps(40)[t] @ bias.T
    assert torch.allclose(out, expected[:, :, None, None].expand_as(out), atol=1e-5)


def test_scales_keep_the_size_of_what_passes_through():
    for num_scales in (1, 2, 3):
        h = torch.randn(8, 4, 28, 28)
        for _ in range(6):
            conv = MultiScaleConv(h.shape[1], 32, num_scales, 3).apply(initialise)
            h = torch.nn.functional.leaky_relu(conv(h), 0.05)
        assert 0.2 < h.square().mean().sqrt() < 3


def test_scales_are_pooled_convolved_enlarged_and_added():
    conv = MultiScaleConv(1, 1, 2, 1)
    for layer, weight in zip(conv.convs, (2.0, 3.0), strict=True):
        torch.nn.init.constant_(layer.weight, weight)
        torch.nn.init.zeros_(layer.bias)
    h = torch.randn(1, 1, 4, 4)
    means = h.view(2, 2, 2, 2).mean((1, 3)).repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.allclose(conv(h)[0, 0], 2 * h[0, 0] + 3 * means, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_conv_layers": 0, "num_dense_layers": 0}, "no layers"),
        ({"num_scales": 4}, "cannot be halved 3 times"),
        ({"num_scales": 0}, "num_scales is 0"),
        ({"kernel_size": 4}, "kernel_size is 4"),
        ({"conv_channels": 0}, "conv_channels is 0"),
        ({"num_readout_layers": 0}, "num_readout_layers is 0"),
    ],
)
def test_impossible_networks_are_refused(change, words):
    with pytest.raises(UserError, match=words):
        ConvDense(1, 28, 1000, **change)


# The swiss roll


def test_geometric_schedule_multiplies_noise_to_signal():
    beta = swiss_roll.geometric_beta(40, 0.001)
    bar = (1 - beta).cumprod(0)
    ratio = (1 - bar) / bar
    assert beta[0].item() == pytest.approx(0.001)
    assert ratio[-1].item() == pytest.approx(100)
    assert torch.allclose(ratio[1:] / ratio[:-1], ratio[1:2] / ratio[:1])
    for bad in [(1, 0.001), (40, 0.0), (40, 1.0)]:
        with pytest.raises(UserError, match="steps begin with"):
            swiss_roll.geometric_beta(*bad)


def test_the_roll_has_mean_zero_and_variance_one():
    points = swiss_roll.roll(50_000, 0.1)
    assert points.shape == (50_000, 2, 1, 1)
    assert points.mean((0, 2, 3)).abs().max() < 0.02
    assert points.square().mean().item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(("noise", "beta_1"), [(0.02, 0.01), (0.49, 0.5)])
def test_entropy_by_quadrature_equals_monte_carlo(noise, beta_1):
    """-E log2 p(X1), with p summed over points of the roll."""
    var = (1 - beta_1) * noise**2 + beta_1
    on_roll = swiss_roll.curve(torch.linspace(*swiss_roll.TURNS, 1500).double(), noise)
    centres = math.sqrt(1 - beta_1) * on_roll
    x1 = math.sqrt(1 - beta_1) * swiss_roll.roll(4000, noise).view(-1, 2).double()
    x1 += math.sqrt(beta_1) * torch.randn(4000, 2)
    log_p = (-torch.cdist(x1, centres).square() / (2 * var)).logsumexp(1)
    log_p -= math.log(1500) + math.log(2 * math.pi * var)
    bits = -log_p / math.log(2)
    expected, error = bits.mean().item(), bits.std().item() / math.sqrt(4000)
    assert swiss_roll.entropy_bits(noise, beta_1) == pytest.approx(expected, abs=4 * error + 0.01)


def test_radial_network_has_a_readout_for_each_time():
    network = swiss_roll.RadialNetwork(10, swiss_roll.roll(6, 0.1))
    torch.nn.init.normal_(network.readout)
    xt, t = torch.randn(3, 2, 1, 1), torch.tensor([1, 5, 10])
    out = network(xt, t)
    assert out.shape == (3, 4, 1, 1)
    away = (xt.view(3, 1, 2) - network.centre) / network.log_width.exp()[:, None]
    h = torch.softmax(-away.square().sum(2) / 2, 1)
    for k in range(3):
        assert torch.allclose(out[k].flatten(), network.readout[t[k]] @ h[k], atol=1e-5)


def test_swiss_roll_learns_and_says_its_bound(tmp_path, capsys):
    settings = {"num_timesteps": 8, "num_units": 32, "num_training_steps": 150, "noise": 0.1}
    settings |= {"num_points": 50, "num_bound_points": 500, "beta_1": 0.02, "learned_beta": True}
    settings |= {"batch_size": 128, "learning_rate": 0.05}
    swiss_roll.main(**settings, output_dir=str(tmp_path), device="cpu")
    out = capsys.readouterr().out
    k, limit = (float(out.split(word)[1].split()[0]) for word in ("K - L_null =", "at most"))
    gain_limit = float(out.split("K - L_null")[1].split("at most")[1].split()[0])
    assert 0.1 < k < gain_limit
    assert limit == pytest.approx(gain_limit + 2 * L_NULL, abs=2e-3)
    with Image.open(tmp_path / "swiss_roll.png") as image:
        assert min(image.size) > 400


# The Parzen window


@pytest.mark.parametrize("width", [0.1, 0.4])
def test_parzen_window_equals_the_mean_of_gaussians(width):
    samples = torch.randint(0, 256, (7, 1, 3, 3), dtype=torch.uint8)
    test = torch.randint(0, 256, (4, 1, 3, 3), dtype=torch.uint8)
    found = parzen.parzen_bits(samples, test, [0.2, width], torch.device("cpu"))
    window = torch.distributions.Normal(*torch.tensor([0.0, width], dtype=torch.float64))
    apart = (test[:, None].double() - samples[None].double()) / 255
    log_p = window.log_prob(apart).sum((2, 3, 4))
    expected = (log_p.logsumexp(1) - math.log(7)) / math.log(2)
    assert torch.allclose(found[1], expected, rtol=1e-9)


def test_parzen_window_in_parts_is_that_of_the_whole(monkeypatch):
    samples = torch.randint(0, 256, (23, 1, 4, 4), dtype=torch.uint8)
    test = torch.randint(0, 256, (11, 1, 4, 4), dtype=torch.uint8)
    whole = parzen.parzen_bits(samples, test, [0.2], torch.device("cpu"))
    monkeypatch.setattr(parzen, "SAMPLES_AT_A_TIME", 5)
    monkeypatch.setattr(parzen, "IMAGES_AT_A_TIME", 4)
    parts = parzen.parzen_bits(samples, test, [0.2], torch.device("cpu"))
    assert whole.shape == parts.shape == (1, 11)
    assert torch.allclose(whole, parts, rtol=1e-12)


def test_the_bandwidth_is_chosen_on_the_held_out_images():
    """Gaussian images around few samples: the best bandwidth is their spread."""
    samples = torch.full((1, 1, 5, 5), 128, dtype=torch.uint8)
    spread = (128 + 25.5 * torch.randn(300, 1, 5, 5)).round().to(torch.uint8)
    wide = (128 + 51 * torch.randn(300, 1, 5, 5)).clamp(0, 255).round().to(torch.uint8)
    widths, cpu = [0.05, 0.1, 0.2, 0.4], torch.device("cpu")
    assert parzen.log_likelihood(samples, spread, wide, widths, cpu)[0] == 0.1
    assert parzen.log_likelihood(samples, wide, spread, widths, cpu)[0] == 0.2


# Training, sampling, resuming


def train(folder: Path, **changes: object) -> Path:
    """A tiny run on scikit-learn's digits; returns its folder."""
    run = {"output_dir": str(folder), "device": "cpu", "precision": "float32"}
    names = set(RunOptions.__dataclass_fields__)
    run |= {name: changes.pop(name) for name in names & changes.keys()}
    run = {"log_every": 5, "num_previews": 2} | run
    arguments = {
        "dataset": "digits",
        "network": QUICK,
        "num_timesteps": 20,
        "num_training_steps": 4,
        "batch_size": 8,
        "num_samples": 2,
        "num_bound_images": 20,
        "num_warmup_steps": 2,
        **changes,
    }
    train_mnist.main(**arguments, options=RunOptions(**run))
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a tiny run."""
    return train(tmp_path_factory.mktemp("tiny") / "run") / "checkpoint_000004.pt"


def test_a_run_leaves_its_files_and_both_bounds(tiny):
    names = {path.name for path in tiny.parent.iterdir()}
    assert {"samples.png", "reverse.gif", "forward.png", "bound.png", "samples_000004.png"} <= names
    header, row = (tiny.parent / "metrics.csv").read_text().splitlines()
    values = dict(zip(header.split(","), map(float, row.split(",")), strict=True))
    for name in ("train", "test"):
        assert -1 < values[f"k_minus_null_{name}"] < 2.1
        assert 0 < values[f"standard_error_{name}"] < 1
    log = (tiny.parent / "log.txt").read_text()
    for name in ("training", "test"):
        line = next(line for line in log.splitlines() if line.startswith(f"20 {name} images:"))
        words = line.replace(",", "").replace(";", "").split()
        gain, k = float(words[7]), float(words[12])
        assert k == pytest.approx(gain + L_NULL, abs=2e-3)
        assert "± 0." in line


def test_training_raises_the_bound(tmp_path):
    """From 0, that of the forward process. Previews show the averaged network."""
    settings = {"num_training_steps": 150, "batch_size": 32, "log_every": 150, "num_samples": 0}
    train(tmp_path, **settings, learning_rate=3e-3, ema_decay=0.9, checkpoint_every=150)
    header, row = (tmp_path / "metrics.csv").read_text().splitlines()
    values = dict(zip(header.split(","), map(float, row.split(",")), strict=True))
    assert values["k_minus_null_test"] > 0.4
    assert values["k_minus_null_test"] < 0.5 * math.log2(1 / erasing_beta(20)[0].item())
    process, network, content = sample_mnist.load(str(tmp_path / "checkpoint_000150.pt"))
    torch.manual_seed(1)
    samples = process.sample(network, torch.randn(2, 1, 28, 28))
    save_grid(tmp_path / "again.png", sample_mnist.to_images(content, samples))
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "samples_000150.png").read_bytes()


def test_resume_with_learned_rates_is_bit_exact(tmp_path, monkeypatch, capsys):
    settings = {"num_training_steps": 20, "learned_beta": True, "num_samples": 1, "log_every": 10}
    settings |= {"batch_size": 16}
    whole = train(tmp_path / "whole", **settings)
    steps = iter(range(1, 21))
    update = train_mnist.Ema.update_parameters

    def update_and_signal(self, model):
        update(self, model)
        if next(steps) == 10:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train_mnist.Ema, "update_parameters", update_and_signal)
    parts = tmp_path / "parts"
    with pytest.raises(SystemExit) as stopped:
        train(parts, **settings)
    assert stopped.value.code == 128 + signal.SIGTERM
    train(parts, **settings, resume="latest")
    one, other = (checkpoint.load(folder / "checkpoint_000020.pt") for folder in (whole, parts))
    assert equal(one, other)
    assert without_speed(whole / "metrics.csv") == without_speed(parts / "metrics.csv")
    assert (whole / "samples.png").read_bytes() == (parts / "samples.png").read_bytes()
    # The rates moved, are saved, and are what is sampled with.
    shift = one["ema"]["module.process.shift"]
    assert shift.abs().max() > 1e-4
    assert not torch.equal(shift, one["training"]["model"]["process.shift"])
    process, _, _ = sample_mnist.load(str(whole / "checkpoint_000020.pt"))
    assert torch.equal(process.shift, shift)
    assert not torch.allclose(process.beta()[1:], erasing_beta(20)[1:], rtol=1e-5)
    checkpoint.shrink(str(whole / "checkpoint_000020.pt"), str(tmp_path / "small.pt"))
    small, _, _ = sample_mnist.load(str(tmp_path / "small.pt"))
    assert torch.allclose(small.beta(), process.beta(), rtol=1e-3)


def test_what_is_loaded_is_the_average_and_its_data(tiny):
    process, network, content = sample_mnist.load(str(tiny))
    assert not network.training
    assert process.num_timesteps == 20
    average = content["ema"]["module.network.readouts.1.weight"]
    assert torch.equal(network.readouts[1].weight, average)
    norm, shape = sample_mnist.standard_and_shape(content)
    assert norm == standard(mnist.load("digits").train)
    assert shape == (1, 28, 28)


def test_dequantisation_can_be_left_out(tmp_path, monkeypatch):
    """In batches of one; then, with it, on images of three channels."""
    flags = []
    encode = Standard.encode
    monkeypatch.setattr(
        Standard, "encode", lambda self, x, d=True: flags.append(d) or encode(self, x, d)
    )
    train(tmp_path / "without", dequantize=False, num_samples=0, batch_size=1)
    assert flags.count(False) > 4
    assert flags[:4] == [False] * 4
    flags.clear()
    grey = mnist.load("digits")
    colour = mnist.Images(
        "colour",
        grey.train.repeat(1, 3, 1, 1),
        grey.train_labels,
        grey.test.repeat(1, 3, 1, 1),
        grey.test_labels,
    )
    monkeypatch.setattr(mnist, "load", lambda *_: colour)
    train(tmp_path / "with", num_samples=1)
    assert all(flags)
    with Image.open(tmp_path / "with" / "samples.png") as image:
        pixels = torch.from_numpy(np.asarray(image).astype(int))
    assert (pixels[..., 0] != pixels[..., 1]).any()


def sample(file: Path, folder: Path, **flags: object) -> None:
    flags = {"num_samples": 1, "num_images": 2, "num_draws": 3, "dataset": "digits"} | flags
    sample_mnist.main(str(file), device="cpu", output_dir=str(folder), **flags)


def cells(path: Path, columns: int) -> np.ndarray:
    """A grid's images, (rows, columns, 28, 28), each pixel once."""
    pixels = np.asarray(Image.open(path).convert("L"))[::2, ::2][1:, 1:]
    rows = pixels.shape[0] // 29
    return pixels.reshape(rows, 29, columns, 29)[:, :28, :, :28].swapaxes(1, 2)


def test_inpainting_and_denoising_pictures(tiny, tmp_path, capsys):
    sample(tiny, tmp_path, save_npz=True)
    assert np.load(tmp_path / "samples.npz")["samples"].shape == (1, 1, 28, 28)
    sample(tiny, tmp_path, inpaint="top")
    grid = cells(tmp_path / "inpainted.png", 5)
    truth = mnist.load("digits").test[:2, 0].numpy()
    assert (grid[:, 0] == truth).all()
    assert (grid[:, 1, :14] == 128).all()
    for column in (1, 2, 3, 4):  # what is known stands still
        assert (grid[:, column, 14:] == truth[:, 14:]).all()
    assert (grid[:, 2, :14] != grid[:, 3, :14]).any()
    mask = np.zeros((28, 28), np.uint8)
    mask[3:9, 4:20] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    sample(tiny, tmp_path, inpaint=str(tmp_path / "mask.png"))
    grid = cells(tmp_path / "inpainted.png", 5)
    assert (grid[:, 4][:, mask == 0] == truth[:, mask == 0]).all()
    assert (grid[:, 1][:, mask == 255] == 128).all()
    sample(tiny, tmp_path, denoise=0.0)
    grid = cells(tmp_path / "denoised.png", 5)
    assert (grid == truth[:, None]).all()
    sample(tiny, tmp_path, denoise=0.5)
    assert (cells(tmp_path / "denoised.png", 5)[:, 1] != truth).mean() > 0.3


def test_parzen_of_the_script(tiny, tmp_path, capsys):
    flags = {"num_samples": 3, "num_validation": 10, "num_images": 20, "device": "cpu"}
    parzen.main(str(tiny), **flags, output_dir=str(tmp_path))
    first = capsys.readouterr().out
    parzen.main(str(tiny), samples=str(tmp_path / "samples.npz"), **flags)
    assert capsys.readouterr().out == first
    lines = {
        line.split("  ")[1].strip(): line for line in first.splitlines() if "bandwidth" in line
    }
    assert set(lines) == {"samples", "training images"}
    assert "317 ± 2.7" in first
    assert "3 samples" in first


def test_bad_input_gives_one_line(tiny, tmp_path, capsys):
    pictures = {"small": (27, 28), "known": (28, 28), "unknown": (28, 28)}
    for name, size in pictures.items():
        Image.new("L", size, 255 * (name != "known")).save(tmp_path / f"{name}.png")
    (tmp_path / "text.png").write_text("no picture")
    np.savez(tmp_path / "wrong.npz", samples=np.zeros((2, 1, 8, 8), np.uint8))
    flags = ["--output_dir", tmp_path / "out", "--device", "cpu", "--model_checkpoint", tiny]
    digits = ["--dataset", "digits"]
    for script, words, said in [
        (sample_mnist, ["--num_samples", "0"], "num_samples is 0"),
        (sample_mnist, ["--num_draws", "0"], "num_draws is 0"),
        (sample_mnist, ["--denoise", "-0.5"], "denoise is -0.5: it must be at least 0"),
        (sample_mnist, ["--denoise", ".nan"], "denoise is nan"),
        (sample_mnist, ["--denoise", "1", "--inpaint", "left"], "one at a time"),
        (sample_mnist, ["--inpaint", "right"], "take left, top or a PNG"),
        (sample_mnist, ["--inpaint", tmp_path / "text.png"], "text.png cannot be read"),
        (sample_mnist, ["--inpaint", tmp_path / "small.png"], "is 27x28: it must have"),
        (sample_mnist, ["--inpaint", tmp_path / "known.png"], "everything of the image known"),
        (sample_mnist, ["--inpaint", tmp_path / "unknown.png"], "nothing of the image known"),
        (parzen, ["--bandwidths", "0.1", "-1"], "take one or more above 0"),
        (parzen, ["--num_samples", "0"], "num_samples is 0"),
        (parzen, ["--num_validation", "1500", "--num_samples", "1"], "take fewer"),
        (parzen, ["--samples", tmp_path / "none.npz"], "none.npz cannot be read"),
        (parzen, ["--samples", tmp_path / "wrong.npz"], "it must be uint8 (N, 1, 28, 28)"),
    ]:
        extra = digits if script is sample_mnist else []
        assert said in fails(capsys, script.main, *flags, *extra, *words)
    words = [*digits, "--output_dir", tmp_path / "run", "--config", "configs/laptop.yaml"]
    for extra, said in [
        (["--num_timesteps", "1"], "num_timesteps is 1"),
        (["--num_strata", "0"], "0 terms"),
        (["--num_bound_images", "1"], "num_bound_images is 1"),
        (["--learning_rate", "0"], "learning_rate is 0"),
        (["--network.kernel_size", "2"], "kernel_size is 2"),
        (["--network.num_timesteps", "7"], "num_timesteps"),
        (["--batch_size", "0"], "batch_size is 0"),
    ]:
        groups = {"presets": True, "network": ConvDense}
        assert said in fails(capsys, train_mnist.main, *words, *extra, **groups)
    for words, said in [
        (["--noise", "-0.1"], "noise is -0.1"),
        (["--noise", "0.7"], "noise is 0.7"),
        (["--num_timesteps", "1"], "no 1 steps begin with"),
        (["--num_units", "0"], "num_units is 0"),
    ]:
        assert said in fails(capsys, swiss_roll.main, "--output_dir", tmp_path / "out", *words)


def test_presets_are_whole(capsys):
    """Every flag of a preset exists, and its network can be built."""
    for name in ("laptop", "paper"):
        preset = yaml.safe_load((LESSON / "configs" / f"{name}.yaml").read_text())
        ConvDense(**preset.pop("network"))
        names = inspect.signature(train_mnist.main).parameters.keys() | set(
            RunOptions.__dataclass_fields__
        )
        assert preset.keys() <= names


# What can be broken, and the README


def test_breaks_differ_from_the_lesson_by_what_they_say(tiny, tmp_path, capsys):
    process, network, _ = sample_mnist.load(str(tiny))
    torch.nn.init.normal_(network.readouts[-1].weight, std=0.3)
    x0 = torch.randn(3, 1, 28, 28)
    bench = break_it.Bench(process, network, x0, 2, 3, 0)
    whole, mean = break_it.no_noise(bench).values()
    assert mean.std() < whole.std()
    assert torch.equal(mean, break_it.no_noise(bench)["no noise"])
    t, out = torch.tensor([2, 9, 20]), torch.randn(3, 2, 28, 28)
    fixed = bench.broken(break_it.FixedVariance).p_mean_variance(out, x0, t)
    variance = erasing_beta(20)[t - 1].view(3, 1, 1, 1).expand_as(x0)
    assert torch.allclose(fixed.log_var.exp().double(), variance, rtol=1e-5)
    assert torch.equal(fixed.mean, process.p_mean_variance(out, x0, t).mean)
    image, every, late = break_it.late_evidence(bench).values()
    for drawn in (every, late):
        assert torch.equal(drawn[..., 14:], image[..., 14:])
        assert not torch.equal(drawn[..., :14], image[..., :14])
    assert torch.equal(late[..., :14], whole[..., :14])
    break_it.main(model_checkpoint=str(tiny), num_samples=1, num_images=2, output_dir=str(tmp_path))
    assert {path.stem for path in tmp_path.glob("*.png")} == {
        f"broken_{name}" for name in break_it.BREAKS
    }


TINY = {
    "train_mnist.py": "--dataset digits --network.dense_channels 8 --num_samples 1 --device cpu "
    "--num_training_steps 2 --num_timesteps 20 --batch_size 4 --num_previews 1 "
    "--num_bound_images 2",
    "sample_mnist.py": "--dataset digits --num_samples 1 --num_images 1 --num_draws 1 --device cpu",
    "swiss_roll.py": "--num_timesteps 5 --num_units 4 --num_training_steps 2 --num_points 9 "
    "--num_bound_points 9 --device cpu",
    "parzen.py": "--num_samples 2 --num_validation 3 --num_images 4 --device cpu",
    "break_it.py": "--num_samples 1 --num_images 2 --device cpu",
}


@pytest.mark.parametrize("line", scripts(LESSON / "README.md"))
def test_every_command_of_the_readme_runs(line, tiny, tmp_path, monkeypatch, capsys):
    words = shlex.split(line)[1:]
    words += [*shlex.split(TINY[words[0]]), "--output_dir", str(tmp_path / "run")]
    if words[0] in ("sample_mnist.py", "parzen.py", "break_it.py"):
        words += ["--model_checkpoint", str(tiny)]
    monkeypatch.chdir(LESSON)
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(words[0], run_name="__main__")
    assert any((tmp_path / "run").iterdir())


def test_the_readme_shows_the_gap_of_the_posterior():
    text = (LESSON / "README.md").read_text()
    assert "| the true posterior | 0.5 | 0.5 |" in text
    assert "| the perturbed process, $T = 1000$ | 0.667 | 0.333 |" in text


def test_the_shipped_network_keeps_its_word(real_mnist):
    """On its first test images it reaches the bar, and completes a digit."""
    process, network, content = sample_mnist.load(sample_mnist.SHIPPED)
    norm, _ = sample_mnist.standard_and_shape(content)
    levels = real_mnist.test[:16].float() / 127.5 - 1
    with torch.no_grad():
        bits = process.bound(network, norm.encode(levels), 24).total
    assert bits.mean().item() - 3 * bits.std().item() / 4 > 3.4
    assert bits.mean().item() < process.ceiling(1).item()
