"""The one table by which a tool that serves several lessons finds the lesson of a checkpoint."""

import importlib
from typing import Any

from torch import Tensor

from common import checkpoint
from common.errors import UserError

# The module whose load(file, sha256=...) rebuilds process and network, by the lesson's name.
LESSONS = {
    "lesson_05": "lesson_05.sample_mnist",
    "lesson_05.class_conditional": "lesson_05.class_conditional.sample_mnist",
    "lesson_05.text_to_image": "lesson_05.text_to_image.sample_mnist",
    "lesson_09": "lesson_09.sample_mnist",
}

SAMPLER = "lesson_06.ddim"  # its ddim_sample draws from the networks of several lessons


def load(source: str, sha256: str | None = None) -> tuple[Any, Any, checkpoint.Checkpoint]:
    """The process, the averaged network in eval mode, and the content of any lesson's checkpoint.

    The file says which lesson it is of, and the table which module that is: no name from a file
    is ever imported.
    """
    lesson = checkpoint.load(source, sha256=sha256)["lesson"]
    if lesson not in LESSONS:
        raise UserError(f"{source} is a checkpoint of {lesson}; known are {', '.join(LESSONS)}")
    return importlib.import_module(LESSONS[lesson]).load(source, sha256=sha256)


def conditions(lesson: str, digits: list[int], seed: int) -> Tensor:
    """What that lesson's model.bind takes to be asked for these digits."""
    return importlib.import_module(LESSONS[lesson]).conditions(digits, seed)


def ddim_sample(*args: Any, **kwargs: Any) -> Tensor:
    """Lesson 6's sampler."""
    return importlib.import_module(SAMPLER).ddim_sample(*args, **kwargs)
