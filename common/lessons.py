"""The one table by which a tool that serves several lessons finds the lesson of a checkpoint."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from common import checkpoint
from common.errors import UserError

# The module, by the lesson's name. It has load(file, sha256=...), which rebuilds process and
# network; conditions(digits, seed), if model.bind wants to know what to draw; and, where its data
# are no images in [-1, 1], to_images(content, x0) and bits_per_dim(process, model, content, images,
# num_terms).
LESSONS = {  # whose networks estimate the noise, and so can be sampled by lesson 6
    "lesson_05": "lesson_05.sample_mnist",
    "lesson_05.class_conditional": "lesson_05.class_conditional.sample_mnist",
    "lesson_05.text_to_image": "lesson_05.text_to_image.sample_mnist",
    "lesson_09": "lesson_09.sample_mnist",
}
EVERY = {"lesson_02": "lesson_02.sample_mnist", **LESSONS}
SAMPLER = "lesson_06.ddim"  # its ddim_sample draws from the networks of several lessons


def load(
    source: str, sha256: str | None = None, known: Mapping[str, str] = LESSONS
) -> tuple[Any, Any, checkpoint.Checkpoint]:
    """The process, the averaged network in eval mode, and the content of any lesson's checkpoint.

    The file says which lesson it is of, and the table which module that is: no name from a file
    is ever imported.
    """
    lesson = checkpoint.load(source, sha256=sha256)["lesson"]
    if lesson not in known:
        raise UserError(f"{source} is a checkpoint of {lesson}; known are {', '.join(known)}")
    return importlib.import_module(known[lesson]).load(source, sha256=sha256)


def own(lesson: str, name: str) -> Callable[..., Any] | None:
    """The function of that name, if that lesson's module has one."""
    return getattr(importlib.import_module(EVERY[lesson]), name, None)


def ddim_sample(*args: Any, **kwargs: Any) -> Tensor:
    """Lesson 6's sampler."""
    return importlib.import_module(SAMPLER).ddim_sample(*args, **kwargs)
