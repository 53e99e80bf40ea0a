"""A training run's folder: its log, bar, previews, checkpoints, and how it stops and goes on."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from common import checkpoint, processes
from common.device import Precision, autocast, hardware, pick_device
from common.errors import UserError
from common.folder import append_row, find_checkpoint, keep_rows, open_folder, saved, step_of

COMPILER = ("torch._inductor", "torch._dynamo")  # where the errors of torch.compile come from


@dataclass
class RunOptions:
    """What every training run can be told.

    Args:
        output_dir: folder of the run's files; output/ in the lesson's folder unless given.
        resume: a checkpoint to go on from; --resume alone means the latest in output_dir.
        start_from: a checkpoint, or a small one as the lessons ship it, whose weights a new run
            starts with; all else starts anew. On --resume this has been done.
        seed: of the weights, the order of the images, the times and the noise.
        device: auto, cpu, cuda, cuda:1, mps.
        precision: of the network's arithmetic; auto is bfloat16 where the hardware has it.
        compile: let torch.compile build faster code first, for a minute or more.
        accumulate: parts that a batch is cut into, one after the other, where memory is short.
        max_bad_steps: steps to leave out, over the run, whose loss or gradient is not finite.
        log_every: steps between rows of metrics.csv.
        preview_every: steps between previews.
        num_previews: images in a preview.
        checkpoint_every: steps between checkpoints; the last two are kept.
    """

    output_dir: str | None = None
    resume: str | None = None
    start_from: str | None = None
    seed: int = 0
    device: str = "auto"
    precision: Precision = "auto"
    compile: bool = False
    accumulate: int = 1
    max_bad_steps: int = 0
    log_every: int = 100
    preview_every: int = 500
    num_previews: int = 64
    checkpoint_every: int = 500


class Run:
    """One training run, as a context around its loop.

        with Run(options, folder, "lesson_05") as run:
            ...                                         # build everything on run.device
            run.track(config, data.name, model=model, ema=ema, ...)     # restored here on --resume
            for step in run.steps(num_training_steps):
                ...
                run.record(losses, t, grad_norm=grad_norm)

    Ctrl-C and SIGTERM are heeded after the step at hand: checkpoint, a line, exit code 130 or 143.
    Started by torchrun, all processes take these steps together; process 0 alone writes and speaks.

    Args:
        options: the flags of every run.
        folder: of the lesson; output/ goes there unless options.output_dir is given.
        lesson: its name, kept in checkpoints.
    """

    def __init__(self, options: RunOptions, folder: Path, lesson: str) -> None:
        names = ("log_every", "preview_every", "num_previews", "checkpoint_every", "accumulate")
        check(lambda value: value >= 1, "at least 1", **{n: getattr(options, n) for n in names})
        check(lambda value: value >= 0, "at least 0", max_bad_steps=options.max_bad_steps)
        self.options, self.lesson = options, lesson
        self.home = folder
        self.device = processes.own_device(pick_device(options.device))
        self.folder = Path(options.output_dir) if options.output_dir else folder / "output"
        self.resumed: checkpoint.Checkpoint | None = None
        if options.resume:
            path = find_checkpoint(options.resume, self.folder)
            self.resumed = checkpoint.load(path, lesson)
            if "training" not in self.resumed:
                raise UserError(
                    f"{path} was made for sampling only: --start_from begins a new run with it"
                )
            later = [kept for kept in saved(self.folder) if step_of(kept) > self.resumed["step"]]
            if later:
                raise UserError(
                    f"{self.folder} holds later checkpoints ({later[-1].name}), which a run that "
                    f"goes on from {path} would replace: name another --output_dir, or remove them"
                )
        self.given: checkpoint.Checkpoint | None = None
        if options.start_from and not self.resumed:
            self.given = checkpoint.load(options.start_from, lesson)
        self.start = self.step = self.resumed["step"] if self.resumed else 0
        self.metrics = self.folder / "metrics.csv"
        self.config: dict[str, Any] = {}
        self.dataset = ""
        self.tracked: dict[str, Any] = {}
        self.stopped_by = 0  # the number of a signal
        self.sums = torch.zeros(2, 4, dtype=torch.float64)
        self.scalars: dict[str, float] = {}
        self.count = self.bad_steps = 0
        self.looked = self.looked_before = 0.0  # seconds: up to now, and up to the last row
        self.looks_since: float | None = None
        torch.manual_seed(options.seed)

    def __enter__(self) -> Self:
        processes.join(self.device)
        self.lock, self.again = None, processes.restarted(self.folder)
        if processes.rank() == 0:
            self.lock = open_folder(self.folder, fresh=self.resumed is None and not self.again)
        self.handlers = {s: signal.signal(s, self.heed) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.release()
        try:
            self.explain(error)
        finally:
            if self.lock is not None:
                self.lock.release()

    def release(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def explain(self, error: BaseException | None) -> None:
        """Say in one line what a run can end of that is nobody's mistake in the code."""
        if error is None or isinstance(error, UserError):
            return
        if isinstance(error, OSError):
            name = f" ({error.filename})" if error.filename else ""
            raise UserError(f"{error.strerror or error}{name}; {self.last_good()}") from None
        if is_out_of_memory(error):
            raise UserError(f"out of memory at step {self.step}: {self.less_memory()}") from None
        if self.options.compile and type(error).__module__.startswith(COMPILER):
            reason = checkpoint.in_a_line(error)
            raise UserError(f"--compile true does not work here ({reason}): leave it out") from None
        if processes.lost(error):
            raise UserError(
                f"another process of this run has ended, so this one stops at step {self.step}; "
                f"{self.last_good()}. To go on: the same command with --resume"
            ) from None

    def less_memory(self) -> str:
        if self.looks_since is not None:
            return f"try --num_previews {max(1, self.options.num_previews // 2)}"
        B, parts = self.config.get("batch_size", 1), self.options.accumulate
        if 2 * parts > B:
            return "try a smaller network"
        return f"try --batch_size {B // 2}, or --accumulate {2 * parts}"

    def heed(self, number: int, frame: FrameType | None) -> None:
        self.stopped_by = number

    def prepare(self, model: nn.Module) -> nn.Module:
        """The network on the device, its convolutions in the layout that is fastest there."""
        model = model.to(self.device).to(memory_format=torch.channels_last)
        if self.options.compile:
            model.compile()
        return model

    def parallel(self, model: nn.Module) -> nn.Module:
        """The network to compute the loss with: the model itself, or where torchrun started several
        processes or --accumulate is given, one that answers the same, part by part."""
        if self.options.accumulate > 1:
            model = processes.InParts(model, self.options.accumulate)
        return processes.Share(model, self.device) if processes.count() > 1 else model

    def autocast(self) -> AbstractContextManager[None]:
        return autocast(self.device, self.options.precision)

    @contextmanager
    def looking(self, seed: int = 1) -> Iterator[None]:
        """For previews and held-out losses: no gradients, the same random numbers every time, and
        the run's own random numbers untouched."""
        devices = [self.device] if self.device.type == "cuda" else []
        self.looks_since = time.perf_counter()
        with torch.random.fork_rng(devices), torch.no_grad(), self.autocast():
            torch.manual_seed(seed)
            yield
        self.looked, self.looks_since = self.seconds_of_looking(), None

    def seconds_of_looking(self) -> float:
        since = self.looks_since
        return self.looked + (0.0 if since is None else time.perf_counter() - since)

    def track(self, config: dict[str, Any], dataset: str, **state: Any) -> None:
        """Say what the checkpoints hold; if the run is resumed or begins with the weights of
        another, take them from there.

        Args:
            config: every parameter of the script, by name.
            dataset: the name of the data.
            state: whatever has state_dict and load_state_dict, `ema` among them.
        """
        flags = {**config, **asdict(self.options)}
        left_out = {"options", "resume", "output_dir"}
        self.config = plain({k: v for k, v in flags.items() if k not in left_out})
        self.dataset, self.tracked = dataset, state
        checkpoint.check_writable(self.config, dataset)
        same = {k: v for k, v in self.config.items() if k != "device"}
        processes.agree({"dataset": dataset, "first step": self.start, **same})
        processes.sign(self.folder)
        if processes.rank() == 0 and (self.resumed or self.again):
            keep_rows(self.metrics, self.start)
        if self.given:
            self.begin_with(self.given, state["model"], state["ema"].module)
        if self.resumed is None:
            return
        if self.resumed["dataset"] != dataset:
            raise UserError(
                f"the run to resume was trained on {self.resumed['dataset']}, but the data at hand "
                f"is {dataset}: give --dataset and --data_dir as before"
            )
        training = self.resumed["training"]
        rates = list(state["schedule"].base_lrs) if "schedule" in state else []
        try:
            for name, part in state.items():
                part.load_state_dict(self.resumed["ema"] if name == "ema" else training[name])
            torch.set_rng_state(training["rng"])
            if self.device.type == "cuda" and "cuda_rng" in training:
                torch.cuda.set_rng_state(training["cuda_rng"], self.device)
            self.sums.copy_(training["sums"])
            self.scalars, self.count = training["scalars"], training["count"]
            self.bad_steps = training.get("bad_steps", 0)
            if rates:
                set_rates(state["schedule"], rates)
        except (KeyError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"the checkpoint does not fit this run's flags ({reason})") from None
        self.say(f"Going on from step {self.start:,}")

    def begin_with(
        self, given: checkpoint.Checkpoint, model: nn.Module, averaged: nn.Module
    ) -> None:
        """The averaged weights of another run, for the network and for its average."""
        try:
            model.load_state_dict(checkpoint.load_weights(averaged, given).state_dict())
        except RuntimeError as error:
            raise UserError(
                f"{self.options.start_from} holds another network than this run's flags describe "
                f"({checkpoint.in_a_line(error)})"
            ) from None
        self.say(f"Beginning with {self.options.start_from}, trained for {given['step']:,} steps")

    def say(self, text: str) -> None:
        """To the screen and to log.txt."""
        if processes.rank() > 0:
            return
        tqdm.write(text)
        with (self.folder / "log.txt").open("a", encoding="utf-8") as log:
            log.write(text + "\n")

    def describe(self, name: str, model: nn.Module, images: object) -> None:
        parameters = sum(p.numel() for p in model.parameters())
        with self.autocast():
            precision = "bfloat16" if torch.is_autocast_enabled(self.device.type) else "float32"
        self.say(f"{name}, {parameters:,} parameters, on {images}")
        many = f"{processes.count()} processes, each on " if processes.count() > 1 else ""
        place = f"{many}{self.device.type}: {hardware(self.device)}"
        self.say(f"{place}, {precision}; files in {self.folder}")

    def steps(self, num_training_steps: int) -> Iterator[int]:
        """The steps still to do, counted from 1, behind a bar; saves where it is due."""
        check(lambda value: value >= 1, "at least 1", num_training_steps=num_training_steps)
        self.last_step = num_training_steps
        self.clock = began = time.perf_counter()
        steps = range(self.start + 1, num_training_steps + 1)
        self.bar = tqdm(
            steps,
            initial=self.start,
            total=num_training_steps,
            unit="step",
            smoothing=0.05,
            disable=processes.rank() > 0,
        )
        for step in self.bar:
            self.step = step
            yield step
            self.stopped_by = processes.largest(self.stopped_by)
            if self.stopped_by:
                self.stop()
            if self.due("checkpoint"):
                self.save()
        self.bar.close()
        self.release()  # all is saved: from here on Ctrl-C just ends the script
        processes.leave()
        if processes.rank() > 0:
            raise SystemExit(0)  # what is left to do, process 0 does
        seconds = max(time.perf_counter() - began, 1e-9)
        share = f"{100 * self.looked / seconds:.1f} %"
        self.say(f"Trained for {seconds:.0f} s, {share} of them for previews and held-out losses")

    def due(self, what: str) -> bool:
        """Whether a row of the log, a preview or a checkpoint is due after this step, from us."""
        every = getattr(self.options, f"{what}_every")
        now = self.step % every == 0 or self.step == self.last_step
        return now and processes.rank() == 0

    def record(
        self, losses: Tensor, t: Tensor, num_timesteps: int, **scalars: float | Tensor
    ) -> bool:
        """Take up one step's losses (B,) at times t (B,) and any further figures.

        Whether all are finite: else the step must not be taken. After max_bad_steps of these
        UserError ends the run, whose weights and checkpoints are as they were.
        """
        losses, t = losses.detach().cpu().double(), t.cpu()
        quarter = (t - 1) * 4 // num_timesteps
        figures = {"loss": losses.mean(), **scalars}
        values = {name: float(value) for name, value in figures.items()}
        for name, value in values.items():
            if not math.isfinite(value):
                self.leave_out(f"{name} became {value}", losses, quarter)
                return False
        self.sums.index_add_(1, quarter, torch.stack([losses, torch.ones_like(losses)]))
        self.count += 1
        for name, value in values.items():
            self.scalars[name] = self.scalars.get(name, 0.0) + value
        if not hasattr(self, "smooth"):
            self.smooth = values["loss"]
        self.smooth += 0.02 * (values["loss"] - self.smooth)
        if self.step % 10 == 0:
            self.bar.set_postfix_str(f"loss {self.smooth:.4f}", refresh=False)
        return True

    def leave_out(self, what: str, losses: Tensor, quarter: Tensor) -> None:
        """Count a step that cannot be taken; stop where there were too many."""
        infinite = ~losses.isfinite()
        place = int(infinite.int().argmax() if infinite.any() else losses.argmax())
        which = "" if infinite.any() else "the largest loss being "
        what += f" at step {self.step}, {which}at t in quarter {int(quarter[place]) + 1} of 4"
        self.bad_steps += 1
        most = self.options.max_bad_steps
        if self.bad_steps > most:
            raise UserError(
                f"{what}; {self.last_good()}. Try a lower --learning_rate, or --precision float32"
            )
        self.say(f"{what}: step left out, {self.bad_steps} of {most} that may be")

    def latest(self) -> Path:
        return saved(self.folder)[-1]

    def script(self, name: str) -> str:
        """A script of this lesson, as it is called from the folder at hand."""
        path, here = self.home / name, Path.cwd()
        return str(path.relative_to(here) if path.is_relative_to(here) else path)

    def last_good(self) -> str:
        kept = saved(self.folder)
        return f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint was saved yet"

    def log(self, batch_size: int, **figures: float | Tensor) -> None:
        """A row of metrics.csv: the means since the last one, and figures taken now."""
        if self.count == 0:
            return  # every step since the last row was left out
        means = {name: total / self.count for name, total in self.scalars.items()}
        quarters = (self.sums[0] / self.sums[1]).tolist()  # nan where no t fell into the quarter
        now, looked = time.perf_counter(), self.seconds_of_looking()
        seconds = now - self.clock - (looked - self.looked_before)
        row: dict[str, Any] = {"step": self.step, "loss": means.pop("loss")}
        row |= {f"loss_quarter_{k + 1}": value for k, value in enumerate(quarters)}
        row |= {name: float(value) for name, value in figures.items()} | means
        row["images_per_second"] = batch_size * min(self.count, self.step - self.start)
        row["images_per_second"] /= max(seconds, 1e-9)
        append_row(self.metrics, row)
        self.clock, self.looked_before = now, looked
        self.count, self.scalars = 0, {}
        self.sums.zero_()

    def save(self) -> Path:
        """A checkpoint of this step; then all but the last two go."""
        path = self.folder / f"checkpoint_{self.step:06d}.pt"
        training: dict[str, Any] = {
            name: part.state_dict() for name, part in self.tracked.items() if name != "ema"
        }
        training |= {"rng": torch.get_rng_state(), "sums": self.sums}
        training |= {"scalars": self.scalars, "count": self.count, "bad_steps": self.bad_steps}
        if self.device.type == "cuda":
            training["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        content = {
            "lesson": self.lesson,
            "config": self.config,
            "dataset": self.dataset,
            "step": self.step,
            "ema": self.tracked["ema"].state_dict(),
            "training": training,
        }
        checkpoint.save(path, content)
        for old in saved(self.folder)[:-2]:
            old.unlink(missing_ok=True)
        return path

    def stop(self) -> None:
        """Save, say how to go on, and leave."""
        self.bar.close()
        if processes.rank() == 0:
            path = self.save()
            self.say(f"Stopped after step {self.step:,}; saved {path}")
            where = f" --output_dir {self.options.output_dir}" if self.options.output_dir else ""
            self.say(f"To go on: the same command with --resume{where}")
        processes.leave()
        raise SystemExit(128 + self.stopped_by)


def check(holds: Callable[[float], bool], wanted: str, **values: float) -> None:
    """Refuse, by name, the first value for which something does not hold."""
    for name, value in values.items():
        if not holds(value):
            raise UserError(f"{name} is {value}: it must be {wanted}")


def learning_rate_factor(
    num_training_steps: int, num_warmup_steps: int, decay: bool
) -> Callable[[int], float]:
    """What to multiply the learning rate by at a step: rising, then level or falling to zero."""
    check(lambda value: value >= 1, "at least 1", num_training_steps=num_training_steps)

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / max(num_warmup_steps, 1))
        return rise * max(0.0, 1 - step / num_training_steps) if decay else rise

    return factor


def set_rates(schedule: LambdaLR, rates: list[Any]) -> None:
    """The learning rate of the flags, where a checkpoint has brought that of the run before."""
    schedule.base_lrs = rates
    groups = schedule.optimizer.param_groups
    for group, rate, factor in zip(groups, rates, schedule.lr_lambdas, strict=True):
        group["initial_lr"] = rate
        group["lr"] = rate * factor(schedule.last_epoch)
    schedule._last_lr = [group["lr"] for group in groups]


def plain(value: Any) -> Any:
    """Only what a checkpoint may hold and YAML can show: dicts, lists, strings and numbers."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def is_out_of_memory(error: BaseException) -> bool:
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)
