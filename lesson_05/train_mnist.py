"""Train a DDPM on MNIST: the loop below is Algorithm 1 of Ho et al. 2020."""

from functools import partial
from pathlib import Path
from typing import Any

from common import cli
from common.data import from_uint8
from common.ema import Ema
from common.pictures import save_curves
from common.sampling import draw_samples, save_samples
from common.training import Run
from lesson_05.ddpm import DDPM, Network, linear_beta, preview
from lesson_05.options import DDPMOptions
from lesson_05.sample_mnist import save_forward
from lesson_05.unet import UNet

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_


def main(options: DDPMOptions, network: dict[str, Any]) -> None:
    """Train a DDPM [Ho20 Algorithm 1] with previews on the way, and sample it at the end."""
    with Run("lesson_05", options) as run:
        data, batches = run.load_data()
        T = options.num_timesteps
        beta = linear_beta(T, options.beta_1, options.beta_T)
        process = DDPM(beta, options.variance, options.prediction, options.loss).to(run.device)
        network = run.network_for(data, network)
        model = run.prepare(UNet(**network))
        ema = Ema(model, options.ema_decay)
        optimizer = torch.optim.Adam(model.parameters(), options.learning_rate, fused=True)
        run.track({"network": network}, model=model, ema=ema, optimizer=optimizer)
        wrapped = run.distribute(model)  # the model itself unless torchrun or --accumulate is used

        for step in run.steps():
            x0, _ = batches[step]
            t = torch.randint(1, T + 1, (len(x0),), device=run.device)
            eps = torch.randn_like(x0)
            with run.autocast():
                losses = process.loss(wrapped, *run.shard(x0, t, eps))  # Algorithm 1, line 5
            losses.mean().backward()
            losses = run.gather(losses)
            grad_norm = clip_grad_norm_(model.parameters(), options.max_grad_norm)
            optimizer.param_groups[0]["lr"] = run.learning_rate
            if not run.skip_step(losses, t, grad_norm):
                optimizer.step()
                ema.update_parameters(model)
            optimizer.zero_grad()

            run.record(losses, t, grad_norm=grad_norm)
            if run.due("log"):
                with run.evaluating():
                    run.log(held_out_loss=held_out_loss(process, ema, data.test))
            if run.due("preview"):
                with run.evaluating():
                    x_T = torch.randn(options.num_previews, *data.shape, device=run.device)
                    run.save_preview(preview(process, ema, x_T))
                save_losses(run.folder)

        save_forward(run.folder / "forward.png", process, data.test[:4])
        if options.num_samples > 0:
            with run.evaluating(options.seed):
                trajectory = partial(process.trajectory, ema)
                samples = draw_samples(trajectory, options.num_samples, data.shape, T, run.device)
            save_samples(run.folder, samples, options)
        run.finish("sample_mnist.py")


def held_out_loss(process: DDPM, ema: Network, levels: Tensor) -> Tensor:
    """The loss of the averaged network on 256 test images, at times evenly spaced over 1..T."""
    x0 = from_uint8(levels[:256]).to(process.device)
    t = torch.linspace(1, process.num_timesteps, len(x0), device=x0.device).round().long()
    return process.loss(ema, x0, t, torch.randn_like(x0)).mean()


def save_losses(folder: Path) -> None:
    """Plot the loss curves of the run; the title says why they soon look flat."""
    columns = ["loss", "held_out_loss", *(f"loss_quarter_{k}" for k in (1, 2, 3, 4))]
    save_curves(
        folder / "losses.png",
        folder / "metrics.csv",
        columns,
        "A flat curve is normal: at most t the noise is soon predicted well.\n"
        "The first quarter of t makes strokes sharp, the next two decide the digit.",
    )


if __name__ == "__main__":
    cli.run(main, presets=True, network=UNet)
