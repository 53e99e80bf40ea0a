"""The evaluation of checkpoints of every lesson, interrupted and resumed, and with bad input."""

import dataclasses
import json
import math
from pathlib import Path

from benchmarks.quality import evaluate
from benchmarks.quality.samples import PlanOptions, SamplePlan
from common import checkpoint, cli
from common.data import to_uint8

import numpy as np
import pytest
import torch
from helpers import error_line

T = 24
FIELDS = {
    *("lesson", "checkpoint_sha256", "training_steps", "parameters", "dataset"),
    *("sampler", "num_steps", "guidance", "num_samples", "seed", "arithmetic", "device"),
    *("fid", "fid_500", "share_sure", "class_balance_bits", "agreement", "precision", "recall"),
    *("nearest_median", "nearest_least", "real", "bits_per_dim", "num_images", "num_terms"),
    *("seconds_per_sample", "reference", "classifier_sha256", "classifier_accuracy", "sure_from"),
    *("commit", "versions", "hardware"),
}
SAMPLERS = [
    ("lesson_02", "ddpm"),
    ("lesson_05", "ddpm"),
    ("lesson_05", "ddim"),
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
    header, figures = capsys.readouterr().out.splitlines()[-3:-1]
    assert header.split()[:3] == ["steps", "samples", "FID"]
    assert figures.split()[2] == f"{result['fid']:.3g}"
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
    fids = {
        name: run(file, tmp_path / name, "--num_steps", "2", *more)["fid"]
        for name, more in flags.items()
    }
    assert fids["plain"] == fids["again"]
    assert len(set(fids.values())) == 3


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
    ("lesson_05", ("--sampler", "strided"), "cannot be sampled by strided"),
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
    for change in (["--seed", "1"], ["--num_samples", "66"], ["--num_steps", "3"]):
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
