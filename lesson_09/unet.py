"""The network of Nichol & Dhariwal 2021: a U-Net that estimates the noise and its variance.

What it adds to lesson 5's: the time scales and shifts the features, attention has several heads
and is at two resolutions, and half of the output is v, the learned variance. With 128 channels,
multipliers (1, 2, 2, 2), three blocks a level, attention at 16x16 and 8x8 and four heads it is the
authors' CIFAR-10 network, layer for layer [Nichol21 Appendix A].
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from common.errors import UserError


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Cosines, then sines, of the time at dim/2 frequencies, from 1 down to almost 1/10000.

    cos(ω_i (t-1)), sin(ω_i (t-1)),  ω_i = 10000^(-i/(dim/2))

    t int64 (B,), 1 <= t <= T -> float32 (B, dim). The published weights count the time from 0.
    Differs: the authors' CIFAR-10 models, of T = 4000, are told (t - 1) 1000/T.
    """
    half = dim // 2
    i = torch.arange(half, dtype=torch.float32, device=t.device)
    angle = (t - 1)[:, None] * torch.exp(-math.log(10000) / half * i)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class ResidualBlock(nn.Module):
    """Twice norm, SiLU and convolution, around a shortcut; the time enters at the second norm.

    y = norm(y) (1 + scale) + shift, both read from the time [Nichol21 Appendix A]; without
    scale_shift_norm y = norm(y + time), as in lesson 5.

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
    """Every pixel looks at every pixel. (B, C, H, W) -> the same shape, added to the input."""

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
        # By hand: on a CPU, the gradient of PyTorch's fused attention takes several times as long.
        share = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1)
        y = rearrange(share @ v, "b heads n c -> b n (heads c)")
        return h + rearrange(self.out(y), "b (h w) c -> b c h w", h=h.shape[2])


class Block(nn.Module):
    """A residual block and, where the resolution asks for it, self-attention."""

    def __init__(self, residual: ResidualBlock, attention: SelfAttention | None) -> None:
        super().__init__()
        self.residual = residual
        self.attention = attention

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        h = self.residual(h, emb)
        return h if self.attention is None else self.attention(h)


class Downsample(nn.Conv2d):
    """Half the height and width, by a convolution of stride 2 that pads on all sides."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, kernel_size=3, stride=2, padding=1)


class Upsample(nn.Conv2d):
    """Twice the height and width: each pixel four times, then a convolution; both in one.

    Each pixel of the input meets the 3x3 weights at four places. Their sum there, 4x4, is the
    kernel of a transposed convolution of stride 2, which takes 4/9 of the multiplications.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, kernel_size=3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        weight = F.pad(self.weight.flip(2, 3).transpose(0, 1), (1, 1, 1, 1))
        kernel = F.avg_pool2d(weight, kernel_size=2, stride=1, divisor_override=1)
        return F.conv_transpose2d(h, kernel, self.bias, stride=2, padding=1)


class UNet(nn.Module):
    """out = UNet(xt, t): xt (B, image_channels, H, W), t (B,) -> (B, 2 image_channels, H, W).

    The first half is the noise estimate, the second v; without learned_variance there is only the
    first. float32. Going down, each level halves the image and every result is kept; going up,
    each block also reads the result of the same size that was kept last. An image that cannot be
    halved often enough is zero-padded first and the answer cropped: a network of four levels makes
    28x28 digits 32x32.

    Args:
        image_channels: 1 for grey, 3 for colour.
        image_size: height and width of the images, in pixels; tells where attention goes.
        learned_variance: whether the output has v.
        channels: feature maps of the first level.
        multipliers: feature maps of each level, in multiples of `channels`; one level each.
        num_blocks: blocks a level on the way down; the way up has one more.
        attention_resolutions: sizes of the feature maps that have self-attention after each block.
        num_heads: attention heads.
        scale_shift_norm: whether the time scales and shifts the features, or is added to them.
        dropout: share of features dropped inside each residual block while training.
        num_groups: groups of every group norm.
    """

    def __init__(
        self,
        image_channels: int = 1,
        image_size: int = 28,
        learned_variance: bool = True,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 2, 2, 2),
        num_blocks: int = 3,
        attention_resolutions: Sequence[int] = (16, 8),
        num_heads: int = 4,
        scale_shift_norm: bool = True,
        dropout: float = 0.3,
        num_groups: int = 32,
    ) -> None:
        super().__init__()
        self.channels, self.multiple = channels, 2 ** (len(multipliers) - 1)
        widths = [channels * multiplier for multiplier in multipliers]
        sizes = resolutions(image_size, len(multipliers))
        check_network(
            widths, sizes, num_blocks, attention_resolutions, num_heads, dropout, num_groups
        )
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
        width, kept = channels, [channels]
        self.down = nn.ModuleList()
        for level, (out, size) in enumerate(zip(widths, sizes, strict=True)):
            if level > 0:
                self.down.append(Downsample(width))
                kept.append(width)
            for _ in range(num_blocks):
                self.down.append(block(width, out, size in attention_resolutions))
                kept.append(width := out)
        self.middle = nn.ModuleList([block(width, width, True), block(width, width, False)])
        self.up = nn.ModuleList()
        for level in reversed(range(len(widths))):
            for _ in range(num_blocks + 1):
                attention = sizes[level] in attention_resolutions
                self.up.append(block(width + kept.pop(), widths[level], attention))
                width = widths[level]
            if level > 0:
                self.up.append(Upsample(width))
        self.norm_out = nn.GroupNorm(num_groups, width)
        out_channels = 2 * image_channels if learned_variance else image_channels
        self.conv_out = nn.Conv2d(width, out_channels, kernel_size=3, padding=1)
        self.apply(initialise)
        zero(self.conv_out)

    def forward(self, xt: Tensor, t: Tensor) -> Tensor:
        emb = self.time(timestep_embedding(t, self.channels))
        height, width = xt.shape[-2:]
        bottom, right = -height % self.multiple, -width % self.multiple
        top, left = bottom // 2, right // 2
        h = self.conv_in(F.pad(xt, (left, right - left, top, bottom - top)))
        kept = [h]
        for layer in self.down:
            h = layer(h, emb) if isinstance(layer, Block) else layer(h)
            kept.append(h)
        for layer in self.middle:
            h = layer(h, emb)
        for layer in self.up:
            if isinstance(layer, Block):
                h = layer(torch.cat([h, kept.pop()], dim=1), emb)
            else:
                h = layer(h)
        h = self.conv_out(F.silu(self.norm_out(h)))
        return h[..., top : top + height, left : left + width].float()


def initialise(layer: nn.Module) -> None:
    """Zero for the last layer of each residual and attention block, so that every block starts as
    its shortcut; all others as PyTorch has them [Nichol21, the code]."""
    if isinstance(layer, ResidualBlock):
        zero(layer.conv2)
    if isinstance(layer, SelfAttention):
        zero(layer.out)


def zero(layer: nn.Conv2d | nn.Linear) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def resolutions(image_size: int, num_levels: int) -> list[int]:
    """The size of the feature maps at each level, from the image, padded, down."""
    multiple = 2 ** (num_levels - 1)
    if num_levels < 1 or image_size < multiple:
        raise UserError(
            f"a {image_size}x{image_size} image cannot be halved {num_levels - 1} times: "
            f"give network.multipliers at most {max(image_size, 1).bit_length()} levels"
        )
    padded = image_size + -image_size % multiple
    return [padded // 2**level for level in range(num_levels)]


def check_network(
    widths: Sequence[int],
    sizes: Sequence[int],
    num_blocks: int,
    attention_resolutions: Sequence[int],
    num_heads: int,
    dropout: float,
    num_groups: int,
) -> None:
    """Refuse, in one line, a network that cannot be built."""
    for name, value in [
        ("num_blocks", num_blocks),
        ("num_heads", num_heads),
        ("num_groups", num_groups),
    ]:
        if value < 1:
            raise UserError(f"network.{name} is {value}: it must be at least 1")
    for width in widths:
        if width < 1 or width % num_groups:
            raise UserError(
                f"{width} channels cannot be divided into {num_groups} groups: "
                "change network.channels, network.multipliers or network.num_groups"
            )
        if width % num_heads:
            raise UserError(f"{width} channels cannot be divided among {num_heads} attention heads")
    if widths[0] % 2:
        raise UserError(
            f"network.channels must be even for the time's sines and cosines: {widths[0]}"
        )
    if not 0 <= dropout < 1:
        raise UserError(f"network.dropout is {dropout}: it is a share, at least 0 and below 1")
    if attention_resolutions and not set(attention_resolutions) & set(sizes):
        raise UserError(
            f"network.attention_resolutions {list(attention_resolutions)}: this network has "
            f"feature maps of size {', '.join(map(str, sizes))}; name some of these, or []"
        )
