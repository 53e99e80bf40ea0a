"""A training run's folder: its log, bar, previews, checkpoints, and how it stops and goes on."""

import csv
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
from tqdm import tqdm

from common import checkpoint
from common.device import Precision, autocast, hardware, pick_device
from common.errors import UserError


@dataclass
class RunOptions:
    """What every training run can be told.

    Args:
        output_dir: folder of the run's files; output/ in the lesson's folder unless given.
        resume: a checkpoint to go on from; --resume alone means the latest in output_dir.
        seed: of the weights, the order of the images, the times and the noise.
        device: auto, cpu, cuda, cuda:1, mps.
        precision: of the network's arithmetic; auto is bfloat16 where the hardware has it.
        compile: let torch.compile build faster code first, for a minute or more.
        log_every: steps between rows of metrics.csv.
        preview_every: steps between previews.
        num_previews: images in a preview.
        checkpoint_every: steps between checkpoints; the last two are kept.
    """

    output_dir: str | None = None
    resume: str | None = None
    seed: int = 0
    device: str = "auto"
    precision: Precision = "auto"
    compile: bool = False
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

    Args:
        options: the flags of every run.
        folder: of the lesson; output/ goes there unless options.output_dir is given.
        lesson: its name, kept in checkpoints.
    """

    def __init__(self, options: RunOptions, folder: Path, lesson: str) -> None:
        names = ("log_every", "preview_every", "num_previews", "checkpoint_every")
        check(lambda value: value >= 1, "at least 1", **{n: getattr(options, n) for n in names})
        self.options, self.lesson = options, lesson
        self.device = pick_device(options.device)
        self.folder = Path(options.output_dir) if options.output_dir else folder / "output"
        self.resumed: checkpoint.Checkpoint | None = None
        if options.resume:
            path = find_checkpoint(options.resume, self.folder)
            self.resumed = checkpoint.load(path, lesson)
            if "training" not in self.resumed:
                raise UserError(f"{path} was made for sampling only: training cannot go on from it")
        open_folder(self.folder, fresh=self.resumed is None)
        self.start = self.step = self.resumed["step"] if self.resumed else 0
        self.metrics = self.folder / "metrics.csv"
        self.config: dict[str, Any] = {}
        self.dataset = ""
        self.tracked: dict[str, Any] = {}
        self.stopped_by: int | None = None
        self.sums = torch.zeros(2, 4, dtype=torch.float64)
        self.scalars: dict[str, float] = {}
        self.count = 0
        self.looked = 0.0  # seconds
        torch.manual_seed(options.seed)

    def __enter__(self) -> Self:
        self.handlers = {s: signal.signal(s, self.heed) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def heed(self, number: int, frame: FrameType | None) -> None:
        self.stopped_by = number

    def prepare(self, model: nn.Module) -> nn.Module:
        """The network on the device, its convolutions in the layout that is fastest there."""
        model = model.to(self.device).to(memory_format=torch.channels_last)
        if self.options.compile:
            model.compile()
        return model

    def autocast(self) -> AbstractContextManager[None]:
        return autocast(self.device, self.options.precision)

    @contextmanager
    def looking(self, seed: int = 1) -> Iterator[None]:
        """For previews and held-out losses: no gradients, the same random numbers every time, and
        the run's own random numbers untouched."""
        devices = [self.device] if self.device.type == "cuda" else []
        start = time.perf_counter()
        with torch.random.fork_rng(devices), torch.no_grad(), self.autocast():
            torch.manual_seed(seed)
            yield
        self.looked += time.perf_counter() - start

    def track(self, config: dict[str, Any], dataset: str, **state: Any) -> None:
        """Say what the checkpoints hold; if the run is resumed, restore it from there.

        Args:
            config: every parameter of the script, by name.
            dataset: the name of the data.
            state: whatever has state_dict and load_state_dict, `ema` among them.
        """
        flags = {**config, **asdict(self.options)}
        left_out = {"options", "resume", "output_dir"}
        self.config = plain({k: v for k, v in flags.items() if k not in left_out})
        self.dataset, self.tracked = dataset, state
        if self.resumed is None:
            return
        if self.resumed["dataset"] != dataset:
            raise UserError(
                f"the run to resume was trained on {self.resumed['dataset']}, but the data at hand "
                f"is {dataset}: give --dataset and --data_dir as before"
            )
        training = self.resumed["training"]
        try:
            for name, part in state.items():
                part.load_state_dict(self.resumed["ema"] if name == "ema" else training[name])
            torch.set_rng_state(training["rng"])
            if self.device.type == "cuda" and "cuda_rng" in training:
                torch.cuda.set_rng_state(training["cuda_rng"], self.device)
            self.sums.copy_(training["sums"])
            self.scalars, self.count = training["scalars"], training["count"]
        except (KeyError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"the checkpoint does not fit this run's flags ({reason})") from None
        keep_rows(self.metrics, self.start)
        self.say(f"Going on from step {self.start:,}")

    def say(self, text: str) -> None:
        """To the screen and to log.txt."""
        tqdm.write(text)
        with (self.folder / "log.txt").open("a", encoding="utf-8") as log:
            log.write(text + "\n")

    def describe(self, name: str, model: nn.Module, images: object) -> None:
        parameters = sum(p.numel() for p in model.parameters())
        with self.autocast():
            precision = "bfloat16" if torch.is_autocast_enabled(self.device.type) else "float32"
        self.say(f"{name}, {parameters:,} parameters, on {images}")
        self.say(
            f"{self.device.type}: {hardware(self.device)}, {precision}; files in {self.folder}"
        )

    def steps(self, num_training_steps: int) -> Iterator[int]:
        """The steps still to do, counted from 1, behind a bar; saves where it is due."""
        check(lambda value: value >= 1, "at least 1", num_training_steps=num_training_steps)
        self.last_step = num_training_steps
        self.clock = began = time.perf_counter()
        steps = range(self.start + 1, num_training_steps + 1)
        self.bar = tqdm(
            steps, initial=self.start, total=num_training_steps, unit="step", smoothing=0.05
        )
        for step in self.bar:
            self.step = step
            yield step
            if self.stopped_by is not None:
                self.stop()
            if self.due("checkpoint"):
                self.save()
        self.bar.close()
        self.release()  # all is saved: from here on Ctrl-C just ends the script
        seconds = max(time.perf_counter() - began, 1e-9)
        share = f"{100 * self.looked / seconds:.1f} %"
        self.say(f"Trained for {seconds:.0f} s, {share} of them for previews and held-out losses")

    def due(self, what: str) -> bool:
        """Whether a row of the log, a preview or a checkpoint is due after this step."""
        every = getattr(self.options, f"{what}_every")
        return self.step % every == 0 or self.step == self.last_step

    def record(
        self, losses: Tensor, t: Tensor, num_timesteps: int, **scalars: float | Tensor
    ) -> None:
        """Take up one step's losses (B,) at times t (B,) and any further figures.

        Raises UserError where one of them is not finite; the checkpoints are then as they were.
        """
        losses, t = losses.detach().cpu().double(), t.cpu()
        quarter = (t - 1) * 4 // num_timesteps
        self.sums.index_add_(1, quarter, torch.stack([losses, torch.ones_like(losses)]))
        self.count += 1
        scalars = {"loss": losses.mean(), **scalars}
        for name, value in scalars.items():
            if not math.isfinite(value := float(value)):
                bad = quarter[~losses.isfinite()].tolist()
                where = f", at t in quarter {bad[0] + 1} of 4" if bad else ""
                raise UserError(
                    f"{name} became {value} at step {self.step}{where}; {self.last_good()}. "
                    "Try a lower --learning_rate, or --precision float32"
                )
            self.scalars[name] = self.scalars.get(name, 0.0) + value
        if not hasattr(self, "smooth"):
            self.smooth = float(scalars["loss"])
        self.smooth += 0.02 * (float(scalars["loss"]) - self.smooth)
        if self.step % 10 == 0:
            self.bar.set_postfix_str(f"loss {self.smooth:.4f}", refresh=False)

    def latest(self) -> Path:
        return saved(self.folder)[-1]

    def last_good(self) -> str:
        kept = saved(self.folder)
        return f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint was saved yet"

    def log(self, batch_size: int, **figures: float | Tensor) -> None:
        """A row of metrics.csv: the means since the last one, and figures taken now."""
        means = {name: total / self.count for name, total in self.scalars.items()}
        quarters = (self.sums[0] / self.sums[1]).tolist()  # nan where no t fell into the quarter
        now = time.perf_counter()
        row: dict[str, Any] = {"step": self.step, "loss": means.pop("loss")}
        row |= {f"loss_quarter_{k + 1}": value for k, value in enumerate(quarters)}
        row |= {name: float(value) for name, value in figures.items()} | means
        row["images_per_second"] = batch_size * min(self.count, self.step - self.start)
        row["images_per_second"] /= max(now - self.clock, 1e-9)
        append_row(self.metrics, row)
        self.clock, self.count, self.scalars = now, 0, {}
        self.sums.zero_()

    def save(self) -> Path:
        """A checkpoint of this step; then all but the last two go."""
        path = self.folder / f"checkpoint_{self.step:06d}.pt"
        training: dict[str, Any] = {
            name: part.state_dict() for name, part in self.tracked.items() if name != "ema"
        }
        training |= {"rng": torch.get_rng_state(), "sums": self.sums}
        training |= {"scalars": self.scalars, "count": self.count}
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
        path = self.save()
        self.say(f"Stopped after step {self.step:,}; saved {path}")
        where = f" --output_dir {self.options.output_dir}" if self.options.output_dir else ""
        self.say(f"To go on: the same command with --resume{where}")
        raise SystemExit(128 + (self.stopped_by or 0))


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


def plain(value: Any) -> Any:
    """Only what a checkpoint may hold and YAML can show: dicts, lists, strings and numbers."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def saved(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder, oldest first."""
    return sorted(folder.glob("checkpoint_*.pt"))


def find_checkpoint(resume: str, folder: Path) -> Path:
    if resume != "latest":
        return Path(resume)
    if not saved(folder):
        raise UserError(f"{folder} holds no checkpoint to resume: start without --resume")
    return saved(folder)[-1]


def open_folder(folder: Path, fresh: bool) -> None:
    """Make the folder; refuse one that holds a run already, or that cannot be written."""
    if fresh and (saved(folder) or (folder / "metrics.csv").exists()):
        raise UserError(
            f"{folder} holds a run already: go on with it by --resume, name another --output_dir, "
            "or remove it"
        )
    checkpoint.make_folder(folder)


def append_row(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row), lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow({k: v if isinstance(v, int) else f"{v:.6g}" for k, v in row.items()})


def keep_rows(path: Path, step: int) -> None:
    """Drop the rows behind a step: they are written anew."""
    if not path.exists():
        return
    with path.open(newline="") as file:
        header, *rows = list(csv.reader(file))
    kept = [row for row in rows if row and int(row[0]) <= step]
    text = "\n".join(",".join(row) for row in [header, *kept]) + "\n"
    checkpoint.write_whole(path, text.encode())
