"""Times of contenders, taken in turn, and how they compare."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from tqdm import tqdm

PRECISIONS: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
Times = dict[tuple[str, str, str], float]  # by contender, precision, memory format: seconds


def in_turn(
    tasks: Mapping[Any, Callable[[], object]], repeats: int, what: str, warm_up: bool = True
) -> dict[Any, float]:
    """The median seconds of each task: all of them once, then all once more, and so on, so that
    what slows the machine for a while slows them all. The first round is to warm up."""
    seconds: dict[Any, list[float]] = {name: [] for name in tasks}
    for repeat in tqdm(range(repeats + warm_up), desc=what, unit="round"):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            finish()
            if repeat >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def finish() -> None:
    """Wait until the GPU, if there is one, has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    if torch.backends.mps.is_available():
        torch.mps.synchronize()


def best(times: Times, name: str, precision: str | None = None) -> float:
    """The seconds of the memory format, and precision, that is quickest for this contender."""
    return min(s for (n, p, _), s in times.items() if n == name and precision in (None, p))


def compared(times: Times, batch_size: int) -> dict[str, Any]:
    """Images per second, and lesson 5's as a multiple of each, in its own best way."""
    names = list(dict.fromkeys(name for name, _, _ in times))
    choices: list[str | None] = [*PRECISIONS, None]
    return {
        "images_per_second": {", ".join(key): batch_size / s for key, s in times.items()},
        "ratio": {
            f"{name}, {choice or 'best'}": best(times, name, choice)
            / best(times, "lesson 5", choice)
            for name in names
            for choice in choices
        },
    }


def three_digits(value: float) -> str:
    """Three significant digits, but no powers of ten."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
