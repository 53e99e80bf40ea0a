"""Leave one thing out, and see what it was for.

A break differs from the lesson in one line. The network that comes with the lesson is sampled with
and without it, from the same noise at every step; for the last break its last layer learns anew.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import trange

from common import checkpoint, cli, mnist
from common.device import Precision, autocast, pick_device
from common.images import from_uint8, save_plot, save_rows
from common.run import check
from lesson_09.iddpm import Gaussian, ImprovedDDPM, Network
from lesson_09.sample_mnist import SHIPPED, load
from lesson_09.unet import UNet

Break = Literal["raw_log_variance", "no_clipping", "number_for_time", "lambda_over_T"]


def main(
    what: list[Break] | None = None,
    model_checkpoint: str = SHIPPED,
    num_samples: int = 8,
    num_steps: int = 10,
    num_training_steps: int = 80,
    data_dir: str | None = None,
    output_dir: str | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: Precision = "auto",
) -> None:
    """Break the lesson, one thing at a time: broken_raw_log_variance.png and so on.

    Args:
        what: raw_log_variance, v taken for the log of the variance; no_clipping, the estimate of
            the image is not clipped; number_for_time, the network is told the number of the step,
            not its time; lambda_over_T, λ times one term of the bound, not times the sum. All
            unless given.
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

    def draw(self, process: ImprovedDDPM, network: Network, clip_x0: bool = True) -> Tensor:
        """Samples (B, C, H, W); for the same seed the noise of every step is the same."""
        config = self.content["config"]["network"]
        size = config["image_size"]
        torch.manual_seed(self.seed)
        x_T = torch.randn(self.num_samples, config["image_channels"], size, size, device=self.place)
        with autocast(self.place, self.precision):
            return process.sample(network, x_T, clip_x0)


def like(process: ImprovedDDPM, kind: type[ImprovedDDPM] = ImprovedDDPM) -> ImprovedDDPM:
    """The process as another class, with a network that is told 1..T."""
    beta = 1 - process.alpha_bar[1:] / process.alpha_bar[:-1]
    return kind(beta, process.variance, process.simple_weight, process.vlb_weight)


class RawLogVariance(ImprovedDDPM):
    """v itself as the log of the variance: Eq. 15 left out."""

    def p_mean_variance(self, out: Tensor, xt: Tensor, t: Tensor, clip_x0: bool = True) -> Gaussian:
        mean, _ = super().p_mean_variance(out, xt, t, clip_x0)
        return Gaussian(mean, out[:, xt.shape[1] :])


def raw_log_variance(bench: Bench, few: ImprovedDDPM) -> dict[str, Tensor]:
    broken = like(few, RawLogVariance).to(bench.place)
    broken.timesteps = few.timesteps
    return {"raw log variance": bench.draw(broken, bench.model)}


def no_clipping(bench: Bench, few: ImprovedDDPM) -> dict[str, Tensor]:
    return {"no clipping": bench.draw(few, bench.model, clip_x0=False)}


def number_for_time(bench: Bench, few: ImprovedDDPM) -> dict[str, Tensor]:
    return {"told i, not τ": bench.draw(like(few).to(bench.place), bench.model)}


def lambda_over_T(bench: Bench, data: mnist.Images, num_training_steps: int, path: Path) -> None:
    """Where v stands at each t after a few steps that relearn it: λ times the sum, λ times one
    term, and both with an optimiser that does not scale each weight's gradient by its size."""
    channels, T = data.channels, bench.process.num_timesteps
    x0 = from_uint8(data.test[:32]).to(bench.place)
    times = torch.linspace(1, T, 26).round().long().tolist()
    curves = {}
    for optimizer in ("Adam", "SGD"):
        for name, share in [("λ T L", 1.0), ("λ L", 1 / T)]:
            model = relearn_v(bench, data, optimizer, share, num_training_steps)
            fracs = []
            for t in times:
                t_batch = torch.full((len(x0),), t, device=bench.place)
                torch.manual_seed(t)
                with torch.no_grad(), autocast(bench.place, bench.precision):
                    out = model(bench.process.q_sample(x0, t_batch, torch.randn_like(x0)), t_batch)
                fracs.append(((out[:, channels:] + 1) / 2).mean().item())
            curves[f"{name}, {optimizer}"] = (times, fracs)
    title = f"f = (v + 1)/2, between β̃ (0) and β (1), after {num_training_steps} steps from f = ½"
    save_plot(path, curves, "t", "f", title, yscale="linear")


def relearn_v(
    bench: Bench, data: mnist.Images, optimizer: str, share: float, num_training_steps: int
) -> UNet:
    """The network with its v wiped out and learned again, by the last layer alone."""
    process, model = deepcopy(bench.process), deepcopy(bench.model)
    process.vlb_weight *= share
    last = list(model.conv_out.parameters())
    for parameter in last:
        parameter.data[data.channels :] = 0
        parameter.requires_grad_(True)
    step_of = torch.optim.Adam(last, lr=3e-3) if optimizer == "Adam" else torch.optim.SGD(last, 3)
    batches = mnist.Batches(data.train, data.train_labels, 32, bench.seed, bench.place)
    torch.manual_seed(bench.seed)
    for step in trange(1, num_training_steps + 1, unit="step", desc=optimizer):
        x0, _ = batches[step]
        t = torch.randint(1, process.num_timesteps + 1, (len(x0),), device=bench.place)
        with autocast(bench.place, bench.precision):
            losses = process.loss(model, x0, t, torch.randn_like(x0))
        losses.mean().backward()
        for parameter in last:  # the noise estimate stays
            assert parameter.grad is not None
            parameter.grad[: data.channels] = 0
        step_of.step()
        step_of.zero_grad()
    return model


BREAKS: dict[Break, Callable[[Bench, ImprovedDDPM], dict[str, Tensor]]] = {
    "raw_log_variance": raw_log_variance,
    "no_clipping": no_clipping,
    "number_for_time": number_for_time,
}


if __name__ == "__main__":
    cli.run(main)
