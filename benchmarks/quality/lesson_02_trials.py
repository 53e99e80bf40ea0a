"""Lesson 2's network in short trials of equal processor time, with one thing changed in each.

Besides the bound, each row has the mean square error of the guess of x0 that is in the mean of the
reverse step, at a few t, divided by that of lesson 5's shipped network at the same ratio of signal
to noise. At early t this error limits the bound, at late t the samples.
"""

import math
import time
from typing import Any, cast

from benchmarks.records import environment, output_folder
from common import cli
from common.data import Batches, Images, from_uint8, load_images
from common.device import autocast, pick_device
from common.ema import Ema
from common.files import write_atomically
from common.options import ScriptOptions
from lesson_02.dpm import DPM, Gaussian, Pair, draw_times, erasing_beta, k_minus_null, strata
from lesson_02.network import ConvDense, MultiScaleConv, initialise
from lesson_02.scaler import Scaler
from lesson_05.sample_mnist import SHIPPED, load

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

T, TIMES = 1000, (3, 32, 350, 700, 850)


class PlainB(DPM):
    """The variance is σ(b + logit β_t), as in the paper [SD15 Eq. 64]."""

    def p_mean_variance(self, out: Tensor, xt: Tensor, t: Tensor) -> Gaussian:
        mean, b = super().p_mean_variance(out, xt, t).mean, out.chunk(2, dim=1)[1]
        return Gaussian(mean, F.logsigmoid(b + self.rates().log_odds[t]))


class NoiseMean(DPM):
    """μ is the noise in xt, √(1-ᾱ_t) ε, up to the factor √β_t/(1-ᾱ_t), which is given."""

    def p_mean_variance(self, out: Tensor, xt: Tensor, t: Tensor) -> Gaussian:
        mu, b = out.chunk(2, dim=1)
        r = self.rates()
        scaled = mu * r.spread[t] / r.noise_rate[t] ** 2
        return super().p_mean_variance(torch.cat([scaled, b], 1), xt, t)


class SeesTime(ConvDense):
    """The first convolution and the first dense layer also get t/T and log t / log T as inputs."""

    def __init__(self, image_channels: int, *args: Any, **network: Any) -> None:
        super().__init__(image_channels, *args, **network)
        conv, dense = cast(Any, self.convs[0].convs), cast(Any, self.denses[0])
        first = MultiScaleConv(
            image_channels + 2, conv[0].out_channels, len(conv), conv[0].kernel_size[0]
        )
        layers = nn.ModuleList([first, nn.Linear(dense.in_features + 2, dense.out_features)])
        layers.apply(initialise)
        self.clock = torch.empty(0)
        for layer, path in zip(layers, (self.convs, self.denses), strict=True):
            layer.register_forward_pre_hook(self.add_clock)
            path[0] = layer

    def add_clock(self, layer: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        (h,) = inputs
        clock = self.clock.view(*self.clock.shape, *[1] * (h.dim() - 2))
        return torch.cat([h, clock.expand(-1, -1, *h.shape[2:])], 1)

    def forward(self, xt: Tensor, t: Tensor) -> Tensor:
        self.clock = torch.stack([t / T, t.log() / math.log(T)], 1)
        return super().forward(xt, t)


# What differs from the first row, which is lesson 2's preset of before these trials.
SCALES = {"num_scales": 3, "conv_channels": 32, "readout_channels": 32}
TRIALS: dict[str, dict[str, Any]] = {
    "before": {},
    "log_bumps": {"network": {"log_bumps": True}},
    "learning rate 3e-3": {"learning_rate": 3e-3},
    "batches of 64": {"batch_size": 64},
    "three scales of 32 features": {"network": SCALES},
    "all of these four": {
        "network": {**SCALES, "log_bumps": True},
        "learning_rate": 3e-3,
        "batch_size": 64,
    },
    "all of these four, and the layers see t": {
        "network": {**SCALES, "log_bumps": True},
        "learning_rate": 3e-3,
        "batch_size": 64,
        "kind": SeesTime,
    },
    "b as in the paper": {"process": PlainB},
    "μ is the noise, times a given factor": {"process": NoiseMean},
    "two convolutions, 1,000 dense units": {
        "network": {"num_conv_layers": 2, "dense_channels": 1000}
    },
    "no convolutions, 1,000 dense units": {
        "network": {"num_conv_layers": 0, "dense_channels": 1000}
    },
    "readout of 3 layers of 64, 8 dense outputs": {
        "network": {"num_readout_layers": 3, "readout_channels": 64, "dense_outputs": 8}
    },
}


def main(
    seconds: float = 120.0,
    trials: list[str] | None = None,
    data_dir: str | None = None,
    options: ScriptOptions = ScriptOptions(),
) -> None:
    """Train each for as long, and write trials.md in benchmarks/output/lesson_02_trials.

    Args:
        seconds: processor time of each, without the evaluation. The learning rate falls with it.
        trials: the rows of TRIALS to run; all unless given.
        data_dir: folder of the data in torchvision's layout; else $DIFFUSION_DATA, else data/.
    """
    device, data = pick_device(options.device), load_images("mnist", data_dir)
    folder = output_folder(options.output_dir, "lesson_02_trials")
    names = ["parameters", "steps", "images", "bound", *(f"t = {t}" for t in TIMES)]
    facts = environment(device, "torch")
    rows = [
        f"{seconds:g} s of processor time each, seed {options.seed}; {facts['hardware']}; "
        f"torch {facts['versions']['torch']}; commit {facts['commit']}\n",
        "| | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for name in trials or TRIALS:
        pair, figures = train(data, seconds, device, options, **TRIALS[name])
        rows.append(" | ".join([f"| {name}", *figures, *measure(pair, data, device)]) + " |")
        print(rows[-1])
        write_atomically(folder / "trials.md", ("\n".join(rows) + "\n").encode())


def train(
    data: Images,
    seconds: float,
    device: torch.device,
    options: ScriptOptions,
    network: dict[str, Any] | None = None,
    process: type[DPM] = DPM,
    kind: type[ConvDense] = ConvDense,
    learning_rate: float = 1e-3,
    batch_size: int = 128,
) -> tuple[Pair, list[str]]:
    """The averaged network, and what it took. The loop is that of lesson_02/train_mnist.py."""
    torch.manual_seed(options.seed)
    batches = Batches(data.train, data.train_labels, batch_size, options.seed, device)
    scaler = Scaler.fit(data.train)
    net = kind(data.channels, data.size, T, **(network or {}))
    model = Pair(net, process(erasing_beta(T))).to(device).to(memory_format=torch.channels_last)
    ema = Ema(model, 0.999)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    edges = strata(T, 32)
    start, step = time.process_time(), 0
    while (done := (time.process_time() - start) / seconds) < 1:
        step += 1
        x0 = scaler.encode(batches[step][0])
        t, weight = draw_times(len(x0), edges, device)
        with autocast(device, options.precision):
            losses = weight * model.process.vlb_term(model, x0, t, torch.randn_like(x0))
        losses.mean().backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate * min(1, step / 200) * (1 - done)
        optimizer.step()
        ema.update_parameters(model)
        optimizer.zero_grad()
    count = sum(p.numel() for p in model.parameters())
    average = cast(Pair, ema.module)
    return average, [f"{count:,}", f"{step:,}", f"{step * batch_size:,}"]


@torch.no_grad()
def measure(pair: Pair, data: Images, device: torch.device) -> list[str]:
    """The bound on the first 1,000 test images, and the errors of x0, as the cells of a row."""
    torch.manual_seed(1)
    scaler, process = Scaler.fit(data.train), pair.process
    x0 = scaler.encode(from_uint8(data.test[:1000].to(device)))
    bits = torch.cat([process.bits_per_dim(pair, part, 16).total for part in x0.split(250)])
    gain = k_minus_null(bits, data.channels)
    cells = [f"{gain.mean():.3f} ± {gain.std() / math.sqrt(len(gain)):.3f}"]
    for t in TIMES:
        ours, theirs = errors(pair, scaler, x0[:200], torch.full((200,), t, device=device))
        cells.append(f"{ours / theirs:.2f}")
    return cells


def errors(pair: Pair, scaler: Scaler, x0: Tensor, t: Tensor) -> tuple[float, float]:
    """Mean square errors of x0 of this network and of lesson 5's, at the same ratio."""
    ddpm, unet, _ = load(SHIPPED)
    r, eps = pair.process.rates(), torch.randn_like(x0)
    xt = pair.process.q_sample(x0, t, eps)
    mean = pair.process.p_mean_variance(pair(xt, t), xt, t).mean
    ours = (mean - r.posterior_xt_coef[t] * xt) / r.posterior_x0_coef[t]
    # Lesson 5's images are those of x0 in other units, and so its noise is larger in these.
    wanted = (r.noise_rate[t[0]] / r.signal_rate[t[0]]).item() * scaler.std / 127.5
    ratios = ((1 - ddpm.alpha_bar) / ddpm.alpha_bar).sqrt()
    there = t * 0 + 1 + (ratios[1:].to(t.device) - wanted).abs().argmin()
    noisy = ddpm.to(t.device).q_sample(scaler.decode(x0), there, eps)
    guess = ddpm.predict_x0(noisy, there, unet.to(t.device)(noisy, there)).clamp(-1, 1)
    theirs = (guess - scaler.decode(x0)) * 127.5 / scaler.std
    return (ours - x0).square().mean().item(), theirs.square().mean().item()


if __name__ == "__main__":
    cli.run(main)
