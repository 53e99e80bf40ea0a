"""Train a DDPM on MNIST with its labels: lesson 5's loop, and the label."""

from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch.nn.utils import clip_grad_norm_

from common import cli, mnist
from common.ema import Ema
from common.images import save_grid
from common.run import Run, RunOptions, check, learning_rate_factor
from lesson_05.class_conditional.network import ClassConditionalUNet
from lesson_05.class_conditional.sample_mnist import save_classes
from lesson_05.ddpm import DDPM, Variance, linear_beta, preview
from lesson_05.guidance import drop
from lesson_05.train_mnist import held_out_loss, save_losses
from lesson_05.unet import UNet


def main(
    dataset: mnist.Dataset = "auto",
    data_dir: str | None = None,
    network: dict[str, Any] | None = None,
    drop_probability: float = 0.1,
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
    """Train a class-conditional DDPM [Ho20 Algorithm 1, HoSalimans22 Algorithm 1].

    Args:
        dataset: auto is MNIST or, where it cannot be had, the digits that come with scikit-learn.
        data_dir: folder of the data in torchvision's layout; else $DIFFUSION_DATA, else data/.
        network: the arguments of the U-Net.
        drop_probability: that the null class takes a label's place, for each image by itself.
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
    with Run(options, Path(__file__).parent, "lesson_05.class_conditional") as run:
        data = mnist.load(dataset, data_dir)
        batches = mnist.Batches(data.train, data.train_labels, batch_size, options.seed, run.device)
        if num_epochs is not None:
            num_training_steps = num_epochs * batches.per_epoch
        num_classes = int(data.train_labels.max()) + 1

        process = DDPM(linear_beta(num_timesteps, beta_1, beta_T), variance).to(run.device)
        network = {"image_channels": data.channels, "image_size": data.size, **(network or {})}
        model = ClassConditionalUNet(num_classes, **network)
        run.prepare(model)
        ema = Ema(model, ema_decay)
        averaged = cast(ClassConditionalUNet, ema.module)
        optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, fused=True)
        factor = learning_rate_factor(num_training_steps, num_warmup_steps, decay_learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        config |= {"network": network, "num_classes": num_classes}
        run.track(config, data.name, model=model, ema=ema, optimizer=optimizer, schedule=schedule)
        run.describe("Class-conditional DDPM", model, data)
        parallel = run.parallel(model)  # the model itself, but for torchrun and --accumulate

        for step in run.steps(num_training_steps):
            x0, label = batches[step]
            label = drop(label, model.null(label), drop_probability)
            t = torch.randint(1, num_timesteps + 1, (batch_size,), device=run.device)
            eps = torch.randn_like(x0)
            with run.autocast():
                losses = process.loss(partial(parallel, label=label), x0, t, eps)
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
                    bound = averaged.bind(data.test_labels[:256].to(run.device))
                    run.log(batch_size, held_out_loss=held_out_loss(process, bound, data.test))
            if run.due("preview"):
                with run.looking():
                    labels = torch.arange(options.num_previews, device=run.device) % num_classes
                    x_T = torch.randn(len(labels), *data.shape, device=run.device)
                    x0_hat = preview(process, averaged.bind(labels), x_T)
                    save_grid(run.folder / f"samples_{step:06d}.png", x0_hat, columns=num_classes)

        save_losses(run.folder)
        run.say(f"Pictures of the training: samples_*.png, losses.png in {run.folder}")
        if num_samples > 0:
            run.say(f"Sampling {num_samples} images in {num_timesteps} steps each")
            with run.looking(options.seed):
                save_classes(process, averaged, data.shape, None, num_samples, 1.0, run.folder)
            run.say("Samples: samples.png, of the classes in labels.txt")
        run.say(
            f"More of them: python {run.script('sample_mnist.py')} --labels 3 1 4 "
            f"--model_checkpoint {run.latest()}"
        )


if __name__ == "__main__":
    cli.run(main, presets=True, network=UNet)
