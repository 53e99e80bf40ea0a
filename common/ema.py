"""The averaged copy of a network, which is used for sampling."""

from typing import Any, Self

from common.errors import UserError

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

Tensors = tuple[Tensor, ...] | list[Tensor]


class Ema(AveragedModel):
    """Exponential moving average of a network's weights, always in eval mode.

    After n updates, the decay of the next one is min(decay, (1 + n) / (10 + n)). Without this
    warm-up, decay 0.9999 would leave the average near the initial weights for 10,000 steps.

    Call `update_parameters(model)` after each optimiser step, and call the average like a network.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"ema_decay is {decay}: it must be at least 0 and below 1")

        @torch.no_grad()
        def update(averages: Tensors, values: Tensors, num_averaged: Tensor | int) -> None:
            n = int(num_averaged)
            torch._foreach_lerp_(averages, values, 1 - min(decay, (1 + n) / (10 + n)))

        super().__init__(model, multi_avg_fn=update)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)
