"""Prompts: those of training, their tokens, and the text encoder."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from common.data import DIGITS
from common.errors import UserError, check_at_least

import torch
from einops import einsum, rearrange
from torch import Tensor, nn

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
    """The training prompts for a digit: each template, with the numeral and with the word."""
    prompts = [template.format(n) for n in (str(digit), WORDS[digit]) for template in TEMPLATES]
    return [p.replace("a 8", "an 8").replace("a eight", "an eight") for p in prompts]


def class_prompts(classes: Sequence[str]) -> list[list[str]]:
    """The training prompts of each class: its name in each template, as for digits if all classes
    are digits, else in those templates that do not speak of digits."""
    if {*classes} <= {*DIGITS}:
        return [digit_prompts(int(name)) for name in classes]
    templates = [text for text in TEMPLATES if not re.search("digit|number|hand", text)]
    prompts = []
    for name in (" ".join(name.replace("_", " ").split()) for name in classes):
        article = "an {}" if name[:1].lower() in "aeio" else "a {}"
        prompts.append([text.replace("a {}", article).format(name) for text in templates])
    return prompts


def all_prompts(classes: Sequence[str] = DIGITS) -> Tensor:
    """The tokens of every prompt for every class, int64 (classes, prompts a class, L)."""
    prompts = class_prompts(classes)
    return tokenize([p for row in prompts for p in row]).unflatten(0, (len(classes), -1))


def tokenize(prompts: Sequence[str]) -> Tensor:
    """The UTF-8 bytes of the prompts, in lower case and with single spaces, padded to the longest.

    int64 (B, L), 0 to 255 and PADDING. A prompt has 1 to 64 bytes.
    """
    rows = []
    for prompt in prompts:
        row = " ".join(prompt.lower().split()).encode("utf-8", "surrogatepass")
        if not 1 <= len(row) <= MAX_LENGTH:
            shown = prompt if len(prompt) <= 20 else prompt[:20] + "..."
            raise UserError(
                f"prompt {shown!a} has {len(row):,} bytes: it must have 1 to {MAX_LENGTH}, "
                'such as "a handwritten seven"'
            )
        rows.append(row)
    length = max(len(NULL), *map(len, rows))
    return torch.tensor([[*row] + [PADDING] * (length - len(row)) for row in rows])


def null_prompt(tokens: Tensor) -> Tensor:
    """The null prompt, which means "no condition", in place of each prompt (B, L)."""
    row = [*NULL] + [PADDING] * (tokens.shape[1] - len(NULL))
    return torch.tensor(row, device=tokens.device).expand_as(tokens)


class Context(NamedTuple):
    """Encoded prompts: sequence (B, L, dim), and mask (B, L), True at tokens, False at padding."""

    sequence: Tensor
    mask: Tensor

    def mean(self) -> Tensor:
        """The mean of each prompt's tokens, without the padding, (B, dim)."""
        weights = self.mask / self.mask.sum(dim=1, keepdim=True)
        return einsum(weights, self.sequence, "b l, b l dim -> b dim")


class Attention(nn.Module):
    """softmax(Q Kᵀ / √d) V: queries from x (B, N, dim), keys and values from the context's tokens.

    Args:
        dim: features of x and of the output.
        context_dim: features of a token.
        num_heads: attention heads, each of dim / num_heads features.
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
        padding = rearrange(~context.mask, "b l -> b 1 1 l")
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(padding, -torch.inf)
        y = torch.softmax(scores, dim=-1) @ v
        return self.out(rearrange(y, "b heads n c -> b n (heads c)"))


class TextLayer(nn.Module):
    """A transformer layer: self-attention among the tokens, then a feed-forward network on each.

    h (B, L, dim), mask (B, L) -> the shape of h.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.feed_forward = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
        )

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        y = self.norm1(h)
        h = h + self.attention(y, Context(y, mask))
        return h + self.feed_forward(self.norm2(h))


class TextEncoder(nn.Module):
    """A transformer: tokens int64 (B, L), L up to 64 -> Context with one vector per token.

    Args:
        dim: features of a token.
        num_layers: transformer layers.
        num_heads: attention heads of each.
    """

    def __init__(self, dim: int = 64, num_layers: int = 2, num_heads: int = 4) -> None:
        super().__init__()
        sizes = {"dim": dim, "num_layers": num_layers, "num_heads": num_heads}
        check_at_least(1, **{f"text.{name}": value for name, value in sizes.items()})
        if dim % num_heads:
            raise UserError(f"text.dim {dim} cannot be divided among {num_heads} attention heads")
        self.dim = dim
        self.token = nn.Embedding(NUM_TOKENS, dim)
        self.position = nn.Parameter(0.1 * torch.randn(MAX_LENGTH, dim))
        self.layers = nn.ModuleList([TextLayer(dim, num_heads) for _ in range(num_layers)])
        self.norm = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor) -> Context:
        mask = tokens != PADDING
        h = self.token(tokens) + self.position[: tokens.shape[1]]
        for layer in self.layers:
            h = layer(h, mask)
        return Context(self.norm(h), mask)
