"""The commands in the READMEs of lesson 6 and of lesson 5 with conditions, as a user runs them."""

import re
import runpy
import shlex
import subprocess
import sys

import pytest
from helpers import ROOT

READMES = ("lesson_05/class_conditional", "lesson_05/text_to_image", "lesson_06")
TINY = {
    "train_mnist.py": "--dataset digits --network.channels 8 --network.multipliers [1,2] "
    "--network.num_groups 4 --network.attention_resolutions [14] --num_timesteps 60 "
    "--num_training_steps 2 --batch_size 4 --num_previews 2 --num_samples 1",
    "sample_mnist.py": "--num_samples 4",
    "sample_ddim.py": "--num_samples 4 --num_steps 5",
    "laboratory.py": "--dataset digits --num_samples 2 --steps 3",
    "break_it.py": "--num_samples 2 --num_steps 3 --model_checkpoint shipped",
    "health.py": "--dataset digits --num_images 8",
    "geometry.py": "--scales 2",
}
PICTURE = {
    "sample_ddim.py": "unconditional.png",
    "laboratory.py": "{figure}.png",
    "break_it.py": "broken_*.png",
    "health.py": "health.md",
    "geometry.py": "guidance.svg",
}


def commands() -> list[tuple[str, str, bool]]:
    """The folder and line of every command in the READMEs, and whether it is its script's first."""
    result: list[tuple[str, str, bool]] = []
    for folder in READMES:
        text = (ROOT / folder / "README.md").read_text()
        for line in re.findall(r"^python \S+\.py.*$", text, re.MULTILINE):
            earlier = {(f, other.split()[1]) for f, other, _ in result}
            result.append((folder, line.split("#")[0], (folder, line.split()[1]) not in earlier))
    return result


@pytest.mark.parametrize(("folder", "line", "first"), commands())
def test_every_command_of_the_readmes_runs(
    folder, line, first, checkpoints, tmp_path, monkeypatch, capsys
):
    """In its folder; the first of each script in a separate process."""
    words = shlex.split(line)[1:]
    lesson = {"lesson_06": "lesson_05.text_to_image"}.get(folder, folder.replace("/", "."))
    words += [*TINY[words[0]].split(), "--device", "cpu", "--output_dir", str(tmp_path)]
    if "--model_checkpoint" in words:
        words[words.index("--model_checkpoint") + 1] = checkpoints[lesson]
    elif words[0] in ("sample_mnist.py", "health.py"):
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
