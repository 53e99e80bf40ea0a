"""How close samples are to real images, from features (N, d) of a classifier, or from pixels."""

import math
from importlib.util import find_spec
from typing import Any

from benchmarks.quality import classifier
from benchmarks.quality.judge import Judge
from benchmarks.records import check_installed
from common.data import Images
from common.errors import UserError

import torch
from torch import Tensor, nn
from tqdm import tqdm

SURE = 0.95  # the classifier is sure if one digit has at least this probability
FEW = 500  # samples for a second FID, comparable with rows that have no more
DRAWS = 20  # sets of real images to average over, if there are enough images
FROM_FEATURES = ["fid", "fid_error", "fid_500", "share_sure", "class_balance_bits", "agreement"]
FROM_FEATURES += ["precision", "recall"]
FROM_FEATURES += ["judge_fid", "judge_fid_error", "judge_typical", "judge_agreement"]


class PrecomputedFeatures(nn.Module):
    """Replaces torchmetrics' Inception network: the inputs are features already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def fid(features: Tensor, real: Tensor) -> float:
    """Fréchet distance between normals with the features' means and covariances [Heusel17 Eq. 6].

    |μ - μr|² + tr(Σ + Σr - 2 (Σ Σr)^½), for float64 features (N, d), (M, d).

    N must exceed d, else the covariance is singular and the distance too large. The distance still
    falls as N grows: compare only distances of equal N.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    check_count(len(features), features.shape[1])
    metric = FrechetInceptionDistance(feature=PrecomputedFeatures(features.shape[1]))
    metric.update(features, real=False)
    metric.update(real, real=True)
    return max(metric.compute().item(), 0.0)  # rounding can leave -1e-12 for equal sets


def fid_error(features: Tensor, real: Tensor) -> float:
    """Standard error of fid(features, real) over draws of as many samples; the real images stay.

    Each sample x moves the distance by h(x)/N [the delta method], so the error is √(var h / N):

    h(x) = 2 (μ - μr)ᵀ(x - μ) + (x - μ)ᵀ(1 - M)(x - μ),  M = Σr^½ (Σr^½ Σ Σr^½)^-½ Σr^½
    """
    root, centred = power(real.T.cov(), 0.5), features - features.mean(0)
    M = root @ power(root @ features.T.cov() @ root, -0.5) @ root
    shift = centred @ (features.mean(0) - real.mean(0))
    h = 2 * shift + (centred**2).sum(1) - (centred @ M * centred).sum(1)
    return (h.std() / len(h) ** 0.5).item()


def power(matrix: Tensor, exponent: float) -> Tensor:
    """A power of a symmetric matrix without negative eigenvalues; those that are 0 stay 0."""
    values, vectors = torch.linalg.eigh(matrix)
    kept = values > 1e-9 * values[-1]
    return vectors[:, kept] * values[kept] ** exponent @ vectors[:, kept].T


def share_error(share: float, count: int) -> float:
    """Standard error of a share of `count` samples: the deviation of its posterior, from a flat
    prior, which is not 0 for a share of 0 or 1. It holds for precision and recall as well: over
    twelve draws of 2,000 real images these have deviations of 0.0085 and 0.0076, by this formula
    0.0082 and 0.0076."""
    mean = (share * count + 1) / (count + 2)
    return math.sqrt(mean * (1 - mean) / (count + 3))


def inception() -> Any:
    """What torchmetrics takes for Inception: its weights are downloaded at the first use."""
    if find_spec("torch_fidelity") is None:
        raise UserError("--inception needs torch-fidelity: pip install 'torchmetrics[image]'")
    return 2048


def inception_fid(levels: Tensor, real: Tensor, device: torch.device) -> float:
    """FID of uint8 images (N, C, H, W) in the 2,048 features of Inception [Heusel17]. Published
    figures are of 50,000 samples, against all the training images."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    device = device if device.type == "cuda" else torch.device("cpu")  # it needs float64
    metric = FrechetInceptionDistance(feature=inception()).to(device)
    for images, is_real in ((levels, False), (real, True)):
        for batch in tqdm(images.split(100), "Inception", leave=False, disable=None):
            metric.update(batch.to(device).expand(-1, 3, -1, -1), real=is_real)
    return metric.compute().item()


NUM_FEATURES = 64  # of the shipped classifier


def check_count(num_samples: int, num_features: int) -> None:
    if num_samples <= num_features:
        raise UserError(
            f"num_samples is {num_samples}: it must be at least {num_features + 1}, or the "
            f"covariance of the classifier's {num_features} features is singular"
        )


def precision_recall(features: Tensor, real: Tensor, k: int = 3) -> tuple[float, float]:
    """The fraction of samples near real images, and the fraction of real images near samples
    [Kynkaanniemi19 Eq. 1-3].

    Near a set means inside a ball around one of its points, whose radius is that point's distance
    to its k-th neighbour in the set. Precision is low if samples do not look like digits, recall if
    some kinds of digits are never drawn.
    """
    return fraction_inside(features, real, k), fraction_inside(real, features, k)


def fraction_inside(points: Tensor, centres: Tensor, k: int) -> float:
    """The fraction of points (N, d) inside at least one of the balls around centres (M, d)."""
    if len(centres) <= k:
        raise UserError(f"{len(centres)} images: precision and recall need more than {k}")
    # The nearest centre to each is itself, at distance 0: hence k + 1.
    radius = torch.cat(
        [torch.cdist(part, centres).kthvalue(k + 1, dim=1).values for part in centres.split(500)]
    )
    inside = [(torch.cdist(part, centres) <= radius).any(1) for part in points.split(500)]
    return torch.cat(inside).double().mean().item()


def entropy_bits(classes: Tensor) -> float:
    """Entropy of the frequencies of the classes, in bits: log2(10) = 3.32 for ten equal ones."""
    frequency = classes.bincount().double() / len(classes)
    return -torch.special.xlogy(frequency, frequency).sum().item() / math.log(2) + 0.0


def nearest(levels: Tensor, training: Tensor) -> tuple[Tensor, Tensor]:
    """Distance from each image (N, C, H, W) to the nearest training image, and the index of that
    image, (N,) each.

    The distance is Euclidean, of pixels in [0, 1]; a copy has distance 0.
    """
    x, y = (part.flatten(1).float() / 255 for part in (levels, training))
    half_norm = 0.5 * (y**2).sum(1)
    # |x - y|² is least where |y|²/2 - xᵀy is. The distance itself is then computed without
    # cancellation, so that a copy has exactly 0.
    batches = x.split(250)
    bar = tqdm(batches, "nearest training image", leave=False, disable=len(batches) < 5)
    index = torch.cat([(half_norm - batch @ y.T).argmin(1) for batch in bar])
    return (x - y[index]).norm(dim=1), index


class Reference:
    """The real images that samples are compared with, and their features.

    These are the test images, which neither the classifier nor the network that drew the samples
    was trained on. Training images in place of samples show what a perfect network would reach.
    The classifier knows 28x28 digits. For other data there are no features, and all metrics of
    FROM_FEATURES are None.
    """

    def __init__(self, data: Images, device: torch.device) -> None:
        check_installed("torchmetrics")
        self.data, self.device = data, device
        self.measured: dict[tuple[int, bool], dict[str, Any]] = {}
        order = shuffled(len(data.test))
        self.test, self.labels = data.test[order], data.test_labels[order]
        self.model: Any = None
        self.accuracy: float | None = None
        self.judge_accuracy: float | None = None
        if data.name not in ("mnist", "digits") or data.shape != (1, 28, 28):
            return
        self.model = classifier.load().to(device)
        self.features, probabilities = classifier.classify(self.model, self.test)
        self.accuracy = (probabilities.argmax(1) == self.labels).double().mean().item()
        self.judge = Judge(data.train, data.train_labels)
        self.judge_features, density = self.judge(self.test)
        self.judge_accuracy = (density.argmax(1) == self.labels).double().mean().item()
        self.typical = density.amax(1).quantile(0.05)

    def compare(self, levels: Tensor, digits: Tensor | None = None) -> dict[str, Any]:
        """The metrics of samples (N, 1, 28, 28). With digits (N,), their conditions, also the
        fraction of samples that the classifier recognises as their digit."""
        if self.model is None:
            return dict.fromkeys(FROM_FEATURES)
        features, probabilities = classifier.classify(self.model, levels)
        probability, digit = probabilities.max(1)
        precision, recall = precision_recall(features, self.features[: len(levels)])
        agreement = None if digits is None else (digit == digits).double().mean().item()
        judge_features, density = self.judge(levels)
        judged = None if digits is None else (density.argmax(1) == digits).double().mean().item()
        return {
            "fid": fid(features, self.features),
            "fid_error": fid_error(features, self.features),
            "fid_500": fid(features[:FEW], self.features) if len(features) >= FEW else None,
            "share_sure": (probability >= SURE).double().mean().item(),
            "class_balance_bits": entropy_bits(digit),
            "agreement": agreement,
            "precision": precision,
            "recall": recall,
            "judge_fid": fid(judge_features, self.judge_features),
            "judge_fid_error": fid_error(judge_features, self.judge_features),
            "judge_typical": (density.amax(1) >= self.typical).double().mean().item(),
            "judge_agreement": judged,
        }

    def real(self, count: int, balanced: bool = False) -> dict[str, Any]:
        """The metrics of `count` real images: means over up to 20 disjoint sets of training
        images, and the distances of `count` test images to the nearest training image.

        Balanced sets have every digit equally often, like samples drawn with a condition.
        """
        if (count, balanced) not in self.measured:
            self.measured[count, balanced] = self.measure_real(count, balanced)
        return self.measured[count, balanced]

    def measure_real(self, count: int, balanced: bool) -> dict[str, Any]:
        if self.model is not None:
            check_count(count, self.model.num_features)
        nearest_distance, _ = nearest(self.test[:count], self.data.train)
        distance = {
            "nearest_median": nearest_distance.median().item(),
            "nearest_least": nearest_distance.min().item(),
        }
        if self.model is None:
            return {**dict.fromkeys(FROM_FEATURES), "fid_deviation": None, "draws": 0, **distance}
        order = shuffled(len(self.data.train))
        if balanced:
            order = alternate_digits(order, self.data.train_labels)
        if count > len(order):
            raise UserError(
                f"num_samples is {count:,}: it must be at most {len(order):,}, the number of real "
                "images to compare with"
            )
        sets = [part for part in order.split(count)[:DRAWS] if len(part) == count]
        rows = [self.compare(self.data.train[s], self.data.train_labels[s]) for s in sets]
        means = {
            name: None if value is None else sum(row[name] for row in rows) / len(rows)
            for name, value in rows[0].items()
        }
        distances = torch.tensor([row["fid"] for row in rows])
        return {
            **means,
            "fid_deviation": distances.std().item() if len(rows) > 1 else None,
            "draws": len(rows),
            **distance,
        }


def shuffled(count: int) -> Tensor:
    """A fixed random order: MNIST's own begins with the tidier writers."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


def alternate_digits(order: Tensor, labels: Tensor) -> Tensor:
    """From images in this order: the first of every digit, then the second of every digit, ..."""
    groups = [order[labels[order] == digit] for digit in labels.unique()]
    length = min(map(len, groups))
    return torch.stack([group[:length] for group in groups], dim=1).flatten()
