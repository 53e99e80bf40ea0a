"""Samples in batches, the device and its random numbers, and pictures without global state."""

import contextlib
import platform
import subprocess
import sys
from pathlib import Path

from common.data import to_uint8
from common.device import autocast, forked_rng, pick_device, random_states
from common.errors import UserError
from common.options import SamplingOptions
from common.pictures import save_curves, save_plot, save_rows
from common.sampling import Samples, draw_samples, save_samples
from lesson_05 import sample_mnist, train_mnist
from lesson_05.unet import UNet

import numpy as np
import pytest
import torch
from helpers import ROOT, error_line, same
from PIL import Image
from torch import Tensor

CPU = torch.device("cpu")


def countdown(x_T: Tensor, condition: Tensor | None = None):
    """A trajectory of five steps that adds the condition in each."""
    for t in range(4, -1, -1):
        x_T = x_T + (0 if condition is None else condition.view(-1, 1, 1, 1))
        yield t, x_T


def test_samples_are_drawn_in_batches_of_64_each_with_its_condition():
    conditions = torch.arange(130.0)
    images, frames = draw_samples(countdown, 130, (1, 2, 2), 5, CPU, conditions)
    assert images.shape == (130, 1, 2, 2)
    torch.manual_seed(0)
    noise = torch.cat([torch.randn(B, 1, 2, 2) for B in (64, 64, 2)])
    assert torch.allclose(images, noise + 5 * conditions.view(-1, 1, 1, 1))
    assert len(frames) == 6  # the noise and five steps
    assert torch.equal(frames[0], noise[:16])
    assert torch.equal(frames[-1], images[:16])


@pytest.mark.parametrize(("size", "batches"), [(28, [20]), (64, [16, 4]), (256, [1, 1])])
def test_large_images_are_drawn_in_small_batches_and_shown_as_they_come(size, batches, tmp_path):
    picture, seen = tmp_path / "samples.png", []

    def trajectory(x_T: Tensor):
        seen.append((len(x_T), picture.exists()))
        yield 0, x_T

    samples = draw_samples(trajectory, sum(batches), (1, size, size), 1, CPU, picture=picture)
    assert seen == [(B, k > 0) for k, B in enumerate(batches)]
    assert len(samples.images) == sum(batches)
    assert picture.exists() == (len(batches) > 1)  # the script itself saves the last one


@pytest.mark.parametrize("num_steps", [1, 3, 8, 70])
def test_trajectories_of_any_length_have_a_strip(num_steps, tmp_path):
    def trajectory(xt: Tensor):
        yield from ((t, xt) for t in range(num_steps, 0, -1))

    samples = draw_samples(trajectory, 2, (1, 4, 4), num_steps, CPU)
    assert len(samples.frames) == min(num_steps, 60) + 1
    save_samples(tmp_path, samples, SamplingOptions(save_npz=True))
    assert {path.name for path in tmp_path.iterdir()} == {
        "samples.png",
        "reverse.png",
        "reverse.gif",
        "samples.npz",
    }


def test_pictures_have_the_size_and_speed_of_the_flags(tmp_path):
    samples = Samples(torch.rand(70, 1, 4, 6) * 2 - 1, list(torch.rand(5, 16, 1, 4, 6)))
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "00099.png").write_text("of an earlier call")
    (tmp_path / "samples" / "mine.png").write_text("not ours")
    options = SamplingOptions(save_png=True, scale=3, fps=10)
    save_samples(tmp_path, samples, options)
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == [f"{k:05d}.png" for k in range(70)] + ["mine.png"]
    with Image.open(tmp_path / "samples" / "00007.png") as image:
        assert image.mode == "L"
        assert np.array_equal(np.asarray(image), to_uint8(samples.images)[7, 0].numpy())
    with Image.open(tmp_path / "samples.png") as grid:
        assert grid.size == (3 * (8 * 7 + 1), 3 * (9 * 5 + 1))
    with Image.open(tmp_path / "reverse.gif") as gif:
        assert gif.info["duration"] == 100


def test_samples_depend_on_the_checkpoint_the_seed_and_the_flags_alone(trained, tmp_path):
    file = str(trained / "checkpoint_000004.safetensors")
    for name, seed, clip_x0 in [("a", 0, True), ("b", 0, True), ("c", 1, True), ("d", 0, False)]:
        options = SamplingOptions(
            model_checkpoint=file,
            num_samples=3,
            save_npz=True,
            output_dir=str(tmp_path / name),
            seed=seed,
        )
        sample_mnist.main(clip_x0=clip_x0, options=options)
    samples = {p.parent.name: np.load(p)["samples"] for p in tmp_path.glob("*/samples.npz")}
    assert samples["a"].shape == (3, 1, 28, 28)
    assert samples["a"].dtype == np.uint8
    assert np.array_equal(samples["a"], samples["b"])
    assert not np.array_equal(samples["a"], samples["c"])
    assert not np.array_equal(samples["a"], samples["d"])


def test_the_variance_can_be_chosen_when_sampling(trained):
    file = str(trained / "checkpoint_000004.safetensors")
    beta, tilde = (sample_mnist.load(file, variance=v)[0] for v in ("beta", "beta_tilde"))
    assert sample_mnist.load(file)[0].log_var[5] == beta.log_var[5] > tilde.log_var[5]


def test_random_numbers_continue_after_a_fork():
    torch.manual_seed(3)
    states = random_states(CPU)
    with forked_rng(CPU, 5):
        first = torch.rand(4)
    assert same(random_states(CPU), states)
    with contextlib.suppress(RuntimeError), forked_rng(CPU, 5):
        assert torch.equal(torch.rand(4), first)
        raise RuntimeError
    assert same(random_states(CPU), states)


def test_precision_follows_the_option():
    with autocast(CPU, "bfloat16"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with autocast(CPU, "float32"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_pictures_do_not_change_matplotlibs_global_state(tmp_path):
    import matplotlib
    from matplotlib import pyplot

    backend, figures = matplotlib.get_backend(), pyplot.get_fignums()
    save_rows(tmp_path / "rows.png", {"a": torch.zeros(2, 1, 4, 4), "b": torch.ones(2, 1, 4, 4)})
    save_plot(tmp_path / "plot.png", {"curve": ([1, 2], [1.0, 2.0])}, "x", "y", "title")
    assert matplotlib.get_backend() == backend
    assert pyplot.get_fignums() == figures
    with Image.open(tmp_path / "rows.png") as picture:
        assert picture.size > (50, 20)


def test_columns_of_the_log_become_curves(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,loss,other\n1,0.5,\n2,0.25,3\n")
    save_curves(tmp_path / "curves.png", tmp_path / "metrics.csv", ["loss", "other"], "title")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_samples_that_are_not_finite_are_refused():
    """They would be drawn black."""
    with pytest.raises(UserError, match="not finite"):
        draw_samples(lambda x_T: iter([(0, x_T / 0)]), 2, (1, 4, 4), 1, CPU)


def test_float32_on_cuda_is_not_tf32(monkeypatch):
    """As far as a machine without CUDA can tell."""
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    pick_device("cuda")
    assert not torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_step_reuses_the_memory_of_the_one_before():
    """Otherwise the system would provide these 400 MB page by page: 100,000 page faults."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("only glibc can be configured to reuse memory")
    code = """
import resource, torch
from common.device import pick_device
pick_device("cpu")
for _ in range(20):  # until it has found its places
    torch.ones(10**7)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(10**7)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert int(run.stdout) < 5000, run.stderr


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    words = ["--output_dir", tmp_path / "file" / "run", "--dataset", "digits", "--device", "cpu"]
    line = error_line(capsys, train_mnist.main, *words, presets=True, network=UNet)
    assert "cannot be written" in line


def test_no_code_names_a_device_or_a_path_of_a_machine():
    for path in ROOT.glob("[clb]*/**/*.py"):
        text = path.read_text()
        assert ".cuda()" not in text, path
        assert str(ROOT) not in text, path
        assert str(Path.home()) not in text or Path.home() == Path("/"), path
