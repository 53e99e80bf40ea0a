"""Lesson 2's network."""

import inspect

from common.errors import UserError
from lesson_02.dpm import DPM, bumps, erasing_beta
from lesson_02.network import ConvDense, MultiScaleConv, initialise, output_sizes

import pytest
import torch
from helpers_02 import NETWORK


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("paths", [{}, {"num_conv_layers": 0}, {"num_dense_layers": 0}])
def test_output_of_a_new_network_is_zero_and_all_parameters_have_gradients(channels, paths):
    network = ConvDense(channels, 28, 50, **NETWORK | paths)
    xt, t = torch.randn(1, channels, 28, 28), torch.tensor([7])
    out = network(xt, t)
    assert out.shape == (1, 2 * channels, 28, 28)
    assert out.dtype == torch.float32
    assert (out == 0).all()
    torch.nn.init.normal_(network.readouts[-1].weight)
    network(torch.randn(4, channels, 28, 28), torch.tensor([1, 2, 9, 50])).square().sum().backward()
    untrained = [name for name, p in network.named_parameters() if not p.grad.any()]
    assert untrained == []


def test_the_time_enters_only_through_the_bumps():
    network = ConvDense(1, 28, 1000, **NETWORK)
    torch.nn.init.normal_(network.readouts[-1].weight)
    xt = torch.randn(1, 1, 28, 28)
    with torch.no_grad():
        out = network(xt.expand(1000, 1, 28, 28)[::50], torch.arange(1, 1001, 50))
    rank = torch.linalg.matrix_rank(out.flatten(1).double(), rtol=1e-5)
    assert rank <= 10
    assert rank >= 9


def test_each_coefficient_is_weighted_by_its_bump():
    network = ConvDense(2, 28, 40, **NETWORK)
    bias = torch.randn(4, 10)
    network.readouts[-1].bias.data.copy_(bias.flatten())
    t = torch.tensor([1, 2, 17, 40])
    with torch.no_grad():
        out = network(torch.randn(4, 2, 28, 28), t)
    expected = bumps(40)[t] @ bias.T
    assert torch.allclose(out, expected[:, :, None, None].expand_as(out), atol=1e-5)


def test_log_bumps_change_what_the_last_layer_is_multiplied_by_and_no_parameter():
    network = ConvDense(2, 28, 40, **NETWORK, log_bumps=True)
    assert network.state_dict().keys() == ConvDense(2, 28, 40, **NETWORK).state_dict().keys()
    bias = torch.randn(4, 10)
    network.readouts[-1].bias.data.copy_(bias.flatten())
    t = torch.tensor([1, 2, 17, 40])
    with torch.no_grad():
        out = network(torch.randn(4, 2, 28, 28), t)
    mu, b = (bumps(40, log_bumps=True)[t] @ bias.T).chunk(2, dim=1)
    expected = torch.cat([mu / t[:, None] ** 0.5, b * 40**0.5 / t[:, None]], 1)
    assert torch.allclose(out, expected[:, :, None, None].expand_as(out), atol=1e-5)


def test_the_units_of_the_outputs_are_what_a_perfect_network_answers_for_known_data():
    """If x0 is known, p is the posterior: its μ has the size of the unit, and b is minus its unit,
    except near T, where β_t is no longer small."""
    process, t = DPM(erasing_beta(1000)), torch.tensor([2, 3, 10, 100, 500, 900])
    r, x0, eps = process.rates(), *torch.randn(2, 6, 1, 100, 100)
    xt = process.q_sample(x0, t, eps)
    q = process.q_posterior(x0, xt, t)
    mu = (q.mean - r.decay[t] * xt) / r.spread[t]
    b = 1000**0.5 * (q.log_var.exp().logit() - r.log_odds[t])
    sizes = output_sizes(1000)[t]
    ratio = mu.square().mean((1, 2, 3)).sqrt() / sizes[:, 0, 0, 0]
    assert torch.allclose(ratio, torch.ones(6), atol=0.2)
    assert torch.allclose(-b.mean((1, 2, 3)) / sizes[:, 1, 0, 0], torch.ones(6), atol=0.25)


def test_features_keep_their_size_from_layer_to_layer():
    for num_scales in (1, 2, 3):
        h = torch.randn(8, 4, 28, 28)
        for _ in range(6):
            conv = MultiScaleConv(h.shape[1], 32, num_scales, 3).apply(initialise)
            h = torch.nn.functional.leaky_relu(conv(h), 0.05)
        assert 0.2 < h.square().mean().sqrt() < 3


def test_scales_are_pooled_convolved_enlarged_and_added():
    conv = MultiScaleConv(1, 1, 2, 1)
    for layer, weight in zip(conv.convs, (2.0, 3.0), strict=True):
        torch.nn.init.constant_(layer.weight, weight)
        torch.nn.init.zeros_(layer.bias)
    h = torch.randn(1, 1, 4, 4)
    means = h.view(2, 2, 2, 2).mean((1, 3)).repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.allclose(conv(h)[0, 0], 2 * h[0, 0] + 3 * means, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_conv_layers": 0, "num_dense_layers": 0}, "no layers"),
        ({"num_scales": 4}, "num_scales is 4"),
        ({"num_scales": 0}, "num_scales is 0"),
        ({"kernel_size": 4}, "kernel_size is 4"),
        ({"conv_channels": 0}, "conv_channels is 0"),
        ({"num_readout_layers": 0}, "num_readout_layers is 0"),
    ],
)
def test_impossible_networks_are_refused(change, words):
    with pytest.raises(UserError, match=words):
        ConvDense(1, 28, 1000, **change)


def test_arguments_that_the_script_knows_have_no_default():
    parameters = inspect.signature(ConvDense).parameters
    for name in ("image_channels", "image_size", "num_timesteps"):
        assert parameters[name].default is inspect.Parameter.empty


def test_outputs_and_reverse_steps_are_float32_under_autocast():
    network = ConvDense(1, 28, 50, **NETWORK)
    torch.nn.init.normal_(network.readouts[-1].weight)
    process, xt, t = DPM(erasing_beta(50)), torch.randn(3, 1, 28, 28), torch.tensor([2, 9, 50])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = network(xt, t)
        p = process.p_mean_variance(out, xt, t)
    assert out.dtype == p.mean.dtype == p.log_var.dtype == torch.float32
    assert not torch.equal(out, out.bfloat16().float())  # the bumps are mixed in float32
