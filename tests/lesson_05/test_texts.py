"""What lesson 5's README says, beyond its equations."""

import re

from lesson_05 import break_it
from lesson_05.ddpm import DDPM, linear_beta

import pytest
import torch
from helpers import ROOT

FOLDER = ROOT / "lesson_05"


def test_the_lines_beside_the_papers_algorithms_are_in_the_code():
    code = "".join((FOLDER / name).read_text() for name in ("train_mnist.py", "ddpm.py"))
    tables = (
        (FOLDER / "README.md").read_text().split("### Algorithms 1 and 2")[1].split("\n### ")[0]
    )
    lines = re.findall(r"^\|.*\| `(.*?)`", tables, re.MULTILINE)
    assert len(lines) == 13
    assert not [line for line in lines if line not in code]


def test_without_noise_every_sample_is_the_mean():
    """Data N(0, 1), whose best prediction of the noise is √(1-ᾱ_t) xt: the steps' means shrink x_T
    by √ᾱ_T, and with noise the variance stays 1."""
    beta = linear_beta(200)
    process, broken = DDPM(beta, "beta"), break_it.NoNoise(beta, "beta")

    def network(xt, t):
        return process.noise_rate[t] * xt

    torch.manual_seed(0)
    x_T = torch.randn(5000, 1, 1, 2)
    without = broken.sample(network, x_T, clip_x0=False)
    assert torch.allclose(without, process.signal_rate[200] * x_T, atol=1e-5)
    assert without.std() < 0.01
    assert process.sample(network, x_T, clip_x0=False).std() == pytest.approx(1, abs=0.03)


def test_the_numbers_of_the_schedule_in_the_text():
    process, beta = DDPM(linear_beta(1000)), torch.cat([torch.zeros(1), linear_beta(1000)])
    alpha_bar, alpha = process.alpha_bar, 1 - beta
    var = process.log_var.flatten().exp()  # β_t, and β̃_2 at t = 1

    weight = beta**2 / (2 * alpha * (1 - alpha_bar))  # of Eq. 12, times σ_t²
    assert [round(float(weight[t] / beta[t]), 2) for t in (1, 2, 10)] == [0.5, 0.27, 0.07]
    assert round(float(weight[1] / var[1]), 2) == 0.92
    late = (weight / beta)[100:]
    assert round(float(late.min()), 3) == 0.005
    assert round(float(late.max()), 2) == 0.01
    coefs = process.posterior_x0_coef.flatten(), process.posterior_xt_coef.flatten()
    assert [round(float(coef[500]), 3) for coef in coefs] == [0.003, 0.994]
    assert [round(float(coef[2]), 2) for coef in coefs] == [0.55, 0.45]
    assert round(float(alpha_bar[1] / (1 - alpha_bar[1]))) == 9999
    assert [round(float(alpha_bar[t]), 3) for t in (500, 750)] == [0.079, 0.003]
    assert round(float((alpha_bar[900] / alpha_bar[1000]).sqrt()), 1) == 2.6
