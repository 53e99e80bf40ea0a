"""The swiss roll: a DPM of points in the plane, Figure 1 of Sohl-Dickstein et al. 2015."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

from common import cli
from common.device import Precision, autocast, pick_device
from common.errors import UserError, check_above, check_at_least
from common.files import output_folder
from common.options import ScriptOptions
from common.pictures import new_figure
from lesson_02.dpm import DPM, L_NULL, draw_times, strata

import torch
from einops import einsum, rearrange
from torch import Tensor, nn
from tqdm import trange

TURNS = (1.5 * math.pi, 4.5 * math.pi)  # the angle along the roll, which is its radius as well


@dataclass
class Options(ScriptOptions):
    """The flags of the swiss roll.

    Args:
        precision: of the network's arithmetic.
        num_timesteps: T; the paper has 40.
        num_units: radial units of the network; the paper has 16.
        beta_1: variance of the first forward step.
        learned_beta: whether the rates β_2..β_T are trained, too [SD15 Section 2.4.1].
        noise: standard deviation of the points around the roll, relative to that of the data.
        num_training_steps: optimiser steps.
        batch_size: points per step.
        learning_rate: of Adam, falling linearly to zero.
        num_points: points in each panel.
        num_bound_points: points on which the bound is computed.
    """

    precision: Precision = "float32"
    num_timesteps: int = 100
    num_units: int = 64
    beta_1: float = 0.001
    learned_beta: bool = False
    noise: float = 0.02
    num_training_steps: int = 6000
    batch_size: int = 512
    learning_rate: float = 0.01
    num_points: int = 3000
    num_bound_points: int = 10_000

    def __post_init__(self) -> None:
        names = ("num_units", "num_training_steps", "batch_size", "num_points")
        check_at_least(1, **{name: getattr(self, name) for name in names})
        check_at_least(2, num_bound_points=self.num_bound_points)
        check_above(0, noise=self.noise, learning_rate=self.learning_rate)
        if self.noise >= 0.5:
            raise UserError(f"noise is {self.noise}: it must be below 0.5")


def main(options: Options = Options()) -> None:
    """Learn the swiss roll, draw the paper's Figure 1, and compare the bound with its upper limit.

    Writes swiss_roll.png: the data becoming noise, noise becoming a roll, and the drift of the
    model's steps.
    """
    device, folder = pick_device(options.device), output_folder(options.output_dir, "lesson_02")
    torch.manual_seed(options.seed)
    start, T, noise = time.perf_counter(), options.num_timesteps, options.noise
    process = DPM(geometric_beta(T, options.beta_1), options.learned_beta).to(device)
    model = RadialNetwork(T, roll(options.num_units, 0.1)).to(device)
    with autocast(device, options.precision):
        train(process, model, options)
        x0 = roll(options.num_bound_points, noise).to(device)
        bits = 2 * process.bits_per_dim(model, x0).total  # a point has two values
        save_figure(folder / "swiss_roll.png", process, model, noise, options.num_points)
    k, error = -bits.mean().item(), bits.std().item() / len(bits) ** 0.5
    limit = -entropy_bits(noise, options.beta_1)
    print(f"K = {k:.3f} ± {error:.3f} bits per point, at most {limit:.3f} (-H(X1), by quadrature)")
    print(f"K - L_null = {k - 2 * L_NULL:.3f} ± {error:.3f}, at most {limit - 2 * L_NULL:.3f}")
    print("The paper: 2.35 and 6.45, for a roll whose noise it does not state")
    print(f"{time.perf_counter() - start:.0f} s; {folder}/swiss_roll.png")


def geometric_beta(T: int, beta_1: float, last_ratio: float = 100.0) -> Tensor:
    """Variances of T forward steps, each of which multiplies the ratio of noise to signal,
    (1-ᾱ_t)/ᾱ_t, by the same factor: from β_1/(1-β_1) to last_ratio. float64 (T,).

    Differs: it suits few steps; `erasing_beta` would begin with β_1 = 1/T.
    """
    if T < 2 or not 0 < beta_1 < 0.9:
        raise UserError(
            f"no schedule has {T} steps from {beta_1}: num_timesteps must be at least 2, beta_1 "
            "above 0 and below 0.9"
        )
    start = math.log(beta_1 / (1 - beta_1))
    log_ratio = torch.linspace(start, math.log(last_ratio), T, dtype=torch.float64)
    log_alpha_bar = torch.cat([torch.zeros(1), torch.nn.functional.logsigmoid(-log_ratio)])
    return -torch.expm1(log_alpha_bar.diff())


def roll(num_points: int, noise: float) -> Tensor:
    """Random points (N, 2, 1, 1), of mean 0 and, over both coordinates, variance 1."""
    angle = torch.empty(num_points).uniform_(*TURNS)
    points = curve(angle.double(), noise).float() + noise * torch.randn(num_points, 2)
    return points.view(-1, 2, 1, 1)


def curve(angle: Tensor, noise: float) -> Tensor:
    """Points of the roll without noise, float64 (N, 2): a spiral, moved and scaled so that uniform
    angles, with the noise, give mean 0 and variance 1."""

    def spiral(a: Tensor) -> Tensor:
        return torch.stack([a * a.cos(), a * a.sin()], 1)

    whole = spiral(torch.linspace(*TURNS, 20_001, dtype=torch.float64))
    mean = whole.mean(0)
    scale = ((1 - noise**2) / (whole - mean).pow(2).mean()).sqrt()
    return scale * (spiral(angle) - mean)


def entropy_bits(
    noise: float, beta_1: float, num_angles: int = 2000, num_cells: int = 300
) -> float:
    """H(X1) in bits, by quadrature. Its density is a mean of Gaussians along the roll.

    X1 = √(1-β_1) X0 + √β_1 ε;  H = -∫ p log2 p over a square, in num_cells² cells
    """
    edge = torch.linspace(*TURNS, num_angles + 1, dtype=torch.float64)
    centre = math.sqrt(1 - beta_1) * curve((edge[1:] + edge[:-1]) / 2, noise)
    var = (1 - beta_1) * noise**2 + beta_1
    limit = centre.abs().max().item() + 6 * math.sqrt(var)
    axis = torch.linspace(-limit, limit, num_cells, dtype=torch.float64)
    # The Gaussians are isotropic, so each is a product of one factor per axis.
    x, y = (torch.exp(-((axis[:, None] - c) ** 2) / (2 * var)) for c in centre.T)
    density = x @ y.T / (2 * math.pi * var * num_angles)
    cell = (axis[1] - axis[0]) ** 2
    return -(torch.special.xlogy(density, density).sum() * cell).item() / math.log(2)


class RadialNetwork(nn.Module):
    """Normalised radial units, with a separate readout for each t: out = RadialNetwork(xt, t) [SD15
    Appendix D.1].

    h_k = softmax_k(-|(xt - c_k) / w_k|²/2),  (μ, b) = W_t h;  xt (B, 2, 1, 1) -> (B, 4, 1, 1)
    """

    def __init__(self, num_timesteps: int, centres: Tensor) -> None:
        super().__init__()
        num_units = len(centres)
        self.centre = nn.Parameter(centres.view(num_units, 2).clone())
        self.log_width = nn.Parameter(torch.full((num_units,), math.log(2 / num_units**0.5)))
        self.readout = nn.Parameter(torch.zeros(num_timesteps + 1, 4, num_units))

    def forward(self, xt: Tensor, t: Tensor) -> Tensor:
        offset = rearrange(xt, "b d 1 1 -> b 1 d") - self.centre
        h = torch.softmax(-(offset.pow(2).sum(2) * torch.exp(-2 * self.log_width)) / 2, dim=1)
        return einsum(self.readout[t], h, "b o k, b k -> b o")[..., None, None]


def train(process: DPM, model: nn.Module, options: Options) -> None:
    """Maximise K on new points at every step [SD15 Eq. 14]."""
    rate, num_steps = options.learning_rate, options.num_training_steps
    optimizer = torch.optim.Adam([*model.parameters(), *process.parameters()], rate)
    edges = strata(process.num_timesteps)  # T - 1 parts of one t each: t is uniform
    bar = trange(num_steps, unit="step", desc="training", disable=None)
    smooth = 0.0
    for step in bar:
        optimizer.param_groups[0]["lr"] = rate * (1 - step / num_steps)
        x0 = roll(options.batch_size, options.noise).to(process.device)
        t, _ = draw_times(options.batch_size, edges, process.device)
        loss = 2 * process.loss(model, x0, t, torch.randn_like(x0)).mean()  # bits per point
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        smooth += 0.01 * (loss.item() - smooth)
        if not math.isfinite(smooth):
            raise UserError(f"the loss became {loss.item()}: try a lower --learning_rate")
        if step % 100 == 0:
            bar.set_postfix_str(f"K - L_null {-smooth / (1 - 0.99 ** (step + 1)):.2f}")


@torch.no_grad()
def save_figure(path: Path, process: DPM, model: nn.Module, noise: float, num_points: int) -> None:
    """Figure 1: q at three times, p at the same, and the drift of p there, f_μ(xt, t) - xt."""
    T, x0 = process.num_timesteps, roll(num_points, noise).to(process.device)
    eps, x_T = torch.randn_like(x0), torch.randn_like(x0)
    reverse = {T: x_T, **dict(process.trajectory(model, x_T))}
    figure = new_figure(7.5, 7.8)
    axes = figure.subplots(3, 3)
    for column, t in enumerate([1, (T + 2) // 3, T]):
        times = torch.full((num_points,), t, device=process.device)
        for row, points in enumerate([process.q_sample(x0, times, eps), reverse[t]]):
            axes[row, column].plot(*points.view(-1, 2).cpu().T, ".", markersize=1, color="C0")
        at, drift = drift_field(process, model, max(t, 2))
        axes[2, column].quiver(*at.T, *drift.T, color="C3", angles="xy")
        axes[0, column].set_title(f"t = {t}")
    for row, name in enumerate(["forward, q", "reverse, p", "drift of p"]):
        axes[row, 0].set_ylabel(name)
    for panel in axes.flat:
        panel.set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal", xticks=[], yticks=[])
    figure.savefig(path, dpi=110)


def drift_field(process: DPM, model: nn.Module, t: int) -> tuple[Tensor, Tensor]:
    """The points of a grid (N, 2), and how far the mean of a reverse step moves each, (N, 2)."""
    axis = torch.linspace(-2.6, 2.6, 14)
    points = torch.cartesian_prod(axis, axis)
    xt = points.to(process.device)[..., None, None]
    times = torch.full((len(points),), t, device=process.device)
    mean = process.p_mean_variance(model(xt, times), xt, times).mean
    return points, (mean - xt).view(-1, 2).cpu()


if __name__ == "__main__":
    cli.run(main)
