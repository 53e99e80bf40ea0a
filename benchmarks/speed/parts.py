"""Measurements besides the speed of a step: how the time of lesson 5's training step is spent, how
much of it lies outside the network, peak memory, attention, and whole samples."""

import multiprocessing
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.speed.contenders import CONTENDERS, SIZE, T, preset, training_step, unet2d
from benchmarks.speed.timing import (
    FORMATS,
    PRECISIONS,
    best,
    compare,
    median_times,
    synchronize,
)
from common.device import autocast, pick_device
from common.ema import Ema
from common.network_checks import feature_map_sizes
from common.options import TrainingOptions
from common.training import Run
from lesson_05.ddpm import DDPM, linear_beta
from lesson_05.unet import SelfAttention, UNet
from lesson_06.ddim import ddim_sample

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.profiler import ProfilerActivity, profile

KINDS = {  # part of an operation's name -> its kind; the first match counts
    "conv": "convolutions",
    "mm": "matrix products",
    "group_norm": "group norms",
    "silu": "SiLU",
    "bernoulli": "dropout's random numbers",
    "dropout": "dropout's random numbers",
    "softmax": "softmax",
    "copy": "copies and casts",
    "cat": "copies and casts",
    "adam": "Adam",
}


def time_by_kind(
    step: Callable[[], object], device: torch.device, steps: int = 3
) -> dict[str, float]:
    """The fraction of a step's time that each kind of operation takes, largest first."""
    step()
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as record:
        for _ in range(steps):
            step()
    times: Counter[str] = Counter()
    for event in record.key_averages():
        kinds = (kind for part, kind in KINDS.items() if part in event.key.lower())
        own = event.self_device_time_total if cuda else event.self_cpu_time_total
        times[next(kinds, "the rest")] += own
    return {kind: own / times.total() for kind, own in times.most_common()}


def bookkeeping(batch_size: int, repeats: int, device: torch.device) -> dict[str, float]:
    """The fraction of lesson 5's training step outside its network, by preset: the batch, t and the
    noise, clipping, the optimiser, the average, the log."""
    return {
        f"{name}, batches of {size}": share_of_bookkeeping(name, size, repeats, device)
        for name, size in (("laptop", 64), ("paper", batch_size))
    }


def share_of_bookkeeping(name: str, batch_size: int, repeats: int, device: torch.device) -> float:
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingOptions(
            output_dir=folder,
            device=str(device),
            dataset="digits",
            num_training_steps=repeats + 2,
            batch_size=batch_size,
            num_timesteps=T,
        )
        with Run("lesson_05", options) as run:
            _, batches = run.load_data()
            process = DDPM(linear_beta(T)).to(run.device)
            model = run.prepare(UNet(1, 28, **preset(name)["network"]))
            ema = Ema(model, 0.999)
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
            run.track({}, model=model, ema=ema, optimizer=optimizer)
            whole_step, network = [], []
            for step in run.steps():
                start = time.perf_counter()
                x0, _ = batches[step]
                t = torch.randint(1, T + 1, (batch_size,), device=run.device)
                eps = torch.randn_like(x0)
                network_start = time.perf_counter()
                with run.autocast():
                    losses = process.loss(model, x0, t, eps)
                losses.mean().backward()
                synchronize()
                network.append(time.perf_counter() - network_start)
                grad_norm = clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                ema.update_parameters(model)
                run.record(losses.detach(), t, grad_norm=grad_norm)
                whole_step.append(time.perf_counter() - start)
    return 1 - statistics.median(network[2:]) / statistics.median(whole_step[2:])


def memory(network: dict[str, Any], batch_size: int, device: torch.device) -> dict[str, float]:
    """The peak memory of two training steps, in GB: of the GPU, or of a process of its own, imports
    included."""
    context = multiprocessing.get_context("spawn")
    result = {}
    for name in CONTENDERS:
        with context.Pool(1) as pool:
            arguments = (name, network, batch_size, str(device), torch.get_num_threads())
            result[name] = pool.apply(peak_memory, arguments)
    return result


def peak_memory(
    name: str, network: dict[str, Any], batch_size: int, device: str, threads: int
) -> float:
    torch.set_num_threads(threads)
    place = pick_device(device)
    contender = CONTENDERS[name](network, 1, SIZE)
    contender.to(place)
    contender.model.to(place).to(memory_format=torch.channels_last)
    step = training_step(contender, batch_size, "auto", place)
    for _ in range(2):
        step()
    if place.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would report at least the parent's own size
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) / 1e6
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)


class FusedAttention(SelfAttention):
    """Lesson 5's block, with PyTorch's fused attention in place of two matrix products."""

    def forward(self, h: Tensor) -> Tensor:
        pixels = rearrange(self.norm(h), "b c h w -> b (h w) c")
        q, k, v = rearrange(
            self.qkv(pixels),
            "b n (three heads c) -> three b heads n c",
            three=3,
            heads=self.num_heads,
        )
        y = F.scaled_dot_product_attention(q, k, v)
        y = rearrange(y, "b heads n c -> b n (heads c)")
        return h + rearrange(self.out(y), "b (h w) c -> b c h w", h=h.shape[2])


def attention(batch_size: int, repeats: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Seconds of the forward and backward pass of lesson 5's attention blocks, in bfloat16, as they
    are written and with PyTorch's fused attention; by preset and size of the feature maps."""
    result = {}
    for name, image_size, size in (("laptop", 28, 64), ("paper", 32, batch_size)):
        network = preset(name)["network"]
        sides = feature_map_sizes(image_size, len(network["multipliers"]))
        for side, multiplier in zip(sides, network["multipliers"], strict=True):
            if side not in network["attention_resolutions"]:
                continue
            width = multiplier * network["channels"]
            h = torch.randn(size, width, side, side, device=device)
            passes = {}
            for way, kind in (("written out", SelfAttention), ("fused", FusedAttention)):
                block = kind(width, network["num_heads"], network["num_groups"]).to(device)
                passes[way] = partial(forward_and_backward, block, h, device)
            what = f"{name}, {side}x{side}, {width} features, batches of {size}"
            result[what] = median_times(passes, 5 * repeats, f"attention, {name}")
    return result


def forward_and_backward(block: SelfAttention, h: Tensor, device: torch.device) -> None:
    with autocast(device, "bfloat16"):
        y = block(h)
    y.sum().backward()


def whole(
    network: dict[str, Any], num_samples: int, num_steps: int, repeats: int, device: torch.device
) -> dict[str, Any]:
    """Samples from noise to image, compared with diffusers' pipelines: untrained networks of the
    same shape.

    DDPM, which takes long, is timed once, in the memory format that was faster with DDIM.
    """
    # A new network's last layer is zero, so all images are the same; the speed is not affected.
    ours, theirs = UNet(1, 28, **network).eval(), unet2d(network, 1, 28).eval()
    num_ddim_steps = num_steps // 20
    draws = {
        "lesson 5": lesson_sampler(ours, num_samples, num_steps, device),
        "diffusers": pipeline_sampler(theirs, num_samples, num_steps),
    }

    def draw(sampler: str, name: str, precision: Any, layout: str) -> None:
        for model in (ours, theirs):
            model.to(device).to(memory_format=FORMATS[layout])
        with torch.no_grad(), autocast(device, precision):
            draws[name](sampler)

    keys = list(product(draws, PRECISIONS, FORMATS))
    runs = {key: partial(draw, "DDIM", *key) for key in keys}
    ddim = median_times(runs, repeats, f"DDIM, {num_ddim_steps} steps")
    fastest = [key for key in keys if ddim[key] == best(ddim, *key[:2])]
    runs = {key: partial(draw, "DDPM", *key) for key in fastest}
    ddpm = median_times(runs, 1, f"DDPM, {num_steps} steps", warm_up=False)
    return {
        f"DDIM, {num_ddim_steps} steps": compare(ddim, num_samples),
        f"DDPM, {num_steps} steps": compare(ddpm, num_samples),
    }


def lesson_sampler(
    model: UNet, num_samples: int, num_steps: int, device: torch.device
) -> Callable[[str], object]:
    """Draws samples with lesson 5's network, by "DDPM" or by "DDIM" in a twentieth of the steps."""
    ddpm, ddim = DDPM(linear_beta(num_steps)).to(device), DDPM(linear_beta(T))

    def draw(sampler: str) -> Tensor:
        x_T = torch.randn(num_samples, 1, 28, 28, device=device)
        if sampler == "DDIM":
            return ddim_sample(model, ddim, x_T, num_steps // 20).cpu()
        return ddpm.sample(model, x_T).cpu()

    return draw


def pipeline_sampler(model: Any, num_samples: int, num_steps: int) -> Callable[[str], object]:
    """The same with diffusers' pipelines."""
    from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler

    pipelines: dict[str, tuple[Any, int]] = {
        "DDPM": (DDPMPipeline(model, DDPMScheduler(T)), num_steps),
        "DDIM": (DDIMPipeline(model, DDIMScheduler(T)), num_steps // 20),
    }
    for pipeline, _ in pipelines.values():
        pipeline.set_progress_bar_config(disable=True)

    def draw(sampler: str) -> Any:
        pipeline, steps = pipelines[sampler]
        return pipeline(num_samples, num_inference_steps=steps, output_type="np")

    return draw
