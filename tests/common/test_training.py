"""A training run: its files, its log, steps that are not finite, and little memory."""

import csv
import math
import re
import sys
from pathlib import Path

from common import checkpoint
from common.checkpoint import saved
from common.errors import UserError
from common.pictures import read_curves
from common.training import Run
from lesson_05 import train_mnist
from lesson_05.ddpm import DDPM
from lesson_05.options import DDPMOptions
from lesson_05.unet import UNet

import pytest
import torch
from helpers import NETWORK, ROOT, metrics, same, train
from PIL import Image
from torch import nn
from toy import toy_run

FAST = NETWORK | {"channels": 4, "num_groups": 2, "attention_resolutions": [], "dropout": 0.0}


def fast_train(folder: Path, **changes: object) -> Path:
    return train(folder, FAST, **{"num_samples": 0, **changes})


def test_a_run_writes_its_files(trained):
    names = {path.name for path in trained.iterdir()}
    pictures = {"samples.png", "reverse.png", "reverse.gif", "forward.png", "losses.png"}
    assert {"metrics.csv", "log.txt", "checkpoint_000004.safetensors"} <= names
    assert pictures | {"samples_000004.png"} <= names
    assert "digits" in (trained / "log.txt").read_text()
    assert checkpoint.load(trained / "checkpoint_000004.safetensors").dataset == "digits"
    header, row = (trained / "metrics.csv").read_text().splitlines()
    columns = ("loss", "loss_quarter_1", "loss_quarter_4", "held_out_loss", "grad_norm")
    for column in (*columns, "learning_rate", "images_per_second"):
        assert column in header.split(",")
    assert row.startswith("4,")
    with Image.open(trained / "reverse.gif") as gif:
        assert gif.n_frames > 30


def test_the_last_two_checkpoints_are_kept(tmp_path):
    fast_train(tmp_path, num_training_steps=5, checkpoint_every=1)
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert names == ["checkpoint_000004.safetensors", "checkpoint_000005.safetensors"]
    assert not list(tmp_path.glob(".*.part"))


@pytest.mark.parametrize(("keep", "number"), [(1, 2), (3, 3), ("all", 5)])
def test_more_or_fewer_checkpoints_are_kept(keep, number, tmp_path):
    fast_train(tmp_path, num_training_steps=5, checkpoint_every=1, keep_checkpoints=keep)
    assert len(list(tmp_path.glob("*.safetensors"))) == number


def test_without_a_terminal_each_row_is_a_line(tmp_path, capsys):
    """The same lines as in log.txt, and no carriage returns."""
    fast_train(tmp_path, log_every=2, batch_size=8)
    out, err = capsys.readouterr()
    assert "\r" not in out + err
    for text in (out, (tmp_path / "log.txt").read_text()):
        lines = [line for line in text.splitlines() if line.startswith("Step ")]
        assert len(lines) == 2
        pattern = r"Step 2 of 4: loss \d\.\d{4}, [\d,]+ images per second, 00:\d\d left"
        assert re.fullmatch(pattern, lines[0]), lines


def test_losses_are_plotted_at_each_preview(tmp_path, monkeypatch):
    plotted = []
    monkeypatch.setattr(train_mnist, "save_curves", lambda path, *_: plotted.append(path.name))
    fast_train(tmp_path, preview_every=2)
    assert plotted == ["losses.png"] * 2


def test_tensorboard_gets_the_rows_and_the_previews(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = fast_train(tmp_path, tensorboard=True, log_every=2, preview_every=4)
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("held_out_loss")] == [2, 4]
    losses = [float(row["loss"]) for row in metrics(folder)]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses, rel=1e-6)
    assert [event.step for event in events.Images("samples")] == [4]


def test_tensorboard_that_is_missing_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        fast_train(tmp_path, tensorboard=True)


def test_weights_that_are_known_to_be_good_are_kept(tmp_path, monkeypatch):
    """From step 3 on the loss is not finite, and every step is saved."""
    finite = math.isfinite

    def broken_from_3(value: float) -> bool:
        return finite(value) and step[0] < 3

    step = [0]
    monkeypatch.setattr(math, "isfinite", broken_from_3)

    def count(number: int) -> None:
        step[0] = number + 1

    toy_run(tmp_path, steps=7, on_step=count, checkpoint_every=1, max_bad_steps=9)
    numbers = [path.stem[-1] for path in saved(tmp_path)]
    assert numbers == ["1", "6", "7"]  # the loss at step 2 was that of the weights of step 1


def test_an_edited_log_does_not_end_a_run(tmp_path):
    def edit(run: Run) -> None:
        run.metrics.write_text("step,loss,held_out_loss\n1,oops,1\nx,1\n2\n")

    toy_run(tmp_path, on_log=edit)
    curves = read_curves(tmp_path / "metrics.csv", ["loss", "held_out_loss", "none"])
    assert curves["held_out_loss"][0][0] == 1
    assert "none" in curves
    assert read_curves(tmp_path / "missing.csv", ["loss"]) == {"loss": ([], [])}


def test_previews_do_not_change_the_training(tmp_path):
    often = train(tmp_path / "often", preview_every=1, log_every=1)
    never = train(tmp_path / "never", preview_every=100, log_every=100)
    name = "checkpoint_000004.safetensors"
    one, other = (checkpoint.load(folder / name).tensors for folder in (often, never))
    assert same(one, other)


def test_the_network_trains_with_dropout_and_the_average_samples_without(tmp_path, monkeypatch):
    modes: dict[str, set[bool]] = {}
    loss = DDPM.loss

    def watched(self, model, *rest):
        modes.setdefault(type(model).__name__, set()).add(model.training)
        return loss(self, model, *rest)

    monkeypatch.setattr(DDPM, "loss", watched)
    train(tmp_path, preview_every=1, log_every=1)
    assert modes == {"UNet": {True}, "Ema": {False}}


def test_epochs_override_steps(tmp_path):
    fast_train(tmp_path, num_epochs=1, batch_size=500)
    assert (tmp_path / "checkpoint_000003.safetensors").exists()


def test_the_learning_rate_rises_then_falls():
    options = DDPMOptions(
        learning_rate=1.0, num_warmup_steps=4, num_training_steps=10, decay_learning_rate=False
    )
    assert [options.learning_rate_at(step) for step in (1, 2, 4, 9)] == [0.25, 0.5, 1.0, 1.0]
    options.decay_learning_rate = True
    rates = [options.learning_rate_at(step) for step in range(1, 11)]
    assert rates[0] == 0.25
    assert rates[5:] == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1])


@pytest.mark.parametrize(
    ("folder", "script"),
    [(ROOT, "lesson_05/sample_mnist.py"), (ROOT / "lesson_05", "sample_mnist.py")],
)
def test_the_last_line_is_a_command_for_the_current_folder(
    folder, script, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(folder)
    fast_train(tmp_path / "a run's folder")
    last = capsys.readouterr().out.splitlines()[-1]
    assert f" {script} --model_checkpoint" in last
    assert "'\"'\"'" in last  # quoted for a shell
    assert Path(script).is_file()


def test_images_per_second_exclude_evaluation(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def step_takes_half_a_second(*_: object) -> None:
        now[0] += 0.5

    def evaluation_takes_three_seconds(run: Run) -> None:
        with run.evaluating():
            now[0] += 3

    toy_run(
        tmp_path,
        steps=4,
        log_every=2,
        on_step=step_takes_half_a_second,
        on_log=evaluation_takes_three_seconds,
    )
    with (tmp_path / "metrics.csv").open() as file:
        speeds = [float(row["images_per_second"]) for row in csv.DictReader(file)]
    assert speeds == [8, 8]  # batches of 4


def test_evaluation_draws_the_same_numbers_each_time_and_none_of_the_runs(tmp_path):
    drawn = []

    def evaluate(run: Run) -> None:
        state = torch.get_rng_state()
        with run.evaluating():
            drawn.append(float(torch.rand(())))
        assert torch.equal(torch.get_rng_state(), state)

    toy_run(tmp_path, steps=9, log_every=3, on_log=evaluate)
    assert len(drawn) == 3
    assert len(set(drawn)) == 1


def test_a_run_starts_with_the_weights_of_another(trained, tmp_path, capsys):
    file = str(trained / "checkpoint_000004.safetensors")
    changes = {"start_from": file, "learning_rate": 1e-12, "num_training_steps": 2}
    train(tmp_path / "run", seed=7, **changes)
    assert f"Weights of {file}, trained for 4 steps" in capsys.readouterr().out
    last = tmp_path / "run" / "checkpoint_000002.safetensors"
    initial, ended = checkpoint.load(file), checkpoint.load(last)
    for name in (name for name in initial.tensors if name.startswith("ema.")):
        for copy in (name, name.replace("ema.", "model.")):
            if copy in ended.tensors and name != "ema.n_averaged":
                torch.testing.assert_close(
                    ended.tensors[copy], initial.tensors[name], rtol=0, atol=1e-9
                )
    train(tmp_path / "run", seed=7, **changes | {"num_training_steps": 3, "resume": str(last)})
    printed = capsys.readouterr().out
    assert "Resumed after step 2" in printed
    assert "Weights of" not in printed
    with pytest.raises(UserError, match="holds another network"):
        train(tmp_path / "other", NETWORK | {"channels": 4}, start_from=file)
    with pytest.raises(UserError, match=r"nowhere\.safetensors"):
        train(tmp_path / "none", start_from=str(tmp_path / "nowhere.safetensors"))


def test_a_missing_compiler_is_one_line(tmp_path):
    missing = type("InductorError", (RuntimeError,), {"__module__": "torch._inductor.exc"})

    def fail(*_: object) -> None:
        raise missing("no C++ compiler")

    with pytest.raises(UserError, match=r"--compile true does not work here \(no C\+\+ compiler\)"):
        toy_run(tmp_path, compile=True, on_step=fail)


# Steps that are not finite


def break_losses(
    monkeypatch: pytest.MonkeyPatch, bad_calls: set[int], gradient: bool = False
) -> None:
    """Make the results of these calls of the loss, or only their gradients, not finite."""
    loss, calls = DDPM.loss, iter(range(1, 99))

    def failing(self, model, x0, t, eps):
        losses = loss(self, model, x0, t, eps)
        if not isinstance(model, UNet) or next(calls) not in bad_calls:
            return losses
        if gradient:
            losses.register_hook(lambda grad: grad * float("inf"))
            return losses
        return losses.where(torch.arange(len(losses)) != 1, float("nan"))

    monkeypatch.setattr(DDPM, "loss", failing)


def test_a_loss_that_is_nan_stops_the_run_and_spares_the_checkpoint(tmp_path, monkeypatch):
    break_losses(monkeypatch, {3})
    with pytest.raises(UserError, match=r"loss became nan at step 3.*checkpoint_000002\."):
        fast_train(tmp_path, checkpoint_every=1)
    content = checkpoint.load(tmp_path / "checkpoint_000002.safetensors")
    assert all(value.isfinite().all() for value in content.tensors.values())


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    break_losses(monkeypatch, {3}, gradient=True)
    with pytest.raises(
        UserError,
        match=r"grad_norm became (nan|inf) at step 3 \(worst at t in quarter [1-4] of 4\); "
        r"the last checkpoint is .*checkpoint_000002\.safetensors\. Try a lower",
    ):
        fast_train(tmp_path, checkpoint_every=1)


def test_the_quarter_of_t_is_that_of_the_bad_loss(tmp_path, monkeypatch):
    break_losses(monkeypatch, {1})
    times = torch.tensor([1, 46, 1, 1, 1, 1, 1, 1])  # of 60
    monkeypatch.setattr(train_mnist.torch, "randint", lambda *_, **__: times)
    with pytest.raises(
        UserError, match=r"step 1 \(worst at t in quarter 4 of 4\); no checkpoint was"
    ):
        fast_train(tmp_path)


@pytest.mark.parametrize("gradient", [False, True])
def test_max_bad_steps_are_skipped_and_counted(tmp_path, monkeypatch, capsys, gradient):
    break_losses(monkeypatch, {2, 4}, gradient)
    updates: list[nn.Module] = []
    update = train_mnist.Ema.update_parameters

    def counted(self: nn.Module, model: nn.Module) -> None:
        updates.append(model)
        update(self, model)

    monkeypatch.setattr(train_mnist.Ema, "update_parameters", counted)
    fast_train(tmp_path, num_training_steps=4, max_bad_steps=2)
    printed = capsys.readouterr().out
    assert "at step 4" in printed
    assert "step skipped, 2 of 2 allowed" in printed
    assert len(updates) == 2
    content = checkpoint.load(tmp_path / "checkpoint_000004.safetensors")
    assert all(value.isfinite().all() for value in content.tensors.values())
    assert content.tensors["optimizer.conv_in.weight.step"] == 2
    assert content.training["num_bad_steps"] == 2
    monkeypatch.undo()
    break_losses(monkeypatch, {1})
    with pytest.raises(UserError, match="became"):  # the two skipped steps still count
        fast_train(tmp_path, num_training_steps=5, max_bad_steps=2, resume="latest")


# Memory


def test_accumulate_trains_the_same(tmp_path):
    runs = [fast_train(tmp_path / str(n), accumulate=n) for n in (1, 3)]
    one, other = (metrics(run)[-1] for run in runs)
    for name in ("loss", "grad_norm", "held_out_loss"):
        assert float(one[name]) == pytest.approx(float(other[name]), rel=1e-3)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_too_little_memory_is_one_line_with_what_to_try(tmp_path, monkeypatch, error):
    def failing(*_: object) -> None:
        raise error

    monkeypatch.setattr(DDPM, "loss", failing)
    with pytest.raises(UserError, match=r"out of memory at step 1: try --batch_size 4, or --accum"):
        fast_train(tmp_path)
