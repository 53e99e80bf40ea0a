"""What is recorded with every measurement, and where its files go."""

import json
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common import files
from common.device import hardware
from common.errors import UserError
from common.files import ROOT, write_atomically

import torch


def environment(device: torch.device, *packages: str) -> dict[str, Any]:
    """The commit, the versions of Python and of these packages, and the hardware."""
    versions = {"python": platform.python_version()} | {name: version(name) for name in packages}
    versions["torch"] = torch.__version__  # with the build, such as +cu130
    return {"commit": commit(), "versions": versions, "hardware": hardware(device)}


def check_installed(*modules: str) -> None:
    """Raise UserError if a library that only the benchmarks need is missing."""
    for name in modules:
        if find_spec(name) is None:
            raise UserError(
                f"{name} is not installed: python -m pip install -r benchmarks/requirements.txt"
            )


def commit() -> str:
    """The commit of the code that runs; with "-dirty" where files differ from it."""
    words = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return answer.stdout.strip()


def output_folder(output_dir: str | None, name: str) -> Path:
    """The output folder, made and checked: output_dir if given, else benchmarks/output/NAME."""
    default = str(ROOT / "benchmarks" / "output" / name)
    return files.output_folder(default if output_dir is None else output_dir, "benchmarks")


def read_json(path: Path) -> dict[str, Any]:
    """The content of a file, empty if there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())
