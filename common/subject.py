"""A checkpoint of any lesson, one way to sample it, and its samples, drawn so that they resume."""

import hashlib
import io
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from common import checkpoint, lessons
from common.device import Precision, autocast
from common.errors import UserError
from common.images import to_uint8
from common.run import check

Sampler = Literal["ddpm", "ddim", "strided"]
BATCH = 64
SEEDS = 100_000  # for the batches of one run
ROOT = Path(__file__).resolve().parent.parent


class Subject:
    """A checkpoint, and the way to sample it that is to be measured."""

    def __init__(
        self,
        source: str,
        sampler: Sampler,
        num_steps: int | None,
        guidance: float,
        device: torch.device,
        sha256: str | None = None,
    ) -> None:
        process, model, self.content = lessons.load(source, sha256, lessons.EVERY)
        self.source, self.sampler, self.guidance, self.device = source, sampler, guidance, device
        self.lesson: str = self.content["lesson"]
        self.folder = ROOT / self.lesson.replace(".", "/")
        remote = checkpoint.is_address(source)
        self.file = checkpoint.fetch(source, sha256) if remote else Path(source).expanduser()
        name = f"{source} ({self.lesson})"
        if self.content["dataset"] not in ("mnist", "digits"):
            raise UserError(
                f"{name} draws {self.content['dataset']}: the classifier knows digits alone"
            )
        self.conditions = lessons.own(self.lesson, "conditions")
        self.to_images = lessons.own(self.lesson, "to_images")
        self.conditional = self.conditions is not None
        if guidance != 1 and not self.conditional:
            raise UserError(f"{name} knows no conditions: leave out --guidance")
        self.steps = steps_of(process, sampler, num_steps, name)
        process = process.to(device)
        self.process = process.strided(self.steps) if sampler == "strided" else process
        self.model = model.to(device).to(memory_format=torch.channels_last)

    def network(self, digits: Tensor, seed: int) -> Callable[[Tensor, Tensor], Tensor]:
        """The network to sample, asked for these digits (B,) where it knows conditions."""
        if self.conditions is None:
            return self.model
        condition = self.conditions(digits.tolist(), seed)
        return self.model.bind(condition.to(self.device), self.guidance)

    @torch.no_grad()
    def images(
        self, digits: Tensor, seed: int, on_step: Callable[..., None] | None = None
    ) -> Tensor:
        """One image (B, C, H, W), in [-1, 1] or about, for each of the digits (B,)."""
        config = self.content["config"]["network"]
        size, channels = config["image_size"], config["image_channels"]
        x_T = torch.randn(len(digits), channels, size, size, device=self.device)
        network = self.network(digits, seed)
        if self.sampler == "ddim":
            noise = partial(estimate_noise, network)
            return lessons.ddim_sample(noise, self.process, x_T, self.steps, on_step=on_step)
        x0 = self.process.sample(network, x_T, on_step=on_step)
        return x0 if self.to_images is None else self.to_images(self.content, x0)

    def bits_per_dim(self, network: Any, images: Tensor, num_terms: int) -> dict[str, Tensor]:
        """The bound on images in [-1, 1], and what it is made of: (B,) each."""
        own = lessons.own(self.lesson, "bits_per_dim")
        if own is not None:
            return own(self.process, network, self.content, images, num_terms)
        bits = self.process.bits_per_dim(network, images, num_terms, clip_x0=True)
        decoder = bits.terms[:, 0]
        kl = bits.total - bits.prior - decoder
        return {"total": bits.total, "prior": bits.prior, "kl": kl, "decoder": decoder}


def steps_of(process: Any, sampler: Sampler, num_steps: int | None, name: str) -> int:
    """How often the network is asked for a sample; refuses what this process cannot do."""
    needed = {"ddpm": "sample", "ddim": "predict_x0", "strided": "strided"}[sampler]
    if not hasattr(process, needed):
        raise UserError(f"{name} cannot be sampled by {sampler}: take another --sampler")
    T = process.num_timesteps
    if sampler != "ddpm":
        num_steps = min(50, T) if num_steps is None else num_steps
        check(lambda value: 1 <= value <= T, f"from 1 to {T:,}", num_steps=num_steps)
        return num_steps
    if num_steps not in (None, T):
        raise UserError(
            f"--sampler ddpm takes all {T:,} steps: leave out --num_steps, or take --sampler ddim "
            "or strided"
        )
    return T


def estimate_noise(network: Callable[..., Tensor], xt: Tensor, t: Tensor) -> Tensor:
    """The noise alone, from a network that may estimate its variance, too, as lesson 9's does."""
    return network(xt, t)[:, : xt.shape[1]]


def settings_of(
    subject: Subject, num_samples: int, seed: int, precision: Precision
) -> dict[str, Any]:
    """What the samples depend on."""
    with autocast(subject.device, precision):
        lower = torch.is_autocast_enabled(subject.device.type)
    return {
        "lesson": subject.lesson,
        "checkpoint_sha256": digest(subject.file),
        "sampler": subject.sampler,
        "num_steps": subject.steps,
        "guidance": subject.guidance if subject.conditional else None,
        "num_samples": num_samples,
        "seed": seed,
        "arithmetic": "bfloat16" if lower else "float32",
        "device": subject.device.type,
    }


def all_samples(subject: Subject, settings: dict[str, Any], file: Path) -> tuple[Tensor, float]:
    """Samples in 8-bit levels (N, C, H, W), and the seconds that drawing them took.

    Each batch has its own seed and is kept in the file as soon as it is drawn, so that a run that
    was stopped goes on to the same samples.
    """
    batches, seconds = kept_samples(settings, file)
    count, precision = settings["num_samples"], settings["arithmetic"]
    firsts = range(0, count, BATCH)
    total = len(firsts) * settings["num_steps"]
    with (
        tqdm(total=total, initial=len(batches) * settings["num_steps"], unit="step") as bar,
        forked_rng(subject.device),
        autocast(subject.device, precision),
    ):
        bar.set_description("sampling")
        for k, first in list(enumerate(firsts))[len(batches) :]:
            seed = SEEDS * settings["seed"] + k  # torch takes the lower 32 bits of it
            torch.manual_seed(seed)
            digits = torch.arange(first, min(first + BATCH, count)) % 10
            start = time.perf_counter()
            batches.append(to_uint8(subject.images(digits, seed, lambda *_: bar.update() and None)))
            seconds += time.perf_counter() - start
            kept = io.BytesIO()
            torch.save({"settings": settings, "batches": batches, "seconds": seconds}, kept)
            checkpoint.write_whole(file, kept.getbuffer())
    return torch.cat(batches), seconds


def kept_samples(settings: dict[str, Any], file: Path) -> tuple[list[Tensor], float]:
    if not file.exists():
        return [], 0.0
    try:
        kept = torch.load(file, weights_only=True)
        same = kept["settings"] == settings
        batches, seconds = kept["batches"], kept["seconds"]
    except Exception:  # a damaged archive fails in many ways
        raise UserError(f"{file} is damaged: remove it") from None
    if not same:
        raise UserError(
            f"{file} holds samples of another checkpoint or of other flags: remove it, or name "
            "another --output_dir"
        )
    return batches, seconds


def forked_rng(device: torch.device) -> AbstractContextManager[None]:
    """What is drawn in it leaves the random numbers after it as they were."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def digest(file: Path) -> str:
    """The sha256 of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()
