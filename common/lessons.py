"""Load the checkpoint of any lesson, and know the networks that others published."""

import importlib
from types import ModuleType
from typing import Any, NamedTuple

from common import checkpoint
from common.errors import UserError

# The module of each lesson whose load(source, sha256=...) rebuilds its process and network.
LESSONS = {
    "lesson_02": "lesson_02.sample_mnist",
    "lesson_05": "lesson_05.sample_mnist",
    "lesson_05.class_conditional": "lesson_05.class_conditional.sample_mnist",
    "lesson_05.text_to_image": "lesson_05.text_to_image.sample_mnist",
    "lesson_09": "lesson_09.sample_mnist",
}
# The module of each lesson that knows networks of its shape which others published.
PUBLISHED = {"lesson_05": "lesson_05.published", "lesson_09": "lesson_09.published"}


class Published(NamedTuple):
    """A published network: the tables of names that its files may have, each from our layers to
    theirs; its data; and the config of a checkpoint."""

    names: list[dict[str, str]]
    dataset: str
    config: dict[str, Any]


def published() -> dict[str, ModuleType]:
    """The modules of published networks, by lesson."""
    return {lesson: importlib.import_module(name) for lesson, name in PUBLISHED.items()}


def load(source: str, sha256: str | None = None) -> tuple[Any, Any, checkpoint.Checkpoint]:
    """The process, the averaged network in eval mode, and the content of a checkpoint.

    The file names its lesson, and the table above the module: no name from a file is imported.

    Raises:
        UserError: the file is no checkpoint, or its lesson is not in the table.
    """
    lesson = checkpoint.read_header(source, sha256).lesson
    if lesson not in LESSONS:
        raise UserError(f"{source} is a checkpoint of {lesson}: choose one of {', '.join(LESSONS)}")
    return importlib.import_module(LESSONS[lesson]).load(source, sha256=sha256)
