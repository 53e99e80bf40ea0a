"""The evaluation of checkpoints of every lesson, interrupted and resumed, and with bad input."""

import dataclasses
import importlib
import json
import math
from pathlib import Path

from benchmarks.quality import evaluate, metrics
from benchmarks.quality.evaluate import plus_minus
from benchmarks.quality.samples import PlanOptions, SamplePlan
from common import checkpoint, cli, lessons
from common.data import to_uint8
from lesson_05.ddpm import linear_beta
from lesson_06.ddim import ddim_sample
from lesson_09.iddpm import ImprovedDDPM

import numpy as np
import pytest
import torch
from helpers import error_line
from torch import nn

T = 24
FIELDS = {
    *("lesson", "checkpoint_sha256", "training_steps", "parameters", "dataset"),
    *("sampler", "num_steps", "guidance", "num_samples", "seed", "arithmetic", "device"),
    *("eta", "sigma_hat", "variance", "network_calls", "training_images"),
    *("judge_fid", "judge_fid_error", "judge_typical", "judge_agreement", "judge_accuracy"),
    *("fid_error", "inception_fid"),
    *("fid", "fid_500", "share_sure", "class_balance_bits", "agreement", "precision", "recall"),
    *("nearest_median", "nearest_least", "real", "bits_per_dim", "num_images", "num_terms"),
    *("seconds_per_sample", "reference", "classifier_sha256", "classifier_accuracy", "sure_from"),
    *("commit", "versions", "hardware"),
}
SAMPLERS = [
    ("lesson_02", "ddpm"),
    ("lesson_05", "ddpm"),
    ("lesson_05", "ddim"),
    ("lesson_05", "strided"),
    ("lesson_05.class_conditional", "ddpm"),
    ("lesson_05.class_conditional", "ddim"),
    ("lesson_05.text_to_image", "ddim"),
    ("lesson_09", "ddim"),
    ("lesson_09", "strided"),
]
pytestmark = pytest.mark.usefixtures("one_reference")


@pytest.fixture
def one_reference(reference, monkeypatch) -> None:
    """The features of the real images are computed once, not by each run."""
    monkeypatch.setattr(evaluate, "Reference", lambda data, device: reference)


def words(file: str, folder: Path, *more: str) -> list[str]:
    flags = ["--model_checkpoint", file, "--output_dir", str(folder), "--num_samples", "70"]
    flags += ["--num_images", "2", "--num_terms", "3", "--device", "cpu", "--precision", "float32"]
    return [*flags, *more]


def run(file: str, folder: Path, *more: str) -> dict:
    cli.run(evaluate.main, words(file, folder, *more))
    return json.loads((folder / "result.json").read_text())


def levels_in(folder: Path) -> torch.Tensor:
    with np.load(folder / "samples.npz", allow_pickle=False) as content:
        return torch.from_numpy(content["samples"])


@pytest.mark.parametrize(("lesson", "sampler"), SAMPLERS)
def test_the_checkpoints_of_every_lesson_are_measured(
    lesson, sampler, checkpoints, tmp_path, capsys
):
    steps = [] if sampler == "ddpm" else ["--num_steps", "2"]
    result = run(checkpoints[lesson], tmp_path, "--sampler", sampler, *steps)
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
        if lesson == "lesson_02":  # entropy of a level under N(0, 1), less what the model gains
            total = math.log2(78.6) + 0.5 * math.log2(2 * math.pi * math.e) - bits["gain"]["mean"]
        else:
            total = sum(bits[part]["mean"] for part in ("prior", "kl", "decoder"))
        assert bits["total"]["mean"] == pytest.approx(total)
        assert bits["num_images"] == 2
    assert result["network_calls"] == result["num_steps"]
    assert result["training_images"] is None  # the config names no batch_size
    assert result["fid_error"] > 0
    header, figures = capsys.readouterr().out.splitlines()[-3:-1]
    assert header.split()[:4] == ["network", "calls", "samples", "FID"]
    assert f" {plus_minus(result['fid'], result['fid_error'])} " in figures
    for name in ("samples.png", "nearest.png"):
        assert (tmp_path / name).stat().st_size > 0


def test_an_interrupted_run_resumes_with_the_same_samples(checkpoints, tmp_path, monkeypatch):
    file, flags = checkpoints["lesson_09"], ("--sampler", "strided", "--num_steps", "2")
    whole = run(file, tmp_path / "whole", *flags)
    sizes, seeds = [], []
    trajectory = SamplePlan.trajectory

    def interrupt(self, digits, seed):
        sizes.append(len(digits))
        seeds.append(torch.initial_seed())
        if sizes == [64, 6]:
            raise KeyboardInterrupt
        return trajectory(self, digits, seed)

    monkeypatch.setattr(SamplePlan, "trajectory", interrupt)
    with pytest.raises(SystemExit):
        run(file, tmp_path / "parts", *flags)
    assert len(levels_in(tmp_path / "parts")) == 64
    parts = run(file, tmp_path / "parts", *flags)
    assert sizes == [64, 6, 6]
    assert torch.equal(levels_in(tmp_path / "whole"), levels_in(tmp_path / "parts"))
    assert whole["fid"] == parts["fid"]
    assert seeds[0] != seeds[1] == seeds[2]  # each batch has noise of its own


def test_a_finished_run_draws_nothing_again(checkpoints, tmp_path, monkeypatch):
    file = checkpoints["lesson_05"]
    first = run(file, tmp_path, "--num_steps", "2")
    monkeypatch.setattr(SamplePlan, "trajectory", None)
    assert run(file, tmp_path, "--num_steps", "2")["fid"] == first["fid"]


def test_samples_depend_on_the_seed_and_on_the_guidance(checkpoints, tmp_path):
    file = checkpoints["lesson_05.class_conditional"]
    flags = {"plain": (), "again": (), "seed": ("--seed", "1"), "guided": ("--guidance", "2")}
    results = {
        name: run(file, tmp_path / name, "--num_steps", "2", *more) for name, more in flags.items()
    }
    fids = {name: result["fid"] for name, result in results.items()}
    assert fids["plain"] == fids["again"]
    assert len(set(fids.values())) == 3
    assert results["guided"]["network_calls"] == 2 * results["plain"]["network_calls"] == 4


SOURCES = {
    "eta": ("lesson_05", "ddim", {"eta": 0.5}),
    "eta_1": ("lesson_05", "ddim", {"eta": 1.0}),
    "sigma_hat": ("lesson_09", "ddim", {"eta": 1.0, "sigma_hat": True}),
    "beta": ("lesson_05", "strided", {"variance": "beta"}),
    "beta_tilde": ("lesson_05", "strided", {"variance": "beta_tilde"}),
    "all_steps": ("lesson_05", "ddpm", {"variance": "beta_tilde", "num_steps": None}),
    "learned": ("lesson_09", "strided", {"variance": "learned"}),
    "fixed": ("lesson_09", "strided", {"variance": "beta"}),
    "fixed_tilde": ("lesson_09", "strided", {"variance": "beta_tilde"}),
}


@torch.no_grad()
@pytest.mark.parametrize("case", SOURCES)
def test_eta_and_variance_are_those_of_the_lessons(case, checkpoints):
    """The samples are what lessons 5, 6 and 9 draw from the same noise, by these flags."""
    lesson, sampler, flags = SOURCES[case]
    steps = {"device": "cpu", "precision": "float32", "sampler": sampler, "num_steps": 5} | flags
    plan = SamplePlan(checkpoints[lesson], PlanOptions(**steps))
    assert plan.settings().items() >= {k: v for k, v in flags.items() if v is not None}.items()
    torch.manual_seed(0)
    *_, (_, images) = plan.trajectory(torch.zeros(3).long(), 0)
    variance = flags.get("variance") if lesson == "lesson_09" or sampler == "ddpm" else None
    module = importlib.import_module(lessons.LESSONS[lesson])
    process, model, _ = module.load(checkpoints[lesson], variance=variance)
    torch.manual_seed(0)
    x_T = torch.randn(3, 1, 28, 28)
    if sampler == "ddim":
        hat = flags.get("sigma_hat", False)
        expected = ddim_sample(model, process, x_T, 5, flags["eta"], sigma_hat=hat)
    elif sampler == "ddpm":
        expected = process.sample(model, x_T)
    elif lesson == "lesson_09":
        expected = process.strided(5).sample(model, x_T)
    else:  # lesson 5's betas, strided by lesson 9
        strided = ImprovedDDPM(linear_beta(T), flags["variance"]).strided(5)
        expected = strided.sample(model, x_T)
    torch.testing.assert_close(images, expected, rtol=1e-3, atol=1e-3)


def test_other_noise_has_other_samples_and_is_not_reused(checkpoints, tmp_path, capsys):
    """Kept samples are used again only for the same η, σ̂ and variance."""
    ddim, strided = (["--sampler", s, "--num_steps", "5"] for s in ("ddim", "strided"))
    runs = [[*ddim], [*ddim, "--eta", "1"], [*ddim, "--eta", "1", "--sigma_hat", "true"]]
    runs += [[*strided], [*strided, "--variance", "beta"], [*strided, "--variance", "beta_tilde"]]
    file = checkpoints["lesson_09"]
    fids = [run(file, tmp_path / str(k), *flags)["fid"] for k, flags in enumerate(runs)]
    assert len(set(fids)) == len(runs)
    learned = run(file, tmp_path / "3", *strided, "--variance", "learned")  # the same, said
    assert learned["fid"] == fids[3]
    for k, flags in ((0, runs[1]), (1, runs[2]), (3, runs[4]), (4, runs[5])):
        error = error_line(capsys, evaluate.main, *words(file, tmp_path / str(k), *flags))
        assert "samples.npz holds samples of another checkpoint or of other flags" in error


def test_inception_is_an_extra(checkpoints, tmp_path, capsys, monkeypatch, reference):
    """A line where it is missing, before any work; with a stand-in, FID in its features."""
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    none = str(tmp_path / "none.safetensors")
    error = error_line(capsys, evaluate.main, "--model_checkpoint", none, "--inception", "true")
    assert "--inception needs torch-fidelity: pip install 'torchmetrics[image]'" in error

    class StandIn(nn.Module):
        num_features = 12

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            assert images.dtype == torch.uint8  # three channels, grey repeated
            assert torch.equal(images[:, :1].expand(-1, 3, -1, -1), images)
            return images[:, 0, 9:13, 9:12].flatten(1).double()

    monkeypatch.setattr(metrics, "inception", StandIn)
    result = run(checkpoints["lesson_05"], tmp_path, "--num_steps", "2", "--inception", "true")
    one, two = (
        x[:, 0, 9:13, 9:12].flatten(1).double() for x in (levels_in(tmp_path), reference.data.train)
    )
    assert result["inception_fid"] == pytest.approx(metrics.fid(one, two), rel=1e-6)


@torch.no_grad()
def test_sample_n_has_the_digit_n_mod_10_as_its_condition(checkpoints, tmp_path):
    file = checkpoints["lesson_05.class_conditional"]
    run(file, tmp_path, "--num_steps", "2")
    plan = SamplePlan(file, PlanOptions(device="cpu", precision="float32", num_steps=2))
    torch.manual_seed(0)
    *_, (_, images) = plan.trajectory(torch.arange(64) % 10, 0)
    assert torch.equal(levels_in(tmp_path)[:64], to_uint8(images))


BAD = [
    ("lesson_05", ("--num_samples", "0"), "num_samples is 0: it must be at least 65"),
    ("lesson_05", ("--num_samples", "1"), "num_samples is 1: it must be at least 65"),
    ("lesson_05", ("--num_samples", "9000"), "num_samples is 9,000: it must be at most 1,500"),
    ("lesson_05", ("--num_steps", "0"), "num_steps is 0: it must be from 1 to 24"),
    ("lesson_05", ("--num_steps", "25"), "num_steps is 25: it must be from 1 to 24"),
    ("lesson_05", ("--sampler", "ddpm", "--num_steps", "9"), "ddpm takes all 24 steps"),
    ("lesson_02", (), "cannot be sampled by ddim: choose another --sampler"),
    ("lesson_02", ("--sampler", "strided"), "cannot be sampled by strided"),
    ("lesson_02", ("--sampler", "ddpm", "--variance", "beta"), "predicts its variance: omit"),
    ("lesson_05", ("--variance", "beta"), "--variance is for ddpm and strided: --sampler ddim"),
    ("lesson_05", ("--sampler", "ddpm", "--variance", "learned"), "without learned variance"),
    ("lesson_05", ("--sampler", "strided", "--variance", "learned"), "without learned variance"),
    ("lesson_05", ("--sampler", "strided", "--variance", "gamma"), "variance"),
    ("lesson_05", ("--sampler", "ddpm", "--eta", "1"), "--eta and --sigma_hat are for ddim"),
    ("lesson_09", ("--sampler", "strided", "--sigma_hat", "true"), "are for ddim: --sampler str"),
    ("lesson_05", ("--eta", "1.5"), "eta is 1.5: choose 0 (no noise) to 1"),
    ("lesson_05", ("--sigma_hat", "true"), "--sigma_hat needs --eta 1, not 0"),
    ("lesson_05", ("--guidance", "2"), "takes no condition: omit --guidance"),
    ("lesson_05.class_conditional", ("--guidance", "-1"), "guidance is -1"),
    ("lesson_05", ("--sampler", "euler"), "sampler"),
    ("lesson_05", ("--num_images", "1"), "num_images is 1: it must be 0, or at least 2"),
    ("lesson_05", ("--num_images", "-1"), "num_images is -1: it must be at least 0"),
    ("lesson_05", ("--num_terms", "1"), "num_terms is 1: it must be at least 2"),
    ("lesson_05", ("--output_dir", ""), "--output_dir is empty"),
]


@pytest.mark.parametrize(
    ("lesson", "flags", "message"), BAD, ids=[" ".join([n, *w]) for n, w, _ in BAD]
)
def test_bad_flags_give_one_line(lesson, flags, message, checkpoints, tmp_path, capsys):
    error = error_line(capsys, evaluate.main, *words(checkpoints[lesson], tmp_path, *flags))
    assert message in error
    assert not (tmp_path / "result.json").exists()


def test_numbers_are_refused_before_anything_is_read(tmp_path, capsys):
    """Not after a minute of work: the checkpoint does not even exist."""
    none = str(tmp_path / "none.safetensors")
    for flags, reason in [
        (["--num_samples", "16"], "num_samples is 16: it must be at least 65"),
        (["--num_images", "1"], "num_images is 1"),
        (["--num_terms", "1"], "num_terms is 1"),
    ]:
        assert reason in error_line(capsys, evaluate.main, "--model_checkpoint", none, *flags)


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.08363, 0.00212, "0.084 ± 0.002"),
        (0.08363, 0.00112, "0.0836 ± 0.0011"),
        (0.016, 0.00096, "0.0160 ± 0.0010"),
        (12.345, 0.31, "12.3 ± 0.3"),
        (1234.6, 31.0, "1,235 ± 31"),
        (84.65, 0.805, "84.7 ± 0.8"),
        (0.5, None, "0.5"),
        (None, 0.1, ""),
        (1.0, 0.0, "1"),
    ],
)
def test_a_figure_has_the_digits_of_its_error(value, error, text):
    assert plus_minus(value, error) == text


def test_other_files_give_one_line(checkpoints, tmp_path, capsys):
    content = checkpoint.load(checkpoints["lesson_05"])
    path = tmp_path / "other.safetensors"

    def error(file: Path) -> str:
        return error_line(capsys, evaluate.main, *words(str(file), tmp_path / "out"))

    def error_with(**changes: object) -> str:
        checkpoint.save(path, dataclasses.replace(content, **changes))
        return error(path)

    network = {**content.config["network"], "channels": 16}
    assert "is damaged" in error_with(config={**content.config, "network": network})
    assert "name the folder of your images" in error_with(dataset="folder")
    wrong_lesson = error_with(lesson="benchmarks.quality.classifier")
    assert "is a checkpoint of benchmarks.quality.classifier" in wrong_lesson
    assert "cannot be read" in error(tmp_path / "missing.safetensors")
    (tmp_path / "text.safetensors").write_text("no checkpoint")
    assert "is no checkpoint" in error(tmp_path / "text.safetensors")


def test_saved_samples_are_checked_and_never_overwritten(checkpoints, tmp_path, capsys):
    flags = words(checkpoints["lesson_05"], tmp_path, "--num_steps", "2")
    cli.run(evaluate.main, flags)
    file = tmp_path / "samples.npz"
    kept = file.read_bytes()
    other_flags = "samples.npz holds samples of another checkpoint or of other flags"
    changes = ["--seed", "1"], ["--num_samples", "66"], ["--num_steps", "3"], ["--eta", "0.5"]
    for change in changes:
        capsys.readouterr()
        assert other_flags in error_line(capsys, evaluate.main, *flags, *change)
        assert file.read_bytes() == kept
    with np.load(file, allow_pickle=False) as content:
        about, levels = content["about"], content["samples"]
    wrong = {
        "cut short": lambda: file.write_bytes(kept[:100]),
        "no archive": lambda: file.write_bytes(b"samples"),
        "a pickled object": lambda: np.savez(file, samples=np.array([{}]), about=about),
        "no settings": lambda: np.savez(file, samples=levels),
        "settings that are no JSON": lambda: np.savez(file, samples=levels, about=np.array("{")),
        "another shape": lambda: np.savez(file, samples=levels[:, :, :8], about=about),
        "another type": lambda: np.savez(file, samples=levels.astype(float), about=about),
        "half a batch": lambda: np.savez(file, samples=levels[:66], about=about),
        "too many": lambda: np.savez(file, samples=levels.repeat(2, 0), about=about),
    }
    for name, damage in wrong.items():
        damage()
        error = error_line(capsys, evaluate.main, *flags)
        assert "samples.npz is damaged" in error, name
        assert "remove it" in error, name
