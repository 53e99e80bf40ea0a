"""Folders of one's own images: what is found, decoded, held out, kept, and refused."""

import os
import warnings
from pathlib import Path

from common import folder, pixels
from common.data import Images, load_images
from common.errors import UserError
from lesson_05 import train_mnist
from lesson_05.unet import UNet

import numpy as np
import pytest
import torch
from helpers import error_line
from PIL import Image

RANDOM = np.random.default_rng(0)
FLAGS = ("--dataset", "folder", "--device", "cpu")


def picture(height: int = 12, width: int = 8, channels: int = 3) -> Image.Image:
    levels = RANDOM.integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(levels.squeeze())


def save(path: Path, image: Image.Image, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with two classes, of 12 and of 21 images."""
    root = tmp_path / "my images"
    for name, count in {"owls": 21, "cats": 12}.items():
        for number in range(count):
            save(root / name / f"{number}.png", picture())
    return root


def every(data: Images) -> set[tuple[bytes, int]]:
    """The images and labels of a data set, without order."""
    levels, labels = [data.train, data.test], [data.train_labels, data.test_labels]
    pairs = zip(torch.cat(levels), torch.cat(labels), strict=True)
    return {(image.numpy().tobytes(), int(label)) for image, label in pairs}


def decoded(path: Path, size: list[int] | None = None, channels: int | None = None) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        levels = pixels.read_image(path, size, channels)
    return levels if isinstance(levels, str) else levels.transpose(1, 2, 0)


def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "diffusion-lessons" / "images"


def test_subfolders_are_classes_in_the_order_of_their_names(images):
    save(images / "cats" / "deeper" / "x.PNG", picture())
    data = load_images("folder", images)
    assert (data.classes, data.shape, data.size) == (["cats", "owls"], (3, 12, 8), [12, 8])
    expected = set()
    for label, name in enumerate(data.classes):
        for path in (images / name).rglob("*.[pP][nN][gG]"):
            levels = np.asarray(Image.open(path)).transpose(2, 0, 1)
            expected.add((levels.tobytes(), label))
    assert every(data) == expected
    assert len(expected) == 34


def test_images_without_subfolders_are_one_class(tmp_path):
    for number in range(3):
        save(tmp_path / "birds" / f"{number}.webp", picture(), lossless=True)
    data = load_images("folder", tmp_path / "birds")
    assert data.classes == ["birds"]
    assert data.train_labels.tolist() == [0, 0]
    assert data.test_labels.tolist() == [0]


def test_hidden_files_and_links_in_circles_do_no_harm(images):
    before = every(load_images("folder", images))
    save(images / "cats" / "._0.png", picture())
    save(images / ".trash" / "0.png", picture())
    save(images / "cats" / ".thumbnails" / "0.png", picture())
    (images / "notes").mkdir()
    (images / "notes" / "read me.txt").write_text("no image")
    for link, target in {
        "round": "..",
        "cats/itself": ".",
        "owls/up": "../..",
        "gone": "x",
    }.items():
        (images / link).symlink_to(target, target_is_directory=True)
    data = load_images("folder", images)
    assert every(data) == before
    assert data.classes == ["cats", "owls"]


def test_images_beside_the_classes_are_not_used(images, capsys):
    before = every(load_images("folder", images))
    save(images / "0.png", picture())
    assert "not used" not in capsys.readouterr().out
    assert every(load_images("folder", images)) == before
    assert "which are the classes, are not used: 1" in capsys.readouterr().out


def test_a_link_to_a_folder_may_be_a_class(images, tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "night birds").symlink_to(images / "owls")
    data = load_images("folder", tmp_path / "links")
    assert data.classes == ["night birds"]
    assert len(every(data)) == 21


def test_a_tenth_of_each_class_is_held_out(images, capsys):
    data = load_images("folder", images)
    assert data.test_labels.bincount().tolist() == [1, 2]
    assert data.train_labels.bincount().tolist() == [11, 19]
    assert data.train_labels.tolist() != sorted(data.train_labels.tolist())  # mixed
    printed = " ".join(capsys.readouterr().out.split())
    assert "33 images of 3x12x8 take 0.0 MB of memory" in printed
    assert "33 images; classes: cats, owls; skipped: none; held out: 3, a tenth of each" in printed
    assert "by seed 0" in printed


def test_at_least_one_image_is_held_out_of_the_largest_class(tmp_path):
    for name, count in {"a": 1, "b": 3, "c": 2}.items():
        for number in range(count):
            save(tmp_path / name / f"{number}.png", picture())
    data = load_images("folder", tmp_path)
    assert (data.test_labels.tolist(), len(data.train)) == ([1], 5)


def test_transparent_pixels_become_black(tmp_path):
    rgba = picture(channels=4)
    levels = np.asarray(rgba).astype(float)
    over_black = levels[..., :3] * levels[..., 3:] / 255
    assert np.abs(decoded(save(tmp_path / "a.png", rgba)) - over_black).max() <= 1
    assert np.abs(decoded(save(tmp_path / "a.webp", rgba, lossless=True)) - over_black).max() <= 1
    grey = rgba.convert("LA")
    levels = np.asarray(grey).astype(float)
    found = decoded(save(tmp_path / "b.png", grey))
    assert np.abs(found - levels[..., :1] * levels[..., 1:] / 255).max() <= 1
    palette = picture(channels=1).convert("P")
    palette.putpalette([200, 100, 50] * 256)
    found = decoded(save(tmp_path / "c.png", palette, transparency=int(np.asarray(palette)[0, 0])))
    assert found[0, 0].tolist() == [0, 0, 0]
    assert {tuple(pixel) for pixel in found.reshape(-1, 3)} == {(0, 0, 0), (200, 100, 50)}


def test_other_modes_are_converted(tmp_path):
    deep = RANDOM.integers(0, 65536, (12, 8), dtype=np.uint16)
    deep[0, :4] = 0, 65535, 257 * 100, 257 * 100 + 128
    found = decoded(save(tmp_path / "16 bits.png", Image.fromarray(deep)))
    assert (found == np.rint(deep / 257)[..., None]).all()
    bits = Image.fromarray(RANDOM.random((12, 8)) > 0.5)
    found = decoded(save(tmp_path / "1 bit.png", bits))
    assert (found == 255 * np.asarray(bits)[..., None]).all()
    palette = picture().quantize(16)
    found = decoded(save(tmp_path / "palette.png", palette))
    assert (found == np.asarray(palette.convert("RGB"))).all()
    cmyk = Image.new("CMYK", (16, 16), (200, 100, 0, 50))
    found = decoded(save(tmp_path / "cmyk.jpg", cmyk, quality=100))
    expected = [(255 - ink) * (255 - 50) / 255 for ink in (200, 100, 0)]
    assert np.abs(found - expected).max() <= 3
    found = decoded(save(tmp_path / "grey.jpg", Image.new("L", (16, 16), 77)))
    assert (found == 77).all()
    assert found.shape == (16, 16, 3)


def test_the_orientation_of_photographs_is_respected(tmp_path):
    image = picture(40, 30).resize((300, 400))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    upright = decoded(save(tmp_path / "a.jpg", image))
    turned = decoded(save(tmp_path / "b.jpg", image, exif=exif))
    assert (turned == np.rot90(upright, -1)).all()
    small = decoded(tmp_path / "b.jpg", [12, 16])  # decoded at half the size
    whole = Image.fromarray(turned).resize((16, 12), Image.Resampling.BICUBIC)
    assert small.shape == (12, 16, 3)
    assert np.abs(small.astype(float) - np.asarray(whole)).mean() < 4


def test_images_are_resized_to_cover_the_size_and_cropped_to_the_middle(tmp_path):
    levels = np.zeros((40, 160, 3), np.uint8)
    levels[:, :50, 0], levels[:, 50:110], levels[:, 110:, 2] = 255, 99, 255
    wide = save(tmp_path / "wide.png", Image.fromarray(levels))
    assert (decoded(wide, [20, 20]) == 99).all()
    high = save(tmp_path / "high.png", Image.fromarray(levels.transpose(1, 0, 2)))
    assert (decoded(high, [20, 20]) == 99).all()
    row = decoded(wide, [20, 60])[10, :, 0].astype(int)  # the middle 120: 15, 30 and 15 pixels
    assert row[:13].min() > 240
    assert set(row[17:43]) == {99}
    assert row[47:].max() < 15
    board = Image.fromarray(255 * (np.indices((64, 64)).sum(0) % 2).astype(np.uint8))
    found = decoded(save(tmp_path / "board.png", board), [16, 16])
    assert np.abs(found.astype(int) - 127).max() <= 10  # without aliasing a fine pattern is grey


def test_colour_is_found_in_the_pixels(tmp_path):
    for number in range(4):
        save(tmp_path / f"{number}.png", picture(channels=1).convert("RGB"))
    grey = load_images("folder", tmp_path)
    assert grey.shape == (1, 12, 8)
    assert load_images("folder", tmp_path, None, 3).shape == (3, 12, 8)
    coloured = Image.open(tmp_path / "3.png")
    coloured.putpixel((7, 11), (10, 200, 30))
    save(tmp_path / "3.png", coloured)
    assert load_images("folder", tmp_path).shape == (3, 12, 8)
    luma = load_images("folder", tmp_path, None, 1)
    assert luma.shape == (1, 12, 8)
    expected = round(0.299 * 10 + 0.587 * 200 + 0.114 * 30)
    last = [image[0, 11, 7].item() for image in (*luma.train, *luma.test)]
    assert expected in last


def test_files_that_cannot_be_used_are_counted(images, capsys, monkeypatch):
    frames = [picture() for _ in range(3)]
    for name in ("moving.png", "moving.webp"):
        save(images / "cats" / name, frames[0], save_all=True, append_images=frames[1:])
    whole = (images / "cats" / "0.png").read_bytes()
    (images / "cats" / "cut.png").write_bytes(whole[:-40])
    (images / "cats" / "text.jpg").write_text("no image")
    (images / "cats" / "empty.jpeg").touch()
    (images / "cats" / "nothing.png").symlink_to("nowhere.png")
    if hasattr(os, "mkfifo"):
        os.mkfifo(images / "owls" / "pipe.png")
    else:
        (images / "owls" / "pipe.png").write_text("no pipes here")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 150)
    save(images / "owls" / "bomb.png", picture(20, 20))  # more than twice as large: an error
    save(images / "owls" / "large.png", picture(20, 10))  # larger: a warning
    before = every(load_images("folder", images))
    printed = " ".join(capsys.readouterr().out.split())
    assert "33 images;" in printed
    assert "skipped: 2 animated, 4 broken, 1 empty, 2 too large;" in printed
    for name in ("cats/moving.png", "owls/bomb.png", "cats/cut.png"):
        (images / name).unlink()
    assert every(load_images("folder", images)) == before


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_damaged_files_are_images_or_are_skipped(suffix, tmp_path):
    whole, found = save(tmp_path / f"whole.{suffix}", picture()).read_bytes(), set()
    for _ in range(150):
        data = bytearray(whole)
        for position in RANDOM.integers(0, len(data), RANDOM.integers(1, 9)):
            data[position] = RANDOM.integers(256)
        (tmp_path / "damaged").write_bytes(data[: RANDOM.integers(1, len(data) + 1)])
        levels = decoded(tmp_path / "damaged", [8, 8])
        found.add(levels if isinstance(levels, str) else str(levels.shape))
    assert {"broken"} <= found <= {"broken", "animated", "too large", "(8, 8, 3)"}


def test_a_class_without_usable_images_is_none(images):
    (images / "broken").mkdir()
    (images / "broken" / "x.png").write_text("no image")
    assert load_images("folder", images).classes == ["cats", "owls"]


def test_the_second_start_decodes_nothing(images, tmp_path, monkeypatch, capsys):
    first = load_images("folder", images)
    os.rename(images, tmp_path / "moved")
    os.utime(tmp_path / "moved" / "cats" / "0.png")
    monkeypatch.setattr(folder, "read_image", None)
    capsys.readouterr()
    again = load_images("folder", tmp_path / "moved")
    for name in ("train", "train_labels", "test", "test_labels"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert (first.classes, first.sha256) == (again.classes, again.sha256)
    assert "moved: 33 images;" in " ".join(capsys.readouterr().out.split())


@pytest.mark.skipif(os.name != "posix", reason="no permissions here")
def test_others_cannot_read_the_cache(images, tmp_path):
    load_images("folder", images)
    assert cache(tmp_path).stat().st_mode & 0o077 == 0


def test_another_content_is_decoded_again(images):
    first = load_images("folder", images)
    path = images / "cats" / "0.png"
    times = path.stat()
    data = bytearray(path.read_bytes())
    image = Image.open(path).copy()
    image.putpixel((0, 0), (1, 2, 3))
    save(path, image, compress_level=0)
    save(images / "cats" / "1.png", Image.open(images / "cats" / "1.png"), compress_level=0)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    second = load_images("folder", images)
    assert second.sha256 != first.sha256
    assert len(every(second) - every(first)) == 1
    path.write_bytes(data)
    assert load_images("folder", images).sha256 == first.sha256
    assert load_images("folder", images, [8, 8]).shape == (3, 8, 8)


@pytest.mark.parametrize("damage", ["cut", "bit", "text", "other"])
def test_a_damaged_file_in_the_cache_is_made_again(damage, images, tmp_path, capsys):
    first = load_images("folder", images)
    (file,) = cache(tmp_path).iterdir()
    data = bytearray(file.read_bytes())
    if damage == "other":
        load_images("folder", images / "owls")
        (other,) = set(file.parent.iterdir()) - {file}
        data = bytearray(other.read_bytes()).replace(b"num_train", b"num_trees")
    data[-5:] = b"" if damage == "cut" else bytes(5) if damage == "bit" else data[-5:]
    file.write_bytes(b"hello" if damage == "text" else data)
    capsys.readouterr()
    again = load_images("folder", images)
    assert "is damaged: the images are decoded again" in capsys.readouterr().out
    assert again.sha256 == first.sha256
    load_images("folder", images)
    assert "is damaged" not in capsys.readouterr().out


def test_a_cache_that_cannot_be_written_is_no_obstacle(images, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(load_images("folder", images).train) == 30
    assert "the next start must decode the images again" in capsys.readouterr().out


def test_memory_is_checked_before_it_is_taken(images, monkeypatch):
    assert 10**6 < folder.free_memory() < 2**60
    monkeypatch.setattr(folder, "free_memory", lambda: 9_000)
    with pytest.raises(UserError, match=r"33 images of 3x12x8 take 0.0 MB of memory, of"):
        load_images("folder", images)
    assert load_images("folder", images, [4, 4]).shape == (3, 4, 4)


def test_data_sets_are_resized_if_asked():
    digits, large = load_images("digits"), load_images("digits", None, [32, 40], 3)
    assert large.shape == (3, 32, 40)
    assert torch.equal(large.train_labels, digits.train_labels)
    expected = Image.fromarray(digits.train[5, 0].numpy())  # 28 -> 40 wide, 4 rows less each side
    expected = expected.resize((40, 32), Image.Resampling.BICUBIC, box=(0, 2.8, 28, 25.2))
    assert (large.train[5, 1].numpy() == np.asarray(expected)).all()
    assert load_images("digits", None, [28, 28], 1).train.equal(digits.train)


@pytest.mark.parametrize(
    ("files", "flags", "message"),
    [
        ([], ["--data_dir", "{}"], "too few images, 0 (skipped: none): two or more"),
        ([(12, 8)], ["--data_dir", "{}"], "has too few images, 1 (skipped"),
        ([(12, 8), (8, 12)], ["--data_dir", "{}"], "differ in size, such as"),
        ([(12, 8)] * 2, [], "name the folder of your images with --data_dir"),
        ([(12, 8)] * 2, ["--data_dir", "{}/none"], "none cannot be read (No such file"),
        ([(12, 8)] * 2, ["--data_dir", "{}/0.png"], "0.png cannot be read (Not a directory"),
        ([(12, 8)] * 9, ["--data_dir", "{}"], "batch_size is 64: it must be from 1 to 8"),
        ([(3, 8)] * 9, ["--data_dir", "{}"], "a 3x8 image cannot be halved 2 times"),
        ([(4, 5000)] * 2, ["--data_dir", "{}"], "give a lower --image_size"),
        ([(12, 8)] * 2, ["--data_dir", "{}", "--image_size", "0"], "image_size is [0]"),
        ([(12, 8)] * 2, ["--data_dir", "{}", "--image_size", "1", "2", "3"], "one number, or two"),
        ([(12, 8)] * 2, ["--data_dir", "{}", "--image_size", "5000"], "must be from 1 to 4,096"),
        ([(12, 8)] * 2, ["--data_dir", "{}", "--image_size", "x"], "--image_size is [x]"),
        ([(12, 8)] * 2, ["--data_dir", "{}", "--image_channels", "2"], "must be one of 1, 3"),
    ],
)
def test_bad_folders_and_flags_are_one_line(files, flags, message, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    for number, (height, width) in enumerate(files):
        save(tmp_path / "data" / f"{number}.png", picture(height, width))
    words = [word.format(tmp_path / "data") for word in flags]
    words += ["--batch_size", "1"] if "3x8" in message else []
    words += ["--output_dir", str(tmp_path / "run")]
    line = error_line(capsys, train_mnist.main, *FLAGS, *words, presets=True, network=UNet)
    assert message in line
