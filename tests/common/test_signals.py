"""Ctrl-C, SIGTERM and SIGHUP, from the start of a script to its end."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from benchmarks.quality import classifier, evaluate
from common import checkpoint, cli
from common.checkpoint import saved
from common.options import TrainingOptions
from common.stopping import stoppable
from common.training import Run
from lesson_02 import swiss_roll
from lesson_05 import sample_mnist, train_mnist
from lesson_05.unet import UNet
from lesson_09 import ablation

import pytest
import torch
from helpers import ROOT, metrics, same
from server import Server
from torchvision import datasets
from toy import toy_run

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="POSIX signals")
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP] if hasattr(signal, "SIGHUP") else []


def kill(number: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)
    time.sleep(5)  # the signal ends it


def assert_stops(call: Callable[[], Any], number: int = signal.SIGINT, after: float = 0) -> None:
    """call() gets a signal after so many seconds, if any, and ends within two."""
    timer = threading.Timer(after, os.kill, (os.getpid(), number))
    if after:
        timer.start()
    start = time.monotonic()
    with pytest.raises(SystemExit) as end:
        call()
    assert end.value.code == 128 + number
    assert after + 2 > time.monotonic() - start >= after - 0.1  # a timer may be a little early


@pytest.mark.parametrize("number", SIGNALS)
def test_a_preview_is_stopped_at_once_and_its_step_is_saved(tmp_path, capsys, number):
    def preview(run: Run) -> None:
        if run.step == 6:
            with run.evaluating():
                torch.randn(3)  # of the preview, not of the training
                kill(number)

    parts, whole = tmp_path / "parts", tmp_path / "whole"
    assert_stops(lambda: toy_run(parts, on_log=preview, log_every=2), number)
    printed = capsys.readouterr().out
    assert f"Stopped after step 6; saved {parts}/checkpoint_000006.safetensors" in printed
    assert f"To resume: the same command with --resume --output_dir {parts}" in printed
    toy_run(parts, resume="latest", log_every=2)
    toy_run(whole, log_every=2)
    one, other = (checkpoint.load(saved(folder)[-1]) for folder in (whole, parts))
    assert same(one.tensors, other.tensors)
    assert [row["step"] for row in metrics(parts)] == ["2", "4", "8"]  # 8 has the means since 4


def test_samples_at_the_end_are_stopped_at_once(tmp_path, capsys):
    """The last step was saved before."""
    toy_run(tmp_path)
    written = saved(tmp_path)[-1].stat().st_mtime_ns
    options = TrainingOptions(output_dir=str(tmp_path), resume="latest", num_training_steps=8)

    def finish() -> None:
        with Run("toy", options) as run, run.evaluating():
            kill()

    assert_stops(finish)
    assert "Stopped after step 8; saved" in capsys.readouterr().out
    assert saved(tmp_path)[-1].stat().st_mtime_ns == written


def test_the_first_step_is_stopped_at_once(tmp_path, capsys):
    """It may take minutes, with --compile true."""
    assert_stops(lambda: toy_run(tmp_path, on_step=lambda step: kill()))
    assert "before the first checkpoint: the same command starts again" in capsys.readouterr().out
    assert not saved(tmp_path)


def test_a_download_is_stopped_at_once(tmp_path, address, monkeypatch, capsys):
    monkeypatch.setattr(datasets.MNIST, "mirrors", [f"{address}/hangs/"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    words = ["--dataset", "mnist", "--data_dir", str(tmp_path), "--output_dir", str(tmp_path)]

    def train() -> None:
        cli.run(train_mnist.main, words, presets=True, network=UNet)

    assert_stops(train, after=0.5)
    assert "before the first checkpoint: the same command starts again" in capsys.readouterr().out
    words = ["--model_checkpoint", f"{address}/hangs", "--output_dir", str(tmp_path)]
    assert_stops(lambda: cli.run(sample_mnist.main, words), after=0.5)
    assert capsys.readouterr().err.endswith("stopped: the same command starts again\n")
    Server.released.set()


SCRIPTS = {
    "sampling": (sample_mnist, ["--num_samples", "10000"], "starts again"),
    "swiss roll": (swiss_roll, [], "starts again"),
    "classifier": (classifier, [], "starts again"),
    "evaluation": (evaluate, ["--model_checkpoint", sample_mnist.SHIPPED], "goes on from here"),
    "ablation": (ablation, ["--num_classifier_steps", "100000"], "goes on from here"),
}


@pytest.mark.usefixtures("real_mnist")
@pytest.mark.parametrize("name", SCRIPTS)
def test_other_scripts_say_how_to_go_on(name, tmp_path, capsys):
    script, words, how = SCRIPTS[name]
    words = [*words, "--output_dir", str(tmp_path), "--device", "cpu"]
    assert_stops(lambda: cli.run(script.main, words, resumes="goes" in how), after=1)
    assert capsys.readouterr().err.endswith(f"stopped: the same command {how}\n")


@pytest.mark.parametrize("first", SIGNALS)
def test_a_second_ctrl_c_ends_it_at_once(first):
    code = "import time; from common.stopping import stoppable\n"
    code += "with stoppable(lambda number: False):\n    print('ready', flush=True)\n"
    code += "    while True: time.sleep(0.05)"  # the first signal waits for the end of a step
    words = [sys.executable, "-c", code]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for number in (first, signal.SIGTERM):  # torchrun sends SIGTERM more than once
        process.send_signal(number)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(2) == -signal.SIGINT


def test_an_ignored_signal_stays_ignored():
    """nohup ignores SIGHUP, and a shell Ctrl-C for what it runs in the background."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ctrl_c_while_torch_is_imported_is_one_line(tmp_path):
    """A torch whose import is interrupted stands in for the seconds that the real one takes."""
    (tmp_path / "torch.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    script = str(ROOT / "lesson_05" / "train_mnist.py")
    stopped = subprocess.run([sys.executable, script], env=environment, capture_output=True)
    assert stopped.stderr == b"stopped: the same command starts again\n"
    assert stopped.returncode in (130, -signal.SIGINT)
