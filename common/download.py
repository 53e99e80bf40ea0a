"""A file from an http(s) address: whole and checked, or not at all."""

import contextlib
import hashlib
import http.client
import os
import time
from collections.abc import Callable
from pathlib import Path
from urllib.request import urlopen

from common.errors import UserError

MOST_BYTES = 4 * 10**9
MOST_SECONDS = 1800.0
SILENCE = 10.0  # seconds without a byte after which a server is given up


def download(
    address: str,
    path: Path,
    sha256: str | None = None,
    look_at: Callable[[Path], object] = Path.stat,
    silence: float = SILENCE,
) -> None:
    """The file behind the address, as path; its name on the server is of no account.

    It has to have the sha256, if one is given, and look_at raises ValueError where it is not what
    was wanted. Size and time are limited, certificates are checked, and no server can lead from
    https to http.
    """
    partial = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = receive(address, partial, silence)
        if sha256 and digest != sha256.lower():
            raise ValueError(f"it has the sha256 {digest}, not {sha256}")
        look_at(partial)
        os.replace(partial, path)
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{address} could not be downloaded ({reason}): nothing was kept") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def receive(address: str, partial: Path, silence: float) -> str:
    """Write what the server sends; returns its sha256."""
    digest, size, end = hashlib.sha256(), 0, time.monotonic() + MOST_SECONDS
    with urlopen(address, timeout=silence) as answer, partial.open("wb") as file:
        if address.startswith("https:") and not answer.geturl().startswith("https:"):
            raise ValueError("the server leads to an address that is not encrypted")
        announced = int(answer.headers.get("Content-Length") or -1)
        while block := answer.read1(1 << 16):
            size += len(block)
            if max(size, announced) > MOST_BYTES:
                raise ValueError(f"it is larger than {MOST_BYTES:,} bytes")
            if time.monotonic() > end:
                raise ValueError(f"it took longer than {MOST_SECONDS:.0f} s")
            digest.update(block)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    if announced not in (-1, size):
        raise ValueError(f"it was cut short after {size:,} of {announced:,} bytes")
    return digest.hexdigest()
