"""What the network predicts, and by which loss it learns: the rows of [Ho20 Table 2].

It needs the packages of benchmarks/requirements.txt, whose classifier judges the samples.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from benchmarks.quality.evaluate import Evaluation, check_numbers
from benchmarks.quality.metrics import Reference
from benchmarks.quality.samples import PlanOptions, SamplePlan
from common import cli
from common.checkpoint import saved, step_of
from common.data import load_images
from common.device import pick_device
from common.errors import check_at_least
from common.files import make_folder, write_atomically
from common.options import DataOptions, ScriptOptions
from lesson_05 import train_mnist
from lesson_05.unet import UNet

Row = Literal["mean_vlb", "mean_simple", "x0_vlb", "x0_simple", "eps_vlb", "eps_simple"]
# The paper's FID on CIFAR-10 [Ho20 Table 2], with fixed variances.
ROWS: dict[Row, str] = {
    "mean_vlb": "13.22",
    "mean_simple": "unstable",
    "x0_vlb": "",
    "x0_simple": "worse early on",
    "eps_vlb": "13.51",
    "eps_simple": "3.17",
}
FOLDER = Path(__file__).parent


def main(
    rows: Sequence[Row] = tuple(ROWS),
    seeds: Sequence[int] = (0, 1, 2),
    num_training_steps: int = 1200,
    num_steps: int = 50,
    num_samples: int = 1000,
    num_images: int = 500,
    images: DataOptions = DataOptions(),
    options: ScriptOptions = ScriptOptions(),
) -> None:
    """Train each row once for each seed, with the laptop preset, and write table.md into
    output/ablation or --output_dir. With one seed all rows see the same images, times and noise.
    Started again, the script resumes where it stopped.

    Args:
        rows: PREDICTION_LOSS, what the network predicts and by which loss it learns.
        seeds: one training run for each; the table gives their mean and its standard error.
        num_training_steps: training steps of every run.
        num_steps: DDIM steps of the samples.
        num_samples: samples for FID.
        num_images: test images for bits per dimension.
    """
    check_numbers(num_samples, num_images, 20)
    check_at_least(1, num_training_steps=num_training_steps, seeds=len(seeds), rows=len(rows))
    folder = Path(options.output_dir or FOLDER / "output" / "ablation")
    make_folder(folder)
    data = load_images(images.dataset, images.data_dir)
    reference = Reference(data, pick_device(options.device))
    real = reference.real(num_samples, balanced=False)["fid"]
    plan = PlanOptions(device=options.device, precision=options.precision)
    plan.num_samples, plan.num_steps = num_samples, num_steps
    plans = plan, replace(plan, sampler="ddpm", num_steps=None)
    flags = ["--dataset", data.name, "--device", options.device, "--precision", options.precision]
    flags += ["--data_dir", images.data_dir] if images.data_dir else []
    results: dict[Row, list[tuple[float, float]]] = {}
    for row in rows:
        prediction, loss = row.split("_")
        results[row] = []
        for seed in seeds:
            words = [*flags, "--prediction", prediction, "--loss", loss, "--seed", str(seed)]
            words += ["--num_training_steps", str(num_training_steps), "--num_samples", "0"]
            words += ["--num_previews", "8"]
            trained = train(folder / f"{row}_{seed}", words, num_training_steps)
            by_ddim, by_ddpm = (SamplePlan(str(trained), plan) for plan in plans)
            fid = Evaluation(by_ddim, reference, 0, 20).run(trained.parent)["fid"]
            bits = Evaluation(by_ddpm, reference, num_images, 20).bits_per_dim()
            results[row].append((fid, bits["total"]["mean"] if bits else math.nan))
        about = f"{num_training_steps:,} steps, seeds {', '.join(map(str, seeds))}; "
        about += f"{num_samples:,} samples of DDIM in {num_steps} steps"
        write_table(folder / "table.md", results, about, real)
    print((folder / "table.md").read_text())


def train(folder: Path, words: list[str], num_training_steps: int) -> Path:
    """Train a row, from its last checkpoint if there is one, and return its final checkpoint."""
    if not (saved(folder) and step_of(saved(folder)[-1]) >= num_training_steps):
        print(f"\n{folder.name}")
        words = [*words, "--output_dir", str(folder), "--resume", "auto"]
        cli.run(train_mnist.main, words, presets=True, network=UNet)
    return saved(folder)[-1]


def write_table(
    path: Path, results: dict[Row, list[tuple[float, float]]], about: str, real: float
) -> None:
    """The table in Markdown: mean ± standard error over the seeds."""
    lines = [
        f"The laptop preset, {about}. FID of as many real images: {real:.3g}. "
        "± one standard error.",
        "",
        "| prediction | loss | FID | bits/dim | FID of the paper, CIFAR-10 |",
        "|---|---|---|---|---|",
    ]
    for row, runs in results.items():
        cells = []
        for values in zip(*runs, strict=True):
            error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
            mean = f"{statistics.mean(values):.3g}"
            cells.append(mean if error is None else f"{mean} ± {error:.2g}")
        lines.append(f"| {' | '.join([*row.split('_'), *cells, ROWS[row]])} |")
    write_atomically(path, ("\n".join(lines) + "\n").encode())


if __name__ == "__main__":
    cli.run(main)
