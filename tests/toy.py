"""A training run that takes milliseconds, to test what surrounds the loop."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.data import Images
from common.ema import Ema
from common.options import TrainingOptions
from common.training import Run

import torch
from torch import nn


def nothing(*_: object) -> None:
    pass


def toy_run(
    folder: Path,
    steps: int = 8,
    on_step: Callable[[int], None] = nothing,
    on_log: Callable[[Run], None] = nothing,
    **options: Any,
) -> None:
    """A linear regression. on_step(step) is called in each step, on_log(run) before each row."""
    settings = {"output_dir": str(folder), "device": "cpu", "precision": "float32"}
    settings |= {"num_training_steps": steps, "num_timesteps": 4, "batch_size": 4, "log_every": 3}
    settings |= {"checkpoint_every": 100, "decay_learning_rate": True, "learning_rate": 0.01}
    with Run("toy", TrainingOptions(**settings | options)) as run:
        run.data = Images("digits", *[torch.zeros(4, 1, 2, 2, dtype=torch.uint8)] * 4)
        model = nn.Linear(2, 1)
        ema, optimizer = Ema(model, 0.9), torch.optim.Adam(model.parameters())
        run.track({"network": {}}, model=model, ema=ema, optimizer=optimizer)
        for step in run.steps():
            x = torch.randn(4, 2)
            losses = (model(x)[:, 0] - x.sum(1)) ** 2
            losses.mean().backward()
            losses = run.gather(losses)
            t = torch.ones(4, dtype=torch.int64)
            if not run.skip_step(losses, t, torch.tensor(1.0)):
                optimizer.param_groups[0]["lr"] = run.learning_rate
                optimizer.step()
                ema.update_parameters(model)
            optimizer.zero_grad()
            on_step(step)
            run.record(losses, t, mean=x.mean())
            if run.due("log"):
                on_log(run)
                with run.evaluating():
                    held_out = ema(torch.randn(4, 2)).mean()
                run.log(held_out=held_out)
