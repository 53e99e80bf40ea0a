"""Speed and memory beside other libraries, all in one run on the machine at hand."""

import json
import multiprocessing
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn.utils import clip_grad_norm_
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.contenders import Contender, T, contenders, count, make, preset, surroundings
from benchmarks.parts import attention, bookkeeping, shares, whole
from benchmarks.timing import FORMATS, PRECISIONS, best, compared, in_turn, three_digits
from common import checkpoint, cli
from common.device import autocast, pick_device
from common.run import check
from common.subject import ROOT

Part = Literal["training", "sampling", "memory", "bookkeeping", "attention", "whole"]
PARTS: tuple[Part, ...] = ("training", "sampling", "memory", "bookkeeping", "attention", "whole")
SIZE = 32  # MNIST's 28, padded to what can be halved three times


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
    """Measure and write bench.md and bench.json: medians of repeats, taken in turn.

    Args:
        parts: what to measure. training: a step of it; sampling: a step of it; memory: the most
            that training takes; bookkeeping: the share of lesson 5's step that is not the network;
            attention: lesson 5's, beside PyTorch's fused one; whole: 64 samples, noise to image.
        network: the preset of lesson 5 whose network is trained and sampled by the step.
        whole_network: the preset whose network draws whole samples.
        batch_size: images a step.
        repeats: of each step, after one that does not count.
        whole_repeats: of whole samples.
        num_samples: whole samples.
        num_steps: the steps of a whole sample by DDPM; DDIM takes a twentieth of them.
        output_dir: folder of the files; benchmarks/output/bench unless given.
        device: auto, cpu, cuda, cuda:1, mps.
    """
    numbers = {"batch_size": batch_size, "repeats": repeats, "whole_repeats": whole_repeats}
    check(lambda v: v >= 1, "at least 1", **numbers, num_samples=num_samples)
    check(lambda v: 25 <= v <= T, f"from 25 to {T:,}", num_steps=num_steps)
    place = pick_device(device)
    folder = Path(output_dir) if output_dir else ROOT / "benchmarks" / "output" / "bench"
    checkpoint.make_folder(folder)
    shape, result = preset(network), surroundings(place)
    sections: dict[str, Callable[[], Any]] = {
        "training": lambda: training(shape, batch_size, repeats, place),
        "sampling": lambda: sampling(shape, batch_size, repeats, place),
        "memory": lambda: memory(network, batch_size, place),
        "bookkeeping": lambda: bookkeeping(batch_size, repeats, place),
        "attention": lambda: attention(batch_size, repeats, place),
        "whole": lambda: whole(preset(whole_network), num_samples, num_steps, whole_repeats, place),
    }
    for part in parts:
        result[part] = sections[part]()
        text = json.dumps(result, indent=2)
        checkpoint.write_whole(folder / "bench.json", (text + "\n").encode())
        checkpoint.write_whole(folder / "bench.md", (report(result) + "\n").encode())
    print(report(result))
    print(f"\n{folder}/bench.md, bench.json")


def step_of_training(
    contender: Contender, batch_size: int, precision: Any, device: torch.device
) -> Callable[[], object]:
    """The same step for every library: what differs is the network."""
    xt = torch.randn(batch_size, 1, SIZE, SIZE, device=device)
    eps, t = torch.randn_like(xt), torch.randint(1, T + 1, (batch_size,), device=device)
    contender.model.train()
    optimizer = torch.optim.Adam(contender.model.parameters(), lr=2e-4, fused=True)

    def step() -> None:
        with autocast(device, precision):
            loss = ((contender.estimate(xt, t) - eps) ** 2).mean()
        loss.backward()
        clip_grad_norm_(contender.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def variants(network: dict[str, Any], device: torch.device) -> dict[tuple[str, str], Contender]:
    """Every contender in both memory formats."""
    result = {}
    for name, memory_format in FORMATS.items():
        for contender in contenders(network, 1, SIZE):
            contender.to(device)
            contender.model.to(device).to(memory_format=memory_format)
            result[contender.name, name] = contender
    return result


def training(
    network: dict[str, Any], batch_size: int, repeats: int, device: torch.device
) -> dict[str, Any]:
    """A training step of each network, in both precisions and memory formats."""
    known = variants(network, device)
    tasks = {
        (name, precision, layout): step_of_training(contender, batch_size, precision, device)
        for (name, layout), contender in known.items()
        for precision in PRECISIONS
    }
    times = in_turn(tasks, repeats, "training")
    peaks = {precision: matrix_peak(precision, device) for precision in PRECISIONS}
    counted = {
        name: operations(step_of_training(contender, batch_size, "float32", device))
        for (name, layout), contender in known.items()
        if layout == "contiguous"
    }
    flops = {name: sum(kinds.values()) for name, kinds in counted.items()}
    convolutions = sum(n for kind, n in counted["lesson 5"].items() if "convolution" in kind)
    share_of_peak = {
        precision: flops["lesson 5"] / best(times, "lesson 5", precision) / peaks[precision]
        for precision in PRECISIONS
    }
    seconds, precision, layout = min(
        (s, precision, layout)
        for (name, precision, layout), s in times.items()
        if name == "lesson 5"
    )
    quickest = known["lesson 5", layout]
    spent = shares(step_of_training(quickest, batch_size, precision, device), device)
    in_convolutions = spent["convolutions"] * seconds
    return {
        **compared(times, batch_size),
        "parameters": {name: count(contender.model) for (name, _), contender in known.items()},
        "flops_per_image": {name: number / batch_size for name, number in flops.items()},
        "matrix_peak_flops": peaks,
        "share_of_peak": share_of_peak,
        "quickest": f"{precision}, {layout}",
        "spent_on": spent,
        "convolutions_share_of_peak": convolutions / in_convolutions / peaks[precision],
        "ratio_of_convolutions": best(times, "diffusers") / in_convolutions,
    }


def operations(step: Callable[[], object]) -> dict[str, int]:
    """The floating-point operations of a step, by kind, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        step()
    return {str(kind): number for kind, number in counter.get_flop_counts()["Global"].items()}


def sampling(
    network: dict[str, Any], batch_size: int, repeats: int, device: torch.device
) -> dict[str, Any]:
    """A step of DDPM's sampler, each library's own."""
    xt = torch.randn(batch_size, 1, SIZE, SIZE, device=device)

    def step(contender: Contender, precision: Any) -> None:
        with torch.no_grad(), autocast(device, precision):
            contender.step_back(xt, 500)

    tasks = {}
    for (name, layout), contender in variants(network, device).items():
        contender.model.eval()
        for precision in PRECISIONS:
            tasks[name, precision, layout] = partial(step, contender, precision)
    return compared(in_turn(tasks, repeats, "sampling"), batch_size)


def matrix_peak(precision: str, device: torch.device, size: int = 2048) -> float:
    """The machine's own matrix product, in floating-point operations a second."""
    dtype = getattr(torch, precision)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / in_turn({"": lambda: a @ b}, 7, f"matrix product, {precision}")[""]


def memory(network: str, batch_size: int, device: torch.device) -> dict[str, float]:
    """The most memory that two training steps take, in GB: of the GPU, or of a process that does
    nothing else (with torch itself in it)."""
    context = multiprocessing.get_context("spawn")
    result = {}
    for name in ("lesson 5", "diffusers", "denoising-diffusion-pytorch"):
        with context.Pool(1) as pool:
            arguments = (name, network, batch_size, str(device), torch.get_num_threads())
            result[name] = pool.apply(peak, arguments)
    return result


def peak(name: str, network: str, batch_size: int, device: str, threads: int) -> float:
    torch.set_num_threads(threads)
    place = pick_device(device)
    contender = make(name, preset(network), 1, SIZE)
    contender.to(place)
    contender.model.to(place).to(memory_format=torch.channels_last)
    step = step_of_training(contender, batch_size, "auto", place)
    for _ in range(2):
        step()
    if place.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")
    if status.exists():  # resource's figure would be at least the parent's own size
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) / 1e6
    import resource  # not on Windows

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (1e9 if sys.platform == "darwin" else 1e6)


def report(result: Mapping[str, Any]) -> str:
    """Markdown of what was measured."""
    lines = [f"Measured in one run: {result['hardware']}; commit {result['commit']}."]
    lines.append(", ".join(f"{name} {number}" for name, number in result["versions"].items()))
    for part in ("training", "sampling"):
        if part in result:
            lines += compared_lines(f"A step of {part}", result[part])
    for name, figures in result.get("whole", {}).items():
        lines += compared_lines(f"Samples from noise to image: {name}", figures)
    if "training" in result:
        lines += training_lines(result["training"])
    if "attention" in result:
        lines += ["", "Attention, there and back: how many times as long the fused one takes:"]
        for what, times in result["attention"].items():
            lines.append(f"- {what}: {times['fused'] / times['written out']:.2f}")
    for part, what, form in (
        ("memory", "The most memory that training takes, GB, what was imported included:", ".2f"),
        ("bookkeeping", "The share of lesson 5's step outside its network:", ".1%"),
    ):
        if part in result:
            lines += ["", what, *(f"- {k}: {format(v, form)}" for k, v in result[part].items())]
    return "\n".join(lines)


def training_lines(figures: Mapping[str, Any]) -> list[str]:
    """What a step of training costs, and where lesson 5's time goes."""
    lines = ["", "| | parameters | operations an image, trained |", "|---|---|---|"]
    for name, flops in figures["flops_per_image"].items():
        lines.append(f"| {name} | {figures['parameters'][name]:,} | {flops / 1e9:.3g} billion |")
    lines += ["", "Lesson 5's training step reaches this share of the matrix product's peak:"]
    reached = figures["share_of_peak"]
    lines += [f"- {precision}: {share:.0%}" for precision, share in reached.items()]
    lines += ["", f"Where its time goes ({figures['quickest']}):"]
    lines += [f"- {kind}: {share:.1%}" for kind, share in figures["spent_on"].items()]
    share, ratio = figures["convolutions_share_of_peak"], figures["ratio_of_convolutions"]
    return [
        *lines,
        "",
        f"Its convolutions reach {share:.0%} of the peak; a step of nothing else would be "
        f"{ratio:.2f} times as quick as diffusers'.",
    ]


def compared_lines(title: str, figures: Mapping[str, Any]) -> list[str]:
    lines = ["", title, "", "| | images/s |", "|---|---|"]
    speeds = figures["images_per_second"]
    lines += [f"| {name} | {three_digits(speed)} |" for name, speed in speeds.items()]
    lines += ["", "| lesson 5 is as many times as quick as | |", "|---|---|"]
    return lines + [f"| {name} | {ratio:.2f} |" for name, ratio in figures["ratio"].items()]


if __name__ == "__main__":
    cli.run(main)
