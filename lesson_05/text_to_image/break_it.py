"""Leave out or overdo one thing at a time, to see what it is for.

The shipped text-to-image network is sampled as in the lesson and with one thing changed, with the
same noise in every step.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

from common import cli
from common.break_it import Bench, BreakOptions, run_breaks
from common.data import DIGITS
from common.errors import check_at_least
from lesson_05.ddpm import Network, preview
from lesson_05.guidance import Guided
from lesson_05.text_to_image.sample_mnist import SHIPPED
from lesson_05.text_to_image.text import MAX_LENGTH, PADDING, WORDS, Context, tokenize

import torch
from torch import Tensor

Break = Literal["no_mask", "wrong_null", "too_insistent"]


def main(
    what: list[Break] | None = None,
    num_steps: int = 100,
    options: BreakOptions = BreakOptions(model_checkpoint=SHIPPED, num_samples=10),
) -> None:
    """Break the lesson, one thing at a time. Writes broken_no_mask.png and so on.

    Args:
        what: no_mask, attention to the padding as if it were text; wrong_null, guidance away from a
            prompt instead of the null prompt, and the word "null" as a prompt; too_insistent, too
            much guidance. All three unless given.
        num_steps: steps of `preview`, fewer than the T steps of Algorithm 2.
    """
    check_at_least(1, num_steps=num_steps)
    breaks = {name: partial(function, num_steps=num_steps) for name, function in BREAKS.items()}
    run_breaks("lesson_05.text_to_image", breaks, what, options)


def words(bench: Bench) -> list[str]:
    """ "zero", "one", "two", ... or other classes, repeated from the first on."""
    names = WORDS if bench.model.classes == DIGITS else bench.model.classes
    return [names[k % len(names)] for k in range(bench.options.num_samples)]


def prompts(bench: Bench) -> Tensor:
    """The tokens of these words."""
    return tokenize(words(bench)).to(bench.device)


def sample(bench: Bench, network: Network, num_steps: int) -> Tensor:
    return preview(bench.process, network, bench.noise(), num_steps)


def no_mask(bench: Bench, num_steps: int) -> dict[str, Tensor]:
    """The same prompts, padded to the maximal length, with the mask and without it."""
    tokens = prompts(bench)
    padded = torch.full((len(tokens), MAX_LENGTH), PADDING, device=tokens.device)
    padded[:, : tokens.shape[1]] = tokens
    masked = bench.model.encode(padded)
    unmasked = Context(masked.sequence, torch.ones_like(masked.mask))
    return {
        "masked": sample(bench, Guided(bench.model, 1, masked, masked), num_steps),
        "no mask": sample(bench, Guided(bench.model, 1, unmasked, unmasked), num_steps),
    }


def wrong_null(bench: Bench, num_steps: int) -> dict[str, Tensor]:
    """Guidance away from the second prompt, such as "one", as if it were the null prompt; and what
    the network draws for the word "null"."""
    tokens, second = prompts(bench), words(bench)[:2][-1]
    condition = bench.model.encode(tokens)
    wrong = bench.model.encode(tokens[[1] * len(tokens)]) if len(tokens) > 1 else condition
    word = tokenize(["null"] * len(tokens)).to(bench.device)
    return {
        "away from null": sample(bench, bench.model.bind(tokens, 3.0), num_steps),
        f'away from "{second}"': sample(
            bench, Guided(bench.model, 3.0, condition, wrong), num_steps
        ),
        'the word "null"': sample(bench, bench.model.bind(word), num_steps),
    }


def too_insistent(bench: Bench, num_steps: int) -> dict[str, Tensor]:
    """Samples with more and more guidance."""
    return {
        f"s = {scale:g}": sample(bench, bench.model.bind(prompts(bench), scale), num_steps)
        for scale in (0.0, 1.0, 2.0, 4.0, 16.0)
    }


BREAKS: dict[Break, Callable[..., dict[str, Tensor]]] = {
    "no_mask": no_mask,
    "wrong_null": wrong_null,
    "too_insistent": too_insistent,
}


if __name__ == "__main__":
    cli.run(main)
