"""Files as a stranger might send them: good ones, changed by rules that Hypothesis draws.

Each `*_files` strategy gives bytes, each `read_*` function reads them as the project does and
returns the one line that it says, or None where the file is valid.
"""

import contextlib
import io
import json
import os
import pickle
import struct
import sys
import time
import zipfile
import zlib
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image

from common import cli, lessons, mnist
from common.errors import UserError
from lesson_02.sample_mnist import read_mask
from lesson_05 import train_mnist
from lesson_05.unet import UNet

NETWORK = {
    "image_channels": 1,
    "image_size": 28,
    "channels": 4,
    "multipliers": [1, 2],
    "num_blocks": 1,
    "attention_resolutions": [14],
    "num_groups": 2,
    "dropout": 0.0,
}
SECONDS = 10
RAN: list[str] = []  # what a file made Python run


def watch(event: str, arguments: tuple) -> None:
    if event in ("os.system", "os.exec", "subprocess.Popen", "os.posix_spawn", "pty.spawn"):
        RAN.append(f"{event} {arguments!r:.80}")


sys.addaudithook(watch)


# Bytes


@st.composite
def changed(draw: st.DrawFn, good: bytes) -> bytes:
    """Bits turned, the end cut off, a piece doubled, removed, zeroed or put in from elsewhere."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        length = draw(st.sampled_from([1, 2, 4, 8, 100, 5000]))
        piece = bytes(data[place : place + length])
        kind = draw(st.sampled_from(["bit", "cut", "double", "remove", "zero", "ones", "swap"]))
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
        elif kind == "swap":
            other = draw(st.integers(0, max(len(data) - 1, 0)))
            data[place : place + length] = data[other : other + length]
    return bytes(data)


# Checkpoints


def good_content() -> dict[str, Any]:
    torch.manual_seed(0)
    weights = {f"module.{k}": v for k, v in UNet(**NETWORK).state_dict().items()}
    config = {"num_timesteps": 60, "beta_1": 1e-4, "beta_T": 0.02, "variance": "beta"}
    config |= {"network": dict(NETWORK), "batch_size": 8, "learning_rate": 1e-3}
    return {
        "format": 1,
        "lesson": "lesson_05",
        "config": config,
        "dataset": "digits",
        "step": 3,
        "ema": {"n_averaged": torch.tensor(3), **weights},
        "training": {"rng": torch.get_rng_state(), "count": 0},
    }


def as_file(content: Any) -> bytes:
    memory = io.BytesIO()
    torch.save(content, memory)
    return memory.getvalue()


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, -1, 10**6, 10**9, 10**12, 10**4000]),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["a\nb", "\x1b[31m", "x" * 100_000, "../../evil", "lesson_09", "os.system"]),
    st.lists(st.integers(0, 9), max_size=4),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=3),
    st.builds(torch.zeros, st.sampled_from([0, 1, 7])),
    st.builds(lambda: torch.zeros(1).expand(10**5, 10**5)),
    st.builds(lambda: torch.zeros(2, dtype=torch.complex64)),
    st.builds(lambda: torch.zeros(3, 3).to_sparse()),
    st.builds(nested, st.sampled_from([3, 20, 300])),
)


def is_plain(value: Any) -> bool:
    """A tensor that can be copied here: JUNK has one that would fill the memory."""
    tensor = isinstance(value, torch.Tensor) and not value.is_sparse
    return tensor and value.numel() < 10**6


@st.composite
def changed_content(draw: st.DrawFn) -> bytes:
    """A checkpoint whose values are others, missing, or of another kind."""
    content = good_content()
    for _ in range(draw(st.integers(1, 3))):
        parts = [content, content["config"], content["ema"], content["training"]]
        parts += [content["config"].get("network")] if isinstance(content["config"], dict) else []
        part = draw(st.sampled_from([p for p in parts if isinstance(p, dict) and p]))
        key = draw(st.sampled_from(list(part)))
        kind = draw(st.sampled_from(["junk", "remove", "rename", "shape", "dtype"]))
        value = part[key]
        if kind == "remove":
            del part[key]
        elif kind == "rename":
            part[draw(st.one_of(st.text(max_size=5), st.integers(0, 3)))] = part.pop(key)
        elif kind == "shape" and is_plain(value):
            part[key] = draw(
                st.sampled_from([value.flatten(), value[None], value[:0] if value.ndim else value])
            )
        elif kind == "dtype" and is_plain(value):
            kinds = [torch.float16, torch.int64, torch.bool, torch.complex64, torch.float64]
            part[key] = value.to(draw(st.sampled_from(kinds)))
        else:
            part[key] = draw(JUNK)
        if not all(isinstance(content.get(name), dict) for name in ("config", "ema", "training")):
            break
    return as_file(content)


class Runs:
    """Asks the one who reads it to run something."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple:
        return self.function, self.arguments


def pickles() -> dict[str, bytes]:
    """Instructions for the reader that no checkpoint has."""
    twice: list[Any] = []
    for _ in range(60):
        twice = [twice, twice]  # 2^60 lists, of 60
    return {
        "system": pickle.dumps(Runs(os.system, "touch evil-was-here"), 2),
        "eval": pickle.dumps(Runs(eval, "1"), 2),
        "system 4": pickle.dumps(Runs(os.system, "touch evil-was-here"), 4),
        "bytearray": pickle.dumps(Runs(bytearray, 10**11), 2),
        "load": pickle.dumps(Runs(torch.load, "x"), 2),
        "tensor": pickle.dumps(Runs(torch.Tensor, 10**10), 2),
        "many": pickle.dumps(good_pickle() | {"config": twice}, 2),
        "number": pickle.dumps(good_pickle() | {"step": 10**100_000}, 2),
        "deep": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        "empty": b"",
        "stop": b"\x80\x02.",
        "long": b"\x80\x02\x8b\xff\xff\xff\x7f.",
        "text": b"\x80\x02X\xff\xff\xff\x7f.",
    }


def good_pickle() -> dict[str, Any]:
    return {"format": 1, "lesson": "lesson_05", "config": {}, "dataset": "d", "step": 1, "ema": {}}


@st.composite
def changed_archive(draw: st.DrawFn) -> bytes:
    """An archive with other entries, other names, other ways to store, other pickles."""
    source = zipfile.ZipFile(io.BytesIO(as_file(good_content())))
    entries = [(name, source.read(name)) for name in source.namelist()]
    how = draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
    kinds = ["pickle", "bend", "rename", "remove", "add", "double", "swap", "bomb", "link", "size"]
    kind = draw(st.sampled_from(kinds))
    at = next(i for i, (name, _) in enumerate(entries) if name.endswith("data.pkl"))
    place = draw(st.integers(0, len(entries) - 1))
    name, body = entries[place]
    if kind == "pickle":
        entries[at] = entries[at][0], draw(st.sampled_from(list(pickles().values())))
    elif kind == "bend":
        entries[at] = entries[at][0], draw(changed(entries[at][1]))
    elif kind == "rename":
        entries[place] = draw(st.sampled_from(["../../evil", "/evil", "x", "", name + "\n"])), body
    elif kind == "remove":
        del entries[place]
    elif kind == "add":
        entries.append((draw(st.sampled_from(["archive/code/x.py", "constants.pkl", "e"])), body))
    elif kind == "double":
        entries.append((name, draw(changed(body))))
    elif kind == "swap":
        entries[place] = name, draw(changed(body))
    elif kind == "bomb":
        how = zipfile.ZIP_DEFLATED
        entries[place] = name, bytes(20_000_000)
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", how) as archive:
        for entry, content in entries:
            info = zipfile.ZipInfo(entry)
            info.compress_type = how
            if kind == "link":
                info.external_attr = 0o120777 << 16
            archive.writestr(info, content)
    data = bytearray(memory.getvalue())
    if kind == "size":  # claims in the directory at the end
        begin = data.rindex(b"PK\1\2")
        data[begin + 20 : begin + 28] = draw(st.binary(min_size=8, max_size=8))
    return bytes(data)


GOOD_CHECKPOINT = as_file(good_content())
checkpoint_files = st.one_of(changed(GOOD_CHECKPOINT), changed_content(), changed_archive())


def one_line(read: Callable[[Path], object]) -> Callable[[Path], str | None]:
    """Whatever a file is, the answer is a result or one clear line, soon, and nothing is run."""

    @wraps(read)
    def reading(path: Path) -> str | None:
        RAN.clear()
        began, line = time.monotonic(), None
        try:
            read(path)
        except UserError as error:
            line = str(error)
        assert time.monotonic() - began < SECONDS
        assert not RAN, RAN
        assert line is None or (line.isprintable() and len(line) < 1000), line
        return line

    return reading


@one_line
def read_checkpoint(path: Path) -> None:
    lessons.load(str(path))


def command_line(main: Callable[..., None], words: list[str], **groups: type) -> None:
    """Run it, and raise what it said before it ended."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            cli.run(main, words, presets=True, **groups)
        except SystemExit as end:
            if end.code:
                line = said.getvalue().strip().splitlines()[-1]
                raise UserError(line) if line.startswith("error: ") else ValueError(line) from None


@wraps(train_mnist.main)
def main(**arguments: Any) -> None:
    """Lesson 5's command line, whose training is not begun."""


@one_line
def read_resumed(path: Path) -> None:
    command_line(main, ["--resume", str(path), "--device", "cpu"], network=UNet)


@one_line
def read_preset(path: Path) -> None:
    command_line(main, ["--config", str(path)], network=UNet)


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
    head = draw(st.booleans())
    good = IDX[name]
    body = draw(changed(good[:16])) + good[16:] if head else draw(changed(good))
    return {**IDX, name: body}


@one_line
def read_idx(folder: Path) -> None:
    data = mnist.load("mnist", folder)
    assert data.train.dtype == torch.uint8
    assert data.train.shape[1:] == data.test.shape[1:]
    assert len(data.train) == len(data.train_labels)


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
    """A preset with other values, other keys, other bytes."""
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
    """A mask with other bytes, other sizes in its header, or of another kind."""
    kind = draw(st.sampled_from(["bytes", "header", "other", "text"]))
    if kind == "bytes":
        return draw(changed(GOOD_PNG))
    if kind == "header":  # with the right sum, so that it is believed
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


@one_line
def read_png(path: Path) -> None:
    assert read_mask(str(path), (1, 28, 28)).shape == (1, 1, 28, 28)
