"""What the README derives: the weights of the bound, the ODE and its marginals, what η does."""

import math

from lesson_05.ddpm import DDPM, linear_beta
from lesson_06.ddim import ddim_encode, ddim_sample, ddim_sigma, ddim_step, ddim_timesteps
from lesson_09.iddpm import ImprovedDDPM

import pytest
import torch
from torch import Tensor
from two_points import TwoPoints

PAIRS = [(1000, 999), (1000, 980), (500, 300), (101, 1), (2, 1)]


def bars(process: DDPM, t: int, s: int) -> tuple[float, float]:
    return process.alpha_bar[t].item(), process.alpha_bar[s].item()


@pytest.mark.parametrize(("t", "s"), PAIRS)
def test_the_weights_of_the_bound_are_the_derived_ones(process, t, s):
    """γ_t from the means of two steps; with η = 1 it is the weight of lesson 5's bound."""
    bar_t, bar_s = bars(process, t, s)
    xt, eps, eps_hat = torch.randn(3, 1, 1, 4, 4, dtype=torch.float64)
    for eta in (0.2, 1.0):
        sigma, means = ddim_sigma(bar_t, bar_s, eta), []
        for noise in (eps, eps_hat):
            torch.manual_seed(0)
            means.append(ddim_step(xt, noise, bar_t, bar_s, eta))  # the same z in both
        divergence = (means[0] - means[1]).square().sum() / (2 * sigma**2)
        factor = math.sqrt(1 - bar_s - sigma**2) - math.sqrt(bar_s / bar_t * (1 - bar_t))
        gamma = factor**2 / (2 * sigma**2)
        assert gamma > 0
        torch.testing.assert_close(divergence, gamma * (eps - eps_hat).square().sum())
    alpha, beta = bar_t / bar_s, 1 - bar_t / bar_s
    assert gamma == pytest.approx(beta**2 / (2 * sigma**2 * alpha * (1 - bar_t)))


@pytest.mark.parametrize(("t", "s"), PAIRS)
def test_the_forward_process_depends_on_the_image_unless_eta_is_one(process, t, s):
    """The coefficient of x0 in E[xt | xs, x0]: a Markov chain has none."""
    bar_t, bar_s = bars(process, t, s)
    for eta in (0.0, 0.5, 1.0):
        k = math.sqrt(1 - bar_s - ddim_sigma(bar_t, bar_s, eta) ** 2)  # cov(xt, xs | x0) = b k
        slope = math.sqrt(1 - bar_t) * k / (1 - bar_s)
        of_x0 = math.sqrt(bar_t) - slope * math.sqrt(bar_s)
        assert (abs(of_x0) < 1e-9) == (eta == 1.0)


def test_the_noise_estimate_is_the_score(process):
    """ε̂ = -√(1-ᾱ_t) ∇ log q(xt), with the density written out."""
    m, s = 0.6, 0.2
    for t in (1, 100, 500, 1000):
        bar = process.alpha_bar[t].item()
        xt = torch.linspace(-2, 2, 41, dtype=torch.float64).view(-1, 1, 1, 1).requires_grad_()
        deviation = math.sqrt(bar * s**2 + 1 - bar)
        parts = [
            torch.distributions.Normal(sign * math.sqrt(bar) * m, deviation).log_prob(xt)
            for sign in (-1, 1)
        ]
        (score,) = torch.autograd.grad(torch.logaddexp(*parts).sum(), xt)
        eps_hat = TwoPoints(process, m, s)(xt, torch.full((len(xt),), t))
        torch.testing.assert_close(eps_hat, -math.sqrt(1 - bar) * score)


def test_a_step_of_ddim_is_a_step_of_eulers_method(process):
    """y_s = y_t + (ρ_s - ρ_t) ε̂, with y = x/√ᾱ and ρ = √(1-ᾱ)/√ᾱ."""
    xt, eps_hat = torch.randn(2, 1, 1, 4, 4, dtype=torch.float64)
    for t, s in [*PAIRS, (1, 0), (300, 500)]:
        bar_t, bar_s = bars(process, t, s)
        rho_t, rho_s = (math.sqrt((1 - bar) / bar) for bar in (bar_t, bar_s))
        ys = xt / math.sqrt(bar_t) + (rho_s - rho_t) * eps_hat
        assert math.sqrt(1 + rho_s**2) == pytest.approx(1 / math.sqrt(bar_s))
        torch.testing.assert_close(
            ddim_step(xt, eps_hat, bar_t, bar_s), ys / math.sqrt(1 + rho_s**2)
        )


def test_short_steps_keep_the_marginals(process):
    """Both peaks of the data, their width and their weights, though x̂0 is far from both peaks at
    large t. One long step gives the mean of the data instead."""
    model = TwoPoints(process, 0.6, 0.2)
    x_T = torch.randn(20_000, 1, 1, 1, dtype=torch.float64)
    distances = []
    for num_steps in (1, 10, 200):
        x0 = ddim_sample(model, process, x_T, num_steps, spacing="trailing").flatten()
        data = torch.distributions.Normal(0.6, 0.2)
        sorted_x0 = x0.sort().values
        cdf = (data.cdf(sorted_x0) + data.cdf(sorted_x0 + 1.2)) / 2
        distances.append((cdf - torch.linspace(0, 1, len(x0))).abs().max().item())
    assert distances[0] > 0.4
    assert distances[0] > 2 * distances[1] > 4 * distances[2]
    assert distances[2] < 0.02


def test_new_noise_forgets_an_error_that_eta_zero_keeps(process):
    """For data N(0, 1), an error in x_T; with the same new noise in both runs."""
    model, errors = TwoPoints(process, 0.0, 1.0), []
    x_T, delta = torch.randn(2, 1, 1, 4, 4, dtype=torch.float64)
    for eta in (0.0, 1.0):
        images = []
        for start in (x_T, x_T + delta):
            torch.manual_seed(1)
            images.append(ddim_sample(model, process, start, 1000, eta))
        errors.append(((images[1] - images[0]) / delta).mean().item())
    assert errors[0] == pytest.approx(1, abs=0.005)
    assert errors[1] == pytest.approx(math.sqrt(process.alpha_bar[1000]), rel=1e-6)
    assert errors[1] == pytest.approx(0.006, abs=5e-4)


def test_sigma_hat_leaves_far_more_noise_than_the_last_evaluation_expects(process):
    for num_steps, sigma_hat in [(10, 0.32), (50, 0.079)]:
        s, t = ddim_timesteps(1000, num_steps)[:2]
        bar_t, bar_s = bars(process, t, s)
        xt, eps_hat = torch.zeros(2, 1, 1, 200, 200)
        xs = ddim_step(xt, eps_hat, bar_t, bar_s, 1.0, sigma_hat=True)
        assert s == 1
        assert xs.std().item() == pytest.approx(sigma_hat, rel=0.02)
        assert math.sqrt(1 - bar_s) == pytest.approx(0.01)


def test_eta_one_takes_the_steps_of_a_strided_process():
    """Lesson 9's process of few steps, with the variance β̃."""
    process = ImprovedDDPM(linear_beta(1000), "beta_tilde", 1.0, 0.0)
    strided = process.strided(7)
    xt, eps_hat = torch.randn(2, 1, 1, 4, 4)
    for i in range(2, 8):
        bar_t, bar_s = strided.alpha_bar[[i, i - 1]].tolist()
        torch.manual_seed(i)
        theirs = strided.p_sample(lambda xt, t: eps_hat, xt, i, clip_x0=False)
        torch.manual_seed(i)
        ours = ddim_step(xt, eps_hat, bar_t, bar_s, 1.0)
        scale = float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("num_steps", [10, 1000])
def test_a_constant_pixel_is_encoded_into_almost_no_noise(process, num_steps):
    """A pixel that is -1 in all data has an ε̂ of almost 0, while one of N(0, 1) stays N(0, 1)."""

    def model(xt: Tensor, t: Tensor) -> Tensor:
        bar = process.alpha_bar[t].view(-1, 1, 1, 1)
        constant = (xt + bar.sqrt()) / (1 - bar).sqrt()
        return torch.where(torch.arange(2) == 0, constant, (1 - bar).sqrt() * xt)

    x0 = torch.randn(5000, 1, 1, 2, dtype=torch.float64)
    x0[..., 0] = -1
    encoded = ddim_encode(model, process, x0, num_steps, "trailing")
    assert encoded[..., 0].std() < 1e-9
    assert encoded[0, ..., 0].item() == pytest.approx(-0.011, abs=1e-3)
    if num_steps == 1000:
        assert encoded[..., 1].std().item() == pytest.approx(1, abs=0.05)
