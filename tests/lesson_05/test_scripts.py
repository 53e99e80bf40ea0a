"""Lesson 5's scripts."""

from common.break_it import Bench, BreakOptions
from common.checkpoint import Checkpoint
from lesson_05 import break_it, toy, which_t
from lesson_05.ddpm import DDPM, linear_beta

import torch
from torch import Tensor, nn


class Draws(nn.Module):
    """Predicts no noise; in train mode it draws random numbers, as dropout does."""

    def forward(self, xt: Tensor, t: Tensor) -> Tensor:
        if self.training:
            torch.randn(3)
        return 0 * xt


def test_dropout_left_on_changes_only_the_network():
    """The noise that the sampler adds is the same in both rows."""
    config = {"network": {"image_size": 4, "image_channels": 1}}
    content = Checkpoint("lesson_05", config, "digits", 1, {})
    process, options = DDPM(linear_beta(5, 1e-4, 0.001)), BreakOptions(num_samples=2)
    bench = Bench(process, Draws().eval(), content, options, torch.device("cpu"))
    dropout_off, dropout_on = break_it.dropout_on(bench).values()
    assert torch.equal(dropout_off, dropout_on)


def test_ten_long_steps_end_at_the_noise_of_the_long_process():
    """The network is told the times of the long process, and its noise levels are those."""
    process, times = DDPM(linear_beta(1000)), []

    def model(xt: Tensor, t: Tensor) -> Tensor:
        times.append(int(t[0]))
        return xt

    content = Checkpoint("lesson_05", {"network": {}}, "digits", 1, {})
    bench = Bench(process, model, content, BreakOptions(), torch.device("cpu"))
    short, network = break_it.ten_steps(bench)
    short.sample(network, torch.randn(2, 1, 4, 4))
    assert times == list(range(1000, 0, -100))
    assert torch.allclose(short.alpha_bar, process.alpha_bar[::100])


def test_one_network_up_to_the_border_and_another_above():
    network = which_t.joined(lambda xt, t: xt, lambda xt, t: -xt, 250)
    xt = torch.randn(2, 1, 4, 4)
    assert torch.equal(network(xt, torch.tensor([250, 250])), xt)
    assert torch.equal(network(xt, torch.tensor([251, 251])), -xt)


def test_the_best_estimate_of_the_toy_is_the_mean_of_the_noise():
    """For one point it is the noise itself. For points of mean 0 and variance v it is nearly that
    of N(0, v): √(1-ᾱ_t) xt / (ᾱ_t v + 1 - ᾱ_t)."""
    torch.manual_seed(0)
    process, t = DDPM(linear_beta(100)), torch.full((50,), 60)
    x0, eps = toy.moons(1).expand(50, -1, -1, -1), torch.randn(50, 2, 1, 1)
    best = toy.best(process, x0[:1])(process.q_sample(x0, t, eps), t)
    assert torch.allclose(best, eps, atol=1e-4)

    xt, a, v = torch.randn(50, 2, 1, 1), process.alpha_bar[60].item(), 0.25
    best = toy.best(process, v**0.5 * torch.randn(20_000, 2, 1, 1))(xt, t)
    assert torch.allclose(best, (1 - a) ** 0.5 * xt / (a * v + 1 - a), atol=0.03)
