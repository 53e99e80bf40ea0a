"""Draw samples from a checkpoint of any lesson, and save them so that drawing can be resumed."""

import io
import json
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common import files, lessons
from common.checkpoint import Checkpoint
from common.data import DIGITS, to_uint8
from common.device import autocast, forked_rng, pick_device
from common.errors import UserError, check_at_least, one_line
from common.options import ScriptOptions
from common.sampling import BATCH_SIZE, check_finite
from lesson_02.dpm import k_minus_null
from lesson_02.sample_mnist import scaler_of
from lesson_05.ddpm import Network
from lesson_05.text_to_image.text import class_prompts, tokenize
from lesson_06.ddim import check_eta, ddim_trajectory
from lesson_09.iddpm import ImprovedDDPM, Variance

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

Sampler = Literal["ddpm", "ddim", "strided"]
SEEDS = 100_000  # batches have the seeds SEEDS · seed + 0, 1, 2, ...
CONDITIONAL = ("lesson_05.class_conditional", "lesson_05.text_to_image")


@dataclass
class PlanOptions(ScriptOptions):
    """How samples are drawn.

    Args:
        sampler: ddpm takes all the steps of training; ddim is lesson 6's; strided is lesson 9's,
            which samples the networks of lesson 5, too.
        num_steps: steps of ddim and strided; 50 unless given.
        num_samples: number of images. Unless given, 2,000 if a sample takes at most 100 steps, else
            500.
        guidance: scale of classifier-free guidance, for a network that takes a condition.
        eta: how much of DDPM's noise each step of ddim adds, 0 to 1.
        sigma_hat: with eta 1, add the larger noise of DDPM's β instead [Song21 Section 5].
        variance: variance of the steps of ddpm and strided; as in training unless given.
    """

    sampler: Sampler = "ddim"
    num_steps: int | None = None
    num_samples: int | None = None
    guidance: float = 1.0
    eta: float = 0.0
    sigma_hat: bool = False
    variance: Variance | None = None


class SamplePlan:
    """A checkpoint of any lesson and how it is sampled. If the network takes a condition, sample n
    has the class n mod 10, for ten classes.

    Args:
        source: the checkpoint, a file or an http(s) address.
        options: the flags.
        sha256: checksum of the file; one with another sum is refused.
    """

    def __init__(self, source: str, options: PlanOptions, sha256: str | None = None) -> None:
        process, model, self.content = lessons.load(source, sha256)
        self.lesson, name = self.content.lesson, f"{source} ({self.content.lesson})"
        self.file = files.cached(source) if files.is_address(source) else files.expand(source)
        self.conditional = self.lesson in CONDITIONAL
        self.classes = model.classes if self.conditional else DIGITS
        if options.guidance != 1 and not self.conditional:
            raise UserError(f"{name} takes no condition: omit --guidance")
        check_at_least(0, guidance=options.guidance)
        self.guidance, self.sampler, self.seed = options.guidance, options.sampler, options.seed
        self.eta, self.sigma_hat = options.eta, options.sigma_hat
        check_noise(options, self.content, name)
        process, self.variance = with_variance(process, options, self.content)
        self.num_steps = count_steps(process, options, name)
        noise = "_sigma_hat" if self.sigma_hat else f"_eta_{self.eta:g}" if self.eta else ""
        noise += f"_{self.variance}" if options.variance else ""
        self.name = f"{self.sampler}_{self.num_steps}{noise}"
        self.network_calls = self.num_steps * (1 if self.guidance in (0, 1) else 2)
        default = 2000 if self.num_steps <= 100 else 500
        self.num_samples = default if options.num_samples is None else options.num_samples
        self.device, self.precision = pick_device(options.device), options.precision
        process = process.to(self.device)
        strided = self.sampler == "strided"
        self.process = process.strided(self.num_steps) if strided else process
        self.model = model.to(self.device).to(memory_format=torch.channels_last)

    def settings(self) -> dict[str, Any]:
        """Everything that the samples depend on."""
        with autocast(self.device, self.precision):
            lower = torch.is_autocast_enabled(self.device.type)
        return {
            "lesson": self.lesson,
            "checkpoint_sha256": files.file_sha256(self.file),
            "sampler": self.sampler,
            "num_steps": self.num_steps,
            "guidance": self.guidance if self.conditional else None,
            "eta": self.eta if self.sampler == "ddim" else None,
            "sigma_hat": self.sigma_hat,
            "variance": self.variance,
            "num_samples": self.num_samples,
            "seed": self.seed,
            "arithmetic": "bfloat16" if lower else "float32",
            "device": self.device.type,
        }

    def network(self, digits: Tensor, seed: int) -> Network:
        """The network to sample, with these digits or other classes (B,) as its condition if it
        takes one. Each one's prompt is one of its wordings, at random."""
        if self.lesson == "lesson_05.text_to_image":
            rng, wordings = random.Random(seed), class_prompts(self.classes)
            prompts = [rng.choice(wordings[digit]) for digit in digits.tolist()]
            return self.model.bind(tokenize(prompts).to(self.device), self.guidance)
        if self.conditional:
            return self.model.bind(digits.to(self.device), self.guidance)
        return self.model

    def trajectory(self, digits: Tensor, seed: int) -> Iterator[tuple[int, Tensor]]:
        """From noise to one image for each of the digits (B,): yields (t, xt), the last one
        (B, C, H, W) in [-1, 1] or slightly outside."""
        x_T = torch.randn(len(digits), *self.content.image_shape, device=self.device)
        network = self.network(digits, seed)
        if self.sampler == "ddim":
            return ddim_trajectory(
                network, self.process, x_T, self.num_steps, self.eta, sigma_hat=self.sigma_hat
            )
        steps = self.process.trajectory(network, x_T)
        if self.lesson == "lesson_02":
            decode = scaler_of(self.content).decode
            return ((t, decode(xt)) for t, xt in steps)
        return steps

    def bits_per_dim(
        self, images: Tensor, digits: Tensor, seed: int, num_terms: int
    ) -> dict[str, Tensor]:
        """The bound on images (B, C, H, W) in [-1, 1] and its parts, (B,) each."""
        network, T = self.network(digits, seed), self.process.num_timesteps
        if self.lesson == "lesson_02":
            scaler = scaler_of(self.content)
            bits = self.process.bits_per_dim(
                network, scaler.encode(images), min(num_terms, T - 1)
            ).total
            gain = k_minus_null(bits, images.shape[1])
            return {"total": scaler.bits_per_level(bits), "gain": gain}
        bits = self.process.bits_per_dim(network, images, min(num_terms, T), clip_x0=True)
        decoder = bits.terms[:, 0]
        kl = bits.total - bits.prior - decoder
        return {"total": bits.total, "prior": bits.prior, "kl": kl, "decoder": decoder}


def check_noise(options: PlanOptions, content: Checkpoint, name: str) -> None:
    """Refuse noise that the sampler does not add, or that the network does not know."""
    sampler, variance = options.sampler, options.variance
    check_eta(options.eta)
    if sampler != "ddim" and (options.eta or options.sigma_hat):
        raise UserError(f"--eta and --sigma_hat are for ddim: --sampler {sampler} has --variance")
    if options.sigma_hat and options.eta != 1:
        raise UserError(f"--sigma_hat needs --eta 1, not {options.eta:g}")
    if variance is None:
        return
    if sampler == "ddim":
        raise UserError("--variance is for ddpm and strided: --sampler ddim has --eta")
    if content.lesson == "lesson_02":
        raise UserError(f"{name} always predicts its variance: omit --variance")
    if variance == "learned" and not content.config["network"].get("learned_variance"):
        raise UserError(
            f"{name} was trained without learned variance: use --variance beta or beta_tilde"
        )


def with_variance(
    process: Any, options: PlanOptions, content: Checkpoint
) -> tuple[Any, Variance | None]:
    """The process with the variance of --variance, and that variance; None for ddim, which has
    none, and for lesson 2.

    Lesson 5's process becomes lesson 9's with the same ᾱ where it is to be strided, or to have
    another variance than in training. (tests/identities: the two are the same process.)
    """
    if options.sampler == "ddim" or content.lesson == "lesson_02":
        return process, None
    trained = content.config.get("variance", getattr(process, "variance", "beta"))
    variance = options.variance or trained
    if variance == trained and (options.sampler == "ddpm" or hasattr(process, "strided")):
        return process, variance
    if getattr(process, "prediction", "eps") != "eps":
        raise UserError(
            f"{content.source} does not predict the noise: omit --variance, and choose --sampler "
            "ddpm or ddim"
        )
    beta = 1 - process.alpha_bar[1:] / process.alpha_bar[:-1]
    return ImprovedDDPM(beta, variance), variance


def count_steps(process: Any, options: PlanOptions, name: str) -> int:
    """The number of sampling steps, checked: not every process has every sampler."""
    sampler, num_steps, T = options.sampler, options.num_steps, process.num_timesteps
    method = {"ddpm": "sample", "ddim": "predict_x0", "strided": "strided"}[sampler]
    if not hasattr(process, method):
        raise UserError(f"{name} cannot be sampled by {sampler}: choose another --sampler")
    if sampler != "ddpm":
        num_steps = min(50, T) if num_steps is None else num_steps
        if not 1 <= num_steps <= T:
            raise UserError(f"num_steps is {num_steps}: it must be from 1 to {T:,}")
        return num_steps
    if num_steps not in (None, T):
        raise UserError(
            f"--sampler ddpm takes all {T:,} steps: omit --num_steps, or choose --sampler ddim  "
            "or strided"
        )
    return T


@torch.no_grad()
def draw(plan: SamplePlan, file: Path) -> tuple[Tensor, float]:
    """All samples, uint8 (N, C, H, W), and the seconds that drawing them took.

    Every batch has a seed of its own, and is added to the file as soon as it is drawn: after an
    interruption, drawing resumes with the same samples.
    """
    settings, batches, seconds = plan.settings(), [], 0.0
    if file.exists():
        levels, seconds = load_samples(file, settings, plan.content.image_shape)
        batches = list(levels.split(BATCH_SIZE))
    firsts = range(0, plan.num_samples, BATCH_SIZE)
    with (
        tqdm(total=len(firsts) * plan.num_steps, unit="step", desc="sampling", disable=None) as bar,
        forked_rng(plan.device),
        autocast(plan.device, plan.precision),
    ):
        bar.update(len(batches) * plan.num_steps)
        for k in range(len(batches), len(firsts)):
            seed = SEEDS * plan.seed + k  # of which torch takes the lower 32 bits
            torch.manual_seed(seed)
            digits = torch.arange(firsts[k], min(firsts[k] + BATCH_SIZE, plan.num_samples))
            digits %= len(plan.classes)
            start = time.perf_counter()
            for _, xt in plan.trajectory(digits, seed):
                images = xt
                bar.update()
            batches.append(to_uint8(check_finite(images)))
            seconds += time.perf_counter() - start
            save_samples(file, torch.cat(batches), settings, seconds)
    return torch.cat(batches), seconds


def save_samples(file: Path, levels: Tensor, settings: Mapping[str, Any], seconds: float) -> None:
    """Write samples, uint8 (N, C, H, W), and as JSON the settings that they depend on."""
    about = json.dumps({"settings": settings, "seconds": seconds})
    buffer = io.BytesIO()
    np.savez(buffer, samples=levels.numpy(), about=np.array(about))
    files.write_atomically(file, buffer.getbuffer())


def load_samples(
    file: Path, settings: Mapping[str, Any], image_shape: tuple[int, int, int]
) -> tuple[Tensor, float]:
    """The samples of an earlier run with these settings, and the seconds that drawing them took."""
    try:
        if not file.is_file():
            raise OSError("it is no file")
        with np.load(file, allow_pickle=False) as content:
            levels, about = torch.from_numpy(content["samples"]), json.loads(str(content["about"]))
        saved_settings, seconds = about["settings"], float(about["seconds"])
    except Exception as error:  # a damaged archive fails in many ways
        raise UserError(f"{file} is damaged ({one_line(error, 200)}): remove it") from None
    if saved_settings != settings:
        raise UserError(
            f"{file} holds samples of another checkpoint or of other flags: remove it, or name "
            "another --output_dir"
        )
    count, wanted = len(levels), settings["num_samples"]
    whole = count == wanted or (count < wanted and count % BATCH_SIZE == 0)
    if levels.dtype != torch.uint8 or levels.shape[1:] != image_shape or not whole:
        raise UserError(f"{file} is damaged ({tuple(levels.shape)} samples): remove it")
    return levels, seconds
