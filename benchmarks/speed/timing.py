"""The times of several libraries, measured in alternation, and their ratios."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from tqdm import tqdm

PRECISIONS: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
Times = dict[tuple[str, str, str], float]  # (library, precision, memory format) -> seconds


def median_times(
    functions: Mapping[Any, Callable[[], object]], repeats: int, title: str, warm_up: bool = True
) -> dict[Any, float]:
    """The median seconds of each function.

    Each round calls every function once, so that a temporary slowdown affects them all.
    The first round is the warm-up and is not counted.
    """
    seconds: dict[Any, list[float]] = {name: [] for name in functions}
    for repeat in tqdm(range(repeats + warm_up), desc=title, unit="round", disable=None):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            synchronize()
            if repeat >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def synchronize() -> None:
    """Wait until the GPU, if there is one, has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    if torch.backends.mps.is_available():
        torch.mps.synchronize()


def best(times: Times, name: str, precision: str | None = None) -> float:
    """The seconds of a library in its fastest memory format, and fastest precision unless given."""
    return min(s for (n, p, _), s in times.items() if n == name and precision in (None, p))


def compare(times: Times, batch_size: int) -> dict[str, Any]:
    """Images per second, and lesson 5's speed relative to each library, in its fastest format."""
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
    """Three significant digits, without powers of ten."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
