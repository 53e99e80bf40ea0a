"""Six official networks without their weights: the names and shapes of their weights, a formula
that fills these, and the outputs of the official codes with them.

published/official.npz has for each network NAME: NAME.keys, a JSON object with the names and
shapes in the order of the official state dict, and where they come from; NAME.x (1, 3, H, W), the
input; NAME.t (3,), times from 0; NAME.out (3, 1, C, H/4, W/4), every fourth row and column of the
output at each time. The two networks for 256x256 images got an image of 64x64.
"""

import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import import_weights
from lesson_05 import published as five

import numpy as np
import torch
from torch import Tensor, nn

FILE = np.load(Path(__file__).parent / "published" / "official.npz")
NAMES = sorted(name.removesuffix(".keys") for name in FILE.files if name.endswith(".keys"))
SMALL = ["ermongroup_cifar10", "openai_cifar10_uncond_50M"]


def facts(name: str) -> dict[str, Any]:
    return json.loads(str(FILE[f"{name}.keys"]))


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    return {key: tuple(shape) for key, shape in facts(name)["keys"]}


def fill(name: str, shape: tuple[int, ...]) -> Tensor:
    """The weight of this name. A matrix has the deviation 1/√(fan in)."""
    steps = torch.arange(math.prod(shape), dtype=torch.float64) * 0.7548776662466927
    u = (steps + zlib.crc32(name.encode()) / 2**32) % 1
    s = torch.sin(1e6 * u * u).reshape(shape)
    if len(shape) > 1:
        return (s * (2 * shape[0] / s.numel()) ** 0.5).float()
    return (0.1 * s + name.endswith("weight")).float()


def weights(name: str) -> dict[str, Tensor]:
    return {key: fill(key, shape) for key, shape in shapes(name).items()}


@torch.no_grad()
def error(
    name: str, network: Callable[[Tensor, Tensor], Tensor], shift: int = 1, count: int = 3
) -> float:
    """The largest difference of the network's outputs from the official ones at the last `count` of
    the times. shift: what is added to the official times, which begin at 0."""
    x, t, out = (torch.from_numpy(FILE[f"{name}.{part}"]) for part in ("x", "t", "out"))
    found = network(x.expand(count, -1, -1, -1), t[-count:] + shift)[..., ::4, ::4]
    return (found - out[-count:, 0]).abs().max().item()


# A network of a few channels, and the config.json files that describe it.
NETWORK = {
    "image_channels": 3,
    "image_size": 16,
    "channels": 8,
    "multipliers": [1, 2],
    "num_blocks": 1,
    "attention_resolutions": [8],
    "dropout": 0.0,
    "num_groups": 4,
}
UNET = {
    "_class_name": "UNet2DModel",
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 4,
    "out_channels": 3,
    "sample_size": 16,
}
SCHEDULER = {"beta_schedule": "linear", "num_train_timesteps": 500, "variance_type": "fixed_large"}


def network(module: Any = five, **changes: Any) -> nn.Module:
    """The small network of a lesson, with random weights everywhere."""
    (known,) = module.PUBLISHED.values()
    result = module.UNet(**{**known.config["network"], **changes})
    for parameter in result.parameters():
        nn.init.normal_(parameter)
    return result


def renamed(model: nn.Module, table: dict[str, str]) -> dict[str, Tensor]:
    """Its weights under the names of a table."""
    names, result = import_weights.their_names(model, table), {}
    for ours, weight in model.state_dict().items():
        parts = weight.chunk(len(names[ours]))
        result |= {name: part.clone() for name, part in zip(names[ours], parts, strict=True)}
    return result
