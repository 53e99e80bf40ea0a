"""What runs on an Apple GPU, as far as a machine without one can tell: see tests/mps.py."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import checkpoint
from common.checkpoint import saved

import mps
import pytest
from helpers import ROOT, same

TABLE = mps.kernels()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all lessons left behind on the stand-in for an Apple GPU."""
    folder = tmp_path_factory.mktemp("mps")
    words = [sys.executable, str(ROOT / "tests" / "mps.py"), str(folder)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def recorded(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "recorded.json").read_text())


def test_every_operator_has_a_kernel(recorded):
    missing = [name for name in recorded["seen"] if not mps.has_kernel(name, TABLE)]
    assert len(recorded["seen"]) > 80
    assert not missing


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("logspace", False),  # composite, but its .out is not there
        ("special_log_ndtr", False),
        ("special_erfcx", True),  # by its structured delegate
        ("linspace", True),
        ("multinomial", True),
        ("full", True),  # composite all the way
        ("no_such_operator", False),
    ],
)
def test_the_table_is_read_right(name, there):
    assert mps.has_kernel(name, TABLE) == there


def test_previews_leave_the_noise_of_training_as_it_is(folder):
    one, other = (checkpoint.load(saved(folder / name)[-1]) for name in ("whole", "no_previews"))
    assert same(one.tensors, other.tensors)


def test_a_resumed_run_ends_like_an_undisturbed_one(folder):
    one, other = (checkpoint.load(saved(folder / name)[-1]) for name in ("whole", "parts"))
    assert f"rng.{mps.NAME}" in one.tensors
    assert same(one.tensors, other.tensors)
    names = "samples.png", "samples_000004.png"
    assert all(
        (folder / "whole" / n).read_bytes() == (folder / "parts" / n).read_bytes() for n in names
    )


def test_recomputation_draws_the_same_dropout_masks(recorded):
    assert recorded["masks"] < 1e-6
