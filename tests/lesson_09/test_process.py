"""Lesson 9's process against closed forms, exact expectations and the authors' times."""

import math
from itertools import pairwise

from common.errors import UserError
from lesson_09.iddpm import (
    Gaussian,
    ImprovedDDPM,
    cosine_beta,
    discretized_log_likelihood,
    linear_beta,
    named_beta,
    strided_timesteps,
)

import pytest
import torch
from torch import Tensor

T = 1000
LN2 = math.log(2)


def exact_variances(process: ImprovedDDPM) -> tuple[Tensor, Tensor, Tensor]:
    """β_t, β̃_t and the coefficient of x0 in the posterior mean, float64 (T+1,), from ᾱ alone."""
    bar = process.alpha_bar
    bar_prev = torch.cat([bar[:1], bar[:-1]])
    beta = 1 - bar / bar_prev
    noise_var = (1 - bar).clamp(min=1e-300)
    return beta, (1 - bar_prev) / noise_var * beta, bar_prev.sqrt() * beta / noise_var


# Schedules


def test_cosine_schedule_has_the_constants_of_the_paper():
    beta = cosine_beta(T)
    assert beta.dtype == torch.float64
    assert beta.shape == (T,)
    assert (beta == 0.999).sum() == 1
    assert beta[-1] == 0.999
    assert beta[0].item() == pytest.approx(4.13e-5, rel=2e-3)
    process = ImprovedDDPM(beta)
    assert process.alpha_bar[T].item() == pytest.approx(2.43e-9, rel=2e-3)
    assert process.posterior_log_var[2].item() == pytest.approx(-10.73, abs=5e-3)

    def f(t: int) -> float:
        return math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (1, 2, 500, 999):
        assert process.alpha_bar[t].item() == pytest.approx(f(t) / f(0), rel=1e-10)
        assert process.signal_rate[t].item() == pytest.approx(math.sqrt(f(t) / f(0)), rel=1e-6)


def test_schedules_scale_with_T_and_refuse_impossible_arguments():
    assert torch.allclose(linear_beta(4000)[[0, -1]], torch.tensor([0.25e-4, 0.005]).double())
    for steps in (100, 4000):  # the same ᾱ at the same t/T
        bar, reference = (ImprovedDDPM(cosine_beta(n)).alpha_bar for n in (steps, T))
        assert bar[steps // 4].item() == pytest.approx(reference[T // 4].item(), rel=1e-10)
    for bad in [(0, 0.008, 0.999), (10, -1.0, 0.999), (10, 0.008, 1.0)]:
        with pytest.raises(UserError):
            cosine_beta(*bad)
    with pytest.raises(UserError, match="linear or cosine"):
        named_beta("quadratic", T)
    with pytest.raises(UserError, match="variance"):
        ImprovedDDPM(cosine_beta(10), "both")
    for weights in [(0.0, 0.0), (-1.0, 1.0), (1.0, -1e-3)]:
        with pytest.raises(UserError, match="vlb_weight"):
            ImprovedDDPM(cosine_beta(10), "learned", *weights)


# The learned variance


@pytest.mark.parametrize("beta", [linear_beta(T), cosine_beta(T)], ids=["linear", "cosine"])
def test_v_interpolates_between_the_two_variances_at_every_t(beta):
    process = ImprovedDDPM(beta)
    exact, tilde, _ = exact_variances(process)
    t = torch.arange(1, T + 1)
    xt = torch.randn(T, 3, 1, 1)
    low, high = tilde[1:].clone(), exact[1:]
    low[0] = tilde[2]  # β̃_1 = 0 has no logarithm; the upper end is β_1 itself
    for v, expected in [
        (-1.0, low.log()),
        (1.0, high.log()),
        (0.0, (low.log() + high.log()) / 2),
        (3.0, 2 * high.log() - low.log()),  # the paper does not bound v
    ]:
        out = torch.cat([torch.randn_like(xt), torch.full_like(xt, v)], 1)
        log_var = process.p_mean_variance(out, xt, t).log_var
        assert log_var.shape == xt.shape
        assert torch.allclose(log_var[:, 1, 0, 0].double(), expected, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("beta", [linear_beta(T), cosine_beta(T)], ids=["linear", "cosine"])
@pytest.mark.parametrize("v", [-3e38, -1e4, -75.0, 75.0, 1e4, 3e38])
def test_loss_and_gradient_are_finite_for_any_v(beta, v):
    process = ImprovedDDPM(beta, simple_weight=0.0, vlb_weight=1.0)
    t = torch.tensor([1, 2, 3, 500, T - 1, T])
    x0, eps = torch.randn(2, len(t), 1, 8, 8).clamp(-1, 1)
    x0[:, :, :4] = -1.0
    out = torch.cat([0.9 * eps, torch.full_like(eps, v)], 1).requires_grad_()
    loss = process.loss(lambda xt, t: out, x0, t, eps)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert out.grad.isfinite().all()


def test_fixed_variances_ignore_v_and_replace_the_first_by_the_second():
    for variance in ("beta", "beta_tilde"):
        process = ImprovedDDPM(linear_beta(T), variance)
        exact, tilde, _ = exact_variances(process)
        for t in (1, 2, 700):
            wanted = tilde[max(t, 2)] if variance == "beta_tilde" or t == 1 else exact[t]
            xt, out = torch.randn(1, 1, 2, 2), torch.randn(1, 2, 2, 2)
            p = process.p_mean_variance(out, xt, torch.tensor([t]))
            assert torch.allclose(p.log_var.double(), wanted.log(), atol=1e-6)
            without_v = process.p_mean_variance(out[:, :1], xt, torch.tensor([t]))
            assert torch.equal(p.mean, without_v.mean)
    with pytest.raises(ValueError, match="unpack"):  # learned, but the network has no v
        ImprovedDDPM(linear_beta(T)).p_mean_variance(out[:, :1], xt, torch.tensor([5]))


def test_mean_equals_equation_13():
    process = ImprovedDDPM(cosine_beta(T))
    xt, out = torch.randn(2, 3, 4, 4), torch.randn(2, 6, 4, 4)
    for t in (2, 500, 990):
        bar = process.alpha_bar[t]
        beta = 1 - bar / process.alpha_bar[t - 1]
        expected = (xt - beta / (1 - bar).sqrt() * out[:, :3]) / (1 - beta).sqrt()
        p = process.p_mean_variance(out, xt, torch.tensor([t, t]), clip_x0=False)
        assert torch.allclose(p.mean, expected.float(), atol=1e-4)


def test_last_reverse_step_adds_no_noise():
    process = ImprovedDDPM(cosine_beta(T))
    x = torch.randn(2, 1, 4, 4)

    def network(xt: Tensor, t: Tensor) -> Tensor:
        return torch.zeros(2, 2, 4, 4)

    assert torch.equal(process.p_sample(network, x, 1), process.p_sample(network, x, 1))
    assert not torch.equal(process.p_sample(network, x, 2), process.p_sample(network, x, 2))


# The loss


def gradients(process: ImprovedDDPM, term: int, t: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of absolute gradients of a term of the loss, (B,), at ε̂ and at v."""
    torch.manual_seed(1)
    x0 = (torch.rand(len(t), 3, 4, 4) * 255).round() / 127.5 - 1
    out = torch.randn(len(t), 6, 4, 4, requires_grad=True)
    process.loss_terms(lambda xt, t: out, x0, t, torch.randn_like(x0))[term].sum().backward()
    eps, v = out.grad.abs().flatten(2).sum(2).chunk(2, dim=1)
    return eps.sum(1), v.sum(1)


def test_in_the_hybrid_loss_the_bound_trains_the_variance_alone():
    t = torch.tensor([1, 2, 3, 50, 500, 999, 1000])
    for weights in [(1.0, 1e-3), (0.01, 1.0)]:
        hybrid = ImprovedDDPM(cosine_beta(T), "learned", *weights)
        eps, v = gradients(hybrid, 1, t)
        assert (eps == 0).all()
        assert (v > 0).all()
        eps, v = gradients(hybrid, 0, t)
        assert (eps > 0).all()
        assert (v == 0).all()
    for vlb_weight in (1.0, 1e-3):
        eps, v = gradients(ImprovedDDPM(cosine_beta(T), "learned", 0.0, vlb_weight), 1, t)
        assert (eps > 0).all()
        assert (v > 0).all()
        assert eps.isfinite().all()


def test_lambda_multiplies_the_sum_over_t():
    """The mean over t of T times the term at t is the whole sum. With 1e-3 times the term alone
    the bound would weigh T times less."""
    steps = 40
    beta = linear_beta(steps)
    network = GaussianNetwork(ImprovedDDPM(beta), 0.1, 0.5)
    x0 = (torch.rand(1, 1, 4, 4) * 255).round() / 127.5 - 1
    t, eps = torch.arange(1, steps + 1), torch.randn(steps, 1, 4, 4)
    images = x0.expand(steps, -1, -1, -1)
    terms = ImprovedDDPM(beta).vlb_term(network, images, t, eps)
    losses = ImprovedDDPM(beta, "learned", 0.0, 1.0).loss(network, images, t, eps)
    assert losses.mean().item() == pytest.approx(terms.sum().item(), rel=1e-5)
    draws = iter(eps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda x: next(draws)[None])
        bits = ImprovedDDPM(beta).bits_per_dim(network, x0)
    assert (bits.total - bits.prior).item() == pytest.approx(losses.mean().item(), rel=1e-5)

    process = ImprovedDDPM(beta, "learned", 1.0, 1e-3)
    simple, vlb = process.loss_terms(network, images, t, eps)
    assert torch.allclose(vlb, terms)
    expected = simple + 1e-3 * steps * vlb
    assert torch.allclose(process.loss(network, images, t, eps), expected)
    baseline = ImprovedDDPM(beta, "beta", 1.0, 0.0)
    assert torch.allclose(baseline.loss(network, images, t, eps), simple)


def test_term_at_t_1_is_the_decoder():
    process = ImprovedDDPM(cosine_beta(T))
    x0 = (torch.rand(3, 1, 4, 4) * 255).round() / 127.5 - 1
    xt, t = torch.randn(3, 1, 4, 4), torch.tensor([1, 7, 1])
    p = Gaussian(0.1 * torch.randn_like(x0), torch.full_like(x0, -5.0))
    bits = process.term_bits(p, x0, xt, t)
    log_likelihood = discretized_log_likelihood(x0, p).flatten(1).mean(1) / LN2
    assert torch.allclose(bits[[0, 2]], -log_likelihood[[0, 2]])
    assert not torch.allclose(bits[1], -log_likelihood[1])


# Closed forms


class GaussianNetwork:
    """The best network for data whose pixels are N(m, s²): the exact E[ε | xt], and the v of the
    true variance of x_{t-1} given xt."""

    def __init__(self, process: ImprovedDDPM, m: float, s: float) -> None:
        self.bar, self.m, self.s = process.alpha_bar, m, s
        beta, tilde, coef = exact_variances(process)
        error = s**2 * (1 - self.bar) / (self.bar * s**2 + 1 - self.bar)
        self.var = tilde + coef**2 * error
        low = tilde.clone()
        low[:2] = tilde[2]
        self.v = 2 * (self.var.log() - low.log()) / (beta.log() - low.log()) - 1

    def __call__(self, xt: Tensor, t: Tensor) -> Tensor:
        bar = self.bar[t].view(-1, 1, 1, 1)
        gain = (1 - bar).sqrt() / (bar * self.s**2 + 1 - bar)
        eps = gain * (xt.double() - bar.sqrt() * self.m)
        return torch.cat([eps, self.v[t].view(-1, 1, 1, 1).expand_as(eps)], 1).float()


@pytest.mark.parametrize("beta", [linear_beta(T), cosine_beta(T)], ids=["linear", "cosine"])
def test_bound_with_the_true_variance_equals_the_closed_form(beta):
    """E KL(q || p) = ½ [log(σ²/β̃) + σ*²/σ² - 1] for a p with the true mean and variance σ². It is
    least at the true variance σ*²: ½ log(σ*²/β̃)."""
    m, s, size = 0.2, 0.5, 64
    network = GaussianNetwork(ImprovedDDPM(beta), m, s)
    exact, tilde, _ = exact_variances(ImprovedDDPM(beta))
    x0 = m + s * torch.randn(size, 1, 32, 32)
    for t in (2, 3, 10, 300, 800):
        eps, times, bits = torch.randn_like(x0), torch.full((size,), t), {}
        for variance, var in [("learned", network.var), ("beta", exact), ("beta_tilde", tilde)]:
            log_ratio, ratio = math.log(var[t] / tilde[t]), (network.var[t] / var[t]).item()
            bits[variance] = 0.5 * (log_ratio + ratio - 1) / LN2
            terms = ImprovedDDPM(beta, variance).vlb_term(network, x0, times, eps)
            tolerance = 5 * terms.std().item() / math.sqrt(size) + 1e-6
            assert terms.mean().item() == pytest.approx(bits[variance], abs=tolerance)
        assert bits["learned"] < min(bits["beta"], bits["beta_tilde"])
        assert bits["learned"] == pytest.approx(0.5 * math.log(network.var[t] / tilde[t]) / LN2)


class MixtureNetwork:
    """The best network for single pixels from 0.7 N(-½, 0.1²) + 0.3 N(½, 0.1²)."""

    weights = torch.tensor([0.7, 0.3], dtype=torch.float64)
    centres = torch.tensor([-0.5, 0.5], dtype=torch.float64)
    s = 0.1

    def __init__(self, process: ImprovedDDPM) -> None:
        self.bar = process.alpha_bar
        self.beta, self.tilde, self.coef = exact_variances(process)
        self.times: set[int] = set()  # at which it was evaluated

    def __call__(self, xt: Tensor, t: Tensor) -> Tensor:
        time = int(t[0])
        self.times.add(time)
        bar, x = self.bar[time], xt.double().flatten()[:, None]
        spread = bar * self.s**2 + 1 - bar
        log_p = self.weights.log() - (x - bar.sqrt() * self.centres) ** 2 / (2 * spread)
        posterior = log_p.softmax(1)
        gain = bar.sqrt() * self.s**2 / spread
        means = self.centres + gain * (x - bar.sqrt() * self.centres)  # E[x0 | xt, mode]
        mean = (posterior * means).sum(1)
        error = (posterior * means**2).sum(1) - mean**2 + self.s**2 * (1 - bar) / spread
        eps = (xt.double().flatten() - bar.sqrt() * mean) / (1 - bar).sqrt()
        low = self.tilde[max(time, 2)].log()
        var = (self.tilde[time] + self.coef[time] ** 2 * error).log()
        v = 2 * (var - low) / (self.beta[time].log() - low) - 1
        return torch.stack([eps, v], 1).float().view(-1, 2, 1, 1)


def test_fifty_strided_steps_keep_the_proportions_of_the_modes():
    process = ImprovedDDPM(cosine_beta(T))
    network = MixtureNetwork(process)
    x = process.strided(50).sample(network, torch.randn(8000, 1, 1, 1)).flatten()
    assert network.times == set(strided_timesteps(T, 50).tolist())
    for sign, centre, weight in [(-1, -0.5, 0.7), (1, 0.5, 0.3)]:
        mode = x[sign * x > 0]
        error = math.sqrt(0.7 * 0.3 / len(x))
        assert len(mode) / len(x) == pytest.approx(weight, abs=4 * error)
        assert mode.mean().item() == pytest.approx(centre, abs=0.02)
        assert mode.std().item() == pytest.approx(0.1, rel=0.15)


# Strided sampling


def official_timesteps(steps: int, S: int) -> list[int]:
    """The times of the authors' code for S steps, one section, counted from 1."""
    times, total = [], 0.0
    for _ in range(S):
        times.append(round(total) + 1)
        total += (steps - 1) / (S - 1) if S > 1 else 1
    return times


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 60, 1000, 4000])
def test_strided_times_are_those_of_the_authors_for_every_S(steps):
    """S distinct times, ascending, from 1 to T. For S = 1 the authors take t = 1, and we take T."""
    assert strided_timesteps(steps, 1).tolist() == [steps]
    assert official_timesteps(steps, 1) == [1]
    for S in range(2, steps + 1):
        times = strided_timesteps(steps, S).tolist()
        assert times == official_timesteps(steps, S)
        assert len(times) == S
        assert (times[0], times[-1]) == (1, steps)
        assert all(first < last for first, last in pairwise(times))
    for bad in (0, -1, steps + 1):
        with pytest.raises(UserError, match=f"num_steps is {bad}"):
            strided_timesteps(steps, bad)


def test_strided_times_round_halves_to_even_and_sum_in_floating_point():
    assert strided_timesteps(1000, 3).tolist() == [1, 501, 1000]  # 499.5 is rounded up to 500
    assert strided_timesteps(1000, 5).tolist() == [1, 251, 501, 750, 1000]
    exact = [[round(1 + i * 999 / (S - 1)) for i in range(S)] for S in range(2, 1001)]
    differ = sum(strided_timesteps(1000, len(times)).tolist() != times for times in exact)
    assert 300 < differ < 400


def test_strided_process_keeps_alpha_bar_and_equation_19():
    process = ImprovedDDPM(cosine_beta(60), "learned", 0.5, 0.25)
    for S in range(1, 61):
        few = process.strided(S)
        times = strided_timesteps(60, S)
        bar = process.alpha_bar[times]
        assert few.num_timesteps == S
        assert torch.equal(few.timesteps[1:], times)
        assert torch.allclose(few.alpha_bar[1:], bar, rtol=1e-6, atol=0)
        assert (few.variance, few.simple_weight, few.vlb_weight) == ("learned", 0.5, 0.25)
        bar_prev = torch.cat([torch.ones(1).double(), bar[:-1]])
        beta = 1 - bar / bar_prev
        tilde = (1 - bar_prev) / (1 - bar) * beta
        assert torch.allclose(few.log_beta[1:].flatten().double(), beta.log(), atol=1e-5)
        log_tilde = few.posterior_log_var[2:].flatten().double()
        assert torch.allclose(log_tilde, tilde[1:].log(), atol=1e-5)
    whole = process.strided(60)
    for name, table in process.named_buffers():
        assert torch.allclose(dict(whole.named_buffers())[name], table, atol=1e-6), name
    assert process.strided(30).strided(7).timesteps[-1] == 60


def test_network_gets_the_original_t():
    few = ImprovedDDPM(cosine_beta(T)).strided(5)
    times = strided_timesteps(T, 5)
    received: list[int] = []

    def network(xt: Tensor, t: Tensor) -> Tensor:
        received.extend(t.tolist())
        return torch.zeros(len(xt), 2, *xt.shape[2:])

    x = torch.zeros(1, 1, 2, 2)
    few.sample(network, x)
    assert received == times.flip(0).tolist()
    for call in (few.loss, few.vlb_term):
        received.clear()
        call(network, x.expand(5, -1, -1, -1), torch.arange(1, 6), torch.zeros(5, 1, 2, 2))
        assert received == times.tolist()


def test_trajectory_counts_down_to_the_image():
    process = ImprovedDDPM(cosine_beta(T)).strided(4)
    assert process.device == torch.device("cpu")
    x_T = torch.randn(2, 1, 2, 2)
    torch.manual_seed(5)
    steps = list(process.trajectory(lambda xt, t: torch.zeros(2, 2, 2, 2), x_T))
    torch.manual_seed(5)
    sample = process.sample(lambda xt, t: torch.zeros(2, 2, 2, 2), x_T)
    assert [t for t, _ in steps] == [3, 2, 1, 0]
    assert torch.equal(steps[-1][1], sample)
