"""Lesson 9 against closed forms and exact expectations, and its runs, small."""

import json
import math
import os
import runpy
import shlex
import signal
import subprocess
import sys
from collections import deque
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from conftest import NETWORK, ROOT
from test_common import equal, fails, without_speed
from test_lesson_05 import their_name
from test_readme import scripts
from torch import Tensor, nn

from common import checkpoint, cli, mnist
from common.errors import UserError
from common.run import RunOptions
from lesson_09 import ablation, evaluate, quality, sample_mnist, train_mnist
from lesson_09.iddpm import (
    Gaussian,
    ImprovedDDPM,
    cosine_beta,
    discretized_log_likelihood,
    linear_beta,
    named_beta,
    strided_timesteps,
)
from lesson_09.timesteps import LossAwareTimesteps, UniformTimesteps, named_sampler
from lesson_09.unet import SelfAttention, UNet, timestep_embedding

T = 1000
LN2 = math.log(2)
CONFIGS = ROOT / "lesson_09" / "configs"
QUICK = NETWORK | {"multipliers": [1, 1, 2], "attention_resolutions": [7], "num_groups": 1}


def exact_variances(process: ImprovedDDPM) -> tuple[Tensor, Tensor, Tensor]:
    """β_t, β̃_t and the weight of x0 in the posterior's mean, float64 (T+1,), from ᾱ alone."""
    bar = process.alpha_bar
    before = torch.cat([bar[:1], bar[:-1]])
    beta = 1 - bar / before
    rest = (1 - bar).clamp(min=1e-300)
    return beta, (1 - before) / rest * beta, before.sqrt() * beta / rest


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
    assert process.post_log_var[2].item() == pytest.approx(-10.73, abs=5e-3)

    def f(t: int) -> float:
        return math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (1, 2, 500, 999):
        assert process.alpha_bar[t].item() == pytest.approx(f(t) / f(0), rel=1e-10)
        assert process.signal_rate[t].item() == pytest.approx(math.sqrt(f(t) / f(0)), rel=1e-6)


def test_schedules_scale_with_T_and_refuse_what_they_cannot():
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


def test_fixed_variances_ignore_v_and_take_the_second_value_at_the_first_step():
    for variance in ("beta", "beta_tilde"):
        process = ImprovedDDPM(linear_beta(T), variance)
        exact, tilde, _ = exact_variances(process)
        for t in (1, 2, 700):
            wanted = tilde[max(t, 2)] if variance == "beta_tilde" or t == 1 else exact[t]
            xt, out = torch.randn(1, 1, 2, 2), torch.randn(1, 2, 2, 2)
            p = process.p_mean_variance(out, xt, torch.tensor([t]))
            assert torch.allclose(p.log_var.double(), wanted.log(), atol=1e-6)
            alone = process.p_mean_variance(out[:, :1], xt, torch.tensor([t]))
            assert torch.equal(p.mean, alone.mean)
    with pytest.raises(ValueError, match="unpack"):  # learned, but the network has no v
        ImprovedDDPM(linear_beta(T)).p_mean_variance(out[:, :1], xt, torch.tensor([5]))


def test_mean_is_equation_13_of_the_first_channels():
    process = ImprovedDDPM(cosine_beta(T))
    xt, out = torch.randn(2, 3, 4, 4), torch.randn(2, 6, 4, 4)
    for t in (2, 500, 990):
        bar = process.alpha_bar[t]
        beta = 1 - bar / process.alpha_bar[t - 1]
        expected = (xt - beta / (1 - bar).sqrt() * out[:, :3]) / (1 - beta).sqrt()
        p = process.p_mean_variance(out, xt, torch.tensor([t, t]), clip_x0=False)
        assert torch.allclose(p.mean, expected.float(), atol=1e-4)


def test_the_first_step_adds_no_noise():
    process = ImprovedDDPM(cosine_beta(T))
    x = torch.randn(2, 1, 4, 4)

    def network(xt: Tensor, t: Tensor) -> Tensor:
        return torch.zeros(2, 2, 4, 4)

    assert torch.equal(process.p_sample(network, x, 1), process.p_sample(network, x, 1))
    assert not torch.equal(process.p_sample(network, x, 2), process.p_sample(network, x, 2))


# The loss


def gradient(process: ImprovedDDPM, which: int, t: Tensor) -> tuple[Tensor, Tensor]:
    """Of one of the loss's terms, in the ε and in the v channels, (B,) each: absolute sums."""
    torch.manual_seed(1)
    x0 = (torch.rand(len(t), 3, 4, 4) * 255).round() / 127.5 - 1
    out = torch.randn(len(t), 6, 4, 4, requires_grad=True)
    process.loss_terms(lambda xt, heard: out, x0, t, torch.randn_like(x0))[which].sum().backward()
    eps, v = out.grad.abs().flatten(2).sum(2).chunk(2, dim=1)
    return eps.sum(1), v.sum(1)


def test_in_the_hybrid_loss_the_bound_trains_the_variance_alone():
    t = torch.tensor([1, 2, 3, 50, 500, 999, 1000])
    for weights in [(1.0, 1e-3), (0.01, 1.0)]:
        hybrid = ImprovedDDPM(cosine_beta(T), "learned", *weights)
        eps, v = gradient(hybrid, 1, t)
        assert (eps == 0).all()
        assert (v > 0).all()
        eps, v = gradient(hybrid, 0, t)
        assert (eps > 0).all()
        assert (v == 0).all()
    for vlb_weight in (1.0, 1e-3):
        eps, v = gradient(ImprovedDDPM(cosine_beta(T), "learned", 0.0, vlb_weight), 1, t)
        assert (eps > 0).all()
        assert (v > 0).all()
        assert eps.isfinite().all()


def test_lambda_multiplies_the_sum_over_t():
    """The mean over t of T times the term of t is the whole sum; with 1e-3 times the term alone
    the bound would weigh T times less."""
    steps = 40
    beta = linear_beta(steps)
    oracle = GaussianNetwork(ImprovedDDPM(beta), 0.1, 0.5)
    x0 = (torch.rand(1, 1, 4, 4) * 255).round() / 127.5 - 1
    every, eps = torch.arange(1, steps + 1), torch.randn(steps, 1, 4, 4)
    images = x0.expand(steps, -1, -1, -1)
    terms = ImprovedDDPM(beta).vlb_term(oracle, images, every, eps)
    alone = ImprovedDDPM(beta, "learned", 0.0, 1.0).loss(oracle, images, every, eps)
    assert alone.mean().item() == pytest.approx(terms.sum().item(), rel=1e-5)
    draws = iter(eps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda x: next(draws)[None])
        bits = ImprovedDDPM(beta).bits_per_dim(oracle, x0)
    assert (bits.total - bits.prior).item() == pytest.approx(alone.mean().item(), rel=1e-5)

    process = ImprovedDDPM(beta, "learned", 1.0, 1e-3)
    simple, vlb = process.loss_terms(oracle, images, every, eps)
    assert torch.allclose(vlb, terms)
    expected = simple + 1e-3 * steps * vlb
    assert torch.allclose(process.loss(oracle, images, every, eps), expected)
    assert torch.allclose(
        ImprovedDDPM(beta, "beta", 1.0, 0.0).loss(oracle, images, every, eps), simple
    )


def test_term_of_the_first_step_is_the_decoder():
    process = ImprovedDDPM(cosine_beta(T))
    x0 = (torch.rand(3, 1, 4, 4) * 255).round() / 127.5 - 1
    xt, t = torch.randn(3, 1, 4, 4), torch.tensor([1, 7, 1])
    p = Gaussian(0.1 * torch.randn_like(x0), torch.full_like(x0, -5.0))
    bits = process.term_bits(p, x0, xt, t)
    mass = discretized_log_likelihood(x0, p).flatten(1).mean(1) / LN2
    assert torch.allclose(bits[[0, 2]], -mass[[0, 2]])
    assert not torch.allclose(bits[1], -mass[1])


# Closed forms


class GaussianNetwork:
    """The best network for data whose pixels are N(m, s²): the exact E[ε | xt] and the v that is
    the true variance of x_{t-1} given xt."""

    def __init__(self, process: ImprovedDDPM, m: float, s: float) -> None:
        self.bar, self.m, self.s = process.alpha_bar, m, s
        beta, tilde, weight = exact_variances(process)
        error = s**2 * (1 - self.bar) / (self.bar * s**2 + 1 - self.bar)
        self.var = tilde + weight**2 * error
        low = tilde.clone()
        low[:2] = tilde[2]
        self.v = 2 * (self.var.log() - low.log()) / (beta.log() - low.log()) - 1
        self.tilde = tilde

    def __call__(self, xt: Tensor, t: Tensor) -> Tensor:
        bar = self.bar[t].view(-1, 1, 1, 1)
        gain = (1 - bar).sqrt() / (bar * self.s**2 + 1 - bar)
        eps = gain * (xt.double() - bar.sqrt() * self.m)
        return torch.cat([eps, self.v[t].view(-1, 1, 1, 1).expand_as(eps)], 1).float()


@pytest.mark.parametrize("beta", [linear_beta(T), cosine_beta(T)], ids=["linear", "cosine"])
def test_bound_with_the_true_variance_equals_the_closed_form(beta):
    """E KL(q || p) = ½ [log(σ²/β̃) + σ*²/σ² - 1] for a p with the true mean and variance σ², which
    is least at the true variance σ*² and there ½ log(σ*²/β̃)."""
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
        self.beta, self.tilde, self.weight = exact_variances(process)
        self.heard: set[int] = set()

    def __call__(self, xt: Tensor, t: Tensor) -> Tensor:
        time = int(t[0])
        self.heard.add(time)
        bar, x = self.bar[time], xt.double().flatten()[:, None]
        spread = bar * self.s**2 + 1 - bar
        log_p = self.weights.log() - (x - bar.sqrt() * self.centres) ** 2 / (2 * spread)
        share = log_p.softmax(1)
        gain = bar.sqrt() * self.s**2 / spread
        each = self.centres + gain * (x - bar.sqrt() * self.centres)  # E[x0 | xt, mode]
        mean = (share * each).sum(1)
        error = (share * each**2).sum(1) - mean**2 + self.s**2 * (1 - bar) / spread
        eps = (xt.double().flatten() - bar.sqrt() * mean) / (1 - bar).sqrt()
        low = self.tilde[max(time, 2)].log()
        var = (self.tilde[time] + self.weight[time] ** 2 * error).log()
        v = 2 * (var - low) / (self.beta[time].log() - low) - 1
        return torch.stack([eps, v], 1).float().view(-1, 2, 1, 1)


def test_fifty_strided_steps_keep_the_weights_of_the_modes():
    process = ImprovedDDPM(cosine_beta(T))
    network = MixtureNetwork(process)
    x = process.strided(50).sample(network, torch.randn(8000, 1, 1, 1)).flatten()
    assert network.heard == set(strided_timesteps(T, 50).tolist())
    for sign, centre, weight in [(-1, -0.5, 0.7), (1, 0.5, 0.3)]:
        mode = x[sign * x > 0]
        error = math.sqrt(0.7 * 0.3 / len(x))
        assert len(mode) / len(x) == pytest.approx(weight, abs=4 * error)
        assert mode.mean().item() == pytest.approx(centre, abs=0.02)
        assert mode.std().item() == pytest.approx(0.1, rel=0.15)


# Strided sampling


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 60, 1000])
def test_strides_are_exactly_S_for_every_S(steps):
    for S in range(1, steps + 1):
        times = strided_timesteps(steps, S).tolist()
        assert len(times) == S
        assert times[-1] == steps
        assert all(first < last for first, last in pairwise([0, *times]))
        if S > 1:
            assert times == [round(1 + i * (steps - 1) / (S - 1)) for i in range(S)]
    for bad in (0, -1, steps + 1):
        with pytest.raises(UserError, match=f"num_steps is {bad}"):
            strided_timesteps(steps, bad)


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
        before = torch.cat([torch.ones(1).double(), bar[:-1]])
        beta = 1 - bar / before
        tilde = (1 - before) / (1 - bar) * beta
        assert torch.allclose(few.log_beta[1:].flatten().double(), beta.log(), atol=1e-5)
        got = few.post_log_var[2:].flatten().double()
        assert torch.allclose(got, tilde[1:].log(), atol=1e-5)
    whole = process.strided(60)
    for name, table in process.named_buffers():
        assert torch.allclose(dict(whole.named_buffers())[name], table, atol=1e-6), name
    assert process.strided(30).strided(7).timesteps[-1] == 60


def test_the_network_hears_the_original_t():
    few = ImprovedDDPM(cosine_beta(T)).strided(5)
    times = strided_timesteps(T, 5)
    heard: list[int] = []

    def network(xt: Tensor, t: Tensor) -> Tensor:
        heard.extend(t.tolist())
        return torch.zeros(len(xt), 2, *xt.shape[2:])

    x = torch.zeros(1, 1, 2, 2)
    few.sample(network, x)
    assert heard == times.flip(0).tolist()
    for call in (few.loss, few.vlb_term):
        heard.clear()
        call(network, x.expand(5, -1, -1, -1), torch.arange(1, 6), torch.zeros(5, 1, 2, 2))
        assert heard == times.tolist()


# Samplers of t


def filled(profile: Tensor) -> LossAwareTimesteps:
    """A sampler that has seen its ten terms of every t, each the same."""
    sampler = LossAwareTimesteps(len(profile))
    for _ in range(10):
        sampler.update(torch.arange(1, len(profile) + 1), profile)
    return sampler


def test_importance_weights_average_to_one_and_reduce_the_variance():
    profile = 1 / torch.arange(1, 101)
    sampler = filled(profile)
    p, profile = sampler.weights().double(), profile.double()
    assert torch.allclose(p, 0.999 * profile / profile.sum() + 0.001 / 100)
    weight = 1 / (100 * p)
    assert (p * weight).sum().item() == pytest.approx(1)
    mean = (p * weight * profile).sum().item()
    assert mean == pytest.approx(profile.mean().item())
    variance = (p * (weight * profile) ** 2).sum().item() - mean**2
    uniform = (profile**2).mean().item() - mean**2
    assert variance < uniform / 100
    t, drawn = sampler.sample(50_000)
    assert torch.allclose(drawn.double(), weight[t - 1])
    counts = torch.bincount(t - 1, minlength=100).double()
    assert ((counts - 50_000 * p).abs() < 5 * (50_000 * p).sqrt() + 1).all()
    assert drawn.mean().item() == pytest.approx(1, abs=5 * drawn.std().item() / 50_000**0.5)


def test_weights_come_from_second_moments():
    sampler = LossAwareTimesteps(2)
    for k in range(10):
        sampler.update(torch.tensor([1, 2]), torch.tensor([2.0 * (k % 2), 1.0]))
    root = math.sqrt(2)  # of the mean square of 0, 2, 0, 2, ...; the mean is 1 for both
    expected = 0.999 * root / (root + 1) + 0.0005
    assert sampler.weights()[0].item() == pytest.approx(expected)


def test_all_t_are_alike_until_each_has_its_ten_terms():
    sampler = LossAwareTimesteps(4)
    for k in range(40):
        assert torch.allclose(sampler.weights(), torch.full((4,), 0.25))
        t, weight = sampler.sample(8)
        assert set(t.tolist()) <= {1, 2, 3, 4}
        assert (weight == 1).all()
        sampler.update(torch.tensor([k // 10 + 1]), torch.tensor([float(k // 10 + 1)]))
    assert sampler.weights()[3] > 0.39
    assert torch.allclose(filled(torch.zeros(3)).weights(), torch.full((3,), 1 / 3))


def test_history_is_the_last_ten_terms_of_each_t():
    """Against one queue a t, with as many of one t in a batch as it happens."""
    sampler = LossAwareTimesteps(3)
    queues = [deque(maxlen=10) for _ in range(3)]
    for size in (1, 7, 64, 30, 2, 64, 5):
        t, terms = torch.randint(1, 4, (size,)), torch.rand(size)
        sampler.update(t, terms)
        for time, term in zip(t.tolist(), terms.tolist(), strict=True):
            queues[time - 1].append(term)
        for queue, row in zip(queues, sampler.terms, strict=True):
            held = row[row != 0].tolist()
            assert sorted(held) == pytest.approx(sorted(queue))
    copy = LossAwareTimesteps(3)
    copy.load_state_dict(sampler.state_dict())
    assert torch.equal(copy.weights(), sampler.weights())


def test_uniform_sampler_has_the_same_face():
    sampler = named_sampler("uniform", 50)
    assert isinstance(sampler, UniformTimesteps)
    t, weight = sampler.sample(5000)
    sampler.update(t, torch.rand(5000))
    assert (t.min(), t.max()) == (1, 50)
    assert (weight == 1).all()
    assert torch.allclose(sampler.weights(), torch.full((50,), 0.02))
    assert not sampler.state_dict()
    with pytest.raises(UserError, match="uniform or loss_aware"):
        named_sampler("greedy", 50)


# The network


def test_parameter_counts_of_the_paper():
    arguments = yaml.safe_load((CONFIGS / "paper.yaml").read_text())["network"]
    for image_channels, count in [(3, 52_546_438), (1, 52_539_522)]:
        with torch.device("meta"):
            network = UNet(image_channels, image_size=32, **arguments)
        assert sum(p.numel() for p in network.parameters()) == count


def test_it_is_the_official_network_layer_for_layer():
    """Every layer has its twin in diffusers' model, in the official configuration, small."""
    from diffusers import UNet2DModel

    theirs = UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=6,
        layers_per_block=2,
        block_out_channels=(16, 32, 32, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        attn_norm_num_groups=4,
        resnet_time_scale_shift="scale_shift",
        downsample_padding=1,
        flip_sin_to_cos=True,
        freq_shift=0,
        norm_eps=1e-5,
        norm_num_groups=4,
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    ours = UNet(3, 32, channels=16, num_blocks=2, num_groups=4, num_heads=4).eval()
    weights, state = theirs.state_dict(), {}
    for name in ours.state_dict():
        if ".qkv." in name:
            parts = [weights.pop(their_name(name).replace("qkv", f"to_{part}")) for part in "qkv"]
            heads = [part.unflatten(0, (4, 8)) for part in parts]  # ours: each head's q, k and v
            state[name] = torch.stack(heads, 1).flatten(0, 2)
        else:
            state[name] = weights.pop(their_name(name))
    assert not weights  # every one of theirs has its place in ours
    ours.load_state_dict(state)
    xt = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for t in (1, 500, 4000):
            out = ours(xt, torch.tensor([t, t]))
            expected = theirs(xt, torch.tensor([t - 1, t - 1])).sample
            assert (out - expected).abs().max() < 1e-4
            assert out.std() > 0.1


def test_attention_equals_the_one_of_torch():
    layer = SelfAttention(12, num_heads=3, num_groups=2)
    nn.init.normal_(layer.out.weight)
    h = torch.randn(2, 12, 4, 4)
    pixels = layer.qkv(layer.norm(h).flatten(2).transpose(1, 2))
    q, k, v = pixels.unflatten(2, (3, 3, 4)).permute(3, 0, 2, 1, 4)
    y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    expected = h + layer.out(y).transpose(1, 2).unflatten(2, (4, 4))
    assert torch.allclose(layer(h), expected, atol=1e-5)


def test_embedding_is_cosines_then_sines_from_zero():
    emb = timestep_embedding(torch.tensor([1, 11]), 8)
    assert torch.equal(emb[0], torch.tensor([1.0] * 4 + [0.0] * 4))
    expected = [math.sin(10 * 10_000 ** (-i / 4)) for i in range(4)]
    assert torch.allclose(emb[1, 4:], torch.tensor(expected), atol=1e-6)


@pytest.mark.parametrize(
    ("image_channels", "learned", "out"), [(1, True, 2), (3, True, 6), (3, False, 3)]
)
def test_output_has_noise_and_v_in_the_size_of_the_image(image_channels, learned, out):
    network = UNet(image_channels, 28, learned, **NETWORK | {"attention_resolutions": []})
    xt, t = torch.randn(2, image_channels, 26, 30), torch.tensor([5, 9])
    answer = network(xt, t)
    assert answer.shape == (2, out, 26, 30)
    assert answer.dtype == torch.float32
    assert (answer == 0).all()  # a new network: half-way between the variances, no noise seen


def test_padding_is_zeros_around_the_image():
    network = UNet(1, 28, **NETWORK | {"multipliers": [1, 2, 2, 2], "attention_resolutions": []})
    nn.init.normal_(network.conv_out.weight)
    network.eval()
    xt, t = torch.randn(1, 1, 28, 28), torch.tensor([9])
    padded = nn.functional.pad(xt, (2, 2, 2, 2))
    assert torch.equal(network(xt, t), network(padded, t)[..., 2:-2, 2:-2])


@pytest.mark.parametrize("scale_shift_norm", [True, False])
def test_all_of_the_network_learns(scale_shift_norm):
    network = UNet(1, 28, scale_shift_norm=scale_shift_norm, **NETWORK)
    t = torch.tensor([3, 4])
    for _ in range(4):  # the zeros give way one layer a step, from the last one inwards
        loss = (network(torch.randn(2, 1, 28, 28), t) - 1).square().mean()
        network.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter -= 0.1 * parameter.grad
    idle = [name for name, p in network.named_parameters() if not p.grad.any()]
    assert idle == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_groups": 3}, "8 channels cannot be divided into 3 groups"),
        ({"image_size": 2, "multipliers": [1, 1, 1]}, "cannot be halved 2 times"),
        ({"num_heads": 3}, "among 3 attention heads"),
        ({"attention_resolutions": [5]}, "feature maps of size 28, 14"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_impossible_networks_are_refused(change, words):
    with pytest.raises(UserError, match=words):
        UNet(**{"image_size": 28, **NETWORK, **change})


# Training, sampling, evaluating


def train(folder: Path, **changes: object) -> Path:
    """A tiny run on scikit-learn's digits; returns its folder."""
    run = {"output_dir": str(folder), "device": "cpu", "precision": "float32"}
    names = set(RunOptions.__dataclass_fields__)
    run |= {name: changes.pop(name) for name in names & changes.keys()}
    run = {"log_every": 5, "num_previews": 2} | run
    arguments = {
        "dataset": "digits",
        "network": QUICK,
        "num_timesteps": 60,
        "num_training_steps": 4,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "num_samples": 2,
        "num_steps": 5,
        **changes,
    }
    train_mnist.main(**arguments, options=RunOptions(**run))
    return folder


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a tiny run with learned variance."""
    return train(tmp_path_factory.mktemp("hybrid")) / "checkpoint_000004.pt"


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with fixed variance."""
    folder = tmp_path_factory.mktemp("fixed")
    train(folder, variance="beta", vlb_weight=0.0, schedule="linear")
    return folder / "checkpoint_000004.pt"


def test_a_run_leaves_its_files_and_the_terms_apart(hybrid):
    names = {path.name for path in hybrid.parent.iterdir()}
    assert {"samples.png", "forward.png", "losses.png", "samples_000004.png"} <= names
    header, row = (hybrid.parent / "metrics.csv").read_text().splitlines()
    values = dict(zip(header.split(","), row.split(","), strict=True))
    loss, simple, vlb = (float(values[name]) for name in ("loss", "simple", "vlb"))
    assert loss == pytest.approx(simple + 1e-3 * vlb, rel=1e-4)  # vlb is the sum over t
    assert vlb > 1
    assert float(values["loss_quarter_1"]) > 0


def test_resume_with_the_loss_aware_sampler_is_bit_exact(tmp_path, monkeypatch, capsys):
    settings = {"num_training_steps": 20, "decay_learning_rate": True, "num_timesteps": 4}
    settings |= {"timestep_sampler": "loss_aware", "simple_weight": 0.0, "vlb_weight": 1.0}
    settings |= {"num_samples": 1, "num_steps": None, "batch_size": 16, "log_every": 10}
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
    sampler = LossAwareTimesteps(4)
    saved = checkpoint.load(parts / "checkpoint_000010.pt")["training"]["timesteps"]
    sampler.load_state_dict(saved)
    assert sampler.weights().max() > 1.5 * sampler.weights().min()  # it has something to lose
    train(parts, **settings, resume="latest")
    one, other = (checkpoint.load(folder / "checkpoint_000020.pt") for folder in (whole, parts))
    assert equal(one, other)
    assert without_speed(whole / "metrics.csv") == without_speed(parts / "metrics.csv")
    assert (whole / "samples.png").read_bytes() == (parts / "samples.png").read_bytes()


def test_samples_in_few_steps_and_with_either_variance(hybrid, fixed, tmp_path, capsys):
    for file, flags, steps in [
        (hybrid, {}, 60),
        (hybrid, {"num_steps": 25}, 25),
        (hybrid, {"num_steps": 1, "variance": "beta"}, 1),
        (fixed, {"num_steps": 10, "variance": "beta_tilde"}, 10),
    ]:
        sample_mnist.main(str(file), num_samples=1, device="cpu", output_dir=str(tmp_path), **flags)
        assert f"in {steps} steps" in capsys.readouterr().out
        assert (tmp_path / "reverse.png").exists()
    process, network, content = sample_mnist.load(str(hybrid))
    assert (process.variance, process.num_timesteps) == ("learned", 60)
    assert not network.training
    assert content["config"]["network"]["learned_variance"]


def test_bad_input_gives_one_line(hybrid, fixed, tmp_path, capsys):
    sampling = ["--output_dir", tmp_path / "out", "--device", "cpu", "--model_checkpoint"]
    for script, words, said in [
        (sample_mnist, [hybrid, "--num_steps", "0"], "num_steps is 0: take 1 to 60"),
        (sample_mnist, [hybrid, "--num_steps", "61"], "num_steps is 61"),
        (sample_mnist, [hybrid, "--num_samples", "0"], "num_samples is 0"),
        (sample_mnist, [fixed, "--variance", "learned"], "trained without learned variance"),
        (evaluate, [hybrid, "--num_terms", "1"], "num_terms is 1"),
        (evaluate, [hybrid, "--num_images", "1"], "num_images is 1"),
        (evaluate, [hybrid, "--batch_size", "0"], "batch_size is 0"),
    ]:
        assert said in fails(capsys, script.main, *sampling, *words)
    words = ["--dataset", "digits", "--output_dir", tmp_path / "run", "--network.channels", "8"]
    for extra, said in [
        (["--schedule", "quadratic"], "quadratic"),
        (["--variance", "large"], "large"),
        (["--vlb_weight", "-1"], "vlb_weight"),
        (["--simple_weight", "0", "--vlb_weight", "0"], "one must be positive"),
        (["--timestep_sampler", "greedy"], "greedy"),
        (["--num_timesteps", "0"], "T = 0"),
        (["--num_timesteps", "20", "--num_steps", "30"], "num_steps is 30"),
        (["--network.num_heads", "3"], "3 attention heads"),
        (["--network.learned_variance", "true"], "learned_variance"),
    ]:
        preset = ["--config", "configs/laptop.yaml"]
        line = fails(capsys, train_mnist.main, *preset, *words, *extra, presets=True, network=UNet)
        assert said in line


def test_evaluation_writes_its_parts_and_figures(hybrid, tmp_path, capsys):
    evaluate.main(str(hybrid), 20, 10, 10, device="cpu", output_dir=str(tmp_path))  # the full sum
    result = json.loads((tmp_path / "bits_per_dim.json").read_text())
    parts = [result[name]["mean"] for name in ("prior", "KL", "decoder")]
    assert sum(parts) == pytest.approx(result["total"]["mean"], rel=1e-4)
    assert result["num_terms"] == result["num_timesteps"] == 10
    few = tmp_path / "few"
    evaluate.main(str(hybrid), 20, 50, 4, device="cpu", output_dir=str(few))  # 4 steps have 4 terms
    assert json.loads((few / "bits_per_dim.json").read_text())["num_terms"] == 4
    quick = tmp_path / "quick"
    evaluate.main(str(hybrid), 20, 5, 10, device="cpu", output_dir=str(quick), batch_size=7)
    estimate = json.loads((quick / "bits_per_dim.json").read_text())["total"]
    gap = abs(estimate["mean"] - result["total"]["mean"])
    assert gap < 5 * math.hypot(estimate["standard_error"], result["total"]["standard_error"])
    for name in ("terms.png", "variance_ratio.png", "schedules.png"):
        assert (tmp_path / name).exists()
    assert "±" in capsys.readouterr().out


# The ablation


def test_rows_differ_from_the_baseline_by_their_factors_alone():
    presets = {row: yaml.safe_load(file(row).read_text()) for row in ablation.ROWS}
    assert {path.stem for path in (CONFIGS / "ablation").glob("*.yaml")} == set(ablation.ROWS)
    fixed = {"variance": "beta", "vlb_weight": 0.0}
    likelihood = {"simple_weight": 0.0, "vlb_weight": 1.0}
    linear = {"schedule": "linear"}
    plain = {"network": presets["cosine_hybrid"]["network"] | {"scale_shift_norm": False}}
    for row, factors in {
        "linear_simple": fixed | linear,
        "cosine_simple": fixed,
        "linear_hybrid": linear,
        "cosine_hybrid": {},
        "cosine_vlb": likelihood,
        "cosine_vlb_loss_aware": likelihood | {"timestep_sampler": "loss_aware"},
        "cosine_hybrid_no_scale_shift": plain,
        "linear_simple_4000": fixed | linear | {"num_timesteps": 4000},
    }.items():
        assert presets[row] == presets["cosine_hybrid"] | factors, row
    laptop, vlb = (yaml.safe_load((CONFIGS / f"{n}.yaml").read_text()) for n in ("laptop", "vlb"))
    assert laptop["network"] == vlb["network"] == presets["cosine_hybrid"]["network"]
    factors = likelihood | {"timestep_sampler": "loss_aware"}
    assert {key: vlb[key] for key in factors} == factors


def file(row: str) -> Path:
    return CONFIGS / "ablation" / f"{row}.yaml"


def test_ablation_makes_a_table_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    for row in ("linear_simple", "cosine_vlb_loss_aware"):
        preset = yaml.safe_load(file(row).read_text())
        preset |= {"num_training_steps": 4, "batch_size": 4, "num_timesteps": 60, "num_steps": 2}
        preset |= {"network": QUICK, "num_samples": 1, "num_previews": 1, "checkpoint_every": 2}
        (tmp_path / f"{row}.yaml").write_text(yaml.safe_dump(preset))
    words = ["--rows", "linear_simple", "cosine_vlb_loss_aware", "--presets", str(tmp_path)]
    words += ["--dataset", "digits", "--num_images", "20", "--num_terms", "3", "--device", "cpu"]
    words += ["--steps", "4", "2", "--samples", "3", "5", "--num_classifier_steps", "5"]
    words += ["--output_dir", str(tmp_path / "out")]
    trained: list[bool] = []  # whether resumed
    run = cli.run

    def counted(main, words, **rest):
        if main is train_mnist.main:
            trained.append("--resume" in words)
        run(main, words, **rest)

    monkeypatch.setattr(cli, "run", counted)
    cli.run(ablation.main, words)
    table = (tmp_path / "out" / "table.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert [row.split("|")[1].strip() for row in rows] == ["row", *words[1:3]]
    assert all(row.count("±") == 3 for row in rows[1:])
    assert "3 at 4 steps, 5 at 2 steps" in table
    assert trained == [False, False]
    # The second row is as if stopped half-way; the first is not touched again.
    out = tmp_path / "out" / "cosine_vlb_loss_aware"
    (out / "checkpoint_000004.pt").unlink()
    (out / "result.json").unlink()
    cli.run(ablation.main, words)
    assert trained == [False, False, True]
    assert (tmp_path / "out" / "table.md").read_text() == table
    assert "row nothing has no preset" in fails(capsys, ablation.main, "--rows", "nothing")


def test_kernel_distance_is_unbiased():
    y = torch.randn(60, 3).double()
    values = [quality.kernel_distance(torch.randn(6, 3).double(), y)[0] for _ in range(300)]
    mean = sum(values) / 300
    spread = (sum((v - mean) ** 2 for v in values) / 299) ** 0.5
    # Around what the draw of y leaves, not around the bias that i = j terms would add.
    far, error = quality.kernel_distance(torch.randn(200, 3).double() + 1, y)
    assert abs(mean) < 0.3
    assert far > 5 * error > 0
    x = torch.randn(6, 3).double()
    centre, deviation = y.mean(0), y.std(0) + 1e-3 * y.std()
    a, b = (x - centre) / deviation, (y - centre) / deviation

    def kernel(one: Tensor, other: Tensor) -> float:
        return ((one @ other).item() / 3 + 1) ** 3

    pairs = sum(kernel(a[i], a[j]) for i in range(6) for j in range(6) if i != j) / 30
    pairs += sum(kernel(b[i], b[j]) for i in range(60) for j in range(60) if i != j) / (60 * 59)
    pairs -= 2 * sum(kernel(one, other) for one in a for other in b) / 360
    assert quality.kernel_distance(x, y)[0] == pytest.approx(pairs)
    assert spread > 0


def test_the_judge_tells_real_from_spoilt(monkeypatch):
    data = mnist.load("digits")
    judge = ablation.Judge(data, 60, torch.device("cpu"))
    real, error = judge.floor()
    assert abs(real) < 5 * error
    images = data.test[:64].float() / 127.5 - 1
    spoilt = judge.distance(images + 0.5 * torch.randn_like(images))
    assert spoilt[0] > 5 * spoilt[1]
    assert judge.accuracy > 0.5


# The README


README = ROOT / "lesson_09" / "README.md"
TINY = {
    "train_mnist.py": "--dataset digits --network.channels 8 --network.num_groups 1 "
    "--num_samples 1 --num_training_steps 2 --num_timesteps 60 --num_steps 5 --batch_size 4 "
    "--num_previews 1 --device cpu",
    "sample_mnist.py": "--num_samples 1 --num_steps 5 --device cpu",
    "evaluate.py": "--num_images 4 --num_terms 3 --device cpu",
    "break_it.py": "--num_samples 1 --num_steps 3 --num_training_steps 1 --device cpu "
    "--model_checkpoint output/checkpoint.pt",
}
SCRIPTS = scripts(README)


@pytest.mark.parametrize("line", SCRIPTS)
def test_every_command_of_the_readme_runs(line, hybrid, tmp_path, monkeypatch, capsys):
    """In its folder; the first in a process of its own, as a user would run it."""
    words = shlex.split(line)[1:]
    words += [*shlex.split(TINY[words[0]]), "--output_dir", str(tmp_path / "run")]
    if "--model_checkpoint" in words:
        words[words.index("--model_checkpoint") + 1] = str(hybrid)
    if line == SCRIPTS[0]:
        words = [sys.executable, *words]
        result = subprocess.run(
            words, cwd=README.parent, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, result.stderr
    else:
        monkeypatch.chdir(README.parent)
        monkeypatch.setattr(sys, "argv", words)
        runpy.run_path(words[0], run_name="__main__")
    assert any((tmp_path / "run").iterdir())
