"""Lesson 9's measurement of the learned variance."""

from lesson_09 import variance
from lesson_09.iddpm import ImprovedDDPM, cosine_beta, linear_beta
from lesson_09.unet import UNet

import torch
from helpers import NETWORK
from torch import Tensor


def test_fractions_are_those_of_v():
    def network(xt: Tensor, t: Tensor) -> Tensor:
        v = torch.full_like(xt, 0.5)  # f = 0.75
        v[:, :, 0] = -2.0  # a quarter of the pixels: f = -0.5
        v[:, :, 1] = 2.0  # f = 1.5
        return torch.cat([xt, v], 1)

    process = ImprovedDDPM(cosine_beta(100))
    f = variance.fractions(process, network, torch.zeros(3, 1, 4, 4))
    assert f["t"][0] == 1
    assert f["t"][-1] == 100
    assert set(f["below_0"]) == set(f["above_1"]) == {0.25}
    assert (f["p5"][0], f["mean"][0], f["p95"][0]) == (-0.5, 0.625, 1.5)


def test_gradients_of_the_shared_layers_are_those_of_the_two_terms():
    network = NETWORK | {"dropout": 0.0, "attention_resolutions": [14]}
    model = UNet(1, (28, 28), learned_variance=True, **network).requires_grad_(False)
    torch.nn.init.normal_(model.conv_out.weight, std=0.1)
    levels = torch.randint(0, 256, (5, 1, 28, 28), dtype=torch.uint8)
    norms = []
    for vlb_weight in (1e-3, 2e-3):
        torch.manual_seed(0)
        process = ImprovedDDPM(cosine_beta(20), vlb_weight=vlb_weight)
        norms.append(variance.shared_gradient(process, model, levels, num_batches=2, size=3))
    one, two = norms
    assert one["simple"] == two["simple"] > 0
    torch.testing.assert_close(2 * one["vlb"], two["vlb"], rtol=1e-4, atol=0)
    assert one["mean_vlb"] > 0
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_variance_of_the_step_back_for_two_points():
    """Where a pixel is -1 or 1, the best variance is never below β̃; on average over xt it is not
    above β, but for single xt it is, by far."""
    process = ImprovedDDPM(linear_beta(1000))
    bar = process.alpha_bar
    for t in (2, 10, 100, 500):
        beta = 1 - bar[t] / bar[t - 1]
        beta_tilde = (1 - bar[t - 1]) / (1 - bar[t]) * beta
        w = bar[t - 1].sqrt() * beta / (1 - bar[t])
        xt = torch.linspace(-6, 6, 200_001).double()
        spread = (1 - bar[t]).sqrt()
        density = sum(
            (-0.5 * ((xt - sign * bar[t].sqrt()) / spread) ** 2).exp() for sign in (-1, 1)
        )
        mean_x0 = (bar[t].sqrt() * xt / (1 - bar[t])).tanh()
        variance = beta_tilde + w**2 * (1 - mean_x0**2)
        average = (variance * density).sum() / density.sum()
        assert variance.min() >= beta_tilde
        assert beta_tilde <= average < beta
        assert variance.max() > (10 if t <= 10 else 1.1 if t <= 100 else 1) * beta
