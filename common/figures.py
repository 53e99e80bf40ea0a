"""Every picture that the READMEs show, made anew from the checkpoints that come with them.

    python -m common.figures                        # all: the same as `make figures`
    python -m common.figures --lessons lesson_09    # those of one lesson

The pictures go into figures/ beside the README. made_from.txt there says which checkpoint they were
made from, by its sum: a test compares, and so a new checkpoint asks for new pictures.
"""

import hashlib
import importlib
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from common import mnist
from common.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


class Recipe(NamedTuple):
    """A function of a lesson that writes into a folder, its arguments, and which files to keep:
    those of `files`, under the names that stand there."""

    function: str
    arguments: dict[str, Any]
    files: dict[str, str]


def named(*names: str) -> dict[str, str]:
    return {name: name for name in names}


LABORATORY: dict[str, dict[str, Any]] = {
    "eta": {"steps": [10, 50], "prompts": list("01234567")},
    "consistency": {"prompts": list("01234567")},
    "interpolation": {"num_samples": 4},
    "reconstruction": {"dataset": "mnist"},
}

# By lesson: the checkpoint, and what is made from it.
RECIPES: dict[str, tuple[str, list[Recipe]]] = {
    "lesson_02": (
        "lesson_02/pretrained/mnist.pt",
        [
            Recipe("lesson_02.sample_mnist.main", {}, named("samples.png", "reverse.png")),
            Recipe(
                "lesson_02.sample_mnist.main",
                {"inpaint": "left", "dataset": "mnist"},
                named("inpainted.png"),
            ),
            Recipe(
                "lesson_02.sample_mnist.main",
                {"denoise": 0.5, "dataset": "mnist"},
                named("denoised.png"),
            ),
            Recipe("lesson_02.swiss_roll.main", {}, named("swiss_roll.png")),
            Recipe("bound", {"lesson": "lesson_02"}, named("bound.png")),
            Recipe(
                "lesson_02.break_it.main",
                {},
                named(
                    "broken_no_noise.png", "broken_fixed_variance.png", "broken_late_evidence.png"
                ),
            ),
        ],
    ),
    "lesson_05": (
        "lesson_05/pretrained/mnist.pt",
        [
            Recipe("lesson_05.sample_mnist.main", {}, named("samples.png", "reverse.png")),
            Recipe("forward", {"lesson": "lesson_05"}, named("forward.png")),
            Recipe("losses", {"lesson": "lesson_05"}, named("losses.png")),
            Recipe(
                "lesson_05.interpolate.main",
                {"dataset": "mnist", "first": 3, "second": 7},
                named("interpolation.png"),
            ),
            Recipe(
                "lesson_05.break_it.main",
                {"what": ["noise_at_1", "no_clipping", "no_ema"]},
                named("broken_noise_at_1.png", "broken_no_clipping.png", "broken_no_ema.png"),
            ),
        ],
    ),
    "lesson_05/class_conditional": (
        "lesson_05/class_conditional/pretrained/mnist.pt",
        [
            Recipe("lesson_05.class_conditional.sample_mnist.main", {}, named("samples.png")),
            Recipe(
                "lesson_05.class_conditional.break_it.main",
                {},
                named(
                    "broken_too_insistent.png",
                    "broken_never_dropped.png",
                    "broken_no_difference.png",
                ),
            ),
        ],
    ),
    "lesson_05/text_to_image": (
        "lesson_06/pretrained/text_to_image.pt",
        [
            Recipe(
                "lesson_05.text_to_image.break_it.main",
                {},
                named("broken_no_mask.png", "broken_wrong_null.png", "broken_too_insistent.png"),
            )
        ],
    ),
    "lesson_06": (
        "lesson_06/pretrained/text_to_image.pt",
        [
            Recipe(
                "lesson_06.sample_ddim.main",
                {},
                named("conditional.png", "prompts.txt", "unconditional.png"),
            ),
            *(
                Recipe("lesson_06.laboratory.main", {"figure": name, **more}, named(f"{name}.png"))
                for name, more in LABORATORY.items()
            ),
            Recipe(
                "lesson_06.break_it.main",
                {},
                named(
                    "broken_dropout_on.png",
                    "broken_number_for_time.png",
                    "broken_straight_line.png",
                ),
            ),
        ],
    ),
    "lesson_09": (
        "lesson_09/pretrained/mnist.pt",
        [
            Recipe(
                "lesson_09.sample_mnist.main", {"num_steps": 50}, {"samples.png": "samples_50.png"}
            ),
            Recipe(
                "lesson_09.sample_mnist.main",
                {},
                {"samples.png": "samples_1000.png"},
            ),
            Recipe("forward", {"lesson": "lesson_09"}, named("forward.png")),
            Recipe(
                "lesson_09.evaluate.main",
                {"num_images": 100, "precision": "auto"},
                named("terms.png", "variance_ratio.png", "schedules.png"),
            ),
            Recipe(
                "lesson_09.break_it.main",
                {},
                named(
                    "broken_raw_log_variance.png",
                    "broken_no_clipping.png",
                    "broken_number_for_time.png",
                    "broken_lambda_over_T.png",
                ),
            ),
        ],
    ),
}


def main(lessons: list[str] | None = None) -> None:
    """Make the pictures of the READMEs anew.

    Args:
        lessons: whose; of all unless given.
    """
    for lesson in lessons or list(RECIPES):
        if lesson not in RECIPES:
            raise UserError(f"{lesson} has no pictures: take some of {', '.join(RECIPES)}")
        began = time.perf_counter()
        make(lesson, ROOT / lesson / "figures")
        print(f"{lesson}/figures: {time.perf_counter() - began:.0f} s", flush=True)


def make(lesson: str, folder: Path) -> None:
    """The pictures of one lesson, and what they were made from."""
    folder.mkdir(exist_ok=True)
    source, recipes = RECIPES[lesson]
    for recipe in recipes:
        with tempfile.TemporaryDirectory() as place:
            call(recipe, place)
            for file, name in recipe.files.items():
                shutil.copyfile(Path(place) / file, folder / name)
    (folder / "made_from.txt").write_text(f"{sha256(source)}  {source}\n")


def call(recipe: Recipe, folder: str) -> None:
    if recipe.function in OWN:
        torch.manual_seed(0)
        OWN[recipe.function](Path(folder), **recipe.arguments)
        return
    module, _, name = recipe.function.rpartition(".")
    getattr(importlib.import_module(module), name)(output_dir=folder, **recipe.arguments)


def sha256(source: str) -> str:
    return hashlib.sha256((ROOT / source).read_bytes()).hexdigest()


def forward(folder: Path, lesson: str) -> None:
    """Digits on their way to noise."""
    scripts = importlib.import_module(f"{lesson}.sample_mnist")
    process, *_ = scripts.load(scripts.SHIPPED)
    scripts.save_forward(folder / "forward.png", process, mnist.load("mnist").test[:4])


def losses(folder: Path, lesson: str) -> None:
    """The curves of the run that made the checkpoint, whose metrics.csv lies beside it."""
    shutil.copyfile(ROOT / lesson / "pretrained" / "metrics.csv", folder / "metrics.csv")
    importlib.import_module(f"{lesson}.train_mnist").save_losses(folder)


def bound(folder: Path, lesson: str) -> None:
    """The bound in the run that made the checkpoint, from the metrics.csv beside it."""
    shutil.copyfile(ROOT / lesson / "pretrained" / "metrics.csv", folder / "metrics.csv")
    scripts = importlib.import_module(f"{lesson}.sample_mnist")
    process, *_ = scripts.load(scripts.SHIPPED)
    save_bound = importlib.import_module(f"{lesson}.train_mnist").save_bound
    save_bound(folder, process.ceiling(1).item())


OWN = {"bound": bound, "forward": forward, "losses": losses}


if __name__ == "__main__":
    from common import cli

    cli.run(main)
