"""Lesson 2's process against closed forms: schedule, forward process, posterior, learned rates."""

import math

from common.errors import UserError
from lesson_02.dpm import DPM, Gaussian, bumps, draw_times, erasing_beta, kl, strata

import pytest
import torch
from helpers_02 import zero


@pytest.mark.parametrize(("T", "beta_1"), [(100, 0.01099), (500, 0.00300), (1000, 0.00200)])
def test_first_beta_of_the_reference_code(T, beta_1):
    beta = erasing_beta(T)
    assert beta.shape == (T,)
    assert beta[0].item() == pytest.approx(beta_1, abs=5e-6)
    assert beta[-1].item() == pytest.approx(0.5, abs=1e-5)
    assert DPM(beta).ceiling().item() == pytest.approx(0.5 * math.log2(1 / beta_1), abs=0.01)


def test_every_step_erases_the_same_fraction_of_the_variance():
    bar = torch.cat([torch.ones(1), (1 - erasing_beta(1000)).cumprod(0)])
    erased = -bar.diff()[1:]
    assert erased.mean().item() == pytest.approx(1e-3, rel=0.01)
    assert erased.std() < 0.01 * erased.mean()
    with pytest.raises(UserError, match="num_timesteps is 1"):
        erasing_beta(1)


@pytest.mark.parametrize("T", [2, 40, 1000])
def test_bumps_sum_to_one_at_every_t(T):
    g = bumps(T)
    assert g.shape == (T + 1, 10)
    assert torch.allclose(g.sum(1), torch.ones(T + 1))
    if T == 1000:  # each is the largest at its own centre
        assert g[torch.linspace(1, T, 10).round().long()].argmax(1).tolist() == list(range(10))
        assert g[1, 0] > 0.85


def test_log_bumps_are_even_in_log_t_and_t_together():
    T = 1000
    g, place = (
        bumps(T, log_bumps=True),
        [math.log(t) / math.log(T) + t / T for t in range(1, T + 1)],
    )
    assert torch.allclose(g.sum(1), torch.ones(T + 1))
    step = (place[-1] - place[0]) / 9
    for t in (1, 2, 20, 400, 1000):
        distance = [(place[t - 1] - place[0]) / step - j for j in range(10)]
        weight = torch.tensor([math.exp(-2 * d**2) for d in distance])
        assert torch.allclose(g[t], weight / weight.sum(), atol=1e-6)
    assert g[:200].argmax(1).unique().tolist() == [0, 1, 2, 3, 4]


def test_bumps_need_two_times():
    with pytest.raises(UserError, match="num_timesteps is 1: it must be at least 2"):
        bumps(1)


def test_q_sample_equals_the_forward_steps_one_by_one():
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


@pytest.mark.parametrize("b", [-3e38, -1e6, 1e6, 3e38])
def test_bound_and_gradient_are_finite_for_any_b(b):
    process, t = DPM(erasing_beta(100)), torch.tensor([2, 3, 50, 100])
    x0, eps = torch.randn(2, len(t), 1, 4, 4)
    out = torch.cat([torch.zeros_like(x0), torch.full_like(x0, b)], 1).requires_grad_()
    term = process.vlb_term(lambda xt, t: out, x0, t, eps)
    term.sum().backward()
    assert term.isfinite().all()
    assert out.grad.isfinite().all()


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


def test_learned_rates_have_the_derivatives_of_the_bound():
    """With frozen noise, compared with finite differences. β_1 stays fixed."""
    torch.manual_seed(1)
    process = DPM(erasing_beta(30), learned=True)
    x0, eps = torch.randn(64, 1, 4, 4).sign(), torch.randn(64, 1, 4, 4)
    t, weight = draw_times(64, strata(30), torch.device("cpu"))

    def network(xt, t):  # close to optimal for data of two points, ±1, as no linear one is
        return torch.cat([0.5 * (torch.tanh(2 * xt) - xt), -torch.ones_like(xt)], 1)

    def loss():
        return (weight * process.vlb_term(network, x0, t, eps) - process.ceiling()).double().mean()

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
    fixed = DPM(beta.detach())
    assert torch.allclose(fixed.rates().posterior_x0_coef, process.rates().posterior_x0_coef)


def test_only_learned_rates_are_parameters_and_they_start_at_the_fixed_ones():
    beta = erasing_beta(50)
    fixed, learned = DPM(beta), DPM(beta, learned=True)
    assert list(fixed.parameters()) == []
    assert fixed.state_dict() == {}
    assert set(learned.state_dict()) == {"shift"}
    for one, other in zip(fixed.rates(), learned.rates(), strict=True):
        assert torch.allclose(one, other, rtol=1e-5)
    assert torch.allclose(learned.beta(), beta)


def test_loss_can_be_differentiated_with_respect_to_learned_rates():
    process = DPM(erasing_beta(30), learned=True)
    x0, eps, t = torch.randn(4, 1, 4, 4), torch.randn(4, 1, 4, 4), torch.tensor([2, 9, 20, 30])
    process.loss(zero, x0, t, eps).mean().backward()
    assert process.shift.grad.isfinite().all()
    assert process.shift.grad.any()


def test_device_is_where_the_tables_are():
    process = DPM(erasing_beta(5), learned=True)
    assert process.device == torch.device("cpu")
    assert process.to("meta").device == torch.device("meta")
