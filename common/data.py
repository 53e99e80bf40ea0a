"""Data sets and folders of images, held in memory as uint8, and shuffled batches of them.

Files in torchvision's layout are read from `--data_dir`; without it from $DIFFUSION_DATA; and if
that is not set either, from data/ at the root of the repository. Missing files are downloaded from
torchvision's addresses and checked against torchvision's checksums.
"""

import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from common import distributed, files
from common.checkpoint import Checkpoint
from common.errors import UserError, one_line
from common.folder import read_folder
from common.pixels import fit

import torch
from einops import rearrange, repeat
from torch import Tensor

Dataset = Literal["auto", "mnist", "fashion_mnist", "kmnist", "cifar10", "digits", "folder"]
TORCHVISION = {
    "mnist": "MNIST",
    "fashion_mnist": "FashionMNIST",
    "kmnist": "KMNIST",
    "cifar10": "CIFAR10",
}
DIGITS = tuple("0123456789")  # the classes of most data sets


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] to the levels 0..255, rounded; values outside are clipped. On the CPU."""
    return (images.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8).cpu()


def from_uint8(levels: Tensor) -> Tensor:
    """The levels 0..255 to [-1, 1], float32."""
    return levels.float() / 127.5 - 1


@dataclass(frozen=True)
class Images:
    """A data set: uint8 images (N, C, H, W) and int64 labels (N,), for training and for testing.

    classes: their names. sha256: of a folder's images; "" for a data set that everyone has.
    """

    name: str
    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    classes: Sequence[str] = DIGITS
    sha256: str = ""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        channels, height, width = self.train.shape[1:]
        return channels, height, width

    @property
    def channels(self) -> int:
        return self.shape[0]

    @property
    def size(self) -> list[int]:
        """[H, W]"""
        return [*self.shape[1:]]

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return (
            f"{self.name}: {len(self.train):,} training and {len(self.test):,} test images, {shape}"
        )


class Batches:
    """Batches of x0 in [-1, 1] and their labels, every epoch in a new order.

    `batches[step]`, for step from 1, depends only on the seed and the step, so that a resumed run
    gets the same batches. Images left over after an epoch's last full batch are dropped.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, batch_size: int, seed: int, device: torch.device
    ) -> None:
        if not 1 <= batch_size <= len(images):
            raise UserError(
                f"batch_size is {batch_size}: it must be from 1 to {len(images):,}, "
                "the number of training images"
            )
        self.images, self.labels = images.to(device), labels.to(device)
        self.batch_size, self.seed = batch_size, seed
        self.per_epoch = len(images) // batch_size
        self.epoch, self.order = -1, torch.empty(0)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        epoch, index = divmod(step - 1, self.per_epoch)
        if epoch != self.epoch:
            shuffle = torch.Generator().manual_seed((1_000_003 * self.seed + epoch) % 2**63)
            order = torch.randperm(len(self.images), generator=shuffle)
            self.epoch, self.order = epoch, order.to(self.images.device)
        chosen = self.order[index * self.batch_size : (index + 1) * self.batch_size]
        return from_uint8(self.images[chosen]), self.labels[chosen]


def load_images(
    dataset: str = "auto",
    data_dir: str | Path | None = None,
    size: Sequence[int] | None = None,
    channels: int | None = None,
) -> Images:
    """The data set by name; "auto" is MNIST, or scikit-learn's digits if it is not available.

    size (H, W) and channels, if given, are what its images are brought to.
    """
    with distributed.one_first():
        if dataset == "folder":
            return from_folder(data_dir, size, channels)
        data = find_images(dataset, data_dir)
    if (size is None or [*size] == data.size) and channels in (None, data.channels):
        return data
    train, test = (fit(images, size, channels) for images in (data.train, data.test))
    return replace(data, train=train, test=test)


def load_images_for(content: Checkpoint, dataset: str, data_dir: str | Path | None) -> Images:
    """The data set by name, in the shape of the images that a checkpoint's network is for. "auto"
    is the data set that it was trained on, for MNIST as in load_images."""
    if dataset == "auto" and content.dataset != "mnist":
        dataset = content.dataset
    channels, *size = content.image_shape
    resized = dataset in ("folder", content.dataset)  # another data set is probably a mistake
    data = load_images(dataset, data_dir, *((size, channels) if resized else ()))
    if data.shape != content.image_shape:
        raise UserError(f"{content.source} was not trained on images like {data}: change --dataset")
    return data


def from_folder(
    data_dir: str | Path | None, size: Sequence[int] | None, channels: int | None
) -> Images:
    """A folder of one's own images."""
    content = read_folder(data_dir, size, channels)
    edges = [content.config["num_train"]]
    train, test = content.tensors["images"].tensor_split(edges)
    train_labels, test_labels = content.tensors["labels"].tensor_split(edges)
    return Images("folder", train, train_labels, test, test_labels, content.classes, content.sha256)


def find_images(dataset: str, data_dir: str | Path | None) -> Images:
    default = Path(__file__).resolve().parent.parent / "data"
    folder = Path(data_dir or os.environ.get("DIFFUSION_DATA") or default).expanduser()
    if dataset == "digits":
        return digits()
    try:
        return from_torchvision("mnist" if dataset == "auto" else dataset, folder)
    except Unavailable as reason:
        if dataset != "auto":
            raise UserError(
                f"{dataset} is not in {folder} and could not be downloaded ({reason}): "
                "put its files there, or name their folder with --data_dir or DIFFUSION_DATA"
            ) from None
        paragraph = (
            f"MNIST is not in {folder} and could not be downloaded ({reason}). Training on the "
            "handwritten digits that come with scikit-learn instead: 1,797 of them, 8x8 pixels, "
            "enlarged to 28x28. They are few and coarse, so samples will be coarse. For MNIST, "
            "put its files into a folder and name it with --data_dir or DIFFUSION_DATA."
        )
        print(textwrap.fill(paragraph, 100), flush=True)
        return digits()


class Unavailable(Exception):
    """The data set is not on disk and no mirror has it."""


def from_torchvision(name: str, folder: Path) -> Images:
    from torchvision import datasets

    if name not in TORCHVISION:
        known = ", ".join([*TORCHVISION, "digits"])
        raise UserError(f"dataset {name!r} is not known: choose {known} or folder")
    kind = getattr(datasets, TORCHVISION[name])
    if not is_complete(kind, folder):
        print(f"Downloading {name} into {folder}", flush=True)
        download(kind, folder)
    data = Images(name, *read_images(kind, folder, True), *read_images(kind, folder, False))
    if data.train.shape[1:] != data.test.shape[1:]:
        raise UserError(f"training and test images of {name} in {folder} differ in size")
    return data


def is_complete(kind: Any, folder: Path) -> bool:
    """Whether all files of a torchvision data set exist; they may be damaged."""
    if hasattr(kind, "base_folder"):
        return (folder / kind.base_folder).is_dir()
    raw = folder / kind.__name__ / "raw"
    return all((raw / Path(name).stem).is_file() for name, _ in kind.resources)


def read_images(kind: Any, folder: Path, train: bool) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, C, H, W) and labels (N,)."""
    try:
        part = kind(str(folder), train=train)
        images, labels = torch.as_tensor(part.data), torch.as_tensor(part.targets)
        images = images[:, None] if images.ndim == 3 else rearrange(images, "n h w c -> n c h w")
        if not len(images) == len(labels) > 0:
            raise ValueError(f"{len(images)} images, {len(labels)} labels")
        if not images.numel():
            raise ValueError("the images have no pixels")
        if not 0 <= labels.min() <= labels.max() < len(DIGITS):
            raise ValueError(f"a label is not from 0 to {len(DIGITS) - 1}")
    except Exception as error:  # torchvision's parsers fail in many ways
        reason = one_line(error, 200).split(". ")[0]
        raise UserError(
            f"a file of {kind.__name__} in {folder} is damaged or cannot be read ({reason}): "
            "remove it, and it is downloaded again, or name another --data_dir"
        ) from None
    return images, labels


def download(kind: Any, folder: Path) -> None:
    """Download the archives of a data set, each from one mirror after the other, and unpack them.
    Those that are there already are only unpacked."""
    from torchvision.datasets.utils import check_integrity

    def check(file: Path) -> None:
        if not check_integrity(str(file), md5):
            raise ValueError("its checksum is wrong")

    for path, addresses, md5 in archives(kind, folder):
        reasons: list[str] = []
        while not (path.is_file() and check_integrity(str(path), md5)):
            if len(reasons) == len(addresses):
                raise Unavailable("; ".join(dict.fromkeys(reasons)))
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                files.download(addresses[len(reasons)], path, check)
            except (UserError, OSError) as error:
                reasons.append(one_line(error, 200))
    try:
        kind(str(folder), download=True)
    except (OSError, RuntimeError) as error:
        raise Unavailable(one_line(error, 200)) from None


def archives(kind: Any, folder: Path) -> list[tuple[Path, list[str], str]]:
    """Where torchvision looks for each archive of a data set, its addresses, and its checksum."""
    if hasattr(kind, "base_folder"):
        return [(folder / kind.filename, [kind.url], kind.tgz_md5)]
    raw = folder / kind.__name__ / "raw"
    names = kind.resources
    return [
        (raw / name, [f"{mirror}{name}" for mirror in kind.mirrors], md5) for name, md5 in names
    ]


def digits() -> Images:
    """1,797 digits of 8x8 pixels, enlarged three times, padded to 28x28, and scaled to 8 bits."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    levels = torch.from_numpy(bunch.images * (255 / 16)).round().to(torch.uint8)
    large = repeat(levels, "n h w -> n 1 (h three_h) (w three_w)", three_h=3, three_w=3)
    images = torch.nn.functional.pad(large, (2, 2, 2, 2))
    labels = torch.from_numpy(bunch.target)
    return Images("digits", images[:-297], labels[:-297], images[-297:], labels[-297:])
