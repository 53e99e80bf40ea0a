"""The figures of the scoreboard: against closed forms and brute force, of every lesson, and on bad
input. Below, the checkpoints that are shipped."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import shipped
import torch
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

from common import checkpoint, classifier, cli, evaluate, lessons, mnist, subject
from common.errors import UserError
from common.images import from_uint8, to_uint8
from common.metrics import Reference, digits_in_turn, entropy_bits, fid, nearest, precision_recall
from lesson_02.dpm import DPM, Pair, erasing_beta
from lesson_02.network import ConvDense
from lesson_05.class_conditional.network import ClassConditionalUNet
from lesson_05.text_to_image.network import TextToImageUNet
from lesson_05.text_to_image.text import TextEncoder
from lesson_05.unet import UNet
from lesson_09.unet import UNet as LearnedVarianceUNet

CPU = torch.device("cpu")
T = 24
FIELDS = {
    *("lesson", "checkpoint_sha256", "training_steps", "parameters", "dataset"),
    *("sampler", "num_steps", "guidance", "num_samples", "seed", "arithmetic", "device"),
    *("fid", "fid_500", "share_sure", "class_balance_bits", "agreement", "precision", "recall"),
    *("nearest_median", "nearest_least", "real", "bits_per_dim", "num_images", "num_terms"),
    *("seconds_per_sample", "reference", "classifier_sha256", "classifier_accuracy", "sure_from"),
    *("commit", "versions", "hardware"),
}


@pytest.fixture(scope="module")
def digits() -> mnist.Images:
    return mnist.load("digits")


@pytest.fixture(scope="module")
def reference(digits) -> Reference:
    return Reference(digits, CPU)


def tiny(lesson: str) -> tuple[nn.Module, dict[str, object]]:
    """A network of that lesson, and what else its checkpoints' config holds."""
    network: dict[str, object] = {"channels": 4, "multipliers": [1, 1, 1], "num_blocks": 1}
    network |= {"attention_resolutions": [7], "num_groups": 1, "dropout": 0.5}
    network |= {"image_channels": 1, "image_size": 28}
    config: dict[str, object] = {"network": network, "num_timesteps": T}
    if lesson == "lesson_02":
        network = {"num_timesteps": T, "conv_channels": 2, "dense_channels": 3}
        config |= {"network": {"image_channels": 1, "image_size": 28, **network}}
        config |= {"learned_beta": False, "data_mean": 33.3, "data_std": 78.6}
        return Pair(ConvDense(**network), DPM(erasing_beta(T))), config
    if lesson == "lesson_09":
        network["learned_variance"] = True
        config |= {"schedule": "cosine", "variance": "learned"}
        config |= {"simple_weight": 1.0, "vlb_weight": 1e-3}
        return LearnedVarianceUNet(**network), config
    config |= {"beta_1": 1e-4, "beta_T": 0.02, "variance": "beta"}
    if lesson == "lesson_05.class_conditional":
        return ClassConditionalUNet(10, **network), config | {"num_classes": 10}
    if lesson == "lesson_05.text_to_image":
        text = {"dim": 8, "num_layers": 1, "num_heads": 1}
        return TextToImageUNet(TextEncoder(**text), **network), config | {"text": text}
    return UNet(**network), config


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A file a lesson, with a small random network in it."""
    folder, files = tmp_path_factory.mktemp("checkpoints"), {}
    for lesson in lessons.EVERY:
        torch.manual_seed(1)
        model, config = tiny(lesson)
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.1 * torch.randn_like(weight)
        files[lesson] = str(folder / f"{lesson}.pt")
        content = {"lesson": lesson, "config": config, "dataset": "digits", "step": 1}
        checkpoint.save(Path(files[lesson]), {**content, "ema": model.state_dict()})
    return files


@pytest.fixture
def one_reference(reference, monkeypatch) -> None:
    """The real images are looked at once, not by each run."""
    monkeypatch.setattr(evaluate, "Reference", lambda data, device: reference)


# The classifier


def test_the_classifiers_file_is_small_and_its_sum_is_checked(tmp_path):
    assert classifier.FILE.stat().st_size <= 1_000_000
    damaged = tmp_path / "classifier.pt"
    data = bytearray(classifier.FILE.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(
        UserError, match=f"classifier.pt has the sha256 .*, not {classifier.SHA256}"
    ):
        classifier.load(damaged)


def test_the_classifier_knows_digits(real_mnist):
    model = classifier.load()
    assert classifier.accuracy(model, real_mnist.test, real_mnist.test_labels) > 0.994


def test_the_classifier_answers_with_what_its_last_convolution_sees(digits):
    model = classifier.load()
    assert not model.training
    features, probabilities = classifier.look(model, digits.test[:7])
    assert features.shape == (7, model.num_features)
    assert features.dtype == torch.float64
    with torch.no_grad():
        images = from_uint8(digits.test[:7])
        torch.testing.assert_close(model(images).softmax(1), probabilities)
        maps = model.convolutions(images)
    torch.testing.assert_close(features, maps.double().mean((2, 3)), rtol=1e-5, atol=1e-6)


# The figures


def features_of(reference: Reference, levels: Tensor) -> Tensor:
    return classifier.look(reference.model, levels)[0]


def test_fid_of_a_set_with_itself_is_zero_and_of_normals_the_closed_form():
    x = torch.randn(200, 6, dtype=torch.float64)
    assert fid(x, x) == pytest.approx(0, abs=1e-9)
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


def test_fid_grows_with_noise_with_blur_and_with_missing_classes(digits, reference):
    levels, labels = digits.train[:250], digits.train_labels[:250]
    clean = fid(features_of(reference, levels), reference.features)
    images = from_uint8(levels)
    eps = torch.randn_like(images)
    noisy = [to_uint8(images + scale * eps) for scale in (0.2, 0.6)]
    blurred = [to_uint8(gaussian_blur(images, 9, sigma)) for sigma in (0.8, 1.5)]
    missing = [levels[labels >= least] for least in (2, 6)]
    for name, series in {"noise": noisy, "blur": blurred, "classes": missing}.items():
        distances = [fid(features_of(reference, some), reference.features) for some in series]
        assert clean < distances[0] < distances[1], (name, clean, distances)
        assert distances[1] > 2 * clean, (name, clean, distances)


def test_too_few_samples_for_a_covariance_are_refused():
    x = torch.randn(7, 6, dtype=torch.float64)
    assert math.isfinite(fid(x, x))
    with pytest.raises(UserError, match="num_samples is 6: take at least 7"):
        fid(x[:6], x)


def test_precision_and_recall_are_the_papers():
    """Against loops over the definition; and what each is blind to, the other sees."""
    real, drawn = torch.randn(60, 5).double(), torch.randn(50, 5).double() + 0.7

    def share(points: Tensor, centres: Tensor) -> float:
        inside = 0
        for point in points:
            for i, centre in enumerate(centres):
                others = [(c - centre).norm() for j, c in enumerate(centres) if j != i]
                if (point - centre).norm() <= sorted(others)[2]:
                    inside += 1
                    break
        return inside / len(points)

    expected = share(drawn, real), share(real, drawn)
    assert 0.2 < min(expected) < max(expected) < 0.9
    assert precision_recall(drawn, real) == expected
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real + 100, real) == (0, 0)
    two = torch.cat([real, real + 100])
    assert precision_recall(real, two) == (1, 0.5)  # one of two kinds is never drawn
    assert precision_recall(two, real) == (0.5, 1)  # half of what is drawn is no digit
    with pytest.raises(UserError, match="3 images: precision and recall take more than 3"):
        precision_recall(real[:3], real)


def test_entropy_of_the_classes():
    assert entropy_bits(torch.arange(10)) == pytest.approx(math.log2(10))
    assert entropy_bits(torch.full((9,), 3)) == 0
    assert entropy_bits(torch.tensor([0, 0, 9, 9])) == pytest.approx(1)


def test_the_nearest_training_image(digits):
    training = digits.train[:300]
    assert torch.equal(nearest(training[5:9], training)[0], torch.zeros(4))
    levels = training[:20].clone()
    levels[:, :, 3, 3] ^= 255  # one corner pixel, which is black in all
    distance, index = nearest(levels, training)
    assert torch.equal(index, torch.arange(20))
    torch.testing.assert_close(distance, torch.ones(20))
    levels = to_uint8(torch.randn(10, 1, 28, 28))
    distance, index = nearest(levels, training)
    brute = (levels[:, None].double() - training[None].double()).flatten(2).norm(dim=2) / 255
    torch.testing.assert_close(distance.double(), brute.min(1).values)
    assert torch.equal(index, brute.argmin(1))


def test_figures_of_real_images_of_one_digit_and_of_noise(digits, reference):
    half = len(digits.train) // 2
    real = reference.figures(digits.train[:half], digits.train_labels[:half])
    fours = digits.train[digits.train_labels == 4][:100]
    one = reference.figures(fours, torch.full((len(fours),), 4))
    wrong = reference.figures(fours, torch.full((len(fours),), 2))
    noise = reference.figures(to_uint8(torch.randn(100, 1, 28, 28)))
    assert one["agreement"] > 0.8 > 0.2 > wrong["agreement"]
    assert noise["agreement"] is None
    assert real["class_balance_bits"] > 2 > 1 > one["class_balance_bits"]
    assert real["fid"] < one["fid"] < noise["fid"]
    assert real["precision"] > 0.6 > noise["precision"]
    assert real["recall"] > 0.6 > one["recall"]


def test_real_mnist_is_recognised_and_balanced(real_mnist):
    figures = Reference.__new__(Reference)
    levels, labels = real_mnist.test[:1000], real_mnist.test_labels[:1000]
    figures.model = classifier.load()
    figures.features, _ = classifier.look(figures.model, real_mnist.test[1000:2000])
    result = figures.figures(levels, labels)
    assert result["agreement"] > 0.99
    assert result["share_sure"] > 0.97
    assert result["class_balance_bits"] > 3.3
    assert 0.8 < result["precision"] < 0.99
    assert 0.8 < result["recall"] < 0.99


def test_the_figures_of_real_images_are_means_over_disjoint_draws(reference):
    many, few = reference.real(100), reference.real(700)
    assert many["draws"] == 5
    assert few["draws"] == 2
    assert many["fid"] > few["fid"] > 0  # fewer images: a distance that is more too large
    assert many["fid_deviation"] > 0
    assert 0 < many["nearest_least"] <= many["nearest_median"]
    assert many["fid_500"] is None  # of fewer than 500 images
    assert few["fid_500"] > few["fid"]
    with pytest.raises(UserError, match="num_samples is 1,501: take at most 1,500"):
        reference.real(1501)
    with pytest.raises(UserError, match="num_samples is 0: take at least 65"):
        reference.real(0)


def test_where_digits_are_asked_for_in_turn_real_ones_come_in_turn(reference, monkeypatch):
    order = digits_in_turn(torch.arange(1500), reference.data.train_labels)
    assert torch.equal(reference.data.train_labels[order[:20]], torch.arange(20) % 10)
    assert len(order.unique()) == len(order)
    draws = []

    def figures(levels: Tensor, digits: Tensor) -> dict[str, float]:
        draws.append(digits)
        return {"fid": 0.0}

    monkeypatch.setattr(reference, "figures", figures)
    reference.real(110, balanced=True)
    assert len(draws) == 5
    assert all((digits.bincount() == 11).all() for digits in draws)


# The script


def run(folder: Path, file: str, *words: str) -> dict:
    flags = ["--num_samples", "70", "--device", "cpu", "--precision", "float32"]
    flags += ["--num_images", "2", "--num_terms", "3", "--output_dir", str(folder)]
    cli.run(evaluate.main, ["--model_checkpoint", file, *flags, *words])
    return json.loads((folder / "result.json").read_text())


SAMPLERS = [(name, "ddim") for name in lessons.LESSONS]
SAMPLERS += [
    ("lesson_02", "ddpm"),
    ("lesson_05", "ddpm"),
    ("lesson_05.class_conditional", "ddpm"),
    ("lesson_09", "strided"),
]


@pytest.mark.parametrize(("lesson", "sampler"), SAMPLERS)
@pytest.mark.usefixtures("one_reference")
def test_every_lessons_checkpoint_is_measured(lesson, sampler, checkpoints, tmp_path, capsys):
    steps = [] if sampler == "ddpm" else ["--num_steps", "2"]
    result = run(tmp_path, checkpoints[lesson], "--sampler", sampler, *steps)
    assert set(result) == FIELDS
    assert result["lesson"] == lesson
    assert result["num_steps"] == (T if sampler == "ddpm" else 2)
    assert result["num_samples"] == 70
    assert math.isfinite(result["fid"])
    assert result["seconds_per_sample"] > 0
    assert set(result["real"]) > {"fid", "fid_deviation", "draws", "precision", "recall"}
    conditional = lesson.count(".") == 1
    assert (result["agreement"] is not None) == (result["guidance"] == 1.0) == conditional
    bits = result["bits_per_dim"]
    assert (bits is None) == (sampler == "ddim")
    if bits is not None:
        if lesson == "lesson_02":  # H(one level) of standardised data, less what the model knows
            whole = math.log2(78.6) + 0.5 * math.log2(2 * math.pi * math.e) - bits["gain"]["mean"]
        else:
            whole = sum(bits[part]["mean"] for part in ("prior", "kl", "decoder"))
        assert bits["total"]["mean"] == pytest.approx(whole)
        assert bits["num_images"] == 2
    header, figures = capsys.readouterr().out.splitlines()[-3:-1]
    assert header.split()[:3] == ["steps", "samples", "FID"]
    assert figures.split()[2] == f"{result['fid']:.3g}"
    for name in ("samples.png", "nearest.png"):
        assert (tmp_path / name).stat().st_size > 0


def test_a_stopped_run_goes_on_to_the_same_samples(checkpoints, tmp_path, monkeypatch):
    file, words = checkpoints["lesson_09"], ("--sampler", "strided", "--num_steps", "2")
    whole = run(tmp_path / "whole", file, *words)
    asked, seeds = [], []
    images = subject.Subject.images

    def stop(self, digits, seed, on_step=None):
        asked.append(len(digits))
        seeds.append(torch.initial_seed())
        if asked == [64, 6]:
            raise KeyboardInterrupt
        return images(self, digits, seed, on_step)

    monkeypatch.setattr(subject.Subject, "images", stop)
    with pytest.raises(SystemExit):
        run(tmp_path / "parts", file, *words)
    parts = run(tmp_path / "parts", file, *words)
    assert asked == [64, 6, 6]
    both = [torch.load(tmp_path / name / "samples.pt")["batches"] for name in ("whole", "parts")]
    assert torch.equal(torch.cat(both[0]), torch.cat(both[1]))
    assert whole["fid"] == parts["fid"]
    assert seeds[0] != seeds[1] == seeds[2]  # each batch has noise of its own


@pytest.mark.usefixtures("one_reference")
def test_the_seed_and_the_condition_decide(checkpoints, tmp_path):
    file = checkpoints["lesson_05.class_conditional"]
    words = ("--num_steps", "2")
    runs = {
        name: run(tmp_path / name, file, *words, *more)["fid"]
        for name, more in {
            "plain": (),
            "again": (),
            "seed": ("--seed", "1"),
            "guided": ("--guidance", "2"),
        }.items()
    }
    assert runs["plain"] == runs["again"]
    assert len(set(runs.values())) == 3
    levels = torch.cat(torch.load(tmp_path / "plain" / "samples.pt")["batches"])
    drawer = subject.Subject(file, "ddim", 2, 1.0, CPU)
    torch.manual_seed(0)
    direct = to_uint8(drawer.images(torch.arange(64) % 10, 0))
    assert torch.equal(levels[:64], direct)  # sample n is asked for digit n mod 10


def fails(folder: Path, capsys: pytest.CaptureFixture, file: str, *words: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(folder, file, *words)
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    assert not (folder / "result.json").exists()
    return lines[0]


BAD = [
    ("lesson_05", ("--num_samples", "0"), "num_samples is 0: take at least 65"),
    ("lesson_05", ("--num_samples", "1"), "num_samples is 1: take at least 65"),
    ("lesson_05", ("--num_samples", "9000"), "num_samples is 9,000: take at most 1,500"),
    ("lesson_05", ("--num_steps", "0"), "num_steps is 0: it must be from 1 to 24"),
    ("lesson_05", ("--num_steps", "25"), "num_steps is 25: it must be from 1 to 24"),
    ("lesson_05", ("--sampler", "ddpm", "--num_steps", "9"), "ddpm takes all 24 steps"),
    ("lesson_02", (), "cannot be sampled by ddim: take another --sampler"),
    ("lesson_05", ("--sampler", "strided"), "cannot be sampled by strided"),
    ("lesson_05", ("--guidance", "2"), "knows no conditions: leave out --guidance"),
    ("lesson_05.class_conditional", ("--guidance", "-1"), "guidance is -1"),
    ("lesson_05", ("--sampler", "euler"), "sampler"),
    ("lesson_05", ("--num_images", "1"), "num_images is 1: it must be 0, or at least 2"),
    ("lesson_05", ("--num_terms", "1"), "num_terms is 1: it must be at least 2"),
]


@pytest.mark.parametrize(
    ("lesson", "words", "message"), BAD, ids=[" ".join([n, *w]) for n, w, _ in BAD]
)
@pytest.mark.usefixtures("one_reference")
def test_bad_flags_are_one_line(lesson, words, message, checkpoints, tmp_path, capsys):
    assert message in fails(tmp_path, capsys, checkpoints[lesson], *words)


@pytest.mark.usefixtures("one_reference")
def test_a_checkpoint_of_something_else_is_one_line(checkpoints, tmp_path, capsys):
    content = checkpoint.load(checkpoints["lesson_05"])
    content.pop("format")

    def refused(message: str, **changes: object) -> None:
        checkpoint.save(tmp_path / "other.pt", {**content, **changes})
        assert message in fails(tmp_path, capsys, str(tmp_path / "other.pt"))

    larger = {**content["config"], "network": {**content["config"]["network"], "channels": 16}}
    refused("config and weights do not fit", config=larger)
    refused("draws cifar10: the classifier knows digits alone", dataset="cifar10")
    refused("is a checkpoint of common.classifier; known are", lesson="common.classifier")
    assert "does not exist" in fails(tmp_path, capsys, str(tmp_path / "missing.pt"))
    (tmp_path / "text.pt").write_text("no checkpoint")
    assert "is no checkpoint" in fails(tmp_path, capsys, str(tmp_path / "text.pt"))


@pytest.mark.usefixtures("one_reference")
def test_samples_of_other_flags_are_neither_mixed_nor_lost(checkpoints, tmp_path, capsys):
    words = ("--num_steps", "2")
    run(tmp_path, checkpoints["lesson_05"], *words)
    (tmp_path / "result.json").unlink()
    kept = (tmp_path / "samples.pt").read_bytes()
    error = fails(tmp_path, capsys, checkpoints["lesson_05"], *words, "--seed", "1")
    assert "samples.pt holds samples of another checkpoint or of other flags" in error
    assert (tmp_path / "samples.pt").read_bytes() == kept
    (tmp_path / "samples.pt").write_bytes(kept[:100])
    error = fails(tmp_path, capsys, checkpoints["lesson_05"], *words)
    assert "samples.pt is damaged: remove it" in error


# What is shipped


def test_what_is_shipped_is_small_and_complete():
    assert shipped.FILES
    sizes = [file.stat().st_size for file in shipped.FILES]
    assert max(sizes) <= 10_000_000
    assert sum(sizes) <= 40_000_000
    with np.load(shipped.STORED) as stored:
        assert set(stored) == {shipped.name(file) for file in shipped.FILES}


@pytest.mark.parametrize("file", shipped.FILES, ids=shipped.name)
def test_a_shipped_checkpoint_is_half_precision_and_draws_the_stored_samples(file):
    content = torch.load(file, weights_only=True)
    assert set(content) == {"format", "lesson", "config", "dataset", "step", "ema"}
    assert content["dataset"] == "mnist"
    weights = [v for v in content["ema"].values() if v.is_floating_point()]
    assert {v.dtype for v in weights} == {torch.float16}
    with np.load(shipped.STORED) as stored:
        expected = torch.from_numpy(stored[shipped.name(file)]).float()
    drawn = shipped.samples(file)
    assert (drawn - expected).abs().max() < 1e-2
    assert expected.std() > 0.3  # not empty
    readme = (file.parent / "README.md").read_text()
    assert checkpoint_sum(file) in readme


def checkpoint_sum(file: Path) -> str:
    return subject.digest(file)
