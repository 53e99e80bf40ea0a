"""Sample a trained network in a few steps: DDIM, Song et al. 2021."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from common import checkpoint, cli, lessons
from common.device import Precision, autocast, pick_device
from common.errors import UserError
from common.images import save_gif, save_grid
from common.images import save_npz as write_npz
from common.run import check
from lesson_05.class_conditional.network import ClassConditionalUNet
from lesson_05.ddpm import DDPM, Network
from lesson_05.guidance import in_turn
from lesson_05.text_to_image.network import TextToImageUNet
from lesson_05.text_to_image.sample_mnist import random_prompts, save_prompts
from lesson_05.text_to_image.text import tokenize
from lesson_06.ddim import Spacing, check_eta, ddim_sample, ddim_timesteps

SHIPPED = str(Path(__file__).parent / "pretrained" / "text_to_image.pt")


def main(
    model_checkpoint: str = SHIPPED,
    prompts: list[str] | None = None,
    guidance: float = 1.0,
    num_samples: int = 64,
    unconditional: bool = True,
    num_steps: int = 50,
    eta: float = 0.0,
    spacing: Spacing = "uniform",
    clip_x0: bool = False,
    show_timesteps: bool = False,
    save_npz: bool = False,
    output_dir: str | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: Precision = "auto",
    sha256: str | None = None,
) -> None:
    """Sample images in a few steps [Song21 Section 4].

    Writes conditional.png and prompts.txt in the same layout, unconditional.png from the same
    noise, and steps.gif, the way of the first 16. Any checkpoint of lesson 5, with or without
    condition, and of lesson 9 will do.

    Args:
        model_checkpoint: a file, or an http(s) address; the shipped text-to-image model if not
            given.
        prompts: one or more, repeated in turn where there are more samples; else drawn at random.
            For a class-conditional checkpoint they are labels, such as 7.
        guidance: scale of classifier-free guidance; 1 is plain conditional, 0 unconditional.
        num_samples: how many images of each kind.
        unconditional: whether to draw unconditional samples besides those that prompts ask for.
        num_steps: S, how often the network is asked, 1 to T.
        eta: share of DDPM's noise in each step, 0 to 1; at 0 the images depend on the first noise
            alone.
        spacing: of the S steps among the T; uniform, quadratic or trailing.
        clip_x0: whether each estimate of the clean image is clipped to [-1, 1].
        show_timesteps: print the S times at which the network is asked.
        save_npz: also write conditional.npz, unconditional.npz: key samples, uint8 (N, C, H, W).
        output_dir: folder of the pictures; output/ in this lesson's folder unless given.
        seed: of the noise and of prompts drawn at random.
        device: auto, cpu, cuda, cuda:1, mps.
        precision: of the network's arithmetic; auto is bfloat16 where the hardware has it.
        sha256: refuse a file with another sum.
    """
    check(lambda value: value >= 1, "at least 1", num_samples=num_samples)
    check(lambda value: 0 <= value < float("inf"), "at least 0", guidance=guidance)
    check_eta(eta)
    place = pick_device(device)
    process, model, content = lessons.load(model_checkpoint, sha256)
    times = ddim_timesteps(process.num_timesteps, num_steps, spacing)
    check_prompts(model, prompts, guidance, f"{model_checkpoint} ({content['lesson']})")
    if is_conditional(model):
        if prompts is None:
            prompts = default_prompts(model, num_samples, seed)
        prompts = in_turn(prompts, num_samples, "prompts")
    tasks = plan(model, prompts, guidance, num_samples, unconditional)
    folder = Path(output_dir) if output_dir else Path(__file__).parent / "output"
    checkpoint.make_folder(folder)
    if show_timesteps:
        print(f"{len(times)} times, from noise to image:", *reversed(times))

    process, model = process.to(place), model.to(place, memory_format=torch.channels_last)
    config = content["config"]["network"]
    shape = (config["image_channels"], config["image_size"], config["image_size"])
    sampler = partial(ddim_sample, num_steps=num_steps, eta=eta, spacing=spacing, clip_x0=clip_x0)
    for name, task in tasks.items():
        torch.manual_seed(seed)  # with a prompt or without: the same noise
        start = time.perf_counter()
        with autocast(place, precision):
            x0, frames = draw(sampler, process, task, shape, num_steps)
        seconds = time.perf_counter() - start
        save_grid(folder / f"{name}.png", x0)
        if save_npz:
            write_npz(folder / f"{name}.npz", x0)
        if name == next(iter(tasks)):
            save_gif(folder / "steps.gif", frames, columns=4)
        print(f"{num_samples} samples in {num_steps} steps, {seconds:.1f} s: {folder / name}.png")
    if prompts is not None:
        save_prompts(folder / "prompts.txt", prompts)
        print(f"What was asked for: {folder / 'prompts.txt'}")


class Task(NamedTuple):
    """What to draw: bind(some of the conditions (N, ...)) is the network to sample for these."""

    bind: Callable[[Tensor], Network]
    conditions: Tensor


def plan(
    model: Any, prompts: Sequence[str] | None, guidance: float, count: int, unconditional: bool
) -> dict[str, Task]:
    """What to draw, by the name of its grid."""
    tasks: dict[str, Task] = {}
    if prompts is not None:
        tasks["conditional"] = Task(partial(model.bind, guidance=guidance), encode(model, prompts))
    if unconditional and is_conditional(model):
        nothing = encode(model, ["0"] * count)  # at guidance 0 the null takes its place
        tasks["unconditional"] = Task(partial(model.bind, guidance=0.0), nothing)
    elif unconditional:
        tasks["unconditional"] = Task(lambda _: partial(estimate_noise, model), torch.zeros(count))
    if not tasks:
        raise UserError("nothing is to be drawn: leave out --unconditional false")
    return tasks


def check_prompts(model: object, prompts: Sequence[str] | None, guidance: float, name: str) -> None:
    if not is_conditional(model) and (prompts is not None or guidance != 1):
        raise UserError(f"{name} knows no prompts: leave out --prompts and --guidance")


def is_conditional(model: object) -> bool:
    return isinstance(model, TextToImageUNet | ClassConditionalUNet)


def default_prompts(model: Any, count: int, seed: int) -> list[str]:
    """Prompts drawn at random; for a class-conditional network all its labels in turn."""
    if isinstance(model, TextToImageUNet):
        return random_prompts(count, seed)
    return [str(i % model.num_classes) for i in range(count)]


def encode(model: Any, prompts: Sequence[str]) -> Tensor:
    """What model.bind takes for these prompts: tokens (N, L), or labels (N,)."""
    if isinstance(model, TextToImageUNet):
        return tokenize(prompts)
    known = [str(label) for label in range(model.num_classes)]
    for prompt in prompts:
        if prompt not in known:
            raise UserError(
                f"prompt {prompt[:20]!a} is no label of this class-conditional checkpoint: "
                f"take {known[0]} to {known[-1]}"
            )
    return torch.tensor([int(prompt) for prompt in prompts])


def estimate_noise(model: Network, xt: Tensor, t: Tensor) -> Tensor:
    """The noise alone, from a network that may estimate its variance, too, as lesson 9's does."""
    return model(xt, t)[:, : xt.shape[1]]


@torch.no_grad()
def draw(
    sampler: Callable[..., Tensor],
    process: DDPM,
    task: Task,
    shape: tuple[int, int, int],
    num_steps: int,
) -> tuple[Tensor, list[Tensor]]:
    """Samples x0 (N, C, H, W), one a condition, 64 at a time, and the first 16 on their way.

    sampler(network, process, x_T, on_step=...) takes num_steps steps.
    """
    device = process.signal_rate.device
    batches: list[Tensor] = []
    frames: list[Tensor] = []
    chunks = task.conditions.to(device).split(64)
    shown = {round(num_steps * k / 60) for k in range(61)}
    with tqdm(total=len(chunks) * num_steps, unit="step", desc="sampling") as bar:

        def watch(s: int, xs: Tensor) -> None:
            bar.update()
            if not batches and bar.n in shown:
                frames.append(xs[:16].cpu())

        for chunk in chunks:
            x_T = torch.randn(len(chunk), *shape, device=device)
            if not batches:
                frames.append(x_T[:16].cpu())
            batches.append(sampler(task.bind(chunk), process, x_T, on_step=watch).cpu())
    return torch.cat(batches), frames


if __name__ == "__main__":
    cli.run(main)
