"""Lesson 2's other scripts, the commands of its README, and the shipped network."""

import runpy
import shlex
import sys
from pathlib import Path

from common import lessons
from common.break_it import Bench, BreakOptions
from common.data import from_uint8, load_images
from common.options import DataOptions, SamplingOptions
from lesson_02 import break_it, parzen, sample_mnist, swiss_roll, train_mnist
from lesson_02.dpm import DPM, erasing_beta, k_minus_null
from lesson_02.network import ConvDense

import numpy as np
import pytest
import torch
from helpers import ROOT, error_line
from PIL import Image

LESSON = ROOT / "lesson_02"


def sample(file: Path, folder: Path, save_npz: bool = False, **flags: object) -> None:
    options = SamplingOptions(str(folder), device="cpu", model_checkpoint=str(file), num_samples=1)
    options.save_npz = save_npz
    flags = {"num_images": 2, "num_draws": 3} | flags
    sample_mnist.main(**flags, images=DataOptions("digits"), options=options)


def cells(path: Path, columns: int) -> np.ndarray:
    """The images of a grid, (rows, columns, 28, 28), without its enlargement."""
    pixels = np.asarray(Image.open(path).convert("L"))[::2, ::2][1:, 1:]
    rows = pixels.shape[0] // 29
    return pixels.reshape(rows, 29, columns, 29)[:, :28, :, :28].swapaxes(1, 2)


def test_inpainting_and_denoising_pictures(tiny, tmp_path, capsys):
    sample(tiny, tmp_path, save_npz=True)
    assert np.load(tmp_path / "samples.npz")["samples"].shape == (1, 1, 28, 28)
    sample(tiny, tmp_path, inpaint="top")
    grid = cells(tmp_path / "inpainted.png", 5)
    truth = load_images("digits").test[:2, 0].numpy()
    assert (grid[:, 0] == truth).all()
    assert (grid[:, 1, :14] == 128).all()
    for column in (1, 2, 3, 4):  # the known pixels stay
        assert (grid[:, column, 14:] == truth[:, 14:]).all()
    assert (grid[:, 2, :14] != grid[:, 3, :14]).any()
    mask = np.zeros((28, 28), np.uint8)
    mask[3:9, 4:20] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    sample(tiny, tmp_path, inpaint=str(tmp_path / "mask.png"))
    grid = cells(tmp_path / "inpainted.png", 5)
    assert (grid[:, 4][:, mask == 0] == truth[:, mask == 0]).all()
    assert (grid[:, 1][:, mask == 255] == 128).all()
    sample(tiny, tmp_path, denoise=0.0)
    grid = cells(tmp_path / "denoised.png", 5)
    assert (grid == truth[:, None]).all()
    sample(tiny, tmp_path, denoise=0.5)
    assert (cells(tmp_path / "denoised.png", 5)[:, 1] != truth).mean() > 0.3


@pytest.fixture
def wrong(tmp_path: Path) -> Path:
    """A folder of files that no script accepts."""
    for name, size in {"small": (27, 28), "known": (28, 28), "unknown": (28, 28)}.items():
        Image.new("L", size, 255 * (name != "known")).save(tmp_path / f"{name}.png")
    (tmp_path / "text.png").write_text("no picture")
    np.savez(tmp_path / "wrong.npz", samples=np.zeros((2, 1, 8, 8), np.uint8))
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--num_samples 0", "num_samples is 0"),
        ("--num_draws 0", "num_draws is 0"),
        ("--denoise -0.5", "denoise is -0.5: it must be at least 0"),
        ("--denoise .nan", "denoise is .nan"),
        ("--denoise 1 --inpaint left", "exclude each other"),
        ("--inpaint right", "give left, top or a PNG"),
        ("--inpaint text.png", "text.png cannot be read"),
        ("--inpaint small.png", "is 27x28: it must have"),
        ("--inpaint known.png", "everything of the image known"),
        ("--inpaint unknown.png", "nothing of the image known"),
    ],
)
def test_bad_flags_of_the_sampler_give_one_line(flags, message, tiny, wrong, monkeypatch, capsys):
    monkeypatch.chdir(wrong)
    words = ["--model_checkpoint", tiny, "--dataset", "digits", "--output_dir", "out"]
    words += ["--device", "cpu", *flags.split()]
    assert message in error_line(capsys, sample_mnist.main, *words)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--bandwidths 0.1 -1", "one or more numbers above 0"),
        ("--num_samples 0", "num_samples is 0"),
        ("--num_validation 1500 --num_samples 1", "use fewer"),
        ("--samples none.npz", "none.npz cannot be read"),
        ("--samples wrong.npz", "it must be uint8 (N, 1, 28, 28)"),
    ],
)
def test_bad_flags_of_the_parzen_script_give_one_line(
    flags, message, tiny, wrong, monkeypatch, capsys
):
    monkeypatch.chdir(wrong)
    words = ["--model_checkpoint", tiny, "--output_dir", "out", "--device", "cpu", *flags.split()]
    assert message in error_line(capsys, parzen.main, *words)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--num_timesteps 1", "num_timesteps is 1"),
        ("--num_strata 0", "0 strata"),
        ("--num_bound_images 1", "num_bound_images is 1"),
        ("--learning_rate 0", "learning_rate is 0"),
        ("--network.kernel_size 2", "kernel_size is 2"),
        ("--network.num_timesteps 7", "num_timesteps"),
        ("--batch_size 0", "batch_size is 0"),
    ],
)
def test_bad_flags_of_the_training_script_give_one_line(flags, message, tmp_path, capsys):
    words = ["--dataset", "digits", "--output_dir", tmp_path / "run"]
    words += ["--config", "configs/laptop.yaml", "--device", "cpu", *flags.split()]
    groups = {"presets": True, "network": ConvDense}
    assert message in error_line(capsys, train_mnist.main, *words, **groups)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--noise -0.1", "noise is -0.1"),
        ("--noise 0.7", "noise is 0.7"),
        ("--num_timesteps 1", "no schedule has 1 steps"),
        ("--num_units 0", "num_units is 0"),
    ],
)
def test_bad_flags_of_the_swiss_roll_give_one_line(flags, message, tmp_path, capsys):
    words = ["--output_dir", tmp_path / "out", "--device", "cpu", *flags.split()]
    assert message in error_line(capsys, swiss_roll.main, *words)


def test_breaks_differ_from_the_lesson_in_one_thing(tiny):
    process, network, content = sample_mnist.load(str(tiny))
    torch.nn.init.normal_(network.readouts[-1].weight, std=0.3)
    bench = Bench(process, network, content, BreakOptions(num_samples=2), torch.device("cpu"))
    samples, means = break_it.no_noise(bench).values()
    assert means.std() < samples.std()
    assert torch.equal(means, break_it.no_noise(bench)["no noise"])
    xt, t, out = torch.randn(3, 1, 28, 28), torch.tensor([2, 9, 20]), torch.randn(3, 2, 28, 28)
    fixed = break_it.broken(break_it.FixedVariance, bench).p_mean_variance(out, xt, t)
    variance = erasing_beta(20)[t - 1].view(3, 1, 1, 1).expand_as(xt)
    assert torch.allclose(fixed.log_var.exp().double(), variance, rtol=1e-5)
    assert torch.equal(fixed.mean, process.p_mean_variance(out, xt, t).mean)
    image, every, late = break_it.late_evidence(bench, 2, None).values()
    for drawn in (every, late):
        assert torch.equal(drawn[..., 14:], image[..., 14:])
        assert not torch.equal(drawn[..., :14], image[..., :14])
    assert torch.equal(late[..., :14], samples[..., :14])
    more = break_it.late_evidence(bench, 3, None).values()  # for the seam; two are shown
    assert [len(images) for images in more] == [2, 2, 2]


def test_the_seam_is_between_the_last_missing_and_the_first_known_column():
    images = torch.randn(500, 1, 2, 8)
    assert abs(break_it.seam(images)) < 0.15
    images[..., 3] = 2 * images[..., 4] + 1
    assert break_it.seam(images) == pytest.approx(1, abs=1e-5)


TINY = {
    "train_mnist.py": "--dataset digits --network.dense_channels 8 --num_samples 1 --device cpu "
    "--num_training_steps 2 --num_timesteps 20 --batch_size 4 --num_previews 1 "
    "--num_bound_images 2",
    "sample_mnist.py": "--dataset digits --num_samples 1 --num_images 1 --num_draws 1 --device cpu",
    "swiss_roll.py": "--num_timesteps 5 --num_units 4 --num_training_steps 2 --num_points 9 "
    "--num_bound_points 9 --device cpu",
    "parzen.py": "--num_samples 2 --num_validation 3 --num_images 4 --device cpu",
    "break_it.py": "--num_samples 1 --num_images 2 --device cpu",
}
COMMANDS = [
    line
    for line in (LESSON / "README.md").read_text().splitlines()
    if line.startswith("python ") and line.split()[1] in TINY
]


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_of_the_readme_runs(line, tiny, tmp_path, monkeypatch, capsys):
    words = shlex.split(line)[1:]
    words += [*shlex.split(TINY[words[0]]), "--output_dir", str(tmp_path)]
    if words[0] in ("sample_mnist.py", "parzen.py", "break_it.py"):
        words += ["--model_checkpoint", str(tiny)]
    monkeypatch.chdir(LESSON)
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(words[0], run_name="__main__")
    names = {path.name for path in tmp_path.iterdir()}
    if words[0] == "break_it.py":
        breaks = ("no_noise", "fixed_variance", "late_evidence")
        assert names == {f"broken_{name}.png" for name in breaks}
    assert names


def test_the_readme_shows_the_gap_of_the_posterior():
    text = (LESSON / "README.md").read_text()
    assert "| the true posterior | 0.5 | 0.5 |" in text
    assert "| the perturbed process, $T = 1000$ | 0.667 | 0.333 |" in text


def test_the_shipped_network_has_the_bound_that_the_readme_claims(real_mnist):
    """Estimated on a few test images from some of the terms."""
    process, network, content = sample_mnist.load(sample_mnist.SHIPPED)
    x0 = sample_mnist.scaler_of(content).encode(from_uint8(real_mnist.test[:16]))
    gain = k_minus_null(process.bits_per_dim(network, x0, 24).total, channels=1)
    assert gain.mean().item() - 3 * gain.std().item() / 4 > 3.4
    assert gain.mean().item() < process.ceiling().item()


def test_dequantisation_hardly_changes_the_bound(real_mnist):
    """As the README says: a first step of 3.5 levels hides the grid, and the noise costs less than
    the 0.0049 bits of a pixel that is always black."""
    process, network, content = sample_mnist.load(sample_mnist.SHIPPED)
    scaler, gains = sample_mnist.scaler_of(content), []
    for dequantize in (True, False):
        torch.manual_seed(1)
        x0 = scaler.encode(from_uint8(real_mnist.test[:20]), dequantize)
        torch.manual_seed(2)
        gains.append(k_minus_null(process.bits_per_dim(network, x0, 24).total, channels=1))
    change = gains[1] - gains[0]
    assert abs(change.mean().item() - 0.0035) < 0.0035 + 3 * change.std().item() / 20**0.5
    assert abs(change.mean().item()) < 0.01


def test_without_noise_the_spread_is_soon_lost():
    """The README's first break: after a hundred steps the deviation is far below 1."""
    process, model, _ = lessons.load(break_it.SHIPPED)
    torch.manual_seed(0)
    x_T = torch.randn(4, 1, 28, 28)
    found = {}
    for kind in (DPM, break_it.NoNoise):
        for t, xt in kind(process.beta()).trajectory(model, x_T):
            if t <= 900:
                found[kind] = xt.std().item()
                break
    assert found[break_it.NoNoise] < 0.2
    assert found[DPM] == pytest.approx(1, abs=0.05)
