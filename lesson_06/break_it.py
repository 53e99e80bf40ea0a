"""Break one thing at a time, to see what it is for.

Each break changes one line of the lesson. The shipped network is sampled with and without the
change, from the same noise.
"""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any, Literal

from common import cli
from common.break_it import Bench, BreakOptions, run_breaks
from common.errors import check_at_least
from lesson_05.ddpm import Network
from lesson_05.text_to_image.text import tokenize
from lesson_06.ddim import ddim_sample, ddim_timesteps, slerp
from lesson_06.sample_ddim import SHIPPED

import torch
from torch import Tensor, nn

Break = Literal["dropout_on", "number_for_time", "straight_line"]


def main(
    what: list[Break] | None = None,
    num_steps: int = 50,
    options: BreakOptions = BreakOptions(model_checkpoint=SHIPPED, num_samples=10),
) -> None:
    """Break the lesson, one thing at a time. Writes broken_dropout_on.png and so on.

    It needs a checkpoint of the text-to-image network.

    Args:
        what: dropout_on, the network is sampled in train mode, with dropout 0.1; number_for_time,
            its time input is the number of the step; straight_line, interpolation on the straight
            line between two noises instead of the arc. All three unless given.
        num_steps: S, the number of sampling steps.
    """
    check_at_least(2, num_samples=options.num_samples)
    breaks = {name: partial(function, num_steps=num_steps) for name, function in BREAKS.items()}
    run_breaks("lesson_06", breaks, what, options, "lesson_05.text_to_image")


def bind_classes(model: Any, count: int) -> Network:
    """The network with the prompts "0", "1", "2", ... or other classes, repeated from the first."""
    return model.bind(tokenize([model.classes[k % len(model.classes)] for k in range(count)]))


def dropout_on(bench: Bench, num_steps: int) -> dict[str, Tensor]:
    """With dropout, two runs from the same noise differ although η = 0. The shipped network was
    trained without, so that its dropout layers are given the paper's rate, 0.1."""
    broken = deepcopy(bench.model).train()
    for layer in broken.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.1
    x_T, rows = bench.noise(), {}
    for name, model in [("unchanged", bench.model), ("dropout on", broken)]:
        network = bind_classes(model, len(x_T))
        rows[name] = ddim_sample(network, bench.process, x_T, num_steps)
        rows[f"{name}, again"] = ddim_sample(network, bench.process, x_T, num_steps)
    return rows


def number_for_time(bench: Bench, num_steps: int) -> dict[str, Tensor]:
    """The number i of the step as the network's time input, where it should be τ_i."""
    x_T = bench.noise()
    network = bind_classes(bench.model, len(x_T))
    times = ddim_timesteps(bench.process.num_timesteps, num_steps)
    number = {t: i for i, t in enumerate(times, 1)}

    def broken(xt: Tensor, t: Tensor) -> Tensor:
        return network(xt, torch.full_like(t, number[int(t[0])]))

    return {
        "time input τ": ddim_sample(network, bench.process, x_T, num_steps),
        "time input i": ddim_sample(broken, bench.process, x_T, num_steps),
    }


def straight_line(bench: Bench, num_steps: int) -> dict[str, Tensor]:
    """Unconditional samples between two noises: the arc keeps their norm, the line does not."""
    x_T = bench.noise()
    fractions = [k / (len(x_T) - 1) for k in range(len(x_T))]
    x, y = x_T[:1], x_T[1:2]
    arc = torch.cat([slerp(x, y, frac) for frac in fractions])
    line = torch.cat([(1 - frac) * x + frac * y for frac in fractions])
    network = bench.model.bind(tokenize(["0"] * len(x_T)), guidance=0)
    return {
        "arc": ddim_sample(network, bench.process, arc, num_steps),
        "straight line": ddim_sample(network, bench.process, line, num_steps),
    }


BREAKS: dict[Break, Callable[..., dict[str, Tensor]]] = {
    "dropout_on": dropout_on,
    "number_for_time": number_for_time,
    "straight_line": straight_line,
}


if __name__ == "__main__":
    cli.run(main)
