"""Bits per dimension of a trained Improved DDPM, and the plots that the paper argues with."""

import json
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from common import checkpoint, cli, mnist
from common.device import Precision, autocast, pick_device
from common.images import from_uint8, save_plot
from common.run import check
from lesson_09.iddpm import (
    BitsPerDim,
    ImprovedDDPM,
    Network,
    Schedule,
    Variance,
    cosine_beta,
    linear_beta,
    named_beta,
)
from lesson_09.sample_mnist import SHIPPED, load


def main(
    model_checkpoint: str = SHIPPED,
    num_images: int = 1000,
    num_terms: int = 50,
    num_steps: int | None = None,
    clip_x0: bool = True,
    variance: Variance | None = None,
    batch_size: int = 100,
    data_dir: str | None = None,
    output_dir: str | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: Precision = "float32",
    sha256: str | None = None,
) -> None:
    """The bound on test images and its terms [Nichol21 Eq. 4], and Figures 1, 2 and 5.

    Args:
        model_checkpoint: a file, or an http(s) address; the shipped one unless given.
        num_images: the first so many of the test set, or all that there are.
        num_terms: of the bound's T terms, drawn for each image: unbiased; T is the full sum, and
            so is what exceeds it.
        num_steps: S: the bound of the process strided to S steps; all T unless given.
        clip_x0: whether each estimate of the clean image is clipped to [-1, 1], as in sampling:
            the bound is that of the model which is sampled.
        variance: of the reverse steps; as in training unless given.
        batch_size: images at a time.
        data_dir: folder of the data in torchvision's layout; else $DIFFUSION_DATA, else data/.
        output_dir: folder of the figures; output/ in this lesson's folder unless given.
        seed: of the terms and the noise.
        device: auto, cpu, cuda, cuda:1, mps.
        precision: of the network's arithmetic: auto, float32, bfloat16.
        sha256: refuse a file with another sum.
    """
    place = pick_device(device)
    process, model, content = load(model_checkpoint, variance, sha256)
    if num_steps is not None:
        process = process.strided(num_steps)
    check(lambda value: value >= 2, "at least 2", num_images=num_images)
    check(lambda value: value >= 1, "at least 1", batch_size=batch_size)
    levels = mnist.load(content["dataset"], data_dir).test[:num_images].to(place)
    folder = Path(output_dir) if output_dir else Path(__file__).parent / "output"
    checkpoint.make_folder(folder)

    T = process.num_timesteps
    terms = min(num_terms, T)
    torch.manual_seed(seed)
    with autocast(place, precision):
        process, model = process.to(place), model.to(place)
        bits = bound(process, model, levels, terms, batch_size, clip_x0)
    figures = summary(bits)
    print(f"{len(levels):,} test images of {content['dataset']}, {terms:,} of {T:,} terms an image")
    for name, (mean, error) in figures.items():
        print(f"  {name:8} {mean:8.4f} ± {error:.4f} bits/dim")
    result: dict[str, object] = {
        name: {"mean": mean, "standard_error": error} for name, (mean, error) in figures.items()
    }
    result |= {"num_images": len(levels), "num_terms": terms, "num_timesteps": T, "seed": seed}
    result |= {"precision": precision, "clip_x0": clip_x0, "step": content["step"]}
    (folder / "bits_per_dim.json").write_text(json.dumps(result, indent=2) + "\n")
    save_terms(folder / "terms.png", bits)
    save_variance_ratio(folder / "variance_ratio.png", content["config"]["schedule"])
    save_schedules(folder / "schedules.png")
    print(f"{folder}/bits_per_dim.json, terms.png, variance_ratio.png, schedules.png")


def bound(
    process: ImprovedDDPM,
    model: Network,
    levels: Tensor,
    num_terms: int,
    batch_size: int,
    clip_x0: bool = False,
) -> BitsPerDim:
    """The bound on images of 8-bit levels (N, C, H, W), batch by batch, on the CPU."""
    parts = []
    for batch in tqdm(levels.split(batch_size), unit="batch", desc="bits/dim"):
        bits = process.bits_per_dim(model, from_uint8(batch), num_terms, clip_x0)
        parts.append(BitsPerDim(*(part.cpu() for part in bits)))
    return BitsPerDim(*(torch.cat(part) for part in zip(*parts, strict=True)))


def summary(bits: BitsPerDim) -> dict[str, tuple[float, float]]:
    """Each part of the bound by name: its mean over images and the standard error of that."""
    decoder = bits.terms[:, 0]
    parts = {
        "total": bits.total,
        "prior": bits.prior,
        "KL": bits.total - bits.prior - decoder,
        "decoder": decoder,
    }
    return {
        name: (part.mean().item(), part.std().item() / len(part) ** 0.5)
        for name, part in parts.items()
    }


def save_terms(path: Path, bits: BitsPerDim) -> None:
    """The mean of each term that was seen against its t [Nichol21 Figure 2]."""
    times, place = bits.t.flatten().unique(return_inverse=True)
    sums = torch.zeros(len(times)).index_add(0, place, bits.terms.flatten())
    counts = torch.zeros(len(times)).index_add(0, place, torch.ones_like(bits.terms).flatten())
    save_plot(
        path,
        {"term of the bound": (times.tolist(), (sums / counts).tolist())},
        "t",
        "bits per dimension",
        "Each term of the bound: the first few cost the most.",
    )


def save_variance_ratio(path: Path, schedule: Schedule) -> None:
    """β̃_t/β_t for processes of several lengths [Nichol21 Figure 1]."""
    curves = {}
    for T in (100, 1000, 4000):
        beta = named_beta(schedule, T)
        alpha_bar = (1 - beta).cumprod(0)
        ratio = (1 - alpha_bar[:-1]) / (1 - alpha_bar[1:])  # from t = 2 on; at t = 1 it is 0
        t = torch.arange(2, T + 1) / T
        curves[f"T = {T:,}"] = (t.tolist(), ratio.tolist())
    title = f"The two fixed variances differ at the first few steps only ({schedule} schedule)."
    save_plot(path, curves, "t/T", "β̃ / β", title, yscale="linear")


def save_schedules(path: Path, T: int = 1000) -> None:
    """ᾱ_t of both schedules [Nichol21 Figure 5]."""
    curves = {}
    for name, beta in [("linear", linear_beta(T)), ("cosine", cosine_beta(T))]:
        alpha_bar = (1 - beta).cumprod(0)
        curves[name] = ((torch.arange(1, T + 1) / T).tolist(), alpha_bar.tolist())
    title = (
        "What is left of the image's variance: the linear schedule spends its last steps on noise."
    )
    save_plot(path, curves, "t/T", "ᾱ", title, yscale="linear")


if __name__ == "__main__":
    cli.run(main)
