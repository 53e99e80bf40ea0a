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

from common import checkpoint, cli, processes
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
    said = process.communicate(timeout=1500)[0]
    assert process.returncode == 0, said
    return said


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def two_machines(folder: Path) -> Path:
    """A run of two processes that two torchruns start, as on two machines."""
    folder.mkdir()
    meet = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "a"]
    meet += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--local-addr", "127.0.0.1"]
    both = [start(folder, "training", *meet) for _ in range(2)]
    for one in both:
        said = one.communicate(timeout=1500)[0]
        assert one.returncode == 0, said
    return folder


def check_gradients(folder: Path, count: int) -> float:
    """The largest difference between the gradients of `count` processes and those of one."""
    worst = 0.0
    for rank in range(count):
        cases = (folder / f"gradients_{rank}").read_text().splitlines()
        assert len(cases) == 8  # four networks, batches that are and are not a multiple
        for case in cases:
            error, largest = map(float, case.split(",")[3:])
            assert error < 1e-7 < 1e-2 < largest, case
            worst = max(worst, error)
    return worst


def state(folder: Path, name: str, rank: int, life: int = 0) -> tuple[str, list[str]]:
    """The sum of a process's state at the end of a life, and the files that it wrote."""
    first, *written = (folder / f"{name}_{rank}_{life}").read_text().splitlines()
    return first, written


def rows(place: Path) -> list[dict[str, str]]:
    with (place / "metrics.csv").open() as file:
        found = list(csv.DictReader(file))
    assert [row["step"] for row in found] == ["4", "8", "12"]
    return found


def check_equal_to_one_process(place: Path, alone: Path) -> None:
    words = [*FLAGS, "--output_dir", str(alone)]
    cli.run(train_mnist.main, words, presets=True, network=UNet)
    for one, many in zip(rows(alone), rows(place), strict=True):
        for name in ("loss", "simple", "vlb", "grad_norm", "held_out_loss"):
            assert float(many[name]) == pytest.approx(float(one[name]), rel=1e-4), one["step"]
    file = "checkpoint_000012.pt"
    contents = [checkpoint.load(folder / file)["training"] for folder in (alone, place)]
    assert torch.equal(contents[0]["rng"], contents[1]["rng"])  # no dropout here
    assert torch.equal(contents[0]["timesteps"]["seen"], contents[1]["timesteps"]["seen"])


def test_two_processes_do_what_one_does_and_survive_a_kill(tmp_path):
    """Their gradients and their training are those of one; both hold the same, and only one writes.

    If one is killed the other stops with a line, and the restart makes the weights, bit for bit, of
    a run that was not disturbed. All in one test, as processes are slow to start.
    """
    folder = tmp_path / "two"
    said = torchrun(folder, "all", "--nproc-per-node", "2", "--max-restarts", "1")
    check_gradients(folder, 2)
    check_equal_to_one_process(folder / "undisturbed", tmp_path / "one")

    sum_0, written_0 = state(folder, "undisturbed", 0, life=1)
    sum_1, written_1 = state(folder, "undisturbed", 1, life=1)
    assert sum_0 == sum_1  # model, average, optimiser, schedule, loss-aware sampler, random numbers
    assert any("checkpoint_000010" in name for name in written_0)
    assert not written_1

    killed, stopped = (float((folder / name).read_text()) for name in ("killed", "stopped"))
    assert stopped - killed < 30
    assert "error: another process of this run has ended, so this one stops at step" in said
    assert "Going on from step 5" in said
    assert state(folder, "run", 0, life=1)[0] == state(folder, "run", 1, life=1)[0] == sum_0
    assert without_speed(folder / "run") == without_speed(folder / "undisturbed")


def test_a_restart_goes_on_with_nothing_but_its_own_run(tmp_path, monkeypatch):
    """The first life has refused a folder that holds a run; so must the second."""
    for name, value in {"RANK": "0", "TORCHELASTIC_RUN_ID": "none"}.items():
        monkeypatch.setenv(name, value)
    assert not processes.restarted(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not processes.restarted(tmp_path)
    processes.sign(tmp_path)
    assert processes.restarted(tmp_path)
    monkeypatch.setattr(processes.os, "getppid", lambda: 1)  # another torchrun's, some other day
    assert not processes.restarted(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "monday")
    assert not processes.restarted(tmp_path)
    processes.sign(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert processes.restarted(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "tuesday")
    assert not processes.restarted(tmp_path)


def without_speed(place: Path) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows(place)]
