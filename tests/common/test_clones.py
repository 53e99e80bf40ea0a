"""A script of one clone refuses to run with the code of another that is installed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second clone: the files that lesson 5's script imports."""
    folder = tmp_path_factory.mktemp("second clone")
    for name in ("common", "lesson_05"):
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("output", "*.png")
        )
    return folder


def run(clone: Path, *paths: Path) -> subprocess.CompletedProcess:
    """Run its script with --help, where this clone is the installed one."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if paths:
        environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    words = [sys.executable, str(clone / "lesson_05" / "train_mnist.py"), "--print_config"]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)


def test_another_clones_code_is_refused_in_one_line(clone):
    result = run(clone)
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith(f"error: this script is in {clone}, but {ROOT} is installed")
    assert f"pip install -e '{clone}'" in line  # quoted, as it has a space


@pytest.mark.parametrize("own", [True, False])
def test_pythonpath_chooses_a_clone(clone, own):
    result = run(clone, clone if own else ROOT)
    assert result.returncode == 0, result.stderr
    assert "batch_size: 64" in result.stdout


def test_the_clone_that_is_installed_runs():
    assert run(ROOT).returncode == 0
