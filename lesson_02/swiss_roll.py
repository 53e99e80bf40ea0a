"""The swiss roll: a DPM of points in the plane, Figure 1 of Sohl-Dickstein et al. 2015."""

import math
import time
from pathlib import Path

import torch
from einops import einsum, rearrange
from matplotlib import pyplot as plt
from torch import Tensor, nn
from tqdm import trange

from common import checkpoint, cli
from common.device import pick_device
from common.errors import UserError
from common.run import check
from lesson_02.dpm import DPM, L_NULL, draw_times, strata

TURNS = (1.5 * math.pi, 4.5 * math.pi)  # the angle along the roll, which is its radius as well


def main(
    num_timesteps: int = 100,
    num_units: int = 64,
    beta_1: float = 0.001,
    learned_beta: bool = False,
    noise: float = 0.02,
    num_training_steps: int = 6000,
    batch_size: int = 512,
    learning_rate: float = 0.01,
    num_points: int = 3000,
    num_bound_points: int = 10_000,
    output_dir: str | None = None,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Learn the swiss roll, draw its Figure 1 and set the bound beside its ceiling.

    Writes swiss_roll.png: the data on their way to noise, noise on its way to a roll, and where the
    model drifts.

    Args:
        num_timesteps: T; the paper has 40.
        num_units: radial units of the network; the paper has 16.
        beta_1: variance of the first forward step.
        learned_beta: whether the rates β_2..β_T are trained, too [SD15 Section 2.4.1].
        noise: deviation of the points from the roll, where that of the data is 1.
        num_training_steps: optimiser steps.
        batch_size: points a step.
        learning_rate: of Adam, falling to zero.
        num_points: in each panel.
        num_bound_points: points for the bound.
        output_dir: folder of the picture; output/ in this lesson's folder unless given.
        seed: of the weights, the points and the noise.
        device: auto, cpu, cuda, cuda:1, mps.
    """
    counts = {"num_units": num_units, "num_training_steps": num_training_steps}
    counts |= {"batch_size": batch_size, "num_points": num_points}
    check(lambda value: value >= 1, "at least 1", **counts)
    check(lambda value: value >= 2, "at least 2", num_bound_points=num_bound_points)
    check(lambda value: 0 < value < 0.5, "above 0 and below 0.5", noise=noise)
    check(lambda value: value > 0, "above 0", learning_rate=learning_rate)
    place = pick_device(device)
    folder = Path(output_dir) if output_dir else Path(__file__).parent / "output"
    checkpoint.make_folder(folder)
    torch.manual_seed(seed)
    start = time.perf_counter()
    process = DPM(geometric_beta(num_timesteps, beta_1), learned_beta).to(place)
    model = RadialNetwork(num_timesteps, roll(num_units, 0.1)).to(place)
    train(process, model, noise, num_training_steps, batch_size, learning_rate)
    with torch.no_grad():
        bits = process.bound(model, roll(num_bound_points, noise).to(place)).total
        k, error = bits.mean().item() + 2 * L_NULL, bits.std().item() / len(bits) ** 0.5
        limit = -entropy_bits(noise, beta_1)
        save_figure(folder / "swiss_roll.png", process, model, noise, num_points)
    print(f"K = {k:.3f} ± {error:.3f} bits a point, at most {limit:.3f} (-H(X1), by quadrature)")
    print(f"K - L_null = {k - 2 * L_NULL:.3f} ± {error:.3f}, at most {limit - 2 * L_NULL:.3f}")
    print("The paper: 2.35 and 6.45, for a roll whose noise it does not say")
    print(f"{time.perf_counter() - start:.0f} s; {folder}/swiss_roll.png")


def geometric_beta(T: int, beta_1: float, last_ratio: float = 100.0) -> Tensor:
    """Variances of T forward steps, each of which multiplies the ratio of noise to signal,
    (1-ᾱ_t)/ᾱ_t, by the same number: from β_1/(1-β_1) to last_ratio. float64 (T,).

    Differs: for so few steps; those of `erasing_beta` would begin with β_1 = 1/T.
    """
    if T < 2 or not 0 < beta_1 < 0.9:
        raise UserError(
            f"no {T} steps begin with {beta_1}: give num_timesteps at least 2, beta_1 in 0 to 0.9"
        )
    start = math.log(beta_1 / (1 - beta_1))
    log_ratio = torch.linspace(start, math.log(last_ratio), T, dtype=torch.float64)
    log_alpha_bar = torch.cat([torch.zeros(1), torch.nn.functional.logsigmoid(-log_ratio)])
    return -torch.expm1(log_alpha_bar.diff())


def roll(num_points: int, noise: float) -> Tensor:
    """Points (N, 2, 1, 1) of mean about 0 and, over both coordinates, variance 1."""
    angle = torch.empty(num_points).uniform_(*TURNS)
    points = curve(angle.double(), noise).float() + noise * torch.randn(num_points, 2)
    return points.view(-1, 2, 1, 1)


def curve(angle: Tensor, noise: float) -> Tensor:
    """The roll itself, float64 (N, 2): a spiral of even angle, moved and scaled to what leaves,
    with the noise, mean 0 and variance 1."""

    def spiral(a: Tensor) -> Tensor:
        return torch.stack([a * a.cos(), a * a.sin()], 1)

    every = spiral(torch.linspace(*TURNS, 20_001, dtype=torch.float64))
    mean = every.mean(0)
    scale = ((1 - noise**2) / (every - mean).pow(2).mean()).sqrt()
    return scale * (spiral(angle) - mean)


def entropy_bits(
    noise: float, beta_1: float, num_angles: int = 2000, num_cells: int = 300
) -> float:
    """H(X1) in bits, by quadrature: its density is a mean of Gaussians along the roll.

    X1 = √(1-β_1) X0 + √β_1 ε;  H = -∫ p log2 p over a square, in num_cells² cells
    """
    edge = torch.linspace(*TURNS, num_angles + 1, dtype=torch.float64)
    centre = math.sqrt(1 - beta_1) * curve((edge[1:] + edge[:-1]) / 2, noise)
    var = (1 - beta_1) * noise**2 + beta_1
    reach = centre.abs().max().item() + 6 * math.sqrt(var)
    axis = torch.linspace(-reach, reach, num_cells, dtype=torch.float64)
    # The Gaussians are isotropic: along either axis by itself, then their product.
    x, y = (torch.exp(-((axis[:, None] - c) ** 2) / (2 * var)) for c in centre.T)
    density = x @ y.T / (2 * math.pi * var * num_angles)
    cell = (axis[1] - axis[0]) ** 2
    return -(torch.special.xlogy(density, density).sum() * cell).item() / math.log(2)


class RadialNetwork(nn.Module):
    """out = RadialNetwork(xt, t): normalised radial units, and for each t its own readout
    [SD15 Appendix D.1].

    h_k = softmax_k(-|(xt - c_k) / w_k|²/2),  (μ, b) = W_t h;  xt (B, 2, 1, 1) -> (B, 4, 1, 1)
    """

    def __init__(self, num_timesteps: int, centres: Tensor) -> None:
        super().__init__()
        num_units = len(centres)
        self.centre = nn.Parameter(centres.view(num_units, 2).clone())
        self.log_width = nn.Parameter(torch.full((num_units,), math.log(2 / num_units**0.5)))
        self.readout = nn.Parameter(torch.zeros(num_timesteps + 1, 4, num_units))

    def forward(self, xt: Tensor, t: Tensor) -> Tensor:
        away = rearrange(xt, "b d 1 1 -> b 1 d") - self.centre
        h = torch.softmax(-(away.pow(2).sum(2) * torch.exp(-2 * self.log_width)) / 2, dim=1)
        return einsum(self.readout[t], h, "b o k, b k -> b o")[..., None, None]


def train(
    process: DPM, model: nn.Module, noise: float, num_steps: int, batch_size: int, rate: float
) -> None:
    """Maximise K [SD15 Eq. 14] on new points at every step."""
    parameters = [*model.parameters(), *process.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=rate)
    edges = strata(process.num_timesteps)
    bar = trange(num_steps, unit="step", desc="training")
    smooth = 0.0
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / num_steps)
        x0 = roll(batch_size, noise).to(process.device)
        t, weight = draw_times(batch_size, edges, process.device)
        loss = process.loss(model, x0, t, torch.randn_like(x0), weight).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        smooth += 0.01 * (loss.item() - smooth)
        if not math.isfinite(smooth):
            raise UserError(f"the loss became {loss.item()}: try a lower --learning_rate")
        if step % 100 == 0:
            bar.set_postfix_str(f"K - L_null {-smooth / (1 - 0.99 ** (step + 1)):.2f}")


def save_figure(path: Path, process: DPM, model: nn.Module, noise: float, count: int) -> None:
    """Figure 1: q at three times, p at the same, and the drift f_μ(xt, t) - xt there."""
    T, x0 = process.num_timesteps, roll(count, noise).to(process.device)
    eps = torch.randn_like(x0)
    back = {T: torch.randn_like(x0)}
    process.sample(model, back[T], on_step=back.__setitem__)
    figure, axes = plt.subplots(3, 3, figsize=(7.5, 7.8), layout="constrained")
    for column, t in enumerate([1, (T + 2) // 3, T]):
        times = torch.full((count,), t, device=process.device)
        for row, points in enumerate([process.q_sample(x0, times, eps), back[t]]):
            axes[row, column].plot(*points.view(-1, 2).cpu().T, ".", markersize=1, color="C0")
        at, drift = drift_field(process, model, max(t, 2))
        axes[2, column].quiver(*at.T, *drift.T, color="C3", angles="xy")
        axes[0, column].set_title(f"t = {t}")
    for row, name in enumerate(["forward, q", "reverse, p", "drift of p"]):
        axes[row, 0].set_ylabel(name)
    for panel in axes.flat:
        panel.set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal", xticks=[], yticks=[])
    figure.savefig(path, dpi=110)
    plt.close(figure)


def drift_field(process: DPM, model: nn.Module, t: int) -> tuple[Tensor, Tensor]:
    """Points of a grid, (N, 2), and by how much the mean of a step back moves each."""
    axis = torch.linspace(-2.6, 2.6, 14)
    at = torch.cartesian_prod(axis, axis)
    xt = at.to(process.device)[..., None, None]
    times = torch.full((len(at),), t, device=process.device)
    mean = process.p_mean_variance(model(xt, times), xt, times).mean
    return at, (mean - xt).view(-1, 2).cpu()


if __name__ == "__main__":
    cli.run(main)
