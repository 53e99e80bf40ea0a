"""Leave out or overdo one thing at a time, to see what it is for.

The shipped network with labels is sampled as in the lesson and with one thing changed, with the
same noise in every step.
"""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Literal

from common import cli
from common.break_it import Bench, BreakOptions, run_breaks
from common.errors import check_at_least
from lesson_05.class_conditional.sample_mnist import SHIPPED
from lesson_05.ddpm import Network, preview

import torch
from torch import Tensor

Break = Literal["too_insistent", "never_dropped", "no_difference"]


def main(
    what: list[Break] | None = None,
    num_steps: int = 100,
    options: BreakOptions = BreakOptions(model_checkpoint=SHIPPED, num_samples=10),
) -> None:
    """Break the lesson, one thing at a time. Writes broken_too_insistent.png and so on.

    Args:
        what: too_insistent, too much guidance; never_dropped, an untrained null class;
            no_difference, the conditional estimate itself is scaled. All three unless given.
        num_steps: steps of `preview`, fewer than the T steps of Algorithm 2.
    """
    check_at_least(1, num_steps=num_steps)
    breaks = {name: partial(function, num_steps=num_steps) for name, function in BREAKS.items()}
    run_breaks("lesson_05.class_conditional", breaks, what, options)


def labels(bench: Bench) -> Tensor:
    """0, 1, 2, ..., repeated from 0 on."""
    label = torch.arange(bench.options.num_samples, device=bench.device)
    return label % bench.model.num_classes


def sample(bench: Bench, network: Network, num_steps: int) -> Tensor:
    return preview(bench.process, network, bench.noise(), num_steps)


def too_insistent(bench: Bench, num_steps: int) -> dict[str, Tensor]:
    """Samples with more and more guidance."""
    return {
        f"s = {scale:g}": sample(bench, bench.model.bind(labels(bench), scale), num_steps)
        for scale in (0.0, 1.0, 2.0, 4.0, 16.0)
    }


def never_dropped(bench: Bench, num_steps: int) -> dict[str, Tensor]:
    """Guidance away from a null class with its random initial embedding.

    It imitates training without dropped labels; the rest of the network was trained with them.
    """
    label, untrained = labels(bench), deepcopy(bench.model)
    torch.manual_seed(bench.options.seed + 1)  # not the seed of the samples' noise
    untrained.label.weight[-1].normal_()  # the initial distribution of nn.Embedding
    return {
        "s = 3": sample(bench, bench.model.bind(label, 3.0), num_steps),
        "never dropped": sample(bench, untrained.bind(label, 3.0), num_steps),
        "its null class": sample(bench, untrained.bind(label, 0.0), num_steps),
    }


def no_difference(bench: Bench, num_steps: int) -> dict[str, Tensor]:
    """s ε̂(xt, t, c), without the difference from ε̂(xt, t, ∅)."""
    conditional = bench.model.bind(labels(bench))

    def scaled(xt: Tensor, t: Tensor) -> Tensor:
        return 2 * conditional(xt, t)

    return {
        "s = 2": sample(bench, bench.model.bind(labels(bench), 2.0), num_steps),
        "no difference": sample(bench, scaled, num_steps),
    }


BREAKS: dict[Break, Callable[..., dict[str, Tensor]]] = {
    "too_insistent": too_insistent,
    "never_dropped": never_dropped,
    "no_difference": no_difference,
}


if __name__ == "__main__":
    cli.run(main)
