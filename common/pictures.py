"""Pictures of batches of images: grids, GIFs, and curves of a training run.

Images are float (B, C, H, W) in [-1, 1] with one or three channels; values outside are clipped.
"""

import csv
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.data import to_uint8

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


def save_grid(path: Path, images: Tensor, columns: int = 8, scale: int = 2) -> None:
    """Save a PNG of the images, row by row, each pixel enlarged to scale x scale."""
    grid(images, columns, scale).save(path)


def save_rows(path: Path, rows: Mapping[str, Tensor]) -> None:
    """Save rows of images, all of one length, each with its name on the left."""
    images = list(rows.values())
    picture = grid(torch.cat(images), columns=len(images[0]), scale=2)
    figure = new_figure(picture.width / 100 + 1.5, picture.height / 100 + 0.1)
    axes = figure.subplots()
    axes.imshow(picture)
    height = picture.height / len(rows)
    axes.set_yticks([(k + 0.5) * height for k in range(len(rows))], list(rows))
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def save_gif(
    path: Path,
    frames: Sequence[Tensor],
    columns: int = 8,
    scale: int = 2,
    fps: float | None = None,
) -> None:
    """Save an animated grid, one frame per batch, of four seconds unless fps is given; the last one
    stays for a second and a half."""
    pictures = [grid(frame, columns, scale) for frame in frames]
    fps = len(pictures) / 4 if fps is None else fps
    milliseconds = max(20, round(1000 / fps))  # browsers show no more than 50 a second
    duration = [milliseconds] * len(pictures)
    duration[-1] = 1500
    pictures[0].save(
        path, save_all=True, append_images=pictures[1:], duration=duration, loop=0, optimize=True
    )


def grid(images: Tensor, columns: int, scale: int) -> "Image":
    from PIL import Image
    from torchvision.utils import make_grid

    # make_grid turns grey into three channels; the mid-grey border shows on any page.
    tiles = make_grid(to_uint8(images), nrow=columns, padding=1, pad_value=128)
    image = Image.fromarray(rearrange(tiles, "c h w -> h w c").numpy())
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def save_images(folder: Path, images: Tensor) -> None:
    """Save each image as a PNG of its own in a folder, in place of those of an earlier call."""
    from torchvision.transforms.functional import to_pil_image

    folder.mkdir(exist_ok=True)
    for old in folder.glob("[0-9]" * 5 + ".png"):
        old.unlink()
    for number, image in enumerate(to_uint8(images)):
        to_pil_image(image).save(folder / f"{number:05d}.png")


def save_npz(path: Path, images: Tensor) -> None:
    """Save the images as an array `samples`, uint8 (N, C, H, W)."""
    np.savez_compressed(path, samples=to_uint8(images).numpy())


def save_curves(path: Path, metrics: Path, columns: Sequence[str], title: str) -> None:
    """Plot columns of a metrics.csv against the training step, on a logarithmic axis."""
    curves = read_curves(metrics, columns)
    curves = {name.replace("_", " "): curve for name, curve in curves.items() if curve[0]}
    save_plot(path, curves, "training step", "mean squared error of the noise", title)


def read_curves(metrics: Path, columns: Sequence[str]) -> dict[str, tuple[list[int], list[float]]]:
    """Columns of a metrics.csv: name -> (steps, values). Cells that are no numbers are left out,
    since an edited file must not end a run; a file that cannot be read has none."""
    curves: dict[str, tuple[list[int], list[float]]] = {name: ([], []) for name in columns}
    with suppress(OSError, csv.Error), metrics.open(newline="", errors="replace") as file:
        for row in csv.DictReader(file):
            for name, (steps, values) in curves.items():
                with suppress(ValueError, TypeError, KeyError):
                    step, value = int(row["step"]), float(row[name])
                    steps.append(step)
                    values.append(value)
    return curves


def save_plot(
    path: Path,
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    xlabel: str,
    ylabel: str,
    title: str,
    yscale: str = "log",
) -> None:
    """Plot curves: name -> (x values, y values)."""
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    for name, (x, y) in curves.items():
        axes.plot(x, y, label=name, linewidth=1.2, marker="." if len(x) < 3 else None)
    axes.set(xlabel=xlabel, ylabel=ylabel, yscale=yscale)
    axes.set_title(title, fontsize=9, loc="left")
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)  # not on the curves
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure of this size in inches, without matplotlib's global state, which belongs
    to the reader's notebook."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
