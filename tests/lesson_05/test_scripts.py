"""Lesson 5's scripts."""

from common.break_it import Bench, BreakOptions
from common.checkpoint import Checkpoint
from lesson_05 import break_it
from lesson_05.ddpm import DDPM, linear_beta

import torch
from torch import Tensor, nn


class Draws(nn.Module):
    """Predicts no noise; in train mode it draws random numbers, as dropout does."""

    def forward(self, xt: Tensor, t: Tensor) -> Tensor:
        if self.training:
            torch.randn(3)
        return 0 * xt


def test_dropout_left_on_changes_only_the_network():
    """The noise that the sampler adds is the same in both rows."""
    config = {"network": {"image_size": 4, "image_channels": 1}}
    content = Checkpoint("lesson_05", config, "digits", 1, {})
    process, options = DDPM(linear_beta(5, 1e-4, 0.001)), BreakOptions(num_samples=2)
    bench = Bench(process, Draws().eval(), content, options, torch.device("cpu"))
    dropout_off, dropout_on = break_it.dropout_on(bench).values()
    assert torch.equal(dropout_off, dropout_on)
