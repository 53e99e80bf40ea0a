"""How lesson 2 standardises and dequantises images, and bits per dimension of 8-bit levels."""

import math

from common.errors import UserError
from lesson_02.dpm import L_NULL, k_minus_null
from lesson_02.scaler import Scaler

import pytest
import torch


def test_standardised_data_have_mean_zero_and_variance_one():
    levels = torch.randint(0, 256, (50, 1, 8, 8), dtype=torch.uint8) // 3
    scaler = Scaler.fit(levels)
    images = levels.float() / 127.5 - 1
    x0 = scaler.encode(images, dequantize=False)
    assert x0.mean().item() == pytest.approx(0, abs=1e-4)
    assert x0.var(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert torch.allclose(scaler.decode(x0), images, atol=1e-5)
    with pytest.raises(UserError, match="the same grey value"):
        Scaler.fit(torch.full((2, 1, 4, 4), 7, dtype=torch.uint8))


def test_dequantisation_spreads_a_level_over_its_width():
    scaler = Scaler(33.3, 78.6)
    images = torch.full((1, 1, 200, 200), 10 / 127.5 - 1)
    levels = scaler.encode(images) * 78.6 + 33.3
    assert 9.5 - 1e-3 <= levels.min() < 9.51
    assert 10.49 < levels.max() <= 10.5 + 1e-3
    assert levels.mean().item() == pytest.approx(10, abs=0.01)
    assert levels.var().item() == pytest.approx(1 / 12, rel=0.02)
    whole = scaler.encode(images, dequantize=False) * 78.6 + 33.3
    assert torch.allclose(whole, torch.tensor(10.0), atol=1e-4)


def test_bits_per_dim_of_a_gaussian_model():
    """Its bound is -L_null: then a level costs -log2 of its density under N(mean, std²)."""
    scaler = Scaler(100.0, 20.0)
    levels = 100 + 20 * torch.randn(200_000, dtype=torch.float64)
    density = torch.distributions.Normal(100.0, 20.0).log_prob(levels) / math.log(2)
    assert scaler.bits_per_level(-L_NULL) == pytest.approx(-density.mean().item(), abs=0.01)
    assert k_minus_null(-L_NULL - 2.0, channels=3) == pytest.approx(3 * 2.0)
    assert Scaler(33.32, 78.57).bits_per_level(-L_NULL) == pytest.approx(8.34, abs=5e-3)


def test_real_mnist_has_the_constant_of_the_readme(real_mnist):
    scaler = Scaler.fit(real_mnist.train)
    assert scaler.mean == pytest.approx(33.318, abs=1e-2)
    assert scaler.std == pytest.approx(78.567, abs=1e-2)
    assert scaler.bits_per_level(-L_NULL) == pytest.approx(8.34, abs=5e-3)
