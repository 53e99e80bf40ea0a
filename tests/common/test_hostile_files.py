"""Hostile files are refused in one line, quickly, and execute nothing. `make stress` tries more."""

import json
import os
from typing import Any

from common import checkpoint

import hostile_checkpoints
import hostile_files
import pytest
import stress
import torchvision
from hostile_checkpoints import GOOD, GOOD_FILE, as_file, values_of
from hostile_files import YAMLS


def test_the_unchanged_files_are_valid(tmp_path):
    path = tmp_path / "file"
    for good, read in [
        (GOOD_FILE, hostile_checkpoints.read_checkpoint),
        (GOOD_FILE, hostile_checkpoints.read_training),
        (GOOD_FILE, hostile_files.read_resumed),
        (hostile_files.PRESET, hostile_files.read_preset),
        (hostile_files.GOOD_PNG, hostile_files.read_png),
    ]:
        path.write_bytes(good)
        assert read(path) is None
    assert hostile_files.read_idx(hostile_files.write_idx(tmp_path, hostile_files.IDX)) is None


@pytest.mark.parametrize("kind", ["checkpoints", "training", "resumed", "IDX", "YAML", "PNG"])
def test_changed_files(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = stress.read_all(*stress.kinds(tmp_path)[kind], count=40, seed=0)
    assert len(lines) >= 40
    assert any(lines)
    assert not (tmp_path / "evil-was-here").exists()


CLAIMS: dict[str, tuple[str | None, str, Any, str]] = {
    "channels": ("network", "channels", 20_000, "larger network"),
    "blocks": ("network", "num_blocks", 10**6, "larger network"),
    "more blocks": ("network", "num_blocks", 10**9, "num_blocks is"),
    "levels": ("network", "multipliers", [1] * 10**5, "is damaged"),
    "groups": ("network", "num_groups", 0, "is damaged"),
    "times": (None, "num_timesteps", 10**11, "num_timesteps is"),
    "half a time": (None, "num_timesteps", 60.5, "num_timesteps is"),
    "pixels": ("network", "image_size", 10**9, "image_size is"),
    "half pixels": ("network", "image_size", 28.0, "image_size is"),
    "nothing": (None, "network", None, "is damaged"),
    "letters": ("network", "attention_resolutions", "x" * 10**5, "is damaged"),
    "number": ("network", "channels", 10**4000, "channels is"),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_a_config_too_large_for_memory(name, tmp_path):
    group, key, value, reason = CLAIMS[name]
    values = values_of(GOOD)
    (values["config"][group] if group else values["config"])[key] = value
    (tmp_path / "file").write_bytes(as_file(values, GOOD.tensors))
    before = stress.peak_memory()
    line = hostile_checkpoints.read_checkpoint(tmp_path / "file")
    assert line is not None
    assert reason in line
    assert stress.peak_memory() - before < 500


SUM = checkpoint.digest(GOOD.tensors)


@pytest.mark.parametrize("depth", [100, 900, 100_000])
def test_values_that_are_nested_too_deep(depth, tmp_path):
    for start, end in ('{"x":', "}"), ("[", "]"):
        values = {**values_of(GOOD), "training": {**(GOOD.training or {}), "counts": "?"}}
        text = json.dumps(values).replace('"?"', start * depth + "0" + end * depth)
        text = text.replace('"format"', f'"sha256": "{SUM}", "format"')
        (tmp_path / "file").write_bytes(as_file(text, GOOD.tensors))
        line = hostile_checkpoints.read_training(tmp_path / "file")
        assert line is not None
        assert "is damaged" in line or "training.counts" in line


@pytest.mark.parametrize("number", range(len(YAMLS)))
def test_files_that_are_not_presets(number, tmp_path):
    (tmp_path / "file.yaml").write_bytes(YAMLS[number])
    line = hostile_files.read_preset(tmp_path / "file.yaml")
    assert line is not None or YAMLS[number] == b""


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("name", ["pipe", "zero"])
def test_endless_files(name, tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    path = tmp_path / name
    os.mkfifo(path) if name == "pipe" else path.symlink_to("/dev/zero")
    assert "a folder or a pipe" in (hostile_checkpoints.read_checkpoint(path) or "")
    assert hostile_files.read_png(path) is not None
    assert hostile_files.read_preset(path) is not None
    raw = hostile_files.write_idx(tmp_path, hostile_files.IDX) / "MNIST" / "raw"
    (raw / "t10k-labels-idx1-ubyte").unlink()
    (raw / "t10k-labels-idx1-ubyte").symlink_to(path)
    assert hostile_files.read_idx(tmp_path) is not None
