"""What to measure besides the speed of a step: where the time of a step of lesson 5 goes, the share
of it that is not the network, and whole samples."""

import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.profiler import ProfilerActivity, profile

from benchmarks.contenders import T, preset, unet2d
from benchmarks.timing import FORMATS, PRECISIONS, best, compared, finish, in_turn
from common import mnist
from common.device import autocast
from common.ema import Ema
from common.run import Run, RunOptions
from lesson_05.ddpm import DDPM, linear_beta
from lesson_05.unet import SelfAttention, UNet, resolutions
from lesson_06.ddim import ddim_sample

KINDS = {  # what the name of an operation holds, and what it then is; the first that fits
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


def shares(step: Callable[[], object], device: torch.device, steps: int = 3) -> dict[str, float]:
    """The share of a step's time that each kind of operation takes, largest first."""
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
                finish()
                network.append(time.perf_counter() - inner)
                grad_norm = clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                ema.update_parameters(model)
                run.record(losses, t, T, grad_norm=grad_norm)
                whole.append(time.perf_counter() - begin)
    return 1 - statistics.median(network[2:]) / statistics.median(whole[2:])


class FusedAttention(SelfAttention):
    """Lesson 5's block, by PyTorch's one function for attention instead of two products."""

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
    """Seconds of lesson 5's attention blocks there and back, in bfloat16, written out as they are
    and by PyTorch's fused attention instead; by preset and size of the feature maps."""
    result = {}
    for name, image_size, size in (("laptop", 28, 64), ("paper", 32, batch_size)):
        network = preset(name)
        sides = resolutions(image_size, len(network["multipliers"]))
        for side, multiplier in zip(sides, network["multipliers"], strict=True):
            if side in network["attention_resolutions"]:
                width = multiplier * network["channels"]
                h = torch.randn(size, width, side, side, device=device)
                tasks = {}
                for way, kind in (("written out", SelfAttention), ("fused", FusedAttention)):
                    block = kind(width, network["num_heads"], network["num_groups"]).to(device)
                    tasks[way] = partial(there_and_back, block, h, device)
                what = f"{name}, {side}x{side}, {width} features, batches of {size}"
                result[what] = in_turn(tasks, 5 * repeats, f"attention, {name}")
    return result


def there_and_back(block: SelfAttention, h: Tensor, device: torch.device) -> None:
    with autocast(device, "bfloat16"):
        y = block(h)
    y.sum().backward()


def whole(
    network: dict[str, Any], num_samples: int, num_steps: int, repeats: int, device: torch.device
) -> dict[str, Any]:
    """From noise to images, beside diffusers' pipelines: the same shape of network, random.

    DDPM, which takes long, is timed once, each contender in the memory format that DDIM was quicker
    in.
    """
    from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler

    few = num_steps // 20
    # The last layer of a new network gives zeros: both draw the same nothing, as fast as any.
    ours, theirs = UNet(1, 28, **network).eval(), unet2d(network, 1, 28).eval()
    processes = {"DDPM": DDPM(linear_beta(num_steps)).to(device), "DDIM": DDPM(linear_beta(T))}
    pipelines: dict[str, Any] = {
        "DDPM": DDPMPipeline(theirs, DDPMScheduler(T)),
        "DDIM": DDIMPipeline(theirs, DDIMScheduler(T)),
    }
    for pipeline in pipelines.values():
        pipeline.set_progress_bar_config(disable=True)

    def lesson(sampler: str) -> Tensor:
        x_T = torch.randn(num_samples, 1, 28, 28, device=device)
        if sampler == "DDIM":
            return ddim_sample(ours, processes[sampler], x_T, few).cpu()
        return processes[sampler].sample(ours, x_T).cpu()

    def library(sampler: str) -> Any:
        steps = few if sampler == "DDIM" else num_steps
        return pipelines[sampler](num_samples, num_inference_steps=steps, output_type="np")

    draws = {"lesson 5": lesson, "diffusers": library}

    def one(sampler: str, name: str, precision: Any, layout: str) -> None:
        for model in (ours, theirs):
            model.to(device).to(memory_format=FORMATS[layout])
        with torch.no_grad(), autocast(device, precision):
            draws[name](sampler)

    keys = list(product(draws, PRECISIONS, FORMATS))
    tasks = {key: partial(one, "DDIM", *key) for key in keys}
    ddim = in_turn(tasks, repeats, f"DDIM, {few} steps")
    quickest = [key for key in keys if ddim[key] == best(ddim, *key[:2])]
    tasks = {key: partial(one, "DDPM", *key) for key in quickest}
    ddpm = in_turn(tasks, 1, f"DDPM, {num_steps} steps", warm_up=False)
    return {
        f"DDIM, {few} steps": compared(ddim, num_samples),
        f"DDPM, {num_steps} steps": compared(ddpm, num_samples),
    }
