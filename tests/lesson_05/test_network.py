"""Lesson 5's network against the published one, and the average of its weights."""

import math

from common.ema import Ema
from common.errors import UserError
from lesson_05.unet import SelfAttention, UNet, initialise, timestep_embedding

import pytest
import torch
from diffusers_unet import assert_equal_outputs, copy_weights, perturb
from helpers import NETWORK
from torch import nn


def test_parameter_counts_of_the_paper():
    for image_channels, count in [(3, 35_746_307), (1, 35_741_697)]:
        with torch.device("meta"):
            network = UNet(image_channels, image_size=32)
        assert sum(p.numel() for p in network.parameters()) == count


def test_network_equals_the_published_one_layer_for_layer():
    """Randomly perturbed weights of diffusers' model, in the configuration published with
    google/ddpm-cifar10-32, give the same output; ours at t, theirs, counting from 0, at t - 1."""
    from diffusers import UNet2DModel

    theirs = UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        norm_num_groups=32,
    ).eval()
    perturb(theirs, 0.02)
    ours = UNet(3, image_size=32).eval()
    copy_weights(theirs, ours, torch.cat)
    assert_equal_outputs(ours, theirs, (1, 500, 1000))


def test_embedding_is_sines_then_cosines_of_t_minus_one():
    emb = timestep_embedding(torch.tensor([1, 11]), 8)
    assert torch.equal(emb[0], torch.tensor([0.0] * 4 + [1.0] * 4))
    expected = [math.sin(10 * 10_000 ** (-i / 3)) for i in range(4)]
    assert torch.allclose(emb[1, :4], torch.tensor(expected), atol=1e-6)


@pytest.mark.parametrize("image_channels", [1, 3])
@pytest.mark.parametrize("size", [28, 32, 30])
def test_images_of_any_size_are_padded_and_cropped(image_channels, size):
    network = UNet(image_channels, size, **NETWORK | {"attention_resolutions": []})
    nn.init.normal_(network.conv_out.weight)
    xt = torch.randn(1, image_channels, size, size)
    out = network(xt, torch.tensor([5]))
    assert out.shape == xt.shape
    assert out.dtype == torch.float32
    assert UNet(1, 28)(torch.zeros(1, 1, 28, 28), torch.tensor([1])).shape == (1, 1, 28, 28)


def test_padding_is_zero_around_the_image():
    network = UNet(1, 28, **NETWORK | {"multipliers": [1, 2, 2, 2], "attention_resolutions": []})
    nn.init.normal_(network.conv_out.weight)
    xt = torch.randn(1, 1, 28, 28)
    padded = nn.functional.pad(xt, (2, 2, 2, 2))
    network.eval()
    t = torch.tensor([9])
    assert torch.equal(network(xt, t), network(padded, t)[..., 2:-2, 2:-2])


def test_new_network_predicts_zero_and_every_weight_learns():
    network = UNet(1, 28, **NETWORK)
    t = torch.tensor([3, 4])
    assert (network(torch.randn(2, 1, 28, 28), t) == 0).all()
    for _ in range(4):  # layers that start at zero begin to learn one by one, from the last
        loss = (network(torch.randn(2, 1, 28, 28), t) - 1).square().mean()
        network.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter -= 0.1 * parameter.grad
    idle = [name for name, p in network.named_parameters() if not p.grad.any()]
    assert idle == []


def test_dropout_is_on_in_training_and_off_in_the_average():
    network = UNet(1, 28, **NETWORK)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    average = Ema(network, 0.999)
    xt, t = torch.randn(1, 1, 28, 28), torch.tensor([5])
    average.train()
    assert torch.equal(average(xt, t), average(xt, t))
    assert not any(module.training for module in average.modules())
    assert network.training
    assert not torch.equal(network(xt, t), network(xt, t))


def test_ema_warms_up():
    network = nn.Linear(1, 1, bias=False)
    average = Ema(network, 0.9999)
    expected = None
    for n in range(20):
        nn.init.constant_(network.weight, float(n))
        average.update_parameters(network)
        decay = min(0.9999, (1 + n) / (10 + n))
        expected = float(n) if n == 0 else decay * expected + (1 - decay) * n
        assert average.module.weight.item() == pytest.approx(expected, rel=1e-5)
    assert expected > 10  # without the warm-up it would still be near 0
    with pytest.raises(UserError):
        Ema(network, 1.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_groups": 3}, "8 channels cannot be divided into 3 groups"),
        ({"image_size": 2, "multipliers": [1, 1, 1]}, "cannot be halved 2 times"),
        ({"num_heads": 3}, "among 3 attention heads"),
        ({"attention_resolutions": [5]}, "feature maps of size 28, 14"),
        ({"num_blocks": 0}, "num_blocks is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"channels": 0}, "0 channels"),
    ],
)
def test_networks_that_cannot_be_built_are_refused(change, words):
    with pytest.raises(UserError, match=words):
        UNet(**{"image_channels": 1, "image_size": 28, **NETWORK, **change})


def test_each_third_of_the_attention_layer_has_glorots_deviation():
    """As the authors' three layers: √(2 / (fan_in + fan_out)), not that of one layer three times
    as wide."""
    layer = SelfAttention(256, 1, 32)
    layer.apply(initialise)
    for third in layer.qkv.weight.chunk(3):
        assert third.std().item() == pytest.approx(math.sqrt(2 / 512), rel=0.01)
    assert not layer.qkv.bias.any()
    assert not layer.out.weight.any()
