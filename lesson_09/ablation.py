"""Ablation: train one network per row, all for the same number of steps, and compare them."""

import contextlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common import cli
from common.checkpoint import read_header, saved
from common.data import Images, from_uint8, load_images, to_uint8
from common.device import autocast, pick_device
from common.errors import UserError, check_at_least
from common.files import make_folder, write_atomically
from common.options import ImageOptions, ScriptOptions
from common.pictures import save_grid
from common.sampling import draw_samples
from lesson_09 import quality, train_mnist
from lesson_09.evaluate import bound, summary
from lesson_09.sample_mnist import load
from lesson_09.unet import UNet

import torch
from torch import Tensor

ROWS = (
    "linear_simple",
    "cosine_simple",
    "linear_hybrid",
    "cosine_hybrid",
    "cosine_vlb",
    "cosine_vlb_loss_aware",
    "cosine_hybrid_no_scale_shift",
    "linear_simple_4000",
)
FOLDER = Path(__file__).parent


def main(
    rows: Sequence[str] = ROWS,
    presets: str = "configs/ablation",
    num_training_steps: int | None = None,
    num_images: int = 1000,
    num_terms: int = 20,
    steps: Sequence[int] = (1000, 100, 50, 25, 10),
    samples: Sequence[int] = (32, 128, 256, 256, 512),
    num_classifier_steps: int = 1000,
    images: ImageOptions = ImageOptions(),
    options: ScriptOptions = ScriptOptions(),
) -> None:
    """Train and measure every row, and write table.md into output/ablation or --output_dir. Started
    again, the script resumes where it stopped.

    Args:
        rows: names of the presets to train.
        presets: folder of the presets, relative to the current folder or to this lesson's.
        num_training_steps: training steps of every row; those of its preset unless given.
        num_images: test images for bits per dimension.
        num_terms: terms of the bound to draw for each image.
        steps: numbers of sampling steps, one column each.
        samples: numbers of samples, one for each of `steps`.
        num_classifier_steps: training steps of the classifier in whose features samples are
            compared.
    """
    files = {row: preset_file(row, presets) for row in rows}
    if len(steps) != len(samples) or min([*steps, *samples]) < 1 or min(samples) < 3:
        raise UserError(
            "steps and samples must be equally long lists: steps from 1 on, samples from 3 on"
        )
    check_at_least(2, num_images=num_images, num_terms=num_terms)
    check_at_least(1, num_classifier_steps=num_classifier_steps)
    if num_training_steps is not None:
        check_at_least(1, num_training_steps=num_training_steps)
    folder = Path(options.output_dir or FOLDER / "output" / "ablation")
    make_folder(folder)
    device = pick_device(options.device)
    shape = images.image_size, images.image_channels
    data = load_images(images.dataset, images.data_dir, *shape)
    judge = Judge(data, num_classifier_steps, device)
    settings: dict[str, Any] = {"num_images": num_images, "num_terms": num_terms}
    settings |= {"steps": list(steps), "samples": list(samples), "seed": options.seed}
    settings |= {"classifier": num_classifier_steps, "dataset": data.name}
    flags = ["--dataset", data.name, "--device", options.device, "--seed", str(options.seed)]
    flags += ["--precision", options.precision]
    flags += ["--data_dir", images.data_dir] if images.data_dir else []
    flags += ["--image_size", *map(str, images.image_size)] if images.image_size else []
    flags += ["--image_channels", str(images.image_channels)] if images.image_channels else []
    results: dict[str, dict[str, Any]] = {}
    for row, file in files.items():
        trained = train(file, folder / row, flags, num_training_steps)
        results[row] = measure(trained, judge, settings, device, options)
        write_table(folder / "table.md", results, settings, judge)
    print((folder / "table.md").read_text())
    print(f"{folder}/table.md; the samples of each row are in its folder")


def preset_file(row: str, presets: str) -> Path:
    for file in (Path(presets) / f"{row}.yaml", FOLDER / presets / f"{row}.yaml"):
        if file.is_file():
            return file
    raise UserError(f"row {row} has no preset {presets}/{row}.yaml: choose from {', '.join(ROWS)}")


def train(preset: Path, folder: Path, flags: list[str], num_steps: int | None) -> Path:
    """Train a row, from its last checkpoint if there is one, and return its final checkpoint."""
    words = [*flags, "--output_dir", str(folder)]
    words += ["--num_training_steps", str(num_steps)] if num_steps else []
    if saved(folder):
        content = read_header(saved(folder)[-1])
        if content.step >= (num_steps or content.config["num_training_steps"]):
            return saved(folder)[-1]
        words = ["--resume", *words]
    else:
        (folder / "metrics.csv").unlink(missing_ok=True)  # left by a run that saved no checkpoint
        words = ["--config", str(preset), *words]
    print(f"\n{folder.name}")
    try:
        cli.run(train_mnist.main, words, presets=True, network=UNet)
    except SystemExit as end:
        if end.code != 2:  # it has been stopped
            print("The ablation goes on from there when the same command starts it again")
        raise
    return saved(folder)[-1]


class Judge:
    """The classifier, and the features of real test images to compare samples with."""

    def __init__(self, data: Images, num_steps: int, device: torch.device) -> None:
        if len(data.test) < 6:
            raise UserError(f"{data}: to compare samples with them, 6 test images are needed")
        self.data = data
        self.classifier = quality.train_classifier(data, num_steps, device)
        order = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(0))
        one, other = order.chunk(2)
        self.real = quality.features(self.classifier, data.test[one][:2000])
        self.others = quality.features(self.classifier, data.test[other][:2000])
        batches = data.test[other].split(500)
        logits = [self.classifier(from_uint8(batch).to(device)) for batch in batches]
        right = torch.cat(logits).argmax(1).cpu() == data.test_labels[other]
        self.accuracy = right.double().mean().item()

    def distance(self, images: Tensor) -> tuple[float, float]:
        """The distance of samples in [-1, 1], rounded to 8-bit levels like the real images."""
        features = quality.features(self.classifier, to_uint8(images))
        return quality.kernel_distance(features, self.real)

    def floor(self) -> tuple[float, float]:
        """The distance of other real images."""
        return quality.kernel_distance(self.others, self.real)


def measure(
    trained: Path,
    judge: Judge,
    settings: dict[str, Any],
    device: torch.device,
    options: ScriptOptions,
) -> dict[str, Any]:
    """The row's results, from result.json if it has them for these settings, else measured now."""
    file = trained.parent / "result.json"
    wanted = {**settings, "checkpoint": trained.name}
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # missing, or edited
        result = json.loads(file.read_text())
        if result["settings"] == wanted and len(result["distance"]) == len(settings["steps"]):
            return result
    process, model, content = load(str(trained))
    process, model = process.to(device), model.to(device)
    torch.manual_seed(options.seed)
    levels = judge.data.test[: settings["num_images"]].to(device)
    bits = bound(process, model, levels, settings["num_terms"], 100, clip_x0=True)
    result = {"settings": wanted, "bits_per_dim": summary(bits)["total"], "distance": []}
    for num_steps, count in zip(settings["steps"], settings["samples"], strict=True):
        strided = process.strided(min(num_steps, process.num_timesteps))
        trajectory, S = partial(strided.trajectory, model), strided.num_timesteps
        torch.manual_seed(options.seed)  # the same noise for every row
        with autocast(device, options.precision):
            images = draw_samples(trajectory, count, content.image_shape, S, device).images
        save_grid(trained.parent / f"samples_{num_steps}_steps.png", images[:64])
        result["distance"].append(judge.distance(images))
    write_atomically(file, (json.dumps(result, indent=2) + "\n").encode())
    return json.loads(file.read_text())


def write_table(
    path: Path, results: dict[str, dict[str, Any]], settings: dict[str, Any], judge: Judge
) -> None:
    """The table in Markdown, one line per row, with an explanation of its numbers."""
    floor, floor_error = judge.floor()
    pairs = zip(settings["steps"], settings["samples"], strict=True)
    counts = ", ".join(f"{count} in {steps:,} steps" for steps, count in pairs)
    lines = [
        f"Bits per dimension of {settings['num_images']:,} test images of {settings['dataset']} "
        f"({settings['num_terms']} terms per image). Distance of samples from test images, in the "
        f"features of a classifier that gets {100 * judge.accuracy:.1f} % of other test images "
        f"right. ± one standard error. Samples: {counts}. The distance of real images: "
        f"{floor:.4f} ± {floor_error:.4f}.",
        "",
        "| row | bits/dim | " + " | ".join(f"{s:,} steps" for s in settings["steps"]) + " |",
        "|---" * (2 + len(settings["steps"])) + "|",
    ]
    for row, result in results.items():
        cells = [result["bits_per_dim"], *result["distance"]]
        numbers = [f"{value:.3f} ± {error:.3f}" for value, error in cells]
        lines.append(f"| {row} | " + " | ".join(numbers) + " |")
    write_atomically(path, ("\n".join(lines) + "\n").encode())


if __name__ == "__main__":
    cli.run(main, resumes=True)
