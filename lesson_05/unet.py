"""The network of Ho et al. 2020: a U-Net that predicts the noise in an image.

A `UNet` is made of `Block`s; a `Block` is a `ResidualBlock` and, at some resolutions, a
`SelfAttention`. With 128 channels, multipliers (1, 2, 2, 2), two blocks a level and attention at
16x16 it is the authors' CIFAR-10 network, layer for layer [Ho20 Appendix B].
"""

import math
from collections.abc import Sequence
from typing import Any

from common.network_checks import check_unet, feature_map_sizes

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sines, then cosines, of the time at dim/2 frequencies from 1 down to 1/10000
    [Ho20 Appendix B].

    t int64 (B,), 1 <= t <= T -> float32 (B, dim). Embeds t - 1, as the published weights do.
    """
    frequency = torch.logspace(0, -4, dim // 2).to(t.device)  # Apple's GPUs have no logspace
    angle = (t - 1)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class ResidualBlock(nn.Module):
    """Norm, SiLU and convolution, twice, added to a shortcut; the time is added in between.

    h (B, in_channels, H, W), emb (B, emb_dim) -> (B, out_channels, H, W).
    """

    def __init__(
        self, in_channels: int, out_channels: int, emb_dim: int, dropout: float, num_groups: int
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(num_groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.time = nn.Linear(emb_dim, out_channels)
        self.norm2 = nn.GroupNorm(num_groups, out_channels, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        self.shortcut = (
            nn.Conv2d(in_channels, out_channels, kernel_size=1)
            if in_channels != out_channels
            else nn.Identity()
        )

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(h)))
        y = y + self.time(F.silu(emb))[:, :, None, None]
        y = self.conv2(self.dropout(F.silu(self.norm2(y))))
        return self.shortcut(h) + y


class SelfAttention(nn.Module):
    """Attention of every pixel to every pixel, added to the input. (B, C, H, W) -> the same."""

    def __init__(self, channels: int, num_heads: int, num_groups: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.GroupNorm(num_groups, channels, eps=1e-6)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, h: Tensor) -> Tensor:
        pixels = rearrange(self.norm(h), "b c h w -> b (h w) c")
        q, k, v = rearrange(
            self.qkv(pixels),
            "b n (three heads c) -> three b heads n c",
            three=3,
            heads=self.num_heads,
        )
        # On a CPU PyTorch's fused attention is slower (timings in benchmarks/README.md).
        weights = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1)
        y = rearrange(weights @ v, "b heads n c -> b n (heads c)")
        return h + rearrange(self.out(y), "b (h w) c -> b c h w", h=h.shape[2])


class Block(nn.Module):
    """A residual block and, at some resolutions, attention, which receives the context."""

    def __init__(self, residual: ResidualBlock, attention: nn.Module | None) -> None:
        super().__init__()
        self.residual = residual
        self.attention = attention

    def forward(self, h: Tensor, emb: Tensor, *context: Any) -> Tensor:
        h = self.residual(h, emb)
        return h if self.attention is None else self.attention(h, *context)


class Downsample(nn.Conv2d):
    """Halves height and width by a convolution of stride 2, padded on the right and below."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, kernel_size=3, stride=2)

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(F.pad(h, (0, 1, 0, 1)))


class Upsample(nn.Conv2d):
    """Doubles height and width: nearest neighbour, then a 3x3 convolution.

    It is computed as one transposed convolution with a 4x4 kernel, in 4/9 of the multiplications.
    Each weight of this kernel is the sum of the 3x3 weights that meet the same input pixel.
    `nearest_then_conv` is the plain form, to read and to test against.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, kernel_size=3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        weight = F.pad(self.weight.flip(2, 3).transpose(0, 1), (1, 1, 1, 1))
        kernel = 4 * F.avg_pool2d(weight, kernel_size=2, stride=1)  # sums of 2x2 weights
        return F.conv_transpose2d(h, kernel, self.bias, stride=2, padding=1)

    def nearest_then_conv(self, h: Tensor) -> Tensor:
        return super().forward(F.interpolate(h, scale_factor=2.0, mode="nearest"))


class UNet(nn.Module):
    """eps_hat = UNet(xt, t): xt (B, image_channels, H, W), t (B,) -> the same shape as xt, float32.

    Going down, each level halves the image, and every layer's output is kept for a skip connection.
    Going up, each block also reads the last unused skip, which has the same size. An image that
    cannot be halved often enough is zero-padded, and the output cropped: a network of four levels
    pads 28x28 digits to 32x32.

    Args:
        image_channels: 1 for grey, 3 for colour.
        image_size: height and width of the images, in pixels, or one number for both; it decides
            where attention applies.
        channels: feature maps of the first level.
        multipliers: feature maps of each level, in multiples of `channels`.
        num_blocks: blocks per level on the way down; on the way up there is one more.
        attention_resolutions: sizes of the feature maps that have self-attention after each block;
            the size of 16x12 feature maps is 16.
        num_heads: attention heads.
        dropout: probability that a feature in a residual block is dropped while training.
        num_groups: groups of every group normalisation.
    """

    def __init__(
        self,
        image_channels: int,
        image_size: int | Sequence[int],
        channels: int = 128,
        multipliers: Sequence[int] = (1, 2, 2, 2),
        num_blocks: int = 2,
        attention_resolutions: Sequence[int] = (16,),
        num_heads: int = 1,
        dropout: float = 0.1,
        num_groups: int = 32,
    ) -> None:
        super().__init__()
        self.channels, self.multiple = channels, 2 ** (len(multipliers) - 1)
        widths = [channels * multiplier for multiplier in multipliers]
        sizes = feature_map_sizes(image_size, len(multipliers))
        check_unet(widths, sizes, num_blocks, attention_resolutions, num_heads, dropout, num_groups)
        emb_dim = 4 * channels

        def block(in_channels: int, out_channels: int, attention: bool) -> Block:
            return Block(
                ResidualBlock(in_channels, out_channels, emb_dim, dropout, num_groups),
                SelfAttention(out_channels, num_heads, num_groups) if attention else None,
            )

        self.time = nn.Sequential(
            nn.Linear(channels, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim)
        )
        self.conv_in = nn.Conv2d(image_channels, channels, kernel_size=3, padding=1)
        width, skips = channels, [channels]
        self.down = nn.ModuleList()
        for level, (out, size) in enumerate(zip(widths, sizes, strict=True)):
            if level > 0:
                self.down.append(Downsample(width))
                skips.append(width)
            for _ in range(num_blocks):
                self.down.append(block(width, out, size in attention_resolutions))
                skips.append(width := out)
        self.middle = nn.ModuleList([block(width, width, True), block(width, width, False)])
        self.up = nn.ModuleList()
        for level in reversed(range(len(widths))):
            for _ in range(num_blocks + 1):
                attention = sizes[level] in attention_resolutions
                self.up.append(block(width + skips.pop(), widths[level], attention))
                width = widths[level]
            if level > 0:
                self.up.append(Upsample(width))
        self.norm_out = nn.GroupNorm(num_groups, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, image_channels, kernel_size=3, padding=1)
        self.apply(initialise)
        nn.init.zeros_(self.conv_out.weight)

    def forward(self, xt: Tensor, t: Tensor) -> Tensor:
        return self.estimate(xt, self.time(timestep_embedding(t, self.channels)))

    def estimate(self, xt: Tensor, emb: Tensor, *context: Any) -> Tensor:
        """The network's output. emb (B, 4 channels): embedding of the time and of any condition.

        The context, if any, is passed to every block's attention.
        """
        height, width = xt.shape[-2:]
        bottom, right = -height % self.multiple, -width % self.multiple
        top, left = bottom // 2, right // 2
        h = self.conv_in(F.pad(xt, (left, right - left, top, bottom - top)))
        skips = [h]
        for layer in self.down:
            h = layer(h, emb, *context) if isinstance(layer, Block) else layer(h)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, emb, *context)
        for layer in self.up:
            if isinstance(layer, Block):
                h = layer(torch.cat([h, skips.pop()], dim=1), emb, *context)
            else:
                h = layer(h)
        h = self.conv_out(F.silu(self.norm_out(h)))
        return h[..., top : top + height, left : left + width].float()


def initialise(layer: nn.Module) -> None:
    """The authors' initial weights: Glorot uniform, biases zero. Zero for the last layer of each
    residual and attention block, so that every block starts as its shortcut [Ho20, the code]."""
    if isinstance(layer, nn.Conv2d | nn.Linear):
        nn.init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    if isinstance(layer, ResidualBlock):
        nn.init.zeros_(layer.conv2.weight)
    if isinstance(layer, SelfAttention):
        # The authors have separate layers for q, k and v: each has its own Glorot limits.
        for weight in layer.qkv.weight.data.chunk(3):
            nn.init.xavier_uniform_(weight)
        nn.init.zeros_(layer.out.weight)
