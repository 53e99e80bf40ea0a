"""Speed and memory of lesson 5 and of other libraries, measured in one run on this machine."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

from benchmarks.records import output_folder, write_json
from benchmarks.speed.contenders import (
    CONTENDERS,
    SIZE,
    Contender,
    T,
    count,
    environment,
    preset,
    training_step,
)
from benchmarks.speed.parts import attention, bookkeeping, memory, time_by_kind, whole
from benchmarks.speed.report import report
from benchmarks.speed.timing import FORMATS, PRECISIONS, best, compare, median_times
from common import cli
from common.device import Precision, autocast, pick_device
from common.errors import UserError, check_at_least
from common.files import write_atomically

import torch
from torch.utils.flop_counter import FlopCounterMode

Part = Literal["training", "sampling", "memory", "bookkeeping", "attention", "whole"]
PARTS: tuple[Part, ...] = ("training", "sampling", "memory", "bookkeeping", "attention", "whole")


def main(
    parts: Sequence[Part] = PARTS,
    network: str = "paper",
    whole_network: str = "laptop",
    batch_size: int = 16,
    repeats: int = 7,
    whole_repeats: int = 3,
    num_samples: int = 64,
    num_steps: int = 1000,
    output_dir: str | None = None,
    device: str = "auto",
) -> None:
    """Measure and write bench.md and bench.json: medians of repeats, measured in alternation.

    Args:
        parts: what to measure. training: a training step; sampling: a sampling step; memory: the
            peak while training; bookkeeping: the fraction of lesson 5's training step outside its
            network; attention: lesson 5's, compared with PyTorch's fused one; whole: 64 samples
            from noise to image.
        network: the preset of lesson 5 whose network is used for single steps.
        whole_network: the preset whose network draws whole samples.
        batch_size: images per step.
        repeats: of each step, after a warm-up.
        whole_repeats: of whole samples.
        num_samples: whole samples.
        num_steps: of a whole sample by DDPM; DDIM takes a twentieth of them.
        output_dir: folder for the files; benchmarks/output/bench unless given.
        device: auto, cpu, cuda, cuda:1, mps.
    """
    numbers = {"batch_size": batch_size, "repeats": repeats, "whole_repeats": whole_repeats}
    check_at_least(1, **numbers, num_samples=num_samples)
    if not 25 <= num_steps <= T:
        raise UserError(f"num_steps is {num_steps}: it must be from 25 to {T:,}")
    place = pick_device(device)
    folder = output_folder(output_dir, "bench")
    result = environment(place)
    shape, small = preset(network)["network"], preset(whole_network)["network"]
    sections: dict[str, Callable[[], Any]] = {
        "training": lambda: training(shape, batch_size, repeats, place),
        "sampling": lambda: sampling(shape, batch_size, repeats, place),
        "memory": lambda: memory(shape, batch_size, place),
        "bookkeeping": lambda: bookkeeping(batch_size, repeats, place),
        "attention": lambda: attention(batch_size, repeats, place),
        "whole": lambda: whole(small, num_samples, num_steps, whole_repeats, place),
    }
    for part in parts:
        result[part] = sections[part]()
        write_json(folder / "bench.json", result)
        write_atomically(folder / "bench.md", (report(result) + "\n").encode())
    print(report(result))
    print(f"\n{folder}/bench.md, bench.json")


def variants(network: dict[str, Any], device: torch.device) -> dict[tuple[str, str], Contender]:
    """Every contender in both memory formats."""
    result = {}
    for layout, memory_format in FORMATS.items():
        for name, make in CONTENDERS.items():
            contender = make(network, 1, SIZE)
            contender.to(device)
            contender.model.to(device).to(memory_format=memory_format)
            result[name, layout] = contender
    return result


def training(
    network: dict[str, Any], batch_size: int, repeats: int, device: torch.device
) -> dict[str, Any]:
    """A training step of each network, in both precisions and memory formats."""
    contenders = variants(network, device)

    def step(name: str, precision: Precision, layout: str) -> Callable[[], object]:
        return training_step(contenders[name, layout], batch_size, precision, device)

    keys = [(name, precision, layout) for name, layout in contenders for precision in PRECISIONS]
    times = median_times({key: step(*key) for key in keys}, repeats, "training")
    operations = {
        name: count_operations(step(name, "float32", "contiguous")) for name in CONTENDERS
    }
    flops = {name: sum(kinds.values()) for name, kinds in operations.items()}
    peaks = {precision: matrix_peak(precision, device) for precision in PRECISIONS}
    shares = {p: flops["lesson 5"] / best(times, "lesson 5", p) / peaks[p] for p in PRECISIONS}
    fastest = min((key for key in keys if key[0] == "lesson 5"), key=lambda key: times[key])
    _, precision, layout = fastest
    spent = time_by_kind(step(*fastest), device)
    seconds = spent["convolutions"] * times[fastest]  # spent on convolutions
    convolutions = sum(n for kind, n in operations["lesson 5"].items() if "convolution" in kind)
    return {
        **compare(times, batch_size),
        "parameters": {name: count(contenders[name, layout].model) for name in CONTENDERS},
        "flops_per_image": {name: number / batch_size for name, number in flops.items()},
        "matrix_peak_flops": peaks,
        "share_of_peak": shares,
        "quickest": f"{precision}, {layout}",
        "spent_on": spent,
        "convolutions_share_of_peak": convolutions / seconds / peaks[precision],
        "ratio_of_convolutions": best(times, "diffusers") / seconds,
    }


def count_operations(step: Callable[[], object]) -> dict[str, int]:
    """The floating-point operations of a step by kind, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        step()
    return {str(kind): number for kind, number in counter.get_flop_counts()["Global"].items()}


def sampling(
    network: dict[str, Any], batch_size: int, repeats: int, device: torch.device
) -> dict[str, Any]:
    """A step of each library's own DDPM sampler."""
    xt = torch.randn(batch_size, 1, SIZE, SIZE, device=device)

    def step(contender: Contender, precision: Any) -> None:
        with torch.no_grad(), autocast(device, precision):
            contender.p_sample(xt, 500)

    steps = {}
    for (name, layout), contender in variants(network, device).items():
        contender.model.eval()
        for precision in PRECISIONS:
            steps[name, precision, layout] = partial(step, contender, precision)
    return compare(median_times(steps, repeats, "sampling"), batch_size)


def matrix_peak(precision: str, device: torch.device, size: int = 2048) -> float:
    """The speed of a large matrix product on this device, in floating-point operations per
    second."""
    dtype = getattr(torch, precision)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = median_times({"": lambda: a @ b}, 7, f"matrix product, {precision}")[""]
    return 2 * size**3 / seconds


if __name__ == "__main__":
    cli.run(main)
