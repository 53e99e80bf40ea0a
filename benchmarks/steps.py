"""The seconds of lesson 5's steps, printed as JSON: what `benchmarks.before` runs, in the folder of
each commit.

    python benchmarks/steps.py cpu 10 laptop text paper
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from common.device import autocast, pick_device
from lesson_05.ddpm import DDPM, linear_beta
from lesson_05.text_to_image.network import TextToImageUNet
from lesson_05.text_to_image.text import TextEncoder, all_digit_prompts
from lesson_05.unet import UNet

BATCH = {"laptop": 64, "text": 64, "paper": 16}


def measure(device: torch.device, steps: int, networks: Sequence[str]) -> dict[str, float]:
    """Seconds of a step of training and of sampling, by network."""
    result = {}
    for name in networks:
        train, sample = tasks(name, device)
        for what, task in (("training", train), ("sampling", sample)):
            result[f"{name}, {what}"] = seconds(task, steps, device)
    return result


def seconds(task: Callable[[], object], steps: int, device: torch.device) -> float:
    taken = []
    for _ in range(steps + 2):
        start = time.perf_counter()
        task()
        if device.type == "cuda":
            torch.cuda.synchronize()
        elif device.type == "mps":
            torch.mps.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[2:])


def tasks(name: str, device: torch.device) -> tuple[Callable[[], object], Callable[[], object]]:
    """A step of training and one of the network as it samples, as the scripts take them."""
    folder = "lesson_05/text_to_image" if name == "text" else "lesson_05"
    file = Path(f"{folder}/configs/{'paper' if name == 'paper' else 'laptop'}.yaml")
    config: dict[str, Any] = yaml.safe_load(file.read_text())
    torch.manual_seed(0)
    B = BATCH[name]
    model: Any
    if name == "text":
        model = TextToImageUNet(
            TextEncoder(**config["text"]), image_channels=1, image_size=28, **config["network"]
        )
    else:
        model = UNet(1, 28, **config["network"])
    # On a CPU the paper's network, with its 32 groups, is quicker without channels-last memory.
    plain = name == "paper" and device.type == "cpu"
    layout = torch.contiguous_format if plain else torch.channels_last
    model.to(device).to(memory_format=layout)
    process = DDPM(linear_beta(1000)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    x0 = torch.randn(B, 1, 28, 28, device=device)
    eps, t = torch.randn_like(x0), torch.randint(1, 1001, (B,), device=device)
    tokens = all_digit_prompts()[:, 0][torch.arange(B) % 10].to(device)

    def network(xt: Tensor, t: Tensor) -> Tensor:
        return model(xt, t, model.encode(tokens)) if name == "text" else model(xt, t)

    def train() -> None:
        model.train()
        with autocast(device):
            loss = process.loss(network, x0, t, eps).mean()
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def sample() -> None:
        model.eval()
        with torch.no_grad(), autocast(device):
            network(x0, t)

    return train, sample


if __name__ == "__main__":
    place, number, *names = sys.argv[1:]
    print(json.dumps(measure(pick_device(place), int(number), names)))
