"""What several tests of lesson 2 share: the exact network for Gaussian data, and a tiny run."""

import math
from pathlib import Path
from typing import Any

from lesson_02 import train_mnist
from lesson_02.dpm import DPM
from lesson_02.options import DPMOptions

import torch
from helpers import TINY_RUN
from torch import Tensor

NETWORK = {
    "num_conv_layers": 2,
    "conv_channels": 4,
    "num_scales": 3,
    "num_dense_layers": 2,
    "dense_channels": 8,
    "readout_channels": 6,
}


class GaussianOracle:
    """The exact reverse steps for data whose values are N(m, s²), as the network's (μ, b)."""

    def __init__(self, process: DPM, m: float = 0.0, s: float = 1.0) -> None:
        self.beta, self.m, self.s = process.beta().detach(), m, s
        one = torch.ones(1, dtype=torch.float64)
        self.bar = torch.cat([one, (1 - self.beta).cumprod(0)])
        steps = [(1.0, 0.0, 1.0), *(self.step(t) for t in range(1, len(self.beta) + 1))]
        self.steps = torch.tensor(steps, dtype=torch.float64)

    def moments(self, t: int) -> tuple[float, float]:
        """Mean and variance of q(xt)."""
        bar = self.bar[t].item()
        return math.sqrt(bar) * self.m, bar * self.s**2 + 1 - bar

    def step(self, t: int) -> tuple[float, float, float]:
        """q(x_{t-1} | xt) = N(a xt + c, variance)."""
        beta = self.beta[t - 1].item()
        (mean, var), (mean_prev, var_prev) = self.moments(t), self.moments(t - 1)
        a = math.sqrt(1 - beta) * var_prev / var
        return a, mean_prev - a * mean, beta * var_prev / var

    def __call__(self, xt: Tensor, t: Tensor) -> Tensor:
        a, c, var = self.steps[t].T.reshape(3, -1, 1, 1, 1)
        beta = self.beta[t - 1].view(-1, 1, 1, 1)
        mu = ((a - (1 - beta).sqrt()) * xt.double() + c) / beta.sqrt()
        b = math.sqrt(len(self.beta)) * (var.logit() - beta.logit()).expand_as(mu)
        return torch.cat([mu, b], 1).float()


def zero(xt: Tensor, t: Tensor) -> Tensor:
    """A network whose output is 0."""
    return torch.zeros_like(torch.cat([xt, xt], 1))


def train(folder: Path, **changes: Any) -> Path:
    """A tiny run on scikit-learn's digits; returns its folder."""
    tiny = {"num_timesteps": 20, "num_warmup_steps": 2, "num_bound_images": 20}
    options = {**TINY_RUN, **tiny, **changes}
    train_mnist.main(DPMOptions(output_dir=str(folder), **options), NETWORK)
    return folder
