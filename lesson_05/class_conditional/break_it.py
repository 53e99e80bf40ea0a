"""Leave one thing out, or take too much of it, and see what it was for.

The network with labels that comes with the repository is sampled as the lesson does and with one
thing changed, from the same noise at every step.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from common import checkpoint, cli
from common.device import Precision, autocast, pick_device
from common.images import save_rows
from common.run import check
from lesson_05.class_conditional.network import ClassConditionalUNet
from lesson_05.class_conditional.sample_mnist import SHIPPED, load
from lesson_05.ddpm import DDPM, Network, preview

Break = Literal["too_insistent", "never_dropped", "no_difference"]


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
    """Break the lesson, one thing at a time: broken_too_insistent.png and so on.

    Args:
        what: too_insistent, much guidance; never_dropped, the null class as if it had never been
            trained; no_difference, the conditional estimate itself is scaled. All unless given.
        model_checkpoint: a file, or an http(s) address; the shipped one unless given.
        num_samples: images in a row.
        num_steps: of `preview`, a quick look.
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
    model: ClassConditionalUNet
    shape: tuple[int, int, int, int]
    num_steps: int
    seed: int

    @property
    def label(self) -> Tensor:
        """0, 1, 2, ... in turn."""
        label = torch.arange(self.shape[0]) % self.model.num_classes
        return label.to(self.process.signal_rate.device)

    def sample(self, network: Network) -> Tensor:
        torch.manual_seed(self.seed)
        x_T = torch.randn(self.shape, device=self.process.signal_rate.device)
        return preview(self.process, network, x_T, self.num_steps)


def too_insistent(bench: Bench) -> dict[str, Tensor]:
    """More and more guidance."""
    return {
        f"s = {scale:g}": bench.sample(bench.model.bind(bench.label, scale))
        for scale in (0.0, 1.0, 2.0, 4.0, 16.0)
    }


@torch.no_grad()
def never_dropped(bench: Bench) -> dict[str, Tensor]:
    """Guidance away from a null class as it is before training.

    An imitation: the network around it did learn with dropping.
    """
    untrained = deepcopy(bench.model)
    torch.manual_seed(bench.seed + 1)  # not the noise of the samples
    untrained.label.weight[-1].normal_()  # as nn.Embedding begins
    return {
        "s = 3": bench.sample(bench.model.bind(bench.label, 3.0)),
        "never dropped": bench.sample(untrained.bind(bench.label, 3.0)),
        "its null class": bench.sample(untrained.bind(bench.label, 0.0)),
    }


def no_difference(bench: Bench) -> dict[str, Tensor]:
    """s ε̂(xt, t, c), without ε̂(xt, t, ∅) to take the difference from."""
    conditional = bench.model.bind(bench.label)

    def scaled(xt: Tensor, t: Tensor) -> Tensor:
        return 2 * conditional(xt, t)

    return {
        "s = 2": bench.sample(bench.model.bind(bench.label, 2.0)),
        "no difference": bench.sample(scaled),
    }


BREAKS: dict[Break, Callable[[Bench], dict[str, Tensor]]] = {
    "too_insistent": too_insistent,
    "never_dropped": never_dropped,
    "no_difference": no_difference,
}


if __name__ == "__main__":
    cli.run(main)
