"""Checkpoints: written whole or not at all, read without running anything that is in them.

One file holds everything: "format", "lesson", "config", "dataset", "step", "ema" and "training".
`ema` is the network to sample from; `training` is what a run needs to go on, and is absent from the
small files made for sampling by `python -m common.checkpoint --training FILE --small FILE`.
"""

import contextlib
import hashlib
import io
import os
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.mnist import TIMEOUT, give_up_after

FORMAT = 1
KEYS = {"lesson": str, "config": dict, "dataset": str, "step": int, "ema": dict}

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
    path = fetch(str(source)) if is_address(source) else Path(source).expanduser()
    check_file(path, sha256)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} holds more than tensors and plain values; it could run code and was not loaded"
        ) from None
    except Exception as error:  # a damaged archive fails in many ways
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"{path} is damaged and cannot be loaded ({reason})") from None
    check_content(path, content, lesson)
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
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is no checkpoint, or was cut short: copy or download it again")
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    if not stored or sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise UserError(f"{path} claims more than it holds and was not loaded")


def check_content(path: Path, content: Any, lesson: str | None) -> None:
    if not isinstance(content, dict) or "format" not in content:
        raise UserError(f"{path} holds no checkpoint of these lessons")
    if content["format"] != FORMAT:
        raise UserError(
            f"{path} has format {content['format']}, but this version reads {FORMAT}: "
            "update the repository"
        )
    for key, kind in KEYS.items():
        if not isinstance(content.get(key), kind):
            raise UserError(f"{path} is damaged: it has no valid {key!r}")
    if lesson is not None and content["lesson"] != lesson:
        raise UserError(
            f"{path} is a checkpoint of {content['lesson']}, not of {lesson}: "
            f"sample it with the scripts in {content['lesson'].replace('.', '/')}/"
        )


def load_weights(network: N, content: Checkpoint) -> N:
    """The averaged weights, into a network of the same shape, in float32 and eval mode."""
    weights = {key.removeprefix("module."): value for key, value in content["ema"].items()}
    weights.pop("n_averaged", None)
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False)


@contextlib.contextmanager
def must_fit(source: str | Path) -> Iterator[None]:
    """While what a checkpoint describes is built: say in one line what does not fit."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{source} is damaged: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{source} is damaged: its config and weights do not fit ({reason})"
        ) from None


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


def fetch(address: str) -> Path:
    """The file behind an address, in the cache; downloaded if it is not there yet."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    path = home / "diffusion-lessons" / (hashlib.sha256(address.encode()).hexdigest()[:32] + ".pt")
    if path.exists():
        return path
    partial = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with give_up_after(TIMEOUT):
            torch.hub.download_url_to_file(address, str(partial))
        if not zipfile.is_zipfile(partial):
            raise UserError(f"{address} gave no checkpoint, or was cut short: nothing was kept")
        os.replace(partial, path)
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{address} could not be downloaded ({error}): nothing was kept") from None
    finally:
        partial.unlink(missing_ok=True)
    return path


def shrink(training: str, small: str) -> None:
    """Make the small file for sampling: the averaged weights in half precision, and the config.

    Args:
        training: the checkpoint of a training run.
        small: the file to write.
    """
    content = load(training)
    content.pop("training", None)
    content.pop("format")
    content["ema"] = {
        key: value.half() if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in content["ema"].items()
    }
    save(Path(small), content)
    print(f"{small}: {Path(small).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    from common import cli

    cli.run(shrink)
