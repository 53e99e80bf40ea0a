"""Runs that survive: kills, disks, numbers that are not finite, short memory, files from strangers.

The long forms are in stress.py.
"""

import csv
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import strangers
import stress
import torch
from common.run import Run, RunOptions
from conftest import ROOT
from conftest import train as train_any
from torch import nn

from common import checkpoint, folder, processes
from common.ema import Ema
from common.errors import UserError
from lesson_05 import train_mnist
from lesson_05.ddpm import DDPM
from lesson_05.unet import UNet
from lesson_09.iddpm import ImprovedDDPM, cosine_beta

SMALL = {k: v for k, v in strangers.NETWORK.items() if "image" not in k}  # and no dropout


def train(place: Path, **changes: object) -> Path:
    return train_any(place, **{"network": SMALL, "num_samples": 0, **changes})


# Kills


def test_runs_that_are_killed_end_as_if_they_had_not_been(tmp_path):
    result = stress.kills(2, tmp_path, seed=1, steps=8)
    assert result["kills"] >= 2


def test_a_second_ctrl_c_while_it_saves_does_no_harm(tmp_path, monkeypatch):
    fsync = os.fsync

    def interrupted(file: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        fsync(file)

    steps = iter(range(1, 9))
    record = Run.record

    def record_and_interrupt(self: Run, *arguments: object, **figures: object) -> bool:
        if next(steps) == 2:
            os.kill(os.getpid(), signal.SIGINT)
            monkeypatch.setattr(os, "fsync", interrupted)
        return record(self, *arguments, **figures)

    monkeypatch.setattr(Run, "record", record_and_interrupt)
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path)
    assert stopped.value.code == 130
    assert checkpoint.load(tmp_path / "checkpoint_000002.pt")["step"] == 2


def toy(place: Path, steps: int = 8, kill: tuple[int, int] = (0, 0), **options: object) -> list:
    """A run of milliseconds; returns the numbers drawn while it looks. kill: step, signal."""
    seen = []
    settings = RunOptions(str(place), device="cpu", precision="float32", log_every=3, **options)
    with Run(settings, place, "toy") as run:
        model = nn.Linear(2, 1)
        ema, optimizer = Ema(model, 0.9), torch.optim.Adam(model.parameters())
        run.track({"batch_size": 4}, "none", model=model, ema=ema, optimizer=optimizer)
        for step in run.steps(steps):
            x = torch.randn(4, 2)
            losses = (model(x)[:, 0] - x.sum(1)) ** 2
            losses.mean().backward()
            if run.record(losses, torch.ones(4, dtype=torch.int64), 4, drawn=x.mean()):
                optimizer.step()
                ema.update_parameters(model)
            optimizer.zero_grad()
            if run.due("log"):
                with run.looking():
                    seen.append(float(torch.rand(())))
                    run.log(4, held_out=ema(torch.randn(4, 2)).mean())
            if step == kill[0]:
                os.kill(os.getpid(), kill[1])
    return seen


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_then_resume_is_one_run(tmp_path, number):
    """Weights, average, random numbers and rows of the log, of which later ones are dropped."""
    toy(tmp_path / "whole")
    parts = tmp_path / "parts"
    with pytest.raises(SystemExit) as stopped:
        toy(parts, kill=(6, number), checkpoint_every=2)
    assert stopped.value.code == 128 + number
    assert [path.stem[-1] for path in folder.saved(parts)] == ["4", "6"]
    early = str(parts / "checkpoint_000004.pt")
    with pytest.raises(UserError, match=r"holds later checkpoints \(checkpoint_000006\.pt\)"):
        toy(parts, resume=early)
    (parts / "checkpoint_000006.pt").unlink()
    toy(parts, resume=early)  # the row of step 6 is there already
    name = "checkpoint_000008.pt"
    one, other = (checkpoint.load(place / name) for place in (tmp_path / "whole", parts))
    assert stress.same(one["ema"], other["ema"])
    assert stress.same(one["training"], other["training"])
    assert stress.rows(parts) == stress.rows(tmp_path / "whole")


def test_images_per_second_are_those_of_the_steps_alone(tmp_path, monkeypatch):
    """Looks, before a row and around it, are not counted; the clock is one of the test's own."""
    now = [100.0]
    monkeypatch.setattr("common.run.time", SimpleNamespace(perf_counter=lambda: now[0]))
    model = nn.Linear(2, 2)
    with Run(RunOptions(str(tmp_path), device="cpu"), tmp_path, "toy") as run:
        run.track({}, "toy", model=model, ema=Ema(model, 0.9))
        for step in run.steps(4):
            now[0] += 0.5
            run.record(torch.rand(4), torch.ones(4, dtype=torch.int64), 8)
            if step % 2 == 0:
                with run.looking():
                    now[0] += 3
                    run.log(4)
                with run.looking():
                    now[0] += 3
    with (tmp_path / "metrics.csv").open() as file:
        speeds = [float(row["images_per_second"]) for row in csv.DictReader(file)]
    assert speeds == [8, 8]  # 8 images in a second


def test_a_compiler_that_is_missing_is_one_line(tmp_path):
    missing = type("InductorError", (RuntimeError,), {"__module__": "torch._inductor.exc"})
    options = RunOptions(str(tmp_path), device="cpu", compile=True)
    with (
        pytest.raises(UserError, match=r"--compile true does not work here \(no C\+\+ compiler\)"),
        Run(options, tmp_path, "toy"),
    ):
        raise missing("no C++ compiler")


def test_looking_draws_the_same_numbers_each_time_and_none_of_the_runs(tmp_path):
    seen = toy(tmp_path / "often")
    assert len(seen) == 3
    assert len(set(seen)) == 1
    before = torch.get_rng_state()
    with Run(RunOptions(str(tmp_path / "one"), device="cpu"), tmp_path, "toy") as run:
        torch.set_rng_state(before)
        with run.looking():
            torch.randn(9)
    assert torch.equal(torch.get_rng_state(), before)


# Disks


def stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: Callable[[Path], None]) -> str:
    """What a run says that is harmed after its second step; its first checkpoint is whole."""
    record, steps = Run.record, iter(range(1, 99))

    def record_and_harm(self: Run, *arguments: object, **figures: object) -> bool:
        if next(steps) == 2:
            harm(self.folder)
        return record(self, *arguments, **figures)

    monkeypatch.setattr(Run, "record", record_and_harm)
    with pytest.raises(UserError) as stopped:
        train(tmp_path / "run", checkpoint_every=1, preview_every=100)
    return str(stopped.value)


def test_a_quota_in_the_middle_of_a_save(tmp_path, monkeypatch):
    resource = pytest.importorskip("resource", reason="no quotas here")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        line = stops(
            tmp_path,
            monkeypatch,
            lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1])),
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert "checkpoint_000002.pt could not be written (File too large)" in line
    assert checkpoint.load(tmp_path / "run" / "checkpoint_000001.pt")["step"] == 1
    assert not list((tmp_path / "run").glob(".*.part"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_under_the_log(tmp_path, monkeypatch):
    def fill(place: Path) -> None:
        (place / "metrics.csv").symlink_to("/dev/full")

    line = stops(tmp_path, monkeypatch, fill)
    assert "No space left on device" in line
    assert "the last good checkpoint is" in line


def test_a_folder_that_goes_away(tmp_path, monkeypatch):
    line = stops(tmp_path, monkeypatch, lambda place: place.rename(place.with_name("moved")))
    assert "could not be written (No such file or directory)" in line
    assert checkpoint.load(tmp_path / "moved" / "checkpoint_000001.pt")["step"] == 1


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere"
)
def test_a_folder_that_becomes_read_only(tmp_path, monkeypatch):
    line = stops(tmp_path, monkeypatch, lambda place: place.chmod(0o500))
    (tmp_path / "run").chmod(0o700)
    assert "could not be written (Permission denied)" in line


# Numbers


def harm_losses(monkeypatch: pytest.MonkeyPatch, bad: set[int], gradient: bool = False) -> None:
    """Make these calls of the loss not finite, or only their gradients."""
    loss, calls = DDPM.loss, iter(range(1, 99))

    def failing(self, model, x0, t, eps):
        losses = loss(self, model, x0, t, eps)
        if not isinstance(model, UNet) or next(calls) not in bad:
            return losses
        if gradient:
            losses.register_hook(lambda grad: grad * float("inf"))
            return losses
        return losses.where(torch.arange(len(losses)) != 1, float("nan"))

    monkeypatch.setattr(DDPM, "loss", failing)


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    harm_losses(monkeypatch, {3}, gradient=True)
    with pytest.raises(
        UserError,
        match=r"grad_norm became (nan|inf) at step 3, the largest loss being at t in quarter "
        r"[1-4] of 4; the last good checkpoint is .*checkpoint_000002\.pt\. Try a lower",
    ):
        train(tmp_path, checkpoint_every=1)


def test_the_quarter_of_t_is_that_of_the_bad_loss(tmp_path, monkeypatch):
    harm_losses(monkeypatch, {1})
    times = torch.tensor([1, 46, 1, 1, 1, 1, 1, 1])  # of 60
    monkeypatch.setattr(train_mnist.torch, "randint", lambda *_, **__: times)
    with pytest.raises(UserError, match=r"step 1, at t in quarter 4 of 4; no checkpoint was saved"):
        train(tmp_path)


@pytest.mark.parametrize("gradient", [False, True])
def test_some_bad_steps_may_be_left_out(tmp_path, monkeypatch, capsys, gradient):
    harm_losses(monkeypatch, {2, 4}, gradient)
    before, updates = [], train_mnist.Ema.update_parameters

    def counted(self: nn.Module, model: nn.Module) -> None:
        before.append(model)
        updates(self, model)

    monkeypatch.setattr(train_mnist.Ema, "update_parameters", counted)
    train(tmp_path / "a", num_training_steps=4, max_bad_steps=2)
    assert "at step 4" in (said := capsys.readouterr().out)
    assert "step left out, 2 of 2 that may be" in said
    assert len(before) == 2
    content = checkpoint.load(tmp_path / "a" / "checkpoint_000004.pt")
    assert all(value.isfinite().all() for value in content["ema"].values())
    assert content["training"]["optimizer"]["state"][0]["step"] == 2
    assert content["training"]["bad_steps"] == 2
    monkeypatch.undo()
    harm_losses(monkeypatch, {1})
    with pytest.raises(UserError, match="became"):  # the two are not forgotten
        train(tmp_path / "a", num_training_steps=5, max_bad_steps=2, resume="latest")


def test_the_bound_of_a_learned_variance_is_float32_under_bfloat16():
    process = ImprovedDDPM(cosine_beta(100), "learned")
    x0, eps = torch.rand(4, 1, 8, 8) * 2 - 1, torch.randn(4, 1, 8, 8)
    t, layer = torch.tensor([1, 2, 50, 100]), nn.Conv2d(1, 2, 1)

    def network(xt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return 40 * layer(xt).float()  # far outside [-1, 1]: a variance that explodes

    with torch.autocast("cpu", torch.bfloat16):
        simple, vlb = process.loss_terms(network, x0, t, eps)
        out = network(process.q_sample(x0, t, eps), t)
    assert simple.dtype == vlb.dtype == torch.float32
    assert not torch.equal(out, out.bfloat16().float())  # 40 times it is not on bfloat16's grid
    with torch.autocast("cpu", enabled=False):
        again = process.loss_terms(lambda xt, t: out, x0, t, eps)
    assert torch.equal(again[0], simple)
    assert torch.equal(again[1], vlb)


# Memory


@pytest.mark.parametrize("parts", [2, 3, 8, 20])
def test_parts_of_a_batch_have_the_gradients_of_the_whole(parts):
    model = UNet(**strangers.NETWORK)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    process = DDPM(torch.linspace(1e-3, 0.2, 20, dtype=torch.float64))
    x0, eps = torch.randn(2, 8, 1, 28, 28)
    t = torch.randint(1, 21, (8,))
    gradients = []
    for called in (model, processes.InParts(model, parts)):
        model.zero_grad()
        process.loss(called, x0, t, eps).mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (gradients[0] - gradients[1]).abs().max() < 1e-6 < gradients[0].abs().max()


def test_parts_hold_less_memory():
    """What a network keeps for the way back: with parts, little beside the parts' input."""
    model, kept = nn.Sequential(*[nn.Conv2d(1, 1, 3, padding=1) for _ in range(9)]), []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel() * (tensor.ndim == 4))
        return tensor

    sizes = []
    for called in (model, processes.InParts(model, 4)):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            called(torch.randn(8, 1, 28, 28))
        sizes.append(sum(kept))
    assert sizes[1] < sizes[0] / 4


def test_accumulate_trains_the_same(tmp_path):
    runs = [train(tmp_path / str(n), accumulate=n) for n in (1, 3)]
    one, other = (list(csv.DictReader((run / "metrics.csv").open())) for run in runs)
    for name in ("loss", "grad_norm", "held_out_loss"):
        assert float(one[-1][name]) == pytest.approx(float(other[-1][name]), rel=1e-3)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_short_memory_is_one_line_with_what_to_try(tmp_path, monkeypatch, error):
    def failing(*_: object) -> None:
        raise error

    monkeypatch.setattr(DDPM, "loss", failing)
    with pytest.raises(UserError, match=r"out of memory at step 1: try --batch_size 4, or --accum"):
        train(tmp_path)


# Files


# Old files


# Downloads


def test_starting_processes_needs_no_fork():
    for path in [*ROOT.glob("common/*.py"), *ROOT.glob("lesson_*/**/*.py")]:
        assert "os.fork" not in path.read_text(), path
        assert "multiprocessing" not in path.read_text(), path
