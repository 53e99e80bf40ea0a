"""What every break_it.py shares: sample a trained network with and without one change."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common import lessons
from common.checkpoint import Checkpoint
from common.errors import UserError, check_at_least, check_at_most
from common.options import CheckpointOptions
from common.pictures import save_rows
from common.sampling import inference, last_images

import torch
from torch import Tensor
from tqdm import tqdm


@dataclass
class BreakOptions(CheckpointOptions):
    """The flags of every break_it.py.

    Args:
        num_samples: images per row.
    """

    num_samples: int = 8

    def __post_init__(self) -> None:
        check_at_least(1, num_samples=self.num_samples)
        check_at_most(10_000, num_samples=self.num_samples)  # they are drawn at once


@dataclass(eq=False)
class Bench:
    """A trained network on the device, and the noise to sample it from. It is hashable, so that
    functools.cache can keep samples that several breaks need."""

    process: Any
    model: Any
    content: Checkpoint
    options: BreakOptions
    device: torch.device

    def noise(self) -> Tensor:
        """x_T (num_samples, C, H, W). Sets the seed, so that the steps draw the same noise, too."""
        torch.manual_seed(self.options.seed)
        shape = (self.options.num_samples, *self.content.image_shape)
        return torch.randn(shape, device=self.device)

    def last(self, trajectory: Iterator[tuple[int, Tensor]], num_steps: int, name: str) -> Tensor:
        """The last images (B, C, H, W) of a trajectory, with a progress bar of that name."""
        return last_images(tqdm(trajectory, name, num_steps, unit="step", disable=None))


def run_breaks(
    lesson: str,
    breaks: Mapping[Any, Callable[[Bench], dict[str, Tensor]]],
    names: Sequence[str] | None,
    options: BreakOptions,
    trained_lesson: str | None = None,
) -> None:
    """Save broken_NAME.png for each break: the rows of images that its function returns.

    Args:
        lesson: the lesson whose folder has the output.
        breaks: name -> function.
        names: the breaks to make; all unless given.
        options: the flags.
        trained_lesson: the lesson of the checkpoint, if it differs from lesson.
    """
    process, model, content = lessons.load(options.model_checkpoint, options.sha256)
    trained_lesson = trained_lesson or lesson
    if content.lesson != trained_lesson:
        raise UserError(
            f"{options.model_checkpoint} is a checkpoint of {content.lesson}: "
            f"choose one of {trained_lesson}"
        )
    with inference(options, lesson) as (folder, device):
        bench = Bench(process.to(device), model.to(device), content, options, device)
        for name in names or breaks:
            rows = breaks[name](bench)
            save_rows(folder / f"broken_{name}.png", rows)
            print(f"{folder}/broken_{name}.png")
