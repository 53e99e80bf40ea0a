"""Train a DDPM on MNIST: Algorithm 1 of Ho et al. 2020 stands in the loop below."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from common import cli, mnist
from common.ema import Ema
from common.images import from_uint8, save_curves, save_grid
from common.run import Run, RunOptions, check, learning_rate_factor
from lesson_05.ddpm import DDPM, Network, Variance, linear_beta, preview
from lesson_05.sample_mnist import save_forward, save_samples
from lesson_05.unet import UNet


def main(
    dataset: mnist.Dataset = "auto",
    data_dir: str | None = None,
    network: dict[str, Any] | None = None,
    num_timesteps: int = 1000,
    beta_1: float = 1e-4,
    beta_T: float = 0.02,
    variance: Variance = "beta",
    num_training_steps: int = 10_000,
    num_epochs: int | None = None,
    batch_size: int = 128,
    learning_rate: float = 2e-4,
    num_warmup_steps: int = 5000,
    decay_learning_rate: bool = False,
    max_grad_norm: float = 1.0,
    ema_decay: float = 0.9999,
    num_samples: int = 64,
    options: RunOptions = RunOptions(),
) -> None:
    """Train a DDPM [Ho20 Algorithm 1], showing samples as it goes, and sample it at the end.

    Args:
        dataset: auto is MNIST or, where it cannot be had, the digits that come with scikit-learn.
        data_dir: folder of the data in torchvision's layout; else $DIFFUSION_DATA, else data/.
        network: the arguments of the U-Net.
        num_timesteps: T, the steps of the diffusion.
        beta_1: variance of the first forward step, for T = 1000.
        beta_T: variance of the last one.
        variance: of the reverse steps [Ho20 Section 3.2].
        num_training_steps: optimiser steps.
        num_epochs: passes over the training images; where given, it decides.
        batch_size: images a step.
        learning_rate: of Adam.
        num_warmup_steps: steps over which the rate rises to learning_rate.
        decay_learning_rate: whether it then falls to zero in a straight line.
        max_grad_norm: a longer gradient is scaled down to this norm.
        ema_decay: of the averaged network, which is the one that is sampled.
        num_samples: images to sample at the end, 0 for none.
    """
    config = dict(locals())
    check(
        lambda value: value > 0, "above 0", learning_rate=learning_rate, max_grad_norm=max_grad_norm
    )
    check(lambda value: value >= 0, "at least 0", num_samples=num_samples)
    with Run(options, Path(__file__).parent, "lesson_05") as run:
        data = mnist.load(dataset, data_dir)
        batches = mnist.Batches(data.train, data.train_labels, batch_size, options.seed, run.device)
        if num_epochs is not None:
            num_training_steps = num_epochs * batches.per_epoch

        process = DDPM(linear_beta(num_timesteps, beta_1, beta_T), variance).to(run.device)
        network = {"image_channels": data.channels, "image_size": data.size, **(network or {})}
        model = run.prepare(UNet(**network))
        ema = Ema(model, ema_decay)
        optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, fused=True)
        factor = learning_rate_factor(num_training_steps, num_warmup_steps, decay_learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        config["network"] = network
        run.track(config, data.name, model=model, ema=ema, optimizer=optimizer, schedule=schedule)
        run.describe("DDPM [Ho20]", model, data)
        parallel = run.parallel(model)  # the model itself, but for torchrun and --accumulate

        for step in run.steps(num_training_steps):
            x0, _ = batches[step]
            t = torch.randint(1, num_timesteps + 1, (batch_size,), device=run.device)
            eps = torch.randn_like(x0)
            with run.autocast():
                losses = process.loss(parallel, x0, t, eps)  # Algorithm 1, line 5
            losses.mean().backward()
            grad_norm = clip_grad_norm_(model.parameters(), max_grad_norm)
            rate = schedule.get_last_lr()[0]
            if run.record(losses, t, num_timesteps, grad_norm=grad_norm, learning_rate=rate):
                optimizer.step()
                schedule.step()
                ema.update_parameters(model)
            optimizer.zero_grad()

            if run.due("log"):
                with run.looking():
                    run.log(batch_size, held_out_loss=held_out_loss(process, ema, data.test))
            if run.due("preview"):
                with run.looking():
                    x_T = torch.randn(options.num_previews, *data.shape, device=run.device)
                    save_grid(run.folder / f"samples_{step:06d}.png", preview(process, ema, x_T))

        save_forward(run.folder / "forward.png", process, data.test[:4])
        save_losses(run.folder)
        run.say(f"Pictures of the training: samples_*.png, forward.png, losses.png in {run.folder}")
        if num_samples > 0:
            run.say(f"Sampling {num_samples} images in {num_timesteps} steps each")
            with run.looking(options.seed):
                save_samples(process, ema, data.shape, num_samples, run.folder)
            run.say(f"Samples: samples.png, reverse.gif, reverse.png in {run.folder}")
        script = run.script("sample_mnist.py")
        run.say(f"More of them: python {script} --model_checkpoint {run.latest()}")


def held_out_loss(process: DDPM, ema: Network, levels: Tensor) -> Tensor:
    """The averaged network's loss on test images, at times spread over 1..T."""
    x0 = from_uint8(levels[:256]).to(process.signal_rate.device)
    t = torch.linspace(1, process.num_timesteps, len(x0), device=x0.device).round().long()
    return process.loss(ema, x0, t, torch.randn_like(x0)).mean()


def save_losses(folder: Path) -> None:
    """The curves of the run, with the reason why they soon look flat."""
    columns = ["loss", "held_out_loss", *(f"loss_quarter_{k}" for k in (1, 2, 3, 4))]
    save_curves(
        folder / "losses.png",
        folder / "metrics.csv",
        columns,
        "A flat curve is normal: at most t the noise is plain to see, its estimate soon good.\n"
        "What still makes samples better is the little that is gained in the first quarter of t.",
    )


if __name__ == "__main__":
    cli.run(main, presets=True, network=UNet)
