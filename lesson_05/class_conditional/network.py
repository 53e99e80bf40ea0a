"""Lesson 5's U-Net with a class label, whose embedding is added to that of the time.

process.loss(partial(model, label=label), ...)  # with labels bound, a network like any other
"""

from typing import Any

import torch
from torch import Tensor, nn

from lesson_05.guidance import Guided
from lesson_05.unet import UNet, timestep_embedding


class ClassConditionalUNet(UNet):
    """eps_hat = model(xt, t, label), label int64 (B,), 0 to num_classes.

    The label num_classes is the null class. Its embedding is learned, and it stands for no
    condition [HoSalimans22 Section 3.2].

    Args:
        num_classes: classes of the data.
        network: the arguments of the U-Net.
    """

    def __init__(self, num_classes: int, **network: Any) -> None:
        super().__init__(**network)
        self.num_classes = num_classes
        self.label = nn.Embedding(num_classes + 1, 4 * self.channels)

    def forward(self, xt: Tensor, t: Tensor, label: Tensor) -> Tensor:  # type: ignore[override]
        time = self.time(timestep_embedding(t, self.channels))
        return self.estimate(xt, time + self.label(label))

    def null(self, label: Tensor) -> Tensor:
        """The null class, as often as there are labels."""
        return torch.full_like(label, self.num_classes)

    def bind(self, label: Tensor, guidance: float = 1.0) -> Guided:
        """The network for images of these classes (B,)."""
        return Guided(self, guidance, label, self.null(label))
