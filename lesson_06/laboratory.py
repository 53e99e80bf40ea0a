"""Figures 3, 5 and 6 and Table 2 of Song et al. 2021, from a trained network."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from common import checkpoint, cli, lessons, mnist
from common.device import Precision, autocast, pick_device
from common.errors import UserError
from common.images import from_uint8, save_plot, save_rows
from common.run import check
from lesson_05.ddpm import DDPM, Network
from lesson_05.guidance import in_turn
from lesson_06.ddim import (
    Spacing,
    check_eta,
    ddim_encode,
    ddim_sample,
    ddim_timesteps,
    slerp,
)
from lesson_06.sample_ddim import SHIPPED, check_prompts, plan

Figure = Literal["eta", "consistency", "interpolation", "reconstruction"]


def main(
    figure: Figure,
    model_checkpoint: str = SHIPPED,
    prompts: list[str] | None = None,
    num_samples: int = 8,
    steps: list[int] | None = None,
    etas: list[float] | None = None,
    spacing: Spacing = "uniform",
    dataset: mnist.Dataset = "auto",
    data_dir: str | None = None,
    output_dir: str | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: Precision = "auto",
    sha256: str | None = None,
) -> None:
    """Make one figure of the paper with a trained network: FIGURE.png.

    Args:
        figure: eta, samples for each S and η from the same noise [Song21 Figure 3, Table 1],
            the pictures alone; consistency, the same noise for each S [Figure 5]; interpolation,
            between two noises [Figure 6]; reconstruction, test images encoded and decoded, for
            each S [Table 2].
        model_checkpoint: a file, or an http(s) address; the shipped text-to-image model if not
            given.
        prompts: what to draw, one prompt for each noise, in turn; unconditional unless given.
        num_samples: how many noises, pairs of noises, or test images.
        steps: each S to try; 10 20 50 100 (200) unless given, 50 for the interpolation.
        etas: each η to try, for figure eta; 0 0.2 0.5 1 unless given. σ̂ comes in addition.
        spacing: of the S steps among the T; uniform, quadratic or trailing.
        dataset: whose test images; auto is MNIST or, failing that, scikit-learn's digits.
        data_dir: folder of the data in torchvision's layout; else $DIFFUSION_DATA, else data/.
        output_dir: folder of the picture; output/ in this lesson's folder unless given.
        seed: of the noise.
        device: auto, cpu, cuda, cuda:1, mps.
        precision: of the network's arithmetic; auto is bfloat16 where the hardware has it.
        sha256: refuse a file with another sum.
    """
    check(lambda value: value >= 1, "at least 1", num_samples=num_samples)
    place = pick_device(device)
    process, model, content = lessons.load(model_checkpoint, sha256)
    check_prompts(model, prompts, 1.0, f"{model_checkpoint} ({content['lesson']})")
    draw, default_steps = FIGURES[figure]
    steps = default_steps if steps is None else steps
    etas = [0.0, 0.2, 0.5, 1.0] if etas is None else etas
    if not steps:
        raise UserError("steps is empty: name at least one S")
    for num_steps in steps:
        ddim_timesteps(process.num_timesteps, num_steps, spacing)
    for eta in etas:
        check_eta(eta)
    config = content["config"]["network"]
    shape = (config["image_channels"], config["image_size"], config["image_size"])
    x0 = None
    if figure == "reconstruction":
        x0 = test_images(dataset, data_dir, num_samples, shape).to(place)
    folder = Path(output_dir) if output_dir else Path(__file__).parent / "output"
    checkpoint.make_folder(folder)

    torch.manual_seed(seed)
    noise = torch.randn(2, num_samples, *shape, device=place)
    process, model = process.to(place), model.to(place)
    if prompts is not None:
        prompts = in_turn(prompts, num_samples, "prompts")
    repeats = {"eta": len(etas) + 1, "reconstruction": 2}.get(figure, 1)
    with (
        autocast(place, precision),
        torch.no_grad(),
        tqdm(total=repeats * sum(steps), unit="step", desc=figure) as bar,
    ):
        bench = Bench(process, model, prompts, spacing, bar)
        draw(bench, folder / figure, noise, steps, etas, x0)
    print(f"{folder / figure}.png")


def test_images(
    dataset: mnist.Dataset, data_dir: str | None, count: int, shape: tuple[int, int, int]
) -> Tensor:
    data = mnist.load(dataset, data_dir)
    if data.shape != shape or count > len(data.test):
        raise UserError(
            f"{data}: {count} test images of {'x'.join(map(str, shape))} are wanted, as the "
            "checkpoint's; change --dataset or --num_samples"
        )
    return from_uint8(data.test[:count])


@dataclass
class Bench:
    """A trained network, what it is asked for, and a bar that counts the steps."""

    process: DDPM
    model: Any
    prompts: list[str] | None
    spacing: Spacing
    bar: tqdm

    def network(self, images: Tensor) -> Network:
        """The network for these images: for the first prompt as many as there are for each."""
        prompts = self.prompts
        if prompts is not None:
            prompts = [p for p in prompts for _ in range(len(images) // len(prompts))]
        tasks = plan(self.model, prompts, 1.0, len(images), unconditional=prompts is None)
        (task,) = tasks.values()
        return task.bind(task.conditions.to(images.device))

    def sample(self, x_T: Tensor, num_steps: int, **options: Any) -> Tensor:
        return ddim_sample(
            self.network(x_T),
            self.process,
            x_T,
            num_steps,
            spacing=self.spacing,
            on_step=lambda s, xs: self.bar.update() and None,
            **options,
        )

    def encode(self, x0: Tensor, num_steps: int) -> Tensor:
        return ddim_encode(
            self.network(x0),
            self.process,
            x0,
            num_steps,
            self.spacing,
            on_step=lambda t, xt: self.bar.update() and None,
        )


def draw_eta(
    bench: Bench, name: Path, noise: Tensor, steps: Sequence[int], etas: Sequence[float], *_: object
) -> None:
    """Samples for each η, then for σ̂, and each S, always from the same x_T
    [Song21 Section 5.1]."""
    x_T, _ = noise
    rows = {}
    for eta in etas:
        for S in steps:
            rows[f"η = {eta:g}, S = {S}"] = bench.sample(x_T, S, eta=eta)
    for S in steps:
        rows[f"σ̂, S = {S}"] = bench.sample(x_T, S, eta=1.0, sigma_hat=True)
    save_rows(name.with_suffix(".png"), rows)


def draw_consistency(
    bench: Bench, name: Path, noise: Tensor, steps: Sequence[int], *_: object
) -> None:
    """Samples from the same x_T for each S, and how far they are from those of the largest
    [Song21 Section 5.2]."""
    x_T, _ = noise
    images = {S: bench.sample(x_T, S) for S in sorted(steps)}
    best = images[max(steps)]
    for S, x0 in images.items():
        gap = distance(x0, best)
        bench.bar.write(f"S = {S}: mean squared distance from S = {max(steps)} {gap:.5f}")
    save_rows(name.with_suffix(".png"), {f"S = {S}": x0 for S, x0 in images.items()})


def draw_interpolation(
    bench: Bench, name: Path, noise: Tensor, steps: Sequence[int], *_: object
) -> None:
    """A row for each pair of noises: samples of eleven points on the arc between them
    [Song21 Section 5.3]."""
    x, y = noise
    x_T = torch.stack([slerp(x, y, k / 10) for k in range(11)], dim=1)  # (pairs, 11, C, H, W)
    rows: dict[str, Tensor] = {}
    for S in steps:
        images = bench.sample(x_T.flatten(0, 1), S).unflatten(0, x_T.shape[:2])
        rows |= {f"pair {k + 1}, S = {S}": row for k, row in enumerate(images)}
    save_rows(name.with_suffix(".png"), rows)


def draw_reconstruction(
    bench: Bench, name: Path, _: object, steps: Sequence[int], __: object, x0: Tensor
) -> None:
    """Test images, what comes back of them after encoding and decoding in S steps each way, and
    the mean squared error for each value of each pixel, in [0, 1] [Song21 Section 5.4]."""
    rows: dict[str, Tensor] = {"test images": x0}
    errors: list[float] = []
    for S in sorted(steps):
        decoded = bench.sample(bench.encode(x0, S), S)
        rows[f"S = {S}"] = decoded
        errors.append(distance(decoded, x0))
        bench.bar.write(f"S = {S}: reconstruction error {errors[-1]:.5f}")
    save_rows(name.with_suffix(".png"), rows)
    curve = {"encoded, then decoded, in S steps each": (sorted(steps), errors)}
    save_plot(
        name.with_name("reconstruction_error.png"),
        curve,
        "S",
        "mean squared error, pixels in [0, 1]",
        "Reconstruction error against the number of steps",
    )


def distance(one: Tensor, other: Tensor) -> float:
    """Mean squared difference of images, each clipped and brought to [0, 1]."""
    one, other = (image.clamp(-1, 1) / 2 for image in (one, other))
    return (one - other).square().mean().item()


# What draws each figure, and for which S unless told.
FIGURES: dict[Figure, tuple[Callable[..., None], list[int]]] = {
    "eta": (draw_eta, [10, 20, 50, 100]),
    "consistency": (draw_consistency, [10, 20, 50, 100, 200]),
    "interpolation": (draw_interpolation, [50]),
    "reconstruction": (draw_reconstruction, [10, 20, 50, 100, 200]),
}


if __name__ == "__main__":
    cli.run(main)
