"""Train an Improved DDPM on MNIST: the loss of Nichol & Dhariwal 2021 stands in the loop below."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from common import cli, mnist
from common.ema import Ema
from common.images import from_uint8, save_curves, save_grid
from common.run import Run, RunOptions, check, learning_rate_factor
from lesson_09.iddpm import ImprovedDDPM, Network, Schedule, Variance, named_beta
from lesson_09.sample_mnist import save_forward, save_samples
from lesson_09.timesteps import TimestepSampler, named_sampler
from lesson_09.unet import UNet


def main(
    dataset: mnist.Dataset = "auto",
    data_dir: str | None = None,
    network: dict[str, Any] | None = None,
    schedule: Schedule = "cosine",
    num_timesteps: int = 4000,
    variance: Variance = "learned",
    simple_weight: float = 1.0,
    vlb_weight: float = 1e-3,
    timestep_sampler: TimestepSampler = "uniform",
    num_training_steps: int = 10_000,
    num_epochs: int | None = None,
    batch_size: int = 128,
    learning_rate: float = 1e-4,
    num_warmup_steps: int = 0,
    decay_learning_rate: bool = False,
    max_grad_norm: float = 1.0,
    ema_decay: float = 0.9999,
    num_samples: int = 64,
    num_steps: int | None = None,
    options: RunOptions = RunOptions(),
) -> None:
    """Train an Improved DDPM [Nichol21], showing samples as it goes, and sample it at the end.

    Args:
        dataset: auto is MNIST or, where it cannot be had, the digits that come with scikit-learn.
        data_dir: folder of the data in torchvision's layout; else $DIFFUSION_DATA, else data/.
        network: the arguments of the U-Net.
        schedule: of the forward variances, linear or cosine [Nichol21 Section 3.2].
        num_timesteps: T, the steps of the diffusion.
        variance: of the reverse steps, learned or fixed [Nichol21 Section 3.1].
        simple_weight: of L_simple in the loss.
        vlb_weight: λ, of L_vlb: with simple_weight (1, 0) is L_simple, (1, 0.001) L_hybrid, (0, 1)
            L_vlb.
        timestep_sampler: uniform, or loss_aware, which is for L_vlb [Nichol21 Section 3.3].
        num_training_steps: optimiser steps.
        num_epochs: passes over the training images; where given, it decides.
        batch_size: images a step.
        learning_rate: of Adam.
        num_warmup_steps: steps over which the rate rises to learning_rate.
        decay_learning_rate: whether it then falls to zero in a straight line.
        max_grad_norm: a longer gradient is scaled down to this norm.
        ema_decay: of the averaged network, which is the one that is sampled.
        num_samples: images to sample at the end, 0 for none.
        num_steps: steps of each of them; all T unless given.
    """
    config = dict(locals())
    check(
        lambda value: value > 0, "above 0", learning_rate=learning_rate, max_grad_norm=max_grad_norm
    )
    check(lambda value: value >= 0, "at least 0", num_samples=num_samples)
    with Run(options, Path(__file__).parent, "lesson_09") as run:
        data = mnist.load(dataset, data_dir)
        batches = mnist.Batches(data.train, data.train_labels, batch_size, options.seed, run.device)
        if num_epochs is not None:
            num_training_steps = num_epochs * batches.per_epoch

        beta = named_beta(schedule, num_timesteps)
        process = ImprovedDDPM(beta, variance, simple_weight, vlb_weight).to(run.device)
        few = process.strided(min(50, num_timesteps))
        last = process.strided(num_timesteps if num_steps is None else num_steps)
        timesteps = named_sampler(timestep_sampler, num_timesteps).to(run.device)
        network = {"image_channels": data.channels, "image_size": data.size, **(network or {})}
        network["learned_variance"] = variance == "learned"
        model = run.prepare(UNet(**network))
        ema = Ema(model, ema_decay)
        optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, fused=True)
        factor = learning_rate_factor(num_training_steps, num_warmup_steps, decay_learning_rate)
        rate_schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        config["network"] = network
        run.track(
            config,
            data.name,
            model=model,
            ema=ema,
            optimizer=optimizer,
            schedule=rate_schedule,
            timesteps=timesteps,
        )
        run.describe("Improved DDPM [Nichol21]", model, data)
        parallel = run.parallel(model)  # the model itself, but for torchrun and --accumulate

        for step in run.steps(num_training_steps):
            x0, _ = batches[step]
            t, weight = timesteps.sample(batch_size)
            eps = torch.randn_like(x0)
            with run.autocast():
                simple, vlb = process.loss_terms(parallel, x0, t, eps)
            losses = weight * process.weighted(simple, vlb)  # Eq. 16, and Eq. 18's division by p_t
            losses.mean().backward()
            grad_norm = clip_grad_norm_(model.parameters(), max_grad_norm)
            rate = rate_schedule.get_last_lr()[0]
            terms = {
                "loss": losses.detach().mean(),
                "simple": (weight * simple.detach()).mean(),
                "vlb": num_timesteps * (weight * vlb.detach()).mean(),  # the sum, in bits/dim
            }
            if run.record(
                simple, t, num_timesteps, **terms, grad_norm=grad_norm, learning_rate=rate
            ):
                timesteps.update(t, vlb.detach())
                optimizer.step()
                rate_schedule.step()
                ema.update_parameters(model)
            optimizer.zero_grad()

            if run.due("log"):
                with run.looking():
                    run.log(batch_size, held_out_loss=held_out_loss(process, ema, data.test))
            if run.due("preview"):
                with run.looking():
                    x_T = torch.randn(options.num_previews, *data.shape, device=run.device)
                    save_grid(run.folder / f"samples_{step:06d}.png", few.sample(ema, x_T))

        save_forward(run.folder / "forward.png", process, data.test[:4])
        save_losses(run.folder)
        run.say(f"Pictures of the training: samples_*.png, forward.png, losses.png in {run.folder}")
        if num_samples > 0:
            run.say(f"Sampling {num_samples} images in {last.num_timesteps} steps each")
            with run.looking(options.seed):
                save_samples(last, ema, data.shape, num_samples, run.folder)
            run.say(f"Samples: samples.png, reverse.gif, reverse.png in {run.folder}")
        script = run.script("sample_mnist.py")
        run.say(f"More of them: python {script} --model_checkpoint {run.latest()}")


def held_out_loss(process: ImprovedDDPM, ema: Network, levels: Tensor) -> Tensor:
    """The averaged network's L_simple on test images, at times spread over 1..T."""
    x0 = from_uint8(levels[:256]).to(process.signal_rate.device)
    t = torch.linspace(1, process.num_timesteps, len(x0), device=x0.device).round().long()
    return process.loss_terms(ema, x0, t, torch.randn_like(x0))[0].mean()


def save_losses(folder: Path) -> None:
    """The curves of the run, with the reason why they soon look flat."""
    columns = ["simple", "held_out_loss", *(f"loss_quarter_{k}" for k in (1, 2, 3, 4))]
    save_curves(
        folder / "losses.png",
        folder / "metrics.csv",
        columns,
        "A flat curve is normal: at most t the noise is plain to see, its estimate soon good.\n"
        "What still makes samples better is the little that is gained in the first quarter of t.",
    )


if __name__ == "__main__":
    cli.run(main, presets=True, network=UNet)
