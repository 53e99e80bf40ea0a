"""How close samples are to real images, in one figure that needs nothing shipped.

A small classifier is trained on the spot; samples and real images are compared by the kernel
distance of its features, as the Kernel Inception Distance does with a larger network's. The
figure ranks models of one table; it is no FID, and does not compare with figures elsewhere.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import mnist
from common.images import from_uint8


class Classifier(nn.Module):
    """Two convolutions and two layers: images (B, C, H, W) -> log-odds of the classes (B, 10)."""

    def __init__(self, image_channels: int, image_size: int, num_features: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(image_channels, 16, kernel_size=3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(16, 32, kernel_size=3, stride=2, padding=1)
        size = -(-image_size // 4)
        self.hidden = nn.Linear(32 * size * size, num_features)
        self.out = nn.Linear(num_features, 10)

    def features(self, images: Tensor) -> Tensor:
        """What every layer sees, the convolutions in the mean over 3x3 fields: strokes and
        speckle in the first, digits in the last. (B, num)."""
        h1 = F.relu(self.conv1(images))
        h2 = F.relu(self.conv2(h1))
        h3 = F.relu(self.hidden(h2.flatten(1)))
        return torch.cat([fields(h1), fields(h2), h3], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        h = F.relu(self.conv2(F.relu(self.conv1(images))))
        return self.out(F.relu(self.hidden(h.flatten(1))))


def fields(h: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(h, 3).flatten(1)


def train_classifier(data: mnist.Images, num_steps: int, device: torch.device) -> Classifier:
    """A classifier after num_steps batches of 128; the same every time on the same machine."""
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        model = Classifier(data.channels, data.size).to(device)
        batches = mnist.Batches(data.train, data.train_labels, 128, 0, device)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for step in range(1, num_steps + 1):
            images, labels = batches[step]
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval().requires_grad_(False)


@torch.no_grad()
def features(model: Classifier, levels: Tensor) -> Tensor:
    """The features of images of 8-bit levels (N, C, H, W), float64 (N, num)."""
    device = model.out.weight.device
    parts = [model.features(from_uint8(batch).to(device)) for batch in levels.split(500)]
    return torch.cat(parts).double()


def kernel_distance(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Squared distance of the means of x and y under the kernel (x·y/d + 1)³, and its error.

    E k(x, x') + E k(y, y') - 2 E k(x, y), unbiased: 0 on average for samples of one distribution,
    and so at times negative, however few they are. The error is the jackknife's, over x.

    x (N, d), y (M, d): both in units in which each feature of y has mean 0 and variance 1.
    """
    mean, deviation = y.mean(0), y.std(0) + 1e-3 * y.std()
    x, y = (x - mean) / deviation, (y - mean) / deviation
    kxx, kyy, kxy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in [(x, x), (y, y), (x, y)])
    n, m = len(x), len(y)
    own = kxx.sum(1) - kxx.diag()  # of each x with the others
    other = kxy.mean(1)
    real = ((kyy.sum() - kyy.diag().sum()) / (m * (m - 1))).item()
    value = own.sum().item() / (n * (n - 1)) + real - 2 * other.mean().item()
    left_out = (own.sum() - 2 * own) / ((n - 1) * (n - 2)) - 2 * (other.sum() - other) / (n - 1)
    error = math.sqrt((n - 1) / n * ((left_out - left_out.mean()) ** 2).sum().item())
    return value, error
