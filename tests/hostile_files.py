"""Hostile files: good ones, changed by rules that Hypothesis draws. Checkpoints: see
hostile_checkpoints.py.

Each `*_files` strategy generates bytes. Each `read_*` function reads a file as the project does and
returns its one-line error, or None if the file is valid.
"""

import contextlib
import io
import json
import struct
import sys
import time
import zlib
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from common import cli
from common.data import load_images
from common.errors import UserError
from lesson_02.sample_mnist import read_mask
from lesson_05 import train_mnist
from lesson_05.unet import UNet

import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image

MAX_SECONDS = 10
executed: list[str] = []  # what reading a file made Python execute


def audit(event: str, arguments: tuple) -> None:
    if event in ("os.system", "os.exec", "subprocess.Popen", "os.posix_spawn", "pty.spawn"):
        executed.append(f"{event} {arguments!r:.80}")


sys.addaudithook(audit)


def refuses_in_one_line(read: Callable[[Path], object]) -> Callable[[Path], str | None]:
    """On any file, read() succeeds or raises one clear line, quickly, and executes nothing."""

    @wraps(read)
    def reading(path: Path) -> str | None:
        executed.clear()
        start, line = time.monotonic(), None
        try:
            read(path)
        except UserError as error:
            line = str(error)
        assert time.monotonic() - start < MAX_SECONDS
        assert not executed, executed
        assert line is None or (line.isprintable() and len(line) < 1000), line
        return line

    return reading


@st.composite
def changed(draw: st.DrawFn, good: bytes) -> bytes:
    """Flip bits, cut the end off, or double, remove, zero or overwrite a piece."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        length = draw(st.sampled_from([1, 2, 4, 8, 100, 5000]))
        piece = bytes(data[place : place + length])
        kind = draw(st.sampled_from(["bit", "cut", "double", "remove", "zero", "ones", "copy"]))
        if kind == "bit" and data:
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[place:]
        elif kind == "double":
            data[place:place] = piece
        elif kind == "remove":
            del data[place : place + length]
        elif kind in ("zero", "ones"):
            data[place : place + length] = (b"\0" if kind == "zero" else b"\xff") * len(piece)
        elif kind == "copy":
            other = draw(st.integers(0, max(len(data) - 1, 0)))
            data[place : place + length] = data[other : other + length]
    return bytes(data)


# Command lines


@wraps(train_mnist.main)
def main(**arguments: Any) -> None:
    """The main function of lesson 5, without the training."""


def command_line(*words: str) -> None:
    """Run lesson 5's command line; if it fails, raise an error with its last line."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
        try:
            cli.run(main, list(words), presets=True, network=UNet)
        except SystemExit as end:
            if end.code:
                line = stderr.getvalue().strip().splitlines()[-1]
                raise UserError(line) if line.startswith("error: ") else ValueError(line) from None


@refuses_in_one_line
def read_resumed(path: Path) -> None:
    command_line("--resume", str(path), "--device", "cpu")


@refuses_in_one_line
def read_preset(path: Path) -> None:
    command_line("--config", str(path))


# IDX


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


IDX = {
    "train-images-idx3-ubyte": idx(np.arange(12 * 784).reshape(12, 28, 28) % 256),
    "train-labels-idx1-ubyte": idx(np.arange(12) % 10),
    "t10k-images-idx3-ubyte": idx(np.arange(6 * 784).reshape(6, 28, 28) % 256),
    "t10k-labels-idx1-ubyte": idx(np.arange(6) % 10),
}


@st.composite
def idx_files(draw: st.DrawFn) -> dict[str, bytes]:
    """The four files, one of them changed, most often in its header."""
    name = draw(st.sampled_from(sorted(IDX)))
    only_header = draw(st.booleans())
    good = IDX[name]
    body = draw(changed(good[:16])) + good[16:] if only_header else draw(changed(good))
    return {**IDX, name: body}


@refuses_in_one_line
def read_idx(folder: Path) -> None:
    data = load_images("mnist", str(folder))
    assert data.train.dtype == torch.uint8
    assert data.train.shape[1:] == data.test.shape[1:]
    assert len(data.train) == len(data.train_labels)
    assert data.train_labels.max() < 10


def write_idx(folder: Path, files: dict[str, bytes]) -> Path:
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for name, body in files.items():
        (raw / name).write_bytes(body)
    return folder


# Presets


PRESET = (Path(train_mnist.__file__).parent / "configs" / "laptop.yaml").read_bytes()
BOMB = "a0: &a0 [1, 1]\n"
BOMB += "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 30))
YAMLS = [
    BOMB.encode(),
    b"[" * 5000,
    b"{a: " * 5000,
    b"batch_size: !!python/object/apply:os.system ['touch evil-was-here']\n",
    b"network: {class_path: os.system, init_args: {command: ls}}\n",
    b"config: /etc/passwd\n",
    b"batch_size: " + b"9" * 50_000,
    b"x" * 200_000,
    b"\xff\xfe\0",
    b"%YAML 9.9\n---\n- 1\n",
    b"",
    b"3",
    b"a: 1\n---\nb: 2\n",
    b"? [1, 2]\n: 3\n",
    b"batch_size: .nan\nlearning_rate: .inf\n",
    b"1: 2\nnull: 3\n",
    b'"\\e[31m": 1\n',
]


@st.composite
def yaml_files(draw: st.DrawFn) -> bytes:
    """A preset with other values, keys or bytes."""
    if draw(st.booleans()):
        return draw(st.one_of(changed(PRESET), st.sampled_from(YAMLS)))
    names = [line.split(":")[0] for line in PRESET.decode().splitlines() if ":" in line]
    names = [name.strip() for name in names if not name.startswith("#")]
    key = st.one_of(st.sampled_from(names), st.text(max_size=6))
    plain = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9))
    value = st.recursive(
        plain,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
        ),
        max_leaves=6,
    )
    return json.dumps(draw(st.dictionaries(key, value, max_size=4))).encode()


# Masks


def png(pixels: np.ndarray) -> bytes:
    memory = io.BytesIO()
    Image.fromarray(pixels).save(memory, "PNG")
    return memory.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


HALF = np.zeros((28, 28), np.uint8)
HALF[:14] = 255
GOOD_PNG = png(HALF)


@st.composite
def png_files(draw: st.DrawFn) -> bytes:
    """A mask with other bytes, other sizes in its header, or another pixel format."""
    kind = draw(st.sampled_from(["bytes", "header", "other", "text"]))
    if kind == "bytes":
        return draw(changed(GOOD_PNG))
    if kind == "header":  # with the right checksum
        size = st.one_of(st.integers(0, 60), st.sampled_from([10**4, 10**5, 2**31 - 1]))
        depth, colour = st.sampled_from([1, 2, 8, 16]), st.sampled_from([0, 2, 3, 4, 6])
        values = draw(size), draw(size), draw(depth), draw(colour), 0, 0, draw(st.integers(0, 1))
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", *values))
        return GOOD_PNG[:8] + header + GOOD_PNG[33:]
    if kind == "text":
        body = b"k\0\0" + zlib.compress(bytes(draw(st.sampled_from([100, 50_000_000]))))
        return GOOD_PNG[:33] + chunk(b"zTXt", body) + GOOD_PNG[33:]
    memory = io.BytesIO()
    kinds = ["GIF", "BMP", "TIFF", "PPM", "EPS", "JPEG"]
    Image.fromarray(HALF).save(memory, draw(st.sampled_from(kinds)))
    return draw(st.one_of(st.just(memory.getvalue()), changed(memory.getvalue())))


@refuses_in_one_line
def read_png(path: Path) -> None:
    assert read_mask(str(path), 28, 28).shape == (1, 1, 28, 28)
