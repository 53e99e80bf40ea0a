"""What the breaks of lesson 6 change."""

from common import lessons
from common.break_it import Bench, BreakOptions
from lesson_06 import break_it
from lesson_06.ddim import ddim_timesteps

import pytest
import torch
from helpers import error_line
from torch import Tensor


@pytest.fixture
def bench(checkpoints) -> Bench:
    options = BreakOptions(model_checkpoint=checkpoints["lesson_05.text_to_image"], num_samples=3)
    loaded = lessons.load(options.model_checkpoint)
    return Bench(*loaded, options, torch.device("cpu"))


def test_only_dropout_makes_two_runs_differ(bench):
    off, off_again, on, on_again = break_it.dropout_on(bench, 3).values()
    assert torch.equal(off, off_again)
    assert not torch.equal(on, on_again)
    assert not bench.model.training


def test_the_number_of_the_step_replaces_the_time(bench, monkeypatch):
    times: list[int] = []

    def network(xt: Tensor, t: Tensor) -> Tensor:
        times.append(int(t[0]))
        return xt

    monkeypatch.setattr(break_it, "bind_classes", lambda model, count: network)
    break_it.number_for_time(bench, 4)
    assert times == [*reversed(ddim_timesteps(60, 4)), 4, 3, 2, 1]


def test_arc_and_line_have_the_same_ends(bench):
    arc, line = break_it.straight_line(bench, 3).values()
    torch.testing.assert_close(arc[[0, 2]], line[[0, 2]], atol=1e-3, rtol=1e-3)
    assert not torch.allclose(arc[1], line[1], atol=1e-2)


def test_a_checkpoint_of_another_lesson_is_refused_in_one_line(checkpoints, tmp_path, capsys):
    words = ["--output_dir", tmp_path, "--device", "cpu"]
    words += ["--model_checkpoint", checkpoints["lesson_05"]]
    line = error_line(capsys, break_it.main, *words)
    assert "is a checkpoint of lesson_05: choose one of lesson_05.text_to_image" in line
    words += ["--num_samples", "1"]
    assert "num_samples is 1: it must be at least 2" in error_line(capsys, break_it.main, *words)
