"""A DDPM of points in the plane, in seconds: the same process and the same loss, a network of four
layers, and pictures of everything.

A point is an image of one pixel and two channels, (2, 1, 1). The data are a list of points, so the
best possible estimate of the noise is known, and with it the smallest possible loss.
"""

import math
from itertools import chain, pairwise
from typing import Any

from common import cli
from common.errors import check_at_least, check_at_most
from common.files import output_folder
from common.pictures import new_figure
from lesson_05.ddpm import DDPM, Network, linear_beta
from lesson_05.unet import timestep_embedding

import torch
from torch import Tensor, nn


class Mlp(nn.Module):
    """eps_hat = Mlp(xt, t): xt (B, 2, 1, 1), t (B,) -> (B, 2, 1, 1).

    Like the time, each coordinate enters as sines and cosines, which makes fine detail easy.
    """

    def __init__(self, dim: int = 32, width: int = 128) -> None:
        super().__init__()
        self.dim = dim
        sizes = [3 * dim, width, width, width]
        layers = [(nn.Linear(a, b), nn.SiLU()) for a, b in pairwise(sizes)]
        self.layers = nn.Sequential(*chain.from_iterable(layers), nn.Linear(width, 2))

    def forward(self, xt: Tensor, t: Tensor) -> Tensor:
        x, y = 25 * xt.flatten(1).T
        features = torch.cat([timestep_embedding(value, self.dim) for value in (x, y, t)], dim=1)
        return self.layers(features)[..., None, None]


def main(
    num_timesteps: int = 100,
    num_training_steps: int = 3000,
    num_points: int = 1000,
    seed: int = 0,
    output_dir: str | None = None,
) -> None:
    """Learn two half moons. Writes toy.png: the data becoming noise, noise becoming data, and the
    score that was learned. Prints the loss beside the smallest possible one.

    Args:
        num_timesteps: T.
        num_training_steps: steps of 512 points.
        num_points: points of the data, and of the samples.
        seed: seed of all random numbers.
        output_dir: folder for the picture; output/ in the lesson's folder unless given.
    """
    check_at_least(1, num_training_steps=num_training_steps, num_points=num_points)
    check_at_most(1_000_000, num_training_steps=num_training_steps, num_timesteps=num_timesteps)
    check_at_most(10_000, num_points=num_points)
    folder = output_folder(output_dir, "lesson_05")
    torch.manual_seed(seed)
    process, model, data = DDPM(linear_beta(num_timesteps)), Mlp(), moons(num_points)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for step in range(num_training_steps):  # Algorithm 1
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / num_training_steps)
        x0 = data[torch.randint(len(data), (512,))]
        t = torch.randint(1, num_timesteps + 1, (512,))
        process.loss(model, x0, t, torch.randn_like(x0)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        x0 = data[torch.randint(len(data), (5000,))]
        t, eps = torch.randint(1, num_timesteps + 1, (5000,)), torch.randn(5000, 2, 1, 1)
        networks: dict[str, Network] = {"network": model, "best possible": best(process, data)}
        for name, network in networks.items():
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
    """Four times in columns: q(xt), p(xt), and the direction of the learned score, which is that of
    -ε̂, on a grid."""
    T, x_T = process.num_timesteps, torch.randn_like(data)
    reverse = {T: x_T, **dict(process.trajectory(model, x_T))}
    grid = torch.cartesian_prod(*[torch.linspace(-1.5, 1.5, 16)] * 2)[..., None, None]
    figure = new_figure(8.4, 6.6)
    axes = figure.subplots(3, 4)
    for column, t in enumerate([T, T // 5, T // 20, 0]):
        q = process.q_sample(data, torch.tensor([t]), torch.randn_like(data))
        for row, points in enumerate([q, reverse[t]]):
            axes[row, column].plot(*points.flatten(1).T, ".", markersize=1.5)
        times = torch.full((len(grid),), max(t, 1))
        arrows = -torch.nn.functional.normalize(model(grid, times).flatten(1))
        axes[2, column].quiver(*grid.flatten(1).T, *arrows.T, color="C3", scale=22)
        axes[0, column].set_title(f"t = {t}" if t else "t = 0 (score: t = 1)")
    for row, name in enumerate(["forward, q", "reverse, p", "direction of the score"]):
        axes[row, 0].set_ylabel(name)
    for panel in axes.flat:
        panel.set(xlim=(-1.7, 1.7), ylim=(-1.7, 1.7), aspect="equal", xticks=[], yticks=[])
    return figure


if __name__ == "__main__":
    cli.run(main)
