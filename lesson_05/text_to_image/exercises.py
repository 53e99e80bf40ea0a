"""Exercises of lesson 5 with prompts. Replace each ... and run, from this folder,

    python exercises.py        # all
    python exercises.py 3      # one

The questions are in the README, where the answers are folded away.
"""

import math
from typing import Any

from common import exercises
from lesson_05.text_to_image.network import TextToImageUNet
from lesson_05.text_to_image.text import (
    Attention,
    Context,
    TextEncoder,
    null_prompt,  # noqa: F401, it is for exercise 5
    tokenize,
)

import torch
from torch import Tensor

# 1. The row of tokens that tokenize(["A  7"]) returns: a list of numbers.
tokens_of_a_7: Any = ...


# 2. The mean of each prompt's tokens, which joins the embedding of the time.
def mean(sequence: Tensor, mask: Tensor) -> Any:
    """sequence (B, L, dim), mask (B, L), False at padding -> (B, dim)."""
    return ...


# 3. Cross-attention: each pixel reads the tokens.
def cross_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Any:
    """q (B, N, d) of the pixels; k, v (B, L, d) of the tokens; mask (B, L), False at padding.

    Returns (B, N, d): for each pixel a weighted mean of the v of the tokens that are no padding.
    """
    return ...


# 4. A prompt encoded as a single token: which of "q", "k", "v" and "out", the four linear maps of
# Attention, get no gradient? A set.
without_gradient: Any = ...


# 5. Guidance, with both estimates from one call of the network.
def guided(model: TextToImageUNet, xt: Tensor, t: Tensor, tokens: Tensor, s: float) -> Any:
    """The noise estimate for these prompts (B, L) with guidance s.

    model(xt, t, context) estimates the noise, model.encode(tokens) makes the context, and
    null_prompt(tokens) is the null prompt in place of each prompt.
    """
    return ...


def check_1_tokens() -> None:
    right = tokenize(["A  7"])[0].tolist()
    assert isinstance(tokens_of_a_7, list), "a list of numbers, such as [97, 98]"
    assert tokens_of_a_7[:3] == right[:3], (
        "a token is a byte of the text, in lower case and with single spaces: "
        "list('the text'.encode())"
    )
    assert tokens_of_a_7 == right, (
        "a batch is as long as its longest prompt, and the null prompt counts; what is PADDING?"
    )


def check_2_mean() -> None:
    torch.manual_seed(0)
    sequence, lengths = torch.randn(3, 6, 5), torch.tensor([6, 2, 1])
    mask = torch.arange(6) < lengths[:, None]
    out = mean(sequence, mask)
    assert out.shape == (3, 5), f"the shape is {tuple(out.shape)}, not (B, dim)"
    expected = torch.stack([x[:n].mean(0) for x, n in zip(sequence, lengths, strict=True)])
    assert torch.allclose(out, expected, atol=1e-5), (
        "a prompt must mean the same beside a longer one: average over its own tokens"
    )


def check_3_cross_attention() -> None:
    torch.manual_seed(0)
    q, (k, v) = torch.randn(2, 7, 4), torch.randn(2, 2, 5, 4)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    out = cross_attention(q, k, v, mask)
    assert out.shape == q.shape, f"the shape is {tuple(out.shape)}, not that of q"
    for b, n in ((0, 5), (1, 2)):  # each prompt alone, without its padding
        weights = torch.softmax(q[b] @ k[b, :n].T / math.sqrt(4), dim=1)
        assert torch.allclose(out[b], weights @ v[b, :n], atol=1e-5), (
            "scores are divided by √d; padding must be taken out before the softmax over tokens, "
            "so that the weights of the others add up to 1"
        )


def check_4_one_token() -> None:
    torch.manual_seed(0)
    attention = Attention(8, 8, 1)
    context = Context(torch.randn(1, 1, 8), torch.ones(1, 1, dtype=torch.bool))
    attention(torch.randn(1, 4, 8), context).square().sum().backward()
    found: dict[str, Any] = {"q": attention.q.weight.grad, "out": attention.out.weight.grad}
    keys_and_values: Any = attention.kv.weight.grad
    found["k"], found["v"] = keys_and_values.chunk(2)
    zero = {name for name, grad in found.items() if grad.abs().max() < 1e-6}
    assert isinstance(without_gradient, set), 'a set of names, such as {"q", "out"}'
    assert without_gradient == zero, "what is the softmax of a single number?"


def check_5_guided() -> None:
    torch.manual_seed(0)
    text = TextEncoder(dim=16, num_layers=1, num_heads=2)
    model = TextToImageUNet(
        text,
        image_channels=1,
        image_size=16,
        channels=8,
        multipliers=[1],
        num_blocks=1,
        attention_resolutions=[16],
        num_groups=1,
    ).eval()
    calls = []
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
        xt, t = torch.randn(2, 1, 16, 16), torch.tensor([5, 900])
        tokens = tokenize(["a handwritten 7", "three"])
        expected = model.bind(tokens, 2.5)(xt, t)
        handle = model.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
        try:
            out = guided(model, xt, t, tokens, 2.5)
        finally:
            handle.remove()
    assert calls == [4], "one call with a batch of twice the size"
    assert torch.allclose(out, expected, atol=1e-4), (
        "differs from model.bind: encode prompts and null prompts together, then go from the "
        "estimate without the prompt past the one with it"
    )


if __name__ == "__main__":
    exercises.run(globals())
