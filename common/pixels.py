"""Image files as 8-bit levels, through PIL."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


def read_image(path: Path, size: Sequence[int] | None, channels: int | None) -> np.ndarray | str:
    """A file's image, uint8 (C, H, W), or in a word why it is skipped."""
    from PIL import Image, ImageOps

    try:
        if not path.is_file() or path.stat().st_size == 0:
            return "empty" if path.is_file() else "broken"
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
            if getattr(image, "is_animated", False) and image.format != "MPO":
                return "animated"  # an MPO is a photograph with a preview
            if size:  # a JPEG of many times the size is decoded at half its size or less: quicker
                image.draft(image.mode, (2 * max(size), 2 * max(size)))
            upright: Image.Image = image
            with contextlib.suppress(Exception):  # its orientation may be damaged
                upright = ImageOps.exif_transpose(image)
            return levels(upright, size, channels)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return "too large"
    except Exception:  # a damaged file fails in many ways
        return "broken"


def levels(image: "Image", size: Sequence[int] | None, channels: int | None) -> np.ndarray:
    """An image as uint8 (C, H, W), C = 3 unless channels is 1. It is resized, without aliasing, to
    cover size = (H, W), and cropped to its middle. What is transparent becomes black."""
    from PIL import Image, ImageOps

    if image.mode.startswith("I"):  # 16 bits
        image = Image.fromarray(((np.asarray(image).astype(int) + 128) // 257).astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    if size:
        image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BICUBIC)
    return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)


def fit(images: Tensor, size: Sequence[int] | None, channels: int | None) -> Tensor:
    """Images of 8-bit levels (N, C, H, W) in another size or number of channels; None keeps it."""
    from PIL import Image

    arrays = images.permute(0, 2, 3, 1).squeeze(-1).numpy()
    number = channels or images.shape[1]
    pictures = [levels(Image.fromarray(array), size, number) for array in arrays]
    return torch.from_numpy(np.stack(pictures))
