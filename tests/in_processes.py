"""What test_processes.py has torchrun start: `in_processes.py FOLDER TASK`, in each process."""

import copy
import hashlib
import io
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import processes
from lesson_05.class_conditional.network import ClassConditionalUNet
from lesson_05.ddpm import DDPM, linear_beta
from lesson_05.text_to_image.network import TextToImageUNet
from lesson_05.text_to_image.text import TextEncoder, tokenize
from lesson_05.unet import UNet
from lesson_09.iddpm import ImprovedDDPM, cosine_beta
from lesson_09.unet import UNet as UNet9

T = 60
NETWORK: dict[str, Any] = {
    "image_channels": 1,
    "image_size": 28,
    "channels": 8,
    "multipliers": [1, 2],
    "num_blocks": 1,
    "attention_resolutions": [14],
    "num_groups": 4,
    "dropout": 0.0,
}
PROMPTS = ["a 3", "seven", "the digit 5", "x", "9", "one", "two"]
SETTINGS = {
    "config": "configs/laptop.yaml",
    "dataset": "digits",
    "device": "cpu",
    "precision": "float32",
    "network.channels": 8,
    "network.multipliers": "[1, 2]",
    "network.num_blocks": 1,
    "network.attention_resolutions": "[14]",
    "network.num_heads": 1,
    "network.num_groups": 4,
    "network.dropout": 0,
    "num_timesteps": 4,  # so that the loss-aware sampler soon knows every t
    "timestep_sampler": "loss_aware",
    "simple_weight": 0,
    "vlb_weight": 1,
    "num_training_steps": 12,
    "batch_size": 7,
    "ema_decay": 0.9,
    "checkpoint_every": 5,
    "log_every": 4,
    "preview_every": 6,
    "num_previews": 2,
    "num_samples": 1,
}
FLAGS = [word for name, value in SETTINGS.items() for word in (f"--{name}", str(value))]


def gradients(folder: Path) -> None:
    """How far the gradients of many processes, and of parts, are from those of one, per network.

    What the network is given has a gradient of its own here, as lesson 2's learned rates have.
    """
    cpu = torch.device("cpu")
    processes.join(cpu)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)  # so that what is left is not rounding
    process, improved = DDPM(linear_beta(T)), ImprovedDDPM(cosine_beta(T))
    prompts = tokenize(PROMPTS)

    def with_text(model: TextToImageUNet, called: nn.Module, *batch: Tensor) -> Tensor:
        context = model.encode(prompts[: len(batch[0])])
        return process.loss(partial(called, context=context), *batch)

    networks = {
        "plain": (UNet(**NETWORK), lambda _, called, *batch: process.loss(called, *batch)),
        "class": (
            ClassConditionalUNet(10, **NETWORK),
            lambda _, called, x0, t, eps: process.loss(partial(called, label=t % 11), x0, t, eps),
        ),
        "text": (TextToImageUNet(TextEncoder(16, 1, 2), **NETWORK), with_text),
        "hybrid": (UNet9(**NETWORK), lambda _, called, *batch: improved.loss(called, *batch)),
    }
    lines = []
    for name, (model, loss) in networks.items():
        scale = nn.Parameter(torch.tensor(0.9))
        model.time.register_forward_pre_hook(lambda _, inputs: inputs[0].double())
        for parameter in model.parameters():
            if not parameter.any():  # zero at first, so that layers before it have no gradient
                nn.init.normal_(parameter, std=0.02)
        for B, parts in [(4, 1), (7, 2)]:  # for four processes: one image each; then 1, 2, 2, 2
            x0, eps = torch.randn(2, B, 1, 28, 28)
            t = torch.randint(1, T + 1, (B,))
            alone = gradient(model, scale, loss(model, model, scale * x0, t, eps))
            same = copy.deepcopy(model)
            inner = processes.InParts(same, parts) if parts > 1 else same
            share = processes.Share(inner, cpu)
            many = gradient(same, scale, loss(same, share, scale * x0, t, eps))
            error, largest = (many - alone).abs().max(), alone.abs().max()
            lines.append(f"{name},{B},{parts},{error:.3g},{largest:.3g}")
    dropping = processes.Share(UNet(**{**NETWORK, "dropout": 0.5}), cpu)
    for parameter in dropping.parameters():
        nn.init.normal_(parameter, std=0.1)
    before = torch.get_rng_state()
    out = dropping(torch.ones(4, 1, 28, 28), torch.ones(4, dtype=torch.int64))
    assert torch.equal(torch.get_rng_state(), before), "the common random numbers were used"
    other = 4 // processes.count()  # the first image of the next process
    assert not torch.equal(out[0], out[other]), "two processes dropped the same features"
    (folder / f"gradients_{processes.rank()}").write_text("\n".join(lines))
    processes.leave()
    torch.set_default_dtype(torch.float32)


def gradient(model: nn.Module, scale: Tensor, losses: Tensor) -> Tensor:
    model.zero_grad()
    scale.grad = None
    losses.mean().backward()
    parameters = [scale, *model.parameters()]
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


def training(folder: Path, name: str, killed: bool = False) -> None:
    """Lesson 9's training into folder/name; the state of each process at its end, and what it
    opened to write, into NAME_RANK_LIFE.

    killed: process 1 has no time to say goodbye at step 8 of its first life.
    """
    from common import cli  # here, as the other task is to start quickly
    from common.ema import Ema
    from common.run import Run
    from lesson_09 import train_mnist

    life = int((folder / "killed").exists())
    tracked: dict[str, Any] = {}
    written: list[str] = []
    track, update, leave, steps = Run.track, Ema.update_parameters, processes.leave, iter(range(99))

    def track_and_keep(self: Run, config: dict[str, Any], dataset: str, **state: Any) -> None:
        tracked.update(state)
        track(self, config, dataset, **state)

    def update_and_die(self: Ema, model: nn.Module) -> None:
        update(self, model)
        if killed and processes.rank() == 1 and life == 0 and next(steps) == 7:
            (folder / "killed").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(event: str, arguments: tuple) -> None:
        if event == "open" and str(folder / name) in str(arguments[0]) and "w" in str(arguments[1]):
            written.append(str(arguments[0]))

    def leave_a_note() -> None:
        """At the end of the training, before process 0 goes on alone."""
        memory = io.BytesIO()
        state = {part: value.state_dict() for part, value in tracked.items()}
        torch.save([state, torch.get_rng_state()], memory)
        sums = hashlib.sha256(memory.getvalue()).hexdigest()
        note = folder / f"{name}_{processes.rank()}_{life}"
        note.write_text("\n".join([sums, *written]))
        leave()

    sys.addaudithook(watch)
    Run.track, Ema.update_parameters, processes.leave = track_and_keep, update_and_die, leave_a_note
    try:
        words = [*FLAGS, "--output_dir", str(folder / name)]
        cli.run(train_mnist.main, words, presets=True, network=UNet9)
    except SystemExit as end:
        if end.code:
            (folder / "stopped").write_text(str(time.time()))
            raise
    finally:
        Run.track, Ema.update_parameters, processes.leave = track, update, leave


def main() -> None:
    folder, task = Path(sys.argv[1]), sys.argv[2]
    if task == "gradients":
        gradients(folder)
    elif task == "training":
        training(folder, "run")
    else:  # all, with as few starts of processes as can be
        if not (folder / "killed").exists():
            gradients(folder)
        training(folder, "run", killed=True)
        training(folder, "undisturbed")


if __name__ == "__main__":
    main()
