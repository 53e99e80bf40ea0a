"""The averaged copy of a network: the one that is sampled."""

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from common.errors import UserError

Tensors = tuple[Tensor, ...] | list[Tensor]


class Ema(AveragedModel):
    """Exponential moving average of a network's weights, always in eval mode.

    After n updates the next one keeps min(decay, (1 + n) / (10 + n)) of the average. Without this
    warm-up an average of decay 0.9999 would be the initial weights for the first 10,000 steps.

    Call `update_parameters(model)` after each optimiser step; call the average itself to sample.
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
