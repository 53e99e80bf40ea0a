"""Lesson 5 and two libraries, trained on the same data for the same time.

Lesson 5 runs its training script, diffusers the loop of its example of unconditional training,
denoising-diffusion-pytorch its Trainer. Each has its own settings; the networks have one size.
"""

import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality.metrics import Reference
from benchmarks.records import output_folder, write_json
from benchmarks.speed.contenders import T, count, environment, preset, unet, unet2d
from common import cli
from common.checkpoint import saved
from common.data import Batches, Dataset, Images, from_uint8, load_images, to_uint8
from common.device import autocast, has_bfloat16, pick_device
from common.errors import UserError, check_above, one_line
from common.files import write_atomically
from common.pictures import save_rows
from common.sampling import BATCH_SIZE
from lesson_05 import train_mnist
from lesson_05.options import DDPMOptions
from lesson_05.sample_mnist import load
from lesson_05.unet import UNet
from lesson_06.ddim import ddim_sample

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

NUM_TRIAL_STEPS = 20  # steps to measure lesson 5's speed with
Draw = Callable[[int], Tensor]  # draw(n) returns n images in [-1, 1]


@dataclass
class Conditions:
    """The conditions of the race, the same for all, except that each has its own folder."""

    data: Images
    data_dir: str | None
    network: dict[str, Any]
    seconds: float
    num_steps: int
    learning_rate: float
    folder: Path
    device: torch.device
    seed: int


def main(
    minutes: float = 15.0,
    num_samples: int = 2000,
    num_steps: int = 50,
    their_learning_rate: float = 1e-3,
    dataset: Dataset = "mnist",
    data_dir: str | None = None,
    network: dict[str, Any] | None = None,
    output_dir: str | None = None,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Train all three for the same time, sample each by DDIM, and write race.md, race.png and
    race.json.

    The preparation before the first step (data, compilation) is not counted.

    Args:
        minutes: minutes of training for each.
        num_samples: samples of each, for the metrics.
        num_steps: steps of DDIM, in each library's own form.
        their_learning_rate: learning rate of both libraries; their default, 1e-4, suits larger
            networks.
        dataset: mnist or digits, which the classifier knows.
        data_dir: folder of the data in torchvision's layout; else $DIFFUSION_DATA, else data/.
        network: changes to the laptop preset's network, for lesson 5 and, in the same shape or
            size, for the others.
        output_dir: folder for the files; benchmarks/output/race unless given.
        seed: of weights, batches and noise.
        device: auto, cpu, cuda, cuda:1, mps.
    """
    check_above(0, minutes=minutes)
    if not 1 <= num_steps <= T:
        raise UserError(f"num_steps is {num_steps}: it must be from 1 to {T:,}")
    if dataset not in ("mnist", "digits"):
        raise UserError(
            f"dataset is {dataset}: it must be mnist or digits, which the classifier knows"
        )
    place = pick_device(device)
    result: dict[str, Any] = environment(place)
    folder = output_folder(output_dir, "race")
    data = load_images(dataset, data_dir)
    reference = Reference(data, place)
    real = reference.real(num_samples)
    shape = {**preset("laptop")["network"], **(network or {})}
    check_network(shape, data)
    result |= {"minutes": minutes, "num_samples": num_samples, "num_steps": num_steps, "real": real}
    rows = {"real": from_uint8(data.test[:10])}
    for name, train in RACERS.items():
        print(f"\n{name}", flush=True)
        torch.manual_seed(seed)
        with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as own:
            common = (data, data_dir, shape, 60 * minutes, num_steps, their_learning_rate)
            draw, figures = train(Conditions(*common, Path(own), place, seed))
            levels, seconds = draw_levels(draw, num_samples, seed)
        figures |= {**reference.compare(levels), "seconds_per_sample": seconds / num_samples}
        rows[name] = from_uint8(levels[:10])
        result[name] = figures
        print(
            f"FID {figures['fid']:.3g} (real images {real['fid']:.3g}), {figures['steps']:,} steps "
            f"of {figures['batch_size']} in {figures['seconds']:.0f} s"
        )
        save_rows(folder / "race.png", rows)
        write_json(folder / "race.json", result)
        write_atomically(folder / "race.md", report(result).encode())
    print(f"\n{folder}/race.md, race.png, race.json")


def check_network(network: dict[str, Any], data: Images) -> None:
    """Raise UserError, before training, for a network that one of the three cannot build."""
    try:
        UNet(data.channels, data.size, **network)
        unet2d(network, data.channels, data.size[0])
        unet(network, data.channels, data.size[0])
    except (TypeError, KeyError) as error:
        raise UserError(f"--network: {one_line(error)}") from None


def report(result: Mapping[str, Any]) -> str:
    """The result in Markdown."""
    real, versions = result["real"], result["versions"]
    lines = [
        f"{result['minutes']:g} minutes of training each, {result['num_samples']:,} samples in "
        f"{result['num_steps']} steps of DDIM; {result['hardware']}; commit {result['commit']}.",
        ", ".join(f"{name} {number}" for name, number in versions.items()),
        "",
        "| | parameters | seconds | steps | images | FID | ratio | sure | precision | recall "
        "| balance | s/sample |",
        "|---" * 12 + "|",
    ]
    for name in RACERS:
        if name in result:
            row = result[name]
            seen, ratio = row["steps"] * row["batch_size"], row["fid"] / real["fid"]
            lines.append(
                f"| {name} | {row['parameters']:,} | {row['seconds']:.0f} | {row['steps']:,} "
                f"| {seen:,} | {row['fid']:.3g} | {ratio:.2f} "
                f"| {row['share_sure']:.1%} | {row['precision']:.2f} | {row['recall']:.2f} "
                f"| {row['class_balance_bits']:.3f} | {row['seconds_per_sample']:.2g} |"
            )
    lines.append(
        f"| real training images | | | | | {real['fid']:.3g} | 1 | {real['share_sure']:.1%} "
        f"| {real['precision']:.2f} | {real['recall']:.2f} | {real['class_balance_bits']:.3f} | |"
    )
    lines += ["", "![Ten test images, and the first ten samples of each](race.png)"]
    return "\n".join(lines) + "\n"


def draw_levels(draw: Draw, num_samples: int, seed: int) -> tuple[Tensor, float]:
    """Samples, uint8 (N, C, H, W), and the seconds that drawing them took."""
    torch.manual_seed(seed)
    start, batches = time.perf_counter(), []
    with torch.no_grad():
        for first in tqdm(
            range(0, num_samples, BATCH_SIZE), desc="sampling", unit="batch", disable=None
        ):
            batches.append(to_uint8(draw(min(BATCH_SIZE, num_samples - first))))
    return torch.cat(batches), time.perf_counter() - start


def lesson_5(conditions: Conditions) -> tuple[Draw, dict[str, Any]]:
    """Its laptop preset. The learning rate falls to zero at the last step, so the number of steps
    is fixed beforehand, from the measured speed of a few steps."""
    flags = {name: value for name, value in preset("laptop").items() if name != "network"}
    flags |= {"dataset": conditions.data.name, "data_dir": conditions.data_dir, "num_samples": 0}
    flags |= {"seed": conditions.seed, "device": str(conditions.device), "num_previews": 16}

    def train(name: str, steps: int, every: int) -> float:
        own = {"output_dir": str(conditions.folder / name), "num_training_steps": steps}
        own |= {"checkpoint_every": every, "preview_every": every}
        start = time.perf_counter()
        train_mnist.main(DDPMOptions(**flags | own), conditions.network)
        return time.perf_counter() - start

    few, many = NUM_TRIAL_STEPS, 3 * NUM_TRIAL_STEPS
    train("warm_up", few, few)
    seconds_of_few, seconds_of_many = train("few", few, few), train("many", many, many)
    # Noise in the timing must not make the difference negative, or the steps would have no end.
    step = max(seconds_of_many - seconds_of_few, 0.01 * seconds_of_many) / (many - few)
    steps = max(few, round((conditions.seconds - seconds_of_few) / step) + few)
    seconds = train("run", steps, max(500, steps // 10))
    process, model, _ = load(str(saved(conditions.folder / "run")[-1]))
    process = process.to(conditions.device)
    model = model.to(conditions.device).to(memory_format=torch.channels_last)

    def draw(number: int) -> Tensor:
        x_T = torch.randn(number, *conditions.data.shape, device=conditions.device)
        with autocast(conditions.device):
            return ddim_sample(model, process, x_T, conditions.num_steps)

    return draw, summary(steps, flags["batch_size"], seconds, model)


def diffusers(conditions: Conditions) -> tuple[Draw, dict[str, Any]]:
    """The loop of its example of unconditional training: AdamW, its average of the weights,
    warm-up, and a cosine schedule, here a function of the time that has passed."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    data, device = conditions.data, conditions.device
    batches = Batches(data.train, data.train_labels, BATCH_SIZE, conditions.seed, device)
    model = unet2d(conditions.network, data.channels, data.size[0])
    model = model.to(device).to(memory_format=torch.channels_last)
    scheduler = DDPMScheduler(T)
    average = EMAModel(
        model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), conditions.learning_rate, betas=(0.95, 0.999), weight_decay=1e-6
    )
    steps, clock = 0, Clock(conditions.seconds)
    while (fraction := clock()) < 1:
        steps += 1
        factor = min(1.0, steps / 500) * 0.5 * (1 + math.cos(math.pi * fraction))
        optimizer.param_groups[0]["lr"] = conditions.learning_rate * factor
        x0, _ = batches[steps]
        eps, t = torch.randn_like(x0), torch.randint(0, T, (len(x0),), device=device)
        with autocast(device):
            eps_hat = model(scheduler.add_noise(x0, eps, t), t).sample
            loss = F.mse_loss(eps_hat.float(), eps)
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(model.parameters())
    average.copy_to(model.parameters())
    draw = pipeline_draw(model.eval(), conditions)
    return draw, summary(steps, BATCH_SIZE, clock.passed, model)


def pipeline_draw(model: Any, conditions: Conditions) -> Draw:
    from diffusers import DDIMPipeline, DDIMScheduler

    pipeline = DDIMPipeline(model, DDIMScheduler(T))
    pipeline.set_progress_bar_config(disable=True)

    def draw(number: int) -> Tensor:
        with autocast(conditions.device):
            output = pipeline(number, num_inference_steps=conditions.num_steps, output_type="np")
        return torch.from_numpy(output.images).permute(0, 3, 1, 2) * 2 - 1

    return draw


def denoising_diffusion(conditions: Conditions) -> tuple[Draw, dict[str, Any]]:
    """Its Trainer, which reads a folder of pictures. Mirroring is off, as these are digits."""
    if conditions.device.type == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    from denoising_diffusion_pytorch import GaussianDiffusion, Trainer

    data, device = conditions.data, conditions.device
    model = unet(conditions.network, data.channels, data.size[0])
    diffusion = GaussianDiffusion(
        model, image_size=data.size[0], timesteps=T, sampling_timesteps=conditions.num_steps
    )
    trainer = Trainer(
        diffusion.to(device),
        str(save_pictures(data, conditions.folder / "pictures")),
        train_batch_size=BATCH_SIZE,
        train_lr=conditions.learning_rate,
        augment_horizontal_flip=False,
        amp=has_bfloat16(device),
        mixed_precision_type="bf16",
        calculate_fid=False,
        train_num_steps=10**9,
        save_and_sample_every=10**9,
        results_folder=str(conditions.folder / "results"),
    )
    clock = Clock(conditions.seconds)

    def stop_in_time(*_: object) -> None:
        if clock() >= 1:
            trainer.train_num_steps = trainer.step

    optimizer = getattr(trainer.opt, "optimizer", trainer.opt)
    optimizer.register_step_post_hook(stop_in_time)
    trainer.train()
    averaged = trainer.ema.ema_model.eval()

    def draw(number: int) -> Tensor:
        with autocast(device):
            return averaged.sample(batch_size=number) * 2 - 1

    return draw, summary(trainer.step, BATCH_SIZE, clock.passed, model)


def save_pictures(data: Images, folder: Path) -> Path:
    """The training images as PNGs."""
    from torchvision.transforms.functional import to_pil_image

    folder.mkdir()
    for i, levels in enumerate(tqdm(data.train, desc="pictures", unit="image", disable=None)):
        to_pil_image(levels).save(folder / f"{i:05d}.png")
    return folder


RACERS: dict[str, Callable[[Conditions], tuple[Draw, dict[str, Any]]]] = {
    "lesson 5": lesson_5,
    "diffusers": diffusers,
    "denoising-diffusion-pytorch": denoising_diffusion,
}


class Clock:
    """When called, returns the fraction of the time that has passed, and shows it on a bar."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.passed, self.start = seconds, 0.0, time.perf_counter()
        self.bar = tqdm(total=round(seconds), unit="s", desc="training", disable=None)

    def __call__(self) -> float:
        self.passed = time.perf_counter() - self.start
        self.bar.update(max(0, min(int(self.passed), self.bar.total) - self.bar.n))
        return self.passed / self.seconds


def summary(steps: int, batch_size: int, seconds: float, model: nn.Module) -> dict[str, Any]:
    parameters = count(model)
    return {
        "steps": steps,
        "batch_size": batch_size,
        "seconds": seconds,
        "parameters": parameters,
    }


if __name__ == "__main__":
    cli.run(main)
