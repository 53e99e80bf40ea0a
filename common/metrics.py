"""Figures that say how good samples are, from features (N, d) of a classifier, or from pixels."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm import tqdm

from common import classifier, mnist
from common.errors import UserError

SURE = 0.95  # the least probability of one digit at which the classifier counts as sure
FEW = 500  # of the samples, for a distance that compares with rows of fewer samples
DRAWS = 5  # of real images, where there are enough, for the figure that real images get


class Given(nn.Module):
    """In place of a feature network, for the library: the features are computed already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def fid(features: Tensor, real: Tensor) -> float:
    """Fréchet distance of the normals with the features' means and covariances [Heusel17 Eq. 6].

    |μ - μr|² + tr(Σ + Σr - 2 (Σ Σr)^½), for float64 features (N, d), (M, d).

    Covariances of few samples are singular and the distance is then too large: N must exceed d.
    Even so it falls with N, and figures of another N do not compare.
    """
    check_count(len(features), features.shape[1])
    metric = FrechetInceptionDistance(feature=Given(features.shape[1]))
    metric.update(features, real=False)
    metric.update(real, real=True)
    return max(metric.compute().item(), 0.0)  # of a set with itself rounding leaves ±1e-12 or so


def check_count(num_samples: int, num_features: int) -> None:
    if num_samples <= num_features:
        raise UserError(
            f"num_samples is {num_samples}: take at least {num_features + 1}, more than the "
            f"classifier has features ({num_features}), or their covariance is singular"
        )


def precision_recall(features: Tensor, real: Tensor, k: int = 3) -> tuple[float, float]:
    """The share of samples near real images, and the share of real images near samples
    [Kynkaanniemi19 Eq. 1-3].

    Near a set: within the ball around one of its points that reaches to this point's k-th neighbour
    in the set. Precision falls with samples that look like no digit, recall with kinds of digits
    that are never drawn.
    """
    return covered(features, real, k), covered(real, features, k)


def covered(points: Tensor, centres: Tensor, k: int) -> float:
    """The share of points (N, d) that lie in one of the balls around the centres (M, d)."""
    if len(centres) <= k:
        raise UserError(f"{len(centres)} images: precision and recall take more than {k}")
    # The nearest of all is the centre itself, at distance 0.
    radius = torch.cat(
        [torch.cdist(some, centres).kthvalue(k + 1, dim=1).values for some in centres.split(500)]
    )
    inside = [(torch.cdist(some, centres) <= radius).any(1) for some in points.split(500)]
    return torch.cat(inside).double().mean().item()


def entropy_bits(classes: Tensor) -> float:
    """Entropy of how often each class comes up, in bits: log2(10) = 3.32 where ten are equal."""
    share = classes.bincount().double() / len(classes)
    return -torch.special.xlogy(share, share).sum().item() / math.log(2) + 0.0


def nearest(levels: Tensor, training: Tensor) -> tuple[Tensor, Tensor]:
    """For each image (N, C, H, W) the nearest training image: distance and index, (N,) each.

    The distance is the root of the summed squares of differences, pixels in [0, 1]; 0 is a copy.
    """
    x, y = (part.flatten(1).float() / 255 for part in (levels, training))
    half_norm = 0.5 * (y**2).sum(1)
    # |x - y|² is least where |y|²/2 - xᵀy is; the distance itself is then computed without
    # cancellation, so that a copy has exactly 0.
    batches = x.split(250)
    bar = tqdm(batches, "nearest training image", leave=False, disable=len(batches) < 5)
    index = torch.cat([(half_norm - some @ y.T).argmin(1) for some in bar])
    return (x - y[index]).norm(dim=1), index


class Reference:
    """Real images as the classifier sees them: what samples are compared with.

    That is the test set, which neither the classifier nor the network that drew the samples has
    seen. What a perfect network would reach is measured on training images in place of samples.
    """

    def __init__(self, data: mnist.Images, device: torch.device) -> None:
        self.data, self.device = data, device
        self.measured: dict[tuple[int, bool], dict[str, Any]] = {}
        self.model = classifier.load().to(device)
        order = shuffled(len(data.test))
        self.test, self.labels = data.test[order], data.test_labels[order]
        self.features, probabilities = classifier.look(self.model, self.test)
        self.accuracy = (probabilities.argmax(1) == self.labels).double().mean().item()

    def figures(self, levels: Tensor, digits: Tensor | None = None) -> dict[str, Any]:
        """Of samples (N, 1, 28, 28), and of the digits (N,) that they should be, if any."""
        features, probabilities = classifier.look(self.model, levels)
        likeliest = probabilities.max(1)
        near, far = precision_recall(features, self.features[: len(levels)])
        agree = None if digits is None else (likeliest.indices == digits).double().mean().item()
        return {
            "fid": fid(features, self.features),
            "fid_500": fid(features[:FEW], self.features) if len(features) >= FEW else None,
            "share_sure": (likeliest.values >= SURE).double().mean().item(),
            "class_balance_bits": entropy_bits(likeliest.indices),
            "agreement": agree,
            "precision": near,
            "recall": far,
        }

    def real(self, count: int, balanced: bool = False) -> dict[str, Any]:
        """The figures of so many real images: means over up to five disjoint draws of training
        images, and the distances to the nearest training image of as many test images.

        Balanced draws have every digit equally often, as samples have that were asked for so.
        """
        check_count(count, self.model.num_features)
        if (count, balanced) in self.measured:
            return self.measured[count, balanced]
        order = shuffled(len(self.data.train))
        if balanced:
            order = digits_in_turn(order, self.data.train_labels)
        if count > len(order):
            raise UserError(
                f"num_samples is {count:,}: take at most {len(order):,}, of which there "
                "are real images to compare with"
            )
        draws = [d for d in order.split(count)[:DRAWS] if len(d) == count]
        rows = [self.figures(self.data.train[d], self.data.train_labels[d]) for d in draws]
        means = {
            key: None if first is None else sum(row[key] for row in rows) / len(rows)
            for key, first in rows[0].items()
        }
        distances = torch.tensor([row["fid"] for row in rows])
        deviation = distances.std().item() if len(rows) > 1 else None
        away, _ = nearest(self.test[:count], self.data.train)
        self.measured[count, balanced] = {
            **means,
            "fid_deviation": deviation,
            "draws": len(rows),
            "nearest_median": away.median().item(),
            "nearest_least": away.min().item(),
        }
        return self.measured[count, balanced]


def shuffled(count: int) -> Tensor:
    """The same order every time: MNIST's own has its tidier writers first."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


def digits_in_turn(order: Tensor, labels: Tensor) -> Tensor:
    """Of images in this order, the first of every digit, then the second of every digit, ..."""
    of_digit = [order[labels[order] == digit] for digit in labels.unique()]
    least = min(len(some) for some in of_digit)
    return torch.stack([some[:least] for some in of_digit], dim=1).flatten()
