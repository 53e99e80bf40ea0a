"""Checkpoints: written whole or not at all, read without running anything that is in them.

One file holds everything: "format", "lesson", "config", "dataset", "step", "ema" and "training".
`ema` is the network to sample from; `training` is what a run needs to go on, and is absent from the
small files made for sampling by `python -m common.checkpoint --training FILE --small FILE`.
"""

import contextlib
import hashlib
import io
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from common.archive import Damaged, at_most, check_archive, check_sizes, check_values
from common.download import SILENCE, download
from common.errors import UserError, printable

FORMAT = 1
TIMEOUT = SILENCE
NAME = re.compile(r"[\w.]{1,60}", re.ASCII)
KEYS = {"lesson": str, "config": dict, "dataset": str, "step": int, "ema": dict}

# What building a network from a damaged config can fail with.
FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)

Checkpoint = dict[str, Any]
N = TypeVar("N", bound=nn.Module)


def save(path: Path, content: Checkpoint) -> None:
    """Write into a temporary file beside it, flush that to the disk, then give it the name."""
    memory = io.BytesIO()
    torch.save({"format": FORMAT, **content}, memory)
    write_whole(path, memory.getbuffer())


def write_whole(path: Path, data: bytes | memoryview) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":  # the new name, too, must be on the disk
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(
            f"{path} could not be written ({error.strerror}); what was saved before is unharmed"
        ) from None


def load(source: str | Path, lesson: str | None = None, sha256: str | None = None) -> Checkpoint:
    """Read a checkpoint from a file or an http(s) address and check that it is one.

    Args:
        source: the file, or the address, which is downloaded once and then kept in a cache.
        lesson: refuse a checkpoint of another lesson.
        sha256: refuse a file with another sum.
    """
    path = fetch(str(source), sha256) if is_address(source) else Path(source).expanduser()
    check_file(path, sha256)
    try:
        check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        check_values(content, path.stat().st_size)
        check_content(path, content, lesson)
    except UserError:
        raise
    except Exception as error:  # a damaged archive fails in many ways
        raise UserError(f"{path} is damaged and cannot be loaded ({in_a_line(error)})") from None
    return content


def check_file(path: Path, sha256: str | None) -> None:
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise UserError(
            f"checkpoint {path} {what}: name a file such as output/checkpoint_001000.pt"
        )
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest() if sha256 else None
    except OSError as error:
        raise UserError(f"checkpoint {path} cannot be read ({error.strerror})") from None
    if sha256 and digest != sha256.lower():
        raise UserError(f"{path} has the sha256 {digest}, not {sha256}: it is another file")
    if path.stat().st_size == 0:
        raise UserError(f"checkpoint {path} is empty: take an earlier one")


def check_content(path: Path, content: Any, lesson: str | None) -> None:
    if not isinstance(content, dict) or "format" not in content:
        raise UserError(f"{path} holds no checkpoint of these lessons")
    number = content["format"]
    if isinstance(number, int) and number != FORMAT:
        raise UserError(
            f"{path} has format {number}, but this version reads {FORMAT}: update the repository"
        )
    for key, kind in {"format": int, **KEYS}.items():
        if not isinstance(content.get(key), kind):
            raise Damaged(f"it has no valid {key!r}")
    for key in ("lesson", "dataset"):
        if not NAME.fullmatch(content[key]):
            raise Damaged(f"it has no valid {key!r}")
    check_sizes(content["config"])
    if lesson is not None and content["lesson"] != lesson:
        raise UserError(
            f"{path} is a checkpoint of {content['lesson']}, not of {lesson}: "
            f"sample it with the scripts in {content['lesson'].replace('.', '/')}/"
        )


def check_writable(config: dict[str, Any], dataset: str) -> None:
    """Refuse, before a run begins, what `load` would not take back at its end."""
    if not NAME.fullmatch(dataset):
        raise UserError(f"the data's name is {dataset!a}: take letters, digits, _ and . alone")
    try:
        check_sizes(config)
    except Damaged as error:
        raise UserError(f"{error}: that is more than any lesson is made for") from None


def load_weights(network: N, content: Checkpoint) -> N:
    """The averaged weights, into a network of the same shape, in float32 and eval mode."""
    weights = {key.removeprefix("module."): value for key, value in content["ema"].items()}
    weights.pop("n_averaged", None)
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False)


@contextlib.contextmanager
def must_fit(source: str | Path) -> Iterator[None]:
    """While what a checkpoint describes is built: say in one line what does not fit."""
    path = cached(str(source)) if is_address(source) else Path(source).expanduser()
    try:
        with at_most(path.stat().st_size // 2):  # a weight takes two bytes at least
            yield
    except UserError as error:
        raise UserError(f"{source} is damaged: {printable(error)}") from None
    except FAILURES as error:
        raise UserError(
            f"{source} is damaged: its config and weights do not fit ({in_a_line(error)})"
        ) from None


def in_a_line(error: BaseException) -> str:
    return printable(error)[:200] or type(error).__name__


def make_folder(folder: Path) -> None:
    """Make a folder for output and try that it can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{os.getpid()}.part"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"output folder {folder} cannot be written ({error.strerror}): "
            "name another with --output_dir"
        ) from None


def is_address(source: str | Path) -> bool:
    return str(source).startswith(("http://", "https://"))


def cached(address: str) -> Path:
    """Where the file behind an address is kept. No name from the address or a server is used."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return home / "diffusion-lessons" / (hashlib.sha256(address.encode()).hexdigest()[:32] + ".pt")


def fetch(address: str, sha256: str | None) -> Path:
    """The file behind an address, in the cache; downloaded if it is not there yet."""
    path = cached(address)
    if not path.exists():
        download(address, path, sha256, must_be_zip, TIMEOUT)
    return path


def must_be_zip(path: Path) -> None:
    if not zipfile.is_zipfile(path):
        raise ValueError("the server gave no checkpoint, or cut it short")


def shrink(training: str, small: str) -> None:
    """Make the small file for sampling: the averaged weights in half precision, and the config.

    Args:
        training: the checkpoint of a training run.
        small: the file to write.
    """
    if Path(small).exists():
        check_replaceable(Path(small))
    content = load(training)
    content.pop("training", None)
    content.pop("format")
    content["ema"] = {
        key: value.half() if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in content["ema"].items()
    }
    save(Path(small), content)
    print(f"{small}: {Path(small).stat().st_size / 1e6:.1f} MB")


def check_replaceable(small: Path) -> None:
    """Refuse to write over anything but a small checkpoint."""
    if small.is_file():
        with contextlib.suppress(UserError):
            if "training" not in load(small):
                return
    raise UserError(f"--small {small} is there, and no small checkpoint: name another file")


if __name__ == "__main__":
    from common import cli

    cli.run(shrink)
