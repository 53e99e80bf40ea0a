"""The figures of the paper that laboratory.py makes."""

from pathlib import Path

from common import cli
from lesson_06 import laboratory
from lesson_06.laboratory import Laboratory
from lesson_06.sample_ddim import SamplePlan

import pytest
import torch
from helpers import error_line
from PIL import Image
from torch import Tensor
from two_points import TwoPoints

FLAGS = ["--device", "cpu", "--dataset", "digits", "--num_samples", "2", "--steps", "3", "2"]


@pytest.mark.parametrize("figure", ["eta", "consistency", "interpolation", "reconstruction"])
def test_the_laboratory_draws_its_figures(figure, checkpoints, tmp_path, capsys):
    for lesson, words in [
        ("lesson_05.text_to_image", ["--prompts", "seven", "3"]),
        ("lesson_05.text_to_image", ["--etas", "0"]),
        ("lesson_09", ["--spacing", "trailing"]),
    ]:
        flags = ["--output_dir", str(tmp_path), "--model_checkpoint", checkpoints[lesson]]
        cli.run(laboratory.main, ["--figure", figure, *FLAGS, *flags, *words])
        with Image.open(tmp_path / f"{figure}.png") as picture:
            assert min(picture.size) > 100
        (tmp_path / f"{figure}.png").unlink()
    out = capsys.readouterr().out
    assert out.count("reconstruction error") == (6 if figure == "reconstruction" else 0)
    if figure == "consistency":
        assert "S = 3: mean squared distance from S = 3 0.00000" in out


@pytest.fixture
def exact(process) -> Laboratory:
    """A laboratory with an exact network."""
    return Laboratory(process, TwoPoints(process, 0.6, 0.2), SamplePlan(None), "uniform")


def test_the_reconstruction_error_falls_with_the_steps(exact):
    x0 = 0.6 * torch.randn(3, 1, 4, 4).sign()
    rows, errors = laboratory.draw_reconstruction(exact, x0, [100, 10])
    assert list(errors) == [10, 100]
    assert errors[10] > 2 * errors[100] > 0
    expected = ((rows["S = 10"] - x0).square().mean() / 4).item()  # in [0, 1], not [-1, 1]
    assert errors[10] == pytest.approx(expected, rel=0.2)  # not equal, as it clips the images


def test_every_eta_and_S_has_the_same_noise(exact):
    x_T = torch.randn(3, 1, 4, 4)
    rows = laboratory.draw_eta(exact, x_T, [5, 50], [0.0, 1.0])
    assert list(rows)[:3] == ["η = 0, S = 5", "η = 0, S = 50", "η = 1, S = 5"]
    assert len(rows) == 6
    assert torch.equal(rows["η = 0, S = 5"], exact.sample(x_T, 5))


def test_an_interpolation_begins_and_ends_with_the_samples_of_the_two_noises(exact):
    noise = torch.randn(2, 3, 1, 4, 4)
    rows = laboratory.draw_interpolation(exact, *noise, [5])
    assert [row.shape for row in rows.values()] == [(11, 1, 4, 4)] * 3
    ends = torch.stack(list(rows.values()), 1)[[0, 10]]
    for end, x_T in zip(ends, noise, strict=True):
        torch.testing.assert_close(end, exact.sample(x_T, 5), atol=1e-4, rtol=1e-4)


def test_each_noise_has_its_prompt_along_its_whole_row(process):
    class Model:
        def bind(self, condition: Tensor, guidance: float) -> Tensor:
            return guidance * condition

    three = Laboratory(process, Model(), SamplePlan(torch.tensor([0, 1, 2]), 1.0), "uniform")
    assert three.network(6).tolist() == [0, 0, 1, 1, 2, 2]
    assert three.network(3).tolist() == [0, 1, 2]


def test_the_rows_of_each_S_are_named_by_their_distance(exact):
    x_T = torch.randn(3, 1, 4, 4)
    rows = laboratory.draw_consistency(exact, x_T, [20, 5])
    few, many = exact.sample(x_T, 5), exact.sample(x_T, 20)
    distance = laboratory.mean_squared_error(few, many)
    assert list(rows) == [f"S = 5, distance {distance:.4f}", "S = 20, distance 0.0000"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--figure", "eta", "--etas", "3"], "eta is 3.0"),
        (["--figure", "eta", "--steps", "61"], "num_steps is 61"),
        (["--figure", "eta", "--steps=[]"], "steps is empty"),
        (["--figure", "7"], "figure"),
        (["--figure", "consistency", "--num_samples", "0"], "num_samples is 0"),
        (["--figure", "consistency", "--prompts", "a"], "takes no prompts"),
        (["--figure", "reconstruction", "--num_samples", "298"], "298 test images"),
    ],
)
def test_bad_input_is_one_clear_line(words, message, checkpoints, tmp_path, capsys):
    out: Path = tmp_path / "out"
    flags = [*FLAGS, "--model_checkpoint", checkpoints["lesson_05"], "--output_dir", out, *words]
    assert message in error_line(capsys, laboratory.main, *flags)
    assert not out.exists()
