"""What a training checkpoint holds besides its config: the tensors of a run, and its counts."""

from typing import Any

from common.checkpoint import Checkpoint, check_template
from common.device import random_states, set_random_states
from common.ema import Ema

import torch
from torch import Tensor, nn


class TrainingState:
    """The network, its average, the optimiser and further modules, as tensors by name.

    scalars: counts since the last row of metrics.csv, and the number of bad steps.
    """

    def __init__(
        self,
        device: torch.device,
        model: nn.Module,
        ema: Ema,
        optimizer: torch.optim.Optimizer,
        **modules: nn.Module,
    ) -> None:
        self.device, self.model, self.ema, self.optimizer = device, model, ema, optimizer
        self.modules = {"model": model, "ema": ema.module, **modules}
        self.scalars: dict[str, Any] = {"totals": {}, "counts": {}, "num_bad_steps": 0}
        initialise(optimizer)

    def own_tensors(self) -> dict[str, Tensor]:
        """All tensors but random states. They are the run's own, not copies."""
        tensors = {"num_ema_updates": self.ema.n_averaged}
        for name, module in self.modules.items():
            tensors |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = value
        return tensors

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of a checkpoint."""
        states = random_states(self.device)
        return self.own_tensors() | {f"rng.{name}": state for name, state in states.items()}

    def restore(self, resumed: Checkpoint) -> None:
        """Restore a checkpoint, after checking that it holds exactly what this run would save."""
        check_template(resumed, self.tensors(), self.scalars)
        with torch.no_grad():
            for name, tensor in self.own_tensors().items():
                tensor.copy_(resumed.tensors[name])  # in place, to keep memory layouts
        states = {name: resumed.tensors[f"rng.{name}"] for name in random_states(self.device)}
        with resumed.must_fit():
            set_random_states(self.device, states)
        self.scalars |= resumed.training or {}


def initialise(optimizer: torch.optim.Optimizer) -> None:
    """Create the optimiser's state, which PyTorch creates in the first step: zeros in the memory
    layout of the parameters. Then --resume can compare a file with it and fill it."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # so that this step changes no weights; the loop sets the rate
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for state in optimizer.state.values():
        state["step"].zero_()
