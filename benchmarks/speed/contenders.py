"""Lesson 5 and two libraries on equal terms: networks of the same shape or size, and how each
library trains and samples them.

All networks predict the noise in xt (B, C, H, W). Here t (B,) counts from 1, in the libraries
from 0.
"""

import bisect
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks import records
from common.device import Precision, autocast
from common.errors import UserError
from common.files import ROOT
from common.network_checks import feature_map_sizes
from lesson_05.ddpm import DDPM, linear_beta
from lesson_05.unet import UNet

import torch
import yaml
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

T = 1000
SIZE = 32  # MNIST's 28 pixels, padded so that they can be halved three times


class Contender(NamedTuple):
    """A network, and how its library uses it."""

    name: str
    model: nn.Module
    predict_noise: Callable[[Tensor, Tensor], Tensor]  # from xt and t
    p_sample: Callable[[Tensor, int], Tensor]  # x_{t-1} from xt and t, as the library samples
    to: Callable[[torch.device], Any]


def preset(name: str) -> dict[str, Any]:
    """One of lesson 5's presets, laptop or paper."""
    text = (ROOT / "lesson_05" / "configs" / f"{name}.yaml").read_text()
    return yaml.safe_load(text)


def lesson_5(network: dict[str, Any], channels: int, size: int) -> Contender:
    model, process = UNet(channels, size, **network), DDPM(linear_beta(T))

    def p_sample(xt: Tensor, t: int) -> Tensor:
        return process.p_sample(model, xt, t)

    return Contender("lesson 5", model, model, p_sample, process.to)


def diffusers(network: dict[str, Any], channels: int, size: int) -> Contender:
    """UNet2DModel of the same shape, layer for layer."""
    from diffusers import DDPMScheduler

    model = unet2d(network, channels, size)
    scheduler = DDPMScheduler(T, variance_type="fixed_large")

    def predict_noise(xt: Tensor, t: Tensor) -> Tensor:
        return model(xt, t - 1).sample

    def p_sample(xt: Tensor, t: int) -> Tensor:
        return scheduler.step(model(xt, t - 1).sample, t - 1, xt).prev_sample

    return Contender("diffusers", model, predict_noise, p_sample, lambda device: None)


def unet2d(network: dict[str, Any], channels: int, size: int) -> Any:
    """diffusers' UNet2DModel in the shape of lesson 5's U-Net."""
    from diffusers import UNet2DModel

    widths = [network["channels"] * m for m in network["multipliers"]]
    sizes = feature_map_sizes(size, len(widths))
    attention = [s in network["attention_resolutions"] for s in sizes]
    if network["num_heads"] != 1:
        raise UserError("UNet2DModel counts attention heads differently: use num_heads 1")
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
    """denoising-diffusion-pytorch's Unet, as close to lesson 5's size as its width allows."""
    from denoising_diffusion_pytorch import GaussianDiffusion

    model = unet(network, channels, size)
    diffusion = GaussianDiffusion(
        model, image_size=size, timesteps=T, objective="pred_noise", beta_schedule="linear"
    )

    def predict_noise(xt: Tensor, t: Tensor) -> Tensor:
        return model(xt, t - 1)

    def p_sample(xt: Tensor, t: int) -> Tensor:
        return diffusion.p_sample(xt, t - 1)[0]

    name = "denoising-diffusion-pytorch"
    return Contender(name, model, predict_noise, p_sample, diffusion.to)


def unet(network: dict[str, Any], channels: int, size: int) -> Any:
    """Its Unet with the same levels, in the width that has closest to lesson 5's parameters."""
    from denoising_diffusion_pytorch import Unet

    wanted = count(UNet(channels, size, **network))
    levels, dropout = tuple(network["multipliers"]), network["dropout"]
    doubling = tuple(2**i for i in range(len(levels)))  # its default multipliers

    def build(dim: int) -> Any:
        return Unet(dim, dim_mults=doubling, channels=channels, dropout=dropout)

    def parameters(dim: int) -> int:
        with torch.device("meta"):
            return count(build(dim))

    dims = range(8, 129, 4)
    above = min(bisect.bisect_left(dims, wanted, key=parameters), len(dims) - 1)
    closest = dims[max(above - 1, 0) : above + 1]
    return build(min(closest, key=lambda dim: abs(parameters(dim) - wanted)))


def count(model: nn.Module) -> int:
    """The number of parameters."""
    return sum(p.numel() for p in model.parameters())


def training_step(
    contender: Contender, batch_size: int, precision: Precision, device: torch.device
) -> Callable[[], object]:
    """A training step, the same for every library: only the networks differ."""
    xt = torch.randn(batch_size, 1, SIZE, SIZE, device=device)
    eps, t = torch.randn_like(xt), torch.randint(1, T + 1, (batch_size,), device=device)
    contender.model.train()
    optimizer = torch.optim.Adam(contender.model.parameters(), lr=2e-4, fused=True)

    def step() -> None:
        with autocast(device, precision):
            loss = ((contender.predict_noise(xt, t) - eps) ** 2).mean()
        loss.backward()
        clip_grad_norm_(contender.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


CONTENDERS = {
    "lesson 5": lesson_5,
    "diffusers": diffusers,
    "denoising-diffusion-pytorch": denoising_diffusion,
}


def environment(device: torch.device) -> dict[str, Any]:
    """What is recorded with every comparison. The other libraries must be installed."""
    records.check_installed("diffusers", "denoising_diffusion_pytorch")
    return records.environment(device, "torch", "diffusers", "denoising-diffusion-pytorch")
