"""A second opinion on samples, of another kind than the classifier's.

Its features are histograms of gradients: how much stroke there is in which direction in which part
of the image. A normal distribution for each digit tells which digit an image is, and whether it is
typical of it: a classifier can be sure of what looks like no digit, a density sees that. Nothing
here is learned by gradient descent, and nothing is drawn at random.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

BINS, CELLS, NUM_FEATURES = 8, 5, 64  # directions, cells in each axis, principal components


def gradient_histograms(levels: Tensor) -> Tensor:
    """uint8 (N, 1, H, W) -> float64 (N, BINS · CELLS²): the length of the gradient in each cell,
    shared between the two nearest directions; its root, so that no edge counts for too much."""
    parts = []
    for batch in levels.split(1000):
        x = batch.float() / 255
        dy = x[:, :, 2:, 1:-1] - x[:, :, :-2, 1:-1]
        dx = x[:, :, 1:-1, 2:] - x[:, :, 1:-1, :-2]
        direction = torch.atan2(dy, dx) * (BINS / (2 * math.pi)) % BINS
        apart = (direction - torch.arange(BINS).view(-1, 1, 1)).abs()  # (N, BINS, H-2, W-2)
        share = (1 - torch.minimum(apart, BINS - apart)).clamp(min=0)
        cells = F.adaptive_avg_pool2d(torch.hypot(dx, dy) * share, CELLS)
        parts.append(cells.sqrt().flatten(1).double())
    return torch.cat(parts)


class Judge:
    """The principal components of the histograms, and a normal for each digit in them.

    Args:
        levels: training images, uint8 (N, 1, H, W), of which the first 20,000 are used.
        labels: their digits (N,).
    """

    def __init__(self, levels: Tensor, labels: Tensor) -> None:
        histograms, labels = gradient_histograms(levels[:20_000]), labels[:20_000]
        self.mean = histograms.mean(0)
        self.axes = torch.linalg.eigh(histograms.T.cov())[1][:, -NUM_FEATURES:]
        features = (histograms - self.mean) @ self.axes
        ridge = 0.01 * features.var() * torch.eye(NUM_FEATURES).double()
        self.normals = [
            torch.distributions.MultivariateNormal(of_digit.mean(0), of_digit.T.cov() + ridge)
            for of_digit in (features[labels == digit] for digit in range(10))
        ]

    def __call__(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, NUM_FEATURES), and the log density under each digit's normal (N, 10)."""
        features = (gradient_histograms(levels) - self.mean) @ self.axes
        return features, torch.stack([p.log_prob(features) for p in self.normals], dim=1)
