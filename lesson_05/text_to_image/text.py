"""Prompts: the sentences to learn from, their bytes, and the encoder that reads them."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import einsum, rearrange
from torch import Tensor, nn

from common.errors import UserError

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "{}",
    "a {}",
    "the {}",
    "digit {}",
    "the digit {}",
    "the number {}",
    "handwritten {}",
    "a handwritten {}",
    "a {} written by hand",
    "a picture of a {}",
    "an image of the digit {}",
    "please draw a {}",
)
PADDING = 256  # the tokens 0 to 255 are bytes
NULL = tuple(range(257, 265))  # the null prompt: eight tokens that no text contains
NUM_TOKENS = 265
MAX_LENGTH = 64


def digit_prompts(digit: int) -> list[str]:
    """Every template, with the digit as a figure and as a word."""
    prompts = [template.format(n) for n in (str(digit), WORDS[digit]) for template in TEMPLATES]
    return [p.replace("a 8", "an 8").replace("a eight", "an eight") for p in prompts]


def all_digit_prompts() -> Tensor:
    """The tokens of every prompt for every digit, int64 (10, prompts a digit, L)."""
    prompts = [digit_prompts(digit) for digit in range(10)]
    return tokenize([p for some in prompts for p in some]).unflatten(0, (10, -1))


def tokenize(prompts: Sequence[str]) -> Tensor:
    """The prompts' UTF-8 bytes, in lower case and with single spaces, padded to the longest.

    int64 (B, L), 0 to 255 and PADDING. An empty prompt, or one of more than 64 bytes, is refused.
    """
    rows = []
    for prompt in prompts:
        row = " ".join(prompt.lower().split()).encode("utf-8", "surrogatepass")
        if not 1 <= len(row) <= MAX_LENGTH:
            shown = prompt if len(prompt) <= 20 else prompt[:20] + "..."
            raise UserError(
                f"prompt {shown!a} has {len(row):,} bytes: write 1 to {MAX_LENGTH}, "
                'such as "a handwritten seven"'
            )
        rows.append(row)
    length = max(len(NULL), *map(len, rows))
    return torch.tensor([[*row] + [PADDING] * (length - len(row)) for row in rows])


def null_prompt(tokens: Tensor) -> Tensor:
    """For each prompt (B, L) the null prompt in its place: learned, and drawn with no condition."""
    row = [*NULL] + [PADDING] * (tokens.shape[1] - len(NULL))
    return torch.tensor(row, device=tokens.device).expand_as(tokens)


class Context(NamedTuple):
    """What a prompt means to the U-Net: sequence (B, L, dim), and real (B, L), False at padding."""

    sequence: Tensor
    real: Tensor

    def mean(self) -> Tensor:
        """Of the real tokens, (B, dim)."""
        share = self.real / self.real.sum(dim=1, keepdim=True)
        return einsum(share, self.sequence, "b l, b l dim -> b dim")


class Attention(nn.Module):
    """softmax(Q Kᵀ / √d) V: each of x (B, N, dim) looks at the context's real tokens.

    Args:
        dim: features of x and of the answer.
        context_dim: features of a token.
        num_heads: that share dim among them.
    """

    def __init__(self, dim: int, context_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(context_dim, 2 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        q = rearrange(self.q(x), "b n (heads c) -> b heads n c", heads=self.num_heads)
        k, v = rearrange(
            self.kv(context.sequence),
            "b l (two heads c) -> two b heads l c",
            two=2,
            heads=self.num_heads,
        )
        padding = rearrange(~context.real, "b l -> b 1 1 l")
        score = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(padding, -torch.inf)
        y = torch.softmax(score, dim=-1) @ v
        return self.out(rearrange(y, "b heads n c -> b n (heads c)"))


class TextLayer(nn.Module):
    """One transformer layer: tokens look at each other, then each is thought over by itself."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.feed_forward = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
        )

    def forward(self, h: Tensor, real: Tensor) -> Tensor:
        y = self.norm1(h)
        h = h + self.attention(y, Context(y, real))
        return h + self.feed_forward(self.norm2(h))


class TextEncoder(nn.Module):
    """Tokens int64 (B, L), L up to 64 -> Context: one vector a token, each aware of the others.

    Args:
        dim: features of a token.
        num_layers: transformer layers.
        num_heads: attention heads of each.
    """

    def __init__(self, dim: int = 64, num_layers: int = 2, num_heads: int = 4) -> None:
        super().__init__()
        for name, value in [("dim", dim), ("num_layers", num_layers), ("num_heads", num_heads)]:
            if value < 1:
                raise UserError(f"text.{name} is {value}: it must be at least 1")
        if dim % num_heads:
            raise UserError(f"text.dim {dim} cannot be divided among {num_heads} attention heads")
        self.dim = dim
        self.token = nn.Embedding(NUM_TOKENS, dim)
        self.position = nn.Parameter(0.1 * torch.randn(MAX_LENGTH, dim))
        self.layers = nn.ModuleList([TextLayer(dim, num_heads) for _ in range(num_layers)])
        self.norm = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor) -> Context:
        real = tokens != PADDING
        h = self.token(tokens) + self.position[: tokens.shape[1]]
        for layer in self.layers:
            h = layer(h, real)
        return Context(self.norm(h), real)
