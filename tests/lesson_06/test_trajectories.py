"""Whole DDIM trajectories, where the exact result is known."""

import math
from itertools import pairwise

from lesson_05.ddpm import DDPM, linear_beta
from lesson_05.text_to_image.text import tokenize
from lesson_06.ddim import (
    ddim_encode,
    ddim_encode_trajectory,
    ddim_sample,
    ddim_timesteps,
)
from lesson_09.iddpm import ImprovedDDPM, cosine_beta, strided_timesteps

import pytest
import torch
from small_networks import perturb, small_prompted
from torch import Tensor
from two_points import TwoPoints

SPACINGS = ("uniform", "quadratic", "trailing")


@pytest.mark.parametrize("spacing", SPACINGS)
def test_with_the_true_noise_eta_zero_returns_the_image(process, spacing):
    x0 = torch.rand(2, 3, 4, 4, dtype=torch.float64) * 2 - 1

    def true_noise(xt: Tensor, t: Tensor) -> Tensor:
        bar = process.alpha_bar[t].view(-1, 1, 1, 1)
        return (xt - bar.sqrt() * x0) / (1 - bar).sqrt()

    x_T = torch.randn_like(x0)
    for num_steps in (1, 7, 50):
        sampled = ddim_sample(true_noise, process, x_T, num_steps, spacing=spacing)
        torch.testing.assert_close(sampled, x0, atol=1e-9, rtol=0)
        clipped = ddim_sample(true_noise, process, x_T, num_steps, spacing=spacing, clip_x0=True)
        torch.testing.assert_close(clipped, x0, atol=1e-9, rtol=0)


def recursion(process: DDPM, s: float, times: list[int], eta: float) -> list[tuple[float, float]]:
    """For data N(0, s²), from the conditional means of x0 and ε given xt: the factor and deviation
    of each step x_s = factor x_t + deviation z."""
    steps = []
    for earlier, t in reversed(list(pairwise([0, *times]))):
        bar_t, bar_s = process.alpha_bar[[t, earlier]].tolist()
        total = bar_t * s**2 + 1 - bar_t
        x0_gain, eps_gain = math.sqrt(bar_t) * s**2 / total, math.sqrt(1 - bar_t) / total
        new = eta**2 * (1 - bar_s) * (1 - bar_t / bar_s) / (1 - bar_t)
        factor = math.sqrt(bar_s) * x0_gain + math.sqrt(max(1 - bar_s - new, 0)) * eps_gain
        steps.append((factor, math.sqrt(new)))
    return steps


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_samples_of_a_gaussian_follow_the_exact_affine_recursion(process, eta, monkeypatch):
    for s in (0.3, 1.0):
        model, errors = TwoPoints(process, 0.0, s), []
        for num_steps in (10, 50, 1000):
            steps = recursion(process, s, ddim_timesteps(1000, num_steps), eta)
            noise = torch.randn(num_steps + 1, 2, 1, 4, 4, dtype=torch.float64)
            draws = iter(noise[1:])
            monkeypatch.setattr(torch, "randn_like", lambda x, draws=draws: next(draws))
            samples = ddim_sample(model, process, noise[0], num_steps, eta)
            exact, variance = noise[0], 1.0
            for (factor, deviation), z in zip(steps, noise[1:], strict=True):
                exact = factor * exact + deviation * z
                variance = factor**2 * variance + deviation**2
            torch.testing.assert_close(samples, exact, atol=1e-9, rtol=1e-9)
            errors.append(abs(math.log(variance / s**2)))
            if s == 1.0 and eta == 0.0:
                ratio = {10: 0.69, 50: 0.93, 1000: 0.996}[num_steps]
                assert variance == pytest.approx(ratio, abs=5e-3)
        assert errors[0] > 1.5 * errors[1] > 1.5**2 * errors[2]


def test_the_error_of_encoding_and_decoding_falls_with_the_steps(process):
    model = TwoPoints(process, 0.6, 0.2)
    x0 = 0.6 * torch.randn(4, 1, 4, 4, dtype=torch.float64).sign() + 0.2 * torch.randn(4, 1, 4, 4)
    for spacing in SPACINGS:
        errors = []
        for num_steps in (10, 50, 250, 1000):
            x_T = ddim_encode(model, process, x0, num_steps, spacing)
            decoded = ddim_sample(model, process, x_T, num_steps, spacing=spacing)
            errors.append((decoded - x0).abs().mean().item())
        assert all(late < 0.6 * early for early, late in pairwise(errors)), (spacing, errors)
        assert errors[-1] < 0.01
        assert x_T.std().item() == pytest.approx(1, abs=0.35)  # it is noise


def test_encoding_ends_at_the_last_of_the_times_and_begins_at_t_one(process):
    evaluated = []

    def model(xt: Tensor, t: Tensor) -> Tensor:
        evaluated.append(t[0].item())
        return 0.1 * xt

    x0 = torch.randn(2, 1, 2, 2)
    trajectory = list(ddim_encode_trajectory(model, process, x0, 4, "trailing"))
    assert [t for t, _ in trajectory] == [250, 500, 750, 1000]
    assert evaluated == [1, 250, 500, 750]
    assert torch.equal(trajectory[-1][1], ddim_encode(model, process, x0, 4, "trailing"))


def test_samples_from_the_same_noise_agree_for_every_S(process):
    """With η = 0, and the better the more steps [Song21 Section 5.2]."""
    model, x_T = TwoPoints(process, 0.6, 0.2), torch.randn(8, 1, 4, 4, dtype=torch.float64)
    best = ddim_sample(model, process, x_T, 1000)
    gaps = [
        (ddim_sample(model, process, x_T, S) - best).square().mean().item() for S in (10, 50, 200)
    ]
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[1] < 0.1 * best.var().item()
    noisy = ddim_sample(model, process, x_T, 50, eta=1.0)
    assert (noisy - best).square().mean() > 10 * gaps[1]


def test_each_sample_follows_its_own_prompt():
    """Two prompts give two images from the same noise; permuting them permutes the images."""
    model, process = perturb(small_prompted()), DDPM(linear_beta(60))
    tokens, order = tokenize(["3", "seven", "a handwritten 0"]), torch.tensor([2, 0, 1])
    x_T = torch.randn(1, 1, 28, 28).expand(3, -1, -1, -1)
    images = ddim_sample(model.bind(tokens), process, x_T, 5)
    assert (images[0] - images[1]).abs().mean() > 1e-3
    permuted = ddim_sample(model.bind(tokens[order]), process, x_T, 5)
    torch.testing.assert_close(permuted, images[order], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("num_steps", [1, 2, 10, 200])
def test_from_pure_noise_the_images_stay_within_their_range(num_steps):
    """On the cosine schedule Eq. 9 at T multiplies the error of ε̂ by 20,291."""
    cosine = ImprovedDDPM(cosine_beta(1000))
    exact = TwoPoints(cosine, 0.6, 0.2)

    def network(xt: Tensor, t: Tensor) -> Tensor:  # as in training: v beside ε̂, and an error
        return torch.cat([exact(xt, t) + 0.1 * torch.randn_like(xt), xt], 1)

    x_T = torch.randn(8, 1, 4, 4)
    images = ddim_sample(network, cosine, x_T, num_steps, spacing="trailing")
    assert images.abs().max() <= 1.1
    unclipped = ddim_sample(network, cosine, x_T, num_steps, spacing="trailing", clip_x0=False)
    assert unclipped.abs().max() > 10
    linear = DDPM(linear_beta(1000))  # there x̂0 is not clipped unless asked for
    exact = TwoPoints(linear, 0.6, 0.2)
    default, unclipped = (
        ddim_sample(exact, linear, x_T, num_steps, spacing="trailing", clip_x0=clip_x0)
        for clip_x0 in (None, False)
    )
    assert torch.equal(default, unclipped)


def test_the_network_of_a_strided_process_gets_its_own_times():
    process = ImprovedDDPM(cosine_beta(1000)).strided(7)
    told = []

    def network(xt: Tensor, t: Tensor) -> Tensor:
        told.extend(t.unique().tolist())
        return 0.1 * xt

    x0 = torch.randn(2, 1, 2, 2)
    ddim_sample(network, process, x0, 7)
    assert told == strided_timesteps(1000, 7).tolist()[::-1]
    told.clear()
    ddim_encode(network, process, x0, 7)
    assert (
        told == strided_timesteps(1000, 7).tolist()[:1] + strided_timesteps(1000, 7).tolist()[:-1]
    )
