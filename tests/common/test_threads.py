"""What common/ sets before torch is loaded: how OpenMP's threads wait, and how many there are."""

import ast
import os
import subprocess
import sys

from common import cpu_quota

import pytest
from helpers import ROOT

OURS = {"benchmarks", "common", "lesson_02", "lesson_05", "lesson_06", "lesson_09"}
LOADS_TORCH = {"torch", "torchvision", "einops", "safetensors", "sklearn", "numpy", "matplotlib"}


def settings(**environment: str) -> list[str]:
    """What a new process with this environment has after `import common`."""
    names = ("GOMP_SPINCOUNT", "OMP_NUM_THREADS")
    code = f"import common, os; print([os.environ.get(name) for name in {names}])"
    kept = {k: v for k, v in os.environ.items() if k not in (*names, "OMP_WAIT_POLICY")}
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return ast.literal_eval(run.stdout)


def test_waiting_threads_give_way_unless_the_user_decides():
    assert settings()[0] == "1000"
    assert settings(GOMP_SPINCOUNT="7")[0] == "7"
    assert settings(OMP_WAIT_POLICY="active")[0] is None
    assert settings(OMP_NUM_THREADS="3")[1] == "3"


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, float("inf")),
        ({"cpu.max": "max 100000"}, float("inf")),
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, float("inf")),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4.0),
        ({"cpu.max": "nonsense"}, float("inf")),
    ],
)
def test_the_quota_of_a_container_is_read(files, quota, tmp_path):
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n")
    assert cpu_quota(tmp_path) == quota


def test_every_module_imports_ours_before_torch():
    for folder in OURS:
        for path in (ROOT / folder).rglob("*.py"):
            nodes = ast.parse(path.read_text(encoding="utf-8")).body
            names = []
            for node in nodes:
                if isinstance(node, ast.Import):
                    names += [alias.name.split(".")[0] for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.module:
                    names.append(node.module.split(".")[0])
            ours = [k for k, name in enumerate(names) if name in OURS]
            theirs = [k for k, name in enumerate(names) if name in LOADS_TORCH]
            assert not ours or not theirs or max(ours) < min(theirs), path
