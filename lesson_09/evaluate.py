"""Bits per dimension of a trained Improved DDPM, and the paper's plots of variances and terms."""

import json
from pathlib import Path
from typing import Any

from common import cli
from common.data import from_uint8, load_images_for
from common.errors import check_at_least
from common.options import CheckpointOptions
from common.pictures import save_plot
from common.sampling import check_finite, inference
from lesson_09.iddpm import (
    BitsPerDim,
    ImprovedDDPM,
    Network,
    Schedule,
    Variance,
    cosine_beta,
    linear_beta,
    named_beta,
    strata,
)
from lesson_09.sample_mnist import SHIPPED, load

import torch
from torch import Tensor
from tqdm import tqdm


def main(
    num_images: int = 1000,
    num_terms: int = 50,
    num_steps: int | None = None,
    clip_x0: bool = True,
    variance: Variance | None = None,
    batch_size: int = 100,
    data_dir: str | None = None,
    options: CheckpointOptions = CheckpointOptions(model_checkpoint=SHIPPED, precision="float32"),
) -> None:
    """The bound on test images and its terms [Nichol21 Eq. 4], and Figures 1, 2 and 5.

    Args:
        num_images: number of test images, counted from the first.
        num_terms: number of the bound's T terms drawn for each image, an unbiased estimate; T or
            more computes all terms.
        num_steps: S; the bound is that of the process in S steps. All T unless given.
        clip_x0: whether each prediction of the clean image is clipped to [-1, 1], as in sampling.
        variance: variance of the reverse steps; as in training unless given.
        batch_size: images per batch.
        data_dir: folder of the data, in torchvision's layout or your own; else $DIFFUSION_DATA,
            else data/.
    """
    check_at_least(2, num_images=num_images)
    check_at_least(1, batch_size=batch_size)
    process, model, content = load(options.model_checkpoint, options.sha256, variance)
    process = process if num_steps is None else process.strided(num_steps)
    T = process.num_timesteps
    num_terms = min(num_terms, T)
    strata(T, num_terms)  # checks num_terms before the work begins
    levels = load_images_for(content, content.dataset, data_dir).test[:num_images]
    with inference(options, "lesson_09") as (folder, device):
        process, model, levels = process.to(device), model.to(device), levels.to(device)
        bits = bound(process, model, levels, num_terms, batch_size, clip_x0)
    result: dict[str, Any] = {}
    print(
        f"{len(levels):,} test images of {content.dataset}, {num_terms:,} of {T:,} terms per image"
    )
    for name, (mean, error) in summary(bits).items():
        print(f"  {name:8} {mean:8.4f} ± {error:.4f} bits/dim")
        result[name] = {"mean": mean, "standard_error": error}
    result |= {"num_images": len(levels), "num_terms": num_terms, "num_timesteps": T}
    result |= {"seed": options.seed, "precision": options.precision, "clip_x0": clip_x0}
    result["step"] = content.step
    (folder / "bits_per_dim.json").write_text(json.dumps(result, indent=2) + "\n")
    save_terms(folder / "terms.png", bits)
    save_variance_ratio(folder / "variance_ratio.png", content.config["schedule"])
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
    """The bound on images of 8-bit levels (N, C, H, W), computed batch by batch; returned on the
    CPU."""
    parts = []
    for batch in tqdm(levels.split(batch_size), unit="batch", desc="bits/dim", disable=None):
        bits = process.bits_per_dim(model, from_uint8(batch), num_terms, clip_x0)
        check_finite(bits.total)
        parts.append(BitsPerDim(*(part.cpu() for part in bits)))
    return BitsPerDim(*(torch.cat(part) for part in zip(*parts, strict=True)))


def summary(bits: BitsPerDim) -> dict[str, tuple[float, float]]:
    """Each part of the bound by name: its mean over the images, and the mean's standard error."""
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
    """The mean of the terms at each t that was drawn [Nichol21 Figure 2]."""
    times, index = bits.t.flatten().unique(return_inverse=True)
    sums = torch.zeros(len(times)).index_add(0, index, bits.terms.flatten())
    curve = (times.tolist(), (sums / index.bincount()).tolist())
    title = "Each term of the bound: the first few cost the most."
    save_plot(path, {"term of the bound": curve}, "t", "bits per dimension", title)


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
