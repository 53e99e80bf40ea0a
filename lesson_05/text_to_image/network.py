"""Lesson 5's U-Net conditioned on a prompt in two ways, as in GLIDE (arXiv 2112.10741).

The mean of the prompt's encoded tokens is added to the embedding of the time, which every block
receives. Each self-attention of the U-Net is followed by cross-attention to the tokens.

context = model.encode(tokens)
process.loss(partial(model, context=context), ...)  # called as network(xt, t)
"""

from collections.abc import Sequence
from typing import Any

from common.data import DIGITS
from lesson_05.guidance import Guided
from lesson_05.text_to_image.text import Attention, Context, TextEncoder, null_prompt
from lesson_05.unet import Block, SelfAttention, UNet, timestep_embedding

import torch
from einops import rearrange
from torch import Tensor, nn


class TextAttention(nn.Module):
    """The self-attention of lesson 5, then cross-attention from pixels to tokens.

    h (B, C, H, W), context with a sequence (B, L, dim) -> the shape of h, added to the input.

    Args:
        self_attention: the layer to extend.
        context_dim: features of a token.
    """

    def __init__(self, self_attention: SelfAttention, context_dim: int) -> None:
        super().__init__()
        norm = self_attention.norm
        self.self_attention = self_attention
        self.norm = nn.GroupNorm(norm.num_groups, norm.num_channels, eps=norm.eps)
        self.cross = Attention(norm.num_channels, context_dim, self_attention.num_heads)
        nn.init.zeros_(self.cross.out.weight)  # it starts as the identity, like every block
        nn.init.zeros_(self.cross.out.bias)

    def forward(self, h: Tensor, context: Context) -> Tensor:
        h = self.self_attention(h)
        pixels = rearrange(self.norm(h), "b c h w -> b (h w) c")
        y = self.cross(pixels, context)
        return h + rearrange(y, "b (h w) c -> b c h w", h=h.shape[2])


class TextToImageUNet(UNet):
    """eps_hat = model(xt, t, context): lesson 5's U-Net and the text encoder, trained together.

    Args:
        text: the text encoder.
        network: the arguments of the U-Net.
    """

    def __init__(self, text: TextEncoder, **network: Any) -> None:
        super().__init__(**network)
        self.text = text
        self.classes: Sequence[str] = DIGITS  # what its training prompts name
        self.summary = nn.Linear(text.dim, 4 * self.channels)
        nn.init.zeros_(self.summary.weight)  # at first the prompt has no effect here either
        nn.init.zeros_(self.summary.bias)
        for block in list(self.modules()):
            if isinstance(block, Block) and isinstance(block.attention, SelfAttention):
                block.attention = TextAttention(block.attention, text.dim)

    def encode(self, tokens: Tensor) -> Context:
        """The context of these prompts (B, L)."""
        return self.text(tokens)

    def forward(self, xt: Tensor, t: Tensor, context: Context) -> Tensor:  # type: ignore[override]
        time = self.time(timestep_embedding(t, self.channels))
        return self.estimate(xt, time + self.summary(context.mean()), context)

    @torch.no_grad()
    def bind(self, tokens: Tensor, guidance: float = 1.0) -> Guided:
        """The network for images of these prompts (B, L), which are encoded once."""
        return Guided(self, guidance, self.encode(tokens), self.encode(null_prompt(tokens)))
