"""MNIST and its relatives, whole in memory as uint8, and shuffled batches of them.

Files lie in torchvision's layout in `--data_dir`, else in $DIFFUSION_DATA, else in data/ at the
root of the repository. What is missing is downloaded from the places that torchvision knows, with
the sums that it knows.
"""

import os
import textwrap
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from einops import rearrange, repeat
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.mnist import read_image_file, read_label_file
from torchvision.datasets.utils import check_md5, extract_archive

from common import processes
from common.download import SILENCE, receive
from common.errors import UserError
from common.images import from_uint8

Dataset = Literal["auto", "mnist", "fashion_mnist", "kmnist", "cifar10", "digits"]
TORCHVISION = {
    "mnist": datasets.MNIST,
    "fashion_mnist": datasets.FashionMNIST,
    "kmnist": datasets.KMNIST,
    "cifar10": datasets.CIFAR10,
}
TIMEOUT = SILENCE
MOST_BYTES = 2**30  # of a file of images


@dataclass(frozen=True)
class Images:
    """A data set: uint8 images (N, C, H, W) and int64 labels (N,), for training and for testing."""

    name: str
    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    @property
    def channels(self) -> int:
        return self.train.shape[1]

    @property
    def size(self) -> int:
        return self.train.shape[2]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        return self.channels, self.size, self.size

    def __str__(self) -> str:
        shape = "x".join(map(str, self.train.shape[1:]))
        return (
            f"{self.name}: {len(self.train):,} training and {len(self.test):,} test images, {shape}"
        )


class Batches:
    """Batches of x0 in [-1, 1] and their labels, every epoch in a new order.

    `batches[step]`, for step from 1, depends on the seed and the step alone: a resumed run reads
    what it would have read. What is left of an epoch after its last full batch is dropped.
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
        epoch, place = divmod(step - 1, self.per_epoch)
        if epoch != self.epoch:
            shuffle = torch.Generator().manual_seed((1_000_003 * self.seed + epoch) % 2**63)
            order = torch.randperm(len(self.images), generator=shuffle)
            self.epoch, self.order = epoch, order.to(self.images.device)
        chosen = self.order[place * self.batch_size : (place + 1) * self.batch_size]
        return from_uint8(self.images[chosen]), self.labels[chosen]


def load(dataset: Dataset = "auto", data_dir: str | Path | None = None) -> Images:
    """The data set by name; "auto" is MNIST, or scikit-learn's digits where it cannot be had."""
    with processes.one_first():
        return found(dataset, data_dir)


def found(dataset: Dataset, data_dir: str | Path | None) -> Images:
    folder = Path(data_dir or os.environ.get("DIFFUSION_DATA") or default_folder()).expanduser()
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
            "enlarged to 28x28. They are few and coarse, and so will the samples be. For MNIST, "
            "put its files into a folder and name it with --data_dir or DIFFUSION_DATA."
        )
        print(textwrap.fill(paragraph, 100), flush=True)
        return digits()


class Unavailable(Exception):
    """The data set is not on disk and no mirror gave it."""


def default_folder() -> Path:
    return Path(__file__).resolve().parent.parent / "data"


def from_torchvision(name: str, folder: Path) -> Images:
    if name not in TORCHVISION:
        raise UserError(f"dataset {name!r} is not known: take {', '.join(TORCHVISION)} or digits")
    kind = TORCHVISION[name]
    if name == "cifar10":
        if not (folder / kind.base_folder).exists():
            download(name, folder)
        return cifar10(folder)
    raw = folder / kind.__name__ / "raw"
    files = [Path(resource).stem for resource, _ in kind.resources]
    if not all((raw / file).exists() for file in files):
        download(name, folder)
    train, train_labels, test, test_labels = (read_idx(raw / file) for file in files)
    for images, labels, file in [(train, train_labels, files[0]), (test, test_labels, files[2])]:
        if images.ndim != 3 or not len(images) == len(labels) > 0:
            raise damaged(raw / file, f"{len(images)} images, {len(labels)} labels")
        if not images.shape[1] == images.shape[2] == train.shape[2] > 0:
            raise damaged(raw / file, "images that are not square, or of several sizes")
    return Images(name, train[:, None], train_labels, test[:, None], test_labels)


def read_idx(path: Path) -> Tensor:
    read = read_image_file if "images" in path.name else read_label_file
    if not path.is_file() or path.stat().st_size > MOST_BYTES:
        raise UserError(f"{path} cannot be read (it is no file of images): mend it, or --data_dir")
    try:
        return read(str(path))
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): mend it, or --data_dir"
        ) from None
    except Exception as error:  # torchvision's parser fails in many ways on a damaged file
        raise damaged(path, str(error).strip() or type(error).__name__) from None


def damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is damaged ({reason}): remove it, and it is downloaded again")


def cifar10(folder: Path) -> Images:
    try:
        train, test = (datasets.CIFAR10(str(folder), train=part) for part in (True, False))
    except RuntimeError as error:
        path = folder / datasets.CIFAR10.base_folder
        raise damaged(path, str(error).splitlines()[0]) from None
    x, y = (rearrange(torch.from_numpy(part.data), "n h w c -> n c h w") for part in (train, test))
    return Images("cifar10", x, torch.tensor(train.targets), y, torch.tensor(test.targets))


def digits() -> Images:
    """1,797 digits of 8x8 pixels and 17 levels: each pixel three times, padded to 28x28, 8 bits."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    levels = torch.from_numpy(bunch.images * (255 / 16)).round().to(torch.uint8)
    large = repeat(levels, "n h w -> n 1 (h three_h) (w three_w)", three_h=3, three_w=3)
    images = torch.nn.functional.pad(large, (2, 2, 2, 2))
    labels = torch.from_numpy(bunch.target)
    return Images("digits", images[:-297], labels[:-297], images[-297:], labels[-297:])


def download(name: str, folder: Path) -> None:
    """Fetch the files that torchvision names, from one mirror after the other, with its sums."""
    kind = TORCHVISION[name]
    reasons = []
    for mirror in getattr(kind, "mirrors", [None]):
        print(f"Downloading {name} into {folder}", flush=True)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(prefix=".part-", dir=folder) as fresh:
                fetch(kind, mirror, Path(fresh))
                move_in(Path(fresh), folder)
            return
        except (OSError, ValueError, RuntimeError, HTTPException) as error:
            reasons.append((str(error).strip() or type(error).__name__).splitlines()[-1])
    raise Unavailable("; ".join(dict.fromkeys(reasons)))


def fetch(kind: Any, mirror: str | None, fresh: Path) -> None:
    """Everything of a data set, checked and unpacked, in an empty folder."""
    if mirror is None:
        files, place = [(kind.url, kind.filename, kind.tgz_md5)], fresh
    else:
        files = [(mirror + name, name, md5) for name, md5 in kind.resources]
        place = fresh / kind.__name__ / "raw"
        place.mkdir(parents=True)
    for address, name, md5 in files:
        receive(address, place / name, TIMEOUT)
        if not check_md5(str(place / name), md5):
            raise ValueError(f"{address} gave another file than it should")
        extract_archive(str(place / name), str(place))


def move_in(fresh: Path, folder: Path) -> None:
    """Each file to its place, whole from the first moment that it is there."""
    for file in [path for path in fresh.rglob("*") if path.is_file()]:
        target = folder / file.relative_to(fresh)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, target)
