"""The network of Nichol & Dhariwal 2021: a U-Net that predicts the noise and its variance.

It differs from lesson 5's: the time scales and shifts the features, attention has several heads and
acts at two resolutions, and half of the output is v, which sets the variance. With 128 channels,
multipliers (1, 2, 2, 2), three blocks a level, attention at 16x16 and 8x8 and four heads it is the
authors' CIFAR-10 network, layer for layer [Nichol21 Appendix A].
"""

import math
from collections.abc import Sequence

from common.network_checks import check_unet, feature_map_sizes

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def timestep_embedding(t: Tensor, dim: int, time_scale: float = 1.0) -> Tensor:
    """Cosines, then sines, of the time at dim/2 frequencies from 1 down to almost 1/10000.

    cos(ω_i s (t-1)), sin(ω_i s (t-1)),  ω_i = 10000^(-i/(dim/2)),  s = time_scale

    t int64 (B,), 1 <= t <= T -> float32 (B, dim). The published weights count times from 0.
    Differs: the authors' networks of T = 4000 have s = 1000/T; here it is 1 unless given.
    """
    half = dim // 2
    i = torch.arange(half, dtype=torch.float32, device=t.device)
    angle = ((t - 1) * time_scale)[:, None] * torch.exp(-math.log(10000) / half * i)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class ResidualBlock(nn.Module):
    """Two times norm, SiLU and convolution, added to a shortcut; the time enters in the middle.

    y = norm(y) (1 + scale) + shift [Nichol21 Appendix A]; scale and shift are linear in the time's
    embedding.
    Without scale_shift_norm y = norm(y + time), as in lesson 5.

    h (B, in_channels, H, W), emb (B, emb_dim) -> (B, out_channels, H, W).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_dim: int,
        dropout: float,
        num_groups: int,
        scale_shift_norm: bool,
    ) -> None:
        super().__init__()
        self.scale_shift_norm = scale_shift_norm
        self.norm1 = nn.GroupNorm(num_groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.time = nn.Linear(emb_dim, 2 * out_channels if scale_shift_norm else out_channels)
        self.norm2 = nn.GroupNorm(num_groups, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        self.shortcut = (
            nn.Conv2d(in_channels, out_channels, kernel_size=1)
            if in_channels != out_channels
            else nn.Identity()
        )

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(h)))
        time = self.time(F.silu(emb))[:, :, None, None]
        if self.scale_shift_norm:
            scale, shift = time.chunk(2, dim=1)
            y = self.norm2(y) * (1 + scale) + shift
        else:
            y = self.norm2(y + time)
        y = self.conv2(self.dropout(F.silu(y)))
        return self.shortcut(h) + y


class SelfAttention(nn.Module):
    """Attention of every pixel to every pixel, added to the input. (B, C, H, W) -> the same."""

    def __init__(self, channels: int, num_heads: int, num_groups: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.GroupNorm(num_groups, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, h: Tensor) -> Tensor:
        pixels = rearrange(self.norm(h), "b c h w -> b (h w) c")
        q, k, v = rearrange(
            self.qkv(pixels),
            "b n (heads three c) -> three b heads n c",
            three=3,
            heads=self.num_heads,
        )
        # On a CPU PyTorch's fused attention is slower (timings in benchmarks/README.md).
        weights = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1)
        y = rearrange(weights @ v, "b heads n c -> b n (heads c)")
        return h + rearrange(self.out(y), "b (h w) c -> b c h w", h=h.shape[2])


class Block(nn.Module):
    """A residual block and, at some resolutions, attention."""

    def __init__(self, residual: ResidualBlock, attention: nn.Module | None) -> None:
        super().__init__()
        self.residual = residual
        self.attention = attention

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        h = self.residual(h, emb)
        return h if self.attention is None else self.attention(h)


class Downsample(nn.Conv2d):
    """Halves height and width by a convolution of stride 2, padded on all sides."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, kernel_size=3, stride=2, padding=1)


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
    """A U-Net that predicts the noise in an image, and v: out = UNet(xt, t).

    xt (B, image_channels, H, W), t (B,) -> out (B, 2 image_channels, H, W), float32. The first half
    of its channels is the predicted noise, the second half is v. Without learned_variance there is
    no second half.

    Going down, each level halves the image, and every layer's output is kept for a skip connection.
    Going up, each block also reads the last unused skip, which has the same size. An image that
    cannot be halved often enough is zero-padded, and the output cropped: a network of four levels
    pads 28x28 digits to 32x32.

    Args:
        image_channels: 1 for grey, 3 for colour.
        image_size: height and width of the images, in pixels, or one number for both; it decides
            where attention applies.
        learned_variance: whether the output contains v.
        channels: feature maps of the first level.
        multipliers: feature maps of each level, in multiples of `channels`.
        num_blocks: blocks per level on the way down; on the way up there is one more.
        attention_resolutions: sizes of the feature maps that have self-attention after each block;
            the size of 16x12 feature maps is 16.
        num_heads: attention heads.
        scale_shift_norm: whether the time scales and shifts the features, or is added to them.
        dropout: probability that a feature in a residual block is dropped while training.
        num_groups: groups of every group normalisation.
        time_scale: factor of t - 1 in its embedding. The networks that the authors published for
            T = 4000 have 1000/T (their `rescale_timesteps`).
    """

    def __init__(
        self,
        image_channels: int,
        image_size: int | Sequence[int],
        learned_variance: bool,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 2, 2, 2),
        num_blocks: int = 3,
        attention_resolutions: Sequence[int] = (16, 8),
        num_heads: int = 4,
        scale_shift_norm: bool = True,
        dropout: float = 0.3,
        num_groups: int = 32,
        time_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.channels, self.multiple = channels, 2 ** (len(multipliers) - 1)
        self.time_scale = time_scale
        widths = [channels * multiplier for multiplier in multipliers]
        sizes = feature_map_sizes(image_size, len(multipliers))
        check_unet(widths, sizes, num_blocks, attention_resolutions, num_heads, dropout, num_groups)
        emb_dim = 4 * channels

        def block(in_channels: int, out: int, attention: bool) -> Block:
            return Block(
                ResidualBlock(in_channels, out, emb_dim, dropout, num_groups, scale_shift_norm),
                SelfAttention(out, num_heads, num_groups) if attention else None,
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
        self.norm_out = nn.GroupNorm(num_groups, width)
        out_channels = 2 * image_channels if learned_variance else image_channels
        self.conv_out = nn.Conv2d(width, out_channels, kernel_size=3, padding=1)
        self.apply(initialise)
        zero(self.conv_out)

    def forward(self, xt: Tensor, t: Tensor) -> Tensor:
        emb = self.time(timestep_embedding(t, self.channels, self.time_scale))
        height, width = xt.shape[-2:]
        bottom, right = -height % self.multiple, -width % self.multiple
        top, left = bottom // 2, right // 2
        h = self.conv_in(F.pad(xt, (left, right - left, top, bottom - top)))
        skips = [h]
        for layer in self.down:
            h = layer(h, emb) if isinstance(layer, Block) else layer(h)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, emb)
        for layer in self.up:
            if isinstance(layer, Block):
                h = layer(torch.cat([h, skips.pop()], dim=1), emb)
            else:
                h = layer(h)
        h = self.conv_out(F.silu(self.norm_out(h)))
        return h[..., top : top + height, left : left + width].float()


def initialise(layer: nn.Module) -> None:
    """The authors' initial weights: PyTorch's defaults. Zero for the last layer of each residual
    and attention block, so that every block starts as its shortcut [Nichol21, the code]."""
    if isinstance(layer, ResidualBlock):
        zero(layer.conv2)
    if isinstance(layer, SelfAttention):
        zero(layer.out)


def zero(layer: nn.Conv2d | nn.Linear) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
