"""Files and folders: atomic writes, the output folder and its lock, rows of CSV, downloads."""

import contextlib
import csv
import hashlib
import http.client
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from common.errors import UserError, one_line

from filelock import FileLock, Timeout
from safetensors import SafetensorError

ROOT = Path(__file__).resolve().parent.parent
MAX_BYTES, MAX_SECONDS = 4 * 10**9, 1800.0  # of a download
TIMEOUT = 10.0  # seconds without a byte before a download fails


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to. After the block the file is flushed to the disk and renamed
    to path: a reader of path finds the old content or the new, never a part of it."""
    folder = path.with_name(f".{path.name}.{os.getpid()}.part")  # safetensors adds files of its own
    temporary = folder / path.name
    try:
        folder.mkdir(exist_ok=True)
        yield temporary
        temporary.chmod(folder.stat().st_mode & 0o666)  # else only its owner may read it
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":  # flush the new name, too
            parent = os.open(path.parent, os.O_RDONLY)
            os.fsync(parent)
            os.close(parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(
            f"{path} could not be written ({reason}); files saved before are unharmed"
        ) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Write a file whole, or leave the old one."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def remove_unfinished(folder: Path, pattern: str) -> None:
    """Remove the temporary files of a killed process that was writing files like pattern."""
    for temporary in folder.glob(f".{pattern}.*.part"):
        shutil.rmtree(temporary, ignore_errors=True)


def expand(path: str | Path) -> Path:
    """The path, with the home folder in place of a leading ~."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # ~nobody
        raise UserError(f"{path}: {one_line(error)}") from None


def output_folder(output_dir: str | None, lesson: str) -> Path:
    """output_dir, or output/ in the lesson's folder if it is None. It is made if needed."""
    if output_dir == "":
        raise UserError("--output_dir is empty: name a folder, or leave the flag out")
    default = ROOT.joinpath(*lesson.split("."), "output")
    folder = default if output_dir is None else expand(output_dir)
    make_folder(folder)
    return folder


def make_folder(folder: Path, setting: str = "--output_dir") -> None:
    """Create a folder if needed, and check that files can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(
            f"folder {folder} cannot be written ({error.strerror}): name another with {setting}"
        ) from None


def lock_folder(folder: Path) -> FileLock:
    """Lock the folder until release() or the end of this process, even if it is killed."""
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"another run is writing into {folder}: wait for its end, or name another --output_dir"
        ) from None
    except (OSError, NotImplementedError) as error:  # some network drives have no locks
        line = f"{folder} cannot be locked ({one_line(error)})"
        print(f"{line}: make sure that no other run writes there", file=sys.stderr)
    return lock


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a CSV file; a new file gets its header first."""
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row), lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow({k: v if isinstance(v, int) else f"{v:.6g}" for k, v in row.items()})


def keep_rows(path: Path, step: int) -> None:
    """Remove incomplete rows, and the rows of later steps, which will be written again."""
    if not path.exists():
        return
    header, *rows = path.read_text(errors="replace").splitlines(keepends=True) or [""]
    whole = re.compile(rf"(\d{{1,18}})(,[^,\n]*){{{header.count(',')}}}\n")
    rows = [row for row in rows if (match := whole.fullmatch(row)) and int(match[1]) <= step]
    write_atomically(path, "".join([header, *rows] if header.endswith("\n") else []).encode())


def check_sha256(sha256: str | None) -> None:
    """Refuse a text that is no sha256, such as an unset shell variable. None is accepted."""
    if sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise UserError(f"--sha256 {sha256!a:.80}: a sha256 has 64 hexadecimal digits")


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_address(source: str | Path) -> bool:
    return str(source).startswith(("http://", "https://"))


def cached(address: str) -> Path:
    """Where a download is kept. No part of the address or of the answer is used as a path."""
    cache = expand(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "diffusion-lessons"
    return cache / f"{hashlib.sha256(address.encode()).hexdigest()[:32]}.safetensors"


def fetch(address: str, sha256: str | None, check: Callable[[Path], object]) -> Path:
    """The file at an address: from the cache, else downloaded and checked.

    Args:
        address: http(s).
        sha256: the expected sha256.
        check: a function that raises ValueError for a file of the wrong kind. A cached file that
            does not pass it, or has another sha256, is downloaded again.
    """
    path = cached(address)

    def check_all(file: Path) -> None:
        if sha256 and (found := file_sha256(file)) != sha256.lower():
            raise ValueError(f"it has the sha256 {found}, not {sha256}")
        check(file)

    with contextlib.suppress(ValueError, OSError):
        check_all(path)
        return path
    make_folder(path.parent, "XDG_CACHE_HOME")
    download(address, path, check_all)
    return path


def download(address: str, path: Path, check: Callable[[Path], object]) -> None:
    """Download to path, if check does not raise ValueError for the file. The time is limited."""
    with replacing(path) as temporary:
        try:
            within(MAX_SECONDS, lambda: receive(address, temporary))
            check(temporary)
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = one_line(error).replace(str(temporary), "the file")[:200]
            line = f"{address} could not be downloaded ({reason}): nothing was kept"
            raise UserError(line) from None


def within(seconds: float, function: Callable[[], object]) -> None:
    """Call the function in a thread that is given up after so many seconds. A server that sends one
    byte of its answer now and then, of headers or chunk sizes, say, passes every other limit; and
    Ctrl-C need not wait for it."""
    future: Future[None] = Future()

    def call() -> None:
        try:
            function()
            future.set_result(None)
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    try:
        future.result(seconds)
    except TimeoutError:
        if future.done():  # a timeout of its own
            raise
        raise TimeoutError(f"it took longer than {seconds:.0f} s") from None


def receive(address: str, path: Path) -> None:
    """Download to path. The size is limited, certificates are checked, and redirects from https to
    http are refused."""
    size = 0
    request = Request(address, headers={"User-Agent": "diffusion-lessons"})
    with urlopen(request, timeout=TIMEOUT) as answer, path.open("wb") as file:
        if address.startswith("https:") and not answer.geturl().startswith("https:"):
            raise ValueError("the server redirects to an address that is not encrypted")
        announced = int(answer.headers.get("Content-Length") or -1)
        while block := answer.read1(1 << 16):
            size += file.write(block)
            if max(size, announced) > MAX_BYTES:
                raise ValueError(f"it is larger than {MAX_BYTES:,} bytes")
    if announced not in (-1, size):
        raise ValueError(f"it was cut short after {size:,} of {announced:,} bytes")
