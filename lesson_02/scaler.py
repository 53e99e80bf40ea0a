"""The data as in the paper: images with mean 0 and variance 1."""

import math
from typing import NamedTuple

from common.errors import UserError
from lesson_02.dpm import Number

import torch
from torch import Tensor


class Scaler(NamedTuple):
    """Turns images into data of mean 0 and variance 1, and back.

    mean, std: one number each for all pixels, on the scale of the levels 0..255.
    """

    mean: float
    std: float

    @classmethod
    def fit(cls, levels: Tensor) -> "Scaler":
        """The scaler of a data set (N, C, H, W) of levels 0..255."""
        count = torch.bincount(levels.flatten(), minlength=256).double()
        value, frequency = torch.arange(256.0, dtype=torch.float64), count / count.sum()
        mean = (frequency * value).sum()
        std = (frequency * (value - mean) ** 2).sum().sqrt()
        if std == 0:
            raise UserError(
                "all training images have the same grey value: they cannot be standardised"
            )
        return cls(mean.item(), std.item())

    def encode(self, images: Tensor, dequantize: bool = True) -> Tensor:
        """x0 from images in [-1, 1]: add uniform noise of one level's width, then standardise
        [SD15, the code].

        x0 = (level + u - mean) / std,  u ~ U(-½, ½)

        Without u the data are discrete. A density can then be arbitrarily large on the 8-bit grid,
        so that only the noise of the first step, β_1, limits K.
        """
        levels = images * 127.5 + 127.5
        if dequantize:
            levels = levels + torch.rand_like(levels) - 0.5
        return (levels - self.mean) / self.std

    def decode(self, x0: Tensor) -> Tensor:
        """Images in [-1, 1] from x0."""
        return (x0 * self.std + self.mean) / 127.5 - 1

    def bits_per_level(self, bits_per_dim: Number) -> Number:
        """Bits per dimension of the 8-bit images, from those of x0.

        The probability of a level is the integral of the density of x0 over the level's width,
        1/std. By Jensen's inequality, a level costs at most log2(std) bits more than x0.
        """
        return math.log2(self.std) + bits_per_dim
