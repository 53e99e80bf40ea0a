"""Lesson 9's network against the official one."""

import math

from common.errors import UserError
from lesson_09.unet import ResidualBlock, SelfAttention, UNet, Upsample, timestep_embedding

import pytest
import torch
import yaml
from diffusers_unet import assert_equal_outputs, copy_weights, perturb
from helpers import NETWORK, ROOT
from torch import Tensor, nn


def test_parameter_counts_of_the_paper():
    preset = ROOT / "lesson_09" / "configs" / "paper.yaml"
    arguments = yaml.safe_load(preset.read_text())["network"]
    for image_channels, count in [(3, 52_546_438), (1, 52_539_522)]:
        with torch.device("meta"):
            network = UNet(image_channels, 32, True, **arguments)
        assert sum(p.numel() for p in network.parameters()) == count


def test_network_equals_the_official_one_layer_for_layer():
    """Every layer has its counterpart in diffusers' model, in a small official configuration."""
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
    perturb(theirs, 0.05)
    ours = UNet(3, 32, True, channels=16, num_blocks=2, num_groups=4, num_heads=4).eval()

    def join(qkv: list[Tensor]) -> Tensor:
        """Four heads of 8 channels: ours holds q, k and v of each head in turn."""
        return torch.stack([part.unflatten(0, (4, 8)) for part in qkv], 1).flatten(0, 2)

    copy_weights(theirs, ours, join)
    assert_equal_outputs(ours, theirs, (1, 500, 4000))


def test_attention_equals_scaled_dot_product_attention():
    layer = SelfAttention(12, num_heads=3, num_groups=2)
    nn.init.normal_(layer.out.weight)
    h = torch.randn(2, 12, 4, 4)
    pixels = layer.qkv(layer.norm(h).flatten(2).transpose(1, 2))
    q, k, v = pixels.unflatten(2, (3, 3, 4)).permute(3, 0, 2, 1, 4)
    y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    expected = h + layer.out(y).transpose(1, 2).unflatten(2, (4, 4))
    assert torch.allclose(layer(h), expected, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 7)])
def test_upsampling_equals_nearest_neighbour_and_a_convolution(size):
    layer = Upsample(6).double()
    h = torch.randn(2, 6, *size, dtype=torch.float64, requires_grad=True)
    out, expected = layer(h), layer.nearest_then_conv(h)
    torch.testing.assert_close(out, expected)
    inputs, g = [h, *layer.parameters()], torch.randn_like(out)
    gradients = (torch.autograd.grad(y, inputs, g) for y in (out, expected))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_embedding_is_cosines_then_sines_of_t_minus_one():
    emb = timestep_embedding(torch.tensor([1, 11]), 8)
    assert torch.equal(emb[0], torch.tensor([1.0] * 4 + [0.0] * 4))
    expected = [math.sin(10 * 10_000 ** (-i / 4)) for i in range(4)]
    assert torch.allclose(emb[1, 4:], torch.tensor(expected), atol=1e-6)


def test_the_time_is_scaled_before_it_is_embedded_and_by_1_not_changed_at_all():
    t = torch.tensor([1, 2, 2000, 4000])
    frequency = torch.exp(-math.log(10_000) / 4 * torch.arange(4.0))
    for time_scale in (0.25, 1.0):
        angle = torch.tensor([0, 1, 1999, 3999])[:, None] * time_scale * frequency
        expected = torch.cat([angle.cos(), angle.sin()], dim=1)
        assert torch.equal(timestep_embedding(t, 8, time_scale), expected)
    angle = (t - 1)[:, None] * frequency  # whole numbers, as before there was a scale
    assert torch.equal(timestep_embedding(t, 8), torch.cat([angle.cos(), angle.sin()], dim=1))
    torch.manual_seed(0)
    plain = UNet(1, 28, True, **NETWORK)
    nn.init.normal_(plain.conv_out.weight)
    scaled = UNet(1, 28, True, time_scale=0.25, **NETWORK)
    scaled.load_state_dict(plain.state_dict())
    xt = torch.randn(1, 1, 28, 28)
    scaled.eval()
    plain.eval()
    assert torch.equal(scaled(xt, torch.tensor([401])), plain(xt, torch.tensor([101])))


@pytest.mark.parametrize(
    ("image_channels", "learned", "out_channels"), [(1, True, 2), (3, True, 6), (3, False, 3)]
)
def test_output_is_noise_and_v_in_the_size_of_the_image(image_channels, learned, out_channels):
    network = UNet(image_channels, 28, learned, **NETWORK | {"attention_resolutions": []})
    xt, t = torch.randn(2, image_channels, 26, 30), torch.tensor([5, 9])
    out = network(xt, t)
    assert out.shape == (2, out_channels, 26, 30)
    assert out.dtype == torch.float32
    assert (out == 0).all()  # a new network: no noise, a variance halfway between the two


def test_initial_weights_are_those_of_the_authors():
    """PyTorch's defaults, uniform up to 1/√(fan in), and zeros where a block or the network ends.
    q, k and v in one layer have the same fan in as each alone."""
    network = UNet(1, 28, True, **NETWORK | {"channels": 32})
    zero = [network.conv_out]
    for module in network.modules():
        zero += [module.conv2] if isinstance(module, ResidualBlock) else []
        zero += [module.out] if isinstance(module, SelfAttention) else []
    for layer in network.modules():
        if layer in zero:
            assert not layer.weight.any()
            assert not layer.bias.any()
        elif isinstance(layer, nn.Conv2d | nn.Linear):
            bound = layer.weight[0].numel() ** -0.5
            assert layer.weight.abs().max() <= bound
            assert layer.bias.abs().max() <= bound
            assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_padding_is_zero_around_the_image():
    wide = {"multipliers": [1, 2, 2, 2], "attention_resolutions": []}
    network = UNet(1, 28, True, **NETWORK | wide).eval()
    nn.init.normal_(network.conv_out.weight)
    xt, t = torch.randn(1, 1, 28, 28), torch.tensor([9])
    padded = nn.functional.pad(xt, (2, 2, 2, 2))
    assert torch.equal(network(xt, t), network(padded, t)[..., 2:-2, 2:-2])


@pytest.mark.parametrize("scale_shift_norm", [True, False])
def test_every_weight_learns(scale_shift_norm):
    network = UNet(1, 28, True, scale_shift_norm=scale_shift_norm, **NETWORK)
    t = torch.tensor([3, 4])
    for _ in range(4):  # layers that start at zero begin to learn one by one, from the last
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
def test_networks_that_cannot_be_built_are_refused(change, words):
    shape = {"image_channels": 1, "image_size": 28, "learned_variance": True}
    with pytest.raises(UserError, match=words):
        UNet(**{**shape, **NETWORK, **change})
