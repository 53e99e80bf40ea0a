"""Small networks with random weights, of every lesson that DDIM samples, and their checkpoints."""

from pathlib import Path
from typing import Any, TypeVar

from common import checkpoint
from common.checkpoint import Checkpoint
from lesson_05.class_conditional.network import ClassConditionalUNet
from lesson_05.text_to_image.network import TextToImageUNet
from lesson_05.text_to_image.text import TextEncoder
from lesson_05.unet import UNet
from lesson_09.unet import UNet as UNet9

import torch
from helpers import NETWORK
from torch import nn

IMAGE = {"image_channels": 1, "image_size": 28}
TEXT = {"dim": 16, "num_layers": 2, "num_heads": 2}
LESSONS = ("lesson_05", "lesson_05.class_conditional", "lesson_05.text_to_image", "lesson_09")
N = TypeVar("N", bound=nn.Module)


def perturb(model: N) -> N:
    """Move every weight away from zero, so that a layer with zero initial weights hides nothing."""
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn_like(weight)
    return model.eval()


def small_prompted() -> TextToImageUNet:
    return TextToImageUNet(TextEncoder(**TEXT), **IMAGE, **NETWORK)


def small_network(lesson: str) -> tuple[nn.Module, dict[str, Any]]:
    """A network of that lesson, and the config that its checkpoints have."""
    network: dict[str, Any] = {**IMAGE, **NETWORK, "dropout": 0.5}
    config: dict[str, Any] = {"network": network, "num_timesteps": 60}
    if lesson == "lesson_09":
        network["learned_variance"] = True
        config |= {"schedule": "cosine", "variance": "learned"}
        config |= {"simple_weight": 1.0, "vlb_weight": 1e-3}
        return UNet9(**network), config
    config |= {"beta_1": 1e-4, "beta_T": 0.02, "variance": "beta"}
    if lesson == "lesson_05":
        return UNet(**network), config
    if lesson == "lesson_05.class_conditional":
        return ClassConditionalUNet(10, **network), config | {"num_classes": 10}
    return TextToImageUNet(TextEncoder(**TEXT), **network), config | {"text": TEXT}


def save_small_checkpoint(folder: Path, lesson: str) -> str:
    """A checkpoint of a perturbed small network, for sampling; returns its path."""
    torch.manual_seed(1)
    model, config = small_network(lesson)
    tensors = {f"ema.{name}": value for name, value in perturb(model).state_dict().items()}
    path = folder / f"{lesson}.safetensors"
    checkpoint.save(path, Checkpoint(lesson, config, "digits", 1, tensors))
    return str(path)
