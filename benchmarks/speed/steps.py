"""The seconds of lesson 5's steps, printed as JSON. before.py runs this script in the folder of
each commit, so it uses only what all these commits have.

    python benchmarks/speed/steps.py cpu 10 laptop text paper
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common.device import autocast, pick_device
from lesson_05.ddpm import DDPM, linear_beta
from lesson_05.text_to_image.network import TextToImageUNet
from lesson_05.text_to_image.text import TextEncoder, tokenize
from lesson_05.unet import UNet

import torch
import yaml
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

BATCH_SIZE = {"laptop": 64, "text": 64, "paper": 16}
Step = Callable[[], object]


def measure(device: torch.device, repeats: int, networks: Sequence[str]) -> dict[str, float]:
    """Seconds of a step of training and of sampling, by network."""
    result = {}
    for name in networks:
        training, sampling = make_steps(name, device)
        for what, step in (("training", training), ("sampling", sampling)):
            result[f"{name}, {what}"] = median_seconds(step, repeats, device)
    return result


def median_seconds(step: Step, repeats: int, device: torch.device) -> float:
    seconds = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        elif device.type == "mps":
            torch.mps.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def make_network(name: str, device: torch.device) -> Any:
    """The network of a preset, or "text", that of text_to_image's laptop preset."""
    folder = "lesson_05/text_to_image" if name == "text" else "lesson_05"
    file = Path(f"{folder}/configs/{'paper' if name == 'paper' else 'laptop'}.yaml")
    config: dict[str, Any] = yaml.safe_load(file.read_text())
    torch.manual_seed(0)
    shape = {"image_channels": 1, "image_size": 28, **config["network"]}
    text = name == "text"
    model = TextToImageUNet(TextEncoder(**config["text"]), **shape) if text else UNet(**shape)
    # On a CPU the paper's network, with its 32 groups, is faster without channels-last memory.
    contiguous = name == "paper" and device.type == "cpu"
    layout = torch.contiguous_format if contiguous else torch.channels_last
    return model.to(device).to(memory_format=layout)


def make_steps(name: str, device: torch.device) -> tuple[Step, Step]:
    """A training step, and an evaluation of the network as in sampling, both as in the scripts."""
    model, B = make_network(name, device), BATCH_SIZE[name]
    process = DDPM(linear_beta(1000)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    x0 = torch.randn(B, 1, 28, 28, device=device)
    eps, t = torch.randn_like(x0), torch.randint(1, 1001, (B,), device=device)
    tokens = tokenize([str(i % 10) for i in range(B)]).to(device)

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
    device_name, number, *names = sys.argv[1:]
    print(json.dumps(measure(pick_device(device_name), int(number), names)))
