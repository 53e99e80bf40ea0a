"""Train a DPM on MNIST: the bound of Sohl-Dickstein et al. 2015 is maximised in the loop below."""

import csv
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from common import cli, mnist
from common.device import autocast
from common.ema import Ema
from common.images import from_uint8, save_grid, save_plot
from common.run import Run, RunOptions, check, learning_rate_factor
from lesson_02.dpm import (
    DPM,
    L_NULL,
    Pair,
    Standard,
    draw_times,
    erasing_beta,
    standard,
    strata,
)
from lesson_02.network import ConvDense
from lesson_02.sample_mnist import save_forward, save_samples


def main(
    dataset: mnist.Dataset = "auto",
    data_dir: str | None = None,
    network: dict[str, Any] | None = None,
    num_timesteps: int = 1000,
    learned_beta: bool = False,
    dequantize: bool = True,
    num_strata: int = 32,
    num_training_steps: int = 10_000,
    num_epochs: int | None = None,
    batch_size: int = 512,
    learning_rate: float = 1e-3,
    num_warmup_steps: int = 200,
    decay_learning_rate: bool = True,
    max_grad_norm: float = 1.0,
    ema_decay: float = 0.999,
    num_samples: int = 64,
    num_bound_images: int = 1000,
    options: RunOptions = RunOptions(),
) -> None:
    """Train a DPM [SD15 Section 2.4], showing samples and the bound as it goes.

    Args:
        dataset: auto is MNIST or, where it cannot be had, the digits that come with scikit-learn.
        data_dir: folder of the data in torchvision's layout; else $DIFFUSION_DATA, else data/.
        network: the arguments of the network.
        num_timesteps: T, the steps of the diffusion.
        learned_beta: whether the rates β_2..β_T are trained, too [SD15 Section 2.4.1].
        dequantize: whether to spread each 8-bit level over its width; without it the model can
            learn the grid, and K means nothing.
        num_strata: parts of 2..T from which an image's t is drawn, longer the later they are; T - 1
            of them are the paper's even draw.
        num_training_steps: optimiser steps.
        num_epochs: passes over the training images; where given, it decides.
        batch_size: images a step.
        learning_rate: of Adam.
        num_warmup_steps: steps over which the rate rises to learning_rate.
        decay_learning_rate: whether it then falls to zero in a straight line.
        max_grad_norm: a longer gradient is scaled down to this norm.
        ema_decay: of the averaged network, which is the one that is sampled.
        num_samples: images to sample at the end, 0 for none.
        num_bound_images: training and test images for the bound at the end; fewer while training.
    """
    config = dict(locals())
    check(
        lambda value: value > 0, "above 0", learning_rate=learning_rate, max_grad_norm=max_grad_norm
    )
    check(lambda value: value >= 0, "at least 0", num_samples=num_samples)
    check(lambda value: value >= 2, "at least 2", num_bound_images=num_bound_images)
    with Run(options, Path(__file__).parent, "lesson_02") as run:
        data = mnist.load(dataset, data_dir)
        batches = mnist.Batches(data.train, data.train_labels, batch_size, options.seed, run.device)
        if num_epochs is not None:
            num_training_steps = num_epochs * batches.per_epoch
        norm = standard(data.train)
        config |= {"data_mean": norm.mean, "data_std": norm.std}

        process = DPM(erasing_beta(num_timesteps), learned_beta).to(run.device)
        edges = strata(num_timesteps, min(num_strata, num_timesteps - 1))
        network = {"image_channels": data.channels, "image_size": data.size, **(network or {})}
        config["network"] = network = {**network, "num_timesteps": num_timesteps}
        model = run.prepare(ConvDense(**network))
        pair = Pair(model, process)
        ema = Ema(pair, ema_decay)
        average = cast(Pair, ema.module)
        optimizer = torch.optim.Adam(pair.parameters(), lr=learning_rate, fused=True)
        factor = learning_rate_factor(num_training_steps, num_warmup_steps, decay_learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        run.track(config, data.name, model=pair, ema=ema, optimizer=optimizer, schedule=schedule)
        run.describe("DPM [SD15]", model, data)
        parallel = run.parallel(model)  # the model itself, but for torchrun and --accumulate

        for step in run.steps(num_training_steps):
            images, _ = batches[step]
            x0 = norm.encode(images, dequantize)
            t, weight = draw_times(batch_size, edges, run.device)
            eps = torch.randn_like(x0)
            with run.autocast():
                losses = process.loss(parallel, x0, t, eps, weight)  # L_null - K
            losses.mean().backward()
            grad_norm = clip_grad_norm_(pair.parameters(), max_grad_norm)
            rate = schedule.get_last_lr()[0]
            if run.record(losses, t, num_timesteps, grad_norm=grad_norm, learning_rate=rate):
                optimizer.step()
                schedule.step()
                ema.update_parameters(pair)
            optimizer.zero_grad()

            if run.due("log"):
                with run.looking():
                    some = slice(min(128, num_bound_images))
                    train = gain(average, norm, data.train[some], 16, dequantize)
                    test = gain(average, norm, data.test[some], 16, dequantize)
                run.log(batch_size, **columns("train", train), **columns("test", test))
            if run.due("preview"):
                with run.looking():
                    x_T = torch.randn(options.num_previews, *data.shape, device=run.device)
                    samples = norm.decode(average.process.sample(average, x_T))
                    save_grid(run.folder / f"samples_{step:06d}.png", samples)

        save_forward(run.folder / "forward.png", process, norm, data.test[:4])
        save_bound(run.folder, process.ceiling(data.channels).item())
        run.say(f"Pictures of the training: samples_*.png, forward.png, bound.png in {run.folder}")
        for name, levels in {"training": data.train, "test": data.test}.items():
            with run.looking():
                bits = gain(average, norm, levels[:num_bound_images], 50, dequantize)
            run.say(summary(name, bits, norm, data.channels))
        if num_samples > 0:
            run.say(f"Sampling {num_samples} images in {num_timesteps - 1} steps each")
            with run.looking(options.seed):
                save_samples(average.process, average, norm, data.shape, num_samples, run.folder)
            run.say(f"Samples: samples.png, reverse.gif, reverse.png in {run.folder}")
        script = run.script("sample_mnist.py")
        run.say(f"More of them: python {script} --model_checkpoint {run.latest()}")


@torch.no_grad()
def gain(pair: Pair, norm: Standard, levels: Tensor, num_terms: int, dequantize: bool) -> Tensor:
    """K - L_null for each of the images, in bits per pixel, (N,), in float32, on the CPU."""
    process = pair.process
    num_terms = min(num_terms, process.num_timesteps - 1)
    parts = []
    with autocast(process.device, "float32"):
        for batch in levels.split(250):
            x0 = norm.encode(from_uint8(batch.to(process.device)), dequantize)
            parts.append(process.bound(pair, x0, num_terms).total.cpu())
    return torch.cat(parts)


def columns(name: str, bits: Tensor) -> dict[str, float]:
    """For metrics.csv: the mean of K - L_null over images, and its standard error."""
    error = bits.std() / len(bits) ** 0.5
    return {f"k_minus_null_{name}": bits.mean().item(), f"standard_error_{name}": error.item()}


def summary(name: str, bits: Tensor, norm: Standard, channels: int) -> str:
    mean, error = columns(name, bits).values()
    return (
        f"{len(bits):,} {name} images: K - L_null = {mean:.3f} ± {error:.3f}, "
        f"K = {mean + channels * L_NULL:.3f} ± {error:.3f} bits a pixel; "
        f"{norm.bits_per_dim(mean, channels):.3f} bits/dim"
    )


def save_bound(folder: Path, ceiling: float) -> None:
    """The bound while training, beside its ceiling."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    steps = [int(row["step"]) for row in rows]
    curves = {
        f"{name} images": (steps, [float(row[f"k_minus_null_{name}"]) for row in rows])
        for name in ("train", "test")
    }
    curves["ceiling"] = (steps, [ceiling] * len(steps))
    title = "The bound, above that of an isotropic Gaussian, and the most that β_1 lets it be."
    label = "K - L_null, bits a pixel"
    save_plot(folder / "bound.png", curves, "training step", label, title, yscale="linear")


if __name__ == "__main__":
    cli.run(main, presets=True, network=ConvDense)
