"""Leave one thing out, and see what it was for.

A break differs from the lesson in one line. The network that comes with the lesson is sampled with
and without it, from the same noise.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from common import checkpoint, cli, lessons
from common.device import Precision, autocast, pick_device
from common.errors import UserError
from common.images import save_rows
from common.run import check
from lesson_05.ddpm import DDPM, Network
from lesson_05.text_to_image.network import TextToImageUNet
from lesson_05.text_to_image.text import digit_prompts, tokenize
from lesson_06.ddim import ddim_sample, ddim_timesteps, slerp
from lesson_06.sample_ddim import SHIPPED

Break = Literal["dropout_on", "number_for_time", "straight_line"]


def main(
    what: list[Break] | None = None,
    model_checkpoint: str = SHIPPED,
    num_samples: int = 10,
    num_steps: int = 50,
    output_dir: str | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: Precision = "auto",
) -> None:
    """Break the lesson, one thing at a time: broken_dropout_on.png and so on.

    Args:
        what: dropout_on, the network is sampled in train mode; number_for_time, it is told how
            many steps are left, not the time; straight_line, instead of the arc between two noises.
            All of them unless given.
        model_checkpoint: a text-to-image model, a file or an http(s) address; the shipped one
            unless given.
        num_samples: images in a row.
        num_steps: S.
        output_dir: folder of the pictures; output/ in this lesson's folder unless given.
        seed: of the noise.
        device: auto, cpu, cuda, cuda:1, mps.
        precision: of the network's arithmetic; auto is bfloat16 where the hardware has it.
    """
    check(lambda value: value >= 2, "at least 2", num_samples=num_samples)
    place = pick_device(device)
    process, model, content = lessons.load(model_checkpoint)
    if not isinstance(model, TextToImageUNet):
        raise UserError(f"{model_checkpoint} ({content['lesson']}) is no text-to-image model")
    ddim_timesteps(process.num_timesteps, num_steps)
    folder = Path(output_dir) if output_dir else Path(__file__).parent / "output"
    checkpoint.make_folder(folder)
    config = content["config"]["network"]
    torch.manual_seed(seed)
    size = config["image_size"]
    x_T = torch.randn(num_samples, config["image_channels"], size, size, device=place)
    bench = Bench(process.to(place), model.to(place), num_steps)
    for name in what or list(BREAKS):
        with autocast(place, precision):
            rows = BREAKS[name](bench, x_T)
        save_rows(folder / f"broken_{name}.png", rows)
        print(f"{folder}/broken_{name}.png")


@dataclass
class Bench:
    """A trained network, and what to sample it with."""

    process: DDPM
    model: TextToImageUNet
    num_steps: int

    def network(self, count: int) -> Network:
        """The network asked for 0, 1, 2, ..."""
        return self.model.bind(tokenize([digit_prompts(k % 10)[0] for k in range(count)]))

    def sample(self, network: Network, x_T: Tensor) -> Tensor:
        return ddim_sample(network, self.process, x_T, self.num_steps)


def dropout_on(bench: Bench, x_T: Tensor) -> dict[str, Tensor]:
    """η = 0, the same noise, and yet no two runs alike."""
    broken = Bench(bench.process, deepcopy(bench.model), bench.num_steps)
    for layer in broken.model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.1
    broken.model.train()
    return {
        name: some.sample(some.network(len(x_T)), x_T)
        for name, some in [
            ("as it is", bench),
            ("once more", bench),
            ("dropout on", broken),
            ("once more ", broken),
        ]
    }


def number_for_time(bench: Bench, x_T: Tensor) -> dict[str, Tensor]:
    """The loop variable in place of τ: the network hears i where it should hear τ_i."""
    network = bench.network(len(x_T))
    times = ddim_timesteps(bench.process.num_timesteps, bench.num_steps)
    number = {t: i for i, t in enumerate(times, 1)}

    def misled(xt: Tensor, t: Tensor) -> Tensor:
        return network(xt, torch.full_like(t, number[int(t[0])]))

    return {"told τ": bench.sample(network, x_T), "told i": bench.sample(misled, x_T)}


def straight_line(bench: Bench, x_T: Tensor) -> dict[str, Tensor]:
    """Between two noises, asked for nothing: the arc keeps their length, the line does not."""
    fractions = [k / (len(x_T) - 1) for k in range(len(x_T))]
    x, y = x_T[:1], x_T[1:2]
    arc = torch.cat([slerp(x, y, frac) for frac in fractions])
    line = torch.cat([(1 - frac) * x + frac * y for frac in fractions])
    network = bench.model.bind(tokenize(["0"] * len(x_T)), guidance=0)
    return {"arc": bench.sample(network, arc), "straight line": bench.sample(network, line)}


BREAKS: dict[Break, Callable[[Bench, Tensor], dict[str, Tensor]]] = {
    "dropout_on": dropout_on,
    "number_for_time": number_for_time,
    "straight_line": straight_line,
}


if __name__ == "__main__":
    cli.run(main)
