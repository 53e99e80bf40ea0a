"""Data sets: their sizes, batches, downloads from a local server, and damaged files."""

import gzip
import hashlib
import pickle
import struct
from pathlib import Path

from common import files
from common.data import Batches, from_uint8, load_images, to_uint8
from common.errors import UserError

import numpy as np
import pytest
import torch
from helpers import NETWORK, train
from PIL import Image
from server import Server
from torchvision import datasets


def idx(array: np.ndarray) -> bytes:
    """uint8 values in the IDX format of MNIST."""
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def small_mnist() -> dict[str, bytes]:
    random = np.random.default_rng(0)
    files = {}
    for part, count in [("train", 12), ("t10k", 6)]:
        files[f"{part}-images-idx3-ubyte"] = idx(random.integers(0, 256, (count, 28, 28)))
        files[f"{part}-labels-idx1-ubyte"] = idx(np.arange(count) % 10)
    return files


@pytest.fixture
def folder_of_mnist(tmp_path: Path) -> Path:
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in small_mnist().items():
        (raw / name).write_bytes(content)
    return tmp_path / "data"


def test_real_mnist_keeps_its_size_and_its_levels(real_mnist):
    assert real_mnist.train.shape == (60_000, 1, 28, 28)
    assert real_mnist.test.shape == (10_000, 1, 28, 28)
    assert real_mnist.train.dtype == torch.uint8
    assert real_mnist.train_labels.bincount().tolist()[:3] == [5923, 6742, 5958]
    assert real_mnist.train.float().mean().item() == pytest.approx(33.318, abs=0.01)


def test_levels_survive_the_conversion_to_minus_one_and_one():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    x0 = from_uint8(levels)
    assert (x0.min(), x0.max()) == (-1, 1)
    assert torch.equal(to_uint8(x0), levels)


def test_digits_are_the_offline_data():
    images = load_images("digits")
    assert images.shape == (1, 28, 28)
    assert len(images.train) + len(images.test) == 1797
    image = images.train[0, 0]
    assert (image[2:26:3, 2:26:3] == image[4:26:3, 3:26:3]).all()  # each pixel three times
    assert not image[:2].any()
    assert set(images.train.unique().tolist()) == {round(255 * v / 16) for v in range(17)}


def test_batches_depend_on_seed_and_step_alone():
    pool = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1)
    labels = torch.arange(10)
    one, other = (Batches(pool, labels, 4, 3, torch.device("cpu")) for _ in range(2))
    read = [one[step][1].tolist() for step in range(1, 7)]
    assert [other[step][1].tolist() for step in (6, 2, 5)] == [read[5], read[1], read[4]]
    for first in (0, 2, 4):  # two batches an epoch, without repetition
        assert len({*read[first], *read[first + 1]}) == 8
    assert read[:2] != read[2:4]
    for seed in (4, 10**18):
        another = Batches(pool, labels, 4, seed, torch.device("cpu"))
        assert [another[step][1].tolist() for step in range(1, 7)] != read
    x0, label = one[1]
    assert torch.equal(to_uint8(x0).flatten().long(), label)


@pytest.fixture
def mirror(address: str, monkeypatch: pytest.MonkeyPatch) -> str:
    Server.files = {f"{name}.gz": gzip.compress(body) for name, body in small_mnist().items()}
    sums = [(name, hashlib.md5(body).hexdigest()) for name, body in Server.files.items()]
    order = ["train-images", "train-labels", "t10k-images", "t10k-labels"]
    sums.sort(key=lambda pair: [name in pair[0] for name in order].index(True))
    monkeypatch.setattr(datasets.MNIST, "resources", sums)
    monkeypatch.setattr(files, "TIMEOUT", 0.5)
    return address


def test_an_unresponsive_mirror_is_skipped(mirror, tmp_path, monkeypatch, capsys):
    mirrors = [f"{mirror}/hangs/", f"{mirror}/"]
    monkeypatch.setattr(datasets.MNIST, "mirrors", mirrors)
    images = load_images("mnist", tmp_path)
    assert len(images.train) == 12
    assert "Downloading mnist" in capsys.readouterr().out
    Server.files = {}  # the second time nothing is requested
    assert torch.equal(load_images("mnist", tmp_path).train, images.train)


def test_a_download_with_another_sum_is_refused(mirror, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.MNIST, "mirrors", [f"{mirror}/"])
    Server.files = {name: body + b"x" for name, body in Server.files.items()}
    with pytest.raises(UserError, match="could not be downloaded"):
        load_images("mnist", tmp_path)


@pytest.mark.parametrize("part", ["slow-headers", "slow-body"])
def test_a_mirror_that_never_ends_is_given_up(mirror, tmp_path, monkeypatch, part):
    monkeypatch.setattr(datasets.MNIST, "mirrors", [f"{mirror}/{part}/", f"{mirror}/"])
    monkeypatch.setattr(files, "MAX_SECONDS", 0.5)
    assert len(load_images("mnist", tmp_path).train) == 12


def test_without_network_auto_uses_the_digits_and_mnist_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    assert load_images("auto", tmp_path).name == "digits"
    printed = " ".join(capsys.readouterr().out.split())
    assert "MNIST is not in" in printed
    assert "Connection refused" in printed
    assert "scikit- learn" in printed or "scikit-learn" in printed
    with pytest.raises(UserError, match="--data_dir"):
        load_images("mnist", tmp_path)


def test_data_come_from_the_flag_then_the_variable(folder_of_mnist, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setenv("DIFFUSION_DATA", str(tmp_path / "nowhere"))
    assert len(load_images("auto", folder_of_mnist).train) == 12
    monkeypatch.setenv("DIFFUSION_DATA", str(folder_of_mnist))
    assert len(load_images("auto").train) == 12


def test_existing_archives_are_unpacked_without_a_network(mirror, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, body in Server.files.items():
        (raw / name).write_bytes(body)
    assert len(load_images("mnist", tmp_path).train) == 12


@pytest.mark.parametrize(
    "content", [b"", b"\0\0\x08\x03", b"no IDX file at all", idx(np.zeros((12, 28, 28)))[:-1]]
)
def test_a_damaged_file_is_reported(folder_of_mnist, content):
    path = folder_of_mnist / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(content)
    for dataset in ("auto", "mnist"):  # a broken file is never silently replaced
        with pytest.raises(UserError, match=r"a file of MNIST in .* is damaged or cannot be read"):
            load_images(dataset, folder_of_mnist)
    assert path.read_bytes() == content


def test_labels_beyond_the_classes_and_images_of_two_sizes_are_refused(folder_of_mnist):
    raw = folder_of_mnist / "MNIST" / "raw"
    (raw / "t10k-images-idx3-ubyte").write_bytes(idx(np.zeros((6, 32, 32))))
    with pytest.raises(UserError, match=r"training and test images of mnist in .* differ in size"):
        load_images("mnist", folder_of_mnist)
    (raw / "train-labels-idx1-ubyte").write_bytes(idx(np.full(12, 10)))
    with pytest.raises(UserError, match=r"cannot be read \(a label is not from 0 to 9\)"):
        load_images("mnist", folder_of_mnist)


def test_a_folder_in_the_place_of_a_file_is_reported(folder_of_mnist, monkeypatch):
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    path = folder_of_mnist / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=r"mnist is not in .* and could not be downloaded"):
        load_images("mnist", folder_of_mnist)


def test_cifar10_has_three_channels(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    sums = {}
    for name, count in [("data_batch_1", 20), ("test_batch", 4)]:
        levels = np.random.default_rng(1).integers(0, 256, (count, 3072), dtype=np.uint8)
        entry = {"data": levels, "labels": [k % 10 for k in range(count)]}
        (folder / name).write_bytes(pickle.dumps(entry))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    for file in folder.iterdir():
        sums[file.name] = hashlib.md5(file.read_bytes()).hexdigest()
    kind = datasets.CIFAR10
    monkeypatch.setattr(kind, "train_list", [("data_batch_1", sums["data_batch_1"])])
    monkeypatch.setattr(kind, "test_list", [("test_batch", sums["test_batch"])])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}
    monkeypatch.setattr(kind, "meta", meta)
    images = load_images("cifar10", tmp_path)
    assert images.train.shape == (20, 3, 32, 32)
    entry = pickle.loads((folder / "data_batch_1").read_bytes())
    assert np.array_equal(images.train[3, 1, 0].numpy(), entry["data"][3, 1024 : 1024 + 32])
    network = NETWORK | {"attention_resolutions": [16]}
    train(tmp_path / "run", network, dataset="cifar10", data_dir=str(tmp_path))
    with Image.open(tmp_path / "run" / "samples.png") as picture:
        assert picture.mode == "RGB"
    (folder / "test_batch").write_bytes(b"x")
    with pytest.raises(UserError, match=r"a file of CIFAR10 in .* is damaged"):
        load_images("cifar10", tmp_path)
