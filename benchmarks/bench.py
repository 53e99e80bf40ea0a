"""Speed and memory beside other libraries, all in one run on the machine at hand."""

import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks.contenders import (
    Contender,
    T,
    contenders,
    count,
    make,
    preset,
    surroundings,
    unet2d,
)
from common import checkpoint, cli, mnist
from common.device import autocast, pick_device
from common.ema import Ema
from common.run import Run, RunOptions, check
from common.subject import ROOT
from lesson_05.ddpm import DDPM, linear_beta
from lesson_05.unet import UNet
from lesson_06.ddim import ddim_sample

Part = Literal["training", "sampling", "memory", "bookkeeping", "whole"]
PARTS: tuple[Part, ...] = ("training", "sampling", "memory", "bookkeeping", "whole")
PRECISIONS: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
SIZE = 32  # MNIST's 28, padded to what can be halved three times
Times = dict[tuple[str, str, str], float]  # by contender, precision, memory format: seconds


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
            whole: 64 samples from noise to image.
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
    check(lambda v: 20 <= v <= T, f"from 20 to {T:,}", num_steps=num_steps)
    place = pick_device(device)
    folder = Path(output_dir) if output_dir else ROOT / "benchmarks" / "output" / "bench"
    checkpoint.make_folder(folder)
    shape, result = preset(network), surroundings(place)
    sections: dict[str, Callable[[], Any]] = {
        "training": lambda: training(shape, batch_size, repeats, place),
        "sampling": lambda: sampling(shape, batch_size, repeats, place),
        "memory": lambda: memory(network, batch_size, place),
        "bookkeeping": lambda: bookkeeping(batch_size, repeats, place),
        "whole": lambda: whole(preset(whole_network), num_samples, num_steps, whole_repeats, place),
    }
    for part in parts:
        result[part] = sections[part]()
        text = json.dumps(result, indent=2)
        checkpoint.write_whole(folder / "bench.json", (text + "\n").encode())
        checkpoint.write_whole(folder / "bench.md", (report(result) + "\n").encode())
    print(report(result))
    print(f"\n{folder}/bench.md, bench.json")


def in_turn(tasks: Mapping[Any, Callable[[], object]], repeats: int, what: str) -> dict[Any, float]:
    """The median seconds of each task: all of them once, then all once more, and so on, so that
    what slows the machine for a while slows them all. The first time does not count."""
    seconds: dict[Any, list[float]] = {name: [] for name in tasks}
    for repeat in tqdm(range(repeats + 1), desc=what, unit="round"):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat > 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


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
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    result = {}
    for name, memory_format in formats.items():
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
    lesson_5 = known["lesson 5", "contiguous"]
    with FlopCounterMode(display=False) as counter:
        step_of_training(lesson_5, batch_size, "float32", device)()
    flops = counter.get_total_flops()
    shares = {
        precision: flops / best(times, "lesson 5", precision) / peaks[precision]
        for precision in PRECISIONS
    }
    return {
        **compared(times, batch_size),
        "parameters": {name: count(contender.model) for (name, _), contender in known.items()},
        "flops_per_image": flops / batch_size,
        "matrix_peak_flops": peaks,
        "share_of_peak": shares,
    }


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
    import resource  # not on Windows

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 1e9 if sys.platform == "darwin" else most / 1e6


def bookkeeping(batch_size: int, repeats: int, device: torch.device) -> dict[str, float]:
    """The share of lesson 5's training step that is not spent in its network, by preset: the batch,
    t and the noise, clipping, the optimiser, the average, the log."""
    return {
        f"{name}, batches of {size}": share_of_bookkeeping(name, size, repeats, device)
        for name, size in (("laptop", 64), ("paper", batch_size))
    }


def share_of_bookkeeping(name: str, batch_size: int, repeats: int, device: torch.device) -> float:
    data = mnist.load("digits")
    with tempfile.TemporaryDirectory() as folder:
        options = RunOptions(output_dir=folder, device=str(device), checkpoint_every=10**9)
        with Run(options, Path(folder), "lesson_05") as run:
            batches = mnist.Batches(data.train, data.train_labels, batch_size, 0, run.device)
            process = DDPM(linear_beta(T)).to(run.device)
            model = run.prepare(UNet(1, 28, **preset(name)))
            ema = Ema(model, 0.999)
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
            run.track({}, data.name, model=model, ema=ema, optimizer=optimizer)
            whole, network = [], []
            for step in run.steps(repeats + 2):
                begin = time.perf_counter()
                x0, _ = batches[step]
                t = torch.randint(1, T + 1, (batch_size,), device=run.device)
                eps = torch.randn_like(x0)
                inner = time.perf_counter()
                with run.autocast():
                    losses = process.loss(model, x0, t, eps)
                losses.mean().backward()
                if run.device.type == "cuda":
                    torch.cuda.synchronize()
                network.append(time.perf_counter() - inner)
                grad_norm = clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                ema.update_parameters(model)
                run.record(losses, t, T, grad_norm=grad_norm)
                whole.append(time.perf_counter() - begin)
    return 1 - statistics.median(network[2:]) / statistics.median(whole[2:])


def whole(
    network: dict[str, Any], num_samples: int, num_steps: int, repeats: int, device: torch.device
) -> dict[str, Any]:
    """From noise to images, beside diffusers' pipelines: the same shape of network, random."""
    from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler

    few = num_steps // 20
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    # The last layer of a new network gives zeros, and both draw the same nothing: as fast as any.
    ours, theirs = UNet(1, 28, **network).eval(), unet2d(network, 1, 28).eval()
    process = DDPM(linear_beta(T)).to(device)
    pipelines: dict[str, Any] = {
        "DDPM": DDPMPipeline(theirs, DDPMScheduler(T)),
        "DDIM": DDIMPipeline(theirs, DDIMScheduler(T)),
    }
    for pipeline in pipelines.values():
        pipeline.set_progress_bar_config(disable=True)

    def lesson(sampler: str) -> Tensor:
        x_T = torch.randn(num_samples, 1, 28, 28, device=device)
        if sampler == "DDIM":
            return ddim_sample(ours, process, x_T, few).cpu()
        return process.sample(ours, x_T).cpu()

    def library(sampler: str) -> Any:
        steps = few if sampler == "DDIM" else num_steps
        return pipelines[sampler](num_samples, num_inference_steps=steps, output_type="np")

    def one(draw: Callable[[str], object], sampler: str, precision: Any, layout: str) -> None:
        for model in (ours, theirs):
            model.to(device).to(memory_format=formats[layout])
        with torch.no_grad(), autocast(device, precision):
            draw(sampler)

    result: dict[str, Any] = {}
    for sampler, steps in (("DDPM", num_steps), ("DDIM", few)):
        tasks = {
            (name, precision, layout): partial(one, draw, sampler, precision, layout)
            for name, draw in (("lesson 5", lesson), ("diffusers", library))
            for precision in PRECISIONS
            for layout in formats
        }
        times = in_turn(tasks, repeats, f"{sampler}, {steps} steps")
        result[f"{sampler}, {steps} steps"] = compared(times, num_samples)
    return result


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
        shares = result["training"]["share_of_peak"]
        lines += ["", "Lesson 5's training step reaches this share of the matrix product's peak:"]
        lines += [f"- {precision}: {share:.0%}" for precision, share in shares.items()]
    for part, what, form in (
        ("memory", "The most memory that training takes, GB:", ".2f"),
        ("bookkeeping", "The share of lesson 5's step outside its network:", ".1%"),
    ):
        if part in result:
            lines += ["", what, *(f"- {k}: {format(v, form)}" for k, v in result[part].items())]
    return "\n".join(lines)


def compared_lines(title: str, figures: Mapping[str, Any]) -> list[str]:
    lines = ["", title, "", "| | images/s |", "|---|---|"]
    lines += [f"| {name} | {speed:.3g} |" for name, speed in figures["images_per_second"].items()]
    lines += ["", "| lesson 5 is as many times as quick as | |", "|---|---|"]
    return lines + [f"| {name} | {ratio:.2f} |" for name, ratio in figures["ratio"].items()]


if __name__ == "__main__":
    cli.run(main)
