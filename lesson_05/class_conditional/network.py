"""Lesson 5's U-Net with a class label, whose embedding is added to the embedding of the time.

process.loss(partial(model, label=label), ...)  # called as network(xt, t)
"""

from typing import Any

from lesson_05.guidance import Guided
from lesson_05.unet import UNet, timestep_embedding

import torch
from torch import Tensor, nn


class ClassConditionalUNet(UNet):
    """eps_hat = model(xt, t, label), label int64 (B,), 0 to num_classes.

    The label num_classes is the null class, which means "no condition". Its embedding is learned
    [HoSalimans22 Section 3.2].

    Args:
        num_classes: number of classes, without the null class.
        network: the arguments of the U-Net.
    """

    def __init__(self, num_classes: int, **network: Any) -> None:
        super().__init__(**network)
        self.num_classes = num_classes
        self.label = nn.Embedding(num_classes + 1, 4 * self.channels)
        self.classes = [str(label) for label in range(num_classes)]  # their names

    def forward(self, xt: Tensor, t: Tensor, label: Tensor) -> Tensor:  # type: ignore[override]
        time = self.time(timestep_embedding(t, self.channels))
        return self.estimate(xt, time + self.label(label))

    def null(self, label: Tensor) -> Tensor:
        """The null class in place of each label (B,)."""
        return torch.full_like(label, self.num_classes)

    def bind(self, label: Tensor, guidance: float = 1.0) -> Guided:
        """The network for images of these classes (B,)."""
        return Guided(self, guidance, label, self.null(label))
