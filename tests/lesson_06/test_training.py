"""Lesson 6's training is lesson 5's: only the pictures are drawn by another sampler."""

from pathlib import Path
from typing import Any

from common import checkpoint
from common.errors import UserError
from lesson_05.options import TextToImageOptions
from lesson_05.text_to_image import train_mnist as lesson_5
from lesson_06 import train_mnist as lesson_6

import pytest
from helpers import NETWORK, TINY_RUN, same
from small_networks import TEXT


def train(lesson: Any, folder: Path, steps: int, **changes: Any) -> dict[str, Any]:
    """The averaged weights after a tiny run of that lesson."""
    counts = {"num_timesteps": 30, "num_training_steps": steps, "num_warmup_steps": 2}
    options = {**TINY_RUN, "output_dir": str(folder), **counts, "num_samples": 0, **changes}
    make = lesson_6.Options if lesson is lesson_6 else TextToImageOptions
    lesson.main(make(**options), NETWORK, TEXT)
    content = checkpoint.load(str(folder / f"checkpoint_{steps:06d}.safetensors"))
    return {name: value for name, value in content.tensors.items() if name.startswith("ema.")}


def test_the_training_is_that_of_lesson_5_to_the_bit(tmp_path):
    """A run of either lesson can be resumed by the other."""
    of_lesson_5 = train(lesson_5, tmp_path / "five", 4)
    of_lesson_6 = train(lesson_6, tmp_path / "six", 4, num_steps=3, num_samples=2)
    assert same(of_lesson_5, of_lesson_6)
    pictures = {"samples.png", "samples_000004.png", "reverse.gif", "prompts.txt", "losses.png"}
    assert pictures <= {file.name for file in (tmp_path / "six").iterdir()}
    half = train(lesson_6, tmp_path / "half", 2, num_steps=3)
    assert not same(half, of_lesson_6)
    assert same(train(lesson_5, tmp_path / "half", 4, resume="latest"), of_lesson_6)


@pytest.mark.parametrize(
    ("lesson", "change", "message"),
    [
        (lesson_6, {"num_steps": 31}, "num_steps is 31"),
        (lesson_6, {"num_samples": -1, "num_steps": 3}, "num_samples is -1"),
        (lesson_5, {"num_samples": -1}, "num_samples is -1"),
        (lesson_5, {"learning_rate": 0.0}, "learning_rate is 0.0"),
    ],
)
def test_impossible_options_are_refused_before_the_training(lesson, change, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train(lesson, tmp_path / "run", 2, **change)
    assert not (tmp_path / "run").exists()


def test_files_go_to_the_folder_of_lesson_6():
    folder = Path(lesson_6.__file__).parent / "output"
    assert lesson_6.Options().output_dir == str(folder)
    assert lesson_6.Options(output_dir="elsewhere").output_dir == "elsewhere"
    assert TextToImageOptions().output_dir is None
