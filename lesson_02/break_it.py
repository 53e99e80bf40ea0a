"""Leave one thing out, and see what it was for.

A break differs from the lesson in one line. The network that comes with the lesson is sampled with
and without it, from the same noise at every step.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import trange

from common import checkpoint, cli, mnist
from common.device import Precision, autocast, pick_device
from common.images import from_uint8, save_rows
from common.run import check
from lesson_02.dpm import DPM, Gaussian, Network
from lesson_02.sample_mnist import SHIPPED, load, read_mask, standard_and_shape

Break = Literal["no_noise", "fixed_variance", "late_evidence"]


def main(
    what: list[Break] | None = None,
    model_checkpoint: str = SHIPPED,
    num_samples: int = 8,
    num_images: int = 100,
    data_dir: str | None = None,
    output_dir: str | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: Precision = "auto",
) -> None:
    """Break the lesson, one thing at a time: broken_no_noise.png and so on.

    Args:
        what: no_noise, the steps back go to their mean; fixed_variance, the steps back have the
            variance of the steps there; late_evidence, when inpainting, what is known is put into
            the image after the last step alone. All of them unless given.
        model_checkpoint: a file, or an http(s) address; the shipped one unless given.
        num_samples: images in a row.
        num_images: test images for the bound that fixed_variance is measured by.
        data_dir: of the test images; else $DIFFUSION_DATA, else data/.
        output_dir: folder of the pictures; output/ in this lesson's folder unless given.
        seed: of the noise.
        device: auto, cpu, cuda, cuda:1, mps.
        precision: of the network's arithmetic; auto is bfloat16 where the hardware has it.
    """
    check(lambda value: value >= 1, "at least 1", num_samples=num_samples)
    check(lambda value: value >= 2, "at least 2", num_images=num_images)
    place = pick_device(device)
    process, model, content = load(model_checkpoint)
    standard, _ = standard_and_shape(content)
    levels = mnist.load(content["dataset"], data_dir).test[: max(num_samples, num_images)]
    folder = Path(output_dir) if output_dir else Path(__file__).parent / "output"
    checkpoint.make_folder(folder)
    torch.manual_seed(seed)
    x0 = standard.encode(from_uint8(levels)).to(place)
    bench = Bench(process.to(place), model.to(place), x0, num_samples, num_images, seed)
    for name in what or list(BREAKS):
        with autocast(place, precision):
            rows = BREAKS[name](bench)
        decoded = {row: standard.decode(images) for row, images in rows.items()}
        save_rows(folder / f"broken_{name}.png", decoded)
        print(f"{folder}/broken_{name}.png")


@dataclass
class Bench:
    """A trained network, what to sample it with, and test images."""

    process: DPM
    model: Network
    x0: Tensor
    num_samples: int
    num_images: int
    seed: int

    def draw(
        self, process: DPM, name: str, evidence: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Samples (B, C, H, W); the noise of every step is always the same."""
        torch.manual_seed(self.seed)
        xt = torch.randn_like(self.x0[: self.num_samples])
        for t in trange(process.num_timesteps, 1, -1, unit="step", desc=name):
            xt = process.p_sample(self.model, xt, t, evidence)
        return xt

    def broken(self, kind: type[DPM]) -> DPM:
        return kind(self.process.beta().detach()).to(self.process.device)


class NoNoise(DPM):
    """Steps back to the mean: lesson_02's p_sample without its last term."""

    @torch.no_grad()
    def p_sample(
        self,
        model: Network,
        xt: Tensor,
        t: int,
        evidence: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        t_batch = torch.full((len(xt),), t, device=xt.device)
        return self.p_mean_variance(model(xt, t_batch), xt, t_batch).mean


class FixedVariance(DPM):
    """Leaves out b: the variance of the step back is β_t."""

    def p_mean_variance(self, out: Tensor, xt: Tensor, t: Tensor) -> Gaussian:
        mu, b = out.chunk(2, dim=1)
        return super().p_mean_variance(torch.cat([mu, torch.zeros_like(b)], 1), xt, t)


def no_noise(bench: Bench) -> dict[str, Tensor]:
    """Every step goes to the mean of all that could have been: so does the whole way."""
    return {
        "as it is": bench.draw(bench.process, "as it is"),
        "no noise": bench.draw(bench.broken(NoNoise), "no noise"),
    }


def fixed_variance(bench: Bench) -> dict[str, Tensor]:
    """The bound says what it costs; then samples."""
    rows = {}
    for name, process in {
        "as it is": bench.process,
        "fixed variance": bench.broken(FixedVariance),
    }.items():
        torch.manual_seed(bench.seed)
        terms = min(50, process.num_timesteps - 1)
        bits = process.bound(bench.model, bench.x0[: bench.num_images], terms).total
        error = bits.std() / math.sqrt(len(bits))
        print(f"{name}: K - L_null = {bits.mean():.3f} ± {error:.3f} bits a pixel")
        rows[name] = bench.draw(process, name)
    return rows


def late_evidence(bench: Bench) -> dict[str, Tensor]:
    """Without the known half in every step the other half cannot know what to fit to."""
    x0 = bench.x0[: bench.num_samples]
    _, *shape = x0.shape
    missing = read_mask("left", (shape[0], shape[1], shape[2])).to(x0.device)
    noise_var = torch.where(missing, float("inf"), 0.0).expand_as(x0)
    drawn = bench.draw(bench.process, "at the end")
    return {
        "the image": x0,
        "in every step": bench.draw(bench.process, "in every step", (x0, noise_var)),
        "at the end": torch.where(missing, drawn, x0),
    }


BREAKS: dict[Break, Callable[[Bench], dict[str, Tensor]]] = {
    "no_noise": no_noise,
    "fixed_variance": fixed_variance,
    "late_evidence": late_evidence,
}


if __name__ == "__main__":
    cli.run(main)
