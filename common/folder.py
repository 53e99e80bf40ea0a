"""One's own images: `--dataset folder --data_dir DIR`, in the layout of torchvision's ImageFolder.

Each subfolder with PNG, JPEG or WebP files is a class; without subfolders all images are one class.
The decoded images are kept in the user's cache, under a name made from the content of all files, so
that the next start decodes nothing.
"""

import contextlib
import json
import math
import os
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn

from common import checkpoint, distributed
from common.checkpoint import MAX_SIZES, Checkpoint
from common.errors import UserError, one_line
from common.files import cached, expand, file_sha256, make_folder
from common.pixels import read_image

import numpy as np
import torch
from tqdm import tqdm

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
SEED = 0  # of the choice of the images that are held out
LESSON = "common.folder"  # what a file in the cache calls itself
Size = Sequence[int] | None  # (H, W), or None to keep that of the files


class Files(NamedTuple):
    """The image files of a folder in random order, the last ones of them held out."""

    classes: list[str]
    paths: list[Path]
    labels: list[int]
    num_train: int


def read_folder(data_dir: str | Path | None, size: Size, channels: int | None) -> Checkpoint:
    """The images of a folder, decoded or from the cache.

    size: (H, W), which the images are resized to cover and then cropped to. channels: 1 or 3; if
    None, 3 if any image has colour.

    Its tensors are images, uint8 (N, C, H, W), and labels, int64 (N,). Its config has the names of
    the classes; num_train, after which the held-out images come; and a summary in words.
    """
    if not data_dir:
        raise UserError("name the folder of your images with --data_dir")
    folder = expand(data_dir)
    files = hold_out(find_files(folder))
    with ThreadPoolExecutor() as pool:
        hashes = pool.map(sum_of, files.paths)
        bar = tqdm(hashes, "checking files", len(files.paths), leave=False, disable=None)
        sums = list(bar)
    names = [os.path.relpath(path, folder) for path in files.paths]
    key = [1, size, channels, names, sums, *files._replace(paths=[])]
    path = cached(f"folder:{json.dumps(key)}")
    path = path.parent / "images" / path.name
    content = from_cache(path) or decode(folder, files, size, channels)
    if not content.source:
        keep(path, content)
    if distributed.rank() == 0:
        text = f"{folder}: {content.config['summary']}"
        print(textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False), flush=True)
    return replace(content, sha256=checkpoint.digest(content.tensors))


def find_files(folder: Path) -> dict[str, list[Path]]:
    """The image files of each class by its name, in order, without hidden ones. Links to folders
    are followed only if they are classes themselves, so that no circle does harm."""

    def refuse(error: OSError) -> NoReturn:
        raise UserError(f"--data_dir {error.filename} cannot be read ({error.strerror})")

    def images(paths: list[Path]) -> list[Path]:
        shown = (p for p in paths if not any(s[0] == "." for s in p.relative_to(folder).parts))
        return sorted(path for path in shown if path.suffix.lower() in SUFFIXES)

    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        refuse(error)
    classes = {}
    for top in entries:
        if top.is_dir() and not folder.resolve().is_relative_to(top.resolve()):
            walk = os.walk(top, onerror=refuse)
            classes[top.name] = images(
                [Path(root, name) for root, _, names in walk for name in names]
            )
    classes = {name: paths for name, paths in classes.items() if paths}
    outside = images([path for path in entries if not path.is_dir()])
    if classes and outside:
        print(
            f"Images beside the subfolders, which are the classes, are not used: {len(outside):,}"
        )
    return classes or {folder.resolve().name: outside}


def hold_out(classes: dict[str, list[Path]]) -> Files:
    """Hold out a tenth of each class, rounded down, but at least one image in all."""
    paths = [path for files in classes.values() for path in files]
    labels = torch.tensor([k for k, files in enumerate(classes.values()) for _ in files])
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(SEED))
    groups = [order[labels[order] == k] for k in range(len(classes))]
    held_out = torch.cat([group[: len(group) // 10] for group in groups])
    if not len(held_out):
        held_out = max(groups, key=len)[:1]
    is_test = torch.isin(order, held_out)
    order = torch.cat([order[~is_test], order[is_test]])
    names = [one_line(name, 100) for name in classes]
    return Files(names, [paths[k] for k in order], labels[order].tolist(), int((~is_test).sum()))


def sum_of(path: Path) -> str:
    """The sha256 of a file, or "" if it cannot be read."""
    with contextlib.suppress(OSError):
        return file_sha256(path) if path.is_file() else ""
    return ""


def from_cache(path: Path) -> Checkpoint | None:
    """The images kept there, checked, or None."""
    if path.exists():
        with contextlib.suppress(UserError):
            content = checkpoint.load(path, LESSON)
            with content.must_fit():
                images, labels = content.tensors["images"], content.tensors["labels"]
                kinds = images.dtype, images.ndim, labels.dtype
                counts = len(images) == len(labels) > content.config["num_train"] > 0
                if kinds == (torch.uint8, 4, torch.int64) and counts and content.classes:
                    return content
        print(f"{path} is damaged: the images are decoded again", flush=True)
    return None


def keep(path: Path, content: Checkpoint) -> None:
    """Write the images to the cache, if that is possible."""
    try:
        make_folder(path.parent, "XDG_CACHE_HOME")
        path.parent.chmod(0o700)  # the images may be private
        checkpoint.save(path, content)
        print(f"Kept for the next start: {path} ({path.stat().st_size / 1e6:,.1f} MB)")
    except UserError as error:
        print(f"{error}; the next start must decode the images again")


def decode(folder: Path, files: Files, size: Size, channels: int | None) -> Checkpoint:
    """What read_folder returns, from the files."""
    skipped, used, images, colour = Counter[str](), list[int](), np.empty(0), False
    for number, levels in enumerate(decoded(files.paths, size, channels)):
        if isinstance(levels, str):
            skipped[levels] += 1
            continue
        if not used:
            images = reserve(len(files.paths), levels.shape)
        if levels.shape != images.shape[1:]:
            one, other = ("x".join(map(str, image.shape[1:])) for image in (images[0], levels))
            raise UserError(
                f"the images in {folder} differ in size, such as {one} and {other} (height x "
                "width): give --image_size, for instance --image_size 64"
            )
        images[len(used)] = levels
        used.append(number)
        colour = colour or bool((levels != levels[:1]).any())
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
    if len(used) < 2:
        raise UserError(
            f"{folder} has too few images, {len(used)} (skipped: {reasons or 'none'}): two or more "
            "PNG, JPEG or WebP files are needed"
        )
    images = images[: len(used)] if channels or colour else images[: len(used), :1].copy()
    present, labels = torch.tensor([files.labels[k] for k in used]).unique(return_inverse=True)
    num_train = min(max(sum(k < files.num_train for k in used), 1), len(used) - 1)
    classes = [files.classes[k] for k in present]
    summary = f"{len(used):,} images; classes: {textwrap.shorten(', '.join(classes), 80)}; "
    summary += f"skipped: {reasons or 'none'}; held out: {len(used) - num_train:,}, a tenth of "
    summary += f"each class, but at least one, by seed {SEED}"
    config = {"classes": classes, "num_train": num_train, "summary": summary}
    tensors = {"images": torch.from_numpy(images), "labels": labels}
    return Checkpoint(LESSON, config, "folder", 0, tensors)


def reserve(count: int, shape: tuple[int, ...]) -> np.ndarray:
    """Memory for the images, if there is enough."""
    needed, free = count * math.prod(shape), free_memory()
    text = f"{count:,} images of {'x'.join(map(str, shape))} take {needed / 1e6:,.1f} MB of memory"
    if needed > free or max(shape) > MAX_SIZES["image_size"]:
        raise UserError(f"{text}, of {free / 1e6:,.0f} MB that are free: give a lower --image_size")
    print(text, flush=True)
    return np.empty((count, *shape), np.uint8)


def free_memory() -> int:
    """Bytes of memory that a program can still take, as far as the system says."""
    free = 2**60
    with contextlib.suppress(AttributeError, OSError, ValueError):  # not on Windows
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError, IndexError):  # Linux
        free = 1024 * int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0])
    with contextlib.suppress(OSError, ValueError):  # the limit of a container
        limit, taken = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
        free = min(free, int(limit.read_text()) - int(taken.read_text()))
    return free


def decoded(paths: Sequence[Path], size: Size, channels: int | None) -> Iterator[np.ndarray | str]:
    """For each file its image or, in a word, why it is skipped; by several threads."""
    from PIL import Image

    Image.init()  # before several threads would
    read, workers = partial(read_image, size=size, channels=channels), os.cpu_count() or 1
    bar = tqdm(total=len(paths), desc="decoding", leave=False, disable=None)
    with bar, ThreadPoolExecutor(workers) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for first in range(0, len(paths), 4 * workers):  # so many images may wait to be stored
            for result in pool.map(read, paths[first : first + 4 * workers]):
                yield result
                bar.update()
