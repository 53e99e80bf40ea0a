"""The network of Sohl-Dickstein et al. 2015: convolutions at several scales beside dense layers,
then one small perceptron for every pixel [SD15 Appendix D.2].

It is not told the time: it answers, for each pixel, ten coefficients of the mean and ten of the
variance, and the ten bumps along the time turn these into one of each.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from common.errors import UserError
from lesson_02.dpm import NUM_BUMPS, bumps

SLOPE = 0.05  # of the leaky ReLU below zero


def leaky(h: Tensor) -> Tensor:
    """Differs: the paper has soft ReLUs and tanh; this is the authors' code."""
    return F.leaky_relu(h, SLOPE)


class MultiScaleConv(nn.Module):
    """The image at full, half, quarter, ... size, each by its own convolution, enlarged again and
    added up [SD15 Appendix D.2].

    h (B, in_channels, H, W) -> (B, out_channels, H, W); H and W divisible by 2^(num_scales - 1).
    """

    def __init__(
        self, in_channels: int, out_channels: int, num_scales: int, kernel_size: int
    ) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
            for _ in range(num_scales)
        )

    def forward(self, h: Tensor) -> Tensor:
        """Each scale convolved; then, from the coarsest on, enlarged and added to the next."""
        sizes = [F.avg_pool2d(h, 2**scale) if scale > 0 else h for scale in range(len(self.convs))]
        scales = [conv(small) for conv, small in zip(self.convs, sizes, strict=True)]
        total = scales.pop()
        while scales:
            total = scales.pop() + F.interpolate(total, scale_factor=2.0, mode="nearest")
        return total


class ConvDense(nn.Module):
    """out = ConvDense(xt, t): xt (B, C, H, W), t (B,) -> (B, 2C, H, W), float32: μ, then b.

    Either of the two paths may be left out (0 layers), not both.

    Args:
        image_channels: 1 for grey, 3 for colour.
        image_size: height and width of the images, in pixels.
        num_timesteps: T, over which the bumps are spread.
        num_conv_layers: multi-scale convolutions, one after the other.
        conv_channels: feature maps of each.
        num_scales: 1 for the full image only, 2 for the half as well, ...
        kernel_size: of the convolutions, odd.
        num_dense_layers: layers that see the whole image at once.
        dense_channels: units of each but the last.
        dense_outputs: units of the last one, for each pixel.
        num_readout_layers: layers of each pixel's own perceptron, which is the same for all.
        readout_channels: units of each but the last.
    """

    bumps: Tensor  # g_j(t), (T+1, 10)

    def __init__(
        self,
        image_channels: int = 1,
        image_size: int = 28,
        num_timesteps: int = 1000,
        num_conv_layers: int = 4,
        conv_channels: int = 20,
        num_scales: int = 1,
        kernel_size: int = 3,
        num_dense_layers: int = 4,
        dense_channels: int = 500,
        dense_outputs: int = 2,
        num_readout_layers: int = 2,
        readout_channels: int = 20,
    ) -> None:
        super().__init__()
        named = {"conv_channels": conv_channels, "dense_channels": dense_channels}
        named |= {"dense_outputs": dense_outputs, "readout_channels": readout_channels}
        check_sizes(**named, num_readout_layers=num_readout_layers)
        check_network(num_conv_layers, num_dense_layers, num_scales, kernel_size, image_size)
        convs = [image_channels] + [conv_channels] * num_conv_layers
        self.convs = nn.ModuleList(
            MultiScaleConv(before, after, num_scales, kernel_size)
            for before, after in pairwise(convs)
        )
        pixels = image_size**2
        denses = [image_channels * pixels] + [dense_channels] * (num_dense_layers - 1)
        denses += [dense_outputs * pixels] if num_dense_layers else []
        self.denses = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(denses))
        features = (conv_channels if self.convs else 0) + (dense_outputs if self.denses else 0)
        readouts = [features] + [readout_channels] * (num_readout_layers - 1)
        readouts += [2 * image_channels * NUM_BUMPS]
        self.readouts = nn.ModuleList(
            nn.Conv2d(*pair, kernel_size=1) for pair in pairwise(readouts)
        )
        self.register_buffer("bumps", bumps(num_timesteps), persistent=False)
        self.apply(initialise)
        for parameter in self.readouts[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, xt: Tensor, t: Tensor) -> Tensor:
        paths = []
        if self.convs:
            h = xt
            for conv in self.convs:
                h = leaky(conv(h))
            paths.append(h)
        if self.denses:
            h = xt.flatten(1)
            for dense in self.denses:
                h = leaky(dense(h))
            height, width = xt.shape[-2:]
            paths.append(rearrange(h, "b (k h w) -> b k h w", h=height, w=width))
        y = torch.cat(paths, dim=1)
        for readout in self.readouts[:-1]:
            y = leaky(readout(y))
        y = rearrange(self.readouts[-1](y), "b (k j) h w -> b k j h w", j=NUM_BUMPS)
        return einsum(y.float(), self.bumps[t], "b k j h w, b j -> b k h w")


def initialise(layer: nn.Module) -> None:
    """Weights that keep the size of what passes through: variance 2/(1 + slope²) over the number of
    all inputs that are added up, those of every scale among them; biases zero."""
    if isinstance(layer, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(layer.weight, a=SLOPE)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    if isinstance(layer, MultiScaleConv):
        for parameter in layer.parameters():  # `apply` has been at its convolutions before
            parameter.data /= len(layer.convs) ** 0.5


def check_network(
    num_conv_layers: int, num_dense_layers: int, num_scales: int, kernel_size: int, image_size: int
) -> None:
    """Refuse, in one line, a network that cannot be built."""
    if num_conv_layers < 1 and num_dense_layers < 1:
        raise UserError("a network of no layers: give network.num_conv_layers or num_dense_layers")
    if num_scales < 1 or image_size % 2 ** (num_scales - 1):
        raise UserError(
            f"network.num_scales is {num_scales}: a {image_size}x{image_size} image cannot be "
            f"halved {num_scales - 1} times"
        )
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise UserError(f"network.kernel_size is {kernel_size}: it must be odd")


def check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise UserError(f"network.{name} is {value}: it must be at least 1")
