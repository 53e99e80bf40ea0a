"""Several processes, as torchrun starts them, do what one does; and one that dies ends them all."""

import csv
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from in_processes import FLAGS

from common import checkpoint, cli
from lesson_09 import train_mnist
from lesson_09.unet import UNet

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this PyTorch has no gloo"
)


def start(folder: Path, task: str, *flags: str) -> subprocess.Popen:
    """torchrun, as its own process."""
    words = [sys.executable, "-m", "torch.distributed.run", *flags]
    words += [str(ROOT / "tests" / "in_processes.py"), str(folder), task]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC", "RANK"))}
    return subprocess.Popen(
        words, cwd=ROOT, env=clean, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def torchrun(folder: Path, task: str, *flags: str) -> str:
    folder.mkdir()
    process = start(folder, task, "--standalone", *flags)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    return said


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_gradients_are_those_of_one_process(tmp_path):
    torchrun(tmp_path / "a", "gradients", "--nproc-per-node", "4")
    for rank in range(4):
        cases = (tmp_path / "a" / f"gradients_{rank}").read_text().splitlines()
        assert len(cases) == 8
        for case in cases:
            error, largest = map(float, case.split(",")[3:])
            assert error < 1e-6 < 1e-2 < largest, case


def two_machines(folder: Path) -> Path:
    """A run of two processes that two torchruns start, as on two machines."""
    folder.mkdir()
    meet = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "a"]
    meet += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--local-addr", "127.0.0.1"]
    both = [start(folder, "training", *meet) for _ in range(2)]
    for one in both:
        said = one.communicate(timeout=300)[0]
        assert one.returncode == 0, said
    return folder


def states(folder: Path) -> dict[str, list[str]]:
    """The sum of each process's state at the end of each life, then the files that it wrote."""
    return {
        path.name.removeprefix(f"{folder.name}_"): path.read_text().splitlines()
        for path in folder.parent.glob(f"{folder.name}_*")
    }


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "run" / "metrics.csv").open() as file:
        found = list(csv.DictReader(file))
    assert [row["step"] for row in found] == ["4", "8", "12"]
    return found


def test_a_training_in_two_processes(tmp_path):
    """It is the same in both, it is the one that a single process does, and only one writes. If a
    process is killed the other stops, and a restart makes the weights of an undisturbed run."""
    two = two_machines(tmp_path / "two")
    (sum_0, *written_0), (sum_1, *written_1) = (states(two)[f"{k}_0"] for k in (0, 1))
    assert sum_0 == sum_1  # model, average, optimiser, schedule, loss-aware sampler, random numbers
    assert any("checkpoint_000010" in name for name in written_0)
    assert not written_1

    one = tmp_path / "one"
    words = [*FLAGS, "--output_dir", str(one / "run")]
    cli.run(train_mnist.main, words, presets=True, network=UNet)
    for alone, many in zip(rows(one), rows(two), strict=True):
        for name in ("loss", "simple", "vlb", "grad_norm", "held_out_loss"):
            assert float(many[name]) == pytest.approx(float(alone[name]), rel=1e-4), alone["step"]
    file = "run/checkpoint_000012.pt"
    contents = [checkpoint.load(folder / file)["training"] for folder in (one, two)]
    assert torch.equal(contents[0]["rng"], contents[1]["rng"])  # no dropout here
    assert torch.equal(contents[0]["timesteps"]["seen"], contents[1]["timesteps"]["seen"])

    killed = tmp_path / "killed"
    said = torchrun(killed, "killed", "--nproc-per-node", "2", "--max-restarts", "1")
    moments = [float((killed / name).read_text()) for name in ("killed", "stopped")]
    assert moments[1] - moments[0] < 30
    assert "error: another process of this run has ended, so this one stops at step" in said
    assert "Going on from step 5" in said
    assert states(killed)["0_1"][0] == states(killed)["1_1"][0] == sum_0
    rows(killed)
