"""What PyTorch and the lessons' own code compute, for the page's JavaScript to be compared with.

python -m tests.demo.vectors FILE
"""

import json
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from common.data import from_uint8
from lesson_05.class_conditional.sample_mnist import SHIPPED, load
from lesson_06.ddim import (
    clip_eps,
    ddim_encode,
    ddim_sample,
    ddim_step,
    ddim_timesteps,
    predict_noise,
    slerp,
)
from lesson_06.demo.build import digits

import torch
from torch import Tensor

SHAPE = (1, 1, 28, 28)
TIMES = [
    (T, S, spacing)
    for T in (1000, 400, 7)
    for S in (1, 2, 3, 5, 7, 20, 25, 64, 100)
    for spacing in ("uniform", "quadratic", "trailing")
    if S <= T
]
DENOISE: list[dict[str, Any]] = [
    {"label": 7, "guidance": 2, "steps": 20, "eta": 0, "spacing": "uniform", "clip": True},
    {"label": 3, "guidance": 1, "steps": 10, "eta": 1, "spacing": "quadratic", "clip": False},
    {"label": 8, "guidance": 4, "steps": 20, "eta": 0.5, "spacing": "trailing", "clip": True},
    {"label": None, "guidance": 2, "steps": 20, "eta": 0, "spacing": "uniform", "clip": False},
    {"label": 5, "guidance": 0, "steps": 7, "eta": 1, "spacing": "uniform", "clip": True},
    {"label": 0, "guidance": 16, "steps": 100, "eta": 1, "spacing": "uniform", "clip": True},
    {"label": 9, "guidance": 1, "steps": 1, "eta": 0, "spacing": "uniform", "clip": False},
]


class Vectors:
    """The shipped network, and one method for each job of the page's worker."""

    def __init__(self) -> None:
        self.process, self.model, _ = load(SHIPPED)
        self.digits = from_uint8(torch.from_numpy(digits()))[:, None, None]

    def network(self, label: int | None, guidance: float = 1) -> Any:
        asked = torch.tensor([0 if label is None else label])
        return self.model.bind(asked, 0 if label is None else guidance)

    def noise(self, seed: int) -> Tensor:
        """Sets the seed, so that the steps draw the numbers after it."""
        torch.manual_seed(seed)
        return torch.randn(SHAPE)

    def denoise(self, seed: int, options: dict[str, Any]) -> Tensor:
        network = self.network(options["label"], options["guidance"])
        rest = [options[name] for name in ("steps", "eta", "spacing", "clip")]
        return ddim_sample(network, self.process, self.noise(seed), *rest)

    def walk_back(self, image: Tensor, t: int, options: dict[str, Any]) -> Tensor:
        network = self.network(options["label"], options["guidance"])
        xt = self.process.q_sample(image, torch.tensor([t]), self.noise(options["seed"]))
        times = [0, *ddim_timesteps(t, min(options["steps"], t), "trailing")]
        for s, t in reversed(list(pairwise(times))):
            alpha_bar_t, alpha_bar_s = self.process.alpha_bar[[t, s]].tolist()
            eps_hat = predict_noise(network, self.process, xt, t)
            if options["clip"]:
                eps_hat = clip_eps(xt, eps_hat, alpha_bar_t)
            xt = ddim_step(xt, eps_hat, alpha_bar_t, alpha_bar_s, options["eta"])
        return xt

    def broken(self, what: str, seed: int, steps: int, label: int | None) -> Tensor:
        """One sample, η = 1, with clipping, and one thing changed."""
        network, xt = self.network(label), self.noise(seed)
        times = [0, *ddim_timesteps(1000, steps)]
        for i in range(steps, 0, -1):
            t, s = times[i], times[i - 1]
            alpha_bar_t, alpha_bar_s = self.process.alpha_bar[[t, s]].tolist()
            eps_hat = predict_noise(network, self.process, xt, i if what == "number" else t)
            if what != "clipping":
                eps_hat = clip_eps(xt, eps_hat, alpha_bar_t)
            state = torch.get_rng_state()
            noisy = ddim_step(xt, eps_hat, alpha_bar_t, alpha_bar_s, 1.0)
            if what == "silent" and s > 0:  # take out the noise that was added
                torch.set_rng_state(state)
                fresh = ddim_step(0 * xt, 0 * eps_hat, alpha_bar_t, alpha_bar_s, 1.0)
                noisy = noisy - fresh
            xt = noisy
        if what == "late":
            xt = xt + torch.exp(0.5 * self.process.log_var[1]) * torch.randn(SHAPE)
        return xt

    @torch.no_grad()
    def all(self) -> dict[str, Any]:
        seeds, x_T = [0, 3, 12345, 2**32 - 1], self.noise(3)
        three, label = self.digits[3], torch.tensor([7])
        found: dict[str, Any] = {
            "noise": [[s, numbers(self.noise(s)), numbers(torch.randn(SHAPE))] for s in seeds],
            "alphaBar": self.process.alpha_bar.tolist(),
            "times": [[T, S, spacing, ddim_timesteps(T, S, spacing)] for T, S, spacing in TIMES],
            "network": [
                [t, k, numbers(self.model(x_T, torch.tensor([t]), torch.tensor([k])))]
                for t in (1, 500, 1000)
                for k in (7, 10)
            ],
            "digit": numbers(three),
        }
        found["denoise"] = [
            [{**options, "seed": seed}, numbers(self.denoise(seed, options))]
            for seed, options in enumerate(DENOISE)
        ]
        walks = [
            {"t": 300, "label": None, "guidance": 2, "steps": 25, "eta": 0, "clip": True},
            {"t": 700, "label": 8, "guidance": 3, "steps": 20, "eta": 1, "clip": False},
            {"t": 3, "label": 3, "guidance": 1, "steps": 10, "eta": 1, "clip": False},
        ]
        found["walkBack"] = [
            [walk, numbers(self.walk_back(three, walk["t"], walk))]
            for walk in ({**walk, "seed": 11} for walk in walks)
        ]
        code = ddim_encode(self.network(None), self.process, three, 20, "trailing")
        back = ddim_sample(self.network(None), self.process, code, 20, spacing="trailing")
        found["encode"] = [numbers(code), numbers(back)]
        x, y = self.noise(1), self.noise(2)
        points = [slerp(x, y, 0.25), 0.75 * x + 0.25 * y]
        sample = partial(ddim_sample, self.network(None), self.process, num_steps=5)
        found["between"] = [[numbers(start), numbers(sample(start))] for start in points]
        found["breakIt"] = [
            [what, label, numbers(self.broken(what, 4, 10, label))]
            for what, label in [("silent", None), ("late", 2), ("clipping", 3), ("number", 5)]
        ]
        t, eps = torch.tensor([300]), self.noise(6)
        losses = self.process.loss(self.model.bind(label), three, t, eps)
        found["loss"] = losses.item()
        return found


def numbers(image: Tensor) -> list[float]:
    return image.flatten().tolist()


if __name__ == "__main__":
    torch.set_num_threads(1)
    Path(sys.argv[1]).write_text(json.dumps(Vectors().all()))
