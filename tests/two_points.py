"""Data for which the best estimate of the noise is known."""

from lesson_05.ddpm import DDPM

from torch import Tensor


class TwoPoints:
    """The exact E[ε | xt] where each pixel is N(m, s²) or N(-m, s²), with equal probability."""

    def __init__(self, process: DDPM, m: float, s: float) -> None:
        self.bar, self.m, self.s = process.alpha_bar, m, s

    def __call__(self, xt: Tensor, t: Tensor) -> Tensor:
        bar = self.bar[t].view(-1, 1, 1, 1)
        variance = bar * self.s**2 + 1 - bar
        sign = (bar.sqrt() * self.m * xt / variance).tanh()  # E[sign of the pixel's mean | xt]
        return (1 - bar).sqrt() * (xt - bar.sqrt() * self.m * sign) / variance
