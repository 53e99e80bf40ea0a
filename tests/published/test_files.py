"""Published weights in the files that people have: containers, names, and a config.json."""

import collections
import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import cli, import_weights, lessons
from common.checkpoint import load
from lesson_05 import published as five
from lesson_06 import sample_ddim
from lesson_09 import published as nine

import official
import pytest
import safetensors.torch
import torch
from helpers import ROOT, same
from server import Server
from torch import Tensor

pytestmark = pytest.mark.usefixtures("small_networks")


def convert(path: Path, *words: str) -> Path:
    out = path.with_name("out.safetensors")
    import_weights.main([str(path), "--out", str(out), *words])
    return out


def as_bytes(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def old(content: Any) -> bytes:
    return as_bytes(content, _use_new_zipfile_serialization=False)


def average_last(content: dict[str, Tensor]) -> list[Any]:
    """A checkpoint of the training code of DDIM's authors: the network with a prefix, the state of
    the optimiser, the epoch, the step, and the average of the weights."""
    network = collections.OrderedDict((f"module.{k}", v + 1) for k, v in content.items())
    moments = {"step": 17, "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}
    optimizer = {"state": {0: moments}, "param_groups": [{"lr": 2e-4, "betas": (0.9, 0.999)}]}
    return [network, optimizer, 3, 17, content]


def prefixed(content: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.{name}": weight for name, weight in content.items()}


def kernels(content: dict[str, Tensor]) -> dict[str, Tensor]:
    """The matrices of attention layers as 1x1 kernels."""
    is_matrix = {name for name, w in content.items() if w.ndim == 2 and "at" in name}
    return {name: w[..., None, None] if name in is_matrix else w for name, w in content.items()}


CONTAINERS = {
    "safetensors": safetensors.torch.save,
    "zip": as_bytes,
    "old": old,
    "list": lambda content: as_bytes(average_last(content)),
    "old list": lambda content: old(average_last(content)),
    "prefix": lambda content: as_bytes(prefixed(content)),
    "kernels": lambda content: as_bytes(kernels(content)),
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("table", ["DIFFUSERS", "DIFFUSERS_2022", "ERMONGROUP"])
def test_every_container_and_every_naming_gives_the_same_network(table, container, tmp_path):
    model, path = official.network(), tmp_path / "weights.bin"
    path.write_bytes(CONTAINERS[container](official.renamed(model, getattr(five, table))))
    content = load(convert(path), "lesson_05")
    assert same(content.tensors, {f"ema.{name}": w for name, w in model.state_dict().items()})
    assert content.config["network"] == official.NETWORK
    assert content.dataset == "cifar10"


@pytest.mark.parametrize("container", ["safetensors", "zip", "old"])
def test_half_precision_is_read_as_float32_and_saved_on_request(container, tmp_path):
    model, path = official.network(nine), tmp_path / "weights.pt"
    halves = {name: weight.half() for name, weight in official.renamed(model, nine.OPENAI).items()}
    path.write_bytes(CONTAINERS[container](halves))
    tensors = load(convert(path), "lesson_09").tensors
    expected = {f"ema.{name}": w.half() for name, w in model.state_dict().items()}
    assert same(tensors, {name: weight.float() for name, weight in expected.items()})
    path.with_name("out.safetensors").unlink()
    assert same(load(convert(path, "--half"), "lesson_09").tensors, expected)
    _, loaded, _ = lessons.load(str(path.with_name("out.safetensors")))
    assert loaded.conv_in.weight.dtype == torch.float32


def test_the_printed_command_draws_samples(tmp_path, monkeypatch):
    """Of a Hub folder, with a space in its name."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    write_config(folder, official.UNET, official.SCHEDULER)
    weights = official.renamed(official.network(), five.DIFFUSERS)
    safetensors.torch.save_file(weights, "diffusion_pytorch_model.safetensors")
    result = subprocess.run(
        [sys.executable, "-m", "common.import_weights", "diffusion_pytorch_model.safetensors"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    first, second, command = result.stdout.splitlines()
    assert "sha256" in first
    assert second.startswith("a folder.safetensors: a checkpoint of lesson_05")
    python, script, *words = shlex.split(command)
    assert python == sys.executable
    assert script == sample_ddim.__file__
    words += ["--output_dir", "out", "--device", "cpu", "--num_steps", "2"]
    cli.run(sample_ddim.main, words)
    assert Path("out", "unconditional.png").exists()


def write_config(folder: Path, unet: dict[str, Any], scheduler: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(unet))
    (folder / "scheduler_config.json").write_text(json.dumps(scheduler))


def test_a_config_beside_a_hub_file_is_used(tmp_path):
    """Another size, schedule and variance than those of the published network."""
    model, path = official.network(), tmp_path / "diffusion_pytorch_model.bin"
    blob = tmp_path / "blobs" / "123"  # as in the Hub's cache
    blob.parent.mkdir()
    blob.write_bytes(as_bytes(official.renamed(model, five.DIFFUSERS_2022)))
    path.symlink_to(blob)
    scheduler = {**official.SCHEDULER, "beta_start": 4e-4, "beta_end": 0.01}
    config = {**official.UNET, "sample_size": 24}
    write_config(tmp_path, config, scheduler)
    process, loaded, content = lessons.load(str(convert(path)))
    assert same(loaded.state_dict(), model.state_dict())
    assert content.image_shape == (3, 24, 24)
    assert content.config["network"]["attention_resolutions"] == [12]
    assert content.config["variance"] == "beta"
    beta = 1 - process.alpha_bar[1:] / process.alpha_bar[:-1]
    assert torch.allclose(beta, torch.linspace(4e-4, 0.01, 500, dtype=torch.float64))


def test_a_file_at_an_address_is_downloaded_and_checked(address, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(Server, "files", {})
    model, out = official.network(), str(tmp_path / "out.safetensors")
    Server.files["good.pt"] = as_bytes(official.renamed(model, five.ERMONGROUP))
    Server.files["bad.pt"] = Server.files["good.pt"][:-30]
    with pytest.raises(SystemExit):
        import_weights.main([f"{address}/bad.pt", "--out", out])
    assert "nothing was kept" in capsys.readouterr().err
    import_weights.main([f"{address}/good.pt", "--out", out])
    found = capsys.readouterr().out.split("sha256 ")[1].split()[0]
    assert same(load(out).tensors, {f"ema.{k}": w for k, w in model.state_dict().items()})
    Path(out).unlink()
    Server.files.clear()  # it is in the cache
    import_weights.main([f"{address}/good.pt", "--out", out, "--sha256", found])
