"""Redraw every picture in the lessons' READMEs, from the shipped checkpoints.

    python -m benchmarks.quality.figures                        # all: the same as `make figures`
    python -m benchmarks.quality.figures --lessons lesson_09    # those of one lesson

The pictures go into figures/ beside each README. made_from.txt there holds the checksum of the
checkpoint that they were made from. A test compares it with the shipped checkpoint.
"""

import importlib
import shlex
import shutil
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from common import cli
from common.data import load_images
from common.errors import UserError
from common.files import ROOT, file_sha256

import torch


class Recipe(NamedTuple):
    """A command, which is a module with its flags or a function in MORE with its argument; and
    which of its output files become which pictures."""

    command: str
    files: dict[str, str]


def names(text: str) -> dict[str, str]:
    return {name: name for name in text.split()}


EIGHT_PROMPTS = "--prompts 0 1 2 3 4 5 6 7"
# For each lesson, its checkpoint and the recipes of its pictures.
RECIPES: dict[str, tuple[str, list[Recipe]]] = {
    "lesson_02": (
        "lesson_02/pretrained/mnist.safetensors",
        [
            Recipe("lesson_02.drawings", names("chain.svg network.svg")),
            Recipe("lesson_02.sample_mnist", names("samples.png reverse.png")),
            Recipe("lesson_02.sample_mnist --inpaint left --dataset mnist", names("inpainted.png")),
            Recipe("lesson_02.sample_mnist --denoise 0.5 --dataset mnist", names("denoised.png")),
            Recipe("lesson_02.swiss_roll", names("swiss_roll.png")),
            Recipe("bound lesson_02", names("bound.png")),
            Recipe(
                "lesson_02.break_it --num_images 16",
                names("broken_no_noise.png broken_fixed_variance.png broken_late_evidence.png"),
            ),
        ],
    ),
    "lesson_05": (
        "lesson_05/pretrained/mnist.safetensors",
        [
            Recipe("lesson_05.sample_mnist", names("samples.png reverse.png")),
            Recipe("forward lesson_05", names("forward.png")),
            Recipe("losses lesson_05", names("losses.png")),
            Recipe(
                "lesson_05.interpolate --dataset mnist --first 3 --second 7",
                names("interpolation.png"),
            ),
            Recipe("lesson_05.drawings", names("chain.svg unet.svg")),
            Recipe("lesson_05.toy", names("toy.png")),
            Recipe("lesson_05.which_t --metrics false --dataset mnist", names("which_t.png")),
            Recipe(
                "lesson_05.break_it --what no_noise noise_at_1 no_clipping no_ema",
                names(
                    "broken_no_noise.png broken_noise_at_1.png broken_no_clipping.png "
                    "broken_no_ema.png"
                ),
            ),
        ],
    ),
    "lesson_05/class_conditional": (
        "lesson_05/class_conditional/pretrained/mnist.safetensors",
        [
            Recipe("lesson_05.class_conditional.sample_mnist", names("samples.png")),
            Recipe("lesson_05.class_conditional.geometry", names("guidance.svg")),
            Recipe(
                "lesson_05.class_conditional.break_it",
                names("broken_too_insistent.png broken_never_dropped.png broken_no_difference.png"),
            ),
        ],
    ),
    "lesson_05/text_to_image": (
        "lesson_06/pretrained/text_to_image.safetensors",
        [
            Recipe(
                "lesson_05.text_to_image.break_it",
                names("broken_no_mask.png broken_wrong_null.png broken_too_insistent.png"),
            )
        ],
    ),
    "lesson_06": (
        "lesson_06/pretrained/text_to_image.safetensors",
        [
            Recipe("lesson_06.sample_ddim", names("conditional.png prompts.txt unconditional.png")),
            Recipe(
                f"lesson_06.laboratory --figure eta --steps 10 50 {EIGHT_PROMPTS}", names("eta.png")
            ),
            Recipe("lesson_06.drawings", names("graphs.svg")),
            Recipe(
                f"lesson_06.laboratory --figure consistency {EIGHT_PROMPTS}",
                names("consistency.png"),
            ),
            Recipe(
                "lesson_06.laboratory --figure interpolation --num_samples 4",
                names("interpolation.png"),
            ),
            Recipe(
                "lesson_06.laboratory --figure reconstruction --dataset mnist",
                names("reconstruction.png"),
            ),
            Recipe(
                "lesson_06.break_it",
                names("broken_dropout_on.png broken_number_for_time.png broken_straight_line.png"),
            ),
        ],
    ),
    "lesson_09": (
        "lesson_09/pretrained/mnist.safetensors",
        [
            Recipe("lesson_09.sample_mnist --num_steps 50", {"samples.png": "samples_50.png"}),
            Recipe("lesson_09.sample_mnist", {"samples.png": "samples_1000.png"}),
            Recipe("forward lesson_09", names("forward.png")),
            Recipe(
                "lesson_09.evaluate --num_images 100 --precision auto",
                names("terms.png variance_ratio.png schedules.png"),
            ),
            Recipe(
                "lesson_09.variance --num_samples 0 --steps 10",
                names("learned_variance.png variances.png"),
            ),
            Recipe("lesson_09.drawings", names("gradients.svg")),
            Recipe(
                "lesson_09.break_it",
                names(
                    "broken_raw_log_variance.png broken_no_clipping.png "
                    "broken_number_for_time.png broken_lambda_over_T.png"
                ),
            ),
        ],
    ),
}


def main(lessons: list[str] | None = None) -> None:
    """Redraw the pictures of the READMEs.

    Args:
        lessons: folders of lessons; all unless given.
    """
    for lesson in lessons or list(RECIPES):
        if lesson not in RECIPES:
            raise UserError(f"{lesson} has no pictures: choose from {', '.join(RECIPES)}")
        start = time.perf_counter()
        make(lesson, ROOT / lesson / "figures")
        print(f"{lesson}/figures: {time.perf_counter() - start:.0f} s", flush=True)


def make(lesson: str, folder: Path) -> None:
    """The pictures of one lesson, and made_from.txt."""
    folder.mkdir(exist_ok=True)
    source, recipes = RECIPES[lesson]
    for recipe in recipes:
        with tempfile.TemporaryDirectory() as temporary:
            run(recipe.command, Path(temporary))
            for file, name in recipe.files.items():
                shutil.copyfile(Path(temporary) / file, folder / name)
    (folder / "made_from.txt").write_text(made_from(source))


def made_from(source: str) -> str:
    return f"{file_sha256(ROOT / source)}  {source}\n"


def run(command: str, folder: Path) -> None:
    name, *words = shlex.split(command)
    if name in MORE:
        MORE[name](folder, *words)
    else:
        main = importlib.import_module(name).main
        cli.run(main, [*words, "--output_dir", str(folder)])


def forward(folder: Path, lesson: str) -> None:
    """Digits becoming noise."""
    sample_mnist = importlib.import_module(f"{lesson}.sample_mnist")
    process, *_ = sample_mnist.load(sample_mnist.SHIPPED)
    torch.manual_seed(0)
    sample_mnist.save_forward(folder / "forward.png", process, load_images("mnist").test[:4])


def losses(folder: Path, lesson: str) -> None:
    """The curves of the run that made the checkpoint, whose metrics.csv is beside it."""
    shutil.copyfile(ROOT / lesson / "pretrained" / "metrics.csv", folder / "metrics.csv")
    importlib.import_module(f"{lesson}.train_mnist").save_losses(folder)


def bound(folder: Path, lesson: str) -> None:
    """The bound during the run that made the checkpoint, from the metrics.csv beside it."""
    shutil.copyfile(ROOT / lesson / "pretrained" / "metrics.csv", folder / "metrics.csv")
    sample_mnist = importlib.import_module(f"{lesson}.sample_mnist")
    process, *_ = sample_mnist.load(sample_mnist.SHIPPED)
    save_bound = importlib.import_module(f"{lesson}.train_mnist").save_bound
    save_bound(folder, process.ceiling().item())


MORE = {"bound": bound, "forward": forward, "losses": losses}


if __name__ == "__main__":
    cli.run(main)
