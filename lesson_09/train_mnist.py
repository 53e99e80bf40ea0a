"""Train an Improved DDPM on MNIST: the loop below minimises the loss of Nichol & Dhariwal 2021."""

from functools import partial
from pathlib import Path
from typing import Any

from common import cli
from common.data import from_uint8
from common.ema import Ema
from common.pictures import save_curves
from common.sampling import draw_samples, save_samples
from common.training import Run
from lesson_09.iddpm import ImprovedDDPM, Network, named_beta
from lesson_09.options import IDDPMOptions
from lesson_09.sample_mnist import save_forward
from lesson_09.timesteps import named_sampler
from lesson_09.unet import UNet

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_


def main(options: IDDPMOptions, network: dict[str, Any]) -> None:
    """Train an Improved DDPM [Nichol21], showing samples as it goes, and sample it at the end."""
    with Run("lesson_09", options) as run:
        data, batches = run.load_data()
        T = options.num_timesteps
        weights = options.simple_weight, options.vlb_weight
        process = ImprovedDDPM(named_beta(options.schedule, T), options.variance, *weights)
        process.to(run.device)
        final = process.strided(T if options.num_steps is None else options.num_steps)
        timesteps = named_sampler(options.timestep_sampler, T).to(run.device)
        network = run.network_for(data, network)
        network["learned_variance"] = options.variance == "learned"
        model = run.prepare(UNet(**network))
        ema = Ema(model, options.ema_decay)
        optimizer = torch.optim.Adam(model.parameters(), options.learning_rate, fused=True)
        run.track(
            {"network": network}, model=model, ema=ema, optimizer=optimizer, timesteps=timesteps
        )
        wrapped = run.distribute(model)  # the model itself unless torchrun or --accumulate is used

        for step in run.steps():
            x0, _ = batches[step]
            t, weight = timesteps.sample(len(x0))
            eps = torch.randn_like(x0)
            *batch, row_weight = run.shard(x0, t, eps, weight)
            with run.autocast():
                simple, vlb = process.loss_terms(wrapped, *batch)
            losses = row_weight * process.weighted(simple, vlb)  # Eq. 16, and 1 / (T p_t) of Eq. 18
            losses.mean().backward()
            losses, simple, vlb = map(run.gather, (losses, simple, vlb))
            grad_norm = clip_grad_norm_(model.parameters(), options.max_grad_norm)
            optimizer.param_groups[0]["lr"] = run.learning_rate
            if not run.skip_step(losses, t, grad_norm):
                timesteps.update(t, vlb)
                optimizer.step()
                ema.update_parameters(model)
            optimizer.zero_grad()

            terms = {"simple": (weight * simple).mean()}
            terms["vlb"] = T * (weight * vlb).mean()  # the sum over t, in bits per dimension
            run.record(losses, t, by_quarter=simple, **terms, grad_norm=grad_norm)
            if run.due("log"):
                with run.evaluating():
                    run.log(held_out_loss=held_out_loss(process, ema, data.test))
            if run.due("preview"):
                with run.evaluating():
                    x_T = torch.randn(options.num_previews, *data.shape, device=run.device)
                    images = process.strided(min(50, T)).sample(ema, x_T)
                    run.save_preview(images)
                save_losses(run.folder)

        save_forward(run.folder / "forward.png", process, data.test[:4])
        S = final.num_timesteps
        if options.num_samples > 0:
            with run.evaluating(options.seed):
                trajectory = partial(final.trajectory, ema)
                samples = draw_samples(trajectory, options.num_samples, data.shape, S, run.device)
            save_samples(run.folder, samples, options)
        run.finish("sample_mnist.py", "--num_steps", str(S))


def held_out_loss(process: ImprovedDDPM, ema: Network, levels: Tensor) -> Tensor:
    """The averaged network's L_simple on 256 test images, at times evenly spaced over 1..T."""
    x0 = from_uint8(levels[:256]).to(process.device)
    t = torch.linspace(1, process.num_timesteps, len(x0), device=x0.device).round().long()
    return process.loss_terms(ema, x0, t, torch.randn_like(x0))[0].mean()


def save_losses(folder: Path) -> None:
    """Plot the loss curves of the run; the title says why they soon look flat."""
    columns = ["simple", "held_out_loss", *(f"loss_quarter_{k}" for k in (1, 2, 3, 4))]
    save_curves(
        folder / "losses.png",
        folder / "metrics.csv",
        columns,
        "A flat curve is normal: at most t the noise is easy to predict, and soon predicted well.\n"
        "Samples still improve through small gains in the first quarter of t.",
    )


if __name__ == "__main__":
    cli.run(main, presets=True, network=UNet)
