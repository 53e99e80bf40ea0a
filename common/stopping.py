"""Ctrl-C, SIGTERM and SIGHUP stop a script in good order, and a second Ctrl-C at once."""

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
    """A context in which the first signal raises Stopped if now(number) returns True. After it,
    Ctrl-C ends the process, and further signals of the other kinds are ignored: torchrun sends
    several. Ignored signals stay ignored, such as SIGHUP under nohup."""
    numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    heeded = [number for number, handler in before.items() if handler != signal.SIG_IGN]

    def stop(number: int, _: object) -> None:
        for other in heeded:
            ends = other == signal.SIGINT
            signal.signal(other, signal.SIG_DFL if ends else signal.SIG_IGN)
        if now(number):
            raise Stopped(number)

    try:
        for number in heeded:
            signal.signal(number, stop)
        yield
    finally:
        for number in heeded:
            signal.signal(number, before[number])
