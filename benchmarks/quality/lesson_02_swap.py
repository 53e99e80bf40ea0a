"""Which t limits lesson 2's samples? Its chain, with lesson 5's network in place of its own for
some of the t.

    python -m benchmarks.quality.lesson_02_swap

Lesson 5's network guesses x0 at the same ratio of signal to noise, and the reverse step is the
posterior for that guess. For each row, the share of samples of which the classifier is sure.
"""

import math

from benchmarks.quality import classifier
from benchmarks.quality.metrics import SURE
from benchmarks.records import environment, output_folder
from common import cli
from common.data import to_uint8
from common.device import autocast, pick_device
from common.errors import check_at_least
from common.options import ScriptOptions
from common.pictures import save_rows
from common.sampling import draw_samples
from lesson_02 import sample_mnist
from lesson_02.dpm import DPM, Network
from lesson_02.scaler import Scaler
from lesson_05.ddpm import DDPM
from lesson_05.sample_mnist import SHIPPED, load

import torch
from torch import Tensor


class Borrowed:
    """The μ and b of lesson 2 that give the posterior for lesson 5's guess of x0."""

    def __init__(self, process: DPM, scaler: Scaler, ddpm: DDPM, unet: Network) -> None:
        self.process, self.scaler, self.ddpm, self.unet = process, scaler, ddpm, unet
        self.ratios = ((1 - ddpm.alpha_bar) / ddpm.alpha_bar).sqrt()

    def guess(self, xt: Tensor, t: Tensor) -> Tensor:
        """x0 of lesson 2, estimated by lesson 5's network; all t are the same."""
        r, unit = self.process.rates(), self.scaler.std / 127.5
        wanted = (r.noise_rate[t[0]] / r.signal_rate[t[0]]).item() * unit
        there = t * 0 + 1 + (self.ratios[1:].to(t.device) - wanted).abs().argmin()
        # xt / √ᾱ_t is x0 + noise; lesson 5's images are x0 in other units.
        noisy = self.scaler.decode(xt / r.signal_rate[t]) * self.ddpm.signal_rate[there]
        guess = self.ddpm.predict_x0(noisy, there, self.unet(noisy, there)).clamp(-1, 1)
        return (guess * 127.5 + 127.5 - self.scaler.mean) / self.scaler.std

    def __call__(self, xt: Tensor, t: Tensor) -> Tensor:
        r = self.process.rates()
        q = self.process.q_posterior(self.guess(xt, t), xt, t)
        mu = (q.mean - r.decay[t] * xt) / r.spread[t]
        odds = q.log_var.double().exp().logit().float() - r.log_odds[t]
        return torch.cat([mu, math.sqrt(self.process.num_timesteps) * odds], 1)


def main(
    num_samples: int = 100, border: int = 350, options: ScriptOptions = ScriptOptions()
) -> None:
    """Sample each mixture from the same noise; which_t.png has the first eight samples of each.

    Args:
        num_samples: samples of each.
        border: the largest t of the lower part.
    """
    check_at_least(1, num_samples=num_samples)
    device = pick_device(options.device)
    folder = output_folder(options.output_dir, "lesson_02_swap")
    process, own, content = sample_mnist.load(sample_mnist.SHIPPED)
    scaler, process, own = sample_mnist.scaler_of(content), process.to(device), own.to(device)
    ddpm, unet, _ = load(SHIPPED)
    borrowed = Borrowed(process, scaler, ddpm.to(device), unet.to(device))
    judge, T = classifier.load().to(device), process.num_timesteps
    facts = environment(device, "torch")
    print(f"{num_samples} samples, seed {options.seed}, {facts['hardware']}")
    mixtures: list[tuple[str, Network, Network]] = [
        ("lesson 2's network at all t", own, own),
        (f"lesson 5's at t > {border}", own, borrowed),
        (f"lesson 5's at t ≤ {border}", borrowed, own),
        ("lesson 5's at all t", borrowed, borrowed),
    ]
    rows = {}
    for name, lower, upper in mixtures:

        def mixture(xt: Tensor, t: Tensor, low: Network = lower, high: Network = upper) -> Tensor:
            return (low if t[0] <= border else high)(xt, t)

        torch.manual_seed(options.seed)
        with autocast(device, options.precision), torch.no_grad():
            samples = draw_samples(
                lambda x_T, network=mixture: process.trajectory(network, x_T),
                num_samples,
                content.image_shape,
                T - 1,
                device,
            )
        images = scaler.decode(samples.images)
        sure = classifier.classify(judge, to_uint8(images))[1].amax(1) >= SURE
        share = sure.double().mean().item()
        error = math.sqrt(share * (1 - share) / num_samples)
        print(f"{name}: sure of {share:.0%} ± {error:.0%}", flush=True)
        rows[name] = images[:8]
    save_rows(folder / "which_t.png", rows)


if __name__ == "__main__":
    cli.run(main)
