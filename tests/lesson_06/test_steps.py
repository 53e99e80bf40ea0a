"""DDIM: the times of its steps, and one step, against the paper's equations."""

import math

from common.errors import UserError
from lesson_05.ddpm import DDPM, linear_beta
from lesson_06.ddim import (
    ddim_sample,
    ddim_sigma,
    ddim_step,
    ddim_timesteps,
    ddim_trajectory,
    predict_noise,
    slerp,
)

import numpy as np
import pytest
import torch
from torch import Tensor

SPACINGS = ("uniform", "quadratic", "trailing")


@pytest.mark.parametrize("spacing", SPACINGS)
def test_there_are_exactly_S_distinct_times(spacing):
    for T, steps in [(60, range(1, 61)), (1000, [1, 2, 7, 50, 300, 334, 501, 999, 1000])]:
        for S in steps:
            times = ddim_timesteps(T, S, spacing)
            assert len(times) == len(set(times)) == S
            assert times == sorted(times)
            assert times[0] >= 1
            assert times[-1] <= T
            assert times != [1] or T == 1  # one step starts from noise
    assert ddim_timesteps(1000, 1000, spacing) == list(range(1, 1001))


def test_the_times_are_those_of_the_authors_code():
    assert ddim_timesteps(1000, 50) == list(range(1, 1000, 20))
    assert ddim_timesteps(1000, 300)[:3] == [1, 4, 7]
    assert ddim_timesteps(1000, 10, "trailing") == list(range(100, 1001, 100))
    for S in (10, 20, 50, 100):
        authors = (np.linspace(0, np.sqrt(1000 * 0.8), S) ** 2).astype(int) + 1
        ours = ddim_timesteps(1000, S, "quadratic")
        first = 0 if S < 50 else 15  # before it theirs has repeated times, which ours moves up
        assert ours[first:] == authors[first:].tolist()
        assert all(0 <= our - their <= 8 for our, their in zip(ours, authors, strict=True))
    with pytest.raises(UserError, match="spacing 'linear' is not known"):
        ddim_timesteps(1000, 10, "linear")


@pytest.mark.parametrize("num_steps", [0, -1, 1001])
def test_impossible_numbers_of_steps_are_refused(num_steps):
    for spacing in SPACINGS:
        with pytest.raises(UserError, match=rf"num_steps is {num_steps}: choose 1 to 1000"):
            ddim_timesteps(1000, num_steps, spacing)


@pytest.mark.parametrize("eta", [-1.0, 2.0, float("nan")])
def test_impossible_eta_is_refused(process, eta):
    with pytest.raises(UserError, match="eta is"):
        ddim_sample(lambda xt, t: xt, process, torch.randn(1, 1, 2, 2), 2, eta)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_steps", [1, 7, 50, 300, 1000])
def test_the_network_is_evaluated_at_these_times_and_the_last_step_gives_x0_hat(
    process, spacing, num_steps
):
    evaluated = []

    def model(xt: Tensor, t: Tensor) -> Tensor:
        assert (t == t[0]).all()
        evaluated.append(t[0].item())
        return 0.1 * xt

    x_T = torch.randn(2, 1, 2, 2)
    trajectory = list(ddim_trajectory(model, process, x_T, num_steps, spacing=spacing))
    times = ddim_timesteps(1000, num_steps, spacing)
    assert evaluated == times[::-1]
    assert [s for s, _ in trajectory] == [*times[:-1][::-1], 0]
    x0 = trajectory[-1][1]
    assert torch.equal(x0, ddim_sample(model, process, x_T, num_steps, spacing=spacing))
    xt = trajectory[-2][1] if num_steps > 1 else x_T
    bar = process.alpha_bar[times[0]].item()
    x0_hat = (xt - math.sqrt(1 - bar) * 0.1 * xt) / math.sqrt(bar)
    torch.testing.assert_close(x0, x0_hat)


def test_the_predicted_variance_of_a_network_is_ignored(process):
    xt = torch.randn(2, 3, 4, 4)

    def with_variance(xt: Tensor, t: Tensor) -> Tensor:
        return torch.cat([2 * xt, t.view(-1, 1, 1, 1) + xt], 1)

    assert torch.equal(predict_noise(with_variance, process, xt, 7), 2 * xt)
    eps_hat = predict_noise(lambda xt, t: t.view(-1, 1, 1, 1) * xt, process, xt, 7)
    assert torch.equal(eps_hat, 7 * xt)


@pytest.mark.parametrize("prediction", ["x0", "mean"])
def test_networks_that_predict_the_image_or_the_mean_are_sampled_alike(process, prediction):
    other = DDPM(linear_beta(1000), prediction=prediction)
    x_T = torch.randn(2, 1, 4, 4)

    def network(xt: Tensor, t: Tensor) -> Tensor:
        x0_hat = process.predict_x0(xt, t, 0.9 * xt)
        return x0_hat if prediction == "x0" else process.q_posterior(x0_hat, xt, t).mean

    expected = ddim_sample(lambda xt, t: 0.9 * xt, process, x_T, 20)
    torch.testing.assert_close(ddim_sample(network, other, x_T, 20), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("t", [1, 2, 3, 50, 500, 1000])
def test_eta_one_over_adjacent_steps_is_ddpm(process, t):
    """With β̃ and the same noise; at t = 1 both add none."""
    xt, eps_hat = torch.randn(2, 3, 1, 8, 8)
    bars = process.alpha_bar[[t, t - 1]].tolist()
    torch.manual_seed(t)
    ddpm = process.p_sample(lambda xt, t: eps_hat, xt, t, clip_x0=False)
    torch.manual_seed(t)
    ddim = ddim_step(xt, eps_hat, *bars, eta=1.0)
    torch.testing.assert_close(ddim, ddpm, rtol=1e-5, atol=1e-5 * float(ddpm.abs().max()))
    if t > 1:
        without_noise = ddim_step(xt, eps_hat, *bars)
        assert (without_noise - ddpm).abs().max() > 10 * (ddim - ddpm).abs().max()


def test_a_step_keeps_the_marginal_distribution(process):
    """With the true x0 and noise, xs has mean √ᾱ_s x0 and variance 1 - ᾱ_s for every η
    [Song21 Lemma 1]."""
    x0, eps = 0.7, torch.randn(200_000, dtype=torch.float64)
    bar_t, bar_s = process.alpha_bar[[500, 300]].tolist()
    xt = math.sqrt(bar_t) * x0 + math.sqrt(1 - bar_t) * eps
    for eta in (0.0, 0.3, 1.0):
        xs = ddim_step(xt, eps, bar_t, bar_s, eta)
        assert xs.mean().item() == pytest.approx(math.sqrt(bar_s) * x0, abs=0.01)
        assert xs.var().item() == pytest.approx(1 - bar_s, rel=0.02)


def test_sigma_hat_is_the_noise_of_the_larger_variance(process):
    bar_t, bar_s = process.alpha_bar[[500, 300]].tolist()
    xt, eps_hat = torch.randn(2, 1, 1, 300, 300)
    mean = math.sqrt(bar_s) * (xt - math.sqrt(1 - bar_t) * eps_hat) / math.sqrt(bar_t)
    mean += math.sqrt(1 - bar_s - ddim_sigma(bar_t, bar_s, 1.0) ** 2) * eps_hat
    noise = ddim_step(xt, eps_hat, bar_t, bar_s, 1.0, sigma_hat=True) - mean
    assert noise.std().item() == pytest.approx(math.sqrt(1 - bar_t / bar_s), rel=0.01)
    assert ddim_sigma(bar_t, bar_s, 1.0) < math.sqrt(1 - bar_t / bar_s)
    last = [ddim_step(xt, eps_hat, bar_t, 1.0, 1.0, sigma_hat=hat) for hat in (True, False)]
    assert torch.equal(*last)  # without noise
    with pytest.raises(UserError, match="sigma_hat"):
        ddim_step(xt, eps_hat, bar_t, bar_s, 0.5, sigma_hat=True)


def test_slerp_keeps_the_length_of_noise():
    x, y = torch.randn(2, 3, 1, 28, 28)
    assert torch.allclose(slerp(x, y, 0.0), x, atol=1e-6)
    assert torch.allclose(slerp(x, y, 1.0), y, atol=1e-6)
    middle = slerp(x, y, 0.5)
    for i in range(3):  # as long as the ends, where the straight line is 0.7 times as long
        assert middle[i].norm() / x[i].norm() == pytest.approx(1, abs=0.06)
        assert (x[i] + y[i]).norm() / 2 / x[i].norm() == pytest.approx(math.sqrt(0.5), abs=0.06)
    a, b = torch.zeros(2, 1, 1, 1, 2)
    a[..., 0], b[..., 1] = 1.0, 1.0
    third = torch.tensor([math.cos(math.pi / 6), math.sin(math.pi / 6)])
    assert torch.allclose(slerp(a, b, 1 / 3).flatten(), third, atol=1e-6)
    assert torch.allclose(slerp(x, x, 0.3), x, atol=1e-6)
    assert slerp(x, -x, 0.5).isfinite().all()
