"""The network of Sohl-Dickstein et al. 2015: convolutions at several scales beside dense layers,
then one small perceptron for every pixel [SD15 Appendix D.2].

The time is not an input of the layers. For each pixel they output ten coefficients of the mean and
ten of the variance. Ten bumps over the time mix these into one mean and one variance.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

from common.errors import UserError, check_at_least
from common.network_checks import height_and_width
from lesson_02.dpm import NUM_BUMPS, bumps

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

SLOPE = 0.05  # of the leaky ReLU below zero


def leaky(h: Tensor) -> Tensor:
    """Leaky ReLU. Differs: as in the authors' code; the paper has soft ReLUs and tanh."""
    return F.leaky_relu(h, SLOPE)


class MultiScaleConv(nn.Module):
    """Convolves the image at full, half, quarter, ... size separately, enlarges the results and
    adds them up [SD15 Appendix D.2].

    h (B, in_channels, H, W) -> (B, out_channels, H, W); H and W divisible by 2^(num_scales - 1).
    Differs: in the authors' code each scale has its own leaky ReLU, and the scales are averaged.
    Here they are added, and one leaky ReLU follows.
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
        sizes = [F.avg_pool2d(h, 2**scale) if scale > 0 else h for scale in range(len(self.convs))]
        scales = [conv(small) for conv, small in zip(self.convs, sizes, strict=True)]
        total = scales.pop()  # from the coarsest on: enlarge the sum and add the next scale
        while scales:
            total = scales.pop() + F.interpolate(total, scale_factor=2.0, mode="nearest")
        return total


class ConvDense(nn.Module):
    """Convolutions at several scales beside dense layers: out = ConvDense(xt, t).

    xt (B, C, H, W), t (B,) -> out (B, 2C, H, W), float32: μ, then b.

    Either path, convolutions or dense layers, can be omitted by giving it 0 layers.

    Differs: in the authors' code the output of each path is divided by the square root of its
    number of features, √20 and √2, before the two are concatenated.

    Args:
        image_channels: 1 for grey, 3 for colour.
        image_size: height and width of the images, in pixels, or one number for both.
        num_timesteps: T, over which the bumps are spread.
        num_conv_layers: multi-scale convolutions, one after the other.
        conv_channels: feature maps of each.
        num_scales: 1 for the full image only, 2 for the half as well, ...
        kernel_size: of the convolutions, odd.
        num_dense_layers: layers that see the whole image.
        dense_channels: units of each but the last.
        dense_outputs: units of the last one, for each pixel.
        num_readout_layers: layers of the perceptron, which is the same for every pixel.
        readout_channels: units of each but the last.
        log_bumps: whether half of the bumps are spaced evenly in log t, and μ and b are given in
            units of `output_sizes`.
    """

    bumps: Tensor  # g_j(t), (T+1, 10)
    sizes: Tensor  # of μ and b, (T+1, 2, 1, 1)

    def __init__(
        self,
        image_channels: int,
        image_size: int | Sequence[int],
        num_timesteps: int,
        num_conv_layers: int = 4,
        conv_channels: int = 20,
        num_scales: int = 1,
        kernel_size: int = 3,
        num_dense_layers: int = 4,
        dense_channels: int = 500,
        dense_outputs: int = 2,
        num_readout_layers: int = 2,
        readout_channels: int = 20,
        log_bumps: bool = False,
    ) -> None:
        super().__init__()
        widths = {"conv_channels": conv_channels, "dense_channels": dense_channels}
        widths |= {"dense_outputs": dense_outputs, "readout_channels": readout_channels}
        widths |= {"num_readout_layers": num_readout_layers}
        check_at_least(1, **{f"network.{name}": value for name, value in widths.items()})
        check_network(num_conv_layers, num_dense_layers, num_scales, kernel_size, image_size)
        convs = [image_channels] + [conv_channels] * num_conv_layers
        self.convs = nn.ModuleList(
            MultiScaleConv(*widths, num_scales, kernel_size) for widths in pairwise(convs)
        )
        pixels = math.prod(height_and_width(image_size))
        denses = [image_channels * pixels] + [dense_channels] * (num_dense_layers - 1)
        denses += [dense_outputs * pixels] if num_dense_layers else []
        self.denses = nn.ModuleList(nn.Linear(*widths) for widths in pairwise(denses))
        features = (conv_channels if self.convs else 0) + (dense_outputs if self.denses else 0)
        readouts = [features] + [readout_channels] * (num_readout_layers - 1)
        readouts += [2 * image_channels * NUM_BUMPS]
        self.readouts = nn.ModuleList(
            nn.Conv2d(*widths, kernel_size=1) for widths in pairwise(readouts)
        )
        self.register_buffer("bumps", bumps(num_timesteps, log_bumps), persistent=False)
        self.register_buffer("sizes", output_sizes(num_timesteps), persistent=False)
        self.log_bumps = log_bumps
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
        with torch.autocast(xt.device.type, enabled=False):  # μ is not rounded to bfloat16
            out = einsum(y.float(), self.bumps[t], "b k j h w, b j -> b k h w")
            return out * self.sizes[t].repeat_interleave(xt.shape[1], 1) if self.log_bumps else out


def output_sizes(T: int) -> Tensor:
    """How large μ and b are at each t if the network is perfect: 1/√t and √T/t, (T+1, 2, 1, 1).

    With ᾱ_t = 1 - t/T and unit data, a perfect μ is 1/√t times a term of variance at most 1, the
    best guess of (x0 - √ᾱ_t xt)/√(1-ᾱ_t). A perfect variance is β_t (1 - c/t), 0 <= c <= 1, so b is
    -c √T/t. Between t = 2 and T these differ 22 and 500 times; without these units the weights of
    the last layer would have to, too. Slot 0 is a copy of slot 1.
    """
    t = torch.arange(T + 1).clamp(min=1).float()
    return torch.stack([t.rsqrt(), T**0.5 / t], 1)[:, :, None, None]


def initialise(layer: nn.Module) -> None:
    """Weights that preserve the magnitude of the features from layer to layer: their variance is
    2/(1 + slope²) over the number of inputs that are added up, summed over all scales; biases are
    zero.

    Differs: in the authors' code the weights of the convolutions are Gaussian, of standard
    deviation 1/(9 √20), and those of all other layers are orthogonal, the last layer's included.
    Here the last layer starts at 0.
    """
    if isinstance(layer, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(layer.weight, a=SLOPE)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    if isinstance(layer, MultiScaleConv):
        for parameter in layer.parameters():  # `apply` has initialised the convolutions already
            parameter.data /= len(layer.convs) ** 0.5


def check_network(
    num_conv_layers: int,
    num_dense_layers: int,
    num_scales: int,
    kernel_size: int,
    image_size: int | Sequence[int],
) -> None:
    """Refuse a network that cannot be built."""
    if num_conv_layers < 1 and num_dense_layers < 1:
        raise UserError(
            "the network has no layers: network.num_conv_layers or network.num_dense_layers must "
            "be at least 1"
        )
    height, width = height_and_width(image_size)
    if num_scales < 1 or height % 2 ** (num_scales - 1) or width % 2 ** (num_scales - 1):
        raise UserError(
            f"network.num_scales is {num_scales}: it must be at least 1, and the image size, "
            f"{height}x{width}, divisible by 2^(num_scales - 1)"
        )
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise UserError(f"network.kernel_size is {kernel_size}: it must be odd")
