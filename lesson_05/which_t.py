"""Which t does what: two networks share a sampler, one at small t and the other at large t.

One is the shipped network, the other has had 200 steps of training. What a sample lacks shows what
the shipped network does at the times that the early network has taken over.
"""

from pathlib import Path

from benchmarks.quality import classifier
from benchmarks.quality.metrics import SURE, Reference
from common import cli
from common.data import load_images_for, to_uint8
from common.errors import check_at_least, check_at_most
from common.files import output_folder
from common.pictures import save_rows
from common.sampling import inference
from lesson_05.ablation import train
from lesson_05.ddpm import Network, preview
from lesson_05.interpolate import Options
from lesson_05.sample_mnist import load
from lesson_05.unet import UNet

import torch
from torch import Tensor


def main(
    borders: list[int] | None = None,
    early_steps: int = 200,
    num_steps: int = 40,
    num_samples: int = 100,
    metrics: bool = True,
    options: Options = Options(),
) -> None:
    """Sample with one network up to t = border and another above it, from the same noise. Writes
    which_t.png, and prints how the samples compare with MNIST's test images.

    Args:
        borders: the last t of the first network; T/4, T/2 and 3T/4 unless given.
        early_steps: training steps of the early network, with the laptop preset.
        num_steps: steps from noise to image, evenly spaced.
        num_samples: images that are measured; the picture shows ten of them.
        metrics: whether to measure; it needs the packages of benchmarks/requirements.txt.
    """
    check_at_least(1, early_steps=early_steps, num_steps=num_steps, num_samples=num_samples)
    check_at_most(1_000_000, early_steps=early_steps)
    check_at_most(10_000, num_samples=num_samples)  # they are drawn at once
    process, shipped, content = load(options.model_checkpoint, options.sha256)
    T = process.num_timesteps
    check_at_most(T, num_steps=num_steps)
    borders = borders or [T * k // 4 for k in (1, 2, 3)]
    check_at_least(1, borders=min(borders))
    check_at_most(T, borders=max(borders))
    data = load_images_for(content, options.dataset, options.data_dir)
    early = train_early(early_steps, T, data.name, options)
    with inference(options, "lesson_05") as (folder, device):
        process, shipped, early = process.to(device), shipped.to(device), early.to(device)
        pairs: dict[str, tuple[Network, Network, int]] = {}
        pairs["shipped at every t"] = shipped, shipped, 0
        for border in borders:
            pairs[f"early at t ≤ {border}"] = early, shipped, border
            pairs[f"early at t > {border}"] = shipped, early, border
        pairs["early at every t"] = early, early, 0
        rows: dict[str, Tensor] = {}
        for name, (below, above, border) in pairs.items():
            torch.manual_seed(options.seed)
            x_T = torch.randn(num_samples, *content.image_shape, device=device)
            rows[name] = preview(process, joined(below, above, border), x_T, num_steps).cpu()
    save_rows(folder / "which_t.png", {name: x0[:10] for name, x0 in rows.items()})
    print(f"{folder}/which_t.png")
    if metrics:
        measure(rows, Reference(data, device))


def train_early(num_steps: int, T: int, dataset: str, options: Options) -> UNet:
    """The averaged network after a short run of train_mnist.py; one that is there is used again."""
    name = f"early_{dataset}_{T}_{num_steps}_{options.seed}"
    folder = output_folder(options.output_dir, "lesson_05") / name
    words = ["--config", str(Path(__file__).parent / "configs" / "laptop.yaml")]
    words += ["--num_training_steps", str(num_steps), "--num_samples", "0", "--num_previews", "1"]
    words += ["--num_timesteps", str(T), "--dataset", dataset, "--device", options.device]
    words += ["--precision", options.precision, "--seed", str(options.seed)]
    words += ["--data_dir", options.data_dir] if options.data_dir else []
    return load(str(train(folder, words, num_steps)))[1]


def joined(below: Network, above: Network, border: int) -> Network:
    """One network up to t = border, and another above it."""

    def network(xt: Tensor, t: Tensor) -> Tensor:
        return (below if t[0] <= border else above)(xt, t)

    return network


def measure(rows: dict[str, Tensor], reference: Reference) -> None:
    """FID, the share of samples of which the classifier is sure, and the share whose digit is that
    of the first row, which starts from the same noise."""
    first = None
    for name, x0 in rows.items():
        levels = to_uint8(x0)
        _, probabilities = classifier.classify(reference.model, levels)
        probability, digit = probabilities.max(1)
        first = digit if first is None else first
        sure = (probability >= SURE).double().mean()
        same = (digit == first).double().mean()
        fid = reference.compare(levels)["fid"]
        print(f"{name}: FID {fid:.3g}, sure of {sure:.0%}, same digit {same:.0%}")


if __name__ == "__main__":
    cli.run(main)
