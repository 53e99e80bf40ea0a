"""Start torchrun from a test, and compare a run of several processes with a run of one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from common import checkpoint, cli
from lesson_09 import train_mnist
from lesson_09.unet import UNet

import pytest
from helpers import ROOT, metrics
from torchrun_worker import FLAGS


def start(folder: Path, task: str, *flags: str) -> subprocess.Popen:
    """torchrun, as its own process."""
    words = [sys.executable, "-m", "torch.distributed.run", *flags]
    words += [str(ROOT / "tests" / "torchrun_worker.py"), str(folder), task]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC", "RANK"))}
    return subprocess.Popen(
        words, cwd=ROOT, env=clean, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def torchrun(folder: Path, task: str, *flags: str) -> str:
    """Run a task of the worker to its end; returns its output."""
    folder.mkdir()
    process = start(folder, task, "--standalone", *flags)
    printed = process.communicate(timeout=1500)[0]
    assert process.returncode == 0, printed
    return printed


def two_machines(folder: Path) -> Path:
    """A run of two processes, each started by its own torchrun, as on two machines."""
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "a"]
    flags += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1"]
    for process in [start(folder, "training", *flags) for _ in range(2)]:
        printed = process.communicate(timeout=1500)[0]
        assert process.returncode == 0, printed
    return folder


def check_gradients(folder: Path, world_size: int) -> float:
    """The largest difference between the gradients of several processes and those of one."""
    worst = 0.0
    for rank in range(world_size):
        cases = (folder / f"gradients_{rank}").read_text().splitlines()
        assert len(cases) == 8  # four networks, whole and in microbatches
        for case in cases:
            error, largest = map(float, case.split(",")[2:])
            assert error < 1e-6 < 1e-2 < largest, case
            worst = max(worst, error)
    return worst


def state_and_files(folder: Path, name: str, rank: int, life: int = 0) -> tuple[str, list[str]]:
    """The checksum of a process's state at the end of its training, and the files that it wrote.
    life counts the restarts before."""
    digest, *written = (folder / f"{name}_{rank}_{life}").read_text().splitlines()
    return digest, written


def check_equal_to_one_process(run: Path, alone: Path) -> None:
    words = [*FLAGS, "--output_dir", str(alone)]
    cli.run(train_mnist.main, words, presets=True, network=UNet)
    assert [row["step"] for row in metrics(run)] == ["4", "8", "12"]
    for one, many in zip(metrics(alone), metrics(run), strict=True):
        for name in ("loss", "simple", "vlb", "grad_norm", "held_out_loss"):
            assert float(many[name]) == pytest.approx(float(one[name]), rel=1e-4), one["step"]
    file = "checkpoint_000012.safetensors"
    one, many = (checkpoint.load(folder / file).tensors for folder in (alone, run))
    for name in ("rng.cpu", "timesteps.seen"):  # there is no dropout here
        assert (one[name] == many[name]).all(), name
