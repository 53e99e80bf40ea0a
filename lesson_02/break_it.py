"""Leave one thing out, and see what it is for.

Each break differs from the lesson in one line. The shipped network is sampled with and without it,
with the same noise in every step.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

from common import cli
from common.break_it import Bench, BreakOptions, run_breaks
from common.data import from_uint8, load_images_for
from common.errors import check_at_least
from lesson_02.dpm import DPM, Gaussian, Network, k_minus_null
from lesson_02.sample_mnist import SHIPPED, read_mask, scaler_of

import torch
from torch import Tensor

Break = Literal["no_noise", "fixed_variance", "late_evidence"]


def main(
    what: list[Break] | None = None,
    num_images: int = 100,
    data_dir: str | None = None,
    options: BreakOptions = BreakOptions(model_checkpoint=SHIPPED),
) -> None:
    """Break the lesson, one thing at a time: broken_no_noise.png and so on.

    Args:
        what: no_noise, each reverse step returns its mean; fixed_variance, its variance is that of
            the forward step; late_evidence, inpainting sets the known pixels only after the last
            step. All of them unless given.
        num_images: test images for the bound of fixed_variance, and for the fit of the two halves
            that late_evidence prints.
        data_dir: folder of the test images; else $DIFFUSION_DATA, else data/.
    """
    check_at_least(2, num_images=num_images)
    breaks: dict[Break, Callable[[Bench], dict[str, Tensor]]] = {
        "no_noise": no_noise,
        "fixed_variance": partial(fixed_variance, num_images=num_images, data_dir=data_dir),
        "late_evidence": partial(late_evidence, num_images=num_images, data_dir=data_dir),
    }
    run_breaks("lesson_02", breaks, what, options)


class NoNoise(DPM):
    """Returns the mean: p_sample without its noise."""

    @torch.no_grad()
    def p_sample(
        self,
        model: Network,
        xt: Tensor,
        t: int,
        evidence: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        t_batch = torch.full((len(xt),), t, device=xt.device)
        return self.p_mean_variance(model(xt, t_batch), xt, t_batch).mean


class FixedVariance(DPM):
    """Ignores b: the variance of the reverse step is β_t."""

    def p_mean_variance(self, out: Tensor, xt: Tensor, t: Tensor) -> Gaussian:
        mu, b = out.chunk(2, dim=1)
        return super().p_mean_variance(torch.cat([mu, torch.zeros_like(b)], 1), xt, t)


def broken(kind: type[DPM], bench: Bench) -> DPM:
    return kind(bench.process.beta()).to(bench.device)


def sample(
    bench: Bench, process: DPM, name: str, evidence: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Samples x1 (B, C, H, W), one for each image of the evidence or num_samples; the noise is the
    same in every call."""
    x_T = bench.noise()
    if evidence is not None:
        more = len(evidence[0]) - len(x_T)
        x_T = torch.cat([x_T, torch.randn(more, *x_T.shape[1:], device=x_T.device)])
    trajectory = process.trajectory(bench.model, x_T, evidence)
    return bench.last(trajectory, process.num_timesteps - 1, name)


def load_x0(bench: Bench, num_images: int, data_dir: str | None) -> Tensor:
    """The first test images, standardised."""
    content = bench.content
    levels = load_images_for(content, content.dataset, data_dir).test[:num_images]
    torch.manual_seed(bench.options.seed)
    return scaler_of(content).encode(from_uint8(levels)).to(bench.device)


def decoded(bench: Bench, rows: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: scaler_of(bench.content).decode(images) for name, images in rows.items()}


def no_noise(bench: Bench) -> dict[str, Tensor]:
    """All chains of means end at the same image, which is empty."""
    rows = {
        "unchanged": sample(bench, bench.process, "unchanged"),
        "no noise": sample(bench, broken(NoNoise, bench), "no noise"),
    }
    rows = decoded(bench, rows)
    for name, images in rows.items():
        print(f"{name}: {(images > 0).float().mean():.1%} of the pixels are bright")
    return rows


def fixed_variance(bench: Bench, num_images: int, data_dir: str | None) -> dict[str, Tensor]:
    """The bound becomes clearly worse; the samples hardly change."""
    x0, rows = load_x0(bench, num_images, data_dir), {}
    fixed = broken(FixedVariance, bench)
    for name, process in {"unchanged": bench.process, "fixed variance": fixed}.items():
        torch.manual_seed(bench.options.seed)
        num_terms = min(50, process.num_timesteps - 1)
        bits = process.bits_per_dim(bench.model, x0, num_terms).total
        gain = k_minus_null(bits, x0.shape[1])
        error = gain.std() / math.sqrt(len(gain))
        print(f"{name}: K - L_null = {gain.mean():.3f} ± {error:.3f} bits per pixel")
        rows[name] = sample(bench, process, name)
    return decoded(bench, rows)


def late_evidence(bench: Bench, num_images: int, data_dir: str | None) -> dict[str, Tensor]:
    """The missing half can match the known half only if every step sees the known half."""
    count = bench.options.num_samples
    x0 = load_x0(bench, max(num_images, count), data_dir)
    missing = read_mask("left", x0.shape[-2], x0.shape[-1]).to(x0.device)
    nothing = x0, torch.full_like(x0, torch.inf)
    evidence = x0, torch.where(missing, torch.inf, 0.0).expand_as(x0)
    rows = {
        "the image": x0,
        "in every step": sample(bench, bench.process, "in every step", evidence),
        "at the end": torch.where(missing, sample(bench, bench.process, "late", nothing), x0),
    }
    for name, images in rows.items():
        print(f"{name}: correlation of the pixels on both sides of the seam {seam(images):.2f}")
    return {name: images[:count] for name, images in decoded(bench, rows).items()}


def seam(images: Tensor) -> float:
    """The correlation of the last missing with the first known column, over all images and rows."""
    half = images.shape[-1] // 2
    columns = torch.stack([images[..., half - 1].flatten(), images[..., half].flatten()])
    return torch.corrcoef(columns.float())[0, 1].item()


if __name__ == "__main__":
    cli.run(main)
