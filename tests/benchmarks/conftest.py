"""Fixtures for the tests of benchmarks/: scikit-learn's digits, their features, and a checkpoint of
every lesson."""

from benchmarks.quality.metrics import Reference
from common import checkpoint, lessons
from common.checkpoint import Checkpoint
from common.data import Images, load_images
from lesson_02.dpm import DPM, Pair, erasing_beta
from lesson_02.network import ConvDense
from lesson_05.class_conditional.network import ClassConditionalUNet
from lesson_05.text_to_image.network import TextToImageUNet
from lesson_05.text_to_image.text import TextEncoder
from lesson_05.unet import UNet
from lesson_09.unet import UNet as LearnedVarianceUNet

import pytest
import torch
from torch import nn

T = 24


@pytest.fixture(scope="session")
def digits() -> Images:
    return load_images("digits")


@pytest.fixture(scope="session")
def reference(digits) -> Reference:
    return Reference(digits, torch.device("cpu"))


def tiny(lesson: str) -> tuple[nn.Module, dict[str, object]]:
    """A network of that lesson, and the config of its checkpoints."""
    network: dict[str, object] = {"channels": 4, "multipliers": [1, 1, 1], "num_blocks": 1}
    network |= {"attention_resolutions": [7], "num_groups": 1, "dropout": 0.5}
    network |= {"image_channels": 1, "image_size": 28}
    config: dict[str, object] = {"network": network, "num_timesteps": T}
    if lesson == "lesson_02":
        network = {"num_timesteps": T, "conv_channels": 2, "dense_channels": 3}
        network |= {"image_channels": 1, "image_size": 28}
        config |= {"network": network, "learned_beta": False, "data_mean": 33.3, "data_std": 78.6}
        return Pair(ConvDense(**network), DPM(erasing_beta(T))), config
    if lesson == "lesson_09":
        network["learned_variance"] = True
        config |= {"schedule": "cosine", "variance": "learned"}
        config |= {"simple_weight": 1.0, "vlb_weight": 1e-3}
        return LearnedVarianceUNet(**network), config
    config |= {"beta_1": 1e-4, "beta_T": 0.02, "variance": "beta"}
    if lesson == "lesson_05.class_conditional":
        return ClassConditionalUNet(10, **network), config | {"num_classes": 10}
    if lesson == "lesson_05.text_to_image":
        text = {"dim": 8, "num_layers": 1, "num_heads": 1}
        return TextToImageUNet(TextEncoder(**text), **network), config | {"text": text}
    return UNet(**network), config


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A file of every lesson, with a small random network of T = 24."""
    folder, files = tmp_path_factory.mktemp("checkpoints"), {}
    for lesson in lessons.LESSONS:
        torch.manual_seed(1)
        model, config = tiny(lesson)
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.1 * torch.randn_like(weight)
        tensors = {f"ema.{name}": value for name, value in model.state_dict().items()}
        path = folder / f"{lesson}.safetensors"
        checkpoint.save(path, Checkpoint(lesson, config, "digits", 1, tensors))
        files[lesson] = str(path)
    return files
