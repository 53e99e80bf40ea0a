"""Sample a trained network in a few steps: DDIM, Song et al. 2021."""

import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from common import cli, lessons
from common.errors import UserError, check_at_least
from common.options import SamplingOptions
from common.pictures import save_gif
from common.sampling import draw_samples, inference, save_named
from lesson_05.class_conditional.network import ClassConditionalUNet
from lesson_05.class_conditional.sample_mnist import label_of
from lesson_05.guidance import one_per_sample
from lesson_05.text_to_image.network import TextToImageUNet
from lesson_05.text_to_image.sample_mnist import random_prompts, save_prompts
from lesson_05.text_to_image.text import tokenize
from lesson_06.ddim import Spacing, check_eta, ddim_timesteps, ddim_trajectory

import torch
from torch import Tensor

SHIPPED = str(Path(__file__).parent / "pretrained" / "text_to_image.safetensors")


def main(
    prompts: list[str] | None = None,
    guidance: float = 1.0,
    unconditional: bool = True,
    num_steps: int = 50,
    eta: float = 0.0,
    spacing: Spacing = "uniform",
    clip_x0: bool | None = None,
    show_timesteps: bool = False,
    options: SamplingOptions = SamplingOptions(model_checkpoint=SHIPPED),
) -> None:
    """Sample images in a few steps [Song21 Section 4].

    Writes conditional.png, and prompts.txt with the prompts in the same rows of eight;
    unconditional.png, from the same noise; and steps.gif, the first 16 images from noise to image.
    It samples checkpoints of lesson 5, with or without conditions, and of lesson 9, among them
    those that `python -m common.import_weights` makes of published weights.

    Args:
        prompts: one or more, repeated in order up to num_samples; drawn at random unless given.
            For a class-conditional checkpoint they are names or numbers of classes, such as 7.
        guidance: scale of classifier-free guidance; 1 is conditional sampling, 0 unconditional.
        unconditional: whether to draw unconditional samples, too.
        num_steps: S, the number of evaluations of the network, 1 to T.
        eta: how much of DDPM's noise each step adds, 0 to 1; at 0 sampling is deterministic.
        spacing: spacing of the S times in 1..T; uniform, quadratic or trailing.
        clip_x0: whether each prediction of the clean image is clipped to [-1, 1]; unless given,
            only if the first time is pure noise, as with lesson 9's cosine schedule.
        show_timesteps: print the S times at which the network is evaluated.
    """
    check_at_least(0, guidance=guidance)
    check_eta(eta)
    process, model, content = lessons.load(options.model_checkpoint, options.sha256)
    times = ddim_timesteps(process.num_timesteps, num_steps, spacing)
    check_prompts(model, prompts, guidance, f"{options.model_checkpoint} ({content.lesson})")
    if is_conditional(model):
        prompts = prompts_in_turn(model, prompts, options.num_samples, options.seed)
    plans = plan_samples(model, prompts, guidance, options.num_samples, unconditional)
    if show_timesteps:
        print(f"{len(times)} times, from noise to image:", *reversed(times))

    def trajectory(x_T: Tensor, *condition: Tensor, scale: float) -> Iterator[tuple[int, Tensor]]:
        network = model.bind(*condition, scale) if condition else model
        return ddim_trajectory(network, process, x_T, num_steps, eta, spacing, clip_x0)

    with inference(options, "lesson_06") as (folder, device):
        process, model = process.to(device), model.to(device, memory_format=torch.channels_last)
        for name, (conditions, scale) in plans.items():
            torch.manual_seed(options.seed)  # the same noise for both grids
            start = time.perf_counter()
            images, frames = draw_samples(
                partial(trajectory, scale=scale),
                options.num_samples,
                content.image_shape,
                num_steps,
                device,
                conditions,
                folder / f"{name}.png",
            )
            seconds = time.perf_counter() - start
            save_named(folder / name, images, options)
            if name == next(iter(plans)):
                save_gif(folder / "steps.gif", frames, 4, options.scale, options.fps)
            print(f"{len(images)} samples in {num_steps} steps, {seconds:.1f} s: {name}.png")
    if prompts is not None:
        save_prompts(folder / "prompts.txt", prompts)
    print(f"Pictures in {folder}" + (", their prompts in prompts.txt" if prompts else ""))


class SamplePlan(NamedTuple):
    """One grid of samples: its conditions (N, ...), None for an unconditional network, and the
    scale of guidance."""

    conditions: Tensor | None
    guidance: float = 1.0


def plan_samples(
    model: Any, prompts: Sequence[str] | None, guidance: float, count: int, unconditional: bool
) -> dict[str, SamplePlan]:
    """The grids to draw, by name."""
    plans: dict[str, SamplePlan] = {}
    if prompts is not None:
        plans["conditional"] = SamplePlan(encode(model, prompts), guidance)
    if unconditional and is_conditional(model):
        replaced = encode(model, ["0"] * count)  # at guidance 0 the null condition replaces them
        plans["unconditional"] = SamplePlan(replaced, 0.0)
    elif unconditional:
        plans["unconditional"] = SamplePlan(None)
    if not plans:
        raise UserError("there is nothing to draw: omit --unconditional false")
    return plans


def check_prompts(model: object, prompts: Sequence[str] | None, guidance: float, name: str) -> None:
    if not is_conditional(model) and (prompts is not None or guidance != 1):
        raise UserError(f"{name} takes no prompts: omit --prompts and --guidance")


def is_conditional(model: object) -> bool:
    return isinstance(model, TextToImageUNet | ClassConditionalUNet)


def prompts_in_turn(model: Any, prompts: list[str] | None, count: int, seed: int) -> list[str]:
    """One prompt for each sample: those given, else random ones, or all the labels in order."""
    if prompts is None and isinstance(model, TextToImageUNet):
        prompts = random_prompts(count, seed, model.classes)
    elif prompts is None:
        prompts = model.classes[:count]
    return one_per_sample(prompts, count, "prompts")


def encode(model: Any, prompts: Sequence[str]) -> Tensor:
    """The argument of model.bind for these prompts: tokens (N, L), or labels (N,)."""
    if isinstance(model, TextToImageUNet):
        return tokenize(prompts)
    return torch.tensor([label_of(prompt, model.classes) for prompt in prompts])


if __name__ == "__main__":
    cli.run(main)
