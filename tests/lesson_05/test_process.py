"""Lesson 5's process against closed forms: the paper's equations where they can be solved."""

import math
from itertools import pairwise

from common.errors import UserError
from lesson_05.ddpm import (
    DDPM,
    Gaussian,
    discretized_log_likelihood,
    kl,
    linear_beta,
    log_ndtr,
    preview,
    strata,
)

import pytest
import torch
from torch import Tensor

T = 1000
LN2 = math.log(2)


class GaussianOracle:
    """The exact E[ε | xt] for data whose pixels are N(m, s²)."""

    def __init__(self, process: DDPM, m: float, s: float) -> None:
        self.bar, self.m, self.s = process.alpha_bar, m, s

    def factors(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """ε̂ = gain xt + offset, in float64."""
        bar = self.bar[t]
        gain = (1 - bar).sqrt() / (bar * self.s**2 + 1 - bar)
        return gain, -gain * bar.sqrt() * self.m

    def __call__(self, xt: Tensor, t: Tensor) -> Tensor:
        gain, offset = self.factors(t)
        shape = (-1, 1, 1, 1)
        return (gain.view(shape) * xt.double() + offset.view(shape)).float()


def affine_step(process: DDPM, oracle: GaussianOracle, t: int) -> tuple[float, float, float]:
    """x_{t-1} = a xt + b + σ z, from the paper's Eq. 11 in float64."""
    bar, bar_prev = process.alpha_bar[t].item(), process.alpha_bar[t - 1].item()
    beta = 1 - bar / bar_prev
    gain, offset = (value.item() for value in oracle.factors(torch.tensor(t)))
    scale = beta / math.sqrt(1 - bar)
    a = (1 - scale * gain) / math.sqrt(1 - beta)
    b = -scale * offset / math.sqrt(1 - beta)
    sigma = math.exp(0.5 * process.log_var[t].item()) if t > 1 else 0.0
    return a, b, sigma


@pytest.mark.parametrize(
    ("variance", "s", "ratio"), [("beta_tilde", 0.5, 0.985), ("beta", 0.1, 1.015)]
)
def test_sampler_follows_the_exact_affine_recursion(variance, s, ratio, monkeypatch):
    process = DDPM(linear_beta(T), variance)
    oracle = GaussianOracle(process, m=0.3, s=s)
    noise = torch.randn(T + 1, 4000)
    draws = iter(noise[1:])
    monkeypatch.setattr(torch, "randn_like", lambda x: next(draws).view(x.shape))
    samples = process.sample(oracle, noise[0].view(1000, 1, 2, 2), clip_x0=False)

    exact, mean, var = noise[0].double(), 0.0, 1.0
    for k, t in enumerate(range(T, 0, -1)):
        a, b, sigma = affine_step(process, oracle, t)
        z = noise[k + 1] if t > 1 else 0.0
        exact, mean, var = a * exact + b + sigma * z, a * mean + b, a**2 * var + sigma**2
    assert torch.allclose(samples.flatten().double(), exact, atol=2e-4)
    # The recursion's moments are the known ones, and the samples have them.
    assert var / s**2 == pytest.approx(ratio, abs=2e-3)
    assert samples.mean().item() == pytest.approx(mean, abs=5 * s / math.sqrt(4000))
    assert samples.var().item() == pytest.approx(var, rel=5 * math.sqrt(2 / 4000))


def test_bound_terms_equal_the_closed_form_kl():
    s, m, size = 0.5, 0.2, 64
    process = DDPM(linear_beta(T), "beta")
    oracle = GaussianOracle(process, m, s)
    x0 = m + s * torch.randn(size, 1, 32, 32)
    for t in (2, 10, 300, 999, 1000):
        bar, bar_prev = process.alpha_bar[t].item(), process.alpha_bar[t - 1].item()
        beta = 1 - bar / bar_prev
        beta_tilde = (1 - bar_prev) / (1 - bar) * beta
        error = s**2 * (1 - bar) / (bar * s**2 + 1 - bar)  # of the best estimate of x0
        weight = math.sqrt(bar_prev) * beta / (1 - bar)
        ratio = (beta_tilde + weight**2 * error) / beta
        expected = 0.5 * (math.log(beta / beta_tilde) + ratio - 1) / LN2
        eps = torch.randn_like(x0)
        terms = process.vlb_term(oracle, x0, torch.full((size,), t), eps)
        tolerance = 5 * terms.std().item() / math.sqrt(size) + 1e-6
        assert terms.mean().item() == pytest.approx(expected, abs=tolerance)


def test_prior_equals_torch_distributions():
    process = DDPM(linear_beta(T)[:200])  # so short that the prior is large
    x0 = torch.rand(4, 3, 8, 8) * 2 - 1
    bar = process.alpha_bar[-1]
    q = torch.distributions.Normal(bar.sqrt() * x0.double(), (1 - bar).sqrt())
    expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0))
    expected = expected.flatten(1).mean(1) / LN2
    assert torch.allclose(process.prior_bits(x0).double(), expected, rtol=1e-5, atol=1e-6)


def test_estimate_of_the_bound_is_unbiased_with_its_standard_error():
    process = DDPM(linear_beta(100), "beta_tilde")
    oracle = GaussianOracle(process, 0.0, 0.5)
    levels = (0.5 * torch.randn(400, 1, 4, 4)).clamp(-1, 1)
    x0 = (levels * 127.5).round() / 127.5
    full = process.bits_per_dim(oracle, x0)
    quick = process.bits_per_dim(oracle, x0, num_terms=7)
    assert full.terms.shape == full.t.shape == (400, 100)
    assert torch.equal(full.t[0], torch.arange(1, 101))
    assert torch.allclose(full.total, full.prior + full.terms.sum(1), atol=1e-4)
    assert quick.terms.shape == (400, 7)
    assert (quick.t[:, 0] == 1).all()
    errors = [bound.total.std() / math.sqrt(400) for bound in (full, quick)]
    gap = (full.total.mean() - quick.total.mean()).abs()
    assert gap < 4 * math.hypot(*errors)
    # Without the weights (the length of each part) the estimate would be wrong.
    assert (full.total.mean() - quick.terms.sum(1).mean()).abs() > 10 * errors[1]


@pytest.mark.parametrize(("steps", "terms"), [(10, 10), (10, 4), (1000, 33), (2, 2), (1, None)])
def test_strata_divide_1_to_T(steps, terms):
    edges = strata(steps, terms)
    assert edges[0] == 1
    assert edges[-1] == steps + 1
    assert len(edges) == (terms or steps) + 1
    assert all(first < last for first, last in pairwise(edges))


def test_posterior_equals_bayes_on_a_grid():
    process = DDPM(linear_beta(T))
    grid = torch.linspace(-3, 3, 200_001, dtype=torch.float64)
    for t, x0, xt in [(2, 0.3, 0.31), (50, -0.5, 0.2), (700, 0.9, -0.4), (1000, 0.1, 1.0)]:
        bar_prev, bar = process.alpha_bar[t - 1], process.alpha_bar[t]
        alpha = bar / bar_prev
        prior = torch.distributions.Normal(bar_prev.sqrt() * x0, (1 - bar_prev).sqrt())
        step = torch.distributions.Normal(alpha.sqrt() * grid, (1 - alpha).sqrt())
        weight = (prior.log_prob(grid) + step.log_prob(torch.tensor(xt))).softmax(0)
        mean = (weight * grid).sum()
        var = (weight * (grid - mean) ** 2).sum()
        image = torch.ones(1, 1, 1, 1)
        q = process.q_posterior(x0 * image, xt * image, torch.tensor([t]))
        assert q.mean.item() == pytest.approx(mean.item(), abs=1e-6)
        assert q.log_var.exp().item() == pytest.approx(var.item(), rel=1e-3)


def test_q_sample_equals_the_forward_steps_one_by_one():
    """Eq. 4 is Eq. 2 iterated: means multiply, variances add up."""
    process = DDPM(linear_beta(50))
    signal, var = 1.0, 0.0
    for t in range(1, 51):
        beta = (1 - process.alpha_bar[t] / process.alpha_bar[t - 1]).item()
        signal, var = math.sqrt(1 - beta) * signal, (1 - beta) * var + beta
        assert process.signal_rate[t].item() == pytest.approx(signal, rel=1e-6)
        assert process.noise_rate[t].item() == pytest.approx(math.sqrt(var), rel=1e-6)


def test_kl_equals_torch_distributions():
    p, q = (Gaussian(torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)) for _ in range(2))
    normal = [torch.distributions.Normal(g.mean, torch.exp(0.5 * g.log_var)) for g in (p, q)]
    assert torch.allclose(kl(p, q), torch.distributions.kl_divergence(*normal), atol=1e-5)


def test_log_ndtr_and_its_gradient_are_exact_far_out():
    """Against float64. The gradient of log Φ is φ/Φ. Far above 0 both are nearly 0."""
    for x, relative, absolute in [
        (-torch.logspace(-6, 4, 4001), 1e-6, 0.0),
        (torch.linspace(0, 12, 1001), 2e-6, 1e-7),
    ]:
        exact = x.double()
        (gradient,) = torch.autograd.grad(log_ndtr(x.requires_grad_()).sum(), x)
        log_cdf = torch.special.log_ndtr(exact)
        ratio = torch.exp(-(exact**2) / 2 - log_cdf) / math.sqrt(2 * math.pi)
        far = math.sqrt(2 / math.pi) / torch.special.erfcx(-exact / math.sqrt(2))
        slope = torch.where(exact < 0, far, ratio)
        for one, other in [(log_ndtr(x).detach(), log_cdf), (gradient, slope)]:
            assert ((one - other).abs() <= relative * other.abs() + absolute).all()


@pytest.mark.parametrize("log_var", [-14.0, -9.8, -4.0, 0.0])
@pytest.mark.parametrize("mean", [-1.3, -1.0, -0.2, 0.5013, 1.0])
def test_discretized_likelihood_sums_to_one(mean, log_var):
    levels = (torch.arange(256.0) * 2 / 255 - 1).view(256, 1, 1, 1)
    p = Gaussian(torch.full_like(levels, mean), torch.full_like(levels, log_var))
    log_mass = discretized_log_likelihood(levels, p)
    assert not log_mass.isnan().any()
    assert log_mass.exp().sum().item() == pytest.approx(1, abs=1e-4)


def test_discretized_likelihood_is_exact_in_the_tails_and_has_gradients():
    from scipy.stats import norm

    mean = torch.zeros(1, 1, 1, 3, requires_grad=True)
    x = torch.tensor([[[[-0.6, 0.2, 0.8]]]]).mul(127.5).sub(0.5).round().add(0.5) / 127.5
    sigma = 0.05
    log_p = discretized_log_likelihood(x, Gaussian(mean, torch.full_like(x, 2 * math.log(sigma))))
    low, high = (x.abs().double() + side / 255 for side in (-1, 1))
    left, right = norm.logsf(low / sigma), norm.logsf(high / sigma)
    expected = torch.as_tensor(left) + torch.log(-torch.expm1(torch.as_tensor(right - left)))
    assert torch.allclose(log_p.double(), expected, rtol=1e-3)
    log_p.sum().backward()
    assert mean.grad.isfinite().all()


@pytest.mark.parametrize("log_var", [-9.8, 0.0, 6.0, 14.0, 40.0])
def test_discretized_likelihood_is_exact_where_the_levels_are_narrow(log_var):
    """Against float64; the gradient against finite differences."""
    from scipy.stats import norm

    sigma = math.exp(log_var / 2)
    x = torch.tensor([[[[-0.6, 0.2, 0.8]]]]).mul(127.5).sub(0.5).round().add(0.5) / 127.5
    wide = torch.full_like(x, log_var, requires_grad=True)
    mean = x + sigma * torch.tensor([0.3, -1.2, 2.0]) * min(1, 0.05 / sigma)
    log_p = discretized_log_likelihood(x, Gaussian(mean, wide))
    log_p.sum().backward()

    def exact(log_var: float) -> Tensor:
        z = (x - mean).double() / math.exp(log_var / 2)
        half = 1 / 255 / math.exp(log_var / 2)
        inside = torch.as_tensor(norm.cdf(z + half) - norm.cdf(z - half))
        if half > 1e-3:
            return inside.log()
        return torch.as_tensor(norm.logpdf(z)) + math.log(2 * half)

    assert torch.allclose(log_p.double(), exact(log_var), atol=2e-5, rtol=2e-5)
    slope = (exact(log_var + 1e-4) - exact(log_var - 1e-4)) / 2e-4
    assert torch.allclose(wide.grad.double(), slope, atol=1e-3, rtol=1e-3)


def test_tables_are_built_in_float64():
    """From float32 betas they would be off by 1.6e-4 and more near t = 2."""
    process = DDPM(linear_beta(T))
    beta = [0.0] + [1e-4 + k * (0.02 - 1e-4) / 999 for k in range(1000)]
    bar = [1.0]
    for t in range(1, T + 1):
        bar.append(bar[-1] * (1 - beta[t]))
    assert bar[T] == pytest.approx(4.04e-5, rel=2e-3)
    for t in (2, 3, 4, 500, 1000):
        tilde = (1 - bar[t - 1]) / (1 - bar[t]) * beta[t]
        weight = math.sqrt(bar[t - 1]) * beta[t] / (1 - bar[t])
        assert process.posterior_x0_coef[t].item() == pytest.approx(weight, rel=1e-6)
        assert process.posterior_log_var[t].item() == pytest.approx(math.log(tilde), rel=2e-7)
    assert process.posterior_log_var[2].item() == pytest.approx(-9.82, abs=5e-3)


def test_last_reverse_step_has_a_finite_variance_and_no_noise():
    for variance in ("beta", "beta_tilde"):
        process = DDPM(linear_beta(T), variance)
        assert process.log_var[1] == process.posterior_log_var[1] == process.posterior_log_var[2]
        oracle = GaussianOracle(process, 0.0, 1.0)
        x = torch.randn(2, 1, 4, 4)
        assert torch.equal(process.p_sample(oracle, x, 1), process.p_sample(oracle, x, 1))
        assert not torch.equal(process.p_sample(oracle, x, 2), process.p_sample(oracle, x, 2))
    assert process.log_var[500] < DDPM(linear_beta(T), "beta").log_var[500]


def test_mean_equals_equation_11():
    process = DDPM(linear_beta(T))
    xt, eps = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    for t in (2, 500, 1000):
        bar = process.alpha_bar[t]
        beta = 1 - bar / process.alpha_bar[t - 1]
        expected = (xt - beta / (1 - bar).sqrt() * eps) / (1 - beta).sqrt()
        p = process.p_mean_variance(eps, xt, torch.tensor([t, t]), clip_x0=False)
        assert torch.allclose(p.mean, expected.float(), atol=1e-4)
        clipped = process.p_mean_variance(eps, xt, torch.tensor([t, t])).mean
        x0_hat = process.predict_x0(xt, torch.tensor([t, t]), eps).clamp(-1, 1)
        assert torch.equal(clipped, process.q_posterior(x0_hat, xt, torch.tensor([t, t])).mean)


def test_predict_x0_inverts_q_sample():
    process = DDPM(linear_beta(T))
    x0, eps, t = torch.randn(5, 3, 4, 4), torch.randn(5, 3, 4, 4), torch.tensor([1, 2, 9, 99, 400])
    assert torch.allclose(process.predict_x0(process.q_sample(x0, t, eps), t, eps), x0, atol=1e-4)


@pytest.mark.parametrize("prediction", ["eps", "x0", "mean"])
def test_the_predictions_are_the_same_network_in_other_words(prediction):
    """From the output that belongs to one ε̂ all give the same x̂0, mean, bound and sample; with
    its own target as the output the loss is 0."""
    plain, t = DDPM(linear_beta(T)), torch.tensor([1, 2, 9, 400, 999])
    process = DDPM(linear_beta(T), prediction=prediction)
    x0, eps = torch.randn(2, 5, 1, 4, 4)

    def plain_network(xt: Tensor, t: Tensor) -> Tensor:
        return torch.sin(3 * xt)

    def network(xt: Tensor, t: Tensor) -> Tensor:
        x0_hat = plain.predict_x0(xt, t, plain_network(xt, t))
        mean = plain.q_posterior(x0_hat, xt, t).mean
        return {"eps": plain_network(xt, t), "x0": x0_hat, "mean": mean}[prediction]

    for clip_x0 in (True, False):
        one, other = (
            p.vlb_term(n, x0, t, eps, clip_x0)
            for p, n in ((plain, plain_network), (process, network))
        )
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    for step in (2, 500):
        xt = torch.randn(2, 1, 4, 4)
        samples = []
        for p, n in ((plain, plain_network), (process, network)):
            torch.manual_seed(0)
            samples.append(p.p_sample(n, xt, step))
        torch.testing.assert_close(*samples, rtol=1e-4, atol=1e-4)
    mean = process.q_posterior(x0, process.q_sample(x0, t, eps), t).mean
    target = {"eps": eps, "x0": x0, "mean": mean}[prediction]
    assert torch.equal(process.loss(lambda xt, t: target, x0, t, eps), torch.zeros(5))
    off = process.loss(lambda xt, t: target + 0.5, x0, t, eps)
    torch.testing.assert_close(off, torch.full((5,), 0.25))
    vlb = DDPM(linear_beta(T), "beta", prediction, "vlb").loss(network, x0, t, eps)
    assert torch.equal(vlb, T * process.vlb_term(network, x0, t, eps))


def test_unknown_kinds_of_process_are_refused():
    for kind in (("both",), ("beta", "v"), ("beta", "eps", "hybrid")):
        with pytest.raises(UserError, match=f"'{kind[-1]}' is not known"):
            DDPM(linear_beta(T), *kind)


def test_loss_of_a_network_that_predicts_zero_is_one():
    process = DDPM(linear_beta(T))
    x0, t = torch.zeros(64, 1, 28, 28), torch.randint(1, T + 1, (64,))
    losses = process.loss(lambda xt, t: torch.zeros_like(xt), x0, t, torch.randn_like(x0))
    assert losses.shape == (64,)
    assert losses.mean().item() == pytest.approx(1, abs=5 * math.sqrt(2 / x0.numel()))


def test_loss_of_the_true_noise_is_zero_and_the_network_gets_t():
    process = DDPM(linear_beta(T))
    x0, eps, t = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4), torch.tensor([1, 7, 1000])

    def network(xt, t_input):
        assert torch.equal(t_input, t)
        assert torch.allclose(xt, process.q_sample(x0, t, eps))
        return eps

    assert (process.loss(network, x0, t, eps) == 0).all()


def test_preview_in_all_steps_equals_the_sampler(monkeypatch):
    """With every step taken the preview is Algorithm 2 with β̃."""
    process = DDPM(linear_beta(60), "beta_tilde")
    oracle = GaussianOracle(process, 0.1, 0.3)
    x_T = torch.randn(8, 1, 4, 4)
    noise = torch.randn(60, 8, 1, 4, 4)
    results = []
    for sampler in (lambda: preview(process, oracle, x_T, 60), lambda: process.sample(oracle, x_T)):
        draws = iter(noise)
        monkeypatch.setattr(torch, "randn_like", lambda x, draws=draws: next(draws))
        results.append(sampler())
    assert torch.allclose(*results, atol=1e-4)


def test_schedule_scales_with_T():
    assert torch.allclose(linear_beta(4000)[[0, -1]], torch.tensor([0.25e-4, 0.005]).double())
    assert linear_beta(4000).dtype == torch.float64
    for bad in [(0, 1e-4, 0.02), (20, 1e-4, 0.02), (1000, 0.0, 0.02), (1000, 0.03, 0.02)]:
        with pytest.raises(UserError):
            linear_beta(*bad)
