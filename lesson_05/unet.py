"""The network of Ho et al. 2020: a U-Net that estimates the noise in an image.

A `UNet` is made of `Block`s; a `Block` is a `ResidualBlock` and, at some resolutions, a
`SelfAttention`. With 128 channels, multipliers (1, 2, 2, 2), two blocks a level and attention at
16x16 it is the authors' CIFAR-10 network, layer for layer [Ho20 Appendix B].
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from common.errors import UserError


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sines, then cosines, of the time at dim/2 frequencies, 1 down to 1/10000 [Ho20 Appendix B].

    t int64 (B,), 1 <= t <= T -> float32 (B, dim). The published weights count the time from 0.
    """
    frequency = torch.logspace(0, -4, dim // 2, device=t.device)
    angle = (t - 1)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class ResidualBlock(nn.Module):
    """Twice norm, SiLU and convolution, around a shortcut; the time enters in the middle.

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
    """Every pixel looks at every pixel. (B, C, H, W) -> the same shape, added to the input."""

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
        # By hand: on a CPU PyTorch's fused attention is slower, by figures in benchmarks/README.md.
        share = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1)
        y = rearrange(share @ v, "b heads n c -> b n (heads c)")
        return h + rearrange(self.out(y), "b (h w) c -> b c h w", h=h.shape[2])


class Block(nn.Module):
    """A residual block and, where the resolution asks for it, attention: to itself, and to the
    context, if there is any."""

    def __init__(self, residual: ResidualBlock, attention: nn.Module | None) -> None:
        super().__init__()
        self.residual = residual
        self.attention = attention

    def forward(self, h: Tensor, emb: Tensor, *context: Any) -> Tensor:
        h = self.residual(h, emb)
        return h if self.attention is None else self.attention(h, *context)


class Downsample(nn.Conv2d):
    """Half the height and width, by a convolution of stride 2 that pads on the right and below."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, kernel_size=3, stride=2)

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(F.pad(h, (0, 1, 0, 1)))


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
    """eps_hat = UNet(xt, t): xt (B, image_channels, H, W), t (B,) -> the same shape as xt, float32.

    Going down, each level halves the image and every result is kept; going up, each block also
    reads the result of the same size that was kept last. An image that cannot be halved often
    enough is zero-padded first and the answer cropped: a network
    of four levels makes 28x28 digits 32x32.

    Args:
        image_channels: 1 for grey, 3 for colour.
        image_size: height and width of the images, in pixels; tells where attention goes.
        channels: feature maps of the first level.
        multipliers: feature maps of each level, in multiples of `channels`; one level each.
        num_blocks: blocks a level on the way down; the way up has one more.
        attention_resolutions: sizes of the feature maps that have self-attention after each block.
        num_heads: attention heads.
        dropout: share of features dropped inside each residual block while training.
        num_groups: groups of every group norm.
    """

    def __init__(
        self,
        image_channels: int = 1,
        image_size: int = 28,
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
        sizes = resolutions(image_size, len(multipliers))
        check_network(
            widths, sizes, num_blocks, attention_resolutions, num_heads, dropout, num_groups
        )
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
        self.norm_out = nn.GroupNorm(num_groups, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, image_channels, kernel_size=3, padding=1)
        self.apply(initialise)
        nn.init.zeros_(self.conv_out.weight)

    def forward(self, xt: Tensor, t: Tensor) -> Tensor:
        return self.estimate(xt, self.time(timestep_embedding(t, self.channels)))

    def estimate(self, xt: Tensor, emb: Tensor, *context: Any) -> Tensor:
        """The way down, the middle and the way up, told the time (and whatever else) by emb.

        The context, if there is any, goes to every block's attention.
        """
        height, width = xt.shape[-2:]
        bottom, right = -height % self.multiple, -width % self.multiple
        top, left = bottom // 2, right // 2
        h = self.conv_in(F.pad(xt, (left, right - left, top, bottom - top)))
        kept = [h]
        for layer in self.down:
            h = layer(h, emb, *context) if isinstance(layer, Block) else layer(h)
            kept.append(h)
        for layer in self.middle:
            h = layer(h, emb, *context)
        for layer in self.up:
            if isinstance(layer, Block):
                h = layer(torch.cat([h, kept.pop()], dim=1), emb, *context)
            else:
                h = layer(h)
        h = self.conv_out(F.silu(self.norm_out(h)))
        return h[..., top : top + height, left : left + width].float()


def initialise(layer: nn.Module) -> None:
    """The authors' initial weights: Glorot uniform, biases zero; zero for the last layer of each
    residual and attention block, so that every block starts as its shortcut [Ho20, the code]."""
    if isinstance(layer, nn.Conv2d | nn.Linear):
        nn.init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    if isinstance(layer, ResidualBlock):
        nn.init.zeros_(layer.conv2.weight)
    if isinstance(layer, SelfAttention):
        nn.init.zeros_(layer.out.weight)


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
