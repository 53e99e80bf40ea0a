"""The swiss roll of lesson 2."""

import math

from common.errors import UserError
from lesson_02 import swiss_roll
from lesson_02.dpm import L_NULL

import pytest
import torch
from PIL import Image


def test_geometric_schedule_multiplies_noise_to_signal():
    beta = swiss_roll.geometric_beta(40, 0.001)
    bar = (1 - beta).cumprod(0)
    ratio = (1 - bar) / bar
    assert beta[0].item() == pytest.approx(0.001)
    assert ratio[-1].item() == pytest.approx(100)
    assert torch.allclose(ratio[1:] / ratio[:-1], ratio[1:2] / ratio[:1])
    for bad in [(1, 0.001), (40, 0.0), (40, 1.0)]:
        with pytest.raises(UserError, match="no schedule has"):
            swiss_roll.geometric_beta(*bad)


def test_the_roll_has_mean_zero_and_variance_one():
    points = swiss_roll.roll(50_000, 0.1)
    assert points.shape == (50_000, 2, 1, 1)
    assert points.mean((0, 2, 3)).abs().max() < 0.02
    assert points.square().mean().item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(("noise", "beta_1"), [(0.02, 0.01), (0.49, 0.5)])
def test_entropy_by_quadrature_equals_monte_carlo(noise, beta_1):
    """-E log2 p(X1), with p summed over points of the roll."""
    var = (1 - beta_1) * noise**2 + beta_1
    on_roll = swiss_roll.curve(torch.linspace(*swiss_roll.TURNS, 1500).double(), noise)
    centres = math.sqrt(1 - beta_1) * on_roll
    x1 = math.sqrt(1 - beta_1) * swiss_roll.roll(4000, noise).view(-1, 2).double()
    x1 += math.sqrt(beta_1) * torch.randn(4000, 2)
    log_p = (-torch.cdist(x1, centres).square() / (2 * var)).logsumexp(1)
    log_p -= math.log(1500) + math.log(2 * math.pi * var)
    bits = -log_p / math.log(2)
    expected, error = bits.mean().item(), bits.std().item() / math.sqrt(4000)
    assert swiss_roll.entropy_bits(noise, beta_1) == pytest.approx(expected, abs=4 * error + 0.01)


def test_radial_network_has_a_readout_for_each_time():
    network = swiss_roll.RadialNetwork(10, swiss_roll.roll(6, 0.1))
    torch.nn.init.normal_(network.readout)
    xt, t = torch.randn(3, 2, 1, 1), torch.tensor([1, 5, 10])
    out = network(xt, t)
    assert out.shape == (3, 4, 1, 1)
    offset = (xt.view(3, 1, 2) - network.centre) / network.log_width.exp()[:, None]
    h = torch.softmax(-offset.square().sum(2) / 2, 1)
    for k in range(3):
        assert torch.allclose(out[k].flatten(), network.readout[t[k]] @ h[k], atol=1e-5)


def test_swiss_roll_learns_and_prints_its_bound(tmp_path, capsys):
    settings = {"num_timesteps": 8, "num_units": 32, "num_training_steps": 150, "noise": 0.1}
    settings |= {"num_points": 50, "num_bound_points": 500, "beta_1": 0.02, "learned_beta": True}
    settings |= {"batch_size": 128, "learning_rate": 0.05}
    options = swiss_roll.Options(**settings, output_dir=str(tmp_path), device="cpu")
    swiss_roll.main(options)
    out = capsys.readouterr().out
    k, limit = (float(out.split(word)[1].split()[0]) for word in ("K - L_null =", "at most"))
    gain_limit = float(out.split("K - L_null")[1].split("at most")[1].split()[0])
    assert 0.1 < k < gain_limit
    assert limit == pytest.approx(gain_limit + 2 * L_NULL, abs=2e-3)
    with Image.open(tmp_path / "swiss_roll.png") as image:
        assert min(image.size) > 400
