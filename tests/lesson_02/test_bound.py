"""Lesson 2's bound against closed forms, for Gaussian data and the exact network."""

import math

from common.errors import UserError
from lesson_02.dpm import DPM, L_NULL, draw_times, erasing_beta, k_minus_null, kl, strata

import pytest
import torch
from helpers_02 import GaussianOracle, zero


def closed_form(process: DPM, oracle: GaussianOracle) -> float:
    """-H(X1) - KL(q(xT) || π), in bits a value."""
    T = process.num_timesteps
    (_, var_1), (mean, var) = oracle.moments(1), oracle.moments(T)
    entropy = 0.5 * math.log2(2 * math.pi * math.e * var_1)
    return -entropy - 0.5 * (var + mean**2 - 1 - math.log(var)) / math.log(2)


@pytest.mark.parametrize(("m", "s", "channels"), [(0.6, 0.8, 1), (0.995, 0.1, 3)])
def test_perfect_network_reaches_the_closed_form_of_the_bound(m, s, channels):
    """For data of mean square 1, m² + s² = 1, as the bound assumes."""
    process = DPM(erasing_beta(60))
    oracle = GaussianOracle(process, m, s)
    x0 = m + s * torch.randn(40, channels, 30, 30)
    bound = process.bits_per_dim(oracle, x0)
    k = k_minus_null(bound.total, channels) + channels * L_NULL
    expected = channels * closed_form(process, oracle)
    tolerance = 5 * k.std().item() / math.sqrt(40) + 1e-4
    assert tolerance < 0.03 * channels
    assert k.mean().item() == pytest.approx(expected, abs=tolerance)
    assert bound.terms.shape == bound.t.shape == (40, 59)
    assert torch.allclose(bound.total, -k / channels)
    total = bound.terms.sum(1) - L_NULL - process.ceiling()
    assert torch.allclose(bound.total, total, atol=1e-5)


def test_estimate_of_the_bound_is_unbiased_with_its_standard_error():
    process = DPM(erasing_beta(200))
    oracle = GaussianOracle(process, 0.8, 0.6)
    x0 = 0.8 + 0.6 * torch.randn(1500, 1, 4, 4)
    few, full = (process.bits_per_dim(oracle, x0, n) for n in (12, None))
    assert few.terms.shape == (1500, 12)
    error = math.hypot(few.total.std().item(), full.total.std().item()) / math.sqrt(1500)
    assert error < 0.05
    assert few.total.mean().item() == pytest.approx(full.total.mean().item(), abs=4 * error)


@pytest.mark.parametrize("T", [100, 1000])
def test_unit_data_and_a_perfect_network_give_l_null(T):
    process = DPM(erasing_beta(T))
    x0 = torch.randn(8, 1, 40, 40)
    bits = process.bits_per_dim(GaussianOracle(process), x0, 40).total
    tolerance = 5 * bits.std().item() / math.sqrt(8) + 1e-4
    assert bits.mean().item() == pytest.approx(-L_NULL, abs=tolerance)
    assert k_minus_null(bits.mean().item(), 1) == pytest.approx(0, abs=tolerance)
    out = GaussianOracle(process)(x0[:2], torch.tensor([2, T]))
    assert out.abs().max() < 2e-4  # for unit data the output of the perfect network is 0
    assert pytest.approx(-0.5 * math.log2(2 * math.pi * math.e)) == L_NULL


@pytest.mark.parametrize(("T", "parts"), [(2, 1), (3, 1), (40, 39), (1000, 32), (1000, None)])
def test_strata_cover_all_of_2_to_T(T, parts):
    edges = strata(T, parts)
    assert (edges[0], edges[-1]) == (2, T + 1)
    assert len(edges) == (T if parts is None else parts + 1)
    lengths = torch.tensor(edges).diff()
    assert lengths.min() >= 1
    if T == 1000 and parts:
        assert lengths[-1] > 100 > lengths[0] == 1
    for bad in (0, T):
        with pytest.raises(UserError, match=f"{bad} strata"):
            strata(T, bad)


@pytest.mark.parametrize("parts", [1, 7, 39])
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_drawn_times_and_their_weights_sum_over_t(parts, batch_size):
    """E[weight f(t)] = Σ_t f(t), for any number of parts and any batch."""
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


def test_loss_is_the_bound_estimated_from_one_t():
    """Bits per dimension: T - 1 times the divergence at t, minus the ceiling."""
    process = DPM(erasing_beta(30))
    x0, eps, t = torch.randn(3, 2, 5, 5), torch.randn(3, 2, 5, 5), torch.tensor([2, 9, 30])
    xt = process.q_sample(x0, t, eps)
    p = process.p_mean_variance(zero(xt, t), xt, t)
    bits = kl(process.q_posterior(x0, xt, t), p).sum((1, 2, 3)) / 50 / math.log(2)
    assert torch.allclose(process.vlb_term(zero, x0, t, eps), bits, atol=1e-6)
    bar = (1 - erasing_beta(30)).prod().item()
    ceiling = 0.5 * math.log2((1 - bar) / erasing_beta(30)[0].item())
    losses = process.loss(zero, x0, t, eps)
    assert torch.allclose(losses, 29 * bits - ceiling, atol=1e-4)
    alone = process.loss(zero, x0[1:2], t[1:2], eps[1:2])  # a batch of one
    assert torch.allclose(alone, losses[1:2], atol=1e-5)


def test_mean_loss_over_all_t_is_l_null_minus_k():
    process = DPM(erasing_beta(12))
    x0 = torch.randn(1, 3, 8, 8).expand(11, -1, -1, -1)
    t, eps = torch.arange(2, 13), torch.randn(11, 3, 8, 8)
    loss = process.loss(zero, x0, t, eps).mean()
    total = process.vlb_term(zero, x0, t, eps).sum() - L_NULL - process.ceiling()
    assert -3 * loss.item() == pytest.approx(k_minus_null(total.item(), 3), abs=1e-4)


def price_of_gaussians(T: int, points: int = 400) -> torch.Tensor:
    """KL(q(x_{t-1} | xt) || the Gaussian with its moments) in bits, t = 2..T, for x0 = -1 or 1."""
    beta = erasing_beta(T)
    bar = torch.cat([torch.ones(1), (1 - beta).cumprod(0)])
    prices = []
    for t in range(2, T + 1):
        noise, step = 1 - bar[t], (1 - bar[t - 1]) / (1 - bar[t]) * beta[t - 1]
        pull = bar[t - 1].sqrt() * beta[t - 1] / noise  # the step's means are xt's part ± pull
        z = torch.linspace(-8, 8, points, dtype=torch.float64)
        xt, weight = bar[t].sqrt() + noise.sqrt() * z, torch.softmax(-(z**2) / 2, 0)
        plus = torch.sigmoid(2 * bar[t].sqrt() * xt / noise)[:, None]
        x = torch.linspace(-1, 1, points, dtype=torch.float64) * (pull + 9 * step.sqrt())
        near, far = (torch.exp(-((x - c) ** 2) / (2 * step)) for c in (pull, -pull))
        density = (plus * near + (1 - plus) * far) / (2 * math.pi * step).sqrt()
        entropy = -torch.special.xlogy(density, density).sum(1) * (x[1] - x[0])
        var = step + pull**2 * 4 * (plus * (1 - plus))[:, 0]
        gauss = 0.5 * (2 * math.pi * math.e * var).log()
        prices.append((weight * (gauss - entropy)).sum() / math.log(2))
    return torch.stack(prices)


def test_smaller_gaussian_steps_cost_less():
    """The README's table: what it costs that steps are Gaussian, and that the longest, with
    β_T = 1/2, costs almost nothing."""
    for T, total, last in [(10, 0.072, 3e-5), (30, 0.017, 5e-7), (100, 0.0022, 5e-9)]:
        prices = price_of_gaussians(T)
        assert prices.sum().item() == pytest.approx(total, rel=0.03)
        assert prices[-1].item() == pytest.approx(last, rel=0.15)
        assert prices[-1] < prices.mean() / 100
        assert erasing_beta(T)[-1].item() == pytest.approx(0.5, abs=1e-4)
