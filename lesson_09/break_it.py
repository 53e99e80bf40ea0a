"""Leave one thing out, and see what it was for.

A break differs from the lesson in one line. The network that comes with the lesson is sampled with
and without it, from the same noise at every step; the last one trains it on for a few steps.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm import trange

from common import checkpoint, cli, mnist
from common.device import Precision, autocast, pick_device
from common.images import from_uint8, save_plot, save_rows
from common.run import check
from lesson_09.iddpm import Gaussian, ImprovedDDPM, Network
from lesson_09.sample_mnist import SHIPPED, load
from lesson_09.unet import UNet

Break = Literal["raw_log_variance", "noise_at_1", "number_for_time", "lambda_over_T"]


def main(
    what: list[Break] | None = None,
    model_checkpoint: str = SHIPPED,
    num_samples: int = 8,
    num_steps: int = 10,
    num_training_steps: int = 150,
    data_dir: str | None = None,
    output_dir: str | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: Precision = "auto",
) -> None:
    """Break the lesson, one thing at a time: broken_raw_log_variance.png and so on.

    Args:
        what: raw_log_variance, v taken for the log of the variance; noise_at_1, the last step adds
            noise; number_for_time, the network is told the number of the step, not its time;
            lambda_over_T, λ times one term of the bound, not times the sum. All unless given.
        model_checkpoint: a file, or an http(s) address; the shipped one unless given.
        num_samples: images in a row.
        num_steps: S of the samples.
        num_training_steps: for lambda_over_T.
        data_dir: of these steps; else $DIFFUSION_DATA, else data/.
        output_dir: folder of the pictures; output/ in this lesson's folder unless given.
        seed: of the noise.
        device: auto, cpu, cuda, cuda:1, mps.
        precision: of the network's arithmetic; auto is bfloat16 where the hardware has it.
    """
    check(lambda value: value >= 1, "at least 1", num_samples=num_samples)
    check(lambda value: value >= 1, "at least 1", num_training_steps=num_training_steps)
    place = pick_device(device)
    process, model, content = load(model_checkpoint)
    few = process.strided(num_steps).to(place)
    folder = Path(output_dir) if output_dir else Path(__file__).parent / "output"
    checkpoint.make_folder(folder)
    bench = Bench(process.to(place), model.to(place), content, num_samples, seed, place, precision)
    for name in what or [*BREAKS, "lambda_over_T"]:
        path = folder / f"broken_{name}.png"
        if name == "lambda_over_T":
            data = mnist.load(content["dataset"], data_dir)
            lambda_over_T(bench, data, num_training_steps, path)
        else:
            rows = {"as it is": bench.draw(few, model), **BREAKS[name](bench, few)}
            save_rows(path, rows)
        print(path)


@dataclass
class Bench:
    """A trained network, and what to sample it with."""

    process: ImprovedDDPM
    model: UNet
    content: checkpoint.Checkpoint
    num_samples: int
    seed: int
    place: torch.device
    precision: Precision

    def draw(self, process: ImprovedDDPM, network: Network) -> Tensor:
        """Samples (B, C, H, W); for the same seed the noise of every step is the same."""
        config = self.content["config"]["network"]
        size = config["image_size"]
        torch.manual_seed(self.seed)
        x_T = torch.randn(self.num_samples, config["image_channels"], size, size, device=self.place)
        with autocast(self.place, self.precision):
            return process.sample(network, x_T)


def like(process: ImprovedDDPM, kind: type[ImprovedDDPM] = ImprovedDDPM) -> ImprovedDDPM:
    """The process as another class, with a network that is told 1..T."""
    beta = 1 - process.alpha_bar[1:] / process.alpha_bar[:-1]
    return kind(beta, process.variance, process.simple_weight, process.vlb_weight)


class RawLogVariance(ImprovedDDPM):
    """v itself as the log of the variance: Eq. 15 left out."""

    def p_mean_variance(self, out: Tensor, xt: Tensor, t: Tensor, clip_x0: bool = True) -> Gaussian:
        mean, _ = super().p_mean_variance(out, xt, t, clip_x0)
        return Gaussian(mean, out[:, xt.shape[1] :])


class NoiseAtOne(ImprovedDDPM):
    """Adds noise at t = 1, too: p_sample without its `if t == 1`."""

    @torch.no_grad()
    def p_sample(self, model: Network, xt: Tensor, t: int, clip_x0: bool = True) -> Tensor:
        t_batch = torch.full((len(xt),), t, device=xt.device)
        p = self.p_mean_variance(model(xt, self.timesteps[t_batch]), xt, t_batch, clip_x0)
        return p.mean + torch.exp(0.5 * p.log_var) * torch.randn_like(xt)


def raw_log_variance(bench: Bench, few: ImprovedDDPM) -> dict[str, Tensor]:
    broken = like(few, RawLogVariance).to(bench.place)
    broken.timesteps = few.timesteps
    return {"raw log variance": bench.draw(broken, bench.model)}


def noise_at_1(bench: Bench, few: ImprovedDDPM) -> dict[str, Tensor]:
    broken = like(few, NoiseAtOne).to(bench.place)
    broken.timesteps = few.timesteps
    return {"noise at t = 1": bench.draw(broken, bench.model)}


def number_for_time(bench: Bench, few: ImprovedDDPM) -> dict[str, Tensor]:
    return {"told i, not τ": bench.draw(like(few).to(bench.place), bench.model)}


def lambda_over_T(bench: Bench, data: mnist.Images, num_training_steps: int, path: Path) -> None:
    """What v learns in a few steps from v = 0, with λ times the sum and with λ times one term."""
    T = bench.process.num_timesteps
    x0 = from_uint8(data.test[:100]).to(bench.place)
    times = torch.linspace(1, T, 40).round().long().unique().tolist()
    curves = {}
    for name, weight in [("λ T L", 1.0), ("λ L", 1 / T)]:
        process = deepcopy(bench.process)
        process.vlb_weight *= weight
        model = deepcopy(bench.model)
        with torch.no_grad():  # forget v
            for parameter in model.conv_out.parameters():
                parameter[x0.shape[1] :] = 0
        train_on(bench, process, model, data, num_training_steps)
        terms = []
        for t in times:
            t_batch = torch.full((len(x0),), t, device=bench.place)
            torch.manual_seed(t)
            with torch.no_grad():
                eps = torch.randn_like(x0)
                terms.append(process.vlb_term(model, x0, t_batch, eps).mean().item())
        curves[name] = (times, terms)
    title = f"The terms of the bound after {num_training_steps} steps, v having begun at 0"
    save_plot(path, curves, "t", "bits per dimension", title)


def train_on(
    bench: Bench, process: ImprovedDDPM, model: UNet, data: mnist.Images, num_training_steps: int
) -> None:
    """Some more training, at the preset's highest rate."""
    batches = mnist.Batches(data.train, data.train_labels, 64, bench.seed, bench.place)
    model.train().requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    torch.manual_seed(bench.seed)
    for step in trange(1, num_training_steps + 1, unit="step", desc="training"):
        x0, _ = batches[step]
        t = torch.randint(1, process.num_timesteps + 1, (len(x0),), device=bench.place)
        with autocast(bench.place, bench.precision):
            losses = process.loss(model, x0, t, torch.randn_like(x0))
        losses.mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


BREAKS: dict[Break, Callable[[Bench, ImprovedDDPM], dict[str, Tensor]]] = {
    "raw_log_variance": raw_log_variance,
    "noise_at_1": noise_at_1,
    "number_for_time": number_for_time,
}


if __name__ == "__main__":
    cli.run(main)
