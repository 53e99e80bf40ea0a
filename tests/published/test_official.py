"""Imported networks against the outputs of the official codes."""

import os
from collections.abc import Callable
from pathlib import Path

from common import import_weights, lessons
from common.lessons import published

import official
import pytest
import safetensors.torch
import torch
from einops import rearrange
from torch import Tensor, nn

NETWORKS = {
    "ermongroup_cifar10": ("lesson_05", "ddpm-cifar10-32", "ERMONGROUP"),
    "google_ddpm_cifar10_32": ("lesson_05", "ddpm-cifar10-32", "DIFFUSERS"),
    "google_ddpm_celebahq_256": ("lesson_05", "ddpm-256", "DIFFUSERS"),
    "openai_cifar10_uncond_50M": ("lesson_09", "iddpm-cifar10", "OPENAI"),
    "openai_imagenet64_uncond_100M": ("lesson_09", "iddpm-imagenet64", "OPENAI"),
    "openai_lsun_uncond_100M": ("lesson_09", "iddpm-lsun-bedroom", "OPENAI"),
}
# All six take a minute and 2 GB: `make published`. diffusers' names are also tested by the exports.
TESTED = official.NAMES if os.environ.get("DIFFUSION_LARGE") else official.SMALL
LIMIT = 1e-5  # a wrong eps of the group norms changes the outputs by 2e-5


def write(path: Path, name: str, weights: dict[str, Tensor]) -> None:
    """In the container of the published file: safetensors, or torch.save's archive or older
    format."""
    if name.startswith("google"):
        return safetensors.torch.save_file(weights, path)
    torch.save(weights, path, _use_new_zipfile_serialization=name.startswith("openai"))


@pytest.mark.parametrize("name", official.NAMES)
def test_every_official_weight_has_its_place(name):
    lesson, known, table = NETWORKS[name]
    module = published()[lesson]
    with torch.device("meta"):
        network = module.UNet(**module.PUBLISHED[known].config["network"])
    assert sum(p.numel() for p in network.parameters()) == official.facts(name)["num_parameters"]
    names = import_weights.their_names(network, getattr(module, table))
    theirs = [part for parts in names.values() for part in parts]
    assert sorted(theirs) == sorted(official.shapes(name))
    wanted = import_weights.their_shapes(network, names)
    assert import_weights.first_difference(official.shapes(name), wanted) is None


@pytest.mark.parametrize("name", TESTED)
def test_imported_networks_agree_with_the_official_outputs_and_wrong_imports_do_not(name, tmp_path):
    write(tmp_path / "file", name, official.weights(name))
    out = str(tmp_path / "checkpoint.safetensors")
    import_weights.import_weights(str(tmp_path / "file"), out, None, False)
    process, model, content = lessons.load(out)
    assert official.error(name, model) < LIMIT
    said = official.facts(name)["config"]
    assert content.config["published"] == NETWORKS[name][1]
    assert content.image_shape == (3, said["image_size"], said["image_size"])
    assert process.num_timesteps == said["num_timesteps"]
    assert content.config.get("schedule", "linear") == said["schedule"]
    words = {"beta": "fixed_large", "beta_tilde": "fixed_small", "learned": "learned_range"}
    assert said["variance_type"].startswith(words[content.config["variance"]])

    for shift in (0, 2):
        assert official.error(name, model, shift, count=1) > 100 * LIMIT, "a time off by one"
    for wrong in WRONG.get(name, []):
        undo = wrong(model)
        least = LIMIT if wrong is wrong_eps else 100 * LIMIT
        assert official.error(name, model, count=1) > least, wrong.__name__
        undo()
    assert official.error(name, model, count=1) < LIMIT


def wrong_eps(network: nn.Module) -> Callable[[], None]:
    norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
    right = norms[0].eps
    assert right in (1e-6, 1e-5)

    def set_eps(eps: float) -> None:
        for norm in norms:
            norm.eps = eps

    set_eps(1e-11 / right)  # 1e-5 for 1e-6 and the reverse
    return lambda: set_eps(right)


def swapped_queries_and_keys(network: nn.Module) -> Callable[[], None]:
    """Seen because of the biases: without them q·k is symmetric."""
    return change_rows(network, "(qk c) ... -> qk c ...", [1, 0, 2], qk=3)


def heads_last(network: nn.Module) -> Callable[[], None]:
    """As if all queries came first, then all keys and all values."""
    return change_rows(
        network, "(heads three c) ... -> (three heads) c ...", None, heads=4, three=3
    )


@torch.no_grad()
def change_rows(
    network: nn.Module, pattern: str, order: list[int] | None, **sizes: int
) -> Callable[[], None]:
    """Give the rows of the layers for queries, keys and values another order."""
    layers = [p for name, p in network.named_parameters() if ".qkv." in name]
    kept = [parameter.clone() for parameter in layers]
    for parameter in layers:
        parts = rearrange(parameter, pattern, **sizes)
        parameter.copy_(parts[order or slice(None)].flatten(0, 1))

    @torch.no_grad()
    def undo() -> None:
        for parameter, weight in zip(layers, kept, strict=True):
            parameter.copy_(weight)

    return undo


def time_not_rescaled(network: nn.Module) -> Callable[[], None]:
    assert network.time_scale == 0.25
    network.time_scale = 1.0
    return lambda: setattr(network, "time_scale", 0.25)


WRONG = {
    "ermongroup_cifar10": [wrong_eps, swapped_queries_and_keys],
    "openai_cifar10_uncond_50M": [wrong_eps, heads_last, time_not_rescaled],
}
