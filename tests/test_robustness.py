"""Runs that survive: kills, disks, numbers that are not finite, short memory, files from strangers.

The long forms are in stress.py.
"""

import csv
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import strangers
import stress
import torch
from conftest import ROOT, Server
from conftest import train as train_any
from strangers import GOOD_CHECKPOINT, YAMLS, as_file, good_content, pickles
from test_common import fails
from torch import nn

from common import checkpoint, cli, download, folder, processes
from common.ema import Ema
from common.errors import UserError
from common.run import Run, RunOptions
from lesson_05 import sample_mnist, train_mnist
from lesson_05.ddpm import DDPM
from lesson_05.unet import UNet
from lesson_09.iddpm import ImprovedDDPM, cosine_beta

SMALL = {k: v for k, v in strangers.NETWORK.items() if "image" not in k}  # and no dropout


def train(place: Path, **changes: object) -> Path:
    return train_any(place, **{"network": SMALL, "num_samples": 0, **changes})


# Kills


class Killed(BaseException):
    """No handler of exceptions may see a kill; this comes closest to it."""


@pytest.mark.parametrize("moment", range(4))
def test_a_save_that_is_cut_off_anywhere_leaves_a_whole_checkpoint(tmp_path, monkeypatch, moment):
    """Killed before the file is flushed, before it has its name, and before the old one goes."""
    path = tmp_path / "checkpoint_000001.pt"
    checkpoint.save(path, good_content())
    calls = iter(range(9))

    def killing(function: Callable) -> Callable:
        def called(*arguments: object) -> object:
            if next(calls) == moment:
                raise Killed
            return function(*arguments)

        return called

    monkeypatch.setattr(os, "fsync", killing(os.fsync))
    monkeypatch.setattr(os, "replace", killing(os.replace))
    ended = False
    try:
        checkpoint.save(path, {**good_content(), "step": 4})
        ended = True
    except Killed:
        pass
    monkeypatch.undo()
    assert ended == (moment == 3)  # two flushes and a new name
    assert checkpoint.load(path)["step"] == (3 if moment < 2 else 4)
    lock = folder.open_folder(tmp_path, fresh=False)
    assert not list(tmp_path.glob(".*.part"))
    lock.release()


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


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for name in ("999999", "1000000", "000004", "best", "12x"):
        (tmp_path / f"checkpoint_{name}.pt").touch()
    names = [path.stem.partition("_")[2] for path in folder.saved(tmp_path)]
    assert names == ["000004", "999999", "1000000"]


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


def test_a_row_that_was_cut_off_is_dropped(tmp_path):
    log = tmp_path / "metrics.csv"
    for text, left in [
        ("step,loss\n5,0.1\n10,0.25\n", "step,loss\n5,0.1\n10,0.25\n"),
        ("step,loss\n5,0.1\n10,0.2", "step,loss\n5,0.1\n"),
        ("step,loss\n5,0.1\n1", "step,loss\n5,0.1\n"),
        ("step,loss\n5,0.1\n15,0.3\n", "step,loss\n5,0.1\n"),
        ("step,loss\n5,0.1\n\0\0\0\0\n", "step,loss\n5,0.1\n"),
        ("step,lo", ""),
        ("", ""),
    ]:
        log.write_text(text)
        folder.keep_rows(log, 10)
        assert log.read_text() == left


def test_two_runs_in_one_folder(tmp_path, capsys):
    """The second is refused, also by another process; a run that is gone holds nothing."""
    held = folder.open_folder(tmp_path / "run", fresh=True)
    words = ["--config", "configs/laptop.yaml", "--dataset", "digits", "--device", "cpu"]
    words += ["--output_dir", tmp_path / "run"]
    line = fails(capsys, train_mnist.main, *words, presets=True, network=UNet)
    assert "another run is writing into" in line
    held.release()
    code = "import sys, pathlib, os, signal; from common import folder\n"
    code += "held = folder.open_folder(pathlib.Path(sys.argv[1]), False)\n"
    code += "print('held', flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="another run is writing into"):
        folder.open_folder(tmp_path / "run", fresh=True)
    other.kill()
    other.wait()
    folder.open_folder(tmp_path / "run", fresh=True).release()


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


def test_what_is_changed_below_is_valid_before(tmp_path):
    (tmp_path / "file").write_bytes(GOOD_CHECKPOINT)
    assert strangers.read_checkpoint(tmp_path / "file") is None
    assert strangers.read_resumed(tmp_path / "file") is None
    (tmp_path / "file").write_bytes(strangers.PRESET)
    assert strangers.read_preset(tmp_path / "file") is None
    (tmp_path / "file").write_bytes(strangers.GOOD_PNG)
    assert strangers.read_png(tmp_path / "file") is None
    assert strangers.read_idx(strangers.write_idx(tmp_path, strangers.IDX)) is None


@pytest.mark.parametrize("kind", ["checkpoints", "resumed", "IDX", "YAML", "PNG"])
def test_files_from_strangers(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = stress.answers(*stress.kinds(tmp_path)[kind], count=40, seed=0)
    assert len(lines) >= 40
    assert any(lines)
    assert not (tmp_path / "evil-was-here").exists()


def with_pickle(path: Path, body: bytes) -> Path:
    path.write_bytes(GOOD_CHECKPOINT)
    with zipfile.ZipFile(path) as source:
        entries = [(name, source.read(name)) for name in source.namelist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, old in entries:
            archive.writestr(name, body if name.endswith("data.pkl") else old)
    return path


@pytest.mark.parametrize("name", sorted(pickles()))
def test_instructions_that_no_checkpoint_has(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = strangers.read_checkpoint(with_pickle(tmp_path / "file.pt", pickles()[name]))
    assert line is not None
    if name in ("system", "eval", "system 4", "bytearray", "load", "tensor"):
        assert "could run code and was not loaded" in line
    assert not (tmp_path / "evil-was-here").exists()


CLAIMS = {
    "channels": ("network", "channels", 20_000, "larger network"),
    "blocks": ("network", "num_blocks", 10**9, "larger network"),
    "levels": ("network", "multipliers", [1] * 10**5, "is damaged"),
    "groups": ("network", "num_groups", 0, "is damaged"),
    "times": (None, "num_timesteps", 10**11, "num_timesteps is"),
    "pixels": ("network", "image_size", 10**9, "image_size is"),
    "nothing": (None, "network", None, "do not fit"),
    "letters": ("network", "attention_resolutions", "x" * 10**5, "is damaged"),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_a_config_that_claims_what_memory_cannot_hold(name, tmp_path):
    group, key, value, said = CLAIMS[name]
    content = good_content()
    (content["config"][group] if group else content["config"])[key] = value
    (tmp_path / "file.pt").write_bytes(as_file(content))
    before = stress.peak_memory()
    assert said in strangers.read_checkpoint(tmp_path / "file.pt")
    assert stress.peak_memory() - before < 500


def test_a_turned_bit_in_the_weights_is_found(tmp_path):
    body = bytearray(GOOD_CHECKPOINT)
    weight = good_content()["ema"]["module.conv_in.weight"].numpy().tobytes()
    body[body.index(weight) + 7] ^= 4
    (tmp_path / "file.pt").write_bytes(body)
    assert "the sum of" in strangers.read_checkpoint(tmp_path / "file.pt")


def test_tensors_that_claim_more_than_the_file_holds(tmp_path):
    content = good_content()
    content["ema"]["module.conv_in.weight"] = torch.zeros(1).expand(10**6, 10**6)
    (tmp_path / "file.pt").write_bytes(as_file(content))
    assert "claim more than it holds" in strangers.read_checkpoint(tmp_path / "file.pt")


@pytest.mark.parametrize("number", range(len(YAMLS)))
def test_presets_that_are_none(number, tmp_path):
    (tmp_path / "file.yaml").write_bytes(YAMLS[number])
    line = strangers.read_preset(tmp_path / "file.yaml")
    assert line is not None or YAMLS[number] == b""


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_files_without_end(tmp_path):
    raw = strangers.write_idx(tmp_path, strangers.IDX) / "MNIST" / "raw"
    (raw / "t10k-labels-idx1-ubyte").unlink()
    for name in ("pipe", "zero"):
        path = tmp_path / name
        os.mkfifo(path) if name == "pipe" else path.symlink_to("/dev/zero")
        assert strangers.read_checkpoint(path) is not None
        assert strangers.read_png(path) is not None
        assert strangers.read_preset(path) is not None
        (raw / "t10k-labels-idx1-ubyte").symlink_to(path)
        assert "cannot be read" in strangers.read_idx(tmp_path)
        (raw / "t10k-labels-idx1-ubyte").unlink()


# Old files


def test_the_first_format_still_loads_and_goes_on(tmp_path):
    old = ROOT / "tests" / "checkpoint_format_1.pt"
    assert old.stat().st_size < 400_000
    _, model, content = sample_mnist.load(old)
    assert content["format"] == 1
    assert all(p.isfinite().all() for p in model.parameters())
    words = ["--resume", str(old), "--num_training_steps", str(content["step"] + 1)]
    words += ["--output_dir", str(tmp_path), "--num_samples", "0", "--device", "cpu"]
    cli.run(train_mnist.main, words, presets=True, network=UNet)
    assert checkpoint.load(folder.saved(tmp_path)[-1])["step"] == content["step"] + 1


def test_a_newer_format_is_refused_by_its_number(tmp_path):
    (tmp_path / "file.pt").write_bytes(as_file({**good_content(), "format": 2}))
    line = strangers.read_checkpoint(tmp_path / "file.pt")
    assert "has format 2, but this version reads 1: update the repository" in line


# Downloads


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(checkpoint, "TIMEOUT", 0.5)
    return tmp_path / "cache" / "diffusion-lessons"


def test_a_download_that_is_too_large_or_too_slow(address, cache, monkeypatch):
    Server.files = {"model.pt": GOOD_CHECKPOINT}
    for name, value, said in [("MOST_BYTES", 100, "larger than"), ("MOST_SECONDS", 0, "longer")]:
        with monkeypatch.context() as patch:
            patch.setattr(download, name, value)
            with pytest.raises(UserError, match=said):
                checkpoint.load(f"{address}/model.pt")
        assert not list(cache.iterdir())


def test_a_download_with_another_sum_is_not_kept(address, cache):
    Server.files = {"model.pt": GOOD_CHECKPOINT}
    with pytest.raises(UserError, match="it has the sha256"):
        checkpoint.load(f"{address}/model.pt", sha256="0" * 64)
    assert not list(cache.iterdir())


def test_no_name_from_an_address_becomes_a_path(address, cache):
    Server.files = {"..%2f..%2fevil.pt": GOOD_CHECKPOINT, "evil.pt?x=": GOOD_CHECKPOINT}
    for name in Server.files:
        assert checkpoint.load(f"{address}/a/../../{name}")["step"] == 3
    assert all(path.parent == cache and path.suffix == ".pt" for path in cache.iterdir())


def test_certificates_are_checked(cache):
    """A server with a certificate that nobody vouches for gets no request."""
    import ssl

    assert ssl.create_default_context().verify_mode == ssl.CERT_REQUIRED
    text = "".join(path.read_text() for path in ROOT.glob("common/*.py"))
    assert "_unverified" not in text
    assert "CERT_NONE" not in text


def test_starting_processes_needs_no_fork():
    for path in [*ROOT.glob("common/*.py"), *ROOT.glob("lesson_*/**/*.py")]:
        assert "os.fork" not in path.read_text(), path
        assert "multiprocessing" not in path.read_text(), path
