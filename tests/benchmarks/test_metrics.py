"""The classifier, and the metrics of samples: compared with closed forms and with brute force."""

import dataclasses
import itertools
import math

from benchmarks.quality import classifier
from benchmarks.quality.judge import Judge, gradient_histograms
from benchmarks.quality.metrics import (
    Reference,
    alternate_digits,
    entropy_bits,
    fid,
    fid_error,
    nearest,
    precision_recall,
    share_error,
)
from common.data import from_uint8, to_uint8
from common.errors import UserError

import pytest
import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur


def test_the_classifiers_file_is_small_and_its_sum_is_checked(tmp_path):
    assert classifier.FILE.stat().st_size <= 1_000_000
    damaged = tmp_path / "classifier.safetensors"
    data = bytearray(classifier.FILE.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(UserError, match=f"has the sha256 .*, not {classifier.SHA256}"):
        classifier.load(damaged)


def test_the_classifier_knows_digits(real_mnist):
    model = classifier.load()
    assert classifier.accuracy(model, real_mnist.test, real_mnist.test_labels) > 0.994


def test_the_features_are_means_of_the_last_feature_maps(digits):
    model = classifier.load()
    assert not model.training
    features, probabilities = classifier.classify(model, digits.test[:7])
    assert features.shape == (7, model.num_features)
    assert features.dtype == torch.float64
    with torch.no_grad():
        images = from_uint8(digits.test[:7])
        torch.testing.assert_close(model(images).softmax(1), probabilities)
        maps = model.convolutions(images)
    torch.testing.assert_close(features, maps.double().mean((2, 3)), rtol=1e-5, atol=1e-6)


def test_the_classifier_can_be_trained(digits, tmp_path, monkeypatch, capsys):
    few = dataclasses.replace(
        digits, train=digits.train[:256], train_labels=digits.train_labels[:256]
    )
    monkeypatch.setattr(classifier, "load_images", lambda *_: few)
    options = classifier.ScriptOptions(str(tmp_path), device="cpu", precision="float32")
    classifier.main(num_epochs=2, options=options)
    model = classifier.load(tmp_path / "classifier.safetensors", sha256=None)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    out = capsys.readouterr().out
    assert out.count("% of the test images") == 3
    assert "sha256" in out


def test_augmented_images_stay_close_to_the_originals(digits):
    images = from_uint8(digits.train[:50])
    moved = classifier.augment(images)
    assert moved.shape == images.shape
    assert moved.amin() >= -1 - 1e-6
    assert moved.amax() <= 1 + 1e-6
    difference = (moved - images).flatten(1).norm(dim=1)
    others = (images.roll(1, 0) - images).flatten(1).norm(dim=1)
    assert 0 < difference.mean() < others.mean()


def test_fid_of_a_set_with_itself_is_zero():
    x = torch.randn(200, 6, dtype=torch.float64)
    assert fid(x, x) == pytest.approx(0, abs=1e-9)


def test_fid_of_normals_is_the_closed_form():
    x = torch.randn(200, 6, dtype=torch.float64)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov()).T)  # exactly N(0, 1)
    shift, scale = torch.randn(6).double(), torch.rand(6).double() + 0.5
    expected = (shift**2).sum() + ((scale - 1) ** 2).sum()
    assert fid(x * scale + shift, x) == pytest.approx(expected.item(), rel=1e-9)
    a, b = (torch.randn(6, 6, dtype=torch.float64) for _ in range(2))
    p, q = a @ a.T, b @ b.T
    values = torch.linalg.eigvals(p @ q).real.clamp(min=0).sqrt().sum()
    expected = p.trace() + q.trace() - 2 * values
    y, z = x @ torch.linalg.cholesky(p).T, x @ torch.linalg.cholesky(q).T
    assert fid(y, z) == pytest.approx(expected.item(), rel=1e-6)


def test_the_error_of_fid_is_its_deviation_over_draws():
    torch.manual_seed(0)
    real = torch.randn(4000, 4, dtype=torch.float64) @ torch.randn(4, 4).double()
    for shift, scale in ((0.0, 1.3), (0.4, 1.0), (0.3, 0.7)):
        draws = scale * real[torch.randint(4000, (120, 400))] + shift
        deviation = torch.tensor([fid(draw, real) for draw in draws]).std().item()
        errors = torch.tensor([fid_error(draw, real) for draw in draws])
        assert errors.mean().item() == pytest.approx(deviation, rel=0.2), (shift, scale)
    # A feature that never varies, such as a corner's, has no part in it.
    dead = torch.zeros(4000, 1).double()
    both = torch.cat([draws[0], dead[:400]], 1), torch.cat([real, dead], 1)
    assert fid_error(*both) == pytest.approx(fid_error(draws[0], real), rel=1e-6)


def test_the_error_of_a_share():
    assert share_error(0.5, 2000) == pytest.approx(math.sqrt(0.25 / 2000), rel=1e-2)
    assert 0 < share_error(1.0, 2000) < 1e-3
    assert share_error(1.0, 2000) == pytest.approx(share_error(0.0, 2000))


def test_the_judge_knows_digits_from_what_is_none(digits, reference):
    """It needs no network, is the same each time, and is not sure of noise."""
    judge = Judge(digits.train, digits.train_labels)
    features, density = judge(reference.test)
    assert torch.equal(features, reference.judge_features)
    assert features.shape == (len(digits.test), 64)
    assert reference.judge_accuracy > 0.93
    assert (density.argmax(1) == reference.labels).double().mean() > 0.93
    kinds = {
        "real": digits.train[:400],
        "blurred": to_uint8(gaussian_blur(from_uint8(digits.train[:400]), 9, 2.5)),
        "noise": to_uint8(torch.randn(400, 1, 28, 28)),
    }
    rows = {name: reference.compare(levels) for name, levels in kinds.items()}
    assert rows["real"]["judge_typical"] > 0.9 > rows["blurred"]["judge_typical"]
    assert rows["noise"]["judge_typical"] == 0
    fids = [row["judge_fid"] for row in rows.values()]
    assert fids == sorted(fids)
    assert reference.compare(kinds["real"], digits.train_labels[:400])["judge_agreement"] > 0.95


def test_histograms_of_gradients_agree_with_a_loop():
    levels = to_uint8(torch.randn(2, 1, 12, 12))
    x = levels.double() / 255
    expected = torch.zeros(2, 8, 5, 5).double()
    for n in range(2):
        for (i, j), k in itertools.product(itertools.product(range(5), repeat=2), range(8)):
            rows, columns = (range(10 * a // 5, -(-10 * (a + 1) // 5)) for a in (i, j))
            total = 0.0
            for r, c in itertools.product(rows, columns):
                dy = (x[n, 0, r + 2, c + 1] - x[n, 0, r, c + 1]).item()
                dx = (x[n, 0, r + 1, c + 2] - x[n, 0, r + 1, c]).item()
                apart = abs(math.degrees(math.atan2(dy, dx)) % 360 - 45 * k)
                total += math.hypot(dy, dx) * max(0.0, 1 - min(apart, 360 - apart) / 45)
            expected[n, k, i, j] = math.sqrt(total / (len(rows) * len(columns)))
    torch.testing.assert_close(
        gradient_histograms(levels), expected.flatten(1), rtol=1e-4, atol=1e-4
    )


def test_fid_grows_with_noise_with_blur_and_with_missing_classes(digits, reference):
    def distance(levels: Tensor) -> float:
        return fid(classifier.classify(reference.model, levels)[0], reference.features)

    levels, labels = digits.train[:250], digits.train_labels[:250]
    clean, images = distance(levels), from_uint8(levels)
    eps = torch.randn_like(images)
    series = {
        "noise": [to_uint8(images + scale * eps) for scale in (0.2, 0.6)],
        "blur": [to_uint8(gaussian_blur(images, 9, sigma)) for sigma in (0.8, 1.5)],
        "classes": [levels[labels >= least] for least in (2, 6)],
    }
    for name, (little, much) in series.items():
        distances = distance(little), distance(much)
        assert clean < distances[0] < distances[1], (name, clean, distances)
        assert distances[1] > 2 * clean, (name, clean, distances)


def test_too_few_samples_for_a_covariance_are_refused():
    x = torch.randn(7, 6, dtype=torch.float64)
    assert math.isfinite(fid(x, x))
    with pytest.raises(UserError, match="num_samples is 6: it must be at least 7"):
        fid(x[:6], x)


def test_precision_and_recall_agree_with_loops_over_the_definition():
    real, drawn = torch.randn(60, 5).double(), torch.randn(50, 5).double() + 0.7

    def fraction(points: Tensor, centres: Tensor) -> float:
        inside = 0
        for point in points:
            for i, centre in enumerate(centres):
                others = [(c - centre).norm() for j, c in enumerate(centres) if j != i]
                if (point - centre).norm() <= sorted(others)[2]:
                    inside += 1
                    break
        return inside / len(points)

    expected = fraction(drawn, real), fraction(real, drawn)
    assert 0.2 < min(expected) < max(expected) < 0.9
    assert precision_recall(drawn, real) == expected


def test_precision_and_recall_find_different_failures():
    real = torch.randn(60, 5).double()
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real + 100, real) == (0, 0)
    two_kinds = torch.cat([real, real + 100])
    assert precision_recall(real, two_kinds) == (1, 0.5)  # one of two kinds is never drawn
    assert precision_recall(two_kinds, real) == (0.5, 1)  # half of the samples are no digits
    with pytest.raises(UserError, match="3 images: precision and recall need more than 3"):
        precision_recall(real[:3], real)


def test_entropy_of_the_classes():
    assert entropy_bits(torch.arange(10)) == pytest.approx(math.log2(10))
    assert entropy_bits(torch.full((9,), 3)) == 0
    assert entropy_bits(torch.tensor([0, 0, 9, 9])) == pytest.approx(1)


def test_the_nearest_training_image(digits):
    training = digits.train[:300]
    assert torch.equal(nearest(training[5:9], training)[0], torch.zeros(4))
    levels = training[:20].clone()
    levels[:, :, 3, 3] ^= 255  # one pixel in the corner, which is black in all
    distance, index = nearest(levels, training)
    assert torch.equal(index, torch.arange(20))
    torch.testing.assert_close(distance, torch.ones(20))
    levels = to_uint8(torch.randn(10, 1, 28, 28))
    distance, index = nearest(levels, training)
    brute = (levels[:, None].double() - training[None].double()).flatten(2).norm(dim=2) / 255
    torch.testing.assert_close(distance.double(), brute.min(1).values)
    assert torch.equal(index, brute.argmin(1))


def test_the_metrics_tell_real_images_from_one_digit_and_from_noise(digits, reference):
    half = len(digits.train) // 2
    real = reference.compare(digits.train[:half], digits.train_labels[:half])
    fours = digits.train[digits.train_labels == 4][:100]
    one = reference.compare(fours, torch.full((len(fours),), 4))
    wrong = reference.compare(fours, torch.full((len(fours),), 2))
    noise = reference.compare(to_uint8(torch.randn(100, 1, 28, 28)))
    assert one["agreement"] > 0.8 > 0.2 > wrong["agreement"]
    assert noise["agreement"] is None
    assert real["class_balance_bits"] > 2 > 1 > one["class_balance_bits"]
    assert real["fid"] < one["fid"] < noise["fid"]
    assert real["precision"] > 0.6 > noise["precision"]
    assert real["recall"] > 0.6 > one["recall"]


def test_real_mnist_is_recognised_and_balanced(real_mnist):
    test, labels = real_mnist.test, real_mnist.test_labels
    some = dataclasses.replace(real_mnist, test=test[1000:2000], test_labels=labels[1000:2000])
    result = Reference(some, torch.device("cpu")).compare(test[:1000], labels[:1000])
    assert result["agreement"] > 0.99
    assert result["share_sure"] > 0.97
    assert result["class_balance_bits"] > 3.3
    assert 0.8 < result["precision"] < 0.99
    assert 0.8 < result["recall"] < 0.99


def test_the_metrics_of_real_images_are_means_over_disjoint_sets(reference):
    many, few = reference.real(100), reference.real(700)
    assert many["draws"] == 15
    assert few["draws"] == 2
    assert many["fid"] > few["fid"] > 0  # the distance of fewer images is larger
    assert many["fid_deviation"] > 0
    assert 0 < many["nearest_least"] <= many["nearest_median"]
    assert many["fid_500"] is None  # of fewer than 500 images
    assert few["fid_500"] > few["fid"]
    assert reference.real(100) is many  # measured once
    with pytest.raises(UserError, match="num_samples is 1,501: it must be at most 1,500"):
        reference.real(1501)
    with pytest.raises(UserError, match="num_samples is 0: it must be at least 65"):
        reference.real(0)


def test_balanced_sets_of_real_images_have_every_digit_equally_often(reference, monkeypatch):
    order = alternate_digits(torch.arange(1500), reference.data.train_labels)
    assert torch.equal(reference.data.train_labels[order[:20]], torch.arange(20) % 10)
    assert len(order.unique()) == len(order)
    sets = []

    def compare(levels: Tensor, digits: Tensor) -> dict[str, float]:
        sets.append(digits)
        return {"fid": 0.0}

    monkeypatch.setattr(reference, "compare", compare)
    reference.measure_real(110, balanced=True)
    assert len(sets) == 13
    assert all((digits.bincount() == 11).all() for digits in sets)
