"""The prompts of lesson 5 and their tokens."""

from common.errors import UserError
from lesson_05.text_to_image.text import (
    MAX_LENGTH,
    NULL,
    PADDING,
    TextEncoder,
    all_prompts,
    digit_prompts,
    null_prompt,
    tokenize,
)

import pytest
import torch


def test_tokens_are_the_bytes_of_the_prompt():
    tokens = tokenize(["Seven", "  the   digit 7 ", "ß漢"])
    assert tokens.dtype == torch.int64
    assert tokens[0, :5].tolist() == list(b"seven")
    assert (tokens[0, 5:] == PADDING).all()
    assert bytes(tokens[1, :11].tolist()) == b"the digit 7"
    assert bytes(tokens[2, :5].tolist()).decode() == "ß漢"
    assert torch.equal(tokenize(["SEVEN"]), tokenize(["seven"]))
    assert tokenize(["7"]).shape == (1, len(NULL))
    assert (null_prompt(tokens) == null_prompt(tokens)[0]).all()


@pytest.mark.parametrize("prompt", ["", "   ", "\n", "x" * 10_000, "ß" * 33])
def test_an_empty_or_too_long_prompt_is_refused_in_one_line(prompt):
    with pytest.raises(UserError, match=r"it must have 1 to 64") as caught:
        tokenize(["seven", prompt])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_training_prompts_name_each_digit_in_24_ways():
    prompts = digit_prompts(8)
    assert {"8", "eight", "a handwritten eight", "the digit 8", "an 8"} <= set(prompts)
    assert len(set(prompts)) == len(prompts) == 24
    tokens = all_prompts()
    assert tokens.shape[:2] == (10, len(prompts))
    assert tokens.shape[2] <= MAX_LENGTH
    assert bytes(tokens[7, 0, :1].tolist()) == b"7"


@pytest.mark.parametrize(
    ("sizes", "message"),
    [({"dim": 0}, "text.dim is 0"), ({"num_heads": 3}, "among 3 attention heads")],
)
def test_encoders_that_cannot_be_built_are_refused(sizes, message):
    with pytest.raises(UserError, match=message):
        TextEncoder(**sizes)
