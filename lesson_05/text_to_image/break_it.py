"""Leave one thing out, and see what it was for.

A break differs from the lesson in one line. The text-to-image network that comes with the
repository is sampled with and without it, from the same noise at every step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from common import checkpoint, cli
from common.device import Precision, autocast, pick_device
from common.images import save_rows
from common.run import check
from lesson_05.ddpm import DDPM, Network, preview
from lesson_05.guidance import Guided
from lesson_05.text_to_image.network import TextToImageUNet
from lesson_05.text_to_image.sample_mnist import SHIPPED, load
from lesson_05.text_to_image.text import PADDING, WORDS, Context, tokenize

Break = Literal["no_mask", "wrong_null", "too_insistent"]


def main(
    what: list[Break] | None = None,
    model_checkpoint: str = SHIPPED,
    num_samples: int = 10,
    num_steps: int = 100,
    output_dir: str | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: Precision = "auto",
) -> None:
    """Break the lesson, one thing at a time: broken_no_mask.png and so on.

    Args:
        what: no_mask, the padding is read as if it were text; wrong_null, guidance moves away from
            a prompt, not from the null prompt; too_insistent, much guidance. All unless given.
        model_checkpoint: a file, or an http(s) address; the shipped one unless given.
        num_samples: images in a row.
        num_steps: of Algorithm 2, a quick look.
        output_dir: folder of the pictures; output/ in this folder unless given.
        seed: of the noise.
        device: auto, cpu, cuda, cuda:1, mps.
        precision: of the network's arithmetic; auto is bfloat16 where the hardware has it.
    """
    check(lambda value: value >= 1, "at least 1", num_samples=num_samples, num_steps=num_steps)
    place = pick_device(device)
    process, model, content = load(model_checkpoint)
    config = content["config"]["network"]
    folder = Path(output_dir) if output_dir else Path(__file__).parent / "output"
    checkpoint.make_folder(folder)
    size = config["image_size"]
    shape = (num_samples, config["image_channels"], size, size)
    bench = Bench(process.to(place), model.to(place), shape, num_steps, seed)
    for name in what or list(BREAKS):
        with autocast(place, precision):
            rows = BREAKS[name](bench)
        save_rows(folder / f"broken_{name}.png", rows)
        print(f"{folder}/broken_{name}.png")


@dataclass
class Bench:
    """A trained network, and what to sample it with."""

    process: DDPM
    model: TextToImageUNet
    shape: tuple[int, int, int, int]
    num_steps: int
    seed: int

    @property
    def tokens(self) -> Tensor:
        """ "zero", "one", "two", ..."""
        words = [WORDS[k % 10] for k in range(self.shape[0])]
        return tokenize(words).to(self.process.signal_rate.device)

    def sample(self, network: Network) -> Tensor:
        torch.manual_seed(self.seed)
        x_T = torch.randn(self.shape, device=self.process.signal_rate.device)
        return preview(self.process, network, x_T, self.num_steps)


@torch.no_grad()
def no_mask(bench: Bench) -> dict[str, Tensor]:
    """The same prompts, padded to 64 tokens, with the mask and without it."""
    tokens = bench.tokens
    long = torch.full((len(tokens), 64), PADDING, device=tokens.device)
    long[:, : tokens.shape[1]] = tokens
    masked = bench.model.encode(long)
    seen = Context(masked.sequence, torch.ones_like(masked.real))
    return {
        "masked": bench.sample(Guided(bench.model, 1, masked, masked)),
        "padding is read": bench.sample(Guided(bench.model, 1, seen, seen)),
    }


@torch.no_grad()
def wrong_null(bench: Bench) -> dict[str, Tensor]:
    """Guidance away from "one", as if it were the null prompt."""
    tokens = bench.tokens
    condition = bench.model.encode(tokens)
    wrong = bench.model.encode(tokens[[1] * len(tokens)]) if len(tokens) > 1 else condition
    return {
        "away from null": bench.sample(bench.model.bind(tokens, 3.0)),
        'away from "one"': bench.sample(Guided(bench.model, 3.0, condition, wrong)),
    }


def too_insistent(bench: Bench) -> dict[str, Tensor]:
    """More and more guidance."""
    return {
        f"s = {scale:g}": bench.sample(bench.model.bind(bench.tokens, scale))
        for scale in (0.0, 1.0, 2.0, 4.0, 16.0)
    }


BREAKS: dict[Break, Callable[[Bench], dict[str, Tensor]]] = {
    "no_mask": no_mask,
    "wrong_null": wrong_null,
    "too_insistent": too_insistent,
}


if __name__ == "__main__":
    cli.run(main)
