"""A training run: its folder, log, previews and checkpoints, and how it stops and resumes."""

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn, Self, TypeVar

from common import checkpoint, device, distributed
from common.checkpoint import Checkpoint, find_checkpoint, saved, step_of
from common.data import Batches, Images, load_images
from common.errors import UserError, is_out_of_memory, one_line
from common.files import (
    ROOT,
    keep_rows,
    lock_folder,
    make_folder,
    remove_unfinished,
)
from common.network_checks import feature_map_sizes, fit_attention
from common.options import TrainingOptions
from common.run_log import UNSETTLED, RunLog, tensorboard_writer
from common.stopping import Stopped, stoppable
from common.training_state import TrainingState

import torch
from torch import Tensor, nn
from tqdm import tqdm

N = TypeVar("N", bound=nn.Module)


class Run(RunLog):
    """One training run: a context manager around the training loop.

        with Run("lesson_05", options) as run:
            data, batches = run.load_data()
            ...                                             # build everything on run.device
            run.track({"network": network}, model=model, ema=ema, optimizer=optimizer)
            for step in run.steps():
                ...

    Ctrl-C, SIGTERM and SIGHUP stop it after the current step, and previews, downloads and the like
    at once: it saves a checkpoint, prints how to resume, and exits with code 130, 143 or 129. A
    second Ctrl-C ends it without that. Under torchrun only process 0 writes and prints.

    Args:
        lesson: the lesson's name, which is saved in checkpoints.
        options: the flags.
    """

    def __init__(self, lesson: str, options: TrainingOptions) -> None:
        self.lesson, self.options = lesson, options
        self.lesson_dir = ROOT.joinpath(*lesson.split("."))
        self.device = distributed.own_device(device.pick_device(options.device))
        self.folder = Path(options.output_dir or self.lesson_dir / "output")
        self.resumed = self.load_resumed()
        self.start = self.step = self.resumed.step if self.resumed else 0
        self.stop_signal, self.evaluation_seconds = 0, 0.0
        self.finished = self.finite_step = self.start  # steps
        self.is_evaluating = self.in_step = self.in_loop = False
        self.bar: Any = None
        torch.manual_seed(options.seed)

    def load_resumed(self) -> Checkpoint | None:
        resume = self.options.resume
        path = find_checkpoint(resume, self.folder) if resume else None
        if path is None:
            return None
        resumed = checkpoint.load(path, self.lesson)
        if resumed.training is None:
            raise UserError(f"{path} is for sampling only: start a new run with --start_from")
        if later := [file.name for file in saved(self.folder) if step_of(file) > resumed.step]:
            raise UserError(
                f"{self.folder} holds later checkpoints ({later[-1]}), which a run resumed from "
                f"{path} would replace: name another --output_dir, or remove them"
            )
        return resumed

    def __enter__(self) -> Self:
        distributed.init(self.device)
        self.lock, self.metrics = None, self.folder / "metrics.csv"
        self.writer: Any = None
        if distributed.rank() == 0:
            if not self.options.resume and (saved(self.folder) or self.metrics.exists()):
                raise UserError(
                    f"{self.folder} holds a run already: --resume goes on with it; or name "
                    "another --output_dir, or remove the folder"
                )
            make_folder(self.folder)
            self.lock = lock_folder(self.folder)
            remove_unfinished(self.folder, "checkpoint_*")
            remove_unfinished(self.folder, self.metrics.name)
            self.remove_old_checkpoints()
            if self.options.tensorboard:
                self.writer = tensorboard_writer(self.folder, self.start)
        self.context = ExitStack()
        if self.writer is not None:
            self.context.callback(self.writer.close)
        if self.lock is not None:
            self.context.callback(self.lock.release)
        self.context.enter_context(stoppable(self.on_signal))
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        with self.context:
            if isinstance(error, Stopped):
                error = self.stop_at_signal(error.number)
            if error is not None and not isinstance(error, UserError):
                translate_error(self, error)

    def stop_at_signal(self, number: int) -> RuntimeError:
        """Stop; under torchrun with the other processes, which wait for the end of an evaluation.
        Returns the error if they cannot be reached."""
        try:
            if self.is_evaluating:
                distributed.all_reduce_max(number)
        except RuntimeError as lost:
            return lost
        self.stop(agreed=self.is_evaluating)

    def on_signal(self, number: int) -> bool:
        """Whether to stop at once: not within a step, which would be lost."""
        self.stop_signal = number
        return not self.in_step

    def last_checkpoint(self) -> str:
        files = saved(self.folder)
        return f"the last checkpoint is {files[-1]}" if files else "no checkpoint was saved yet"

    def load_data(self) -> tuple[Images, Batches]:
        """The data set, and `batches[step]`: images x0 (B, C, H, W) in [-1, 1] and labels (B,)."""
        options, count = self.options, distributed.world_size()
        shape = options.image_size, options.image_channels
        self.data = data = load_images(options.dataset, options.data_dir, *shape)
        if self.resumed and self.resumed.dataset != data.name:
            name = self.resumed.dataset
            where = "" if name == "digits" else ", and --data_dir unless its files are downloaded"
            raise UserError(
                f"the run to resume was trained on {name}, but the data found now is {data.name}: "
                f"add --dataset {name}{where}"
            )
        if self.resumed and (
            self.resumed.image_shape != data.shape
            or self.resumed.config.get("data_sha256", "") != data.sha256
        ):
            raise UserError(
                "the run to resume was trained on other images: give --data_dir and --image_size "
                "as before, or start a new run with --start_from"
            )
        batches = Batches(
            data.train, data.train_labels, options.batch_size, options.seed, self.device
        )
        if options.batch_size % count:
            raise UserError(
                f"batch_size is {options.batch_size}: it must be a multiple of {count}, the number "
                "of processes"
            )
        if options.num_epochs is not None:
            options.num_training_steps = options.num_epochs * batches.per_epoch
        same = self.resumed and self.resumed.config.get("minutes") == options.minutes
        if options.minutes is not None and not same:
            options.num_training_steps = UNSETTLED
        return data, batches

    def network_for(self, data: Images, network: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a network for these images, from its flags. For own images or another
        --image_size, attention is moved to the feature maps that there are."""
        network = {"image_channels": data.channels, "image_size": data.size, **network}
        resolutions = network.get("attention_resolutions")
        if resolutions and (data.name == "folder" or self.options.image_size):
            sizes = feature_map_sizes(data.size, len(network["multipliers"]))
            network["attention_resolutions"] = fitted = fit_attention(resolutions, sizes)
            if fitted != list(resolutions):
                self.say(f"attention_resolutions is {fitted}, as feature maps have sizes {sizes}")
        return network

    def prepare(self, model: N) -> N:
        """Move the network to the device, in the memory layout that convolutions are fastest in."""
        model = model.to(self.device).to(memory_format=torch.channels_last)
        if self.options.compile:
            model.compile()
        return model

    def track(self, config: dict[str, Any], **state: Any) -> None:
        """Define what checkpoints hold; restore it on --resume, or apply --start_from.

        Args:
            config: what is needed besides the options to rebuild the network.
            state: model, ema, optimizer and any further modules.
        """
        self.config = {**asdict(self.options), **config}
        if self.data.sha256:
            self.config |= {"classes": [*self.data.classes], "data_sha256": self.data.sha256}
        self.state = TrainingState(self.device, **state)
        paths_and_device = {*checkpoint.PATHS, "device"}
        same = {name: v for name, v in self.config.items() if name not in paths_and_device}
        data = self.data.name, self.data.shape, self.data.sha256
        distributed.check_agreement({"data": data, "first step": self.start, **same})
        if distributed.rank() == 0 and self.options.resume:
            keep_rows(self.metrics, self.start)
        parameters = sum(p.numel() for p in state["model"].parameters())
        self.say(f"{self.lesson}: {parameters:,} parameters, trained on {self.data}")
        with self.autocast():
            lower = torch.is_autocast_enabled(self.device.type)
        number = f"{distributed.world_size()} x " if distributed.world_size() > 1 else ""
        where = f"{number}{self.device.type}: {device.hardware(self.device)}"
        self.say(f"{where}, {'bfloat16' if lower else 'float32'}; files in {self.folder}")
        if self.resumed:
            self.state.restore(self.resumed)
            self.resumed = None  # its tensors are a file in memory, which may now be removed
            self.say(f"Resumed after step {self.start:,}")
        elif self.options.start_from:
            initial = checkpoint.load(self.options.start_from, self.lesson)
            initial.fill(state["model"])
            initial.fill(state["ema"].module)
            self.say(f"Weights of {initial.source}, trained for {initial.step:,} steps")

    def save(self) -> Path:
        """Write a checkpoint of this step, then remove old ones."""
        path = self.folder / f"checkpoint_{self.step:06d}.safetensors"
        content = (self.lesson, self.config, self.data.name, self.step)
        checkpoint.save(path, Checkpoint(*content, self.state.tensors(), self.state.scalars))
        self.remove_old_checkpoints()
        return path

    def remove_old_checkpoints(self) -> None:
        """Keep the last ones, and the last from before the last finite loss: it is intact."""
        keep, files = self.options.keep_checkpoints, saved(self.folder)
        intact = [path for path in files if step_of(path) < self.finite_step]
        for old in set() if keep == "all" else {*files[:-keep]} - {*intact[-1:]}:
            old.unlink(missing_ok=True)

    def distribute(self, model: nn.Module) -> nn.Module:
        """The network to train: the model itself unless torchrun or --accumulate splits the
        batch. The gradients are those of the whole batch either way."""
        if self.options.accumulate > 1:
            model = distributed.Microbatches(model, self.options.accumulate)
        if distributed.world_size() == 1:
            return model
        ids = [self.device] if self.device.type == "cuda" else None
        return distributed.DataParallel(model, device_ids=ids)

    def steps(self) -> Iterator[int]:
        """The remaining steps, counted from 1, with a progress bar. Also saves checkpoints."""
        last = self.options.num_training_steps
        hidden = True if distributed.rank() > 0 else None  # None: unless it is a terminal
        self.began, self.logged_seconds = time.perf_counter(), 0.0
        total = None if last == UNSETTLED else last
        bar = {"initial": self.start, "total": total, "unit": "step", "smoothing": 0.05}
        self.bar, self.in_loop = tqdm(disable=hidden, **bar), True
        while self.step < self.options.num_training_steps:
            self.step += 1
            self.in_step = self.step > self.start + 1  # the first one has little to lose
            yield self.step
            self.finished, self.in_step = self.step, True
            self.bar.update()
            if self.options.num_training_steps == UNSETTLED:
                self.settle_steps()
            self.stop_signal = distributed.all_reduce_max(self.stop_signal)
            if self.stop_signal:
                self.stop()
            if self.due("checkpoint"):
                self.save()
        self.bar.close()
        distributed.leave()
        if distributed.rank() > 0:
            raise SystemExit(0)  # process 0 does the rest
        self.in_step = self.in_loop = False  # all is saved
        if not saved(self.folder):  # a finished run, resumed into a new folder
            self.save()
        seconds = time.perf_counter() - self.began
        percent = 100 * self.evaluation_seconds / max(seconds, 1e-9)
        self.say(f"Trained for {seconds:.0f} s, {percent:.1f} % of it for previews and logs")

    def settle_steps(self) -> None:
        """After 5 % of --minutes, fix the number of training steps; checkpoints keep it. Previews
        may take another 5 %."""
        seconds, minutes = time.perf_counter() - self.began, self.options.minutes or 0.0
        done = self.step - self.start
        fit = self.start + round(57 * minutes * done / seconds)
        fit = max(fit, self.step + 1)  # the last step is still to come: it writes the results
        if fit := distributed.all_reduce_max(fit if seconds > 3 * minutes else 0):
            self.options.num_training_steps = self.config["num_training_steps"] = fit
            self.bar.total = fit
            self.say(f"{minutes:g} minutes: {fit:,} training steps, at {seconds / done:.2g} s each")

    def stop(self, agreed: bool = True) -> NoReturn:
        """Save a checkpoint, unless the last one is of this step, print how to resume, and exit.

        agreed: whether all processes stop after this step, and can wait for each other.
        """
        if self.bar is not None:
            self.bar.close()
        if distributed.rank() == 0:
            files = saved(self.folder)
            if self.finished > self.start and (not files or step_of(files[-1]) < self.finished):
                files = [self.save()]
            where = f" --output_dir {self.options.output_dir}" if self.options.output_dir else ""
            if files:
                self.say(f"Stopped after step {self.finished:,}; saved {files[-1]}")
                self.say(f"To resume: the same command with --resume{where}")
            else:
                self.say("Stopped before the first checkpoint: the same command starts again")
        if agreed:
            distributed.leave()
        raise SystemExit(128 + self.stop_signal)

    def autocast(self) -> AbstractContextManager[None]:
        return device.autocast(self.device, self.options.precision)

    def shard(self, *batch: Tensor) -> tuple[Tensor, ...]:
        """This process's rows of each tensor: all rows unless there are several processes."""
        return distributed.shard(*batch)

    def gather(self, rows: Tensor) -> Tensor:
        """Collect the values (B,) of the whole batch from all processes, detached."""
        return distributed.gather(rows)

    def skip_step(self, losses: Tensor, t: Tensor, grad_norm: Tensor) -> bool:
        """Whether the step must be skipped because loss or gradient is not finite. It is counted.

        Raises:
            UserError: there were more than max_bad_steps; weights and checkpoints are intact.
        """
        values = {"loss": float(losses.mean()), "grad_norm": float(grad_norm)}
        bad = [f"{name} became {v}" for name, v in values.items() if not math.isfinite(v)]
        if not bad:
            self.finite_step = self.step
            return False
        worst = losses.nan_to_num(nan=math.inf).argmax()
        what = f"{bad[0]} at step {self.step} (worst at t in quarter {self.quarter(t[worst])} of 4)"
        self.state.scalars["num_bad_steps"] += 1
        number, allowed = self.state.scalars["num_bad_steps"], self.options.max_bad_steps
        if number > allowed:
            advice = "Try a lower --learning_rate, or --precision float32"
            raise UserError(f"{what}; {self.last_checkpoint()}. {advice}")
        self.say(f"{what}: step skipped, {number} of {allowed} allowed")
        return True

    @contextmanager
    def evaluating(self, seed: int = 1) -> Iterator[None]:
        """A context for previews and held-out losses: without gradients, and with the same random
        numbers every time. The run's own random numbers are not affected."""
        start, self.is_evaluating = time.perf_counter(), True
        self.finished, self.in_step = self.step, False
        with device.forked_rng(self.device, seed), torch.no_grad(), self.autocast():
            yield
        self.evaluation_seconds += time.perf_counter() - start
        self.in_step = self.in_loop
        self.is_evaluating = False


def translate_error(run: Run, error: BaseException) -> None:
    """Raise a one-line UserError if the error is not due to a mistake in the code."""
    options, reason, line = run.options, one_line(error, 200), ""
    if isinstance(error, OSError):
        name = f" ({error.filename})" if error.filename else ""
        line = f"{error.strerror or reason}{name}; {run.last_checkpoint()}"
    elif is_out_of_memory(error):
        less = f"--batch_size {max(options.batch_size // 2, 1)}"
        less += f", or --accumulate {2 * options.accumulate}"
        less = f"--num_previews {options.num_previews // 2}" if run.is_evaluating else less
        line = f"out of memory at step {run.step}: try {less}"
    elif options.compile and type(error).__module__.startswith("torch._"):
        line = f"--compile true does not work here ({reason}): omit it"
    elif distributed.is_lost_peer(error):
        line = f"another process of this run has ended, so this one stops at step {run.step}; "
        line += f"{run.last_checkpoint()}. To resume: the same command with --resume"
    if line:
        raise UserError(line) from None
