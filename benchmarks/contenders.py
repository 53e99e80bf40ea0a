"""Lesson 5 and two libraries, brought to the same terms: networks of one shape or of one size, and
what each takes for a step of training and of sampling.

All networks estimate the noise in xt (B, C, H, W); t (B,) counts from 1 here, and from 0 in the
libraries.
"""

import bisect
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor, nn

from common.device import hardware
from common.errors import UserError
from common.evaluate import commit
from common.subject import ROOT
from lesson_05.ddpm import DDPM, linear_beta
from lesson_05.unet import UNet, resolutions

T = 1000


class Contender(NamedTuple):
    """A network and its library's way of using it."""

    name: str
    model: nn.Module
    estimate: Callable[[Tensor, Tensor], Tensor]  # the noise in xt
    step_back: Callable[[Tensor, int], Tensor]  # x_{t-1} from xt, as the library samples
    to: Callable[[torch.device], Any]


def preset(name: str) -> dict[str, Any]:
    """The network of one of lesson 5's presets."""
    text = (ROOT / "lesson_05" / "configs" / f"{name}.yaml").read_text()
    return yaml.safe_load(text)["network"]


def lesson_5(network: dict[str, Any], channels: int, size: int) -> Contender:
    model, process = UNet(channels, size, **network), DDPM(linear_beta(T))

    def step_back(xt: Tensor, t: int) -> Tensor:
        return process.p_sample(model, xt, t)

    return Contender("lesson 5", model, model, step_back, process.to)


def diffusers(network: dict[str, Any], channels: int, size: int) -> Contender:
    """UNet2DModel of the same shape, layer for layer."""
    from diffusers import DDPMScheduler

    model = unet2d(network, channels, size)
    scheduler = DDPMScheduler(T, variance_type="fixed_large")

    def estimate(xt: Tensor, t: Tensor) -> Tensor:
        return model(xt, t - 1).sample

    def step_back(xt: Tensor, t: int) -> Tensor:
        return scheduler.step(model(xt, t - 1).sample, t - 1, xt).prev_sample

    return Contender("diffusers", model, estimate, step_back, lambda device: None)


def unet2d(network: dict[str, Any], channels: int, size: int) -> Any:
    """diffusers' UNet2DModel in the shape of lesson 5's U-Net."""
    from diffusers import UNet2DModel

    widths = [network["channels"] * m for m in network["multipliers"]]
    sizes = resolutions(size, len(widths))
    attention = [s in network["attention_resolutions"] for s in sizes]
    if network["num_heads"] != 1:
        raise UserError("UNet2DModel counts heads in another way: take num_heads 1")
    return UNet2DModel(
        sample_size=sizes[0],
        in_channels=channels,
        out_channels=channels,
        layers_per_block=network["num_blocks"],
        block_out_channels=widths,
        down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in attention],
        up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)],
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        norm_num_groups=network["num_groups"],
        dropout=network["dropout"],
    )


def denoising_diffusion(network: dict[str, Any], channels: int, size: int) -> Contender:
    """denoising-diffusion-pytorch's Unet with as many parameters as nearly as its width allows."""
    from denoising_diffusion_pytorch import GaussianDiffusion

    model = unet(network, channels, size)
    diffusion = GaussianDiffusion(
        model, image_size=size, timesteps=T, objective="pred_noise", beta_schedule="linear"
    )

    def estimate(xt: Tensor, t: Tensor) -> Tensor:
        return model(xt, t - 1)

    def step_back(xt: Tensor, t: int) -> Tensor:
        return diffusion.p_sample(xt, t - 1)[0]

    name = "denoising-diffusion-pytorch"
    return Contender(name, model, estimate, step_back, diffusion.to)


def unet(network: dict[str, Any], channels: int, size: int) -> Any:
    """Its Unet of the same levels, as wide as comes nearest to lesson 5's number of parameters."""
    from denoising_diffusion_pytorch import Unet

    wanted = count(UNet(channels, size, **network))
    levels, dropout = tuple(network["multipliers"]), network["dropout"]
    # Its own multipliers double from level to level.
    doubling = tuple(2**i for i in range(len(levels)))

    def build(dim: int) -> Any:
        return Unet(dim, dim_mults=doubling, channels=channels, dropout=dropout)

    def size_of(dim: int) -> int:
        with torch.device("meta"):
            return count(build(dim))

    dims = range(8, 129, 4)
    least = min(bisect.bisect_left(dims, wanted, key=size_of), len(dims) - 1)
    near = dims[max(least - 1, 0) : least + 1]
    return build(min(near, key=lambda dim: abs(size_of(dim) - wanted)))


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


CONTENDERS = {
    "lesson 5": lesson_5,
    "diffusers": diffusers,
    "denoising-diffusion-pytorch": denoising_diffusion,
}


def make(name: str, network: dict[str, Any], channels: int, size: int) -> Contender:
    return CONTENDERS[name](network, channels, size)


def needed() -> None:
    """Refuse to begin without the libraries to compare with."""
    for name in ("diffusers", "denoising_diffusion_pytorch"):
        if find_spec(name) is None:
            raise UserError(
                f"{name} is not installed: python -m pip install -r benchmarks/requirements.txt"
            )


def contenders(network: dict[str, Any], channels: int, size: int) -> list[Contender]:
    return [make(name, network, channels, size) for name in CONTENDERS]


def surroundings(device: torch.device) -> dict[str, Any]:
    """What else one needs to know to compare figures."""
    packages = ("torch", "diffusers", "denoising-diffusion-pytorch")
    needed()
    return {
        "hardware": hardware(device),
        "commit": commit(),
        "versions": {name: version(name) for name in packages},
    }
