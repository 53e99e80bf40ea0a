"""Figures 3, 5 and 6 and Table 2 of Song et al. 2021, from a trained network."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common import cli, lessons
from common.checkpoint import Checkpoint
from common.data import from_uint8, load_images_for
from common.errors import UserError, check_at_least
from common.options import CheckpointOptions, DataOptions
from common.pictures import save_plot, save_rows
from common.sampling import check_finite, inference, last_images
from lesson_05.ddpm import DDPM, Network
from lesson_05.guidance import one_per_sample
from lesson_06.ddim import (
    Spacing,
    check_eta,
    ddim_encode_trajectory,
    ddim_timesteps,
    ddim_trajectory,
    slerp,
)
from lesson_06.sample_ddim import SHIPPED, SamplePlan, check_prompts, plan_samples

import torch
from torch import Tensor
from tqdm import tqdm

Figure = Literal["eta", "consistency", "interpolation", "reconstruction"]
DEFAULT_STEPS: dict[Figure, list[int]] = {
    "eta": [10, 20, 50, 100],
    "consistency": [10, 20, 50, 100, 200],
    "interpolation": [50],
    "reconstruction": [10, 20, 50, 100, 200],
}


@dataclass
class Options(CheckpointOptions, DataOptions):
    """A trained network, and test images to encode.

    Args:
        num_samples: number of noises, pairs of noises, or test images.
    """

    model_checkpoint: str = SHIPPED
    num_samples: int = 8


def main(
    figure: Figure,
    prompts: list[str] | None = None,
    steps: list[int] | None = None,
    etas: list[float] | None = None,
    spacing: Spacing = "uniform",
    options: Options = Options(),
) -> None:
    """Make one figure of the paper with a trained network: FIGURE.png.

    Args:
        figure: eta, samples from the same noise for each η and S, without Table 1's scores [Song21
            Figure 3, Table 1]; consistency, samples from the same noise for each S [Figure 5];
            interpolation, samples between two noises [Figure 6]; reconstruction, test images
            encoded and decoded, for each S [Table 2].
        prompts: one for each noise, repeated in order; samples are unconditional unless given.
        steps: values of S; 10 20 50 100 (200) unless given, 50 for the interpolation.
        etas: values of η for the figure eta; 0 0.2 0.5 1 unless given. σ̂ is always added.
        spacing: spacing of the S times in 1..T; uniform, quadratic or trailing.
    """
    check_at_least(1, num_samples=options.num_samples)
    process, model, content = lessons.load(options.model_checkpoint, options.sha256)
    check_prompts(model, prompts, 1.0, f"{options.model_checkpoint} ({content.lesson})")
    steps = DEFAULT_STEPS[figure] if steps is None else steps
    etas = [0.0, 0.2, 0.5, 1.0] if etas is None else etas
    if not etas:
        raise UserError("etas is empty: name at least one η")
    if not steps:
        raise UserError("steps is empty: name at least one S")
    for num_steps in steps:
        ddim_timesteps(process.num_timesteps, num_steps, spacing)
    for eta in etas:
        check_eta(eta)
    if prompts is not None:
        prompts = one_per_sample(prompts, options.num_samples, "prompts")
    (plan,) = plan_samples(model, prompts, 1.0, options.num_samples, prompts is None).values()
    if figure == "reconstruction":
        x0 = test_images(options, content)

    with inference(options, "lesson_06") as (folder, device):
        x_T, other = torch.randn(2, options.num_samples, *content.image_shape, device=device)
        laboratory = Laboratory(process.to(device), model.to(device), plan, spacing)
        if figure == "eta":
            rows = draw_eta(laboratory, x_T, steps, etas)
        elif figure == "consistency":
            rows = draw_consistency(laboratory, x_T, steps)
        elif figure == "interpolation":
            rows = draw_interpolation(laboratory, x_T, other, steps)
        else:
            rows, errors = draw_reconstruction(laboratory, x0.to(device), steps)
            plot_errors(folder / "reconstruction_error.png", errors)
    save_rows(folder / f"{figure}.png", rows)
    print(f"{folder}/{figure}.png")


def test_images(options: Options, content: Checkpoint) -> Tensor:
    """The first test images (N, C, H, W)."""
    data = load_images_for(content, options.dataset, options.data_dir)
    if options.num_samples > len(data.test):
        raise UserError(
            f"{data}: the figure needs {options.num_samples} test images; lower --num_samples"
        )
    return from_uint8(data.test[: options.num_samples])


@dataclass
class Laboratory:
    """A trained network, the conditions of its samples, and the spacing of the steps."""

    process: DDPM
    model: Any
    plan: SamplePlan
    spacing: Spacing

    def network(self, num_images: int) -> Network:
        """The network for num_images images: each condition for equally many in a row."""
        conditions, guidance = self.plan
        if conditions is None:
            return self.model
        repeated = conditions.repeat_interleave(num_images // len(conditions), dim=0)
        return self.model.bind(repeated.to(self.process.device), guidance)

    def sample(self, x_T: Tensor, num_steps: int, **options: Any) -> Tensor:
        network, options = self.network(len(x_T)), {"spacing": self.spacing, **options}
        trajectory = ddim_trajectory(network, self.process, x_T, num_steps, **options)
        bar = tqdm(trajectory, f"S = {num_steps}", num_steps, leave=False, disable=None)
        return check_finite(last_images(bar))

    def encode(self, x0: Tensor, num_steps: int) -> Tensor:
        network = self.network(len(x0))
        trajectory = ddim_encode_trajectory(network, self.process, x0, num_steps, self.spacing)
        return last_images(
            tqdm(trajectory, f"S = {num_steps}, encoding", num_steps, leave=False, disable=None)
        )


def draw_eta(
    laboratory: Laboratory, x_T: Tensor, steps: Sequence[int], etas: Sequence[float]
) -> dict[str, Tensor]:
    """Samples for each η and each S, then for σ̂ and each S, from the same x_T
    [Song21 Section 5.1]."""
    rows = {}
    for eta in etas:
        for S in steps:
            rows[f"η = {eta:g}, S = {S}"] = laboratory.sample(x_T, S, eta=eta)
    for S in steps:
        rows[f"σ̂, S = {S}"] = laboratory.sample(x_T, S, eta=1.0, sigma_hat=True)
    return rows


def draw_consistency(
    laboratory: Laboratory, x_T: Tensor, steps: Sequence[int]
) -> dict[str, Tensor]:
    """Samples from the same x_T for each S, named by their mean squared distance from those of the
    largest S [Song21 Section 5.2]."""
    samples = {S: laboratory.sample(x_T, S) for S in sorted(steps)}
    best, rows = samples[max(steps)], {}
    for S, x0 in samples.items():
        distance = mean_squared_error(x0, best)
        print(f"S = {S}: mean squared distance from S = {max(steps)} {distance:.5f}")
        rows[f"S = {S}, distance {distance:.4f}"] = x0
    return rows


def draw_interpolation(
    laboratory: Laboratory, x: Tensor, y: Tensor, steps: Sequence[int]
) -> dict[str, Tensor]:
    """A row for each pair of noises: samples from eleven points on the arc between them
    [Song21 Section 5.3]."""
    x_T = torch.stack([slerp(x, y, k / 10) for k in range(11)], dim=1)  # (pairs, 11, C, H, W)
    rows: dict[str, Tensor] = {}
    for S in steps:
        images = laboratory.sample(x_T.flatten(0, 1), S).unflatten(0, x_T.shape[:2])
        rows |= {f"pair {k + 1}, S = {S}": row for k, row in enumerate(images)}
    return rows


def draw_reconstruction(
    laboratory: Laboratory, x0: Tensor, steps: Sequence[int]
) -> tuple[dict[str, Tensor], dict[int, float]]:
    """Test images, encoded and decoded in S steps each, and for each S the mean squared error per
    pixel, on the scale [0, 1] [Song21 Section 5.4]."""
    rows: dict[str, Tensor] = {"test images": x0}
    errors: dict[int, float] = {}
    for S in sorted(steps):
        rows[f"S = {S}"] = laboratory.sample(laboratory.encode(x0, S), S)
        errors[S] = mean_squared_error(rows[f"S = {S}"], x0)
        print(f"S = {S}: reconstruction error {errors[S]:.5f}")
    return rows, errors


def mean_squared_error(one: Tensor, other: Tensor) -> float:
    """The mean squared error per pixel of images clipped to [-1, 1], on the scale [0, 1]."""
    one, other = (image.clamp(-1, 1) / 2 for image in (one, other))
    return (one - other).square().mean().item()


def plot_errors(path: Path, errors: dict[int, float]) -> None:
    save_plot(
        path,
        {"encoded, then decoded, in S steps each": (list(errors), list(errors.values()))},
        "S",
        "mean squared error, pixels in [0, 1]",
        "Reconstruction error against the number of steps",
    )


if __name__ == "__main__":
    cli.run(main)
