"""Lesson 9's ablation: its presets, its table, and the distance of samples."""

from pathlib import Path

from common import cli
from common.data import load_images
from lesson_09 import ablation, quality, train_mnist

import pytest
import torch
import yaml
from helpers import NETWORK, ROOT, error_line
from torch import Tensor

CONFIGS = ROOT / "lesson_09" / "configs"


def preset(name: str) -> dict:
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())


def test_rows_differ_from_the_baseline_only_by_their_factors():
    presets = {row: preset(f"ablation/{row}") for row in ablation.ROWS}
    assert {path.stem for path in (CONFIGS / "ablation").glob("*.yaml")} == set(ablation.ROWS)
    fixed = {"variance": "beta", "vlb_weight": 0.0}
    likelihood = {"simple_weight": 0.0, "vlb_weight": 1.0}
    linear = {"schedule": "linear"}
    plain = {"network": presets["cosine_hybrid"]["network"] | {"scale_shift_norm": False}}
    for row, factors in {
        "linear_simple": fixed | linear,
        "cosine_simple": fixed,
        "linear_hybrid": linear,
        "cosine_hybrid": {},
        "cosine_vlb": likelihood,
        "cosine_vlb_loss_aware": likelihood | {"timestep_sampler": "loss_aware"},
        "cosine_hybrid_no_scale_shift": plain,
        "linear_simple_4000": fixed | linear | {"num_timesteps": 4000},
    }.items():
        assert presets[row] == presets["cosine_hybrid"] | factors, row
    laptop, vlb = preset("laptop"), preset("vlb")
    assert laptop["network"] == vlb["network"] == presets["cosine_hybrid"]["network"]
    factors = likelihood | {"timestep_sampler": "loss_aware"}
    assert {key: vlb[key] for key in factors} == factors


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """The command line of a tiny ablation of two rows, into the folder out."""
    tiny = {"num_training_steps": 4, "batch_size": 4, "num_timesteps": 60, "num_steps": 2}
    tiny |= {"num_samples": 1, "num_previews": 1, "checkpoint_every": 2}
    tiny["network"] = NETWORK | {"multipliers": [1, 1, 2], "attention_resolutions": [7]}
    rows = ["linear_simple", "cosine_vlb_loss_aware"]
    for row in rows:
        text = yaml.safe_dump(preset(f"ablation/{row}") | tiny)
        (tmp_path / f"{row}.yaml").write_text(text)
    flags = "--dataset digits --num_images 20 --num_terms 3 --device cpu --steps 4 2 --samples 3 5"
    flags += " --num_classifier_steps 5"
    words = [*flags.split(), "--rows", *rows, "--presets", str(tmp_path)]
    return [*words, "--output_dir", str(tmp_path / "out")]


def test_ablation_writes_a_table_and_resumes_where_it_stopped(words, tmp_path, monkeypatch, capsys):
    resumed: list[bool] = []  # one for each training run
    run = cli.run

    def counted(main, words, **rest):
        if main is train_mnist.main:
            resumed.append("--resume" in words)
        run(main, words, **rest)

    monkeypatch.setattr(cli, "run", counted)
    cli.run(ablation.main, words)
    table = (tmp_path / "out" / "table.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    names = [row.split("|")[1].strip() for row in rows]
    assert names == ["row", "linear_simple", "cosine_vlb_loss_aware"]
    assert all(row.count("±") == 3 for row in rows[1:])
    assert "3 in 4 steps, 5 in 2 steps" in table
    assert resumed == [False, False]
    # The second row, made to look interrupted, is resumed. The first is not trained again.
    out = tmp_path / "out" / "cosine_vlb_loss_aware"
    (out / "checkpoint_000004.safetensors").unlink()
    (out / "result.json").unlink()
    cli.run(ablation.main, words)
    assert resumed == [False, False, True]
    assert (tmp_path / "out" / "table.md").read_text() == table


def test_a_row_without_a_preset_is_refused(capsys):
    line = error_line(capsys, ablation.main, "--rows", "nothing")
    assert "row nothing has no preset" in line


def test_kernel_distance_is_unbiased():
    y = torch.randn(60, 3).double()
    values = [quality.kernel_distance(torch.randn(6, 3).double(), y)[0] for _ in range(300)]
    # The mean differs from 0 since y is one fixed draw; the terms i = j would add a larger bias.
    assert abs(sum(values) / 300) < 0.3
    far, error = quality.kernel_distance(torch.randn(200, 3).double() + 1, y)
    assert far > 5 * error > 0


def test_kernel_distance_equals_the_sums_written_out():
    x, y = torch.randn(6, 3).double(), torch.randn(60, 3).double()
    centre, deviation = y.mean(0), y.std(0) + 1e-3 * y.std()
    a, b = (x - centre) / deviation, (y - centre) / deviation

    def kernel(one: Tensor, other: Tensor) -> float:
        return ((one @ other).item() / 3 + 1) ** 3

    expected = sum(kernel(a[i], a[j]) for i in range(6) for j in range(6) if i != j) / 30
    expected += sum(kernel(b[i], b[j]) for i in range(60) for j in range(60) if i != j) / (60 * 59)
    expected -= 2 * sum(kernel(one, other) for one in a for other in b) / 360
    assert quality.kernel_distance(x, y)[0] == pytest.approx(expected)


def test_the_distance_separates_real_images_from_noisy_ones():
    data = load_images("digits")
    judge = ablation.Judge(data, 60, torch.device("cpu"))
    real, error = judge.floor()
    assert abs(real) < 5 * error
    images = data.test[:64].float() / 127.5 - 1
    noisy, error = judge.distance(images + 0.5 * torch.randn_like(images))
    assert noisy > 5 * error
    assert judge.accuracy > 0.5
