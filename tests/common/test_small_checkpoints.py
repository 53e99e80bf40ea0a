"""Checkpoints for sampling: how they are made, downloaded, and read by other programs."""

import hashlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from common import checkpoint, files
from common.errors import UserError

import pytest
import torch
from helpers import ROOT, same
from hostile_checkpoints import GOOD, GOOD_FILE
from safetensors import safe_open
from server import Server

LESSON_05 = ROOT / "lesson_05" / "pretrained"


@pytest.fixture
def training(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint_000003.safetensors"
    checkpoint.save(path, GOOD)
    return path


def test_the_small_file_holds_the_averaged_weights_in_half_precision(training, tmp_path):
    tensors = {**GOOD.tensors, "ema.num_batches": torch.tensor(3)}
    checkpoint.save(training, replace(GOOD, tensors=tensors))
    for _ in range(2):  # a small file may be replaced
        checkpoint.shrink(str(training), str(tmp_path / "small"))
    loaded = checkpoint.load(tmp_path / "small", "lesson_05")
    halves = {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}
    assert same(loaded.tensors, {k: v for k, v in halves.items() if k.startswith("ema.")})
    assert loaded.training is None
    assert (loaded.config, loaded.dataset, loaded.step) == (GOOD.config, "digits", 3)
    assert (tmp_path / "small").stat().st_size < training.stat().st_size / 3


def test_weights_that_half_precision_cannot_hold_are_refused(training, tmp_path):
    tensors = {**GOOD.tensors, "ema.conv_in.bias": torch.tensor([0.0, 1e6, 0.0, 0.0])}
    checkpoint.save(training, replace(GOOD, tensors=tensors))
    with pytest.raises(UserError, match=r"ema\.conv_in\.bias has values that are not finite"):
        checkpoint.shrink(str(training), str(tmp_path / "small"))
    assert not (tmp_path / "small").exists()


def test_only_a_small_file_is_replaced(training, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    before = training.read_bytes()
    for taken, reason in [
        (training, "is a training checkpoint: name another file"),
        (tmp_path / "notes.txt", "is no checkpoint"),
        (tmp_path, "a folder or a pipe"),
    ]:
        with pytest.raises(UserError, match=reason):
            checkpoint.shrink(str(training), str(taken))
    assert training.read_bytes() == before
    assert (tmp_path / "notes.txt").read_text() == "mine"


def shrink(*words: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "common.checkpoint", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_command_makes_a_small_file_or_refuses_in_one_line(training, tmp_path):
    small = tmp_path / "small.safetensors"
    run = shrink("--training", training, "--small", small)
    assert run.returncode == 0, run.stderr
    assert checkpoint.load(small).step == 3
    run = shrink("--training", training, "--small", training)
    assert run.returncode == 2
    assert run.stderr == (
        f"error: --small {training} is a training checkpoint: name another file\n"
    )


def test_a_checkpoint_from_an_address(address, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(files, "TIMEOUT", 0.5)
    Server.files = {"model": GOOD_FILE, "page": b"<html>sign in</html>", "half": GOOD_FILE}
    good = hashlib.sha256(GOOD_FILE).hexdigest()
    for bad in ("page", "missing", "half", "hangs"):
        with pytest.raises(UserError, match=r"could not be downloaded .* nothing was kept"):
            checkpoint.load(f"{address}/{bad}")
    with pytest.raises(UserError, match=f"it has the sha256 {good}, not 000"):
        checkpoint.load(f"{address}/model", sha256="0" * 64)
    assert not list((tmp_path / "diffusion-lessons").iterdir())
    assert checkpoint.load(f"{address}/model", sha256=good).step == 3
    Server.files = {}
    assert checkpoint.load(f"{address}/model").step == 3  # from the cache
    assert checkpoint.read_header(f"{address}/model").step == 3
    assert len(list((tmp_path / "diffusion-lessons").iterdir())) == 1


def test_a_page_instead_of_a_checkpoint_is_described_without_the_cache(
    address, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    Server.files = {"page": b"<html>sign in</html>"}
    with pytest.raises(UserError) as error:
        checkpoint.load(f"{address}/page")
    assert "(the file is no checkpoint" in str(error.value)
    assert str(tmp_path) not in str(error.value)


def test_other_programs_read_a_shipped_file_with_the_safetensors_library_alone(monkeypatch):
    """By the lines in the README beside it."""
    text = (LESSON_05 / "README.md").read_text()
    lines = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    assert len([line for line in lines.splitlines() if line]) <= 5
    assert "common" not in lines
    names: dict = {}
    monkeypatch.chdir(LESSON_05)
    exec(lines, names)
    own = checkpoint.load(LESSON_05 / "mnist.safetensors")
    assert same(names["weights"], own.tensors)
    assert json.loads(names["config"])["config"] == own.config


@pytest.mark.parametrize("file", sorted(ROOT.glob("lesson_*/**/pretrained/*.safetensors")))
def test_the_sum_in_a_shipped_file_is_of_the_tensors_bytes_in_the_order_of_their_names(file):
    with safe_open(file, framework="np") as opened:
        values = json.loads(opened.metadata()["diffusion-lessons"])
        arrays = [opened.get_tensor(name) for name in sorted(opened.keys())]
    assert values["sha256"] == hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()
    assert list(values) == sorted(values)
    assert not checkpoint.PATHS & values["config"].keys()
    assert files.file_sha256(file) in (file.parent / "README.md").read_text()
