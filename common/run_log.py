"""What a training run writes for its reader: log.txt, metrics.csv, previews."""

import math
import shlex
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from common import distributed
from common.checkpoint import saved
from common.errors import UserError
from common.files import append_row
from common.options import TrainingOptions
from common.pictures import grid, save_grid
from common.training_state import TrainingState

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

UNSETTLED = 10**9  # num_training_steps of a run with --minutes, until its speed is known


class RunLog:
    """The part of a Run that writes what its reader sees. Only process 0 writes."""

    options: TrainingOptions
    folder: Path
    metrics: Path  # metrics.csv
    lesson_dir: Path
    state: TrainingState
    bar: Any  # tqdm
    writer: Any  # for TensorBoard, or None
    start: int  # the step that the run resumed after
    step: int
    began: float
    evaluation_seconds: float
    logged_seconds: float

    def say(self, text: str, printed: bool = True) -> None:
        """Print a line, and add it to log.txt."""
        if distributed.rank() == 0:
            if printed:
                tqdm.write(text)
            line = f"{text}\n".encode(errors="backslashreplace")  # names may be no UTF-8
            with suppress(OSError), (self.folder / "log.txt").open("ab") as log:
                log.write(line)

    def due(self, what: str) -> bool:
        """Whether this process must write a "log" row, "preview" or "checkpoint" at this step."""
        every = getattr(self.options, f"{what}_every")
        now = self.step % every == 0 or self.step == self.options.num_training_steps
        return now and distributed.rank() == 0

    @property
    def learning_rate(self) -> float:
        """The learning rate of the current step."""
        return self.options.learning_rate_at(self.step)

    def quarter(self, t: Tensor) -> Tensor:
        """1 to 4: the quarter of 1..T that t is in."""
        return (t - 1) * 4 // self.options.num_timesteps + 1

    def record(
        self, losses: Tensor, t: Tensor, by_quarter: Tensor | None = None, **scalars: Tensor
    ) -> None:
        """Add a step to the means in the next row of metrics.csv, unless it has a value that is not
        finite.

        Args:
            losses: (B,), for the column loss.
            t: (B,), their times.
            by_quarter: (B,), for the columns loss_quarter_1 ... 4; the losses unless given.
            scalars: values of further columns.
        """
        values = {"loss": float(losses.mean()), "learning_rate": self.learning_rate}
        values |= {name: float(value) for name, value in scalars.items()}
        if not all(math.isfinite(value) for value in values.values()):
            return
        columns = {name: torch.tensor([value]) for name, value in values.items()}
        parts, quarter = losses if by_quarter is None else by_quarter, self.quarter(t)
        columns |= {f"loss_quarter_{k}": parts[quarter == k].cpu() for k in (1, 2, 3, 4)}
        totals, counts = self.state.scalars["totals"], self.state.scalars["counts"]
        for name, value in columns.items():
            totals[name] = totals.get(name, 0.0) + float(value.double().sum())
            counts[name] = counts.get(name, 0.0) + len(value)
        if self.step % 10 == 0:
            mean = totals["loss"] / counts["loss"]
            self.bar.set_postfix_str(f"loss {mean:.4f}", refresh=False)

    def save_preview(self, images: Tensor, columns: int = 8) -> None:
        """Save a grid of samples as samples_<step>.png, and for TensorBoard."""
        save_grid(self.folder / f"samples_{self.step:06d}.png", images, columns)
        if self.writer:
            picture = np.asarray(grid(images, columns, scale=1))
            self.writer.add_image("samples", picture, self.step, dataformats="HWC")

    def log(self, **figures: float | Tensor) -> None:
        """Write a row of metrics.csv: the means since the last row, and these values."""
        totals, counts = self.state.scalars["totals"], self.state.scalars["counts"]
        if not counts:
            return  # every step since the last row was skipped
        names = sorted(counts)  # in one order, also after --resume
        means = {name: totals[name] / (counts[name] or math.nan) for name in names}
        seconds = time.perf_counter() - self.began - self.evaluation_seconds
        images = self.options.batch_size * min(counts["loss"], self.step - self.start)
        row = {"step": self.step, **means, **{name: float(v) for name, v in figures.items()}}
        row["images_per_second"] = images / max(seconds - self.logged_seconds, 1e-9)
        self.say(self.progress(row), printed=self.bar.disable)
        try:
            append_row(self.metrics, row)
        except OSError as error:  # no log may end a run
            self.say(f"{self.metrics} could not be written ({error.strerror})")
        for name, value in row.items() if self.writer else ():
            self.writer.add_scalar(name, value, self.step)
        self.logged_seconds = seconds
        totals.clear()
        counts.clear()

    def progress(self, row: dict[str, float]) -> str:
        """The line of log.txt for a row of metrics.csv; printed where there is no progress bar."""
        speed, last = row["images_per_second"], self.options.num_training_steps
        of, left = "", ""
        if last != UNSETTLED:
            seconds = (last - self.step) * self.options.batch_size / max(speed, 1e-9)
            of, left = f" of {last:,}", f", {tqdm.format_interval(round(seconds))} left"
        loss = f"loss {row['loss']:.4f}, {speed:,.0f} images per second"
        return f"Step {self.step:,}{of}: {loss}{left}"

    def finish(self, script: str, *flags: str) -> None:
        """Print where the pictures are, and a command that draws more samples."""
        files = sorted(p.name for p in self.folder.iterdir() if p.suffix in (".png", ".gif"))
        names = ", ".join(name for name in files if not name.startswith("samples_"))
        self.say(f"Pictures in {self.folder}: samples_*.png while training, {names}")
        paths = [str(self.lesson_dir / script), *flags, "--model_checkpoint"]
        paths.append(str(saved(self.folder)[-1].absolute()))
        words = [word.removeprefix(f"{Path.cwd()}/") for word in paths]
        self.say(f"More samples: {shlex.join([sys.executable, *words])}")


def tensorboard_writer(folder: Path, start: int) -> Any:
    """A writer of files for TensorBoard, which drops what was written after step start."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs a package: pip install tensorboard") from None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
