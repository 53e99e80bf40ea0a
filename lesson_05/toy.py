"""A DDPM of points in the plane, in seconds: the same process and the same loss, a network of four
layers, and pictures of everything.

A point is an image of one pixel and two channels, (2, 1, 1). The data are a list of points, so the
best possible estimate of the noise is known, and with it the smallest possible loss.
"""

import math
from typing import Any

from common import cli
from common.errors import check_at_least
from common.options import ScriptOptions
from common.pictures import new_figure
from common.sampling import inference
from lesson_05.ddpm import DDPM, Network, linear_beta
from lesson_05.unet import timestep_embedding

import torch
from torch import Tensor, nn


class Mlp(nn.Module):
    """eps_hat = Mlp(xt, t): xt (B, 2, 1, 1), t (B,) -> (B, 2, 1, 1)."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.xt, self.time, self.width = nn.Linear(2, width), nn.Linear(width, width), width
        hidden = [nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()]
        self.rest = nn.Sequential(*hidden, nn.Linear(width, 2))

    def forward(self, xt: Tensor, t: Tensor) -> Tensor:
        emb = self.time(timestep_embedding(t, self.width))
        return self.rest(self.xt(xt.flatten(1)) + emb)[..., None, None]


def main(
    num_timesteps: int = 100,
    num_training_steps: int = 3000,
    num_points: int = 1000,
    options: ScriptOptions = ScriptOptions(),
) -> None:
    """Learn two half moons. Writes toy.png: the data becoming noise, noise becoming data, and the
    score that was learned. Prints the loss beside the smallest possible one.

    Args:
        num_timesteps: T.
        num_training_steps: steps of 512 points.
        num_points: points of the data, and of the samples.
    """
    check_at_least(1, num_training_steps=num_training_steps, num_points=num_points)
    torch.manual_seed(options.seed)
    process, model, data = DDPM(linear_beta(num_timesteps)), Mlp(), moons(num_points)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for step in range(num_training_steps):  # Algorithm 1
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / num_training_steps)
        x0 = data[torch.randint(len(data), (512,))]
        t = torch.randint(1, num_timesteps + 1, (512,))
        process.loss(model, x0, t, torch.randn_like(x0)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with inference(options, "lesson_05") as (folder, _):
        x0 = data[torch.randint(len(data), (5000,))]
        t, eps = torch.randint(1, num_timesteps + 1, (5000,)), torch.randn(5000, 2, 1, 1)
        for name, network in [("network", model), ("best possible", best(process, data))]:
            loss = process.loss(network, x0, t, eps).mean().item()
            print(f"loss of the {name}: {loss:.3f}")
        draw(process, model, data).savefig(folder / "toy.png", dpi=110)
        print(f"{folder}/toy.png")


def moons(num_points: int) -> Tensor:
    """Random points (N, 2, 1, 1) of two interleaved half circles, within [-1, 1]."""
    angle, upper = math.pi * torch.rand(num_points), torch.rand(num_points) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos())
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin())
    points = torch.stack([(x - 0.5) / 1.7, (y - 0.25) / 1.2], 1)
    return (points + 0.02 * torch.randn(num_points, 2)).clamp(-1, 1)[..., None, None]


def best(process: DDPM, data: Tensor) -> Network:
    """The mean of ε given xt, if x0 is one of the data, each as likely: no network has a smaller
    loss. E[x0 | xt] weighs each point by q(xt | x0), and Eq. 4 turns it into the noise."""

    def network(xt: Tensor, t: Tensor) -> Tensor:
        signal, noise = process.signal_rate[t].flatten(1), process.noise_rate[t].flatten(1)
        squared = torch.cdist(xt.flatten(1)[:, None], signal[:, None] * data.flatten(1))[:, 0] ** 2
        weight = torch.softmax(-squared / (2 * noise**2), dim=1)
        return (xt.flatten(1) - signal * (weight @ data.flatten(1))).div(noise)[..., None, None]

    return network


def draw(process: DDPM, model: Network, data: Tensor) -> Any:
    """Four times in columns: q(xt), p(xt), and the learned score -ε̂/√(1-ᾱ_t) on a grid."""
    T, x_T = process.num_timesteps, torch.randn_like(data)
    reverse = {T: x_T, **dict(process.trajectory(model, x_T))}
    grid = torch.cartesian_prod(*[torch.linspace(-2.2, 2.2, 15)] * 2)[..., None, None]
    figure = new_figure(8.4, 6.6)
    axes = figure.subplots(3, 4)
    for column, t in enumerate([T, T // 2, T // 5, 0]):
        q = process.q_sample(data, torch.tensor([t]), torch.randn_like(data))
        for row, points in enumerate([q, reverse[t]]):
            axes[row, column].plot(*points.flatten(1).T, ".", markersize=1.5)
        times = torch.full((len(grid),), max(t, 1))
        score = -model(grid, times) / process.noise_rate[times]
        axes[2, column].quiver(*grid.flatten(1).T, *score.flatten(1).T, color="C3")
        axes[0, column].set_title(f"t = {t}")
    axes[2, 3].set_title("t = 1", fontsize=10)
    for row, name in enumerate(["forward, q", "reverse, p", "learned score"]):
        axes[row, 0].set_ylabel(name)
    for panel in axes.flat:
        panel.set(xlim=(-2.4, 2.4), ylim=(-2.4, 2.4), aspect="equal", xticks=[], yticks=[])
    return figure


if __name__ == "__main__":
    cli.run(main)
