"""Two things to measure that are more than a step: whole samples, and the share of lesson 5's
training step that is not its network."""

import statistics
import tempfile
import time
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from benchmarks.contenders import T, preset, unet2d
from benchmarks.timing import FORMATS, PRECISIONS, best, compared, in_turn
from common import mnist
from common.device import autocast
from common.ema import Ema
from common.run import Run, RunOptions
from lesson_05.ddpm import DDPM, linear_beta
from lesson_05.unet import UNet
from lesson_06.ddim import ddim_sample


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
