"""Lesson 9's measurement of the learned variance."""

from lesson_09 import variance
from lesson_09.iddpm import ImprovedDDPM, cosine_beta
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
