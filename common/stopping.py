"""Ctrl-C, SIGTERM and SIGHUP: the first stops a script in good order, the second at once."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Ctrl-C; kill; a closed terminal, not on Windows


class Stopped(KeyboardInterrupt):
    """The first signal; `number` says which."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def stoppable(now: Callable[[int], bool] = lambda number: True) -> Iterator[None]:
    """A context in which the first signal raises Stopped if now(number) returns True. From then on
    the system's defaults apply: another signal ends the process. Ignored signals stay ignored, such
    as SIGHUP under nohup."""
    numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    heeded = [number for number, handler in before.items() if handler != signal.SIG_IGN]

    def stop(number: int, _: object) -> None:
        for other in heeded:
            signal.signal(other, signal.SIG_DFL)
        if now(number):
            raise Stopped(number)

    try:
        for number in heeded:
            signal.signal(number, stop)
        yield
    finally:
        for number in heeded:
            signal.signal(number, before[number])
