"""Train a DDPM on MNIST with prompts: lesson 5's loop plus the prompt."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, cast

from common import cli
from common.ema import Ema
from common.sampling import draw_samples, save_samples
from common.training import Run
from lesson_05.ddpm import DDPM, Network, linear_beta, preview
from lesson_05.guidance import drop
from lesson_05.options import TextToImageOptions
from lesson_05.sample_mnist import save_forward
from lesson_05.text_to_image.network import TextToImageUNet
from lesson_05.text_to_image.sample_mnist import random_prompts, save_prompts
from lesson_05.text_to_image.text import TextEncoder, all_prompts, null_prompt, tokenize
from lesson_05.train_mnist import held_out_loss, save_losses
from lesson_05.unet import UNet

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_


class Sampler(NamedTuple):
    """How a run draws previews and samples. Lesson 6 passes one of its own.

    preview and trajectory take (process, network, x_T); a trajectory has num_steps steps. script is
    the lesson's sampling script.
    """

    preview: Callable[[DDPM, Network, Tensor], Tensor]
    trajectory: Callable[[DDPM, Network, Tensor], Iterator[tuple[int, Tensor]]]
    num_steps: int
    script: str


def main(options: TextToImageOptions, network: dict[str, Any], text: dict[str, Any]) -> None:
    """Train a text-to-image DDPM, and sample it by Algorithm 2 as in lesson 5."""
    sampler = Sampler(preview, DDPM.trajectory, options.num_timesteps, "sample_mnist.py")
    train(options, network, text, sampler)


def train(
    options: TextToImageOptions, network: dict[str, Any], text: dict[str, Any], sampler: Sampler
) -> None:
    """Train a text-to-image DDPM [Ho20 Algorithm 1, HoSalimans22 Algorithm 1]."""
    with Run("lesson_05.text_to_image", options) as run:
        data, batches = run.load_data()
        T = options.num_timesteps
        process = DDPM(linear_beta(T, options.beta_1, options.beta_T), options.variance)
        process.to(run.device)
        network = run.network_for(data, network)
        prompts = all_prompts(data.classes).to(run.device)  # (classes, prompts a class, L)
        model = run.prepare(TextToImageUNet(TextEncoder(**text), **network))
        ema = Ema(model, options.ema_decay)
        averaged = cast(TextToImageUNet, ema.module)
        optimizer = torch.optim.Adam(model.parameters(), options.learning_rate, fused=True)
        config = {"network": network, "text": text}
        run.track(config, model=model, ema=ema, optimizer=optimizer)
        wrapped = run.distribute(model)  # the model itself unless torchrun or --accumulate is used

        for step in run.steps():
            x0, label = batches[step]
            template = torch.randint(prompts.shape[1], label.shape, device=run.device)
            tokens = prompts[label, template]
            tokens = drop(tokens, null_prompt(tokens), options.drop_probability)
            t = torch.randint(1, T + 1, (len(x0),), device=run.device)
            eps = torch.randn_like(x0)
            *batch, tokens = run.shard(x0, t, eps, tokens)
            with run.autocast():
                context = model.encode(tokens)
                losses = process.loss(partial(wrapped, context=context), *batch)
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
                    bound = averaged.bind(prompts[data.test_labels[:256].to(run.device), 0])
                    run.log(held_out_loss=held_out_loss(process, bound, data.test))
            if run.due("preview"):
                with run.evaluating():
                    label = torch.arange(options.num_previews, device=run.device) % len(prompts)
                    x_T = torch.randn(options.num_previews, *data.shape, device=run.device)
                    images = sampler.preview(process, averaged.bind(prompts[label, 0]), x_T)
                    run.save_preview(images, columns=min(len(prompts), 16))
                save_losses(run.folder)

        save_forward(run.folder / "forward.png", process, data.test[:4])
        if options.num_samples > 0:
            words = random_prompts(options.num_samples, options.seed, data.classes)
            with run.evaluating(options.seed):
                samples = draw_samples(
                    lambda x_T, tokens: sampler.trajectory(process, averaged.bind(tokens), x_T),
                    options.num_samples,
                    data.shape,
                    sampler.num_steps,
                    run.device,
                    tokenize(words),
                )
            save_samples(run.folder, samples, options)
            save_prompts(run.folder / "prompts.txt", words)
        run.finish(sampler.script, "--prompts", *data.classes[:2])


if __name__ == "__main__":
    cli.run(main, presets=True, network=UNet, text=TextEncoder)
