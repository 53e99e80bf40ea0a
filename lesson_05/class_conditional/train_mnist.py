"""Train a DDPM on MNIST with labels: lesson 5's loop plus the label."""

from functools import partial
from typing import Any, cast

from common import cli
from common.ema import Ema
from common.sampling import draw_samples, save_samples
from common.training import Run
from lesson_05.class_conditional.network import ClassConditionalUNet
from lesson_05.class_conditional.sample_mnist import save_labels
from lesson_05.ddpm import DDPM, linear_beta, preview
from lesson_05.guidance import drop
from lesson_05.options import ConditionalOptions
from lesson_05.sample_mnist import save_forward
from lesson_05.train_mnist import held_out_loss, save_losses
from lesson_05.unet import UNet

import torch
from torch.nn.utils import clip_grad_norm_


def main(options: ConditionalOptions, network: dict[str, Any]) -> None:
    """Train a class-conditional DDPM [Ho20 Algorithm 1, HoSalimans22 Algorithm 1]."""
    with Run("lesson_05.class_conditional", options) as run:
        data, batches = run.load_data()
        T = options.num_timesteps
        process = DDPM(linear_beta(T, options.beta_1, options.beta_T), options.variance)
        process.to(run.device)
        network = run.network_for(data, network)
        num_classes = len(data.classes)
        model = run.prepare(ClassConditionalUNet(num_classes, **network))
        ema = Ema(model, options.ema_decay)
        averaged = cast(ClassConditionalUNet, ema.module)
        optimizer = torch.optim.Adam(model.parameters(), options.learning_rate, fused=True)
        config = {"network": network, "num_classes": num_classes}
        run.track(config, model=model, ema=ema, optimizer=optimizer)
        wrapped = run.distribute(model)  # the model itself unless torchrun or --accumulate is used

        for step in run.steps():
            x0, label = batches[step]
            label = drop(label, model.null(label), options.drop_probability)
            t = torch.randint(1, T + 1, (len(x0),), device=run.device)
            eps = torch.randn_like(x0)
            *batch, label = run.shard(x0, t, eps, label)
            with run.autocast():
                losses = process.loss(partial(wrapped, label=label), *batch)
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
                    bound = averaged.bind(data.test_labels[:256].to(run.device))
                    run.log(held_out_loss=held_out_loss(process, bound, data.test))
            if run.due("preview"):
                with run.evaluating():
                    label = torch.arange(options.num_previews, device=run.device) % num_classes
                    x_T = torch.randn(options.num_previews, *data.shape, device=run.device)
                    images = preview(process, averaged.bind(label), x_T)
                    run.save_preview(images, columns=min(num_classes, 16))
                save_losses(run.folder)

        save_forward(run.folder / "forward.png", process, data.test[:4])
        if options.num_samples > 0:
            label = torch.arange(options.num_samples) % num_classes
            with run.evaluating(options.seed):
                samples = draw_samples(
                    lambda x_T, label: process.trajectory(averaged.bind(label), x_T),
                    options.num_samples,
                    data.shape,
                    T,
                    run.device,
                    label,
                )
            save_samples(run.folder, samples, options)
            save_labels(run.folder / "labels.txt", [data.classes[k] for k in label])
        run.finish("sample_mnist.py", "--labels", *data.classes[:3])


if __name__ == "__main__":
    cli.run(main, presets=True, network=UNet)
