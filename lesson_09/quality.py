"""How close samples are to real images, as one number, without a downloaded network.

A small classifier is trained first. Samples and real images are compared by the kernel distance of
their features in it, like the Kernel Inception Distance with its larger network. The number ranks
the models of one table. It is not an FID and cannot be compared with published numbers.
"""

import math
from collections.abc import Sequence

from common.data import Batches, Images, from_uint8
from common.device import forked_rng

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Classifier(nn.Module):
    """Two convolutions and two linear layers: images (B, C, H, W) -> logits (B, num_classes)."""

    def __init__(
        self,
        image_channels: int,
        image_size: Sequence[int],
        num_classes: int,
        num_features: int = 64,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(image_channels, 16, kernel_size=3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(16, 32, kernel_size=3, stride=2, padding=1)
        height, width = (-(-side // 4) for side in image_size)
        self.hidden = nn.Linear(32 * height * width, num_features)
        self.out = nn.Linear(num_features, num_classes)

    def layers(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The activations of the three hidden layers, from strokes and speckle in the first to
        classes in the last."""
        h1 = F.relu(self.conv1(images))
        h2 = F.relu(self.conv2(h1))
        return h1, h2, F.relu(self.hidden(h2.flatten(1)))

    def features(self, images: Tensor) -> Tensor:
        """All activations, those of the convolutions averaged over a 3x3 grid. (B, num)."""
        h1, h2, h3 = self.layers(images)
        grids = [F.adaptive_avg_pool2d(h, 3).flatten(1) for h in (h1, h2)]
        return torch.cat([*grids, h3], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.out(self.layers(images)[-1])


def train_classifier(data: Images, num_steps: int, device: torch.device) -> Classifier:
    """A classifier after num_steps batches of up to 128; reproducible on the same machine."""
    with forked_rng(device, 0), torch.enable_grad():
        model = Classifier(data.channels, data.size, len(data.classes)).to(device)
        count = min(128, len(data.train))
        batches = Batches(data.train, data.train_labels, count, 0, device)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for step in range(1, num_steps + 1):
            images, labels = batches[step]
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval().requires_grad_(False)


@torch.no_grad()
def features(model: Classifier, levels: Tensor) -> Tensor:
    """The features of images of 8-bit levels (N, C, H, W), float64 (N, num), on the CPU."""
    device = model.out.weight.device
    parts = [model.features(from_uint8(batch).to(device)) for batch in levels.split(500)]
    return torch.cat(parts).cpu().double()  # Apple's GPUs have no float64


def kernel_distance(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Squared maximum mean discrepancy of x and y, for the kernel (x·y/d + 1)³, and its error.

    E k(x, x') + E k(y, y') - 2 E k(x, y), estimated without bias: if x and y have the same
    distribution it is 0 on average, whatever N and M, and so sometimes negative. The standard error
    is the jackknife's, over x.

    x (N, d), y (M, d): both are standardised by the mean and deviation of each feature of y.
    """
    mean, deviation = y.mean(0), y.std(0) + 1e-3 * y.std()
    x, y = (x - mean) / deviation, (y - mean) / deviation
    kxx, kyy, kxy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in [(x, x), (y, y), (x, y)])
    n, m = len(x), len(y)
    own = kxx.sum(1) - kxx.diag()  # of each x with all other x
    other = kxy.mean(1)
    real = ((kyy.sum() - kyy.diag().sum()) / (m * (m - 1))).item()
    value = own.sum().item() / (n * (n - 1)) + real - 2 * other.mean().item()
    without_one = (own.sum() - 2 * own) / ((n - 1) * (n - 2)) - 2 * (other.sum() - other) / (n - 1)
    spread = ((without_one - without_one.mean()) ** 2).sum().item()
    return value, math.sqrt((n - 1) / n * spread)
