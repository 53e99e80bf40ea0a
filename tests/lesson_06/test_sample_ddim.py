"""The script sample_ddim.py, on good and on bad input."""

from pathlib import Path

from common import cli
from lesson_06 import sample_ddim

import numpy as np
import pytest
from helpers import error_line
from PIL import Image
from server import Server

FLAGS = ["--num_steps", "4", "--device", "cpu", "--precision", "float32", "--save_npz", "true"]


def sample(folder: Path, *words: str) -> dict[str, np.ndarray]:
    """Run the script; the arrays that it writes, by name."""
    cli.run(sample_ddim.main, [*FLAGS, "--output_dir", str(folder), *words])
    return {file.stem: np.load(file)["samples"] for file in folder.glob("*.npz")}


def error(capsys: pytest.CaptureFixture, folder: Path, *words: str) -> str:
    """The line that the script ends with, having drawn nothing."""
    capsys.readouterr()
    line = error_line(capsys, sample_ddim.main, *FLAGS, "--output_dir", folder, *words)
    assert not any(folder.glob("*.npz"))
    return line


def test_the_script_writes_grids_prompts_arrays_and_the_steps(checkpoints, tmp_path, capsys):
    words = ["--model_checkpoint", checkpoints["lesson_05.text_to_image"], "--num_samples", "9"]
    words += ["--prompts", "seven", "a handwritten 3", "--show_timesteps", "true"]
    arrays = sample(tmp_path, *words)
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


def test_the_same_seed_gives_the_same_images_bit_for_bit(checkpoints, tmp_path):
    """This network has a dropout of 0.5: were it active, no two runs would agree."""
    words = ["--model_checkpoint", checkpoints["lesson_05.text_to_image"], "--num_samples", "2"]
    one, two = (sample(tmp_path / name, *words) for name in "ab")
    other = sample(tmp_path / "c", *words, "--seed", "1")
    for name in ("conditional", "unconditional"):
        assert np.array_equal(one[name], two[name])
        assert not np.array_equal(one[name], other[name])
    with_noise = sample(tmp_path / "d", *words, "--eta", "1")
    assert not np.array_equal(one["conditional"], with_noise["conditional"])
    null = sample(tmp_path / "e", *words, "--guidance", "0")
    assert np.array_equal(null["conditional"], one["unconditional"])
    alone = sample(tmp_path / "f", *words, "--unconditional", "false")
    assert list(alone) == ["conditional"]
    assert np.array_equal(alone["conditional"], one["conditional"])


@pytest.mark.parametrize("lesson", ["lesson_05", "lesson_09"])
def test_unconditional_checkpoints_are_sampled_and_take_no_prompts(
    lesson, checkpoints, tmp_path, capsys
):
    words = ["--model_checkpoint", checkpoints[lesson], "--num_samples", "2"]
    arrays = sample(tmp_path, *words)
    assert {name: array.shape for name, array in arrays.items()} == {
        "unconditional": (2, 1, 28, 28)
    }
    assert not (tmp_path / "prompts.txt").exists()
    line = error(capsys, tmp_path / "no", *words, "--prompts", "seven", "3")
    assert f"{lesson}.safetensors ({lesson}) takes no prompts" in line
    assert "takes no prompts" in error(capsys, tmp_path / "no", *words, "--guidance", "2")
    assert "nothing to draw" in error(capsys, tmp_path / "no", *words, "--unconditional", "false")


def test_prompts_for_a_class_conditional_checkpoint_are_labels(checkpoints, tmp_path, capsys):
    file = checkpoints["lesson_05.class_conditional"]
    words = ["--model_checkpoint", file, "--num_samples", "3"]
    sample(tmp_path, *words, "--prompts", "3", "1")
    assert (tmp_path / "prompts.txt").read_text().split() == ["3", "1", "3"]
    sample(tmp_path, *words)
    assert (tmp_path / "prompts.txt").read_text().split() == ["0", "1", "2"]
    for prompt in ("seven", "10", "-1"):
        line = error(capsys, tmp_path / "no", *words, f"--prompts=[{prompt!r}]")
        assert "is not known: choose from 0, 1, 2, 3, 4, 5, 6, 7, 8, 9" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_steps", "0"], "num_steps is 0: choose 1 to 60"),
        (["--num_steps", "-1"], "num_steps is -1: choose 1 to 60"),
        (["--num_steps", "61"], "num_steps is 61: choose 1 to 60"),
        (["--eta", "-1"], "eta is -1.0"),
        (["--eta", "2"], "eta is 2.0"),
        (["--spacing", "linear"], "spacing"),
        (["--prompts", "3", ""], "prompt '' has 0 bytes"),
        (["--prompts=[]"], "0 prompts for 2 samples: give 1 to 2 of them"),
        (["--prompts", "1", "2", "3"], "3 prompts for 2 samples: give 1 to 2 of them"),
        (["--guidance", "-1"], "guidance is -1.0"),
        (["--num_samples", "0"], "num_samples is 0"),
        (["--device", "abacus"], "device 'abacus'"),
        (["--model_checkpoint", "missing.safetensors"], "missing.safetensors cannot be read"),
        (["--sha256", "0" * 64], "sha256"),
        (["--no_such_flag", "1"], "no_such_flag"),
    ],
)
def test_bad_input_is_one_clear_line(words, message, checkpoints, tmp_path, capsys):
    file = checkpoints["lesson_05.text_to_image"]
    flags = ["--model_checkpoint", file, "--num_samples", "2", *words]
    assert message in error(capsys, tmp_path / "out", *flags)


def test_a_checkpoint_from_an_address(address, checkpoints, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    content = Path(checkpoints["lesson_05"]).read_bytes()
    monkeypatch.setattr(Server, "files", {"model.safetensors": content})
    words = ["--num_samples", "1", "--model_checkpoint"]
    downloaded = sample(tmp_path / "there", *words, f"{address}/model.safetensors")
    local = sample(tmp_path / "here", *words, checkpoints["lesson_05"])
    assert np.array_equal(downloaded["unconditional"], local["unconditional"])
