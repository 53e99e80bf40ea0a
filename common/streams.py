"""Standard output and error that cannot end a run: closed, full, or with few letters."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any


class Stream:
    """A stream whose failures are ignored. After the first, its file is the null device."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(ValueError):  # it is closed
                stream.reconfigure(errors="backslashreplace")

    def attempt(self, name: str, *arguments: Any) -> None:
        try:
            getattr(self.stream, name)(*arguments)
        except ValueError:  # it is closed
            pass
        except OSError:  # a full disk, a closed terminal
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def write(self, text: str) -> None:
        self.attempt("write", text)

    def flush(self) -> None:
        self.attempt("flush")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def forgiving_streams() -> Iterator[None]:
    """A context in which standard output and error are such streams."""
    with open(os.devnull, "w") as null:
        while (number := os.dup(null.fileno())) < 3:
            pass  # otherwise a file of ours could become a closed 0, 1 or 2
        os.close(number)
        out: Any = Stream(sys.stdout or null)
        err: Any = Stream(sys.stderr or null)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                yield
            finally:
                out.flush()
                err.flush()
