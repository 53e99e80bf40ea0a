"""The program that torchrun starts in the tests: `torchrun_worker.py FOLDER TASK`."""

import copy
import hashlib
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from common import distributed
from lesson_05.class_conditional.network import ClassConditionalUNet
from lesson_05.ddpm import DDPM, linear_beta
from lesson_05.text_to_image.network import TextToImageUNet
from lesson_05.text_to_image.text import TextEncoder, tokenize
from lesson_05.unet import UNet
from lesson_09.iddpm import ImprovedDDPM, cosine_beta
from lesson_09.unet import UNet as UNet9

import torch
from torch import Tensor, nn

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
PROMPTS = ["a 3", "seven", "the digit 5", "x", "9", "one", "two", "an eight"]
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
    "num_timesteps": 4,  # so that the loss-aware sampler soon has terms of every t
    "timestep_sampler": "loss_aware",
    "simple_weight": 0,
    "vlb_weight": 1,
    "num_training_steps": 12,
    "batch_size": 8,
    "ema_decay": 0.9,
    "checkpoint_every": 5,
    "log_every": 4,
    "preview_every": 6,
    "num_previews": 2,
    "num_samples": 1,
}
FLAGS = [word for name, value in SETTINGS.items() for word in (f"--{name}", str(value))]


def gradients(folder: Path) -> None:
    """Write, for each network, how far the gradients of all processes together, whole and in
    microbatches, are from those of one process."""
    cpu = torch.device("cpu")
    distributed.init(cpu)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)  # so that rounding does not hide a difference
    process, improved = DDPM(linear_beta(T)), ImprovedDDPM(cosine_beta(T))
    NETWORK9 = {**NETWORK, "learned_variance": True}

    def with_text(model: TextToImageUNet, called: nn.Module, tokens: Tensor, *batch: Tensor):
        return process.loss(partial(called, context=model.encode(tokens)), *batch)

    def with_label(_: object, called: nn.Module, label: Tensor, *batch: Tensor) -> Tensor:
        return process.loss(partial(called, label=label), *batch)

    def plain(_: object, called: nn.Module, __: Tensor, *batch: Tensor) -> Tensor:
        return process.loss(called, *batch)

    def hybrid(_: object, called: nn.Module, __: Tensor, *batch: Tensor) -> Tensor:
        return improved.loss(called, *batch)

    label, tokens = torch.arange(8) % 11, tokenize(PROMPTS)
    networks = {
        "plain": (UNet(**NETWORK), plain, label),
        "class": (ClassConditionalUNet(10, **NETWORK), with_label, label),
        "text": (TextToImageUNet(TextEncoder(16, 1, 2), **NETWORK), with_text, tokens),
        "hybrid": (UNet9(**NETWORK9), hybrid, label),
    }
    lines = []
    for name, (model, loss, condition) in networks.items():
        model.time.register_forward_pre_hook(lambda _, inputs: inputs[0].double())
        for parameter in model.parameters():
            if not parameter.any():  # layers before a zero layer have no gradient
                nn.init.normal_(parameter, std=0.02)
        x0, eps = torch.randn(2, 8, 1, 28, 28)
        batch = (condition, x0, torch.randint(1, T + 1, (8,)), eps)
        alone = gradient(model, loss(model, model, *batch))
        for parts in (1, 3):
            copied = copy.deepcopy(model)
            inner = distributed.Microbatches(copied, parts) if parts > 1 else copied
            parallel = distributed.DataParallel(inner)
            many = gradient(copied, loss(copied, parallel, *distributed.shard(*batch)))
            error, largest = (many - alone).abs().max(), alone.abs().max()
            lines.append(f"{name},{parts},{error:.3g},{largest:.3g}")
    check_dropout()
    (folder / f"gradients_{distributed.rank()}").write_text("\n".join(lines))
    torch.set_default_dtype(torch.float32)


def check_dropout() -> None:
    """The processes drop different features and leave their common random numbers untouched."""
    network = UNet(**{**NETWORK, "dropout": 0.5})
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    parallel = distributed.DataParallel(network)
    state = torch.get_rng_state()
    out = parallel(torch.ones(1, 1, 28, 28), torch.ones(1, dtype=torch.int64))
    assert torch.equal(torch.get_rng_state(), state), "the common random numbers were used"
    first, second, *_ = distributed.gather(out)
    assert not torch.equal(first, second), "two processes dropped the same features"


def gradient(model: nn.Module, losses: Tensor) -> Tensor:
    model.zero_grad()
    losses.mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def training(folder: Path, name: str, killed: bool = False, last: bool = True) -> None:
    """Run lesson 9's training in folder/name. At its end each process writes a checksum of its
    state, and the files that it wrote, into NAME_RANK_LIFE; LIFE counts restarts.

    killed: process 1 kills itself at step 8, before any restart. last: no other training follows in
    these processes, which connect only once.
    """
    from common import cli  # imported here, so that the other task starts quickly
    from common.ema import Ema
    from common.training import Run
    from lesson_09 import train_mnist

    life = int((folder / "killed").exists())
    runs: list[Run] = []
    written: list[str] = []
    track, update, leave, steps = (
        Run.track,
        Ema.update_parameters,
        distributed.leave,
        iter(range(99)),
    )

    def track_and_keep(self: Run, config: dict[str, Any], **state: Any) -> None:
        runs.append(self)
        track(self, config, **state)

    def update_and_die(self: Ema, model: nn.Module) -> None:
        update(self, model)
        if killed and distributed.rank() == 1 and life == 0 and next(steps) == 7:
            (folder / "killed").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(event: str, arguments: tuple) -> None:
        writes = event == "os.rename" or (event == "open" and {*"w+a"} & {*str(arguments[1])})
        if writes and str(folder / name) in str(arguments[0]):
            written.append(str(arguments[0]))

    def leave_a_note() -> None:
        """Called at the end of the training, before process 0 goes on alone."""
        digest = hashlib.sha256(torch.get_rng_state().numpy().tobytes())
        for key, tensor in sorted(runs[-1].state.own_tensors().items()):
            digest.update(key.encode() + tensor.contiguous().numpy().tobytes())
        note = folder / f"{name}_{distributed.rank()}_{life}"
        note.write_text("\n".join([digest.hexdigest(), *written]))
        if last:
            leave()

    sys.addaudithook(watch)
    Run.track, Ema.update_parameters = track_and_keep, update_and_die
    distributed.leave = leave_a_note
    try:
        words = [*FLAGS, "--resume", "auto", "--output_dir", str(folder / name)]
        cli.run(train_mnist.main, words, presets=True, network=UNet9)
    except SystemExit as end:
        if end.code:
            (folder / "stopped").write_text(str(time.time()))
            raise
    finally:
        Run.track, Ema.update_parameters, distributed.leave = track, update, leave


def main() -> None:
    folder, task = Path(sys.argv[1]), sys.argv[2]
    if task == "gradients":
        gradients(folder)
    elif task == "training":
        training(folder, "run")
    else:  # all tasks together, as processes are slow to start
        if not (folder / "killed").exists():
            gradients(folder)
        training(folder, "run", killed=True, last=False)
        training(folder, "undisturbed")


if __name__ == "__main__":
    main()
