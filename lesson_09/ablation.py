"""What each improvement does: the same network trained once per row, and one table of all."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import trange

from common import checkpoint, cli, mnist
from common.device import Precision, autocast, pick_device
from common.errors import UserError
from common.images import from_uint8, save_grid, to_uint8
from common.run import saved
from lesson_09 import quality, train_mnist
from lesson_09.evaluate import bound, summary
from lesson_09.iddpm import ImprovedDDPM, Network
from lesson_09.sample_mnist import load
from lesson_09.unet import UNet

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


def main(
    rows: Sequence[str] = ROWS,
    presets: str = "configs/ablation",
    num_training_steps: int | None = None,
    num_images: int = 1000,
    num_terms: int = 20,
    steps: Sequence[int] = (1000, 100, 50, 25, 10),
    samples: Sequence[int] = (32, 128, 256, 256, 512),
    num_classifier_steps: int = 1000,
    dataset: mnist.Dataset = "auto",
    data_dir: str | None = None,
    output_dir: str | None = None,
    device: str = "auto",
    precision: Precision = "auto",
) -> None:
    """Train every row at equal steps, measure it, and write table.md. Started again, it goes on.

    Args:
        rows: the presets to train, by name.
        presets: their folder, looked up from here, then beside the script.
        num_training_steps: of every row; as in its preset unless given.
        num_images: test images for bits per dimension.
        num_terms: of the bound, drawn for each image.
        steps: of the sampler, one column each.
        samples: how many, for each of `steps`.
        num_classifier_steps: training steps of the classifier whose features judge samples.
        dataset: auto is MNIST or, where it cannot be had, the digits that come with scikit-learn.
        data_dir: folder of the data in torchvision's layout; else $DIFFUSION_DATA, else data/.
        output_dir: folder of the runs and the table; output/ablation in this lesson's folder unless
            given.
        device: auto, cpu, cuda, cuda:1, mps.
        precision: of the network's arithmetic while training and sampling.
    """
    here = Path(__file__).parent
    folder = Path(output_dir) if output_dir else here / "output" / "ablation"
    files = {row: preset_file(row, presets, here) for row in rows}
    if len(steps) != len(samples) or min([*steps, *samples]) < 1 or min(samples) < 3:
        raise UserError("steps and samples go together: as many of each, at least 3 samples")
    checkpoint.make_folder(folder)
    place = pick_device(device)
    data = mnist.load(dataset, data_dir)
    judge = Judge(data, num_classifier_steps, place)
    settings: dict[str, Any] = {"num_images": num_images, "num_terms": num_terms}
    settings |= {"steps": list(steps), "samples": list(samples)}
    settings |= {"classifier": num_classifier_steps, "dataset": data.name}
    results: dict[str, dict[str, Any]] = {}
    for row, file in files.items():
        flags = ["--dataset", data.name, "--device", device, "--precision", precision]
        flags += ["--data_dir", data_dir] if data_dir else []
        trained = train(file, folder / row, flags, num_training_steps)
        results[row] = kept_or_measured(trained, data, judge, settings, place, precision)
        write_table(folder / "table.md", results, settings, judge)
    print((folder / "table.md").read_text())
    print(f"{folder}/table.md; samples of each row in its folder")


def preset_file(row: str, presets: str, here: Path) -> Path:
    for file in (Path(presets) / f"{row}.yaml", here / presets / f"{row}.yaml"):
        if file.is_file():
            return file
    raise UserError(f"row {row} has no preset {presets}/{row}.yaml: take some of {', '.join(ROWS)}")


def train(preset: Path, folder: Path, flags: list[str], num_steps: int | None) -> Path:
    """The last checkpoint of the row's run, which is started, or gone on with, where need be."""
    flags += ["--output_dir", str(folder)]
    flags += ["--num_training_steps", str(num_steps)] if num_steps else []
    if saved(folder):
        content = checkpoint.load(saved(folder)[-1], "lesson_09")
        if content["step"] >= (num_steps or content["config"]["num_training_steps"]):
            return saved(folder)[-1]
        words = ["--resume", *flags]
    else:
        (folder / "metrics.csv").unlink(missing_ok=True)  # of a run that saved nothing
        words = ["--config", str(preset), *flags]
    print(f"\n{folder.name}")
    cli.run(train_mnist.main, words, presets=True, network=UNet)
    return saved(folder)[-1]


class Judge:
    """Real test images in the classifier's features, to measure samples against."""

    def __init__(self, data: mnist.Images, num_steps: int, device: torch.device) -> None:
        self.classifier = quality.train_classifier(data, num_steps, device)
        order = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(0))
        one, other = order.chunk(2)
        self.real = quality.features(self.classifier, data.test[one][:2000])
        self.others = quality.features(self.classifier, data.test[other][:2000])
        answers = [
            self.classifier(from_uint8(batch).to(device)).argmax(1).cpu()
            for batch in data.test[other].split(500)
        ]
        right = torch.cat(answers) == data.test_labels[other]
        self.accuracy = right.double().mean().item()

    def distance(self, images: Tensor) -> tuple[float, float]:
        """Of samples in [-1, 1], as the 8-bit images that they would be written as."""
        return quality.kernel_distance(
            quality.features(self.classifier, to_uint8(images)), self.real
        )

    def floor(self) -> tuple[float, float]:
        """Of real images that are not among those compared with."""
        return quality.kernel_distance(self.others, self.real)


def kept_or_measured(
    trained: Path,
    data: mnist.Images,
    judge: Judge,
    settings: dict[str, Any],
    device: torch.device,
    precision: Precision,
) -> dict[str, Any]:
    """The row's figures: from result.json if it has them for these settings, else measured."""
    file = trained.parent / "result.json"
    wanted = {**settings, "checkpoint": trained.name}
    if file.exists():
        result = json.loads(file.read_text())
        if result["settings"] == wanted:
            return result
    process, model, _ = load(str(trained))
    process, model = process.to(device), model.to(device)
    torch.manual_seed(0)
    with autocast(device, "float32"):
        levels = data.test[: settings["num_images"]].to(device)
        bits = bound(process, model, levels, settings["num_terms"], 100, clip_x0=True)
    result = {"settings": wanted, "bits_per_dim": summary(bits)["total"], "distance": []}
    for num_steps, count in zip(settings["steps"], settings["samples"], strict=True):
        strided = process.strided(min(num_steps, process.num_timesteps))
        with autocast(device, precision):
            images = draw(strided, model, data.shape, count)
        save_grid(trained.parent / f"samples_{num_steps}_steps.png", images[:64])
        result["distance"].append(judge.distance(images))
    checkpoint.write_whole(file, (json.dumps(result, indent=2) + "\n").encode())
    return json.loads(file.read_text())


@torch.no_grad()
def draw(process: ImprovedDDPM, model: Network, shape: tuple[int, int, int], count: int) -> Tensor:
    """So many samples, from the same noise for every row."""
    torch.manual_seed(0)
    device, batches = process.signal_rate.device, []
    for first in trange(0, count, 64, desc=f"{process.num_timesteps} steps", unit="batch"):
        x_T = torch.randn(min(64, count - first), *shape, device=device)
        batches.append(process.sample(model, x_T).cpu())
    return torch.cat(batches)


def write_table(
    path: Path, results: dict[str, dict[str, Any]], settings: dict[str, Any], judge: Judge
) -> None:
    """One line a row, in Markdown, with what one needs to know to read it."""
    floor, floor_error = judge.floor()
    counts = ", ".join(
        f"{count} at {steps:,} steps"
        for steps, count in zip(settings["steps"], settings["samples"], strict=True)
    )
    lines = [
        f"Bits per dimension of {settings['num_images']:,} test images of {settings['dataset']} "
        f"({settings['num_terms']} terms an image); distance of samples from test images, in the "
        f"features of a classifier that has {100 * judge.accuracy:.1f} % of other test images "
        f"right; ± one standard error. Samples: {counts}. The distance of real images: "
        f"{floor:.4f} ± {floor_error:.4f}.",
        "",
        "| row | bits/dim | " + " | ".join(f"{s:,} steps" for s in settings["steps"]) + " |",
        "|---" * (2 + len(settings["steps"])) + "|",
    ]
    for row, result in results.items():
        cells = [result["bits_per_dim"], *result["distance"]]
        numbers = [f"{value:.3f} ± {error:.3f}" for value, error in cells]
        lines.append(f"| {row} | " + " | ".join(numbers) + " |")
    checkpoint.write_whole(path, ("\n".join(lines) + "\n").encode())


if __name__ == "__main__":
    cli.run(main)
