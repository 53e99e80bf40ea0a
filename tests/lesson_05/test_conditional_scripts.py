"""The scripts of lesson 5 with labels and prompts."""

from pathlib import Path
from typing import Any

from common.errors import UserError
from common.options import SamplingOptions
from lesson_05.class_conditional import sample_mnist as sample_labels
from lesson_05.class_conditional import train_mnist as train_labels
from lesson_05.options import ConditionalOptions, TextToImageOptions
from lesson_05.text_to_image import sample_mnist as sample_prompts
from lesson_05.text_to_image import train_mnist as train_prompts

import pytest
from helpers import NETWORK, TINY_RUN
from small_networks import TEXT, save_small_checkpoint

PICTURES = {"samples.png", "reverse.gif", "forward.png", "losses.png", "samples_000003.png"}


def tiny(folder: Path, **changes: Any) -> dict[str, Any]:
    """The options of a tiny training run."""
    steps = {"num_timesteps": 30, "num_training_steps": 3, "num_warmup_steps": 2}
    return {**TINY_RUN, "output_dir": str(folder), **steps, **changes}


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_class_conditional_trains_and_samples(tmp_path):
    train_labels.main(ConditionalOptions(**tiny(tmp_path / "run")), NETWORK)
    assert names(tmp_path / "run") >= PICTURES | {"labels.txt"}
    file, out = str(tmp_path / "run" / "checkpoint_000003.safetensors"), tmp_path / "out"
    options = SamplingOptions(
        model_checkpoint=file, num_samples=10, output_dir=str(out), device="cpu", save_npz=True
    )
    sample_labels.main(labels=[3, 1, 4], guidance=2.0, options=options)
    assert (out / "labels.txt").read_text() == "3 1 4 3 1 4 3 1\n4 3\n"
    assert {"samples.png", "samples.npz"} <= names(out)


def test_text_to_image_trains_and_samples(tmp_path):
    train_prompts.main(TextToImageOptions(**tiny(tmp_path / "run")), NETWORK, TEXT)
    assert names(tmp_path / "run") >= PICTURES | {"prompts.txt"}
    file, out = str(tmp_path / "run" / "checkpoint_000003.safetensors"), tmp_path / "out"
    options = SamplingOptions(
        model_checkpoint=file, num_samples=9, output_dir=str(out), device="cpu"
    )
    sample_prompts.main(prompts=["seven", "a handwritten 3"], guidance=2.0, options=options)
    rows = (out / "prompts.txt").read_text().splitlines()
    assert len(rows) == 2
    assert rows[0].split()[:4] == ["seven", "a", "handwritten", "3"]
    assert rows[1] == "seven"
    sample_prompts.main(options=options)  # random prompts
    assert (out / "prompts.txt").read_text().splitlines() != rows


@pytest.mark.parametrize(
    ("script", "lesson", "condition", "message"),
    [
        (sample_labels, "lesson_05.class_conditional", {"labels": [10]}, "label 10"),
        (sample_labels, "lesson_05.class_conditional", {"labels": [-1]}, "label -1"),
        (sample_labels, "lesson_05.class_conditional", {"labels": []}, "0 labels"),
        (sample_labels, "lesson_05.class_conditional", {"labels": [1] * 11}, "11 labels"),
        (sample_labels, "lesson_05.class_conditional", {"guidance": -1.0}, "guidance is -1"),
        (sample_prompts, "lesson_05.text_to_image", {"prompts": []}, "0 prompts"),
        (sample_prompts, "lesson_05.text_to_image", {"prompts": [""]}, "prompt '' has 0 bytes"),
        (sample_prompts, "lesson_05.text_to_image", {"prompts": ["3"] * 11}, "11 prompts"),
        (sample_prompts, "lesson_05.text_to_image", {"guidance": -1.0}, "guidance is -1"),
    ],
)
def test_impossible_conditions_are_refused_before_anything_is_written(
    script, lesson, condition, message, tmp_path
):
    options = SamplingOptions(
        model_checkpoint=save_small_checkpoint(tmp_path, lesson),
        num_samples=10,
        output_dir=str(tmp_path / "out"),
        device="cpu",
    )
    with pytest.raises(UserError, match=message):
        script.main(**condition, options=options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("num_samples", [3, 12])
def test_all_labels_are_drawn_in_turn_unless_some_are_given(num_samples, tmp_path):
    options = SamplingOptions(
        model_checkpoint=save_small_checkpoint(tmp_path, "lesson_05.class_conditional"),
        num_samples=num_samples,
        output_dir=str(tmp_path),
        device="cpu",
    )
    sample_labels.main(options=options)
    drawn = (tmp_path / "labels.txt").read_text().split()
    assert drawn == [str(k % 10) for k in range(num_samples)]
