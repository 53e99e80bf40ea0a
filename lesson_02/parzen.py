"""The Parzen-window log-likelihood of Table 2 of Sohl-Dickstein et al. 2015, in bits."""

import math
from collections.abc import Sequence
from pathlib import Path

from common import cli
from common.data import load_images_for, to_uint8
from common.device import pick_device
from common.errors import UserError, check_at_least, one_line
from common.options import CheckpointOptions
from common.pictures import save_npz
from common.sampling import Shape, inference
from lesson_02.sample_mnist import SHIPPED, draw, load, scaler_of

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

MAX_IMAGES, MAX_SAMPLES = 500, 5000  # at a time


def main(
    samples: str | None = None,
    num_samples: int = 1000,
    num_validation: int = 1000,
    num_images: int = 10_000,
    bandwidths: list[float] | None = None,
    data_dir: str | None = None,
    options: CheckpointOptions = CheckpointOptions(model_checkpoint=SHIPPED),
) -> None:
    """The log-likelihood of test images under a Gaussian window around each sample [SD15 Table 2].

    For comparison, the same with training images in place of samples, as an upper limit. New
    samples are saved in samples.npz for later use.

    Args:
        samples: an .npz file of samples, uint8 (N, C, H, W), to use instead of new ones.
        num_samples: samples to draw; the paper has 10,000.
        num_validation: training images on which the bandwidth is chosen; they are not used as
            samples.
        num_images: test images; all of them if there are fewer.
        bandwidths: standard deviations of the window to choose from, for pixels in [0, 1]; 20 from
            0.05 to 0.5 unless given.
        data_dir: folder of the data, in torchvision's layout or your own; else $DIFFUSION_DATA,
            else data/.
    """
    check_at_least(1, num_samples=num_samples, num_validation=num_validation)
    check_at_least(2, num_images=num_images)
    widths = torch.logspace(math.log10(0.05), math.log10(0.5), 20).tolist()
    widths = widths if bandwidths is None else bandwidths
    if not widths or not all(0 < width < math.inf for width in widths):
        raise UserError(f"bandwidths is {widths}: it must be one or more numbers above 0")
    process, model, content = load(options.model_checkpoint, options.sha256)
    data = load_images_for(content, content.dataset, data_dir)
    centres = None if samples is None else read_samples(samples, content.image_shape)
    count = num_samples if centres is None else len(centres)
    validation, rest = data.train[-num_validation:], data.train[:-num_validation]
    if count > len(rest):
        raise UserError(
            f"{count:,} samples need as many training images to compare with, but only "
            f"{len(rest):,} are left beside the {num_validation:,} for validation: use fewer"
        )
    if centres is None:
        with inference(options, "lesson_02") as (folder, device):
            network, scaler = model.to(device), scaler_of(content)
            images, _ = draw(process.to(device), network, scaler, content.image_shape, count)
        save_npz(folder / "samples.npz", images)
        centres = to_uint8(images)
    test, device = data.test[:num_images], pick_device(options.device)
    print(f"{len(test):,} test images of {data.name}, {count:,} samples, pixels in [0, 1]")
    for name, points in {"samples": centres, "training images": rest[:count]}.items():
        width, bits = log_likelihood(points, validation, test, widths, device)
        print(f"  {name:16} {summary(width, bits, widths)}")
    print("The paper, 10,000 samples of MNIST: 317 ± 2.7; its training images 349 ± 3.3")


def summary(width: float, bits: Tensor, widths: Sequence[float]) -> str:
    mean, error = bits.mean().item(), bits.std().item() / len(bits) ** 0.5
    edge = "; at the edge of the range" if width in (min(widths), max(widths)) else ""
    return f"{mean:7.1f} ± {error:.1f} bits  (bandwidth {width:.3f}{edge})"


def read_samples(name: str, shape: Shape) -> Tensor:
    """The samples in a file, checked: uint8 (N, C, H, W)."""
    try:
        if not Path(name).is_file():
            raise OSError("there is no such file")
        with np.load(name) as file:
            levels = torch.from_numpy(file["samples"])
    except Exception as error:  # a damaged archive fails in many ways
        raise UserError(
            f"{name} cannot be read ({one_line(error, 200)}): give a samples.npz"
        ) from None
    if levels.dtype != torch.uint8 or levels.shape[1:] != shape or not len(levels):
        raise UserError(
            f"{name} holds {levels.dtype} of shape {tuple(levels.shape)}: it must be uint8 (N, "
            + ", ".join(map(str, shape))
            + ")"
        )
    return levels


def log_likelihood(
    samples: Tensor, validation: Tensor, test: Tensor, widths: Sequence[float], device: torch.device
) -> tuple[float, Tensor]:
    """The bandwidth that is best on the validation images, and the log2 density of each test image
    with it, (N,).

    All uint8 (N, C, H, W). log p(x) = log 1/N Σ_i N(x; x_i, σ² 1)
    """
    scores = parzen_bits(samples, validation, widths, device).mean(1)
    best = widths[int(scores.argmax())]
    return best, parzen_bits(samples, test, [best], device)[0]


def parzen_bits(
    samples: Tensor, test: Tensor, widths: Sequence[float], device: torch.device
) -> Tensor:
    """log2 of the density of each test image, for pixels in [0, 1] and each bandwidth, (W, N).

    Squared distances of levels are whole numbers below 2^53, and so exact in float64. They are
    computed for a limited number of images at a time, to save memory.
    """
    where = device if device.type == "cuda" else torch.device("cpu")  # mps has no float64
    dim, rows = samples[0].numel(), []
    for batch in tqdm(test.split(MAX_IMAGES), unit="batch", desc="Parzen", disable=None):
        x = batch.flatten(1).to(where).double()
        total = torch.full((len(widths), len(x)), -math.inf, dtype=torch.float64, device=where)
        for part in samples.split(MAX_SAMPLES):
            y = part.flatten(1).to(where).double()
            square = (x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T
            for row, width in enumerate(widths):
                window = -square / (2 * (255 * width) ** 2)
                total[row] = torch.logaddexp(total[row], window.logsumexp(1))
        rows.append(total.cpu())
    log_p = torch.cat(rows, 1) - math.log(len(samples))
    volume = torch.tensor([2 * math.pi * width**2 for width in widths], dtype=torch.float64)
    log_p -= 0.5 * dim * volume.log()[:, None]
    return log_p / math.log(2)


if __name__ == "__main__":
    cli.run(main)
