"""Lesson 2's training script: its files, its bound, resuming, several processes."""

import math
import os
import re
import signal
import subprocess
import sys

from common import checkpoint, training
from common.data import Images, load_images
from common.pictures import save_grid
from lesson_02 import sample_mnist
from lesson_02.dpm import L_NULL, erasing_beta
from lesson_02.network import ConvDense
from lesson_02.options import DPMOptions
from lesson_02.scaler import Scaler

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from helpers import ROOT, assert_same_results, metrics, signal_after
from helpers_02 import train
from PIL import Image


def test_a_run_writes_its_files_and_both_bounds(tiny):
    names = {path.name for path in tiny.parent.iterdir()}
    assert {"samples.png", "reverse.gif", "forward.png", "bound.png", "samples_000004.png"} <= names
    [row] = metrics(tiny.parent)
    for name in ("train", "test"):
        assert -1 < float(row[f"k_minus_null_{name}"]) < 2.1
        assert 0 < float(row[f"standard_error_{name}"]) < 1
    log = (tiny.parent / "log.txt").read_text()
    for name in ("training", "test"):
        figures = re.search(
            rf"Bound on {name} images: K - L_null = (\S+) ± (\S+), K = (\S+) bits", log
        )
        gain, error, k = map(float, figures.groups())
        assert k == pytest.approx(gain + L_NULL, abs=2e-3)
        assert 0 < error < 1


def test_training_raises_the_bound(tmp_path):
    """It starts at 0, the bound of the forward process. Previews show the averaged network."""
    settings = {"num_training_steps": 150, "batch_size": 32, "log_every": 150, "num_samples": 0}
    train(tmp_path, **settings, learning_rate=3e-3, ema_decay=0.9, checkpoint_every=150)
    [row] = metrics(tmp_path)
    assert 0.4 < float(row["k_minus_null_test"]) < 0.5 * math.log2(1 / erasing_beta(20)[0].item())
    process, network, content = sample_mnist.load(str(tmp_path / "checkpoint_000150.safetensors"))
    torch.manual_seed(1)
    samples = process.sample(network, torch.randn(2, 1, 28, 28))
    save_grid(tmp_path / "again.png", sample_mnist.scaler_of(content).decode(samples))
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "samples_000150.png").read_bytes()


def test_resume_with_learned_rates_is_bit_exact(tmp_path, monkeypatch, capsys):
    settings = {"num_training_steps": 20, "learned_beta": True, "num_samples": 1, "log_every": 10}
    settings |= {"batch_size": 16}
    whole = train(tmp_path / "whole", **settings)
    signal_after(monkeypatch, 10, signal.SIGTERM)
    parts = tmp_path / "parts"
    with pytest.raises(SystemExit) as stopped:
        train(parts, **settings)
    assert stopped.value.code == 128 + signal.SIGTERM
    train(parts, **settings, resume="latest")
    assert_same_results(whole, parts)


def test_learned_rates_are_averaged_and_saved(tmp_path):
    train(tmp_path, num_training_steps=20, learned_beta=True, num_samples=0, batch_size=16)
    file = str(tmp_path / "checkpoint_000020.safetensors")
    tensors = checkpoint.load(file).tensors
    shift = tensors["ema.process.shift"]
    assert shift.abs().max() > 1e-4
    assert not torch.equal(shift, tensors["model.process.shift"])
    assert tensors["optimizer.process.shift.exp_avg"].any()
    process, _, _ = sample_mnist.load(file)
    assert torch.equal(process.shift, shift)
    assert not torch.allclose(process.beta()[1:], erasing_beta(20)[1:], rtol=1e-5)
    checkpoint.shrink(file, str(tmp_path / "small.safetensors"))
    small, _, _ = sample_mnist.load(str(tmp_path / "small.safetensors"))
    assert torch.allclose(small.beta(), process.beta(), rtol=1e-3)


def test_a_loaded_network_is_the_average_with_the_scale_of_its_data(tiny):
    process, network, content = sample_mnist.load(str(tiny))
    assert not network.training
    assert process.num_timesteps == 20
    average = content.tensors["ema.network.readouts.1.weight"]
    assert torch.equal(network.readouts[1].weight, average)
    assert sample_mnist.scaler_of(content) == Scaler.fit(load_images("digits").train)
    assert content.image_shape == (1, 28, 28)


def test_dequantisation_can_be_turned_off(tmp_path, monkeypatch):
    """With batches of one image."""
    flags = []
    encode = Scaler.encode

    def encode_and_note(self, images, dequantize=True):
        flags.append(dequantize)
        return encode(self, images, dequantize)

    monkeypatch.setattr(Scaler, "encode", encode_and_note)
    train(tmp_path, dequantize=False, num_samples=0, batch_size=1)
    assert flags[:4] == [False] * 4  # the training steps
    assert flags.count(False) > 4  # the bounds as well
    assert flags.count(True) == 1  # forward.png


def test_training_on_colour_images(tmp_path, monkeypatch):
    grey = load_images("digits")
    train_images, test_images = (x.repeat(1, 3, 1, 1) for x in (grey.train, grey.test))
    colour = Images("colour", train_images, grey.train_labels, test_images, grey.test_labels)
    monkeypatch.setattr(training, "load_images", lambda *_: colour)
    train(tmp_path, num_samples=1)
    with Image.open(tmp_path / "samples.png") as image:
        pixels = torch.from_numpy(np.asarray(image).astype(int))
    assert (pixels[..., 0] != pixels[..., 1]).any()


def test_presets_are_complete():
    """Every flag of a preset exists, and its network can be built."""
    for name in ("laptop", "paper"):
        preset = yaml.safe_load((ROOT / "lesson_02" / "configs" / f"{name}.yaml").read_text())
        ConvDense(1, 28, preset["num_timesteps"], **preset.pop("network"))
        DPMOptions(**preset)


@pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this PyTorch has no gloo"
)
def test_two_processes_train_learned_rates_as_one_does(tmp_path):
    """The gradients of the rates are also averaged, though they are used outside the network."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words += ["--nproc-per-node", "2", str(ROOT / "tests" / "torchrun_worker_02.py")]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC", "RANK"))}
    result = subprocess.run(
        [*words, str(tmp_path)], cwd=ROOT, env=clean, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    for rank in (0, 1):
        for line in (tmp_path / f"gradients_{rank}").read_text().splitlines():
            name, error, largest = line.split(",")
            assert float(error) < 1e-5, name  # relative to the largest
            assert float(largest) > 1e-4, name
    settings = {"num_training_steps": 4, "learned_beta": True, "log_every": 2, "num_samples": 0}
    alone = train(tmp_path / "alone", **settings)
    for one, many in zip(metrics(alone), metrics(tmp_path / "run"), strict=True):
        for name in ("loss", "grad_norm", "k_minus_null_test"):
            assert float(many[name]) == pytest.approx(float(one[name]), rel=1e-4), name
