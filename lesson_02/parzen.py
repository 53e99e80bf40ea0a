"""The Parzen-window log-likelihood of Table 2 of Sohl-Dickstein et al. 2015, in bits."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common import checkpoint, cli, mnist
from common.device import Precision, autocast, pick_device
from common.errors import UserError
from common.images import save_npz, to_uint8
from common.run import check
from lesson_02.sample_mnist import SHIPPED, draw, load, standard_and_shape

IMAGES_AT_A_TIME, SAMPLES_AT_A_TIME = 500, 5000


def main(
    model_checkpoint: str = SHIPPED,
    samples: str | None = None,
    num_samples: int = 1000,
    num_validation: int = 1000,
    num_images: int = 10_000,
    bandwidths: list[float] | None = None,
    data_dir: str | None = None,
    output_dir: str | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: Precision = "auto",
    sha256: str | None = None,
) -> None:
    """Log-likelihood of test images under a Gaussian window around each sample [SD15 Table 2].

    Beside it the ceiling: as many training images in the place of the samples. Writes samples.npz,
    to be used again.

    Args:
        model_checkpoint: a file, or an http(s) address; the shipped one unless given.
        samples: an .npz file of samples, uint8 (N, C, H, W), in the place of new ones.
        num_samples: samples to draw; the paper has 10,000.
        num_validation: training images on which the bandwidth is chosen; they are not among those
            of the ceiling.
        num_images: the first so many of the test set, or all that there are.
        bandwidths: deviations of the window to choose from, of pixels in [0, 1]; 20 from 0.05 to
            0.5 unless given.
        data_dir: folder of the data in torchvision's layout; else $DIFFUSION_DATA, else data/.
        output_dir: folder of samples.npz; output/ in this lesson's folder unless given.
        seed: of the samples.
        device: auto, cpu, cuda, cuda:1, mps.
        precision: of the network's arithmetic while sampling.
        sha256: refuse a file with another sum.
    """
    counts = {"num_samples": num_samples, "num_validation": num_validation}
    check(lambda value: value >= 1, "at least 1", **counts)
    check(lambda value: value >= 2, "at least 2", num_images=num_images)
    widths = torch.logspace(math.log10(0.05), math.log10(0.5), 20).tolist()
    widths = widths if bandwidths is None else bandwidths
    if not widths or not all(0 < width < float("inf") for width in widths):
        raise UserError(f"bandwidths {widths}: take one or more above 0")
    place = pick_device(device)
    process, model, content = load(model_checkpoint, sha256)
    standard, shape = standard_and_shape(content)
    data = mnist.load(content["dataset"], data_dir)
    if samples is None:
        folder = Path(output_dir) if output_dir else Path(__file__).parent / "output"
        checkpoint.make_folder(folder)
        torch.manual_seed(seed)
        with autocast(place, precision):
            images = draw(process.to(place), model.to(place), standard, shape, num_samples)
        save_npz(folder / "samples.npz", images)
        centres = to_uint8(images)
    else:
        centres = read_samples(samples, shape)
    held_out, rest = data.train[-num_validation:], data.train[:-num_validation]
    if len(centres) > len(rest):
        raise UserError(
            f"{len(centres):,} samples, but {max(len(rest), 0):,} training images beside the "
            f"{num_validation:,} for validation: take fewer"
        )
    test = data.test[:num_images]
    print(f"{len(test):,} test images of {data.name}, {len(centres):,} samples, pixels in [0, 1]")
    for name, points in {"samples": centres, "training images": rest[: len(centres)]}.items():
        width, bits = log_likelihood(points, held_out, test, widths, place)
        mean, error = bits.mean().item(), bits.std().item() / len(bits) ** 0.5
        edge = "; at the edge of the choice" if width in (min(widths), max(widths)) else ""
        print(f"  {name:16} {mean:7.1f} ± {error:.1f} bits  (bandwidth {width:.3f}{edge})")
    print("The paper, 10,000 samples: 317 ± 2.7; its training images 349 ± 3.3")


def read_samples(name: str, shape: tuple[int, int, int]) -> Tensor:
    try:
        with np.load(name) as file:
            levels = torch.from_numpy(file["samples"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{name} cannot be read ({error}): take a samples.npz") from None
    if levels.dtype != torch.uint8 or levels.shape[1:] != shape or not len(levels):
        raise UserError(
            f"{name} holds {levels.dtype} of shape {tuple(levels.shape)}: it must be uint8 (N, "
            + ", ".join(map(str, shape))
            + ")"
        )
    return levels


def log_likelihood(
    samples: Tensor, held_out: Tensor, test: Tensor, widths: Sequence[float], device: torch.device
) -> tuple[float, Tensor]:
    """The bandwidth that is best on held-out images, and the test images' log2 densities (N,).

    All uint8 (N, C, H, W). log p(x) = log 1/N Σ_i N(x; x_i, σ² 1)
    """
    scores = parzen_bits(samples, held_out, widths, device).mean(1)
    best = widths[int(scores.argmax())]
    return best, parzen_bits(samples, test, [best], device)[0]


def parzen_bits(
    samples: Tensor, test: Tensor, widths: Sequence[float], device: torch.device
) -> Tensor:
    """log2 of the density of each test image, pixels in [0, 1], for each bandwidth, (W, N).

    Squares of distances are sums of whole numbers below 2^53, exact in float64;
    so many at a time that memory does not grow with their number.
    """
    where = torch.device("cpu") if device.type == "mps" else device  # which has no float64
    dim, rows = samples[0].numel(), []
    for some in tqdm(test.split(IMAGES_AT_A_TIME), unit="batch", desc="Parzen"):
        x = some.flatten(1).to(where).double()
        total = torch.full((len(widths), len(x)), -math.inf, dtype=torch.float64, device=where)
        for part in samples.split(SAMPLES_AT_A_TIME):
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
