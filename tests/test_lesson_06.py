"""Lesson 6 against closed forms, and its scripts on good and on bad input."""

import http.server
import math
import os
import re
import runpy
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NETWORK, ROOT
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from common import checkpoint, classifier, cli, lessons
from common.device import autocast
from common.errors import UserError
from common.images import to_uint8
from common.run import RunOptions
from lesson_05.class_conditional.network import ClassConditionalUNet
from lesson_05.ddpm import DDPM, linear_beta
from lesson_05.text_to_image import train_mnist as train_text
from lesson_05.text_to_image.network import TextToImageUNet
from lesson_05.text_to_image.text import TextEncoder, tokenize
from lesson_05.unet import UNet
from lesson_06 import laboratory, sample_ddim, train_mnist
from lesson_06.ddim import (
    ddim_encode,
    ddim_sample,
    ddim_sigma,
    ddim_step,
    ddim_timesteps,
    slerp,
)

SPACINGS = ("uniform", "quadratic", "trailing")
TEXT = {"dim": 16, "num_layers": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def process() -> DDPM:
    return DDPM(linear_beta(1000), "beta_tilde")


class TwoPoints:
    """The exact E[ε | xt] where each pixel is N(m, s²) or N(-m, s²), with equal chances."""

    def __init__(self, process: DDPM, m: float, s: float) -> None:
        self.bar, self.m, self.s = process.alpha_bar, m, s

    def __call__(self, xt: Tensor, t: Tensor) -> Tensor:
        bar = self.bar[t].view(-1, 1, 1, 1)
        variance = bar * self.s**2 + 1 - bar
        side = torch.tanh(bar.sqrt() * self.m * xt / variance)  # E[sign | xt]
        mean = bar.sqrt() * self.m * side  # of xt, given what it tells about its sign
        return (1 - bar).sqrt() * (xt - mean) / variance


# Which steps


@pytest.mark.parametrize("spacing", SPACINGS)
def test_exactly_S_distinct_steps(spacing):
    for T, steps in [(60, range(1, 61)), (1000, [1, 2, 7, 50, 300, 334, 501, 999, 1000])]:
        for S in steps:
            times = ddim_timesteps(T, S, spacing)
            assert len(times) == len(set(times)) == S
            assert times == sorted(times)
            assert times[0] >= 1
            assert times[-1] <= T
            assert times != [1] or T == 1  # one step starts from noise
    assert ddim_timesteps(1000, 1000, spacing) == list(range(1, 1001))


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_steps", [1, 7, 50, 300, 1000])
def test_the_network_is_asked_at_these_times_and_the_last_step_lands_on_the_image(
    process, spacing, num_steps
):
    asked, seen = [], []

    def model(xt: Tensor, t: Tensor) -> Tensor:
        assert (t == t[0]).all()
        asked.append(t[0].item())
        return 0.1 * xt

    x_T = torch.randn(2, 1, 2, 2)
    x0 = ddim_sample(
        model,
        process,
        x_T,
        num_steps,
        spacing=spacing,
        on_step=lambda s, xs: seen.append((s, xs)),
    )
    times = ddim_timesteps(1000, num_steps, spacing)
    assert asked == times[::-1]
    assert [s for s, _ in seen] == [*times[:-1][::-1], 0]
    assert torch.equal(seen[-1][1], x0)
    before = seen[-2][1] if num_steps > 1 else x_T
    bar = process.alpha_bar[times[0]].item()
    x0_hat = (before - math.sqrt(1 - bar) * 0.1 * before) / math.sqrt(bar)
    torch.testing.assert_close(x0, x0_hat)


def test_the_times_are_the_authors():
    assert ddim_timesteps(1000, 50) == list(range(1, 1000, 20))
    assert ddim_timesteps(1000, 300)[:3] == [1, 4, 7]
    assert ddim_timesteps(1000, 10, "trailing") == list(range(100, 1001, 100))
    for S in (10, 20, 50, 100):
        authors = (np.linspace(0, np.sqrt(1000 * 0.8), S) ** 2).astype(int) + 1
        ours = ddim_timesteps(1000, S, "quadratic")
        late = 0 if S < 50 else 15  # before that theirs repeats times, and ours moves them up
        assert ours[late:] == authors[late:].tolist()
        assert all(0 <= mine - theirs <= 8 for mine, theirs in zip(ours, authors, strict=True))
    with pytest.raises(UserError, match="spacing 'linear' is not known"):
        ddim_timesteps(1000, 10, "linear")


@pytest.mark.parametrize("num_steps", [0, -1, 1001])
def test_impossible_numbers_of_steps_are_refused(num_steps):
    for spacing in SPACINGS:
        with pytest.raises(UserError, match=rf"num_steps is {num_steps}: take 1 to 1000"):
            ddim_timesteps(1000, num_steps, spacing)


@pytest.mark.parametrize("eta", [-1.0, 2.0, float("nan")])
def test_impossible_eta_is_refused(process, eta):
    with pytest.raises(UserError, match="eta is"):
        ddim_sample(lambda xt, t: xt, process, torch.randn(1, 1, 2, 2), 2, eta)


# One step


@pytest.mark.parametrize("t", [1, 2, 3, 50, 500, 1000])
def test_eta_one_over_adjacent_steps_is_ddpm(process, t):
    """With β̃ and the same noise; at t = 1 both add none."""
    xt, eps_hat = torch.randn(2, 3, 1, 8, 8)
    bars = process.alpha_bar[[t, t - 1]].tolist()
    torch.manual_seed(t)
    theirs = process.p_sample(lambda xt, t: eps_hat, xt, t, clip_x0=False)
    torch.manual_seed(t)
    ours = ddim_step(xt, eps_hat, *bars, eta=1.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))
    if t > 1:
        without = ddim_step(xt, eps_hat, *bars)
        assert (without - theirs).abs().max() > 10 * (ours - theirs).abs().max()


def test_a_step_keeps_the_marginal(process):
    """With the true x0 and noise, xs has mean √ᾱ_s x0 and variance 1 - ᾱ_s, whatever η
    [Song21 Lemma 1]."""
    x0, eps = 0.7, torch.randn(200_000, dtype=torch.float64)
    bar_t, bar_s = process.alpha_bar[[500, 300]].tolist()
    xt = math.sqrt(bar_t) * x0 + math.sqrt(1 - bar_t) * eps
    for eta in (0.0, 0.3, 1.0):
        xs = ddim_step(xt, eps, bar_t, bar_s, eta)
        assert xs.mean().item() == pytest.approx(math.sqrt(bar_s) * x0, abs=0.01)
        assert xs.var().item() == pytest.approx(1 - bar_s, rel=0.02)


def test_sigma_hat_is_the_noise_of_the_larger_variance(process):
    bar_t, bar_s = process.alpha_bar[[500, 300]].tolist()
    xt, eps_hat = torch.randn(2, 1, 1, 300, 300)
    mean = math.sqrt(bar_s) * (xt - math.sqrt(1 - bar_t) * eps_hat) / math.sqrt(bar_t)
    mean += math.sqrt(1 - bar_s - ddim_sigma(bar_t, bar_s, 1.0) ** 2) * eps_hat
    noise = ddim_step(xt, eps_hat, bar_t, bar_s, 1.0, sigma_hat=True) - mean
    assert noise.std().item() == pytest.approx(math.sqrt(1 - bar_t / bar_s), rel=0.01)
    assert ddim_sigma(bar_t, bar_s, 1.0) < math.sqrt(1 - bar_t / bar_s)
    last = [ddim_step(xt, eps_hat, bar_t, 1.0, 1.0, sigma_hat=hat) for hat in (True, False)]
    assert torch.equal(*last)  # without noise
    with pytest.raises(UserError, match="sigma_hat"):
        ddim_step(xt, eps_hat, bar_t, bar_s, 0.5, sigma_hat=True)


# Whole paths


@pytest.mark.parametrize("spacing", SPACINGS)
def test_with_the_true_noise_eta_zero_returns_the_image(process, spacing):
    x0 = torch.rand(2, 3, 4, 4, dtype=torch.float64) * 2 - 1

    def true_noise(xt: Tensor, t: Tensor) -> Tensor:
        bar = process.alpha_bar[t].view(-1, 1, 1, 1)
        return (xt - bar.sqrt() * x0) / (1 - bar).sqrt()

    x_T = torch.randn_like(x0)
    for num_steps in (1, 7, 50):
        sampled = ddim_sample(true_noise, process, x_T, num_steps, spacing=spacing)
        torch.testing.assert_close(sampled, x0, atol=1e-9, rtol=0)
        clipped = ddim_sample(true_noise, process, x_T, num_steps, spacing=spacing, clip_x0=True)
        torch.testing.assert_close(clipped, x0, atol=1e-9, rtol=0)


def recursion(process: DDPM, s: float, times: list[int], eta: float) -> list[tuple[float, float]]:
    """For data N(0, s²): factor of xt and deviation of the new noise, step by step, from the
    conditional means of x0 and ε given xt. Step: x_s = factor x_t + deviation z."""
    steps = []
    for before, t in reversed(list(pairwise([0, *times]))):
        bar_t, bar_s = process.alpha_bar[[t, before]].tolist()
        total = bar_t * s**2 + 1 - bar_t
        of_x0, of_eps = math.sqrt(bar_t) * s**2 / total, math.sqrt(1 - bar_t) / total
        new = eta**2 * (1 - bar_s) * (1 - bar_t / bar_s) / (1 - bar_t)
        factor = math.sqrt(bar_s) * of_x0 + math.sqrt(max(1 - bar_s - new, 0)) * of_eps
        steps.append((factor, math.sqrt(new)))
    return steps


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_samples_of_a_gaussian_follow_the_exact_affine_recursion(process, eta, monkeypatch):
    for s in (0.3, 1.0):
        model, errors = TwoPoints(process, 0.0, s), []
        for num_steps in (10, 50, 1000):
            steps = recursion(process, s, ddim_timesteps(1000, num_steps), eta)
            noise = torch.randn(num_steps + 1, 2, 1, 4, 4, dtype=torch.float64)
            draws = iter(noise[1:])
            monkeypatch.setattr(torch, "randn_like", lambda x, draws=draws: next(draws))
            samples = ddim_sample(model, process, noise[0], num_steps, eta)
            exact, variance = noise[0], 1.0
            for (factor, deviation), z in zip(steps, noise[1:], strict=True):
                exact = factor * exact + deviation * z
                variance = factor**2 * variance + deviation**2
            torch.testing.assert_close(samples, exact, atol=1e-9, rtol=1e-9)
            errors.append(abs(math.log(variance / s**2)))
            if s == 1.0 and eta == 0.0:
                ratio = {10: 0.69, 50: 0.93, 1000: 0.996}[num_steps]
                assert variance == pytest.approx(ratio, abs=5e-3)
        assert errors[0] > 1.5 * errors[1] > 1.5**2 * errors[2]


def test_encoding_is_undone_the_better_the_more_steps(process):
    model = TwoPoints(process, 0.6, 0.2)
    x0 = 0.6 * torch.randn(4, 1, 4, 4, dtype=torch.float64).sign() + 0.2 * torch.randn(4, 1, 4, 4)
    for spacing in SPACINGS:
        errors = []
        for num_steps in (10, 50, 250, 1000):
            x_T = ddim_encode(model, process, x0, num_steps, spacing)
            decoded = ddim_sample(model, process, x_T, num_steps, spacing=spacing)
            errors.append((decoded - x0).abs().mean().item())
        assert all(late < 0.6 * early for early, late in pairwise(errors)), (spacing, errors)
        assert errors[-1] < 0.01
        assert x_T.std().item() == pytest.approx(1, abs=0.35)  # it is noise


def test_samples_are_consistent_over_the_number_of_steps(process):
    """The same noise ends at the same image, nearly, for any S, if η = 0 [Song21 Section 5.2]."""
    model, x_T = TwoPoints(process, 0.6, 0.2), torch.randn(8, 1, 4, 4, dtype=torch.float64)
    best = ddim_sample(model, process, x_T, 1000)
    gaps = [
        (ddim_sample(model, process, x_T, S) - best).square().mean().item() for S in (10, 50, 200)
    ]
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[1] < 0.1 * best.var().item()
    noisy = ddim_sample(model, process, x_T, 50, eta=1.0)
    assert (noisy - best).square().mean() > 10 * gaps[1]


def test_slerp():
    x, y = torch.randn(2, 3, 1, 28, 28)
    assert torch.allclose(slerp(x, y, 0.0), x, atol=1e-6)
    assert torch.allclose(slerp(x, y, 1.0), y, atol=1e-6)
    middle = slerp(x, y, 0.5)
    for i in range(3):  # as long as the ends, where the straight line is 0.7 times as long
        assert middle[i].norm() / x[i].norm() == pytest.approx(1, abs=0.06)
        assert (x[i] + y[i]).norm() / 2 / x[i].norm() == pytest.approx(math.sqrt(0.5), abs=0.06)
    a, b = torch.zeros(2, 1, 1, 1, 2)
    a[..., 0], b[..., 1] = 1.0, 1.0
    third = torch.tensor([math.cos(math.pi / 6), math.sin(math.pi / 6)])
    assert torch.allclose(slerp(a, b, 1 / 3).flatten(), third, atol=1e-6)
    assert torch.allclose(slerp(x, x, 0.3), x, atol=1e-6)
    assert slerp(x, -x, 0.5).isfinite().all()


# Networks


def wake(model: nn.Module) -> nn.Module:
    """Every weight off zero, so that nothing hides behind a layer that starts as nothing."""
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn_like(weight)
    return model


def small_network(lesson: str) -> tuple[nn.Module, dict[str, object]]:
    """A network of that lesson, and what else its checkpoints' config holds."""
    network = {"image_channels": 1, "image_size": 28, **NETWORK, "dropout": 0.5}
    config: dict[str, object] = {"network": network, "num_timesteps": 60}
    if lesson == "lesson_09":
        from lesson_09.unet import UNet as LearnedVarianceUNet

        network["learned_variance"] = True
        config |= {"schedule": "cosine", "variance": "learned"}
        config |= {"simple_weight": 1.0, "vlb_weight": 1e-3}
        return LearnedVarianceUNet(**network), config
    config |= {"beta_1": 1e-4, "beta_T": 0.02, "variance": "beta"}
    if lesson == "lesson_05":
        return UNet(**network), config
    if lesson == "lesson_05.class_conditional":
        return ClassConditionalUNet(10, **network), config | {"num_classes": 10}
    return TextToImageUNet(TextEncoder(**TEXT), **network), config | {"text": TEXT}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A file a lesson, with a small random network in it."""
    folder, files = tmp_path_factory.mktemp("checkpoints"), {}
    for lesson in lessons.LESSONS:
        torch.manual_seed(1)
        model, config = small_network(lesson)
        files[lesson] = str(folder / f"{lesson}.pt")
        content = {"lesson": lesson, "config": config, "dataset": "digits", "step": 1}
        checkpoint.save(Path(files[lesson]), {**content, "ema": wake(model).state_dict()})
    return files


def sample(capsys: pytest.CaptureFixture, folder: Path, *words: str) -> dict[str, np.ndarray]:
    """Run the script; the arrays that it leaves, by name."""
    flags = ["--num_steps", "4", "--device", "cpu", "--precision", "float32", "--save_npz", "true"]
    cli.run(sample_ddim.main, [*flags, "--output_dir", str(folder), *words])
    return {file.stem: np.load(file)["samples"] for file in folder.glob("*.npz")}


def fails(capsys: pytest.CaptureFixture, folder: Path, *words: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        sample(capsys, folder, *words)
    captured = capsys.readouterr()
    assert stop.value.code == 2
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    assert not any(folder.glob("*.npz"))
    return lines[0]


def test_prompts_make_the_image(process):
    """Same noise, two prompts: two images; the batch permuted: the images permuted."""
    model = wake(small_network("lesson_05.text_to_image")[0]).eval()
    process = DDPM(linear_beta(60))
    tokens, order = tokenize(["3", "seven", "a handwritten 0"]), torch.tensor([2, 0, 1])
    x_T = torch.randn(1, 1, 28, 28).expand(3, -1, -1, -1)
    images = ddim_sample(model.bind(tokens), process, x_T, 5)
    assert (images[0] - images[1]).abs().mean() > 1e-3
    permuted = ddim_sample(model.bind(tokens[order]), process, x_T, 5)
    torch.testing.assert_close(permuted, images[order], atol=1e-4, rtol=1e-3)


def test_the_script_writes_grids_prompts_arrays_and_the_steps(checkpoints, tmp_path, capsys):
    words = ["--model_checkpoint", checkpoints["lesson_05.text_to_image"], "--num_samples", "9"]
    words += ["--prompts", "seven", "a handwritten 3", "--show_timesteps", "true"]
    arrays = sample(capsys, tmp_path, *words)
    assert "4 times, from noise to image: 46 31 16 1" in capsys.readouterr().out
    names = {"conditional.png", "unconditional.png", "prompts.txt", "steps.gif"}
    assert {file.name for file in tmp_path.iterdir()} == names | {f"{n}.npz" for n in arrays}
    assert {n: (a.dtype, a.shape) for n, a in arrays.items()} == {
        "conditional": (np.uint8, (9, 1, 28, 28)),
        "unconditional": (np.uint8, (9, 1, 28, 28)),
    }
    with Image.open(tmp_path / "steps.gif") as gif:
        assert gif.n_frames == 5  # the noise, and 4 steps
    rows = (tmp_path / "prompts.txt").read_text().splitlines()
    assert [len(row.split("a handwritten 3")) - 1 for row in rows] == [4, 0]
    assert rows[1] == "seven"
    assert not np.array_equal(arrays["conditional"], arrays["unconditional"])


def test_the_same_seed_gives_the_same_images_bit_for_bit(checkpoints, tmp_path, capsys):
    """Dropout of 0.5 is in this network: were it active, no two runs would agree."""
    words = ["--model_checkpoint", checkpoints["lesson_05.text_to_image"], "--num_samples", "2"]
    one, two = (sample(capsys, tmp_path / name, *words) for name in "ab")
    other = sample(capsys, tmp_path / "c", *words, "--seed", "1")
    for name in ("conditional", "unconditional"):
        assert np.array_equal(one[name], two[name])
        assert not np.array_equal(one[name], other[name])
    with_noise = sample(capsys, tmp_path / "d", *words, "--eta", "1")
    assert not np.array_equal(one["conditional"], with_noise["conditional"])
    null = sample(capsys, tmp_path / "e", *words, "--guidance", "0")
    assert np.array_equal(null["conditional"], one["unconditional"])
    alone = sample(capsys, tmp_path / "f", *words, "--unconditional", "false")
    assert list(alone) == ["conditional"]
    assert np.array_equal(alone["conditional"], one["conditional"])


@pytest.mark.parametrize("lesson", ["lesson_05", "lesson_09"])
def test_unconditional_checkpoints_are_sampled_and_take_no_prompts(
    lesson, checkpoints, tmp_path, capsys
):
    words = ["--model_checkpoint", checkpoints[lesson], "--num_samples", "2"]
    assert list(sample(capsys, tmp_path, *words)) == ["unconditional"]
    assert not (tmp_path / "prompts.txt").exists()
    model = lessons.load(checkpoints[lesson])[1]
    eps_hat = sample_ddim.estimate_noise(model, torch.randn(2, 1, 28, 28), torch.tensor([5, 6]))
    assert eps_hat.shape == (2, 1, 28, 28)
    said = fails(capsys, tmp_path / "no", *words, "--prompts", "seven", "3")
    assert f"{lesson}.pt ({lesson}) knows no prompts" in said
    assert "knows no prompts" in fails(capsys, tmp_path / "no", *words, "--guidance", "2")
    assert "nothing" in fails(capsys, tmp_path / "no", *words, "--unconditional", "false")


def test_prompts_for_a_class_conditional_checkpoint_are_labels(checkpoints, tmp_path, capsys):
    file = checkpoints["lesson_05.class_conditional"]
    words = ["--model_checkpoint", file, "--num_samples", "3"]
    sample(capsys, tmp_path, *words, "--prompts", "3", "1")
    assert (tmp_path / "prompts.txt").read_text().split() == ["3", "1", "3"]
    sample(capsys, tmp_path, *words)
    assert (tmp_path / "prompts.txt").read_text().split() == ["0", "1", "2"]
    for prompt in ("seven", "10", "-1"):
        said = fails(capsys, tmp_path / "no", *words, f"--prompts=[{prompt!r}]")
        assert "is no label of this class-conditional checkpoint: take 0 to 9" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--num_steps", "0"], "num_steps is 0: take 1 to 60"),
        (["--num_steps", "-1"], "num_steps is -1: take 1 to 60"),
        (["--num_steps", "61"], "num_steps is 61: take 1 to 60"),
        (["--eta", "-1"], "eta is -1.0"),
        (["--eta", "2"], "eta is 2.0"),
        (["--spacing", "linear"], "spacing"),
        (["--prompts", "3", ""], "prompt '' has 0 bytes"),
        (["--prompts"], "0 prompts for 2 samples: give 1 to 2 of them"),
        (["--prompts", "1", "2", "3"], "3 prompts for 2 samples: give 1 to 2 of them"),
        (["--guidance", "-1"], "guidance is -1.0"),
        (["--num_samples", "0"], "num_samples is 0"),
        (["--device", "abacus"], "device 'abacus'"),
        (["--model_checkpoint", "missing.pt"], "checkpoint missing.pt does not exist"),
        (["--sha256", "0" * 64], "it is another file"),
        (["--no_such_flag", "1"], "no_such_flag"),
    ],
)
def test_bad_input_is_one_clear_line(words, said, checkpoints, tmp_path, capsys):
    file = checkpoints["lesson_05.text_to_image"]
    flags = ["--model_checkpoint", file, "--num_samples", "2", *words]
    assert said in fails(capsys, tmp_path / "out", *flags)


def test_a_checkpoint_of_an_unknown_lesson_is_refused(tmp_path, capsys):
    content = {"config": {}, "dataset": "digits", "step": 1, "ema": {}}
    checkpoint.save(tmp_path / "odd.pt", {"lesson": "os", **content})
    said = fails(capsys, tmp_path / "out", "--model_checkpoint", str(tmp_path / "odd.pt"))
    assert "is a checkpoint of os; known are lesson_05, " in said


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the one file, whole or half of it, and HTML for anything else."""

    body = b""

    def do_GET(self) -> None:
        body = b"<html>Sign in first</html>" if "html" in self.path else self.body
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if "half" in self.path else body)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address(checkpoints: dict[str, str]) -> Iterator[str]:
    Handler.body = Path(checkpoints["lesson_05"]).read_bytes()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_a_checkpoint_from_an_address(address, checkpoints, tmp_path, monkeypatch, capsys):
    cache = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    for path, said in [("html", "gave no checkpoint"), ("half", "nothing was kept")]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            sample(capsys, tmp_path / "no", "--model_checkpoint", f"{address}/{path}.pt")
        assert stop.value.code == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]  # above it may be a bar
        assert last.startswith("error: ")
        assert said in last
        assert not list(cache.glob("**/*.pt"))
        assert not list(cache.glob("**/*.part"))
    gone = "http://127.0.0.1:9/model.pt"
    assert "could not be downloaded" in fails(capsys, tmp_path / "no", "--model_checkpoint", gone)
    words = ["--num_samples", "1", "--model_checkpoint", f"{address}/model.pt"]
    there = sample(capsys, tmp_path / "there", *words)
    here = sample(capsys, tmp_path / "here", *words[:3], checkpoints["lesson_05"])
    assert np.array_equal(there["unconditional"], here["unconditional"])
    assert "another file" in fails(capsys, tmp_path / "no", *words, "--sha256", "0" * 64)


# Training


def train(
    main: object, folder: Path, steps: int, resume: str | None = None, **flags: object
) -> Path:
    options = {"output_dir": str(folder), "device": "cpu", "precision": "float32"}
    options |= {"num_previews": 2, "resume": resume}
    arguments = {
        "dataset": "digits",
        "network": NETWORK,
        "text": TEXT,
        "num_timesteps": 30,
        "num_training_steps": steps,
        "batch_size": 8,
        "num_warmup_steps": 2,
        "num_samples": 0,
        **flags,
    }
    main(**arguments, options=RunOptions(**options))
    return folder / f"checkpoint_{steps:06d}.pt"


def same(one: Path, other: Path) -> bool:
    one_ema, other_ema = (checkpoint.load(file)["ema"] for file in (one, other))
    return one_ema.keys() == other_ema.keys() and all(
        torch.equal(one_ema[key], other_ema[key]) for key in one_ema
    )


def test_the_training_is_that_of_lesson_5_to_the_bit(tmp_path, capsys):
    """And goes on where either was left."""
    lesson_5 = train(train_text.main, tmp_path / "five", 4)
    lesson_6 = train(train_mnist.main, tmp_path / "six", 4, num_steps=3, num_samples=2)
    assert same(lesson_5, lesson_6)
    pictures = {"samples.png", "samples_000004.png", "steps.gif", "prompts.txt", "losses.png"}
    assert pictures <= {file.name for file in (tmp_path / "six").iterdir()}
    half = train(train_mnist.main, tmp_path / "half", 2, num_steps=3)
    assert not same(half, lesson_6)
    whole = train(train_mnist.main, tmp_path / "half", 4, resume="latest", num_steps=3)
    assert same(whole, lesson_6)


def test_what_cannot_be_sampled_is_refused_before_the_training(tmp_path):
    for main, flags, said in [
        (train_mnist.main, {"num_steps": 31}, "num_steps is 31"),
        (train_mnist.main, {"num_samples": -1, "num_steps": 3}, "num_samples is -1"),
        (train_text.main, {"num_samples": -1}, "num_samples is -1"),
        (train_text.main, {"learning_rate": 0.0}, "learning_rate is 0.0"),
    ]:
        with pytest.raises(UserError, match=said):
            train(main, tmp_path / "run", 2, **flags)
        assert not (tmp_path / "run").exists()


# The laboratory


def experiment(folder: Path, *words: str) -> None:
    flags = ["--device", "cpu", "--dataset", "digits", "--num_samples", "2", "--steps", "3", "2"]
    cli.run(laboratory.main, [*flags, "--output_dir", str(folder), *words])


@pytest.mark.parametrize("figure", ["eta", "consistency", "interpolation", "reconstruction"])
def test_the_laboratory_draws_its_figures(figure, checkpoints, tmp_path, capsys):
    for lesson, words in [
        ("lesson_05.text_to_image", ["--prompts", "seven", "3"]),
        ("lesson_05.text_to_image", ["--etas", "0"]),
        ("lesson_09", ["--spacing", "trailing"]),
    ]:
        file = checkpoints[lesson]
        experiment(tmp_path, "--figure", figure, "--model_checkpoint", file, *words)
        with Image.open(tmp_path / f"{figure}.png") as picture:
            assert min(picture.size) > 100
        (tmp_path / f"{figure}.png").unlink()
    said = capsys.readouterr().out
    assert said.count("reconstruction error") == (6 if figure == "reconstruction" else 0)
    if figure == "consistency":
        assert "S = 3: mean squared distance from S = 3 0.00000" in said


def test_the_laboratory_compares_what_it_says(process, tmp_path, capsys, monkeypatch):
    """With an exact network: reconstruction errors that fall, samples that all have one x_T, and
    every noise's own prompt along its whole row."""
    bench = laboratory.Bench(process, TwoPoints(process, 0.6, 0.2), None, "uniform", tqdm())
    saved: dict[str, Tensor] = {}
    monkeypatch.setattr(laboratory, "save_rows", lambda path, rows: saved.update(rows))
    monkeypatch.setattr(laboratory, "save_plot", lambda path, curves, *_: saved.update(curves))
    noise = torch.randn(2, 3, 1, 4, 4)
    x0 = 0.6 * noise[0].sign()
    laboratory.draw_reconstruction(bench, tmp_path / "a", noise, [100, 10], [], x0)
    (steps, errors) = saved.pop("encoded, then decoded, in S steps each")
    assert steps == [10, 100]
    assert errors[0] > 2 * errors[1] > 0
    expected = ((saved["S = 10"] - x0).square().mean() / 4).item()  # in [0, 1], not [-1, 1]
    assert errors[0] == pytest.approx(expected, rel=0.2)  # but for what is clipped
    saved.clear()
    laboratory.draw_eta(bench, tmp_path / "b", noise, [5, 50], [0.0, 1.0])
    assert list(saved)[:3] == ["η = 0, S = 5", "η = 0, S = 50", "η = 1, S = 5"]
    assert len(saved) == 6
    assert torch.equal(saved["η = 0, S = 5"], bench.sample(noise[0], 5))
    saved.clear()
    laboratory.draw_interpolation(bench, tmp_path / "c", noise, [5])
    assert [row.shape for row in saved.values()] == [(11, 1, 4, 4)] * 3
    ends = torch.stack(list(saved.values()), 1)[[0, 10]]
    torch.testing.assert_close(ends[0], bench.sample(noise[0], 5), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ends[1], bench.sample(noise[1], 5), atol=1e-4, rtol=1e-4)

    asked = []
    task = sample_ddim.Task(lambda conditions: bench.model, torch.zeros(6))
    monkeypatch.setattr(
        laboratory, "plan", lambda model, prompts, *_, **__: asked.append(prompts) or {"": task}
    )
    bench.prompts = ["0", "1", "2"]
    assert bench.network(torch.zeros(6, 1, 4, 4)) is bench.model
    assert asked == [["0", "0", "1", "1", "2", "2"]]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--figure", "eta", "--etas", "3"], "eta is 3.0"),
        (["--figure", "eta", "--steps", "61"], "num_steps is 61"),
        (["--figure", "eta", "--steps"], "steps is empty"),
        (["--figure", "7"], "figure"),
        (["--figure", "consistency", "--num_samples", "0"], "num_samples is 0"),
        (["--figure", "consistency", "--prompts", "a"], "knows no prompts"),
        (["--figure", "reconstruction", "--num_samples", "298"], "298 test images"),
    ],
)
def test_bad_input_to_the_laboratory_is_one_clear_line(words, said, checkpoints, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        experiment(tmp_path / "out", "--model_checkpoint", checkpoints["lesson_05"], *words)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert said in lines[0]
    assert not (tmp_path / "out").exists()


# As a user would run them

READMES = ("lesson_05/class_conditional", "lesson_05/text_to_image", "lesson_06")
TINY = {
    "train_mnist.py": "--dataset digits --network.channels 8 --network.multipliers [1,2] "
    "--network.num_groups 4 --network.attention_resolutions [14] --num_timesteps 60 "
    "--num_training_steps 2 --batch_size 4 --num_previews 2 --num_samples 1",
    "sample_mnist.py": "--num_samples 4",
    "sample_ddim.py": "--num_samples 4 --num_steps 5",
    "laboratory.py": "--dataset digits --num_samples 2 --steps 3",
    "break_it.py": "--num_samples 2 --num_steps 3 --model_checkpoint shipped.pt",
}
PICTURE = {
    "sample_ddim.py": "unconditional.png",
    "laboratory.py": "{figure}.png",
    "break_it.py": "broken_*.png",
}


def commands() -> list[tuple[str, str, bool]]:
    """Folder and line of every command in the READMEs; whether it is the first of its script."""
    result: list[tuple[str, str, bool]] = []
    for folder in READMES:
        text = (ROOT / folder / "README.md").read_text()
        for line in re.findall(r"^python \S+\.py.*$", text, re.MULTILINE):
            seen = {(f, other.split()[1]) for f, other, _ in result}
            result.append((folder, line.split("#")[0], (folder, line.split()[1]) not in seen))
    return result


@pytest.mark.parametrize(("folder", "line", "first"), commands())
def test_every_command_of_the_readmes_runs(
    folder, line, first, checkpoints, tmp_path, monkeypatch, capsys
):
    """In its folder; once for each script in a process of its own."""
    words = shlex.split(line)[1:]
    lesson = {"lesson_06": "lesson_05.text_to_image"}.get(folder, folder.replace("/", "."))
    words += [*TINY[words[0]].split(), "--device", "cpu", "--output_dir", str(tmp_path)]
    if "--model_checkpoint" in words:
        words[words.index("--model_checkpoint") + 1] = checkpoints[lesson]
    elif words[0] == "sample_mnist.py":
        words += ["--model_checkpoint", checkpoints[lesson]]
    if first:
        result = subprocess.run(
            [sys.executable, *words], cwd=ROOT / folder, capture_output=True, text=True, timeout=120
        )
        assert result.returncode == 0, result.stderr
    else:
        monkeypatch.chdir(ROOT / folder)
        monkeypatch.setattr(sys, "argv", words)
        runpy.run_path(words[0], run_name="__main__")
    figure = words[words.index("--figure") + 1] if "--figure" in words else ""
    picture = PICTURE.get(words[0], "samples.png").format(figure=figure)
    assert list(tmp_path.glob(picture))


# The shipped checkpoint


def test_the_shipped_checkpoint_draws_what_it_is_asked_for():
    """Ten prompts, ten samples each, DDIM-50, no guidance: at least 95 of 100 are right."""
    prompts = ["0", "one", "the digit 2", "a handwritten three", "number 4", "a 5", "six"]
    prompts += ["a picture of a seven", "handwritten 8", "an image of the digit nine"]
    assert os.path.getsize(sample_ddim.SHIPPED) <= 10e6
    process, model, content = lessons.load(sample_ddim.SHIPPED)
    assert content["dataset"] == "mnist"
    torch.manual_seed(0)
    with autocast(torch.device("cpu")):
        network = model.bind(tokenize(prompts * 10))
        x0 = ddim_sample(network, process, torch.randn(100, 1, 28, 28))
    _, probabilities = classifier.look(classifier.load(), to_uint8(x0))
    answers = probabilities.argmax(1).view(10, 10)
    assert (answers == torch.arange(10)).sum() >= 95, answers
