"""Files and folders: atomic writes, the output folder and its lock, rows of CSV, downloads."""

import contextlib
import csv
import hashlib
import http.client
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from filelock import FileLock, Timeout

from common.errors import UserError, one_line

ROOT = Path(__file__).resolve().parent.parent
MAX_BYTES = 4 * 10**9  # of a download
MAX_SECONDS = 1800.0
TIMEOUT = 10.0  # seconds without a byte after which a server is given up


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Write a temporary file beside it, flush it to the disk, then rename it: whoever opens path
    finds the old content or the new one, and never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":  # the new name must be on the disk, too
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(
            f"{path} could not be written ({error.strerror}); files saved before are unharmed"
        ) from None


def remove_unfinished(folder: Path, pattern: str) -> None:
    """Remove what a process that was killed in write_atomically left of files like pattern."""
    for temporary in folder.glob(f".{pattern}.*.part"):
        temporary.unlink(missing_ok=True)


def expand(path: str | Path) -> Path:
    """The path, with the home folder in place of a leading ~."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # ~nobody
        raise UserError(f"{path}: {one_line(error)}") from None


def output_folder(output_dir: str | None, lesson: str) -> Path:
    """output_dir if it is given, else output/ in the lesson's folder; made, and known writable."""
    if output_dir == "":
        raise UserError("--output_dir is empty: name a folder, or leave the flag out")
    default = ROOT.joinpath(*lesson.split("."), "output")
    folder = default if output_dir is None else expand(output_dir)
    make_folder(folder)
    return folder


def make_folder(folder: Path) -> None:
    """Make a folder, and check that files can be written there."""
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


def lock_folder(folder: Path) -> FileLock:
    """Lock the folder until release() or the end of this process, even if it is killed."""
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"another run is writing into {folder}: wait until it ends, or name another "
            "--output_dir"
        ) from None
    except (OSError, NotImplementedError) as error:  # some network drives have no locks
        print(
            f"{folder} cannot be locked ({one_line(error)}): make sure that no other run writes "
            "there",
            file=sys.stderr,
        )
    return lock


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a CSV file; a new file gets its header first."""
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row), lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow({k: v if isinstance(v, int) else f"{v:.6g}" for k, v in row.items()})


def keep_rows(path: Path, step: int) -> None:
    """Drop the rows of later steps, which will be written again, and rows that were cut short."""
    if not path.exists():
        return
    header, *rows = path.read_text(errors="replace").splitlines(keepends=True) or [""]

    def is_whole(row: str) -> bool:
        return row.endswith("\n") and row.count(",") == header.count(",")

    def is_up_to_step(row: str) -> bool:
        number = row.partition(",")[0]
        return number.isdecimal() and int(number) <= step

    kept = [row for row in rows if is_whole(row) and is_up_to_step(row)]
    write_atomically(path, "".join([header, *kept] if is_whole(header) else []).encode())


def check_sha256(sha256: str | None) -> None:
    """Refuse a checksum that is none, such as that of an unset variable; None is not given."""
    if sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise UserError(f"--sha256 {sha256!a:.80}: a sha256 has 64 hexadecimal digits")


def is_address(source: str | Path) -> bool:
    return str(source).startswith(("http://", "https://"))


def cached(address: str) -> Path:
    """Where the file of an address is kept. No part of the address or of an answer is a path."""
    cache = expand(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "diffusion-lessons"
    return cache / f"{hashlib.sha256(address.encode()).hexdigest()[:32]}.safetensors"


def fetch(address: str, sha256: str | None, check: Callable[[Path], object]) -> Path:
    """The file of an address, from the cache; downloaded if it is not there yet.

    Args:
        address: http(s).
        sha256: of the file. One in the cache with another sum is downloaded again.
        check: raises ValueError for a file that is not what was wanted.
    """
    path = cached(address)
    if not path.exists() or (sha256 and file_sha256(path) != sha256.lower()):
        download(address, path, sha256, check)
    return path


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(address: str, path: Path, sha256: str | None, check: Callable[[Path], object]) -> None:
    """Download into path, whole and checked, or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = receive(address, temporary, TIMEOUT)
        if sha256 and digest != sha256.lower():
            raise ValueError(f"it has the sha256 {digest}, not {sha256}")
        check(temporary)
        os.replace(temporary, path)
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = one_line(error).replace(str(temporary), "the file")[:200]
        raise UserError(f"{address} could not be downloaded ({reason}): nothing was kept") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def receive(address: str, path: Path, timeout: float) -> str:
    """Write what the server sends; returns its sha256.

    Size and time are limited, certificates are checked, and no server can lead from https to http.
    """
    digest, size, end = hashlib.sha256(), 0, time.monotonic() + MAX_SECONDS
    with urlopen(address, timeout=timeout) as answer, path.open("wb") as file:
        if address.startswith("https:") and not answer.geturl().startswith("https:"):
            raise ValueError("the server redirects to an address that is not encrypted")
        announced = int(answer.headers.get("Content-Length") or -1)
        while block := answer.read1(1 << 16):
            size += len(block)
            if max(size, announced) > MAX_BYTES:
                raise ValueError(f"it is larger than {MAX_BYTES:,} bytes")
            if time.monotonic() > end:
                raise ValueError(f"it took longer than {MAX_SECONDS:.0f} s")
            digest.update(block)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    if announced not in (-1, size):
        raise ValueError(f"it was cut short after {size:,} of {announced:,} bytes")
    return digest.hexdigest()
