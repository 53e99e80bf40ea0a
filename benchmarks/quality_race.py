"""What each library makes of the same data in the same time: lesson 5, diffusers' unconditional
training and denoising-diffusion-pytorch's Trainer, each with its own settings and a network of one
size."""

import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

from benchmarks.contenders import T, count, needed, preset, surroundings, unet, unet2d
from common import checkpoint, cli, mnist
from common.device import autocast, has_bfloat16, pick_device
from common.errors import UserError
from common.images import from_uint8, save_rows, to_uint8
from common.metrics import Reference
from common.run import RunOptions, check, saved
from common.subject import BATCH, ROOT
from lesson_05 import train_mnist
from lesson_05.sample_mnist import load
from lesson_05.unet import UNet
from lesson_06.ddim import ddim_sample

FEW = 20  # steps that tell the speed of lesson 5
Draw = Callable[[int], Tensor]  # so many images in [-1, 1]


@dataclass
class Terms:
    """What is the same for all, and a folder of one's own."""

    data: mnist.Images
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
    dataset: mnist.Dataset = "mnist",
    data_dir: str | None = None,
    network: dict[str, Any] | None = None,
    output_dir: str | None = None,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Train the three for as long, sample each by DDIM, and write race.md, race.png, race.json.

    What comes before the first step (data as each wants them, compilation) is not counted.

    Args:
        minutes: of training for each.
        num_samples: of each, for the figures.
        num_steps: of DDIM, in each library's own form.
        their_learning_rate: of both libraries; their own, 1e-4, is for larger networks.
        dataset: mnist or digits, which the classifier knows.
        data_dir: folder of the data in torchvision's layout; else $DIFFUSION_DATA, else data/.
        network: of lesson 5 and, in the same shape or size, of the others; the laptop preset's
            unless given.
        output_dir: folder of the files; benchmarks/output/race unless given.
        seed: of weights, batches and noise.
        device: auto, cpu, cuda, cuda:1, mps.
    """
    check(lambda value: value > 0, "above 0", minutes=minutes)
    check(lambda value: 1 <= value <= T, f"from 1 to {T:,}", num_steps=num_steps)
    if dataset not in ("mnist", "digits"):
        raise UserError(f"dataset is {dataset}: take mnist or digits, which the classifier knows")
    needed()
    place = pick_device(device)
    folder = Path(output_dir) if output_dir else ROOT / "benchmarks" / "output" / "race"
    checkpoint.make_folder(folder)
    data = mnist.load(dataset, data_dir)
    reference = Reference(data, place)
    real = reference.real(num_samples)
    shape = {**preset("laptop"), **(network or {})}
    must_build(shape, data)
    result: dict[str, Any] = {
        **surroundings(place),
        "minutes": minutes,
        "num_samples": num_samples,
        "num_steps": num_steps,
        "real": real,
    }
    rows: dict[str, Tensor] = {"real": from_uint8(data.test[:10])}
    for name, race in RACERS.items():
        print(f"\n{name}", flush=True)
        torch.manual_seed(seed)
        with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as own:
            common = (data, data_dir, shape, 60 * minutes, num_steps, their_learning_rate)
            draw, figures = race(Terms(*common, Path(own), place, seed))
            levels, seconds = drawn(draw, num_samples, seed)
        figures |= {**reference.figures(levels), "seconds_per_sample": seconds / num_samples}
        rows[name] = from_uint8(levels[:10])
        result[name] = figures
        print(
            f"FID {figures['fid']:.3g} (real images {real['fid']:.3g}), {figures['steps']:,} steps "
            f"of {figures['batch_size']} in {figures['seconds']:.0f} s"
        )
        save_rows(folder / "race.png", rows)
        text = json.dumps(result, indent=2) + "\n"
        checkpoint.write_whole(folder / "race.json", text.encode())
        checkpoint.write_whole(folder / "race.md", report(result).encode())
    print(f"\n{folder}/race.md, race.png, race.json")


def must_build(network: dict[str, Any], data: mnist.Images) -> None:
    """Refuse a network that one of the three cannot have, before the first is trained."""
    try:
        UNet(data.channels, data.size, **network)
        unet2d(network, data.channels, data.size)
        unet(network, data.channels, data.size)
    except (TypeError, KeyError) as error:
        raise UserError(f"--network: {checkpoint.in_a_line(error)}") from None


def report(result: Mapping[str, Any]) -> str:
    """Markdown of what was measured."""
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


def drawn(draw: Draw, num_samples: int, seed: int) -> tuple[Tensor, float]:
    """Samples in 8-bit levels, 64 at a time, and the seconds they took."""
    torch.manual_seed(seed)
    start, batches = time.perf_counter(), []
    with torch.no_grad():
        for first in tqdm(range(0, num_samples, BATCH), desc="sampling", unit="batch"):
            batches.append(to_uint8(draw(min(BATCH, num_samples - first))))
    return torch.cat(batches), time.perf_counter() - start


def lesson_5(terms: Terms) -> tuple[Draw, dict[str, Any]]:
    """Its laptop preset. The learning rate falls to zero at the last step, so that the number of
    steps is settled before, from the speed of a few."""
    text = (ROOT / "lesson_05" / "configs" / "laptop.yaml").read_text()
    flags = yaml.safe_load(text) | {"network": terms.network, "num_samples": 0}
    flags |= {"dataset": terms.data.name, "data_dir": terms.data_dir}

    def train(name: str, steps: int, every: int) -> float:
        options = RunOptions(
            output_dir=str(terms.folder / name),
            seed=terms.seed,
            device=str(terms.device),
            checkpoint_every=every,
            preview_every=every,
            num_previews=16,
        )
        start = time.perf_counter()
        train_mnist.main(**{**flags, "num_training_steps": steps}, options=options)
        return time.perf_counter() - start

    train("first", FEW, FEW)
    fixed, more = train("few", FEW, FEW), train("more", 3 * FEW, 3 * FEW)
    rate = max(more - fixed, 1e-9) / (2 * FEW)  # of a step, without what a run does once
    steps = max(FEW, round((terms.seconds - fixed) / rate) + FEW)
    seconds = train("run", steps, max(500, steps // 10))
    process, model, _ = load(str(saved(terms.folder / "run")[-1]))
    process = process.to(terms.device)
    model = model.to(terms.device).to(memory_format=torch.channels_last)

    def draw(number: int) -> Tensor:
        x_T = torch.randn(number, *terms.data.shape, device=terms.device)
        with autocast(terms.device):
            return ddim_sample(model, process, x_T, terms.num_steps)

    return draw, said(steps, flags["batch_size"], seconds, model)


def diffusers(terms: Terms) -> tuple[Draw, dict[str, Any]]:
    """A training loop as in its example of unconditional training: AdamW, warm-up and a cosine,
    here of the time that has passed, and its average of the weights."""
    from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler
    from diffusers.training_utils import EMAModel

    data, device = terms.data, terms.device
    batches = mnist.Batches(data.train, data.train_labels, BATCH, terms.seed, device)
    model = unet2d(terms.network, data.channels, data.size).to(device)
    model = model.to(memory_format=torch.channels_last)
    scheduler = DDPMScheduler(T)
    average = EMAModel(
        model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), terms.learning_rate, betas=(0.95, 0.999), weight_decay=1e-6
    )
    steps = 0
    clock = Clock(terms.seconds)
    while (share := clock()) < 1:
        steps += 1
        factor = min(1.0, steps / 500) * 0.5 * (1 + math.cos(math.pi * share))
        optimizer.param_groups[0]["lr"] = terms.learning_rate * factor
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
    pipeline = DDIMPipeline(model.eval(), DDIMScheduler(T))
    pipeline.set_progress_bar_config(disable=True)

    def draw(number: int) -> Tensor:
        with autocast(device):
            images = pipeline(number, num_inference_steps=terms.num_steps, output_type="np").images
        return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1

    return draw, said(steps, BATCH, clock.spent, model)


def denoising_diffusion(terms: Terms) -> tuple[Draw, dict[str, Any]]:
    """Its Trainer, which reads a folder of pictures; without mirrored ones, as these are digits."""
    if terms.device.type == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    from denoising_diffusion_pytorch import GaussianDiffusion, Trainer

    data = terms.data
    pictures = terms.folder / "pictures"
    pictures.mkdir()
    for i, levels in enumerate(tqdm(data.train, desc="pictures", unit="image")):
        to_pil_image(levels).save(pictures / f"{i:05d}.png")
    model = unet(terms.network, data.channels, data.size)
    diffusion = GaussianDiffusion(
        model, image_size=data.size, timesteps=T, sampling_timesteps=terms.num_steps
    )
    trainer = Trainer(
        diffusion.to(terms.device),
        str(pictures),
        train_batch_size=BATCH,
        train_lr=terms.learning_rate,
        augment_horizontal_flip=False,
        amp=has_bfloat16(terms.device),
        mixed_precision_type="bf16",
        calculate_fid=False,
        train_num_steps=10**9,
        save_and_sample_every=10**9,
        results_folder=str(terms.folder / "results"),
    )
    clock = Clock(terms.seconds)

    def stop_in_time(*_: object) -> None:
        if clock() >= 1:
            trainer.train_num_steps = trainer.step

    optimizer = getattr(trainer.opt, "optimizer", trainer.opt)
    optimizer.register_step_post_hook(stop_in_time)
    trainer.train()
    averaged = trainer.ema.ema_model.eval()

    def draw(number: int) -> Tensor:
        with autocast(terms.device):
            return averaged.sample(batch_size=number) * 2 - 1

    return draw, said(trainer.step, BATCH, clock.spent, model)


RACERS: dict[str, Callable[[Terms], tuple[Draw, dict[str, Any]]]] = {
    "lesson 5": lesson_5,
    "diffusers": diffusers,
    "denoising-diffusion-pytorch": denoising_diffusion,
}


class Clock:
    """Called: the share of the time that has passed; shown on a bar."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.spent, self.start = seconds, 0.0, time.perf_counter()
        self.bar = tqdm(total=round(seconds), unit="s", desc="training")

    def __call__(self) -> float:
        self.spent = time.perf_counter() - self.start
        self.bar.update(max(0, min(int(self.spent), self.bar.total) - self.bar.n))
        return self.spent / self.seconds


def said(steps: int, batch_size: int, seconds: float, model: nn.Module) -> dict[str, Any]:
    return {
        "steps": steps,
        "batch_size": batch_size,
        "seconds": seconds,
        "parameters": count(model),
    }


if __name__ == "__main__":
    cli.run(main)
