"""Several processes, as torchrun starts them, do what one does; if one dies, all stop."""

from common import distributed
from common.errors import UserError
from common.options import TrainingOptions
from common.training import Run
from lesson_05.ddpm import DDPM
from lesson_05.unet import UNet

import pytest
import torch
import torch.distributed as dist
from helpers import metrics
from torch import nn
from torchrun import (
    check_equal_to_one_process,
    check_gradients,
    state_and_files,
    torchrun,
)
from torchrun_worker import NETWORK

needs_gloo = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this PyTorch has no gloo"
)


@needs_gloo
def test_two_processes_train_as_one_does_and_survive_a_kill(tmp_path):
    """Gradients and training equal those of one process; both hold the same; only one writes.

    If one is killed the other stops with one line, and the restart ends with the weights, bit for
    bit, of an undisturbed run. All in one test, as processes are slow to start.
    """
    folder = tmp_path / "two"
    printed = torchrun(folder, "all", "--nproc-per-node", "2", "--max-restarts", "1")
    check_gradients(folder, 2)
    check_equal_to_one_process(folder / "undisturbed", tmp_path / "one")

    state_0, written_0 = state_and_files(folder, "undisturbed", 0, life=1)
    state_1, written_1 = state_and_files(folder, "undisturbed", 1, life=1)
    assert state_0 == state_1  # model, average, optimiser, loss-aware sampler, random numbers
    assert any("checkpoint_000010" in name for name in written_0)
    assert not written_1

    killed, stopped = (float((folder / name).read_text()) for name in ("killed", "stopped"))
    assert stopped - killed < 30
    assert "error: another process of this run has ended, so this one stops at step" in printed
    assert "Resumed after step 5" in printed
    for rank in (0, 1):
        assert state_and_files(folder, "run", rank, life=1)[0] == state_0
    assert metrics(folder / "run") == metrics(folder / "undisturbed")


def test_the_batch_must_be_a_multiple_of_the_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    options = TrainingOptions(output_dir=str(tmp_path), dataset="digits", batch_size=8)
    with pytest.raises(
        ValueError, match="batch_size is 8: it must be a multiple of 3, the number of proc"
    ):
        Run("lesson_05", options).load_data()


@pytest.mark.parametrize("parts", [2, 3, 8, 20])
def test_microbatches_have_the_gradients_of_the_whole_batch(parts):
    model = UNet(**NETWORK)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    process = DDPM(torch.linspace(1e-3, 0.2, 20, dtype=torch.float64))
    x0, eps = torch.randn(2, 8, 1, 28, 28)
    t = torch.randint(1, 21, (8,))
    gradients = []
    for called in (model, distributed.Microbatches(model, parts)):
        model.zero_grad()
        process.loss(called, x0, t, eps).mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (gradients[0] - gradients[1]).abs().max() < 1e-6 < gradients[0].abs().max()


def test_microbatches_hold_less_memory():
    """Only the microbatches' inputs are saved for the backward pass."""
    model, sizes = nn.Sequential(*[nn.Conv2d(1, 1, 3, padding=1) for _ in range(9)]), []

    def count(tensor: torch.Tensor) -> torch.Tensor:
        sizes[-1] += tensor.numel() * (tensor.ndim == 4)
        return tensor

    for called in (model, distributed.Microbatches(model, 4)):
        sizes.append(0)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            called(torch.randn(8, 1, 28, 28))
    assert sizes[1] < sizes[0] / 4


def test_torchruns_variables_must_be_numbers(tmp_path, monkeypatch):
    """As left in the environment by hand, or by a notebook that torchrun once started."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    run = dict(output_dir=str(tmp_path), dataset="digits", device="cpu")
    Run("lesson_05", TrainingOptions(**run))  # without RANK it is no run of torchrun
    monkeypatch.setenv("RANK", "x")
    with pytest.raises(UserError, match="variable RANK is 'x', not a number: start the script"):
        Run("lesson_05", TrainingOptions(**run))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UserError, match="variable WORLD_SIZE is '', not a number"):
        Run("lesson_05", TrainingOptions(**run))
