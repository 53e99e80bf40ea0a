"""Draw samples from a trained network in batches, with a progress bar."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from common.device import autocast, pick_device
from common.errors import UserError
from common.files import output_folder
from common.options import PictureOptions, ScriptOptions
from common.pictures import save_gif, save_grid, save_images, save_npz

import torch
from torch import Tensor
from tqdm import tqdm

BATCH_SIZE, MAX_PIXELS = 64, 64 * 32 * 32  # of a batch: 16 images of 64x64, one of 256x256
NUM_FRAMES = 60
Shape = tuple[int, int, int]
Trajectory = Callable[..., Iterator[tuple[int, Tensor]]]


class Samples(NamedTuple):
    """images (N, C, H, W) in [-1, 1]; frames: the first 16 of them from noise to image."""

    images: Tensor
    frames: list[Tensor]


@contextmanager
def inference(options: ScriptOptions, lesson: str) -> Iterator[tuple[Path, torch.device]]:
    """Set up a script that samples a trained network: yields the output folder and the device, and
    sets the seed. Inside, gradients are off and --precision applies."""
    device = pick_device(options.device)
    folder = output_folder(options.output_dir, lesson)
    torch.manual_seed(options.seed)
    with autocast(device, options.precision), torch.no_grad():
        yield folder, device


@torch.no_grad()
def draw_samples(
    trajectory: Trajectory,
    num_samples: int,
    shape: Shape,
    num_steps: int,
    device: torch.device,
    conditions: Tensor | None = None,
    picture: Path | None = None,
) -> Samples:
    """Draw samples, 64 at a time or fewer of large images, and move them to the CPU.

    Args:
        trajectory: trajectory(x_T) yields (t, xt) for each of num_steps steps, the image last.
            With conditions it is called as trajectory(x_T, conditions of this batch).
        num_samples: N.
        shape: (C, H, W).
        num_steps: steps of a trajectory.
        device: device of the noise x_T.
        conditions: (N, ...), labels or tokens, one for each sample.
        picture: a file for the samples so far, written after each batch but the last.
    """
    images, frames = [], []
    batch_size = max(1, min(BATCH_SIZE, MAX_PIXELS // (shape[1] * shape[2])))
    shown = {round(num_steps * k / NUM_FRAMES) for k in range(1, NUM_FRAMES + 1)}
    num_batches = -(-num_samples // batch_size)
    with tqdm(total=num_batches * num_steps, unit="step", desc="sampling", disable=None) as bar:
        for first in range(0, num_samples, batch_size):
            rows = slice(first, min(first + batch_size, num_samples))
            x_T = torch.randn(rows.stop - first, *shape, device=device)
            if first == 0:
                frames.append(x_T[:16].cpu())
            condition = () if conditions is None else (conditions[rows].to(device),)
            for step, (_, xt) in enumerate(trajectory(x_T, *condition), 1):
                bar.update()
                if first == 0 and step in shown:
                    frames.append(xt[:16].cpu())
            images.append(check_finite(xt).cpu())
            if picture and rows.stop < num_samples:
                save_grid(picture, torch.cat(images))
    return Samples(torch.cat(images), frames)


def check_finite(values: Tensor) -> Tensor:
    """The values, samples or a bound, if all are finite. Other samples would be drawn black."""
    if not values.isfinite().all():
        raise UserError(
            "the network's output is not finite: its weights are broken, or a flag is too extreme"
        )
    return values


def last_images(trajectory: Iterable[tuple[int, Tensor]]) -> Tensor:
    """The images (B, C, H, W) at the end of a trajectory, of which only one step is in memory."""
    for _, xt in trajectory:
        images = xt
    return images


def save_samples(folder: Path, samples: Samples, options: PictureOptions) -> None:
    """Save samples.png, and reverse.gif and reverse.png, from noise to image."""
    save_named(folder / "samples", samples.images, options)
    save_gif(folder / "reverse.gif", samples.frames, 4, options.scale, options.fps)
    every = max(len(samples.frames) // 10, 1)
    strip = torch.stack(samples.frames[::every], 1)[:4]  # 4 images, at about 11 times each
    save_grid(folder / "reverse.png", strip.flatten(0, 1), strip.shape[1], options.scale)


def save_named(path: Path, images: Tensor, options: PictureOptions) -> None:
    """Save a grid as path.png; by the flags also path.npz, and single images in a folder."""
    save_grid(path.with_suffix(".png"), images, scale=options.scale)
    if options.save_npz:
        save_npz(path.with_suffix(".npz"), images)
    if options.save_png:
        save_images(path, images)
