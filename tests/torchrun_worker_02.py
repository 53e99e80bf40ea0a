"""The program that torchrun starts in lesson 2's tests: `torchrun_worker_02.py FOLDER`."""

import copy
import sys
from pathlib import Path

from common import distributed
from lesson_02.dpm import DPM, Pair, draw_times, erasing_beta, strata
from lesson_02.network import ConvDense

import torch
from helpers_02 import NETWORK, train
from torch import Tensor, nn


def gradients(folder: Path) -> None:
    """Write how far the gradients of all processes together, whole and in microbatches, are from
    those of one process, for the network's weights and for the learned rates."""
    cpu = torch.device("cpu")
    distributed.init(cpu)
    torch.manual_seed(0)
    pair = Pair(ConvDense(1, 28, 60, **NETWORK), DPM(erasing_beta(60), learned=True))
    nn.init.normal_(pair.network.readouts[-1].weight, std=0.02)
    x0, eps = torch.randn(2, 8, 1, 28, 28)
    t, weight = draw_times(8, strata(60, 9), cpu)
    alone = gradient(pair, pair, weight, x0, t, eps)
    lines = []
    for parts in (1, 3):
        copied = copy.deepcopy(pair)
        inner = distributed.Microbatches(copied, parts) if parts > 1 else copied
        parallel = distributed.DataParallel(inner)
        many = gradient(copied, parallel, *distributed.shard(weight, x0, t, eps))
        for name, one in alone.items():
            error = (many[name] - one).abs().max() / one.abs().max()
            lines.append(f"{name} in {parts},{error:.3g},{one.abs().max():.3g}")
    (folder / f"gradients_{distributed.rank()}").write_text("\n".join(lines))


def gradient(
    pair: Pair, called: nn.Module, weight: Tensor, x0: Tensor, t: Tensor, eps: Tensor
) -> dict[str, Tensor]:
    """The gradient of the training loss, by parameter."""
    pair.zero_grad()
    process = pair.process
    (weight * process.vlb_term(called, x0, t, eps) - process.ceiling()).mean().backward()
    return {name: parameter.grad for name, parameter in pair.named_parameters()}


def main() -> None:
    folder = Path(sys.argv[1])
    gradients(folder)
    settings = {"num_training_steps": 4, "learned_beta": True, "log_every": 2, "num_samples": 0}
    train(folder / "run", **settings)


if __name__ == "__main__":
    main()
