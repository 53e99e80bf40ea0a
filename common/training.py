"""A training run: its folder, log, previews and checkpoints, and how it stops and resumes."""

import math
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common import checkpoint, device, distributed
from common.checkpoint import Checkpoint, find_checkpoint, saved, step_of
from common.data import Batches, Images, load_images
from common.ema import Ema
from common.errors import UserError, one_line
from common.files import (
    ROOT,
    append_row,
    keep_rows,
    lock_folder,
    make_folder,
    remove_unfinished,
)
from common.options import TrainingOptions

N = TypeVar("N", bound=nn.Module)


class Run:
    """One training run, as a context around its loop.

        with Run("lesson_05", options) as run:
            data, batches = run.load_data()
            ...                                             # build everything on run.device
            run.track({"network": network}, model=model, ema=ema, optimizer=optimizer)
            for step in run.steps():
                ...

    Ctrl-C and SIGTERM end it after the current step: it saves a checkpoint, says how to go on, and
    exits with code 130 or 143. Of several processes (torchrun) process 0 alone writes and prints.

    Args:
        lesson: its name, which is kept in checkpoints.
        options: the flags.
    """

    def __init__(self, lesson: str, options: TrainingOptions) -> None:
        self.lesson, self.options = lesson, options
        self.lesson_dir = ROOT.joinpath(*lesson.split("."))
        self.device = distributed.own_device(device.pick_device(options.device))
        self.folder = Path(options.output_dir or self.lesson_dir / "output")
        self.resumed = self.load_resumed()
        self.start = self.step = self.resumed.step if self.resumed else 0
        self.totals: dict[str, float] = {}  # sums of what was recorded since the last row
        self.counts: dict[str, float] = {}
        self.stop_signal = self.num_bad_steps = 0
        self.evaluation_seconds = 0.0
        self.is_evaluating = False
        torch.manual_seed(options.seed)

    def load_resumed(self) -> Checkpoint | None:
        resume = self.options.resume
        path = find_checkpoint(resume, self.folder) if resume else None
        if path is None:
            return None
        resumed = checkpoint.load(path, self.lesson)
        if resumed.training is None:
            raise UserError(f"{path} was made for sampling only: start a new run by --start_from")
        if later := [file.name for file in saved(self.folder) if step_of(file) > resumed.step]:
            raise UserError(
                f"{self.folder} holds later checkpoints ({later[-1]}), which a run resumed from "
                f"{path} would replace: name another --output_dir, or remove them"
            )
        return resumed

    def __enter__(self) -> Self:
        distributed.init(self.device)
        self.lock, self.metrics = None, self.folder / "metrics.csv"
        if distributed.rank() == 0:
            if not self.options.resume and (saved(self.folder) or self.metrics.exists()):
                raise UserError(
                    f"{self.folder} holds a run already: --resume goes on with it; or name another "
                    "--output_dir, or remove it"
                )
            make_folder(self.folder)
            self.lock = lock_folder(self.folder)
            remove_unfinished(self.folder, "checkpoint_*")
            remove_unfinished(self.folder, self.metrics.name)
            self.remove_old_checkpoints()
        self.handlers = {
            number: signal.signal(number, lambda number, _: setattr(self, "stop_signal", number))
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.restore_signals()
        if self.lock is not None:
            self.lock.release()
        if error is not None and not isinstance(error, UserError):
            translate_error(self, error)

    def restore_signals(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def last_checkpoint(self) -> str:
        files = saved(self.folder)
        return f"the last checkpoint is {files[-1]}" if files else "no checkpoint was saved yet"

    def load_data(self) -> tuple[Images, Batches]:
        """The data set, and `batches[step]`: images x0 (B, C, H, W) in [-1, 1] and labels (B,)."""
        options, count = self.options, distributed.world_size()
        self.data = data = load_images(options.dataset, options.data_dir)
        if self.resumed and self.resumed.dataset != data.name:
            raise UserError(
                f"the run to resume was trained on {self.resumed.dataset}, but the data found now "
                f"is {data.name}: add --dataset and --data_dir as before"
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
        return data, batches

    def prepare(self, model: N) -> N:
        """The network on the device, its convolutions in the layout that is fastest there."""
        model = model.to(self.device).to(memory_format=torch.channels_last)
        if self.options.compile:
            model.compile()
        return model

    def track(self, config: dict[str, Any], **state: Any) -> None:
        """Say what checkpoints hold, and restore it on --resume; apply --start_from.

        Args:
            config: what is needed, besides the options, to build the network again.
            state: the model, ema and optimizer, and further modules, by name.
        """
        self.config, self.tracked = {**asdict(self.options), **config}, state
        initialise_state(state["optimizer"])
        paths_and_device = {*checkpoint.PATHS, "device"}
        same = {name: v for name, v in self.config.items() if name not in paths_and_device}
        distributed.check_agreement({"data": self.data.name, "first step": self.start, **same})
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
            self.restore(self.resumed)
            self.say(f"Resumed after step {self.start:,}")
        elif self.options.start_from:
            initial = checkpoint.load(self.options.start_from, self.lesson)
            initial.fill(state["model"])
            initial.fill(state["ema"].module)
            self.say(f"Weights of {initial.source}, trained for {initial.step:,} steps")

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint holds but the random states: the run's own tensors, not copies."""
        return state_tensors(**self.tracked)

    def scalars(self) -> dict[str, Any]:
        names = ("totals", "counts", "num_bad_steps")
        return {name: getattr(self, name) for name in names}

    def random_states(self) -> dict[str, Tensor]:
        states = device.random_states(self.device)
        return {f"rng.{name}": state for name, state in states.items()}

    def restore(self, resumed: Checkpoint) -> None:
        """Go on from a checkpoint, once it is known to hold just what this run would save."""
        tensors, random = self.tensors(), self.random_states()
        checkpoint.check_template(resumed, {**tensors, **random}, self.scalars())
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(resumed.tensors[name])  # in place: layouts stay what they are
        states = {name.removeprefix("rng."): resumed.tensors[name] for name in random}
        with resumed.must_fit():
            device.set_random_states(self.device, states)
        for name, value in (resumed.training or {}).items():
            setattr(self, name, value)

    def save(self) -> Path:
        """Write a checkpoint of this step, then remove all but the last two."""
        path = self.folder / f"checkpoint_{self.step:06d}.safetensors"
        tensors = self.tensors() | self.random_states()
        content = (self.lesson, self.config, self.data.name, self.step, tensors, self.scalars())
        checkpoint.save(path, Checkpoint(*content))
        self.remove_old_checkpoints()
        return path

    def remove_old_checkpoints(self) -> None:
        for old in saved(self.folder)[:-2]:
            old.unlink(missing_ok=True)

    def say(self, text: str) -> None:
        """Print a line, and add it to log.txt."""
        if distributed.rank() == 0:
            tqdm.write(text)
            with (self.folder / "log.txt").open("a", encoding="utf-8") as log:
                log.write(text + "\n")

    def distribute(self, model: nn.Module) -> nn.Module:
        """The network to train: the model itself, unless torchrun or --accumulate divides the
        batch. Its gradients are those of the whole batch."""
        if self.options.accumulate > 1:
            model = distributed.Microbatches(model, self.options.accumulate)
        if distributed.world_size() == 1:
            return model
        ids = [self.device] if self.device.type == "cuda" else None
        return distributed.DataParallel(model, device_ids=ids)

    def steps(self) -> Iterator[int]:
        """The steps still to do, counted from 1, with a bar. Saves checkpoints on the way."""
        last, hidden = self.options.num_training_steps, distributed.rank() > 0
        self.began, self.logged_seconds = time.perf_counter(), 0.0
        steps = range(self.start + 1, last + 1)
        bar = {"initial": self.start, "total": last, "unit": "step", "smoothing": 0.05}
        self.bar = tqdm(steps, disable=hidden, **bar)
        for step in self.bar:
            self.step = step
            yield step
            self.stop_signal = distributed.all_reduce_max(self.stop_signal)
            if self.stop_signal:
                self.stop()
            if self.due("checkpoint"):
                self.save()
        self.bar.close()
        self.restore_signals()  # all is saved: from here on Ctrl-C just ends the script
        distributed.leave()
        if distributed.rank() > 0:
            raise SystemExit(0)  # process 0 does the rest
        seconds = time.perf_counter() - self.began
        percent = 100 * self.evaluation_seconds / max(seconds, 1e-9)
        self.say(f"Trained for {seconds:.0f} s, {percent:.1f} % of them for previews and logs")

    def stop(self) -> None:
        """Save, say how to go on, and exit."""
        self.bar.close()
        if distributed.rank() == 0:
            self.say(f"Stopped after step {self.step:,}; saved {self.save()}")
            where = f" --output_dir {self.options.output_dir}" if self.options.output_dir else ""
            self.say(f"To go on: the same command with --resume{where}")
        distributed.leave()
        raise SystemExit(128 + self.stop_signal)

    def due(self, what: str) -> bool:
        """Whether this process has to write a "log" row, "preview" or "checkpoint" at this step."""
        every = getattr(self.options, f"{what}_every")
        now = self.step % every == 0 or self.step == self.options.num_training_steps
        return now and distributed.rank() == 0

    @property
    def learning_rate(self) -> float:
        """Of the current step."""
        return self.options.learning_rate_at(self.step)

    def autocast(self) -> AbstractContextManager[None]:
        return device.autocast(self.device, self.options.precision)

    def shard(self, *batch: Tensor) -> tuple[Tensor, ...]:
        """This process's rows of each tensor: all of them, unless torchrun started several."""
        return distributed.shard(*batch)

    def gather(self, rows: Tensor) -> Tensor:
        """The values (B,) of the whole batch from those of this process's rows, detached."""
        return distributed.gather(rows)

    def is_finite(self, losses: Tensor, t: Tensor, grad_norm: Tensor) -> bool:
        """Whether the step can be taken. If not it counts as bad.

        Raises:
            UserError: there were more than max_bad_steps; weights and checkpoints are unharmed.
        """
        values = {"loss": float(losses.mean()), "grad_norm": float(grad_norm)}
        bad = [f"{name} became {v}" for name, v in values.items() if not math.isfinite(v)]
        if not bad:
            return True
        worst = losses.nan_to_num(nan=math.inf).argmax()
        quarter = int((t[worst] - 1) * 4 // self.options.num_timesteps) + 1
        what = f"{bad[0]} at step {self.step} (worst at t in quarter {quarter} of 4)"
        self.num_bad_steps += 1
        allowed = self.options.max_bad_steps
        if self.num_bad_steps > allowed:
            advice = "Try a lower --learning_rate, or --precision float32"
            raise UserError(f"{what}; {self.last_checkpoint()}. {advice}")
        self.say(f"{what}: step skipped, {self.num_bad_steps} of {allowed} allowed")
        return False

    def record(self, losses: Tensor, t: Tensor, **scalars: float | Tensor) -> None:
        """Add a step's losses (B,) at times t (B,), and further figures, to the means of the next
        row of metrics.csv. A step that is not finite is left out."""
        values = {"loss": losses.mean(), **scalars}
        if not all(math.isfinite(value) for value in values.values()):
            return
        quarter = (t - 1) * 4 // self.options.num_timesteps
        columns = {name: torch.as_tensor(value).view(1) for name, value in values.items()}
        columns |= {f"loss_quarter_{k + 1}": losses[quarter == k] for k in range(4)}
        for name, value in columns.items():
            self.totals[name] = self.totals.get(name, 0.0) + float(value.double().sum())
            self.counts[name] = self.counts.get(name, 0.0) + len(value)
        if self.step % 10 == 0:
            mean = self.totals["loss"] / self.counts["loss"]
            self.bar.set_postfix_str(f"loss {mean:.4f}", refresh=False)

    def log(self, **figures: float | Tensor) -> None:
        """A row of metrics.csv: the means since the last one, and figures measured now."""
        if not self.counts:
            return  # every step since the last row was skipped
        counts = sorted(self.counts.items())  # in one order, also after --resume
        means = {name: self.totals[name] / (n or math.nan) for name, n in counts}
        seconds = time.perf_counter() - self.began - self.evaluation_seconds
        images = self.options.batch_size * min(self.counts["loss"], self.step - self.start)
        row = {"step": self.step, **means, **{name: float(v) for name, v in figures.items()}}
        row["images_per_second"] = images / max(seconds - self.logged_seconds, 1e-9)
        append_row(self.metrics, row)
        self.logged_seconds, self.totals, self.counts = seconds, {}, {}

    @contextmanager
    def evaluating(self, seed: int = 1) -> Iterator[None]:
        """For previews and held-out losses: no gradients, the same random numbers every time, and
        the run's own random numbers untouched."""
        start, self.is_evaluating = time.perf_counter(), True
        with device.forked_rng(self.device, seed), torch.no_grad(), self.autocast():
            yield
        self.evaluation_seconds += time.perf_counter() - start
        self.is_evaluating = False

    def finish(self, script: str, *flags: str) -> None:
        """Say where the pictures are, and which command of the lesson draws more samples."""
        files = sorted(p.name for p in self.folder.iterdir() if p.suffix in (".png", ".gif"))
        names = ", ".join(name for name in files if not name.startswith("samples_"))
        self.say(f"Pictures in {self.folder}: samples_*.png while training, {names}")
        paths = [str(self.lesson_dir / script), *flags, "--model_checkpoint"]
        paths.append(str(saved(self.folder)[-1].absolute()))
        words = [word.removeprefix(f"{Path.cwd()}/") for word in paths]
        self.say(f"More samples: {shlex.join([sys.executable, *words])}")


def translate_error(run: Run, error: BaseException) -> None:
    """Raise UserError, one line, for what can end a run without a mistake in the code."""
    options, reason, line = run.options, one_line(error, 200), ""
    if isinstance(error, OSError):
        name = f" ({error.filename})" if error.filename else ""
        line = f"{error.strerror or reason}{name}; {run.last_checkpoint()}"
    elif isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in reason:
        less = f"--batch_size {max(options.batch_size // 2, 1)}"
        less += f", or --accumulate {2 * options.accumulate}"
        less = f"--num_previews {options.num_previews // 2}" if run.is_evaluating else less
        line = f"out of memory at step {run.step}: try {less}"
    elif options.compile and type(error).__module__.startswith("torch._"):
        line = f"--compile true does not work here ({reason}): omit it"
    elif distributed.is_lost_peer(error):
        line = f"another process of this run has ended, so this one stops at step {run.step}; "
        line += f"{run.last_checkpoint()}. To go on: the same command with --resume"
    if line:
        raise UserError(line) from None


def state_tensors(
    model: nn.Module, ema: Ema, optimizer: torch.optim.Optimizer, **modules: nn.Module
) -> dict[str, Tensor]:
    """The tensors of a run, by the names that they have in a checkpoint."""
    tensors = {"num_ema_updates": ema.n_averaged}
    for name, module in {"model": model, "ema": ema.module, **modules}.items():
        tensors |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{name}.{key}"] = value
    return tensors


def initialise_state(optimizer: torch.optim.Optimizer) -> None:
    """Make the optimiser's state, which it makes by itself only in its first step: all zeros, in
    the memory layout of the parameters. Then --resume can compare a file with it, and fill it."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # so that this step changes nothing; the loop sets the rate
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for state in optimizer.state.values():
        state["step"].zero_()
