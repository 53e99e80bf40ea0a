"""Exercises of lesson 5 with classes. Replace each ... and run, from this folder,

    python exercises.py        # all
    python exercises.py 3      # one

The questions are in the README, where the answers are folded away.
"""

import math
from collections.abc import Callable
from typing import Any

from common import exercises
from lesson_05.ddpm import DDPM, linear_beta
from lesson_05.guidance import Guided

import torch
from torch import Tensor

# 1. Labels are dropped with probability 0.1, independently of each other. What share of the batches
# of 64 images loses no label at all? A number or a formula.
share_of_full_batches: Any = ...


# 2. Dropping, as the training loop needs it.
def drop(condition: Tensor, null: Tensor, probability: float) -> Any:
    """Each image's condition, replaced by its null condition with this probability.

    condition and null have the same shape (B, ...): labels (B,), or tokens (B, L).
    """
    return ...


# 3. The guided noise estimate.
def guided(eps_null: Tensor, eps_cond: Tensor, s: float) -> Any:
    """s = 0 is without the condition, s = 1 with it, s > 1 goes past it."""
    return ...


# 4. The density that guidance aims at, in an example: x | c is N(c, 1), and c is N(0, 1).
def density(c: float, s: float) -> Any:
    """Mean and variance of the Gaussian that is proportional to p(x) p(c | x)^s: two numbers."""
    return ...


# 5. A network that knows labels is also a classifier: by Bayes' rule, the label that explains an
# image best is the one whose loss is smallest.
def classify(process: DDPM, model: Callable[..., Tensor], x0: Tensor, num_classes: int) -> Any:
    """The label, int64 (B,), of each image x0 (B, C, H, W), from the losses at t = 200.

    model is called as model(xt, t, label); process.q_sample(x0, t, eps) is the noisy image.
    """
    return ...


def check_1_no_label_dropped() -> None:
    assert math.isclose(share_of_full_batches, 0.9**64, rel_tol=0.05), (
        "every one of the 64 labels must survive, and each survives with probability 0.9"
    )


def check_2_drop() -> None:
    torch.manual_seed(0)
    label, null = torch.arange(4000) % 10, torch.full((4000,), 10)
    out = drop(label, null, 0.1)
    assert out.shape == label.shape, "the result has the shape of the condition"
    dropped = out == null
    assert torch.equal(out[~dropped], label[~dropped]), "labels that are kept must not change"
    assert 0.05 < dropped.float().mean() < 0.15, (
        "a tenth of a batch must be dropped: not all or none of it, and not the other nine tenths"
    )
    tokens, empty = torch.arange(1, 2001).view(500, 4), torch.zeros(500, 4, dtype=torch.long)
    per_image = (drop(tokens, empty, 0.5) == 0).sum(1)
    assert set(per_image.tolist()) == {0, 4}, "a prompt is dropped as a whole: one coin an image"


def check_3_guided() -> None:
    torch.manual_seed(0)
    c, null = torch.randn(2, 3, 1, 8, 8)
    for s in (0.0, 1.0, 2.5):
        lesson = Guided(lambda xt, t, condition: condition, s, c, null)
        expected = lesson(torch.zeros_like(c), torch.ones(3).long())
        out = guided(null, c, s)
        assert torch.allclose(out, expected, atol=1e-5), f"differs from Guided at s = {s:g}"


def check_4_density() -> None:
    x = torch.linspace(-20, 20, 40_001, dtype=torch.float64)
    for c, s in ((1.0, 1.0), (1.0, 3.0), (-2.0, 2.0)):
        # p(c | x) is proportional to p(x | c) / p(x), and x without c is N(0, 2)
        weight = torch.exp(-((x - c) ** 2) * s / 2 + (s - 1) * x**2 / 4)
        weight /= weight.sum()
        mean = (weight * x).sum()
        variance = (weight * (x - mean) ** 2).sum()
        answer = density(c, s)
        assert len(answer) == 2, "two numbers: the mean and the variance"
        for name, found, right in zip(("mean", "variance"), answer, (mean, variance), strict=True):
            assert math.isclose(found, right.item(), rel_tol=1e-3, abs_tol=1e-6), (
                f"at c = {c:g}, s = {s:g} the {name} is not {found:g}: "
                "add the logarithms and complete the square; p(x) is N(0, 2)"
            )


def check_5_classify() -> None:
    torch.manual_seed(0)
    process, num_classes = DDPM(linear_beta(1000)), 4
    centres = 0.35 * torch.randn(num_classes, 1, 16, 16)
    seen = []

    def model(xt: Tensor, t: Tensor, label: Tensor) -> Tensor:  # exact for N(centre, 1)
        seen.append(t)
        return process.noise_rate[t] * (xt - process.signal_rate[t] * centres[label])

    label = torch.arange(200) % num_classes
    x0 = centres[label] + torch.randn(200, 1, 16, 16)
    out = classify(process, model, x0, num_classes)
    assert out.shape == label.shape, "one label for each image"
    assert all((t == 200).all() and len(t) % len(x0) == 0 for t in seen), "every image at t = 200"
    right = (out == label).float().mean()
    assert right > 0.85, (
        f"{right:.0%} are right, {1 / num_classes:.0%} would be chance. Do all labels of an image "
        "see the same noise? The noise moves the loss more than the label does"
    )


if __name__ == "__main__":
    exercises.run(globals())
